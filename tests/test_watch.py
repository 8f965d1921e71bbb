"""What a run tells the outside, and what an older version of a run folder is worth."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dodistill.api import distill, run
from dodistill.core.watch import Watcher
from dodistill.data.images import Images
from dodistill.engine import Distiller, Job, Meter
from dodistill.engine.run_folder import RunFolder, load_tensors, save_tensors
from dodistill.errors import DodistillError
from helpers import SHAPE, config, job, same, student


class Recorder(Watcher):
    """Remembers all that it hears, in order."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def on_start(self, step: int, steps: int) -> None:
        self.heard.append(("start", step, steps))

    def on_progress(self, what: str, done: int, total: int) -> None:
        self.heard.append(("progress", what))

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        self.heard.append(("log", step, dict(values)))

    def on_eval(self, step: int, values: Mapping[str, float]) -> None:
        self.heard.append(("eval", step, dict(values)))

    def on_pool(self, step: int, values: Mapping[str, Any]) -> None:
        self.heard.append(("pool", step, dict(values)))

    def on_warning(self, step: int, symptom: str, text: str) -> None:
        self.heard.append(("warning", step, {"symptom": symptom, "text": text}))

    def on_end(self, step: int, finished: bool) -> None:
        self.heard.append(("end", step, finished))


def test_a_watcher_hears_what_the_metrics_say(teacher: nn.Module, digits: Images, tmp_path: Path) -> None:
    cfg, mine = config("dfnd", steps=6, loop={"log_every": 2, "eval_every": 3}), Recorder()
    run(Job(cfg, teacher, student(), SHAPE, digits.x[:300]), tmp_path / "run", verbose=False, watchers=[mine])
    assert mine.heard[0] == ("start", 0, 6)
    assert mine.heard[-1] == ("end", 6, True)
    assert ("progress", "labelling images") in mine.heard
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [h for h in mine.heard if h[0] in ("log", "eval", "pool", "warning")]
    assert [(line.pop("kind"), line.pop("step")) for line in written] == [h[:2] for h in told]
    assert written == [h[2] for h in told]
    assert [h[1] for h in told if h[0] == "log"] == [2, 4, 6]
    assert [h[1] for h in told if h[0] == "eval"] == [3, 6]
    logged = next(h[2] for h in told if h[0] == "log")
    assert {"loss", "rate", "lr", "seconds", "match/kd"} <= set(logged)


def test_a_watcher_hears_of_a_stop_and_of_the_resumption(teacher: nn.Module, digits: Images, tmp_path: Path) -> None:
    cfg, heard = config("dfnd", steps=4), []
    for deadline in (0.0, float("inf")):
        mine = Recorder()
        with contextlib.closing(RunFolder(tmp_path / "run", cfg)) as folder:
            job(teacher, cfg, digits.x[:300]).run(folder, [mine], deadline)
        heard.append((mine.heard[0], mine.heard[-1]))
    assert heard == [(("start", 0, 4), ("end", 0, False)), (("start", 0, 4), ("end", 4, True))]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([print], "watchers has <built-in function print>, which is no watcher"),
        ([Recorder(), Recorder], "which is no watcher"),
        (Recorder(), "it must be a list"),
    ],
)
def test_what_is_no_watcher_is_refused_before_anything_runs(given: Any, said: str, teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match=said):
        distill(teacher, student(), image_shape=SHAPE, watchers=given)


def test_watching_changes_nothing(teacher: nn.Module, digits: Images) -> None:
    plain, watched = (job(teacher, config("dfnd"), digits.x[:300]) for _ in range(2))
    assert plain.run()
    assert watched.run(watchers=[Recorder()])
    same(plain.matcher.state_dict(), watched.matcher.state_dict())


def test_means_are_over_the_steps_that_had_the_term() -> None:
    """Also on the first line after a resumption with another `log_every`, and for terms that not every step has."""
    meter, other = Meter(10, torch.device("cpu")), Meter(10, torch.device("cpu"))
    for i in range(3):
        meter.add({"match/kd": torch.tensor(float(i))} | ({"retain/kd": torch.tensor(7.0)} if i == 2 else {}))
    other.load_state_dict(meter.state_dict())
    other.add({"match/kd": torch.tensor(5.0)})
    read = other.read({"source/bn": torch.tensor(2.0)})
    assert read == {"match/kd": 2.0, "retain/kd": 7.0, "source/bn": 2.0, "loss": 2.0}


class AfterAcquisition:
    """A deadline that comes after the first acquisition."""

    def __init__(self, it: Distiller) -> None:
        self.it = it

    def __lt__(self, _now: float) -> bool:
        return self.it.acquirer.round > 0


def older(path: Path) -> None:
    """The checkpoint as if another version had written it."""
    state = load_tensors(path / "checkpoint.pt")
    del state["format"]
    save_tensors(path / "checkpoint.pt", state)


def test_an_unfinished_run_of_another_version_is_refused(teacher: nn.Module, digits: Images, tmp_path: Path) -> None:
    cfg = config("dfnd", steps=4)
    with contextlib.closing(RunFolder(tmp_path / "run", cfg)) as folder:
        it = job(teacher, cfg, digits.x[:300])
        assert not it.run(folder, deadline=AfterAcquisition(it))  # type: ignore[arg-type]
    older(tmp_path / "run")
    with (
        contextlib.closing(RunFolder(tmp_path / "run", cfg)) as folder,
        pytest.raises(
            DodistillError, match=r"checkpoint has format 1, but this version .* reads format 3; finish the run"
        ),
    ):
        job(teacher, cfg, digits.x[:300]).run(folder)


def test_a_finished_run_of_another_version_still_opens(teacher: nn.Module, digits: Images, tmp_path: Path) -> None:
    cfg, given = config("dfnd", steps=4), (SHAPE, digits.x[:300])
    first = run(Job(cfg, teacher, student(), *given), tmp_path / "run", verbose=False)
    older(tmp_path / "run")
    again = run(Job(cfg, teacher, student(5), *given), tmp_path / "run", verbose=False)
    assert again.summary["finished"]
    same(first.student.state_dict(), again.student.state_dict())


def test_the_state_is_that_of_the_parts(teacher: nn.Module) -> None:
    it: Distiller = job(teacher, config("fast"))
    assert {"acquirer", "matcher", "scorer", "meter", "step", "format"} <= set(it.state_dict())
