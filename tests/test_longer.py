"""More steps for a finished run: it is trained longer, to the bit as a run with a restart, or says why it cannot be."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn

from dodistill.api import distill, run
from dodistill.config.grid import Cell, Records, cell_key
from dodistill.config.tree import Distill
from dodistill.data.images import Images
from dodistill.engine import Job
from dodistill.engine.longer import longer
from dodistill.engine.run_folder import RunFolder, drop_checkpoints
from dodistill.errors import DodistillError
from dodistill.functional.schedules import share_at
from helpers import SHAPE, config, job, metrics, same, student, untimed
from test_resume import stopped_at

X = 300


@pytest.fixture
def made(teacher: nn.Module, digits: Images) -> Any:
    """`made(folder, config)` runs a config in a folder, and gives the result."""

    def make(folder: Path | None, cfg: Distill) -> Any:
        it = Job(cfg, copy.deepcopy(teacher), student(seed=7), SHAPE, digits.x[:X])
        return run(it, folder, verbose=False, report=False)

    return make


def of(steps: int, **more: Any) -> Distill:
    return config("dfnd", "kdci+stratified", steps=steps, **more)


def test_the_schedule_begins_anew() -> None:
    assert [share_at(s, 6) for s in range(7)] == [s / 6 for s in range(7)]  # a plain run: the bits of before
    assert [share_at(s, 10, (6,)) for s in (0, 3, 6, 8, 10)] == [0, 0.5, 0, 0.5, 1]
    assert share_at(9, 12, (6, 8)) == 0.25


def test_more_steps_train_longer_and_are_recorded(made: Any, tmp_path: Path) -> None:
    first = made(tmp_path / "run", of(6))
    before = load_file(tmp_path / "run" / "student.safetensors")
    result = made(tmp_path / "run", of(10))
    assert (first.summary["steps"], result.summary["steps"]) == (6, 10)
    assert result.summary["restarts"] == [6]
    assert any("warm restart" in text and "step 6" in text for text in result.summary["warnings"])
    folder = tmp_path / "run"
    assert json.loads((folder / "config.json").read_text())["loop"]["restarts"] == [6]
    assert json.loads((folder / "summary-6.json").read_text())["steps"] == 6
    same(before, load_file(folder / "student-6.safetensors"))
    lr = {line["step"]: line["lr"] for line in metrics(folder) if line["kind"] == "log"}
    assert (lr[3], lr[6], lr[8]) == (pytest.approx(0.025), pytest.approx(0, abs=1e-9), pytest.approx(0.025))
    again = made(folder, of(10))  # finished: nothing is repeated
    assert again.summary == json.loads((folder / "summary.json").read_text())
    assert made(folder, of(12)).summary["restarts"] == [6, 10]


def test_it_is_a_run_with_a_restart_to_the_bit_and_resumes_to_the_bit(
    made: Any, teacher: nn.Module, digits: Images, tmp_path: Path
) -> None:
    cfg = of(10, loop={"restarts": [6]})
    whole, folder = job(teacher, cfg, digits.x[:X], seed=7), RunFolder(tmp_path / "whole", cfg)
    assert stopped_at(whole, folder, lambda _: False)
    for name, stops in (("at once", ()), ("in parts", (7, 9))):
        path = tmp_path / name
        made(path, of(6))
        for stop in stops:
            settled = longer(path, of(10))
            it = job(teacher, settled, digits.x[:X], seed=50 + stop)
            assert not stopped_at(it, RunFolder(path, settled), lambda it, stop=stop: it.step == stop)
        settled = longer(path, of(10))
        assert settled == cfg
        it = job(teacher, settled, digits.x[:X], seed=99)
        assert stopped_at(it, RunFolder(path, settled), lambda _: False)
        same(untimed(whole.state_dict())["matcher"], untimed(it.state_dict())["matcher"])
        same(untimed(whole.state_dict())["acquirer"], untimed(it.state_dict())["acquirer"])
        steps = [line["step"] for line in metrics(path) if line["kind"] == "log"]
        assert steps == list(range(1, 11))
    assert metrics(tmp_path / "at once") == metrics(tmp_path / "in parts")


def test_killed_between_the_config_and_the_outcome_of_before(made: Any, tmp_path: Path) -> None:
    path = tmp_path / "run"
    made(path, of(6))
    (path / "config.json").write_text(json.dumps(longer(path, of(10)).to_tree()))  # and then it was killed
    assert made(path, of(10)).summary["steps"] == 10
    assert (path / "summary-6.json").exists()


def test_a_constant_rate_stays(made: Any, tmp_path: Path) -> None:
    cfg = {"optim": {"lr": 0.05, "schedule": "constant"}}
    made(tmp_path, of(4, **cfg))
    result = made(tmp_path, of(6, **cfg))
    assert {line["lr"] for line in metrics(tmp_path) if line["kind"] == "log"} == {0.05}
    assert any("the rate stayed at 0.05" in text for text in result.summary["warnings"])


def test_why_it_cannot_be_trained_longer(made: Any, teacher: nn.Module, digits: Images, tmp_path: Path) -> None:
    path = tmp_path / "run"
    made(path, of(6))
    with pytest.raises(DodistillError, match=r"has 6 steps, and 4 were asked for.*--steps 6 or more"):
        made(path, of(4))
    with pytest.raises(DodistillError, match="belongs to another config"):
        made(path, of(10, optim={"lr": 0.01}))
    drop_checkpoints(path)
    with pytest.raises(DodistillError, match="its checkpoints were deleted"):
        made(path, of(10))
    onecycle = {"optim": {"lr": 0.05, "schedule": "onecycle"}}
    made(tmp_path / "onecycle", of(4, **onecycle))
    with pytest.raises(DodistillError, match=r"its schedule, onecycle, has ended after 4 steps.*another --out"):
        made(tmp_path / "onecycle", of(6, **onecycle))
    half = RunFolder(tmp_path / "half", of(6))
    assert not stopped_at(job(teacher, of(6), digits.x[:X]), half, lambda it: it.step == 3)
    with pytest.raises(DodistillError, match=r"has not reached the end of its 6 steps.*finish it first"):
        made(tmp_path / "half", of(10))
    for wrong in ([6, 4], [10], [0]):
        with pytest.raises(DodistillError, match=r"give rising steps between 0 and loop.steps, 10"):
            of(10, loop={"restarts": wrong})


def test_a_grid_does_not_take_it_for_a_plain_run(made: Any, tmp_path: Path) -> None:
    made(tmp_path, of(6))
    extended = longer(tmp_path, of(10))
    plain = of(10)
    assert cell_key(extended) != cell_key(plain)
    records = Records([{"config": extended.to_tree(), "key": "x"}], tmp_path)
    assert records.find(Cell({}, plain, "", None)) is None
    assert records.find(Cell({}, extended, "", None)) is not None
    old = plain.to_tree()
    del old["loop"]["restarts"]  # a record from before
    assert Records([{"config": old, "key": "x"}], tmp_path).find(Cell({}, plain, "", None)) is not None


def test_from_python(teacher: nn.Module, digits: Images, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "source": "dfnd", "image_shape": SHAPE, "batch": 16, "dictionary": {"clusters": 2}, "out": tmp_path / "run",
        "verbose": False, "unlabeled": digits.x[:200],
    }  # fmt: skip
    distill(copy.deepcopy(teacher), student(), steps=4, **settings)
    assert distill(copy.deepcopy(teacher), student(), steps=6, **settings).summary["restarts"] == [4]
