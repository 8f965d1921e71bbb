"""Work on another machine: in a scratch folder there, with its files in a storage that all machines see."""

from __future__ import annotations

import contextlib
import math
import platform
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from ... import __version__
from ...config.grid import cell_key
from ...config.tree import Tree, resolve
from ...errors import STOPPED, DodistillError
from ..cell import TIED, Failed, Flag, Stopped, beside, placed, run_cell, supervise, tail
from ..storage import Storage, Unwritable
from ..stored_run import StoredRun
from .shared import Outcome, Teaching, Work, outcome_of


def work_on(work: Work | Teaching, weights: Mapping[str, bytes], stop: Flag | None = None) -> Outcome:
    """Do some work in a scratch folder, which is deleted unless its files could not be stored. `weights`: files of
    teachers by name; without them, those in the driver's folder are used, which this machine then has to see."""
    scratch, lost = Path(tempfile.mkdtemp(prefix="dodistill-")), False

    def do() -> Outcome:
        nonlocal lost
        try:
            if isinstance(work, Teaching):
                return Outcome(weights=_teach(work, scratch / "runs" / "it", stop))
            return Outcome(record=_cell(work, weights, scratch, stop))
        except Unwritable:
            lost = True
            raise

    there = contextlib.chdir(work.cwd) if work.cwd and Path(work.cwd).is_dir() else contextlib.nullcontext()
    try:
        with there:
            return outcome_of(do, scratch / "runs" / "it.log")
    finally:
        if not lost:
            shutil.rmtree(scratch, ignore_errors=True)


def _cell(work: Work, weights: Mapping[str, bytes], scratch: Path, stop: Flag | None) -> Tree:
    teachers = str(scratch / "teachers") if weights else work.teachers
    for name, data in weights.items():
        path = Path(teachers) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    config = resolve(placed(work.tree, work.teachers, teachers), allow_code=True)
    if cell_key(config) != work.key:
        raise DodistillError(
            f"on {platform.node()}, with dodistill {__version__}, the settings have the key {cell_key(config)}, not "
            f"{work.key}. Install the driver's version there, and let it see the files that the recipe names."
        )
    return run_cell(
        config, scratch / "runs" / "it", work.label, published=work.published, teachers=teachers,
        threads=work.threads or 1, seconds=work.until - time.time(), track=work.track, storage=work.storage,
        name=work.name, environment=work.environment, allow_code=True, stop=stop,
    )  # fmt: skip


def _teach(work: Teaching, folder: Path, stop: Flag | None) -> bytes:
    """Train a teacher; its checkpoints are stored as those of a run."""
    folder.mkdir(parents=True)
    target = folder / f"{work.teacher}.safetensors"
    stored = StoredRun(Storage(work.storage), work.name, folder, {}, f"{work.teacher}.teaching.pt")
    stored.fetch()
    words = [*TIED, "teach", *work.words, "--out", str(target)]
    if math.isfinite(work.until):
        words += ["--max-seconds", f"{max(1.0, work.until - time.time()):.1f}"]
    if not target.exists():  # an earlier attempt may have finished it
        status = supervise(words, beside(folder, ".log"), work.environment, True, stop, stored)
        if status in (STOPPED, -signal.SIGTERM):
            raise Stopped("stopped at the budget; rerun to resume")
        if status:
            raise Failed(status, " ".join(tail(beside(folder, ".log"), 1)))
    return target.read_bytes()
