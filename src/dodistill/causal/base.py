"""What an intervention is, and how several act together. It severs the path from the confounder Z (what the
substitution data happens to be) to the student, at one or both of two places: on the draw, and on the predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..runtime import Context
from .dictionary import ConfounderDictionary


class PoolLike(Protocol):
    """What an intervention may know of the pool."""

    def __len__(self) -> int: ...

    @property
    def logits(self) -> Tensor:
        """The teacher's logits of the clean images, float [len(pool), K]."""
        ...


class Intervention(nn.Module):
    """The defaults do nothing. Its parameters, if any, are trained by the distillation loss."""

    name: str = ""  #: in the log
    own_lr: float | None = None  #: an Adam of its own with this rate; None: the student's optimiser, no weight decay
    at_test: bool = False  #: whether `compensate` is part of the delivered student

    def weights(self, pool: PoolLike, dictionary: ConfounderDictionary | None) -> Tensor | None:
        """On the draw: a weight >= 0 for each of the pool's images, [len(pool)], any scale; None: no opinion."""
        return None

    def compensate(self, s: Tensor, dictionary: ConfounderDictionary | None) -> Tensor:
        """On the student's logits [B, K], before they meet the teacher's."""
        return s

    def log(self, s: Tensor, t: Tensor, dictionary: ConfounderDictionary | None) -> dict[str, Tensor]:
        """Scalars that tell what it does to a batch. Called at log points only; never reads them back to the host."""
        return {}


@dataclass(frozen=True)
class InterventionConfig:
    """The flags of an intervention. A file in this folder has one subclass of it, named `Config`."""

    name: ClassVar[str]

    @property
    def needs_dictionary(self) -> bool:
        return False

    def build(self, context: Context) -> Intervention:
        raise NotImplementedError


class Interventions(nn.Module):
    """Several as one: weights multiply, compensations follow each other in order, logs get the name as prefix."""

    def __init__(self, parts: Iterable[Intervention] = ()):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def __iter__(self) -> Iterator[Intervention]:
        for part in self.parts:
            assert isinstance(part, Intervention)
            yield part

    def weights(self, pool: PoolLike, dictionary: ConfounderDictionary | None) -> Tensor | None:
        """[len(pool)] with mean 1, or None when no part has an opinion (every image alike)."""
        product: Tensor | None = None
        for part in self:
            w = part.weights(pool, dictionary)
            if w is not None:
                product = w if product is None else product * w
        return None if product is None else product / product.mean()

    def compensate(self, s: Tensor, dictionary: ConfounderDictionary | None) -> Tensor:
        for part in self:
            s = part.compensate(s, dictionary)
        return s

    def compensate_at_test(self, s: Tensor, dictionary: ConfounderDictionary | None) -> Tensor:
        """Only what stays in the delivered student; by default nothing does."""
        for part in self:
            s = part.compensate(s, dictionary) if part.at_test else s
        return s

    @torch.no_grad()
    def log(self, s: Tensor, t: Tensor, dictionary: ConfounderDictionary | None) -> dict[str, Tensor]:
        """`name/quantity` -> scalar; each part sees what the parts before it made of s."""
        logged: dict[str, Tensor] = {}
        for part in self:
            logged |= {f"{part.name}/{k}": v for k, v in part.log(s, t, dictionary).items()}
            s = part.compensate(s, dictionary)
        return logged

    @property
    def at_test(self) -> bool:
        return any(part.at_test for part in self)
