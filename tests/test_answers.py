"""Modules that return more than logits: teacher, student, scores and files, as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dodistill.api import distill, evaluate
from dodistill.data.images import Images
from dodistill.engine.teach import Teach, teach
from dodistill.errors import DodistillError
from dodistill.models import Normalized, save_model
from dodistill.models.taps import penultimate
from dodistill.models.teacher import Teacher
from helpers import SHAPE, student, tree

WAYS: dict[str, Callable[[Tensor], Any]] = {
    "object": lambda logits: SimpleNamespace(logits=logits, loss=None),
    "dict": lambda logits: {"loss": None, "logits": logits},
}


class Says(nn.Module):
    """A network that returns its logits in another form."""

    def __init__(self, net: nn.Module, way: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.backbone, self.way = net, way

    def forward(self, x: Tensor) -> Any:
        return self.way(self.backbone(x))


@pytest.mark.parametrize("way", WAYS)
def test_a_teacher_and_a_student_that_return_an_object_or_a_dict(
    way: str, teacher: nn.Module, digits: Images, digits_test: Images, tmp_path: Path
) -> None:
    """The same run as with the logits alone, and the student's file has the keys of her module."""
    settings = {k: v for k, v in tree("dfnd", steps=3).items() if k not in ("source", "intervention")}

    def run(t: nn.Module, s: nn.Module) -> Any:
        return distill(
            t, s, tree("dfnd")["source"], "kdci", image_shape=SHAPE, unlabeled=digits.x[:300], test=digits_test,
            out=tmp_path / type(s).__name__, verbose=False, **settings,
        )  # fmt: skip

    plain = run(copy.deepcopy(teacher), student())
    hers = Says(student(), WAYS[way])
    said = run(Says(copy.deepcopy(teacher), WAYS[way]), hers)
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(said.student(x), plain.student(x), atol=1e-5)
    assert said.summary["student_accuracy"] == plain.summary["student_accuracy"]
    assert said.summary["student_name"] in ("Says", "tiny4")
    loaded = load_file(tmp_path / "Says" / "student.safetensors")
    assert loaded.keys() == hers.state_dict().keys()
    hers.load_state_dict(loaded)
    assert torch.allclose(hers.eval().backbone(x), said.student(x), atol=1e-5)
    assert evaluate(hers, digits_test, image_shape=SHAPE) == said.evaluate(digits_test)
    again = run(Says(copy.deepcopy(teacher), WAYS[way]), Says(student(), WAYS[way]))  # the finished run is loaded
    assert torch.equal(again.student(x), said.student(x))


@pytest.mark.parametrize("way", WAYS)
def test_what_reads_a_teacher_reads_such_a_one(way: str, teacher: nn.Module) -> None:
    wrapped, plain = Teacher(Says(copy.deepcopy(teacher), WAYS[way]), SHAPE), Teacher(teacher, SHAPE)
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(wrapped(x), plain(x))
    assert torch.allclose(wrapped.answers(x), plain(x), atol=1e-3)
    assert (wrapped.num_classes, wrapped.has_batchnorm) == (10, True)
    with penultimate(wrapped) as tap, torch.no_grad():
        wrapped(x)
        assert tap.value.shape[0] == 4


def test_such_a_network_can_be_taught(digits: Images) -> None:
    net = Says(student(), WAYS["object"])
    result = teach(net, digits.select(torch.arange(64)), None, Teach(epochs=1, batch=16, pad=1, minival=0.0))
    assert result["steps"] == 4


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (lambda x: (x, x), "returns a tuple, not a tensor of logits"),
        (lambda x: {"scores": x, "features": x}, "a dict with the keys scores, features, not a tensor of logits"),
        (lambda x: SimpleNamespace(logits=[1.0]), "nor an object or dict with `logits`"),
    ],
)
def test_others_are_refused_with_what_they_return(way: Any, said: str, teacher: nn.Module, digits_test: Images) -> None:
    with pytest.raises(DodistillError, match=said):
        Teacher(Says(student(), way), SHAPE)
    with pytest.raises(DodistillError, match=f"the student {said}" if said.startswith("returns") else said):
        distill(teacher, Says(student(), way), "noise", image_shape=SHAPE, verbose=False)
    with pytest.raises(DodistillError, match=said):
        evaluate(Says(student(), way), digits_test, image_shape=SHAPE)


def test_her_module_with_a_part_called_model_is_resumed_from_its_file(
    teacher: nn.Module, digits: Images, tmp_path: Path
) -> None:
    """`Normalized` is known by its class, not by an attribute that any module may have."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.head = student(), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.model(x))
            return out

    settings = {k: v for k, v in tree("dfnd", steps=2).items() if k not in ("source", "intervention")}

    def run() -> Any:
        return distill(
            teacher, Two(), tree("dfnd")["source"], image_shape=SHAPE, unlabeled=digits.x[:300], out=tmp_path / "run",
            verbose=False, **settings,
        )  # fmt: skip

    first = run()
    for name in ("checkpoint.pt", "previous.pt"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    x = torch.rand(4, *SHAPE)
    assert torch.equal(run().student(x), first.student(x))


def test_a_wrapper_adds_nothing_to_the_keys(tmp_path: Path) -> None:
    hers = Says(student(), WAYS["dict"])
    save_model(Normalized(hers), tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors").keys() == hers.state_dict().keys()


class LogSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.LogSoftmax(1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def test_a_log_softmax_teacher_is_noticed_as_a_softmax_one_is() -> None:
    torch.manual_seed(0)
    with pytest.raises(DodistillError, match=r"logarithms of probabilities.*remove its final log-softmax"):
        Teacher(LogSoftmax(), SHAPE)
    low = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    nn.init.constant_(low[1].bias, -9.0)  # logits below 0 are no probabilities
    Teacher(low, SHAPE)
