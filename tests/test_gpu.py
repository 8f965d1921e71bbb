"""On a real GPU: every part runs there, resumes in the same bits, and no step waits for the device."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dodistill import engine
from dodistill.commands.cli import main
from dodistill.core.runtime import repeatable
from dodistill.core.watch import Watcher
from dodistill.data.images import Images
from dodistill.engine import Distiller, Job
from dodistill.engine.teach import Teach, teach
from dodistill.models import load_model
from helpers import SHAPE, SOURCES, config, fitting, same, student
from test_device import CASES

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode", "ignore:Attempting to run cuBLAS"),
]
CUDA = torch.device("cuda:0")


@pytest.fixture
def taught_there(teacher: nn.Module) -> Iterator[nn.Module]:
    yield copy.deepcopy(teacher)
    torch.cuda.set_sync_debug_mode("default")


def made(teacher: nn.Module, digits: Images, test: Images, source: str, intervention: str, /, **more: Any) -> Distiller:
    labels = digits.y[:200] if source == "data" and digits.y is not None else None
    loop = {"device": "cuda:0", "precision": "auto"} | dict(more.pop("loop", {}))  # bf16
    cfg = config(source, intervention, steps=4, **more, loop=loop)
    assert test.y is not None
    its = fitting(source, copy.deepcopy(teacher))
    shown = engine.Test(test.x[:40], test.y[:40])
    return Distiller(Job(cfg, its, student(), SHAPE, digits.x[:200], test=shown, labels=labels))


def saved(state: Any) -> Any:
    """As from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


@pytest.mark.parametrize(("source", "intervention", "more"), CASES, ids=lambda v: str(v) if isinstance(v, str) else "")
def test_everything_runs_and_resumes_in_the_same_bits(
    source: str, intervention: str, more: dict[str, Any], taught_there: nn.Module, digits: Images, digits_test: Images
) -> None:
    def fresh() -> Distiller:
        return made(taught_there, digits, digits_test, source, intervention, **copy.deepcopy(more))

    with repeatable(CUDA):
        whole, first, second = fresh(), fresh(), fresh()
        assert whole.run()
        while first.step < 2:
            first.acquire(Watcher()) if first.acquirer.due(first.step) else first.match()
        second.load_state_dict(saved(first.state_dict()), saved(first.acquirer.pool_state()))
        assert second.run()
    assert all(math.isfinite(v) for v in whole.scorer.last.values())
    assert whole.context.autocast.chosen == "bf16"
    for name in ("student", "ema", "interventions", "criterion"):
        same(whole.state_dict()["matcher"][name], second.state_dict()["matcher"][name], name)
    same(whole.acquirer.pool_state()["x" if "x" in whole.acquirer.pool_state() else "rows"],
         second.acquirer.pool_state()["x" if "x" in second.acquirer.pool_state() else "rows"])  # fmt: skip


@pytest.mark.parametrize("source", ["fast", "dfnd"])
@pytest.mark.parametrize("mode", ["off", "graphs"])
def test_no_step_waits_for_the_device(
    source: str, mode: str, taught_there: nn.Module, digits: Images, digits_test: Images
) -> None:
    it = made(taught_there, digits, digits_test, source, "kdci+stratified", loop={"compile": mode})
    it.compiled.begin()
    while it.acquirer.due(it.step):
        it.acquire(Watcher())
    it.match()
    torch.cuda.set_sync_debug_mode("error")
    it.match()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("views", [0, 2])
def test_graphs_have_the_bits_of_the_eager_run(
    precision: str, views: int, taught_there: nn.Module, digits: Images, digits_test: Images
) -> None:
    done = []
    for mode in ("off", "graphs"):
        it = made(
            taught_there, digits, digits_test, "fast", "kdci", loop={"compile": mode, "precision": precision},
            augment={"views": views, "pad": 1},
        )  # fmt: skip
        assert it.run()
        assert it.compiled.reason.startswith({"off": "eager (loop.compile is off;", "graphs": "CUDA graphs"}[mode])
        done.append(it.state_dict()["matcher"])
    same(done[0]["student"], done[1]["student"])
    same(done[0]["ema"], done[1]["ema"])


def test_auto_takes_graphs_and_a_resumed_run_keeps_them(
    taught_there: nn.Module, digits: Images, digits_test: Images
) -> None:
    auto = {"compile": "auto"}
    whole, first, second = (made(taught_there, digits, digits_test, "fast", "none", loop=auto) for _ in range(3))
    with repeatable(CUDA):
        assert whole.run()
        first.settle()
        first.compiled.begin()
        while first.step < 2:
            first.acquire(Watcher()) if first.acquirer.due(first.step) else first.match()
        second.load_state_dict(saved(first.state_dict()), saved(first.acquirer.pool_state()))
        assert second.run()
    assert second.compiled.reason == "CUDA graphs"
    same(whole.state_dict()["matcher"]["student"], second.state_dict()["matcher"]["student"])


def test_a_batch_of_another_size_runs_eagerly(taught_there: nn.Module, digits: Images, digits_test: Images) -> None:
    replay = {"update": {"name": "replay"}, "replay": {"name": "bank", "size": 8}}
    done = []
    for mode in ("off", "graphs"):
        it = made(taught_there, digits, digits_test, "pre", "none", loop={"compile": mode}, **replay)
        assert it.run()
        done.append(it.state_dict()["matcher"]["student"])
    same(*done)


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_a_gpu_computes_what_the_cpu_does(
    source: str, taught_there: nn.Module, digits: Images, digits_test: Images
) -> None:
    """The losses of one step from the same weights, pool and draws, in fp32."""
    it = made(taught_there, digits, digits_test, source, "kdci", loop={"precision": "fp32"})
    it.acquire(Watcher())
    drawn = it.acquirer.draw()
    here = made(taught_there, digits, digits_test, source, "kdci", loop={"precision": "fp32", "device": "cpu"})
    here.matcher.student.load_state_dict(saved(it.matcher.student.state_dict()))
    here.matcher.interventions.load_state_dict(saved(it.matcher.interventions.state_dict()))
    assert it.acquirer.dictionary is not None
    assert here.acquirer.dictionary is not None
    known = saved(it.acquirer.dictionary.state_dict())
    # a GPU's generator has another state
    known["_extra_state"]["generator"] = here.acquirer.dictionary.generator.get_state()
    here.acquirer.dictionary.load_state_dict(known)
    there = it.matcher.step(drawn, None, it.acquirer.dictionary, 0)
    moved = copy.copy(drawn)
    moved.x, moved.t, moved.labels, moved.index = (v.cpu() for v in (drawn.x, drawn.t, drawn.labels, drawn.index))
    mine = here.matcher.step(moved, None, here.acquirer.dictionary, 0)
    for name, value in mine.items():
        assert float(there[name]) == pytest.approx(float(value), rel=2e-3, abs=1e-5), name
    asked = here.context.teacher(moved.x)
    assert torch.allclose(drawn.t.cpu(), asked, rtol=1e-2, atol=1e-2 * float(asked.abs().max()))


def test_the_command_line(teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped, resumed, reported; `doctor` names the card."""
    command = [
        "distill", "--teacher", str(teacher_file), "--student", "tiny4", "--data.image-shape", "1,8,8", "--source",
        "fast", "--source.K", "1", "--source.width", "4", "--source.batch", "32", "--source.warmup", "1", "--steps",
        "30", "--batch", "16", "--device", "cuda", "--loop.compile", "graphs", "--data.test", "digits",
    ]  # fmt: skip
    assert main([*command, "--max-seconds", "0", "--out", str(tmp_path / "cut")]) in (0, 75)
    for name in ("cut", "whole"):
        assert main([*command, "--out", str(tmp_path / name)]) == 0
    same(*(load_file(tmp_path / name / "student.safetensors") for name in ("cut", "whole")))
    capsys.readouterr()
    main(["doctor"])
    assert torch.cuda.get_device_name() in capsys.readouterr().out


@pytest.mark.parametrize("name", ["resnet20", "wrn16_1", "vgg11", "resnet18", "mobilenetv2"])
def test_zoo_models_learn_there(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    images = Images(torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(64) % 10)
    model = load_model(name, num_classes=10, in_channels=3, image_size=32, seed=0)
    log = teach(model, images, images, Teach(epochs=1, batch=32), device=CUDA)
    assert math.isfinite(log["loss"])
    assert next(model.parameters()).device == CUDA
