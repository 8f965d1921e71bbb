"""`fitnet`: a middle feature map, through a regressor. Romero et al., FitNets: Hints for Thin Deep Nets (ICLR 2015).

    L_hint = mean ( r(F) - H )^2      F, H the maps of student and teacher at one stage; r a 1x1 convolution + BatchNorm

Deviations, and why
 1. One run with both losses, as in RepDistiller; the paper trains the hint first and alone.
 2. r has no ReLU at its end: the maps that `taps.stages` records may be negative.
 3. r has no weight decay; only the student has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as nnf
from torch import Tensor, nn

from ..core.batch import Batch
from ..core.context import Context
from ..core.runtime import seeded
from ..errors import DodistillError
from .shared.base import Criterion, Labelled, LabelledConfig, paired, probes


class FitNet(Labelled):
    needs = frozenset({"stages"})
    couples = False  # but for the statistics of its BatchNorm, which are synchronised

    def __init__(self, config: Config, conv: nn.Conv2d, stage: int) -> None:
        super().__init__(config)
        self.weight, self.stage = config.weight, stage
        self.r = nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels, track_running_stats=False))

    def own(self, s: Tensor, t: Tensor, batch: Batch) -> dict[str, Tensor]:
        F, H = paired(batch.student, batch.teacher)[self.stage]
        return {"hint": self.weight * nnf.mse_loss(self.r(F), H)}


@dataclass(frozen=True)
class Config(LabelledConfig):
    name: ClassVar[str] = "fitnet"
    weight: float = 100.0  #: weight of the hint
    stage: int = -2  #: index among the resolutions that both networks have, the finest first; -1 is the coarsest

    def build(self, context: Context) -> Criterion:
        pairs = paired(*probes(context, FitNet.needs))
        if not -len(pairs) <= self.stage < len(pairs):
            raise DodistillError(
                f"criterion fitnet: stage is {self.stage}; student and teacher share {len(pairs)} resolution(s), "
                f"so give {-len(pairs)} to {len(pairs) - 1}."
            )
        F, H = pairs[self.stage]
        return FitNet(
            self, seeded(nn.Conv2d, context.generator("criterion"), F.shape[1], H.shape[1], 1), self.stage % len(pairs)
        )
