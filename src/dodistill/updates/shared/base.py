"""What a student update is: how the gradients of the matching loss come about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ...config.plugins import Named

#: student (or a functional stand-in of it) -> named loss terms on the current batch
Objective = Callable[[Callable[[Tensor], Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class UpdateConfig(Named, ABC):
    """Base of every update's `Config`."""

    replays: ClassVar[bool] = False  #: whether it has a use for replayed inputs

    @abstractmethod
    def build(self) -> Update: ...


class Update(ABC):
    """Leaves the gradient of its objective in the parameters; the loop then steps the optimisers."""

    def __init__(self) -> None:
        #: what it says of its last step beside the loss (tensors, unsynced), for the log
        self.terms: dict[str, Tensor] = {}

    @property
    def fp32(self) -> bool:
        """Must the student's passes run in fp32 when there is something to replay, whatever `loop.precision` says?"""
        return False

    @abstractmethod
    def backward(self, student: nn.Module, acquire: Objective, retain: Objective | None = None) -> dict[str, Tensor]:
        """Named terms, detached. Gradients are added to `.grad` of everything that the objectives touch.

        `acquire` is the loss on the new inputs, `retain` that on replayed ones (None: there are none, or none yet).
        """
