"""Criteria: what they add up, what they train, what they refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dodistill.config import registry
from dodistill.core.context import Context
from dodistill.criteria import adaptation, kl, l1
from dodistill.errors import DodistillError
from dodistill.functional import losses


def context(classes: int = 5) -> Context:
    teacher = cast(Any, SimpleNamespace(num_classes=classes, image_shape=(1, 4, 4)))
    return Context(teacher, torch.device("cpu"))


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(8, 5, generator=g, requires_grad=True), torch.randn(8, 5, generator=g)


@pytest.mark.parametrize("name", ["kl", "l1", "adaptation"])
def test_each_is_found_by_name_and_trains_the_student(name: str) -> None:
    config = registry.config("criterion", name)()
    assert config.name == name
    criterion = config.build(context())
    s, t = pair()
    terms = criterion(s, t)
    torch.stack(list(terms.values())).sum().backward()
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()
    assert s.grad.abs().sum() > 0
    assert (criterion.own_lr is None) == (not list(criterion.parameters()))


def test_kl_and_l1_are_their_losses() -> None:
    s, t = pair()
    assert torch.equal(kl.Config(temperature=4.0).build(context())(s, t)["kd"], losses.kl(s, t, 4.0))
    assert torch.equal(l1.Config().build(context())(s, t)["kd"], losses.l1(s, t))


def test_adaptation_learns_where_the_noise_goes() -> None:
    """All students say 0 where the teacher says 3: row 0 of Q must learn to send its mass to 3."""
    criterion = adaptation.Config(teacher_accuracy=0.9).build(context())
    s = torch.zeros(16, 5)
    s[:, 0] = 8.0
    t = torch.zeros(16, 5)
    t[:, 3] = 8.0
    a = next(iter(criterion.parameters()))
    assert a.shape == (5, 4)
    assert criterion.own_lr == 1e-3
    before = losses.noisy_transition(a, 0.9)[0, 3].item()
    assert before == pytest.approx(0.1 / 4)
    adam = torch.optim.Adam([a], lr=0.1)
    for _ in range(30):
        adam.zero_grad()
        torch.stack(list(criterion(s, t).values())).sum().backward()
        adam.step()
    assert losses.noisy_transition(a, 0.9)[0, 3].item() > 0.09


def test_adaptation_weight_and_state() -> None:
    s, t = pair()
    full, none = adaptation.Config(noisy=2.0).build(context()), adaptation.Config(noisy=0.0).build(context())
    expected = 2 * losses.noisy_adaptation(s, t, torch.zeros(5, 4), 0.95)
    torch.testing.assert_close(full(s, t)["noisy"], expected)
    assert none(s, t)["noisy"] == 0
    assert torch.equal(full(s, t)["kd"], losses.kl(s, t, 4.0))
    assert set(full.state_dict()) == {"a"}


def test_bad_values_are_named() -> None:
    with pytest.raises(DodistillError, match=r"temperature is 0"):
        kl.Config(temperature=0).build(context())
    with pytest.raises(DodistillError, match=r"teacher_accuracy is 95"):
        adaptation.Config(teacher_accuracy=95).build(context())
    with pytest.raises(DodistillError, match=r"at least 2 classes"):
        adaptation.Config().build(context(classes=1))
