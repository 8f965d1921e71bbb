"""torch.compile in a run: what is compiled, what stays eager, and that a resumed run keeps it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dodistill import DodistillError, distill
from dodistill.config.tree import resolve
from dodistill.core.watch import Watcher
from dodistill.engine import compiled
from dodistill.sources.shared.generators import ConvGenerator
from helpers import SHAPE, job, same, student, tree
from helpers import config as config_of

Compile = Callable[..., Any]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """torch.compile without code generation (its backend needs minutes); the networks that it was given."""
    given: list[nn.Module] = []
    real: Compile = torch.compile

    def compile_(model: nn.Module, **settings: Any) -> Any:
        given.append(model)
        return real(model, backend="aot_eager", **settings)

    monkeypatch.setattr(torch, "compile", compile_)
    return given


def run(teacher: nn.Module, **more: Any) -> Any:
    settings = tree(**{k: more.pop(k) for k in list(more) if k in ("loop", "criterion", "update", "replay")})
    return distill(teacher, student(1), **settings, **more, image_shape=SHAPE, verbose=False)


def test_off_is_the_default(teacher: nn.Module, quick: list[nn.Module]) -> None:
    assert run(teacher).summary["compiled"] == "eager (loop.compile is off)"
    assert not quick


def test_on_compiles_all_three_and_ends_near_the_eager_run(teacher: nn.Module, quick: list[nn.Module]) -> None:
    eager, fast = run(teacher), run(teacher, loop={"compile": "on"})
    assert len(quick) == 4  # student, teacher, and the two generators of `fast`
    assert fast.summary["compiled"] == "compiled"
    for a, b in zip(eager.student.parameters(), fast.student.parameters()):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-3)


def test_a_resumed_run_ends_in_the_same_bits(teacher: nn.Module, quick: list[nn.Module], tmp_path: Path) -> None:
    class Enough(Watcher):
        def on_log(self, step: int, values: object) -> None:
            if step == 3:
                raise KeyboardInterrupt

    loop = {"compile": "on", "checkpoint_seconds": 0.0}
    whole = run(teacher, loop=loop, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(teacher, loop=loop, out=tmp_path / "cut", watchers=[Enough()])
    before = len(quick)
    same(run(teacher, loop=loop, out=tmp_path / "cut").student.state_dict(), whole.student.state_dict())
    assert len(quick) == before + 4
    run(teacher, loop=loop, out=tmp_path / "cut")  # finished: nothing is compiled for it
    assert len(quick) == before + 4


@pytest.mark.parametrize(("seconds", "on"), [(compiled.REPAYS / 2, False), (compiled.REPAYS * 2, True)])
def test_auto_goes_by_the_work_ahead(
    seconds: float, on: bool, teacher: nn.Module, quick: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = job(teacher, config_of(loop={"compile": "auto"}))
    loop, now = it.config.loop, [0.0]
    monkeypatch.setattr(compiled.time, "perf_counter", lambda: now[0])

    def work(n: int) -> None:
        now[0] += seconds * n / (loop.steps * loop.batch)

    it.compiled.settle(work)
    it.compiled.begin()
    assert it.compiled.on is on
    assert len(quick) == 4 * on
    assert ("do not repay" in it.compiled.reason) is not on


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        ({"criterion": {"name": "rkd"}}, "features"),
        ({"update": "retain", "replay": {"name": "bank", "size": 15}}, "needs second derivatives"),
    ],
)
def test_what_it_cannot_do_stays_eager(
    choice: dict[str, Any], why: str, teacher: nn.Module, quick: list[nn.Module]
) -> None:
    summary = run(teacher, loop={"compile": "on"}, **choice).summary
    assert why in summary["compiled"]
    assert not quick


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no C++ compiler found\nsecond line")


def test_where_torch_compile_fails(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with pytest.raises(DodistillError, match=r"fails here \(no C\+\+ compiler found\); use --loop.compile off"):
        run(teacher, loop={"compile": "on"})
    monkeypatch.setattr(compiled, "REPAYS", 0.0)
    result = run(teacher, loop={"compile": "auto"})
    assert result.summary["compiled"] == "eager: torch.compile fails here (no C++ compiler found)"
    same(result.student.state_dict(), run(teacher).student.state_dict())


def test_compiling_changes_nothing(teacher: nn.Module, quick: list[nn.Module]) -> None:
    it = job(teacher, config_of(loop={"compile": "on"}))
    before = {k: v.clone() for k, v in it.matcher.student.state_dict().items()}
    made = copy.deepcopy(it.acquirer.source.state_dict())
    stream = torch.get_rng_state()
    it.compiled.begin()
    same(dict(it.matcher.student.state_dict()), before)
    assert all(p.grad is None for p in it.matcher.student.parameters())
    assert it.acquirer.source.state_dict().keys() == made.keys()
    same(it.acquirer.source.state_dict(), made)
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize("name", ["adversarial", "cmi", "dafl", "fast", "fast_imagenet", "mosaic", "nayer", "pre"])
def test_the_generators_of_a_source(name: str, teacher: nn.Module, quick: list[nn.Module]) -> None:
    """The images of a source with compiled generators are the eager ones to rounding, also after training."""
    unlabeled = torch.zeros(20, *SHAPE, dtype=torch.uint8)
    eager, compiled_ = (job(teacher, config_of(name), unlabeled).acquirer for _ in range(2))
    found = compiled_.source.generators()
    assert found
    assert len(found) == len(eager.source.generators())
    for net in found:
        net.compile(dynamic=False)
    made = []
    for source in (eager.source, compiled_.source):
        student_ = student().eval()
        made.append([source.acquire(student_, round).images for round in range(2)])
    assert quick
    for a, b in zip(*made):
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
        else:
            assert int((a.int() - b.int()).abs().max()) <= 1


def test_a_mixture_has_the_generators_of_its_parts(teacher: nn.Module) -> None:
    cfg = resolve({"source": {"name": "mixture", "of": {"fast": {}, "noise": {}}}})
    source = job(teacher, cfg).acquirer.source
    assert [type(net) for net in source.generators()] == [ConvGenerator] * 2


def test_graphs_on_a_cpu_are_the_eager_run(teacher: nn.Module, quick: list[nn.Module]) -> None:
    result = run(teacher, loop={"compile": "graphs"})
    assert result.summary["compiled"] == "eager: CUDA graphs need a GPU, and the device is cpu"
    same(result.student.state_dict(), run(teacher).student.state_dict())
    assert not quick
