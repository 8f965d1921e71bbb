"""What changes in a part of a run is saved by name, and restored in place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dodistill.core.state import restore, saved
from dodistill.errors import DodistillError
from dodistill.replay.shared.base import Replay
from dodistill.updates.shared.base import Objective, Update
from helpers import context, same


class Counting(Update):
    def __init__(self) -> None:
        super().__init__()
        self.seen, self.net = torch.zeros(2), nn.Linear(2, 2)

    def backward(self, student: nn.Module, acquire: Objective, retain: Objective | None = None) -> dict[str, Tensor]:
        raise NotImplementedError

    def parts(self) -> dict[str, Any]:
        return {"seen": self.seen, "net": self.net}


def test_an_update_has_a_state() -> None:
    one, other = Counting(), Counting()
    one.seen += 3
    kept = other.seen
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    same(one.state_dict(), other.state_dict())
    assert other.seen is kept


def test_a_replay_may_keep_tensors(teacher: nn.Module) -> None:
    class Keeps(Replay):
        def parts(self) -> dict[str, Any]:
            return {"x": x}

    x = torch.zeros(3)
    memory = Keeps(context(teacher))
    state = copy.deepcopy(memory.state_dict())
    x += 1
    memory.load_state_dict(state)
    assert x.tolist() == [0, 0, 0]
    assert memory.memory >= 12


def test_what_has_no_state_is_named() -> None:
    with pytest.raises(DodistillError, match=r"test_state\.Counting: parts\(\)\['x'\] is a list; a checkpoint keeps"):
        saved({"x": [1]}, Counting())
    x = torch.ones(2, requires_grad=True)
    restore({"x": x}, {"x": torch.zeros(2)})
    assert x.tolist() == [0, 0]
