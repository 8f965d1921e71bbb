"""What a student update is: how the gradients of the matching loss come about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

#: student (or a functional stand-in of it) -> named loss terms on the current batch
Objective = Callable[[Callable[[Tensor], Tensor]], dict[str, Tensor]]


class UpdateConfig(ABC):
    """Base of every update's `Config`."""

    name: ClassVar[str]

    @abstractmethod
    def build(self) -> Update: ...


class Update(ABC):
    """Leaves the gradient of its objective in the parameters; the loop then steps the optimisers."""

    @abstractmethod
    def backward(self, student: nn.Module, objective: Objective) -> dict[str, Tensor]:
        """Named terms, detached. Gradients are added to `.grad` of everything that the objective touches."""
