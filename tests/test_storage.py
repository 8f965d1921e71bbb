"""Checkpoints in a storage: another machine goes on, and no half or damaged upload takes the place of a good one."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from dodistill import run_cell
from dodistill.commands import storage as storage_module
from dodistill.commands import stored_run
from dodistill.commands.cell import Stopped
from dodistill.commands.compare import compare
from dodistill.commands.storage import Storage, Unwritable
from dodistill.commands.stored_run import StoredRun
from dodistill.errors import DodistillError
from helpers import same
from test_cell import last_step, the_cell
from test_trust import grid as grid  # a fixture


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "AGAIN", ())
    monkeypatch.setattr(stored_run, "PAUSE", 0.0)


def save(run: Path, step: int, pool: int = 0) -> None:
    """What a run folder has after a checkpoint."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps({"teacher": f"{run.parent}/teachers/t.safetensors", "out": str(run)}))
    if not (run / f"pool-{pool}.pt").exists():
        (run / f"pool-{pool}.pt").write_bytes(b"pool %d" % pool * 1000)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(f'{{"step": {step}}}\n')
    if (run / "checkpoint.pt").exists():
        os.replace(run / "checkpoint.pt", run / "previous.pt")
    (run / ".next.pt").write_bytes(b"step %d" % step)
    os.replace(run / ".next.pt", run / "checkpoint.pt")


def keep(url: str, run: Path) -> StoredRun:
    return StoredRun(Storage(url), "key", run, {"{teachers}": f"{run.parent}/teachers"})


def step_of(run: Path) -> bytes:
    return (run / "checkpoint.pt").read_bytes()


def test_paths_that_json_escapes_are_of_each_machine(tmp_path: Path) -> None:
    """An accent, and the separator of Windows."""
    here, there = (tmp_path / name / "run" for name in ("Zoé", r"x\y"))
    save(here, 1)
    keep(str(tmp_path / "s"), here).close(finished=False)
    stored = b"".join(p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file())
    assert b"Zo" not in stored
    assert keep(str(tmp_path / "s"), there).fetch()
    config = json.loads((there / "config.json").read_text())
    assert config == {"teacher": f"{there.parent}/teachers/t.safetensors", "out": str(there)}


@pytest.mark.parametrize("kind", ["path", "file", "memory"])
def test_another_machine_goes_on_with_the_newest_checkpoint(kind: str, tmp_path: Path) -> None:
    if kind == "memory":
        pytest.importorskip("fsspec")
    url = {"path": str(tmp_path / "s"), "file": f"file://{tmp_path}/s", "memory": f"memory://{tmp_path.name}"}[kind]
    Storage(url).check()
    assert Storage(url).names("") == []
    one, two, three = (tmp_path / name / "run" for name in ("one", "two", "three"))
    first = keep(url, one)
    assert not first.fetch()
    first.sync()  # there is nothing yet
    assert Storage(url).names("key/sets") == []
    for step in range(1, 5):
        save(one, step, pool=step // 3)
        first.sync()
        first.sync()  # nothing new
    assert [name[:8] for name in Storage(url).names("key/sets")] == ["00000003", "00000004"]  # the two newest
    assert len(Storage(url).names("key/files")) == 2 + 2 + 2 + 1  # checkpoints, metrics, pools, config

    second = keep(url, two)
    assert second.fetch()
    assert step_of(two) == b"step 4"
    assert {p.name for p in two.iterdir()} == {
        "checkpoint.pt",
        "pool-0.pt",
        "pool-1.pt",
        "metrics.jsonl",
        "config.json",
    }
    assert json.loads((two / "config.json").read_text()) == {
        "teacher": f"{two.parent}/teachers/t.safetensors",
        "out": str(two),
    }
    second.sync()  # what was fetched is there
    assert len(Storage(url).names("key/sets")) == 2
    save(two, 5, pool=1)
    second.sync()
    save(one, 5, pool=1)  # the first machine lives on, unknown to the second
    first.sync()
    assert first.fetch() is False  # its own set is the newest, or as new
    third = keep(url, three)
    assert third.fetch()
    assert step_of(three) == b"step 5"

    (two / "summary.json").write_text("{}")
    (two / "student.safetensors").write_bytes(b"student")
    second.close(finished=True)
    assert len(Storage(url).names("key/sets")) == 1
    shutil.rmtree(three)
    (three.parent / "run.stored").unlink()
    assert keep(url, three).fetch()
    assert {p.name for p in three.iterdir()} == {"summary.json", "student.safetensors", "metrics.jsonl", "config.json"}
    keep(url, three).drop()
    assert Storage(url).names("key/sets") == Storage(url).names("key/files") == []


@pytest.mark.parametrize("damage", ["cut", "gone", "changed", "set cut", "set of something else", "set climbs"])
def test_a_damaged_upload_is_passed_over(damage: str, tmp_path: Path) -> None:
    url = str(tmp_path / "s")
    first = keep(url, tmp_path / "one" / "run")
    for step in (1, 2):
        save(tmp_path / "one" / "run", step)
        first.sync()
    newest = sorted((tmp_path / "s/key/sets").iterdir())[-1]
    tree = json.loads(newest.read_text())
    file = tmp_path / "s/key/files" / tree["files"]["checkpoint.pt"][0]
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:3])
    elif damage == "gone":
        file.unlink()
    elif damage == "changed":
        file.write_bytes(b"step 9")
    elif damage == "set cut":
        newest.write_text(newest.read_text()[:-9])
    elif damage == "set of something else":
        newest.write_text('{"finished": false, "files": [1]}')
    else:
        tree["files"]["../../escaped"] = tree["files"]["config.json"]
        newest.write_text(json.dumps(tree))
    other = tmp_path / "two" / "run"
    second = keep(url, other)
    assert second.fetch()
    assert step_of(other) == b"step 1"
    assert not list(tmp_path.rglob("escaped"))
    save(other, 3)
    second.sync()
    third = keep(url, tmp_path / "three" / "run")
    assert third.fetch()
    assert step_of(tmp_path / "three" / "run") == b"step 3"


def test_an_upload_that_is_cut_short_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The set comes last: killed or refused at any file before it, the older set counts; later the run tries again."""
    url, run = str(tmp_path / "s"), tmp_path / "one" / "run"
    first = keep(url, run)
    save(run, 1)
    first.sync()
    whole, calls = Storage.put, []

    def refused(self: Storage, path: Path, name: str) -> None:
        calls.append(name)
        if len(calls) % 2 == 0:
            raise Unwritable("the quota is used up")
        whole(self, path, name)

    monkeypatch.setattr(Storage, "put", refused)
    save(run, 2, pool=1)
    first.sync()  # the run goes on
    assert len(calls) == 2
    monkeypatch.setattr(Storage, "put", whole)
    assert keep(url, tmp_path / "two" / "run").fetch()
    assert step_of(tmp_path / "two" / "run") == b"step 1"
    first.sync()
    assert keep(url, tmp_path / "three" / "run").fetch()
    assert step_of(tmp_path / "three" / "run") == b"step 2"
    monkeypatch.setattr(Storage, "put", lambda *_: (_ for _ in ()).throw(Unwritable("the quota is used up.")))
    save(run, 3, pool=1)
    first.sync()
    with pytest.raises(Unwritable, match=f"quota is used up. What the run has computed is in {run} on "):
        first.close(finished=False)
    assert step_of(run) == b"step 3"


def test_a_folder_that_is_newer_stays(tmp_path: Path) -> None:
    url, run, other = str(tmp_path / "s"), tmp_path / "one" / "run", tmp_path / "two" / "run"
    first = keep(url, run)
    save(run, 1)
    first.sync()
    save(run, 2)  # killed before it was stored
    assert not keep(url, run).fetch()
    assert step_of(run) == b"step 2"
    second = keep(url, other)
    second.fetch()
    save(other, 9)
    second.sync()
    assert keep(url, run).fetch()  # it went on elsewhere meanwhile
    assert step_of(run) == b"step 9"
    begun = tmp_path / "three" / "run"
    save(begun, 4)
    assert not keep(url, begun).fetch()  # begun here, without the storage
    assert step_of(begun) == b"step 4"


def test_a_storage_that_refuses_is_named_before_anything_runs(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DodistillError, match=r"cannot write .*file/x/probe-.*give another --storage"):
        compare(grid, grid.parent / "out", storage=str(tmp_path / "file" / "x"))
    assert not (grid.parent / "out" / "runs").exists()
    with pytest.raises(DodistillError, match="give a path"):
        Storage("nonsense://bucket")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DodistillError, match=r"pip install 'dodistill\[remote\]'"):
        Storage("s3://bucket/x")


def test_a_cell_goes_on_elsewhere_and_loses_nothing(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in one folder, it goes on in another; the storage then refuses, and the outcome stays in the folder."""
    tree, url = the_cell(grid).config.to_tree(), str(tmp_path / "s")
    tree["loop"] |= {"steps": 150, "eval_every": 150, "log_every": 1, "checkpoint_seconds": 0.0}
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"

    class Soon:
        def is_set(self) -> bool:
            return bool(Storage(url).names("a-key/sets")) and last_step(one) > 2

    named: Any = {"storage": url, "name": "a-key", "threads": 1}
    with pytest.raises(Stopped):
        run_cell(tree, one, stop=Soon(), **named)
    begun = last_step(one)
    monkeypatch.setattr(Storage, "write", lambda *_: (_ for _ in ()).throw(Unwritable("the quota is used up.")))
    with pytest.raises(Unwritable, match=f"What the run has computed is in {two}"):
        run_cell(tree, two, **named)
    monkeypatch.undo()
    lines = [json.loads(line)["step"] for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert 0 < begun < 150
    assert lines[-1] == 150
    assert (two / "student.safetensors").exists()
    record = run_cell(tree, two, **named)
    plain = run_cell(tree, tmp_path / "three", threads=1)
    keys = ("last", "best", "agreement", "share_ratio", "key")
    assert {k: record[k] for k in keys} == {k: plain[k] for k in keys}
    from safetensors.torch import load_file

    same(load_file(two / "student.safetensors"), load_file(tmp_path / "three" / "student.safetensors"))
