"""`l1`: mean |s - t| on the logits. Fang et al., Data-Free Adversarial Distillation (2019), Eq. 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.batch import Batch
from ..core.context import Context
from ..functional import losses
from .shared.base import Criterion, CriterionConfig


class L1(Criterion):
    couples = False

    def forward(self, s: Tensor, t: Tensor, batch: Batch | None = None) -> dict[str, Tensor]:
        return {"kd": losses.l1(s, t)}


@dataclass(frozen=True)
class Config(CriterionConfig):
    name: ClassVar[str] = "l1"

    def build(self, context: Context) -> Criterion:
        return L1()
