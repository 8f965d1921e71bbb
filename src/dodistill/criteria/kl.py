"""`kl`: T^2 KL(softmax(t/T) || softmax(s/T)). Hinton et al., Distilling the Knowledge in a Neural Network (2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.batch import Batch
from ..core.context import Context
from ..errors import positive
from ..functional import losses
from .shared.base import Criterion, CriterionConfig


class KL(Criterion):
    couples = False

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(self, s: Tensor, t: Tensor, batch: Batch | None = None) -> dict[str, Tensor]:
        return {"kd": losses.kl(s, t, self.temperature)}


@dataclass(frozen=True)
class Config(CriterionConfig):
    name: ClassVar[str] = "kl"
    temperature: float = 20.0  #: T > 0; 20 in the scripts of DAFL, CMI, Fast and DeepInv (close to logit regression)

    def build(self, context: Context) -> Criterion:
        positive("criterion", temperature=self.temperature)
        return KL(self.temperature)
