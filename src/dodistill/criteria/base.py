"""What a criterion is: it measures how far the student's (compensated) logits are from the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..runtime import Context


class Criterion(nn.Module):
    """Logits s, t [B, K] -> named terms, each a scalar; the loss is their sum."""

    own_lr: float | None = None  #: learning rate of an Adam for its own parameters; None: it has none

    def forward(self, s: Tensor, t: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class CriterionConfig:
    """The flags of a criterion. A file in this folder has one subclass of it, named `Config`."""

    name: ClassVar[str]

    def build(self, context: Context) -> Criterion:
        raise NotImplementedError
