"""`adaptation`: DFND's loss for images from the wild. Chen et al., Learning Student Networks in the Wild (2021).

Soft labels at T = 4, plus the teacher's hard label through a learned confusion matrix Q (Eq. 6-8). On images of no
class the hard label is noise. Q models this noise, so that the student does not fit it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.batch import Batch
from ..core.context import Context
from ..errors import DodistillError, positive
from ..functional import losses
from .shared.base import Criterion, CriterionConfig


class Adaptation(Criterion):
    """KL at `temperature` + `noisy` * NLL(log(softmax(s) Q), argmax t); Q from the parameter a [K, K-1], at first 0."""

    couples = False

    def __init__(self, num_classes: int, temperature: float, teacher_accuracy: float, noisy: float, lr: float):
        super().__init__()
        self.temperature, self.teacher_accuracy, self.noisy = temperature, teacher_accuracy, noisy
        self.own_lr = lr
        self.a = nn.Parameter(torch.zeros(num_classes, num_classes - 1))

    def forward(self, s: Tensor, t: Tensor, batch: Batch | None = None) -> dict[str, Tensor]:
        noisy = losses.noisy_adaptation(s, t, self.a, self.teacher_accuracy)
        return {"kd": losses.kl(s, t, self.temperature), "noisy": self.noisy * noisy}


@dataclass(frozen=True)
class Config(CriterionConfig):
    """The released code sets `teacher_accuracy` to the teacher's measured test accuracy (0.9523 on CIFAR-10, 0.7774 on
    CIFAR-100). Without data it cannot be measured, and the teacher's mean confidence overestimates it. The default is a
    round guess; replace it where the accuracy is known (as the recipes of KDCI's tables do)."""

    name: ClassVar[str] = "adaptation"
    temperature: float = 4.0  #: T of the KL
    teacher_accuracy: float = 0.95  #: the diagonal of Q, in (0, 1)
    noisy: float = 1.0  #: weight of the hard term
    lr: float = 1e-3  #: learning rate of the Adam that trains a

    def build(self, context: Context) -> Criterion:
        if not 0 < self.teacher_accuracy < 1:
            raise DodistillError(
                f"criterion adaptation: teacher_accuracy is {self.teacher_accuracy}; give a share between 0 and 1, "
                "such as 0.95."
            )
        positive("criterion", temperature=self.temperature)
        if context.num_classes < 2:
            raise DodistillError(
                f"criterion adaptation needs at least 2 classes; the teacher has {context.num_classes}."
            )
        module = Adaptation(context.num_classes, self.temperature, self.teacher_accuracy, self.noisy, self.lr)
        return module.to(context.device)
