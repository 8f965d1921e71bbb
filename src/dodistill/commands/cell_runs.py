"""The runs of a grid's cells: each in a process of its own, at most so many at a time, and one record for each."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config import plugins
from ..config.code import code_of
from ..config.grid import Cell, weights_of
from ..core.deadline import Deadline
from ..engine.run_folder import drop_checkpoints, write_atomically
from ..errors import STOPPED, DodistillError
from ..files import read_object
from ..report.format import duration
from ..report.grid_progress import GridProgress, Running, remaining
from ..report.report import write_report

#: A child process. -P keeps the current folder off its import path: a yaml.py that lies there is not imported.
DODISTILL = (sys.executable, "-P", "-m", "dodistill")


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
class Child:
    """A process that runs a cell."""

    task: Task
    process: subprocess.Popen[bytes]
    began: float


def run_all(todo: Sequence[Task], out: Path, jobs: int, deadline: Deadline, track: str = "") -> None:
    """Run at most `jobs` processes at a time. They share the cores evenly."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    running: list[Child] = []
    waiting, took = list(todo), list[float]()

    def summary(now: float) -> str:
        cells = [_running(child, out) for child in running]
        left = remaining(cells, [task.expected for task in waiting], jobs, now, took)
        done = len(todo) - len(waiting) - len(running)
        said = f"grid: {done} of {len(todo)} cells done, {len(running)} running"
        return said + (f", about {duration(left)} left" if left is not None else "")

    with GridProgress() as progress:
        try:
            while waiting or running:
                while waiting and len(running) < jobs and not deadline.passed:
                    running.append(_start(waiting.pop(0), out, threads, deadline, track))
                for child in list(running):
                    if child.process.poll() is not None:
                        running.remove(child)
                        said, seconds = _finish(child, out)
                        progress.say(
                            f"[{len(todo) - len(waiting) - len(running)}/{len(todo)}] {child.task.name}: {said}"
                        )
                        took += [seconds] if seconds is not None else []
                if deadline.stopped:  # by a signal: the children save, and exit 75
                    for child in running:
                        child.process.terminate()
                if not running and deadline.passed:
                    progress.say(f"budget spent: {len(waiting)} cells left; rerun the command to resume.")
                    return
                progress.show([_running(child, out) for child in running], summary)
                time.sleep(0.2)
        finally:
            for child in running:
                child.process.terminate()
            for child in running:
                child.process.wait()


def _running(child: Child, out: Path) -> Running:
    task = child.task
    return Running(task.name, task.folder(out), task.cell.config.loop.steps, child.began)


def _beside(run: Path, suffix: str) -> Path:
    """A file beside a run folder. A label may have a dot, so `with_suffix` would give two cells one file."""
    return run.with_name(run.name + suffix)


def _start(task: Task, out: Path, threads: int, deadline: float, track: str = "") -> Child:
    cell, run = task.cell, task.folder(out)
    run.mkdir(parents=True, exist_ok=True)
    recipe = _beside(run, ".yaml")
    tree = cell.config.to_tree()
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    command = [*DODISTILL, "distill", str(recipe), "--out", str(run), "--quiet", "--no-report",
               "--loop.threads", str(cell.config.loop.threads or threads)]  # fmt: skip
    if plugins.paths(tree):  # this process has run the same code to read the config, and `code` has its hash
        command.append("--allow-code")
    if track:
        command += ["--track", track]
    if math.isfinite(deadline):
        command += ["--max-seconds", f"{max(1.0, deadline - time.monotonic()):.1f}"]
    with open(_beside(run, ".log"), "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    return Child(task, process, time.monotonic())


def _finish(child: Child, out: Path) -> tuple[str, float | None]:
    """Record what a process that has ended computed. Returns what is said of it, and the seconds of a finished run."""
    cell, run, status = child.task.cell, child.task.folder(out), child.process.returncode
    if status in (STOPPED, -signal.SIGTERM):
        return "stopped at the budget, or used by another process; rerun to resume", None
    if status:
        tail = _beside(run, ".log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return f"FAILED (exit status {status}) {' '.join(tail)}", None
    record = record_of(cell, read_object(run / "summary.json", "delete the run's folder, and rerun the command"))
    record["folder"] = f"runs/{run.name}"
    (out / "cells").mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1).replace(str(out / "teachers"), "{teachers}")  # no machine's path in a cell
    write_atomically(out / "cells" / f"{cell.key}.json", text.encode())
    drop_checkpoints(run)  # a finished cell is never resumed
    try:
        write_report(run, pdf=False)
    except DodistillError as error:  # the record is what counts
        print(error, file=sys.stderr)
    last = record["last"]
    score = f"{last:.2f} %" if last is not None else f"agreement {record['agreement']:.2f} %"
    return f"{score} in {record['seconds']:.0f} s", float(record["seconds"])


def record_of(cell: Cell, summary: Mapping[str, Any]) -> dict[str, Any]:
    """One cell's JSON: the measures that `tables` reads, the key and the config."""
    record = record_of_summary(cell.label, summary)
    return record | {
        "key": cell.key,
        "published": cell.published,
        "config": cell.config.to_tree(),
        "weights": weights_of(cell.config),
    }


def record_of_summary(label: Mapping[str, str], summary: Mapping[str, Any]) -> dict[str, Any]:
    """The measures of one finished run, under its label."""
    shares = summary["class_shares"]
    return {
        "label": dict(label),
        "last": summary.get("student_accuracy"),
        "best": summary.get("best_on_test"),
        "delivered": summary.get("delivered_accuracy"),
        "teacher": summary.get("teacher_accuracy"),
        "agreement": summary["agreement"],
        "seconds": summary["seconds"],
        "share_ratio": max(shares) / max(min(shares), 0.5 / max(summary["images"], 1)),
        "code": summary.get("code", {}),
        # the command and the verdict name paths of this machine
        "summary": {k: v for k, v in summary.items() if k not in ("command", "verdict", "code")},
    }
