"""`cid`: sample and class representations beside the predictions. Deng and Zhang, Comprehensive Knowledge Distillation
with Causal Intervention (NeurIPS 2021), as its released code has it. With f, h the penultimate features of student and
teacher:

    L_sample = (1/B) sum_i || r(f_i) - h_i ||^2 / || h_i ||^2                  r linear, learned, without weight decay
    L_class  = (1/|U|) sum_{k in U} (1/n_k^2) sum_{i,j: y_i = y_j = k} ( cos(f_i, f_j) - cos(h_i, h_j) )^2
    L        = a ( CE(z', y) + L_KL(z, t) ) + b L_sample + c L_class

U are the classes with two or more inputs in the batch. z are the student's own logits, and z' those after an
intervention (`interventions/cid.py`; without one z' = z). L_KL = T^2 KL at temperature T. The first `init` share of the
run has no CE.

Deviations, and why
 1. Without labels, as in all data-free sources, y is the teacher's prediction. Its hard label has less information than
    its logits, so L_KL(z', t) replaces CE (`supervise`). There is no published version of CID without data.
 2. L_class is one masked product [B, B] instead of a loop over classes. The value is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as nnf
from torch import Tensor, nn

from ..core.batch import Batch
from ..core.context import Context
from ..core.runtime import seeded
from ..errors import DodistillError
from ..functional import losses
from .shared.base import Criterion, CriterionConfig, both, widths


def normalised_mse(f: Tensor, h: Tensor) -> Tensor:
    """(1/B) sum_i ||f_i - h_i||^2 / ||h_i||^2 of features [B, d]; >= 0."""
    return ((f - h).square().sum(1) / h.square().sum(1).clamp_min(1e-12)).mean()


def class_shape(f: Tensor, h: Tensor, y: Tensor) -> Tensor:
    """L_class of features f [B, d], h [B, e] and classes y [B]; in [0, 4], 0 when no class has two inputs."""
    f, h = nnf.normalize(f, dim=1), nnf.normalize(h, dim=1)
    same = y[:, None] == y
    n = same.sum(1)
    pair = same * (n > 1)[:, None] / n.square()[:, None]
    classes = ((n > 1) / n).sum()
    return (pair * (f @ f.T - h @ h.T).square()).sum() / classes.clamp_min(1)


class CID(Criterion):
    needs = frozenset({"features"})
    couples = True

    def __init__(self, config: Config, regressor: nn.Linear, labelled: bool) -> None:
        super().__init__()
        self.config, self.r = config, regressor
        self.labelled = config.supervise == "labels" or (config.supervise == "auto" and labelled)

    def forward(self, s: Tensor, t: Tensor, batch: Batch | None = None) -> dict[str, Tensor]:
        assert batch is not None
        c, (f, h) = self.config, both(batch.student, batch.teacher)
        terms = {
            "kd": c.a * losses.kl(batch.raw, t, c.temperature),
            "sample": c.b * normalised_mse(self.r(f), h),
            "class": c.c * class_shape(f, h, batch.labels),
        }
        if batch.done >= c.init:
            own = nnf.cross_entropy(s, batch.labels) if self.labelled else losses.kl(s, t, c.temperature)
            terms["supervised"] = c.a * c.ce * own
        return terms


@dataclass(frozen=True)
class Config(CriterionConfig):
    """a, b and c are tuned for each pair in the paper; presets of source `data` have the five released settings."""

    name: ClassVar[str] = "cid"
    a: float = 1.0  #: weight of the predictions, CE and KL together
    b: float = 10.0  #: weight of L_sample; 8 to 65 in the released settings
    c: float = 1.0  #: weight of L_class; 0.1 to 2
    ce: float = 1.0  #: weight of CE relative to KL, within a
    temperature: float = 4.0  #: T of the KL
    init: float = 20 / 240  #: share of the run without CE; intervention `cid` has the same setting
    supervise: Literal["auto", "labels", "teacher"] = (
        "auto"  #: target of z': labels where the data have them, else the teacher | labels (CE) | teacher's logits (KL)
    )

    def build(self, context: Context) -> Criterion:
        if min(self.a, self.b, self.c, self.ce) < 0 or not self.temperature > 0 or not 0 <= self.init < 1:
            raise DodistillError(
                f"criterion cid: a, b, c and ce are weights >= 0, temperature is above 0 and init a share below 1; "
                f"they are {self.a}, {self.b}, {self.c}, {self.ce}, {self.temperature}, {self.init}."
            )
        regressor = seeded(nn.Linear, context.generator("criterion"), *widths(context))
        return CID(self, regressor, context.labels is not None)
