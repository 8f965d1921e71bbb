"""The runs of a grid's cells on an executor: one record for each, which this process alone writes."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import plugins
from ..config.code import code_of
from ..config.grid import Cell
from ..core.deadline import Deadline
from ..engine.run_folder import drop_checkpoints, write_atomically
from ..errors import DodistillError
from ..report.format import duration
from ..report.grid_progress import GridProgress, Running, remaining
from ..report.report import write_report
from .cell import Failed, Stopped
from .executors.shared import Executor, Handle, Work


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
        version = "-" + "".join(code_of(self.cell.config).values()) if self.again else ""
        return (
            out / "runs" / (self.cell.slug + (f"-code-{plugins.fingerprint(version.encode())[:6]}" if version else ""))
        )


@dataclass(frozen=True)
class Started:
    """A cell that an executor has."""

    task: Task
    handle: Handle
    began: float


def run_all(todo: Sequence[Task], out: Path, executor: Executor, deadline: Deadline, track: str = "") -> None:
    """Run the cells, and record each that ends."""
    running: list[Started] = []
    waiting, took = list(todo), list[float]()

    def summary(now: float) -> str:
        cells = [_running(it, out) for it in running]
        left = remaining(cells, [task.expected for task in waiting], executor.jobs, now, took)
        done = len(todo) - len(waiting) - len(running)
        said = f"grid: {done} of {len(todo)} cells done, {len(running)} running"
        return said + (f", about {duration(left)} left" if left is not None else "")

    with GridProgress() as progress:
        try:
            while waiting or running:
                if (room := executor.jobs - len(running)) > 0 and waiting and not deadline.passed:
                    some, waiting = waiting[:room], waiting[room:]
                    handles = executor.submit([_work(task, out, deadline, track) for task in some])
                    running += [Started(task, handle, time.monotonic()) for task, handle in zip(some, handles)]
                for it in list(running):
                    if it.handle.done():
                        running.remove(it)
                        said, seconds = _finish(it, out)
                        progress.say(f"[{len(todo) - len(waiting) - len(running)}/{len(todo)}] {it.task.name}: {said}")
                        took += [seconds] if seconds is not None else []
                if deadline.stopped:  # by a signal: the cells save and stop
                    for it in running:
                        it.handle.cancel()
                if not running and deadline.passed:
                    progress.say(f"budget spent: {len(waiting)} cells left; rerun the command to resume.")
                    return
                progress.show([_running(it, out) for it in running], summary)
                time.sleep(0.2)
        finally:
            executor.close()


def _running(it: Started, out: Path) -> Running:
    task = it.task
    return Running(task.name, task.folder(out), task.cell.config.loop.steps, it.began)


def _work(task: Task, out: Path, deadline: float, track: str) -> Work:
    cell, left = task.cell, deadline - time.monotonic()
    return Work(
        cell.config.to_tree(), str(task.folder(out)), cell.label, cell.published, str(out / "teachers"),
        cell.config.loop.device, cell.config.loop.threads, time.time() + left if math.isfinite(left) else math.inf,
        track,
    )  # fmt: skip


def _finish(it: Started, out: Path) -> tuple[str, float | None]:
    """Record what a cell that has ended computed. Returns what is said of it, and the seconds of a finished run."""
    cell, run = it.task.cell, it.task.folder(out)
    try:
        record = it.handle.result()
    except Stopped as stopped:
        return str(stopped), None
    except Failed as failed:
        return f"FAILED {failed}", None
    (out / "cells").mkdir(parents=True, exist_ok=True)
    write_atomically(out / "cells" / f"{cell.key}.json", json.dumps(record, indent=1).encode())
    drop_checkpoints(run)  # a finished cell is never resumed
    try:
        write_report(run, pdf=False)
    except DodistillError as error:  # the record is what counts
        print(error, file=sys.stderr)
    last = record["last"]
    score = f"{last:.2f} %" if last is not None else f"agreement {record['agreement']:.2f} %"
    return f"{score} in {record['seconds']:.0f} s", float(record["seconds"])
