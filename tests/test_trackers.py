"""Trackers: what they are told, that a resumed run goes on without doubled steps, and that they never end a run."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dodistill.api import distill, run
from dodistill.commands.cell import arguments
from dodistill.commands.cli import main
from dodistill.config.grid import cells
from dodistill.core.watch import Watcher
from dodistill.data.images import Images
from dodistill.engine import Job
from dodistill.engine.meter import Meter
from dodistill.errors import DodistillError
from dodistill.report.trackers import wandb as wandb_backend
from helpers import SHAPE, config, student
from helpers import metrics as lines


class Killed(BaseException):
    """A kill: nothing catches it."""


class Killer(Watcher):
    """Kills the run when step `at` was logged, and before its checkpoint."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        if step == self.at:
            raise Killed

    def on_end(self, step: int, finished: bool) -> None:
        pass


class Store:
    """A stand-in for a tracking library: each run is a list of (step, values), kept by its id or name."""

    def __init__(self, name: str, broken: str = "") -> None:
        self.name, self.broken = name, broken
        self.runs: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self.begun: list[dict[str, Any]] = []
        self.finished = 0

    def module(self) -> types.ModuleType:
        made = types.ModuleType(self.name)
        made.init = self.init  # type: ignore[attr-defined]
        made.Settings = dict  # type: ignore[attr-defined]
        made.Image = lambda picture: ("image", picture.size)  # type: ignore[attr-defined]
        made.Html = lambda text, inject: ("text", text)  # type: ignore[attr-defined]
        made.Markdown = lambda text: ("text", text)  # type: ignore[attr-defined]
        return made

    def init(self, **given: Any) -> Any:
        self.begun.append(given)
        if self.broken == "init" or self.broken == given.get("mode"):
            raise RuntimeError("no server\nand more")
        rows = self.runs.setdefault(given.get("id") or given["name"], [])

        def log(values: dict[str, Any], step: int) -> None:
            if self.broken == "log" and "loss" in values:
                raise OSError("disk full")
            rows.append((step, values))

        def finish() -> None:
            self.finished += 1

        return types.SimpleNamespace(log=log, finish=finish, url="https://example.org/run")

    def values(self, kind: str) -> list[tuple[int, float]]:
        (rows,) = self.runs.values()
        return [(step, values[kind]) for step, values in rows if kind in values]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture(params=["wandb", "trackio"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store(request.param)
    monkeypatch.setitem(sys.modules, request.param, made.module())
    return made


def go(teacher: nn.Module, digits: Images, out: Path, track: str, *watchers: Watcher) -> Any:
    loop = {"log_every": 1, "eval_every": 2, "checkpoint_seconds": 0.0}
    job = Job(config("dfnd", steps=6, loop=loop), teacher, student(), SHAPE, digits.x[:300])
    return run(job, out, verbose=False, watchers=watchers, track=track)


def killed_and_resumed(teacher: nn.Module, digits: Images, out: Path, track: str) -> Any:
    """Killed when step 4 was logged; the checkpoint is that of step 3."""
    with pytest.raises(Killed):
        go(teacher, digits, out, track, Killer(4))
    assert [line["step"] for line in lines(out) if line["kind"] == "log"][-1] == 4
    return go(teacher, digits, out, track)


def failures(result: Any) -> list[str]:
    return [text for text in result.summary["warnings"] if "stopped" in text]


def logged(out: Path, key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in lines(out) if key in line]


def test_a_resumed_run_goes_on_without_doubled_steps(
    store: Store, teacher: nn.Module, digits: Images, tmp_path: Path
) -> None:
    out = tmp_path / "first"
    result = killed_and_resumed(teacher, digits, out, store.name)
    assert failures(result) == []
    assert len(store.begun) == 2
    assert len(store.runs) == 1  # the same run
    assert store.finished == 2
    for key in ("loss", "match/kd", "lr", "agreement"):
        assert store.values(key) == logged(out, key)
    shares = [(line["step"], line["class_shares"][3]) for line in lines(out) if "class_shares" in line]
    assert store.values("class_shares/3") == shares
    assert [step for step, _ in store.values("pool/images")] == [step for step, _ in shares]
    given = store.begun[0]
    assert given["config"]["source.n"] == 200
    assert given["config"]["loop.steps"] == 6
    assert given["config"]["intervention"] == "none"
    assert store.begun[1].get("id") == given.get("id")
    assert store.begun[1]["name"] == given["name"]
    assert given["resume"] == "allow"
    assert list(json.loads((out / "tracking.json").read_text())) == [store.name]


def test_tensorboard_hides_what_was_logged_after_the_checkpoint(
    teacher: nn.Module, digits: Images, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: its event files were not read")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "first"
    killed_and_resumed(teacher, digits, out, "tensorboard")
    seen = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    for key in ("loss", "match/kd", "lr", "agreement"):
        got, want = [(e.step, e.value) for e in seen.Scalars(key)], logged(out, key)
        assert [step for step, _ in got] == [step for step, _ in want]
        assert [value for _, value in got] == pytest.approx([value for _, value in want], rel=1e-6)
    pools = [line["step"] for line in lines(out) if line["kind"] == "pool"]
    assert [e.step for e in seen.Scalars("class_shares/3")] == pools
    assert [e.step for e in seen.Images("pool/images")] == pools
    assert "_hparams_/session_start_info" in seen.Tags()["tensors"] or seen.PluginTagToContent("hparams")


@pytest.mark.parametrize("broken", ["init", "log"])
@pytest.mark.parametrize("store", ["wandb"], indirect=True)
def test_a_broken_tracker_ends_with_one_warning(
    store: Store, broken: str, teacher: nn.Module, digits: Images, tmp_path: Path
) -> None:
    store.broken = broken
    result = go(teacher, digits, tmp_path / "first", "wandb")
    assert result.finished
    reason = {"init": "RuntimeError: no server", "log": "OSError: disk full"}[broken]
    assert failures(result) == [f"wandb stopped: {reason}; the run goes on without it."]
    assert len(logged(tmp_path / "first", "loss")) == 6


@pytest.mark.parametrize("store", ["wandb"], indirect=True)
def test_wandb_is_offline_without_a_key_or_a_network(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_backend.mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    assert wandb_backend.host_and_port() == ("127.0.0.1", 9)
    assert wandb_backend.mode() == "offline"
    monkeypatch.setattr(wandb_backend, "reachable", lambda host, port: True)
    assert wandb_backend.mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_backend.mode() == "disabled"


def test_a_key_in_the_netrc_file_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not wandb_backend.has_key("api.wandb.ai")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / "netrc").chmod(0o600)
    assert wandb_backend.has_key("api.wandb.ai")
    assert not wandb_backend.has_key("elsewhere.org")


@pytest.mark.parametrize("store", ["wandb"], indirect=True)
def test_a_refused_key_falls_back_to_offline(
    store: Store, teacher: nn.Module, digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_backend, "mode", lambda: "online")
    store.broken = "online"
    assert failures(go(teacher, digits, tmp_path / "first", "wandb")) == []
    assert [given["mode"] for given in store.begun] == ["online", "offline"]
    assert len(store.values("loss")) == 6


@pytest.mark.parametrize("store", ["wandb"], indirect=True)
def test_warnings_are_told_as_text_and_notes_once(
    store: Store, teacher: nn.Module, digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meter, "collapsed", lambda *_: {"classes": "3 < 4"})
    job = Job(config("dfnd", steps=1), teacher, student(), SHAPE, digits.x[:300], notes=("a note",))
    run(job, tmp_path / "first", verbose=False, track="wandb")
    assert store.values("warnings/classes") == [(1, ("text", "3 &lt; 4"))]
    assert store.values("notes") == [(0, ("text", "a note"))]


@pytest.mark.parametrize("store", ["wandb"], indirect=True)
def test_many_classes_are_told_by_their_ends(store: Store) -> None:
    from dodistill.report.trackers.shared import _pool

    few, many = (dict(_pool({"size": 7, "class_shares": [i / n for i in range(n)]})) for n in (4, 1000))
    assert few == {
        "pool/size": 7.0, "class_shares/0": 0.0, "class_shares/1": 0.25, "class_shares/2": 0.5, "class_shares/3": 0.75,
        "class_shares/smallest": 0.0, "class_shares/largest": 0.75,
    }  # fmt: skip
    assert set(many) == {"pool/size", "class_shares/smallest", "class_shares/largest"}


def test_what_cannot_track_is_refused_before_anything_runs(
    teacher: nn.Module, digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(track: str, out: Path | None = tmp_path / "first") -> None:
        distill(teacher, student(), "fast", image_shape=SHAPE, out=out, track=track, verbose=False)

    with pytest.raises(DodistillError, match="unknown tracker 'wandbb'; did you mean 'wandb'"):
        ask("wandbb")
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(DodistillError, match=r"pip install 'dodistill\[trackio\]'"):
        ask("trackio")
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # the folder ./wandb, as a package
    with pytest.raises(DodistillError, match=r"pip install 'dodistill\[wandb\]'"):
        ask("wandb")
    monkeypatch.setitem(sys.modules, "wandb", Store("wandb").module())
    with pytest.raises(DodistillError, match="give out=FOLDER"):
        ask("wandb", None)
    assert not (tmp_path / "first").exists()


def test_the_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path, teacher_file: Path) -> None:
    common = ["--teacher", str(teacher_file), "--student", "tiny4", "--out", str(tmp_path / "a"), "--track", "tensor"]
    assert main(["distill", *common]) == 2
    assert "unknown tracker 'tensor'; did you mean 'tensorboard'?" in capsys.readouterr().err
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"base: {{teacher: {teacher_file}, student: tiny4}}\ngrid: {{seed: [0]}}\n")
    assert main(["compare", str(grid), "--out", str(tmp_path / "g"), "--track", "tensor"]) == 2
    assert "unknown tracker 'tensor'" in capsys.readouterr().err


def test_a_comparison_tracks_each_cell(tmp_path: Path, teacher_file: Path) -> None:
    started: list[list[str]] = []
    recipe = {"base": {"teacher": str(teacher_file), "student": "tiny4"}, "grid": {"seed": [0]}}
    (cell,) = cells(recipe, tmp_path)
    for track in ("", "tensorboard,wandb"):
        started.append(arguments(cell.config, tmp_path / "run", 1, track=track))
    assert "--track" not in started[0]
    assert started[1] == [*started[0], "--track", "tensorboard,wandb"]
    assert "track" not in json.dumps(cell.config.to_tree())  # no part of a cell's identity


@pytest.mark.slow
def test_the_real_wandb_writes_into_the_run_folder(teacher: nn.Module, digits: Images, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: only its stand-in was told")
    out = tmp_path / "first"
    assert failures(killed_and_resumed(teacher, digits, out, "wandb")) == []
    run_id = json.loads((out / "tracking.json").read_text())["wandb"]
    assert list((out / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))


@pytest.mark.slow
def test_the_real_trackio_goes_on(
    teacher: nn.Module, digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed: only its stand-in was told")
    from trackio.sqlite_storage import SQLiteStorage

    out = tmp_path / "first"
    assert failures(killed_and_resumed(teacher, digits, out, "trackio")) == []
    name = f"first-{json.loads((out / 'tracking.json').read_text())['trackio']}"
    rows = SQLiteStorage.get_logs("dodistill", name)
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == logged(out, "loss")
