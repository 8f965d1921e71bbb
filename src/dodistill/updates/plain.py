"""The plain update: the gradient of the matching loss at the student's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..functional.terms import detached, total
from .shared.base import Objective, Update, UpdateConfig


@dataclass(frozen=True)
class Config(UpdateConfig):
    """Nothing to set."""

    name: ClassVar[str] = "plain"

    def build(self) -> Update:
        return Plain()


class Plain(Update):
    """One forward and one backward pass."""

    couples = False

    def backward(self, student: nn.Module, acquire: Objective, retain: Objective | None = None) -> dict[str, Tensor]:
        terms = acquire(student)
        total(terms).backward()
        return detached(terms)
