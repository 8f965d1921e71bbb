"""The base classes of a replay: a memory of the student's past inputs, so that an update can retain while it acquires.

The student learns from the pool, and must not forget the replayed inputs. A pool that keeps everything needs no replay;
methods with fresh inputs at every step need one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...config.plugins import Named
from ...core.context import Context
from ...core.runtime import restore_stream
from ...core.state import restore, saved
from ...data.rows import Pixels


class Replay:
    """A memory. This base class remembers nothing."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.generator = context.generator("replay")
        #: the loss terms of its last training step (tensors, unsynced), for the log
        self.terms: dict[str, Tensor] = {}

    def follow(self, source: Any) -> None:
        """Called once with the source of the inputs, before the first acquisition. Raises DodistillError for a source
        that this replay cannot follow."""

    @property
    def ready(self) -> bool:
        """Whether there is anything to replay."""
        return False

    def remember(self, images: Pixels, logits: Tensor, round: int) -> None:
        """Called after acquisition number `round` with the images that joined the pool, uint8 [n, C, H, W] (a
        tensor, or rows of the user's images), and the teacher's logits of them."""

    def draw(self, student: nn.Module, step: int) -> tuple[Tensor, Tensor | None]:
        """Replayed inputs for one matching step: images float in [0, 1] [m, C, H, W]; teacher logits, where known."""
        raise RuntimeError("this replay has nothing to draw")

    @property
    def memory(self) -> int:
        """Size of the memory in bytes."""
        return sum(v.numel() * v.element_size() for v in _tensors(self.state_dict()))

    def parts(self) -> dict[str, Any]:
        """Name -> anything with state_dict/load_state_dict, or a tensor, that changes."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()} | saved(self.parts(), self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore_stream(self.generator, state["generator"])
        restore(self.parts(), state)


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
