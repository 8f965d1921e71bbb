"""The adapter to Ray, told by a stand-in what the library would tell; work in a scratch folder; outcomes."""

from __future__ import annotations

import json
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dodistill.commands import cell_runs
from dodistill.commands.cell import Failed, Stopped
from dodistill.commands.compare import compare
from dodistill.commands.executors import elsewhere, on_ray
from dodistill.commands.executors.elsewhere import work_on
from dodistill.commands.executors.on_ray import OnRay
from dodistill.commands.executors.shared import Outcome, Teaching, Work
from dodistill.commands.storage import Storage, Unwritable
from dodistill.commands.stored_run import StoredRun
from dodistill.commands.teachers import teach_elsewhere
from dodistill.core.deadline import Deadline
from dodistill.errors import DodistillError
from test_cell import the_cell
from test_trust import grid as grid  # a fixture


@pytest.fixture(autouse=True)
def _sigterm() -> Iterator[None]:
    """The stand-in takes the signal, as Ray does; processes that later tests start would inherit it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


class Ray(types.ModuleType):
    """A cluster that runs a task when it is asked for."""

    def __init__(self, gpus: float) -> None:
        super().__init__("ray")
        self.gpus, self.began, self.put_ = gpus, {}, []
        self.tasks: list[dict[str, Any]] = []
        self.exceptions = types.SimpleNamespace(RayError=ZeroDivisionError)

    def is_initialized(self) -> bool:
        return bool(self.began)

    def init(self, **given: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray does
        self.began = given
        if given["address"] == "gone:1":
            raise ConnectionError("nobody answers")

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0, "GPU": self.gpus} if self.gpus else {"CPU": 8.0}

    def remote(self, function: Any) -> Any:
        def options(**given: Any) -> Any:
            def send(*args: Any) -> Any:
                self.tasks.append(given | {"args": args})
                return lambda: function(*(a[1] if isinstance(a, tuple) and a[0] == "ref" else a for a in args))

            return types.SimpleNamespace(remote=send)

        return types.SimpleNamespace(options=options)

    def put(self, data: bytes) -> Any:
        self.put_.append(data)
        return ("ref", data)

    def get(self, reference: Any) -> Any:
        return reference()

    def wait(self, references: list[Any], timeout: float) -> Any:
        return references, []

    def cancel(self, reference: Any) -> None:
        self.tasks.append({"cancelled": reference})

    def shutdown(self) -> None:
        self.began = {}


def ray(monkeypatch: pytest.MonkeyPatch, gpus: float = 0.0) -> Ray:
    module = Ray(gpus)
    monkeypatch.setitem(sys.modules, "ray", module)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    return module


def work(folder: Path, name: str = "t", **more: Any) -> Work:
    tree = {"teacher": {"spec": str(folder / f"{name}.safetensors")}}
    return Work(tree, "run", {}, None, str(folder), **more)


@pytest.mark.parametrize(("gpus", "per_gpu", "share"), [(0, 0, 0.0), (4, 0, 1.0), (4, 4, 0.25), (0, 2, 0.5)])
def test_a_task_asks_for_its_share_and_has_the_teachers_by_reference(
    gpus: int, per_gpu: int, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ray(monkeypatch, gpus)
    for name in ("t", "other"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    monkeypatch.setattr(on_ray, "work_on", lambda _work, weights: Outcome(record=dict(weights)))
    before = signal.getsignal(signal.SIGTERM)
    executor = OnRay(per_gpu=per_gpu)
    assert signal.getsignal(signal.SIGTERM) == before
    assert module.began["address"] == "local"
    works = [work(tmp_path), work(tmp_path, threads=3), work(tmp_path, device="cpu"), work(tmp_path, "none")]
    handles = executor.submit([*works, Teaching("new", (), "", "")])
    assert [task["num_gpus"] for task in module.tasks] == [share, share, 0.0, share, share]
    assert [task["num_cpus"] for task in module.tasks] == [1, 3, 1, 1, 1]
    assert all(task["max_retries"] > 0 for task in module.tasks)
    assert [handle.result().record for handle in handles] == [{"t.safetensors": b"t"}] * 3 + [{}] * 2
    assert module.put_ == [b"t"]  # once, for all cells
    executor.close()
    assert not module.is_initialized()


def test_what_ray_reports_is_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ray(monkeypatch)
    module.init(address="of the caller")
    executor = OnRay()
    (lost, stopped) = executor.submit([work(tmp_path), work(tmp_path)])
    monkeypatch.setattr(on_ray, "work_on", lambda *_: 1 / 0)
    assert lost.result().said == "FAILED ZeroDivisionError: division by zero"
    stopped.cancel()
    stopped.cancel()
    assert [task["cancelled"] for task in module.tasks if "cancelled" in task] == [stopped.reference]
    with monkeypatch.context() as patch:  # it runs on: it is told again, but not at once
        patch.setattr(module, "wait", lambda references, timeout: ([], references))
        for again in (on_ray.AGAIN, -1.0):
            patch.setattr(on_ray, "AGAIN", again)
            assert not stopped.done()
    assert [task["cancelled"] for task in module.tasks if "cancelled" in task] == 2 * [stopped.reference]
    assert stopped.result() == Outcome(stopped=True, said="stopped; rerun to resume")
    executor.close()
    assert module.is_initialized()  # the caller began it
    module.shutdown()
    with pytest.raises(DodistillError, match="no Ray cluster at gone:1: nobody answers; correct --address"):
        OnRay("gone:1")
    module.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "there:2")
    OnRay().close()


def test_scratch_folders_go_unless_they_hold_what_could_not_be_stored(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = the_cell(grid)
    teachers = grid.parent / "out/teachers"
    weights = {"t.safetensors": (teachers / "t.safetensors").read_bytes()}
    monkeypatch.setattr(elsewhere.tempfile, "tempdir", str(tmp_path))
    scratch: list[Path] = []
    raised: list[Exception] = [Stopped("later"), Failed(3, "why"), Unwritable("the quota is used up")]

    def run(config: Any, folder: Path, *_: Any, **named: Any) -> dict[str, Any]:
        scratch.append(folder.parent.parent)
        assert config.teacher.spec == str(named["teachers"]) + "/t.safetensors"
        assert Path(config.teacher.spec).read_bytes() == weights["t.safetensors"]
        assert named["teachers"] != str(teachers)
        folder.parent.mkdir()
        (folder.parent / "it.log").write_text("one\ntwo\n")
        if raised:
            raise raised.pop(0)
        return {"cwd": str(Path.cwd())}

    monkeypatch.setattr(elsewhere, "run_cell", run)
    given: dict[str, Any] = {"key": cell.key, "cwd": str(tmp_path)}
    its = Work(cell.config.to_tree(), "", cell.label, None, str(teachers), **given)
    outcomes = [work_on(its, weights) for _ in range(4)]
    assert outcomes[0] == Outcome(stopped=True, said="later")
    assert outcomes[1] == Outcome(said="FAILED (exit status 3) why", log="one\ntwo")
    assert outcomes[2].said == "FAILED the quota is used up"
    assert outcomes[3].record == {"cwd": str(tmp_path)}
    assert [folder.exists() for folder in scratch] == [False, False, True, False]
    other = Work(cell.config.to_tree(), "", cell.label, None, str(teachers), key="another")
    assert f"the settings have the key {cell.key}, not another" in work_on(other, weights).said


def test_a_teacher_of_a_cluster_is_written_once_and_its_failure_named(tmp_path: Path) -> None:
    recipe = {"teachers": {"a": {"model": "tiny4", "data": "digits", "epochs": 2}, "b": {"model": "tiny8"}}}
    storage = Storage(str(tmp_path / "s"))
    outcomes = {"a": Outcome(weights=b"A"), "b": Outcome(said="FAILED (exit status 2) no data", log="more")}
    given: list[Teaching] = []

    class Pretend:
        jobs, here = 9, False

        def submit(self, works: Any) -> Any:
            given.extend(works)
            for it in works:
                storage.write(f"{it.name}/sets/1.json", b"")
            return [types.SimpleNamespace(done=lambda: True, result=lambda it=it: outcomes[it.teacher]) for it in works]

        def close(self) -> None:
            pass

    with pytest.raises(DodistillError, match=r"training teacher b: FAILED \(exit status 2\) no data more"):
        teach_elsewhere(recipe, tmp_path / "t", Pretend(), Deadline(), storage.url)
    assert (tmp_path / "t" / "a.safetensors").read_bytes() == b"A"
    assert given[0].words == ["tiny4", "--data", "digits", "--epochs", "2"]
    assert storage.names(f"{given[0].name}/sets") == []
    outcomes["b"] = Outcome(stopped=True)
    assert teach_elsewhere(recipe, tmp_path / "t", Pretend(), Deadline(), storage.url) is False
    outcomes["b"] = Outcome(weights=b"B")
    assert teach_elsewhere(recipe, tmp_path / "t", Pretend(), Deadline(), storage.url)
    assert [it.teacher for it in given] == ["a", "b", "b", "b"]


def test_the_driver_alone_records_and_a_lost_outcome_is_named(
    grid: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cell elsewhere says that it is done; what the storage has of it decides."""
    out, cell = grid.parent / "out", the_cell(grid)
    record = {"label": {}, "last": 50.0, "seconds": 3.0, "agreement": 1.0, "folder": "runs/it", "key": cell.key}

    submitted: list[str] = []

    class Pretend:
        jobs, here = 9, False

        def submit(self, works: Any) -> Any:
            submitted.append(works[0].name)
            assert works[0].name == works[0].key == cell.key
            return [types.SimpleNamespace(done=lambda: True, result=lambda: Outcome(record=record))]

        def close(self) -> None:
            pass

    storage = str(out / "storage")
    task = cell_runs.Task(cell)
    cell_runs.run_all([task], out, Pretend(), Deadline(), storage=storage)
    assert f"FAILED {storage} has lost what the cell put there" in capsys.readouterr().err
    assert not (out / "cells").exists()
    there = grid.parent / "there"
    there.mkdir()
    (there / "summary.json").write_text('{"note": "{folder}"}')
    StoredRun(Storage(storage), cell.key, there, {}).close(finished=True)
    cell_runs.run_all([task], out, Pretend(), Deadline(), storage=storage)
    (file,) = (out / "cells").iterdir()
    run = task.folder(out)
    assert json.loads(file.read_text()) == record | {"folder": f"runs/{run.name}"}
    assert json.loads((run / "summary.json").read_text()) == {"note": str(run)}
    assert Storage(storage).names(cell.key) == []
    capsys.readouterr()
    cell_runs.run_all([task], out, Pretend(), Deadline(), storage=storage)  # planned before there was a record
    assert "done by another process" in capsys.readouterr().err
    assert len(submitted) == 2


def test_nothing_to_do_begins_no_cluster(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert compare(grid, grid.parent / "out", on="ray", dry_run=True) == 0
    assert compare(grid, grid.parent / "out", on="ray", table=True) == 75
