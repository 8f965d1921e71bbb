"""The runs of a grid's cells on an executor: one record for each, which this process alone writes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ..config import plugins
from ..config.code import code_of
from ..config.grid import Cell
from ..core.deadline import Deadline
from ..engine.inputs import keep_pool
from ..engine.run_folder import drop_checkpoints, write_atomically
from ..errors import DodistillError
from ..report.format import duration
from ..report.grid_progress import GridProgress, Running, remaining
from ..report.report import write_report
from .cell import beside, write_settings
from .executors.shared import Executor, Handle, Work
from .storage import Storage, Unwritable
from .stored_run import StoredRun


@dataclass(frozen=True)
class Task:
    """A cell to run. `again`: it has a record, of older code; `expected`: its seconds, if known."""

    cell: Cell
    again: bool = False
    expected: float | None = None

    @property
    def name(self) -> str:
        return " ".join(self.cell.label.values())

    def folder(self, out: Path) -> Path:
        """The run folder. Each version of the code has its own: a finished run is not overwritten, and one that was
        stopped goes on."""
        return out / "runs" / (self.cell.slug + self._version)

    def record(self, out: Path) -> Path:
        """The file of its record."""
        return out / "cells" / f"{self.cell.key}.json"

    @property
    def stored(self) -> str:
        """What a storage calls its run."""
        return self.cell.key + self._version

    @property
    def _version(self) -> str:
        version = "-" + "".join(code_of(self.cell.config).values()) if self.again else ""
        return f"-code-{plugins.fingerprint(version.encode())[:6]}" if version else ""


@dataclass(frozen=True)
class Started:
    """A cell that an executor has."""

    task: Task
    handle: Handle
    began: float


def run_all(
    todo: Sequence[Task], out: Path, executor: Executor, deadline: Deadline, track: str = "", storage: str = ""
) -> None:
    """Run the cells, and record each that ends. `storage`: where their files are; empty: in their folders alone."""
    running: list[Started] = []
    waiting, took = list(todo), list[float]()

    with GridProgress() as progress, ProgressFiles(out, "" if executor.here else storage) as files:

        def summary(now: float) -> str:
            done = len(todo) - len(waiting) - len(running)
            said = f"grid: {done} of {len(todo)} cells done, "
            cells = files.of(running)
            if not executor.here:
                return said + f"{len(cells)} running, {len(running) - len(cells)} queued or beginning"
            left = remaining(cells, [task.expected for task in waiting], executor.jobs, now, took)
            return said + f"{len(running)} running" + (f", about {duration(left)} left" if left is not None else "")

        while waiting or running:
            if (room := executor.jobs - len(running)) > 0 and waiting and not deadline.passed:
                some = list[Task]()
                while waiting and len(some) < room:
                    task = waiting.pop(0)
                    if not task.again and task.record(out).exists():  # since this process began
                        progress.say(f"{task.name}: done by another process")
                    else:
                        some.append(task)
                works = [_work(task, out, deadline, track, storage) for task in some]
                handles = executor.submit(works) if works else ()
                running += [Started(task, handle, time.monotonic()) for task, handle in zip(some, handles)]
            for it in list(running):
                if it.handle.done():
                    running.remove(it)
                    said, seconds = _finish(it, out, executor.here, storage)
                    progress.say(f"[{len(todo) - len(waiting) - len(running)}/{len(todo)}] {it.task.name}: {said}")
                    took += [seconds] if seconds is not None else []
            # at a signal, the cells save and stop; at the budget those here stop by themselves
            if deadline.stopped or (deadline.passed and not executor.here):
                for it in running:
                    it.handle.cancel()
            if not running and deadline.passed:
                progress.say(f"budget spent: {len(waiting)} cells left; rerun the command to resume.")
                return
            progress.show(files.of(running), summary)
            files.refresh(running)
            time.sleep(0.2)


class ProgressFiles:
    """The files by which progress is shown: those of the run folders, or of cells elsewhere copies from the storage."""

    def __init__(self, out: Path, storage: str) -> None:
        """`storage`: of cells elsewhere, else empty."""
        self._out, self._storage = out, Storage(storage) if storage else None
        self._copies = Path(tempfile.mkdtemp(prefix="dodistill-")) if storage else None
        self._turn, self._next = 0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._copies is not None:
            shutil.rmtree(self._copies, ignore_errors=True)

    def refresh(self, running: Sequence[Started]) -> None:
        """Copy the metrics of the next cell, at most once a second, each at most once in ten."""
        if self._storage is None or self._copies is None or not running or time.monotonic() < self._next:
            return
        self._turn += 1
        self._next = time.monotonic() + max(1.0, 10.0 / len(running))
        name = running[self._turn % len(running)].task.stored
        metrics = StoredRun(self._storage, name, self._copies / name, {}).peek("metrics.jsonl")
        if metrics is not None:
            (self._copies / name).mkdir(exist_ok=True)
            (self._copies / name / "metrics.jsonl").write_bytes(metrics)

    def of(self, running: Sequence[Started]) -> list[Running]:
        """The cells that have begun, as far as is known."""
        out = []
        for it in running:
            folder = it.task.folder(self._out) if self._copies is None else self._copies / it.task.stored
            if self._copies is None or folder.exists():
                out.append(Running(it.task.name, folder, it.task.cell.config.loop.steps, it.began))
        return out


def _work(task: Task, out: Path, deadline: float, track: str, storage: str) -> Work:
    cell, left = task.cell, deadline - time.monotonic()
    return Work(
        cell.config.to_tree(), str(task.folder(out)), cell.label, cell.published, str(out / "teachers"), cell.key,
        cell.config.loop.device, cell.config.loop.threads, time.time() + left if math.isfinite(left) else math.inf,
        track, storage, task.stored, environment(), os.getcwd(),
    )  # fmt: skip


def environment() -> dict[str, str]:
    """The variables of this process that a run reads: where data sets are."""
    return {name: value for name, value in os.environ.items() if name.startswith("DODISTILL_")}


def _finish(it: Started, out: Path, here: bool, storage: str) -> tuple[str, float | None]:
    """Record what a cell that has ended computed. Returns what is said of it, and the seconds of a finished run."""
    cell, run, outcome = it.task.cell, it.task.folder(out), it.handle.result()
    if outcome.record is None:
        if outcome.log:
            run.parent.mkdir(parents=True, exist_ok=True)
            with open(beside(run, ".log"), "a", encoding="utf-8") as log:
                log.write(f"{outcome.log}\n")
        return outcome.said, None
    stored = None
    if storage:
        stored = StoredRun(Storage(storage), it.task.stored, run, {"{teachers}": str(out / "teachers")})
    if stored is not None and not here:
        try:
            stored.fetch()
        except DodistillError as error:
            return f"FAILED {error} Its outcome stays there; rerun to read it again.", None
        if not (run / "summary.json").exists():
            return f"FAILED {storage} has lost what the cell put there; rerun to run it again.", None
        write_settings(run, cell.config.to_tree())
    record = outcome.record | {"folder": f"runs/{run.name}"}
    it.task.record(out).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(it.task.record(out), json.dumps(record, indent=1).encode())
    keep_pool(run)
    drop_checkpoints(run)  # a finished cell is never resumed
    if stored is not None:
        with contextlib.suppress(Unwritable):  # what is left harms nothing
            stored.drop()
    try:
        write_report(run, pdf=False)
    except DodistillError as error:  # the record is what counts
        print(error, file=sys.stderr)
    last = record["last"]
    score = f"{last:.2f} %" if last is not None else f"agreement {record['agreement']:.2f} %"
    return f"{score} in {record['seconds']:.0f} s", float(record["seconds"])
