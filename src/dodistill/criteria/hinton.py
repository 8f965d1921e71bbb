"""`hinton`: labels and softened logits. Hinton et al., Distilling the Knowledge in a Neural Network (2015).

    L = ce CE(s, y) + kd T^2 KL(softmax(t/T) || softmax(s/T))

The weights are RepDistiller's. `kl` is the second term alone; `--criterion.ce 1 --criterion.kd 0` is the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.context import Context
from .shared.base import Criterion, Labelled, LabelledConfig


@dataclass(frozen=True)
class Config(LabelledConfig):
    name: ClassVar[str] = "hinton"
    ce: float = 0.1  #: weight of the cross-entropy to the labels (the data's, else the teacher's)
    kd: float = 0.9  #: weight of the KL to the teacher

    def build(self, context: Context) -> Criterion:
        return Labelled(self)
