"""Cells as slurm jobs, with submitit's executors of one machine in place of slurm."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from dodistill.commands.compare import compare
from dodistill.commands.executors.shared import Work
from dodistill.commands.storage import Storage
from dodistill.config.grid import cell_key
from dodistill.config.tree import resolve
from dodistill.errors import DodistillError
from helpers import same
from test_cell import the_cell, wait
from test_trust import grid as grid  # a fixture

TRIAL = ("cluster=local", "timeout_min=30")


def test_flags_that_do_not_fit_are_named(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = grid.parent / "out"
    for named, said in (
        ({"on": "slurm", "per_gpu": 2}, "--per-gpu 2 is of --on local or ray"),
        ({"on": "local", "address": "x:1"}, "--address x:1 is of --on ray"),
        ({"on": "ray", "slurm": ["a=1"]}, "is of --on slurm"),
        ({"on": "local", "jobs": 0}, "jobs is 0; it must be at least 1"),
    ):
        with pytest.raises(DodistillError, match=said):
            compare(grid, out, **named)
    for module, on in (("ray", "ray"), ("submitit", "slurm")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(DodistillError, match=rf"--on {on} needs {module} .*pip install 'dodistill\[{on}\]'"):
            compare(grid, out, on=on)
    assert not (out / "runs").exists()


def test_a_missing_slurm_and_wrong_parameters_are_named(grid: Path) -> None:
    pytest.importorskip("submitit")
    out = grid.parent / "out"
    for options, said in (
        (["partition"], "write KEY=VALUE"),
        (["cluster=local", "timeout_min=soon"], "--on slurm: .*timeout_min"),
        (["cluster=nowhere"], "--on slurm: .*nowhere"),
        (["partition=gpu"], "--on slurm: .*srun"),
    ):
        with pytest.raises(DodistillError, match=said):
            compare(grid, out, on="slurm", slurm=options)


def test_a_grid_of_jobs_is_that_of_this_machine(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a teacher that a job trains; a cell that fails is named, and its log is kept."""
    pytest.importorskip("submitit")
    recipe = yaml.safe_load(grid.read_text())
    lesson = {"model": "tiny4", "data": "digits", "normalise": "mnist", "epochs": 1, "batch": 256, "flip": "false"}
    recipe["teachers"] = {"taught": lesson | {"precision": "fp32"}}
    recipe["grid"] = {"teacher": {"taught": {"teacher": "{teachers}/taught.safetensors"}, "t": {"data.test": "none"}}}
    grid.write_text(yaml.safe_dump(recipe, sort_keys=False))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = grid.parent / "out"
    assert compare(grid, out, on="slurm", slurm=TRIAL) == 75
    said = capsys.readouterr()
    assert "training taught" in said.err
    assert "/2] t: FAILED (exit status 2) dodistill: unknown data set 'none'" in said.err
    assert "none" in next((out / "runs").glob("t-*.log")).read_text()
    assert "1 of 2 cells" in said.out
    (cell,) = (out / "cells").glob("*.json")
    record = json.loads(cell.read_text())
    assert str(tmp_path) not in cell.read_text()
    assert record["folder"] == f"runs/taught-{record['key']}"
    run = out / record["folder"]
    assert (run / "report.html").exists()
    assert f"{out}/teachers/taught.safetensors" in (run / "config.json").read_text()
    assert not [p for p in (out / "storage").rglob("*") if p.is_file() and "teacher" in str(p)]

    (other := tmp_path / "other" / "teachers").mkdir(parents=True)
    (other / "taught.safetensors").write_bytes((out / "teachers" / "taught.safetensors").read_bytes())
    (other / "t.safetensors").write_bytes((out / "teachers" / "t.safetensors").read_bytes())
    compare(grid, tmp_path / "other", only=["teacher=taught"], jobs=2)
    local = json.loads((tmp_path / "other" / "cells" / cell.name).read_text())
    keys = ("label", "last", "best", "agreement", "share_ratio", "key", "published", "config", "weights", "code")
    assert {k: record[k] for k in keys} == {k: local[k] for k in keys}
    assert list(record) == list(local)
    there = tmp_path / "other" / record["folder"]
    same(load_file(run / "student.safetensors"), load_file(there / "student.safetensors"))


def test_a_preempted_job_saves_and_goes_on_in_the_next(grid: Path, tmp_path: Path) -> None:
    """Its process has the signal that slurm sends to all processes of a job before it ends them."""
    pytest.importorskip("submitit")
    from dodistill.commands.executors.on_slurm import Job

    cell, storage = the_cell(grid), Storage(str(tmp_path / "s"))
    tree = cell.config.to_tree()
    tree["loop"] |= {"steps": 400, "eval_every": 400, "log_every": 1, "checkpoint_seconds": 0.0}
    key = cell_key(resolve(tree))
    job = Job(Work(tree, "", {}, None, "", key, storage=storage.url, name=key))
    again = []

    def announced(*_: object) -> None:
        children = subprocess.run(["pkill", "-USR2", "-P", str(os.getpid())], check=False)
        again.append((job.checkpoint(), children.returncode))

    def preempt() -> None:
        wait(lambda: bool(storage.names(f"{key}/sets")))
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, announced)
    try:
        threading.Thread(target=preempt, daemon=True).start()
        stopped = job()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert stopped.stopped
    assert stopped.record is None
    ((delayed, found),) = again
    assert found == 0
    sets = storage.names(f"{key}/sets")
    outcome = pickle.loads(pickle.dumps(delayed)).result()
    assert outcome.record["key"] == key
    assert outcome.record["summary"]["steps"] == 400
    (last,) = storage.names(f"{key}/sets")
    assert int(last[:8]) > int(sets[-1][:8])  # it went on from there
