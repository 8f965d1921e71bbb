"""The base classes of an update: how the gradient of the matching loss is computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ...config.plugins import Named
from ...core.ranks import Ranks
from ...core.state import restore, saved

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

    #: False: the gradient is right where each process has its part of the batch, and the mean over the processes is
    #: taken after `backward`; what is not linear in gradients takes `self.ranks.averaged` of them. None: unknown, which
    #: several processes refuse.
    couples: ClassVar[bool | None] = None
    ranks: Ranks = Ranks()  #: the processes of the run; the matcher sets it

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

    def parts(self) -> dict[str, Any]:
        """Name -> anything with state_dict/load_state_dict, or a tensor, that changes from step to step.

        A tensor is restored in place, so it must exist from the start.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        return saved(self.parts(), self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self.parts(), state)
