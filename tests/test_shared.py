"""What several sources share: the best iterate of a descent, and the unlabelled images that a method reads again."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from dodistill.core.context import Context
from dodistill.data.rows import TensorRows
from dodistill.errors import DodistillError, at_least, positive
from dodistill.functional.modes import evaluating
from dodistill.functional.terms import detached, total
from dodistill.sources.shared.best import Best
from dodistill.sources.shared.wild import WildImages


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([3.0, 1.0, 2.0], 1),
        ([1.0, 1.0], 0),
        ([math.nan, 2.0, 3.0], 1),
        ([2.0, math.nan, 1.0], 2),
        ([math.nan, math.nan], 0),
        ([math.inf, math.nan], 0),
    ],
)
def test_best_keeps_the_iterate_of_lowest_loss(losses: list[float], kept: int) -> None:
    best, x = Best(), torch.full((2, 3), -1.0, requires_grad=True)
    for i, loss in enumerate(losses):
        with torch.no_grad():
            x.fill_(float(i))  # in place, as a descent on pixels moves
        best.offer(torch.tensor(loss), x, torch.full((4,), 10.0 * i))
    image, feature = best.tensors
    assert image.tolist() == [[float(kept)] * 3] * 2
    assert feature.tolist() == [10.0 * kept] * 4
    assert not image.requires_grad


def test_wild_images_are_those_that_were_chosen() -> None:
    x = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    wild = WildImages(cast(Context, SimpleNamespace(unlabeled=TensorRows(x), device=torch.device("cpu"))))
    assert torch.equal(wild.rows[:], x)
    wild.choose(torch.tensor([4, 1]))
    assert wild.rows[:].flatten().tolist() == [4, 1]
    drawn = wild.draw(200, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == {1, 4}


def test_total_and_detached() -> None:
    a = torch.tensor(2.0, requires_grad=True)
    terms = {"a": a * a, "b": 3 * a}
    (grad,) = torch.autograd.grad(total(terms), a)
    assert (total(terms).item(), grad.item()) == (10.0, 7.0)
    assert {k: v.item() for k, v in detached(terms).items()} == {"a": 4.0, "b": 6.0}
    assert not any(v.requires_grad for v in detached(terms).values())


def test_evaluating_gives_each_submodule_its_mode_back() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.Dropout()))
    net.train()[1][1].eval()  # type: ignore[index]
    modes = [m.training for m in net.modules()]
    with contextlib.suppress(ZeroDivisionError), evaluating(net):
        assert not any(m.training for m in net.modules())
        raise ZeroDivisionError
    assert [m.training for m in net.modules()] == modes


@pytest.mark.parametrize(
    ("check", "settings", "said"),
    [
        (lambda **s: at_least(1, "loop", **s), {"steps": 2, "batch": 0}, "loop.batch is 0; it must be at least 1."),
        (
            lambda **s: at_least(0, "", ", as in 0.1", **s),
            {"alpha": math.nan},
            "alpha is nan; it must be at least 0, as",
        ),
        (lambda **s: positive("source", **s), {"lr": 0.0}, "source.lr is 0.0; it must be a positive number."),
        (
            lambda **s: positive("source", ", or none", **s),
            {"lr": math.inf},
            "is inf; it must be a positive number, or",
        ),
    ],
)
def test_bad_numbers_are_named(check: Any, settings: dict[str, float], said: str) -> None:
    with pytest.raises(DodistillError, match=said.replace(".", r"\.")):
        check(**settings)
    check(**dict.fromkeys(settings), other=1)  # None stands for a default
