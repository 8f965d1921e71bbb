"""The base classes of an update: how the gradient of the matching loss is computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ...config.plugins import Named

#: student (or a function that evaluates it at other weights) -> named loss terms on the current batch
Objective = Callable[[Callable[[Tensor], Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class UpdateConfig(Named, ABC):
    """Base of every update's `Config`."""

    replays: ClassVar[bool] = False  #: whether it uses replayed inputs

    @abstractmethod
    def build(self) -> Update: ...


class Update(ABC):
    """Writes the gradient of its objective into the parameters. The matcher then steps the optimisers."""

    def __init__(self) -> None:
        #: further quantities of its last step (tensors, unsynced), for the log
        self.terms: dict[str, Tensor] = {}

    @property
    def fp32(self) -> bool:
        """Whether the student's passes run in fp32 when there are replayed inputs, whatever `loop.precision` says."""
        return False

    @abstractmethod
    def backward(self, student: nn.Module, acquire: Objective, retain: Objective | None = None) -> dict[str, Tensor]:
        """Named terms, detached. Gradients are added to `.grad` of all parameters that the objectives use.

        `acquire` is the loss on the new inputs, `retain` that on replayed ones (None: there are none, or none yet).
        """
