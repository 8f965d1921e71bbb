"""`dkd`: separate terms for the target class and the others. Zhao et al., Decoupled Knowledge Distillation (CVPR 2022).

    b    = (p_y, 1 - p_y)                    the odds of the true class y, p = softmax(. / T)
    TCKD = T^2 KL(b_teacher || b_student)
    NCKD = T^2 KL( softmax of the other logits / T ), teacher || student
    L    = ce CE + warm-up * (alpha TCKD + beta NCKD)

The warm-up grows from 0 to 1 over the first `warmup` share of the run, with every step; in the released code
(mdistiller) with every epoch, from 1/20.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..core.batch import Batch
from ..core.context import Context
from ..errors import DodistillError
from .shared.base import Criterion, Labelled, LabelledConfig


def decoupled(s: Tensor, t: Tensor, y: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """(TCKD, NCKD) of logits [B, K], K >= 3, and true classes [B]; both >= 0, means over the batch."""
    parts = []
    for z in (s, t):
        z = z / T
        own = z.gather(1, y[:, None])
        others = z.masked_fill(nnf.one_hot(y, z.shape[1]).bool(), -torch.inf)
        rest = others.logsumexp(1, keepdim=True)
        binary = nnf.log_softmax(torch.cat([own, rest], 1), 1)
        parts.append((binary, (others - rest).masked_fill(others.isinf(), 0.0)))  # equal in both at y: no contribution
    (b_s, n_s), (b_t, n_t) = parts
    tckd = (b_t.exp() * (b_t - b_s)).sum(1).mean()
    nckd = (n_t.exp() * (n_t - n_s)).sum(1).mean()
    return T * T * tckd, T * T * nckd


class DKD(Labelled):
    couples = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config

    def own(self, s: Tensor, t: Tensor, batch: Batch) -> dict[str, Tensor]:
        c = self.config
        tckd, nckd = decoupled(s, t, batch.labels, c.temperature)
        grown = min(batch.done / c.warmup, 1.0) if c.warmup else 1.0
        return {"target": grown * c.alpha * tckd, "others": grown * c.beta * nckd}


@dataclass(frozen=True)
class Config(LabelledConfig):
    name: ClassVar[str] = "dkd"
    alpha: float = 1.0  #: weight of the target class's term
    beta: float = 8.0  #: weight of the other classes' term; 0.5 to 8 in the released settings, by pair
    warmup: float = 20 / 240  #: share of the run in which both weights grow from 0

    def build(self, context: Context) -> Criterion:
        if context.num_classes < 3 or not 0 <= self.warmup <= 1:
            raise DodistillError(
                f"criterion dkd: warmup is {self.warmup}, with {context.num_classes} classes; warmup must be a share "
                "of the run, in [0, 1], and with two classes there are no other classes: use hinton."
            )
        return DKD(self)
