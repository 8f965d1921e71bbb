"""The base classes of an intervention, and the combination of several.

An intervention cuts the path from the confounder Z (the composition of the substitution data) to the student. It acts
on the draw, on the predictions, or on both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from ...config.plugins import Named
from ...core.batch import Batch
from ...core.context import Context
from ...errors import DodistillError
from ...models.taps import tapped
from .dictionary import ConfounderDictionary


class PoolLike(Protocol):
    """The part of the pool that an intervention reads."""

    def __len__(self) -> int: ...

    @property
    def logits(self) -> Tensor:
        """The teacher's logits of the clean images, float [len(pool), K]."""
        ...


class Intervention(nn.Module):
    """The defaults do nothing. The distillation loss trains its parameters, if it has any."""

    name: str = ""  #: in the log
    own_lr: float | None = None  #: rate of a separate Adam; None: the student's optimiser
    decays: bool = False  #: whether the student's weight decay applies to its parameters, in the student's optimiser
    at_test: bool = False  #: whether `compensate` is part of the delivered student
    needs: frozenset[str] = frozenset()  #: features of both networks in `batch`: `features` (the penultimate ones)
    #: whether `compensate` or `observe` couple the images of a batch; see `Criterion.couples`. Without them, it cannot.
    couples: ClassVar[bool | None] = False

    def weights(self, pool: PoolLike, dictionary: ConfounderDictionary | None) -> Tensor | None:
        """On the draw: a weight >= 0 for each image of the pool, [len(pool)], in any scale; None: no weights."""
        return None

    def compensate(self, s: Tensor, dictionary: ConfounderDictionary | None, batch: Batch | None = None) -> Tensor:
        """On the student's logits [B, K], before the criterion compares them with the teacher's. At test time, `batch`
        has only the student's features."""
        return s

    def observe(self, t: Tensor, batch: Batch) -> None:
        """Called once per matching step, after the backward pass, to store statistics of the batch.

        `compensate` may be called several times in a step: by updates that look ahead, and for replayed inputs.
        """

    def deliver(self, student: nn.Module, dictionary: ConfounderDictionary | None) -> nn.Module:
        """The delivered network, for an intervention that stays `at_test`: here a wrapper around the student."""
        return Compensated(student, self, dictionary)

    def log(
        self, s: Tensor, t: Tensor, dictionary: ConfounderDictionary | None, batch: Batch | None = None
    ) -> dict[str, Tensor]:
        """Scalars that describe its effect on a batch, without a sync. Called at log points only."""
        return {}


class Compensated(nn.Module):
    """A student, and an intervention on its predictions that stays at test time. `student` is the bare network."""

    def __init__(self, student: nn.Module, part: Intervention, dictionary: ConfounderDictionary | None) -> None:
        super().__init__()
        self.student, self.part, self.dictionary = student, part, dictionary

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> compensated logits [B, K]."""
        with tapped(self.student, self.part.needs) as own:
            s = self.student(x).float()
        where = torch.full((len(x),), -1, device=x.device)
        return self.part.compensate(s, self.dictionary, Batch(where, s.argmax(1), s, 1.0, own))


@dataclass(frozen=True)
class InterventionConfig(Named):
    """The flags of an intervention. A file in this folder has one subclass of it, named `Config`."""

    @property
    def needs_dictionary(self) -> bool:
        return False

    def build(self, context: Context) -> Intervention:
        raise NotImplementedError


def _require_weights(w: object, n: int, part: Intervention) -> None:
    who = f"intervention {part.name or type(part).__name__}: weights"
    if not isinstance(w, Tensor) or tuple(w.shape) != (n,):
        said = f"shape {tuple(w.shape)}" if isinstance(w, Tensor) else f"type {type(w).__name__}"
        raise DodistillError(f"{who} have {said}; give a tensor of shape ({n},), a weight for each image of the pool.")
    if bool((w < 0).any()):
        raise DodistillError(f"{who} go down to {float(w.min()):.3g}; they must be at least 0.")


class Interventions(nn.Module):
    """Several as one: weights are multiplied, compensations are applied in order, logs get the name as prefix."""

    def __init__(self, parts: Iterable[Intervention] = ()):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def __iter__(self) -> Iterator[Intervention]:
        for part in self.parts:
            assert isinstance(part, Intervention)
            yield part

    def weights(self, pool: PoolLike, dictionary: ConfounderDictionary | None) -> Tensor | None:
        """[len(pool)] with mean 1, or None where no part has weights (all images are equal).

        Raises DodistillError for weights that are not one number >= 0 for each image.
        """
        product: Tensor | None = None
        for part in self:
            w = part.weights(pool, dictionary)
            if w is not None:
                _require_weights(w, len(pool), part)
                product = w if product is None else product * w
        return None if product is None else product / product.mean()

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(part.needs for part in self))

    def compensate(self, s: Tensor, dictionary: ConfounderDictionary | None, batch: Batch | None = None) -> Tensor:
        for part in self:
            s = part.compensate(s, dictionary, batch)
        return s

    def observe(self, t: Tensor, batch: Batch) -> None:
        for part in self:
            part.observe(t, batch)

    def deliver(self, student: nn.Module, dictionary: ConfounderDictionary | None) -> nn.Module:
        """The student with the interventions that stay at test time. Without any, it is the student itself."""
        for part in self:
            student = part.deliver(student, dictionary) if part.at_test else student
        return student

    @torch.no_grad()
    def log(
        self, s: Tensor, t: Tensor, dictionary: ConfounderDictionary | None, batch: Batch | None = None
    ) -> dict[str, Tensor]:
        """`name/quantity` -> scalar. Each part gets the logits after the parts before it."""
        logged: dict[str, Tensor] = {}
        for part in self:
            logged |= {f"{part.name}/{k}": v for k, v in part.log(s, t, dictionary, batch).items()}
            s = part.compensate(s, dictionary, batch)
        return logged
