"""The base classes of a source: its settings (a frozen dataclass), and the object that makes or finds inputs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ...config.contracts import Kind as Kind
from ...config.contracts import SourceSettings
from ...config.plugins import Named
from ...core.context import Context
from ...core.runtime import restore_stream
from ...core.state import restore, saved
from ...data.rows import Pixels, Rows, chosen
from .generators import Generator


@dataclass(frozen=True)
class SourceConfig(Named, ABC):
    """Base of every source's `Config`.

    Class attributes:
        name: its file's name, which is the default.
        kind: determines the paper's dictionary size (KDCI Sec. 4.3: 8 generator, 32 inversion, 128 sampler).
        needs: requirements on the teacher (`batchnorm`, `attention`) or the user (`unlabeled`).
        reads_labels: whether it returns true labels, where the user's images have them.
        generates: whether one generator is trained through the whole run, so that `Source.makes_with` returns it.
        presets: named partial configs over all axes, e.g. {"desk": {"source": {"K": 5}, "optim": {"lr": 0.1}}}.
        origin: preset name -> the origin of its numbers (`ours` where the papers have none).
        costs: for `loop.time`: groups of settings, each with its smallest value. The time of an acquisition is
            proportional to each group, whose settings are reduced together.
        together: whether `acquire` may run on every process of a run, which then share the passes of teacher and
            student (`core/passes.py`). All random numbers must come from the context's generators, and of inner
            activations only `batchnorm_inputs` may be read.
        trains, keeps: for `dodistill methods`: the networks that it trains, and its memory besides the pool.
    """

    warmup: int = 0  #: acquisitions before the first matching step
    every: int = 400  #: matching steps per acquisition; 0 acquires once, before the first step

    kind: ClassVar[Kind]
    needs: ClassVar[frozenset[str]] = frozenset()
    reads_labels: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    together: ClassVar[bool] = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    origin: ClassVar[dict[str, str]] = {}
    costs: ClassVar[tuple[dict[str, float], ...]] = ()
    trains: ClassVar[str] = "nothing"
    keeps: ClassVar[str] = "nothing"

    def teacher_passes(self) -> tuple[float, float]:
        """Forwards and backwards of the teacher for each image that joins the pool, its labelling included."""
        return 1.0, 0.0

    def counted(self, unlabeled: int) -> Self:
        """The same settings, with the number of unlabelled images in place of a 0 that means all of them."""
        return self

    @property
    def members(self) -> Mapping[str, SourceSettings]:
        """Name -> settings of the sources that this one consists of; none, as a rule."""
        return {}

    @abstractmethod
    def build(self, context: Context) -> Source: ...


def scaled(settings: SourceSettings, share: float) -> tuple[Any, float]:
    """The same source with acquisitions of about `share` of the cost, and the share that its smallest values allow."""
    values: dict[str, Any] = {}
    reached, groups = 1.0, list(settings.costs)
    for i, group in enumerate(groups):
        wanted = (share / reached) ** (1 / (len(groups) - i)) if share else 0.0
        have = {name: getattr(settings, name) for name in group if getattr(settings, name)}
        least = max((group[name] / value for name, value in have.items()), default=1.0)
        part = min(1.0, max(wanted, least, 1e-3))
        for name, value in have.items():
            values[name] = value * part if isinstance(value, float) else max(1, math.ceil(value * part))
        reached *= part
    return replace(settings, **values), reached  # type: ignore[type-var]


def balanced_labels(n: int, classes: int, generator: torch.Generator) -> Tensor:
    """[n] long: every class equally often, in order. The rest, n modulo classes, are random classes, each once."""
    rest, device = n % classes, generator.device
    whole = torch.arange(n - rest, device=device) % classes
    return torch.cat([whole, torch.randperm(classes, generator=generator, device=device)[:rest]]) if rest else whole


def drawn_labels(n: int, classes: int, generator: torch.Generator, balanced: bool = False) -> Tensor:
    """[n] long: target classes drawn uniformly, or by `balanced_labels`."""
    if balanced:
        return balanced_labels(n, classes, generator)
    return torch.randint(classes, (n,), generator=generator, device=generator.device)


@dataclass
class Acquired:
    """A batch of substitution inputs, float in [0, 1] or uint8, [n, C, H, W], with logits and labels if known.

    Images of the user's (`context.unlabeled`) are returned as rows, so that nothing copies their pixels.
    """

    images: Pixels
    logits: Tensor | None = None  #: the teacher's, [n, K]
    labels: Tensor | None = None  #: true classes, long [n], where the data have them
    #: other inputs, from which the dictionary is built instead (for a sampler: once)
    reference: Acquired | None = None

    def take(self, index: Tensor) -> Acquired:
        """The inputs at `index`. The tensors may lie on different devices."""
        logits, labels = (None if v is None else v[index.to(v.device)] for v in (self.logits, self.labels))
        return Acquired(chosen(self.images, index), logits, labels)


class Source(ABC):
    """Makes or finds substitution inputs. `state_dict` holds everything that changes between acquisitions."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.generator = context.generator("source")
        #: the loss terms of the last acquisition (tensors, unsynced), for the log
        self.terms: dict[str, Tensor] = {}
        #: notes on these inputs for the user, in the summary and the model card
        self.notes: list[str] = []

    @abstractmethod
    def acquire(self, student: nn.Module, round: int) -> Acquired:
        """The inputs of acquisition number `round` (from 0). The student is in eval mode and gets no gradients."""

    def expected(self, first: int, rounds: int) -> float:
        """The images of `rounds` acquisitions, the first of which, already made, brought `first` to the pool.

        The run asks once, for all of its acquisitions. Raises DodistillError if they cannot have their effect."""
        return first * rounds

    def makes_with(self) -> tuple[nn.Module, int, int] | None:
        """(generator, d, its steps per acquisition) of a generator that is trained through the whole run, else None.

        It maps z ~ N(0, I) [B, d] to images in [0, 1] [B, C, H, W]."""
        return None

    def generators(self) -> list[nn.Module]:
        """The image generators among the modules that it holds, also within lists, for `loop.compile`."""
        held = [part for value in vars(self).values() for part in (value if isinstance(value, list) else [value])]
        return [net for part in held if isinstance(part, nn.Module) for net in _generators(part)]

    def parts(self) -> dict[str, Any]:
        """Name -> anything with state_dict/load_state_dict, or a tensor, that changes between acquisitions."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()} | saved(self.parts(), self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore_stream(self.generator, state["generator"])
        restore(self.parts(), state)


def _generators(module: nn.Module) -> list[nn.Module]:
    """The generators in `module`, without those within another one."""
    if isinstance(module, Generator):
        return [module]
    return [net for part in module.children() for net in _generators(part)]


def ask(context: Context, chunk: int = 512, some: Tensor | None = None) -> tuple[Rows, Tensor]:
    """The unlabelled images (all, or those at `some`), as rows, and the teacher's logits [n, K] of them, on the run's
    device."""
    x = context.unlabeled
    assert x is not None  # the job checks `needs` before the run begins
    x = x if some is None else x.select(some)
    return x, context.label(x, chunk, "labelling images")
