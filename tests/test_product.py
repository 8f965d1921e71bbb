"""Every source with every intervention. Gradients reach what they should, and nothing else."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from dodistill.config import registry
from dodistill.core.watch import Watcher
from dodistill.data.images import Images
from dodistill.engine import Distiller
from helpers import SOURCES, config, fitting, job, same

LEARNED = ("kdci", "cid")  #: interventions with parameters
CALM = ("nothing", "pixels")  #: what sources without a network say that they train


def copied(module: nn.Module) -> dict[str, Any]:
    return copy.deepcopy(dict(module.state_dict()))


def moved(module: nn.Module, before: dict[str, Any]) -> set[str]:
    """The parameters that are no longer what they were."""
    return {k for k, p in module.named_parameters() if not torch.equal(p, before[k])}


def made(teacher: nn.Module, digits: Images, source: str, intervention: str, **more: Any) -> Distiller:
    return job(fitting(source, teacher), config(source, intervention, steps=3, **more), digits.x[:200])


def test_every_source_has_its_tiny_settings() -> None:
    assert set(SOURCES) == set(registry.names("source"))


@pytest.mark.parametrize("intervention", ["none", "kdci", "stratified", "cid", "cid+kdci+stratified"])
@pytest.mark.parametrize("source", sorted(SOURCES))
def test_the_product(source: str, intervention: str, teacher: nn.Module, digits: Images) -> None:
    it = made(teacher, digits, source, intervention)
    frozen, student, parts = copied(it.context.teacher), copied(it.matcher.student), copied(it.matcher.interventions)
    before = copy.deepcopy(it.acquirer.source.state_dict())

    # An acquisition leaves student and teacher alone, gradients and running statistics included.
    for _ in range(it.config.source.warmup + 1):
        it.acquire(Watcher())
    assert all(p.grad is None for p in (*it.matcher.student.parameters(), *it.context.teacher.parameters()))
    same(student, copied(it.matcher.student))

    # Matching moves all of the student, and not the source.
    acquired = copy.deepcopy(it.acquirer.source.state_dict())
    it.match()
    assert moved(it.matcher.student, student) == {k for k, _ in it.matcher.student.named_parameters()}
    assert all(p.grad is not None for p in it.matcher.student.parameters())
    same(acquired, it.acquirer.source.state_dict())
    # The last step reaches all parameters of the interventions (CID has none to train in its first stage).
    assert it.run()
    if any(name in intervention for name in LEARNED):
        wanted = {k for k, p in it.matcher.interventions.named_parameters() if p.requires_grad}
        assert wanted
        touched = {
            k for k, p in it.matcher.interventions.named_parameters() if p.grad is not None and bool(p.grad.any())
        }
        assert touched == wanted
        assert moved(it.matcher.interventions, parts) == wanted
    same(frozen, copied(it.context.teacher))
    assert all(p.grad is None for p in it.context.teacher.parameters())
    if registry.config("source", source).trains not in CALM:
        after = it.acquirer.source.state_dict()
        assert any(k != "generator" and repr(after[k]) != repr(before[k]) for k in after)


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_saved_and_resumed_ends_in_the_same_bits(source: str, teacher: nn.Module, digits: Images) -> None:
    whole = made(teacher, digits, source, "kdci+stratified")
    assert whole.run()
    first = made(teacher, digits, source, "kdci+stratified")
    while first.step < 2:
        first.acquire(Watcher()) if first.acquirer.due(first.step) else first.match()
    file = io.BytesIO()
    torch.save((first.state_dict(), first.acquirer.pool_state()), file)
    second = made(teacher, digits, source, "kdci+stratified")
    second.load_state_dict(*torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert second.run()
    same(whole.matcher.student.state_dict(), second.matcher.student.state_dict())
    same(whole.acquirer.source.state_dict(), second.acquirer.source.state_dict())
    same(whole.acquirer.pool_state(), second.acquirer.pool_state())
    same(whole.acquirer.holdout.state_dict(), second.acquirer.holdout.state_dict())
