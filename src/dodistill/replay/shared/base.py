"""What a replay is: it remembers what the student has seen, so that an update can retain while it acquires.

The pool is what the student learns from now; a replay is what it must not forget. With a pool that keeps everything, no
replay is needed; methods with fresh inputs at every step need one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...config.plugins import Named
from ...core.context import Context


class Replay:
    """The defaults remember nothing."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.generator = context.generator("replay")
        #: the loss terms of its last training step (tensors, unsynced), for the log
        self.terms: dict[str, Tensor] = {}

    def follow(self, source: Any) -> None:
        """Once, before the first acquisition: the source whose inputs these are. Raises DodistillError for one that
        this replay cannot follow."""

    @property
    def ready(self) -> bool:
        """Is there anything to replay?"""
        return False

    def remember(self, images: Tensor, logits: Tensor, round: int) -> None:
        """After acquisition number `round`: images uint8 [n, C, H, W] that the student may see, teacher's logits."""

    def draw(self, student: nn.Module, step: int) -> tuple[Tensor, Tensor | None]:
        """Replayed inputs for one matching step: images float in [0, 1] [m, C, H, W]; the teacher's logits if known."""
        raise RuntimeError("this replay has nothing to draw")

    @property
    def memory(self) -> int:
        """Bytes that it holds."""
        return sum(v.numel() * v.element_size() for v in _tensors(self.state_dict()))

    def parts(self) -> dict[str, Any]:
        """Name -> anything with state_dict/load_state_dict that changes."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()} | {k: p.state_dict() for k, p in self.parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    nested = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [t for value in nested for t in _tensors(value)]


@dataclass(frozen=True)
class ReplayConfig(Named):
    """The flags of a replay. A file in this folder has one subclass of it, named `Config`."""

    def build(self, context: Context) -> Replay:
        raise NotImplementedError
