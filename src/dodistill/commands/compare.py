"""A grid of runs from one recipe: same teacher, same steps, same seeds. Long grids run in parts (`--budget`).

    name: mnist
    teachers:                                   # trained once, first; {teachers} is their folder
      digits: {model: tiny32, data: mnist, normalise: mnist, epochs: 5}
    base: {teacher: "{teachers}/digits.safetensors", student: tiny8, preset: desk}
    grid:                                       # the first axis varies slowest
      seed: [0, 1, 2]
      source: [fast, deepinv]
      intervention: {plain: {}, kdci: {intervention: kdci}}
    when:                                       # further settings for a combination of labels
      - {where: {source: fast, seed: 0}, then: {source.K: 2}}
    published:
      - {where: {source: fast, intervention: plain}, value: 89.29}

The key of a cell is a hash of its resolved config and its weights. A finished cell is not run again; an interrupted
cell resumes. Each cell runs in its own process and writes one JSON to `cells/`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml

from ..config import plugins
from ..config.grid import Cell, cells, read_recipe, stored, weights_of
from ..config.tree import Tree
from ..core.deadline import Deadline, stopping
from ..engine.run_folder import check_writable, drop_checkpoints, write_atomically
from ..errors import STOPPED, Busy, DodistillError, at_least
from ..files import claimed, read_object


@dataclass(frozen=True)
class Arguments:
    """Run a grid of methods with equal steps, seeds and teacher.

    Finished cells are not run again. Rerun the command to run or resume the others.
    """

    recipe: Annotated[str, "RECIPE.yaml"]  #: the grid; see recipes/
    out: Annotated[str, "FOLDER"] = ""  #: folder of the results; empty: runs/NAME
    jobs: int = 1  #: number of cells that run in parallel
    budget: Annotated[str, "TIME"] = ""  #: stop cleanly after this time, as in 25m, 2h or 90s
    only: Annotated[list[str], "AXIS=LABEL"] = dataclasses.field(default_factory=list)  #: run only these cells
    table: bool = False  #: print the table of the finished cells, run nothing
    against: Annotated[str, "AXIS=LABEL,..."] = ""  #: add the differences from this arm, paired by seed
    show: Annotated[list[str], "NAME"] = dataclasses.field(default_factory=list)  #: add a logged value: kdci/F_over_S
    dry_run: bool = False  #: list the cells and which are done, run nothing
    allow_code: bool = False  #: allow code files that the recipe names to run
    track: Annotated[str, "NAMES"] = ""  #: log each cell to tensorboard, wandb, trackio, or several, joined by commas


def run(arguments: Arguments) -> int:
    a = arguments
    out = Path(a.out) if a.out else None
    return compare(
        Path(a.recipe), out, a.jobs, a.budget or None, a.only, a.table, a.dry_run, a.against, a.show, a.allow_code,
        a.track,
    )  # fmt: skip


#: A child process. -P keeps the current folder off its import path: a yaml.py that lies there is not imported.
DODISTILL = (sys.executable, "-P", "-m", "dodistill")


def seconds_of(text: str | None) -> float:
    """`90s`, `25m`, `2h` or plain seconds -> seconds; None: infinity."""
    if text is None:
        return math.inf
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([smh]?)", text.strip())
    if not match:
        raise DodistillError(f"budget is {text!r}; it must be a duration, as in 90s, 25m or 2h.")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


# ------------------------------------------------------------------------------------------------ running


def compare(path: Path, out: Path | None, jobs: int = 1, budget: str | None = None, only: list[str] | None = None,
            table: bool = False, dry_run: bool = False, against: str = "",
            show: Sequence[str] = (), allow_code: bool = False, track: str = "") -> int:  # fmt: skip
    """Run the unfinished cells within the budget, and print the table. Returns 0, or 75 when cells are left.

    `against`, as in intervention=plain or replay=none,update=plain, adds the differences from that arm, paired by seed;
    `show` adds columns to both. `allow_code`: code files that the recipe names may run.
    `track`: trackers for each cell's run; no part of a cell's identity.
    """
    recipe = read_recipe(path)
    out = out or Path("runs") / str(recipe.get("name", path.stem))
    deadline = Deadline(time.monotonic() + seconds_of(budget))
    at_least(1, "compare", jobs=jobs)
    check_writable(out / "compare.html")
    with stopping(deadline):
        return _compare(recipe, out, jobs, deadline, only or [], table, dry_run, against, show, allow_code, track)


def _compare(recipe: Tree, out: Path, jobs: int, deadline: Deadline, only: list[str], table: bool, dry_run: bool,
             against: str, show: Sequence[str], allow_code: bool, track: str) -> int:  # fmt: skip
    if track:
        from ..report.trackers import track_names

        track = ",".join(track_names(track))
    if not (table or dry_run) and not teach_missing(recipe, out / "teachers", deadline, allow_code):
        print("budget spent while training the teachers; rerun the command to resume.", file=sys.stderr)
        return STOPPED
    chosen = [c for c in cells(recipe, out / "teachers", allow_code) if _chosen(c, only)]
    known = stored(out)
    todo = [c for c in chosen if known.find(c) is None]
    if dry_run:
        for cell in chosen:
            print(f"{'todo' if cell in todo else 'done'}  {cell.key}  {cell.label}")
        return 0
    if not table:
        _run_all(todo, out, jobs, deadline, track)
    return _report(recipe, chosen, out, against, show)


def _chosen(cell: Cell, only: list[str]) -> bool:
    wanted: dict[str, set[str]] = {}
    for item in only:
        axis, given, value = item.partition("=")
        if not given or axis not in cell.label:
            raise DodistillError(f"--only {item}: write AXIS=LABEL, with one of the axes {', '.join(cell.label)}.")
        wanted.setdefault(axis, set()).add(value)
    return all(cell.label[axis] in values for axis, values in wanted.items())


def teach_missing(recipe: Tree, folder: Path, deadline: Deadline, allow_code: bool = False) -> bool:
    """Train the recipe's missing teachers, one after another. Returns False when the budget ends first."""
    for name, settings in (recipe.get("teachers") or {}).items():
        target = folder / f"{name}.safetensors"
        settings = dict(settings)
        if file := plugins.model_file(str(settings["model"])):
            plugins.refuse(file, f"dodistill teach {settings['model']}", allow_code)
        command = [*DODISTILL, "teach", str(settings.pop("model")), "--out", str(target)]
        for key, value in settings.items():
            command += [f"--{key}", str(value)]
        told = False
        while not target.exists():
            if deadline.passed:
                return False
            folder.mkdir(parents=True, exist_ok=True)
            left = ["--max-seconds", f"{max(1.0, deadline - time.monotonic()):.1f}"] if math.isfinite(deadline) else []
            try:
                with claimed(folder / f".{name}.lock", str(target)):
                    done = target.exists()  # another process may have trained it meanwhile
                    status = 0 if done else _status([*command, *left], deadline)
            except Busy as busy:
                if not told:
                    print(f"{busy} Waiting.", file=sys.stderr)
                told = True
                time.sleep(min(2.0, max(0.0, deadline - time.monotonic()) + 0.1))
                continue
            if status == STOPPED:
                return False
            if status:
                raise DodistillError(f"training teacher {name} failed, with the error above: {' '.join(command)}")
    return True


def _status(command: Sequence[str], deadline: Deadline) -> int:
    """The exit status of a command, which is told to stop when this process is."""
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            if deadline.stopped:
                process.terminate()
            time.sleep(0.1)
    finally:
        process.terminate()
        process.wait()
    return STOPPED if process.returncode == -signal.SIGTERM else process.returncode


def _run_all(todo: list[Cell], out: Path, jobs: int, deadline: Deadline, track: str = "") -> None:
    """Run at most `jobs` processes at a time. They share the cores evenly."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    running: list[tuple[Cell, subprocess.Popen[bytes]]] = []
    waiting = list(todo)
    try:
        while waiting or running:
            while waiting and len(running) < jobs and not deadline.passed:
                running.append(_start(waiting.pop(0), out, threads, deadline, track))
            for item in list(running):
                if item[1].poll() is not None:
                    running.remove(item)
                    _finish(*item, out, len(todo) - len(waiting) - len(running), len(todo))
            if deadline.stopped:  # by a signal: the children save, and exit 75
                for _, process in running:
                    process.terminate()
            if not running and deadline.passed:
                print(f"budget spent: {len(waiting)} cells left; rerun the command to resume.", file=sys.stderr)
                return
            time.sleep(0.2)
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait()


def _start(
    cell: Cell, out: Path, threads: int, deadline: float, track: str = ""
) -> tuple[Cell, subprocess.Popen[bytes]]:
    run = out / "runs" / cell.slug
    run.mkdir(parents=True, exist_ok=True)
    recipe = run.with_suffix(".yaml")
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
    with open(run.with_suffix(".log"), "ab") as log:
        return cell, subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
        )


def _finish(cell: Cell, process: subprocess.Popen[bytes], out: Path, n: int, total: int) -> None:
    run, where = out / "runs" / cell.slug, " ".join(cell.label.values())
    if process.returncode in (STOPPED, -signal.SIGTERM):
        print(
            f"[{n}/{total}] {where}: stopped at the budget, or used by another process; rerun to resume",
            file=sys.stderr,
        )
        return
    if process.returncode:
        tail = run.with_suffix(".log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        print(f"[{n}/{total}] {where}: FAILED (exit status {process.returncode}) {' '.join(tail)}", file=sys.stderr)
        return
    record = record_of(cell, read_object(run / "summary.json", "delete the run's folder, and rerun the command"))
    (out / "cells").mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1).replace(str(out / "teachers"), "{teachers}")  # no machine's path in a cell
    write_atomically(out / "cells" / f"{cell.key}.json", text.encode())
    drop_checkpoints(run)  # a finished cell is never resumed
    last = record["last"]
    score = f"{last:.2f} %" if last is not None else f"agreement {record['agreement']:.2f} %"
    print(f"[{n}/{total}] {where}: {score} in {record['seconds']:.0f} s", file=sys.stderr)


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
        "summary": {k: v for k, v in summary.items() if k != "command"},
    }


def _report(recipe: Tree, chosen: list[Cell], out: Path, against: str = "", show: Sequence[str] = ()) -> int:
    from ..report.compare_page import write_compare
    from ..report.tables import markdown_table, paired_table

    known = stored(out)
    records: list[Tree] = []
    for cell in chosen:
        record = known.find(cell) or {"key": cell.key}
        records.append({**record, "label": cell.label, "published": cell.published})
    print(markdown_table(records, show))
    if against:
        axes = "|".join(re.escape(axis) for axis in recipe["grid"])
        pairs = re.split(rf",(?=(?:{axes})=)", against)  # a label may contain commas
        base = {axis: wanted for axis, _, wanted in (pair.partition("=") for pair in pairs)}
        try:
            print(f"\n{paired_table(records, base, show)}")
        except ValueError as error:
            raise DodistillError(f"--against {against}: {error}.") from error
    page = write_compare(records, out / "compare.html", str(recipe.get("name", "comparison")))
    left = sum("seconds" not in r for r in records)
    print(f"\n{len(records) - left} of {len(records)} cells; {page}")
    return STOPPED if left else 0
