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
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml

from ..config import plugins
from ..config.plugins import Allow
from ..config.tree import RUNTIME, Distill, Tree, expand, grown, merge, portable, resolve
from ..engine.run_folder import drop_checkpoints, write_atomically
from ..errors import STOPPED, Busy, DodistillError, nearest
from ..files import claimed


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


def run(arguments: Arguments) -> int:
    a = arguments
    out = Path(a.out) if a.out else None
    return compare(
        Path(a.recipe), out, a.jobs, a.budget or None, a.only, a.table, a.dry_run, a.against, a.show, a.allow_code
    )


KEYS = ("name", "about", "teachers", "base", "grid", "when", "skip", "published")
SHORT = {"seed": "loop.seed", "steps": "loop.steps", "lr": "optim.lr", "student": "student.spec"}


@dataclass
class Cell:
    """One run of the grid."""

    label: dict[str, str]  #: axis -> label
    config: Distill
    key: str
    published: float | None

    @property
    def slug(self) -> str:
        words = "-".join(self.label.values())
        return re.sub(r"[^A-Za-z0-9_.+-]+", "_", f"{words}-{self.key}")


def seconds_of(text: str | None) -> float:
    """`90s`, `25m`, `2h` or plain seconds -> seconds; None: infinity."""
    if text is None:
        return math.inf
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([smh]?)", text.strip())
    if not match:
        raise DodistillError(f"budget is {text!r}; it must be a duration, as in 90s, 25m or 2h.")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def read_recipe(path: Path) -> Tree:
    """The recipe, checked for unknown keys."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise DodistillError(f"cannot read recipe {path}: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("grid"), dict):
        raise DodistillError(f"recipe {path} has no mapping `grid` of axes; add one (recipes/ has examples).")
    for key in tree:
        if key not in KEYS:
            raise DodistillError(f"recipe {path}: {nearest(str(key), KEYS, 'key')}")
    return tree


def _options(axis: str, values: Any) -> list[tuple[str, Tree]]:
    """(label, overrides) of each value on an axis: a list of plain values, or a mapping label -> overrides."""
    if isinstance(values, Mapping):
        return [(str(label), dict(over or {})) for label, over in values.items()]
    if not isinstance(values, list):
        raise DodistillError(f"grid.{axis} is {values!r}; it must be a list of values, or a mapping label -> settings.")
    return [(str(v), {SHORT.get(axis, axis): v}) for v in values]


def _file_hash(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError:
        return path  # a zoo name, or a teacher that is not trained yet


def identity(tree: Mapping[str, Any]) -> Tree:
    """The part of a config that determines a result: without `RUNTIME`, with weights and code by content and data sets
    by name."""
    out = portable(json.loads(json.dumps(tree)))
    out["loop"] = {k: v for k, v in out["loop"].items() if k not in RUNTIME}
    for part in (out["teacher"], out["student"], out["data"]["foreign"]):
        for field in ("spec", "weights"):
            if part[field].endswith((".safetensors", ".pt", ".pth")):
                part[field] = _file_hash(part[field])
    for field in ("unlabeled", "test"):  # without the folder
        out["data"][field] = Path(out["data"][field]).name
    return out


def cell_key(config: Distill) -> str:
    """12 hex digits of the identity."""
    return hashlib.sha256(json.dumps(identity(config.to_tree()), sort_keys=True).encode()).hexdigest()[:12]


def stored(out: Path) -> list[tuple[Tree, Tree]]:
    """(identity, record) of every cell in `out`, its weights looked up beside it."""
    records = [json.loads(p.read_text()) for p in sorted((out / "cells").glob("*.json"))]
    return [(identity(_fill(r["config"], out / "teachers")), r) for r in records]


def find(cell: Cell, known: list[tuple[Tree, Tree]]) -> Tree | None:
    """The record of a cell, if there is one.

    A record from before a setting existed also counts, if all its settings agree and the cell has the default of each
    newer setting: new settings do not invalidate old results.
    """
    mine = identity(cell.config.to_tree())
    default = resolve(cell.config.choices()).to_tree() if known else {}
    for its, record in known:
        if its == mine:
            return record
        if grown(its, mine, default):
            return record
    return None


def cells(recipe: Tree, teachers: Path, allow_code: Allow = False) -> Iterator[Cell]:
    """The grid's cells, in the order in which they run. `allow_code`: see `resolve`."""
    axes = {axis: _options(axis, values) for axis, values in recipe["grid"].items()}
    base = _fill(recipe.get("base") or {}, teachers)
    for combination in itertools.product(*axes.values()):
        label = {axis: name for axis, (name, _) in zip(axes, combination)}
        if any(_matches(where, label) for where in recipe.get("skip") or []):
            continue
        tree = expand(base)
        for _, over in combination:
            tree = merge(tree, expand(_fill(over, teachers)))
        for rule in recipe.get("when") or []:
            if _matches(rule["where"], label):
                tree = merge(tree, expand(_fill(rule["then"], teachers)))
        try:
            config = resolve(tree, allow_code=allow_code)
        except DodistillError as error:
            raise DodistillError(f"cell {label}: {error}") from error
        published = next(
            (float(p["value"]) for p in recipe.get("published") or [] if _matches(p["where"], label)), None
        )
        yield Cell(label, config, cell_key(config), published)


def _matches(where: Mapping[str, Any], label: Mapping[str, str]) -> bool:
    return all(label.get(axis) == str(value) for axis, value in where.items())


def _fill(tree: Any, teachers: Path) -> Any:
    if isinstance(tree, Mapping):
        return {k: _fill(v, teachers) for k, v in tree.items()}
    return tree.replace("{teachers}", str(teachers)) if isinstance(tree, str) else tree


# ------------------------------------------------------------------------------------------------ running


def compare(path: Path, out: Path | None, jobs: int = 1, budget: str | None = None, only: list[str] | None = None,
            table: bool = False, dry_run: bool = False, against: str = "",
            show: Sequence[str] = (), allow_code: bool = False) -> int:  # fmt: skip
    """Run the unfinished cells within the budget, and print the table. Returns 0, or 75 when cells are left.

    `against`, as in intervention=plain or replay=none,update=plain, adds the differences from that arm, paired by seed;
    `show` adds columns to both. `allow_code`: code files that the recipe names may run.
    """
    recipe = read_recipe(path)
    out = out or Path("runs") / str(recipe.get("name", path.stem))
    deadline = time.monotonic() + seconds_of(budget)
    if jobs < 1:
        raise DodistillError(f"jobs is {jobs}; it must be at least 1.")
    if not (table or dry_run) and not teach_missing(recipe, out / "teachers", deadline, allow_code):
        print("budget spent while training the teachers; rerun the command to resume.", file=sys.stderr)
        return STOPPED
    chosen = [c for c in cells(recipe, out / "teachers", allow_code) if _chosen(c, only or [])]
    known = stored(out)
    todo = [c for c in chosen if find(c, known) is None]
    if dry_run:
        for cell in chosen:
            print(f"{'todo' if cell in todo else 'done'}  {cell.key}  {cell.label}")
        return 0
    if not table:
        _run_all(todo, out, jobs, deadline)
    return _report(recipe, chosen, out, against, show)


def _chosen(cell: Cell, only: list[str]) -> bool:
    wanted: dict[str, set[str]] = {}
    for item in only:
        axis, given, value = item.partition("=")
        if not given or axis not in cell.label:
            raise DodistillError(f"--only {item}: write AXIS=LABEL, with one of the axes {', '.join(cell.label)}.")
        wanted.setdefault(axis, set()).add(value)
    return all(cell.label[axis] in values for axis, values in wanted.items())


def teach_missing(recipe: Tree, folder: Path, deadline: float, allow_code: bool = False) -> bool:
    """Train the recipe's missing teachers, one after another. Returns False when the budget ends first."""
    for name, settings in (recipe.get("teachers") or {}).items():
        target = folder / f"{name}.safetensors"
        settings = dict(settings)
        if file := plugins.model_file(str(settings["model"])):
            plugins.refuse(file, f"dodistill teach {settings['model']}", allow_code)
        command = [sys.executable, "-m", "dodistill", "teach", str(settings.pop("model")), "--out", str(target)]
        for key, value in settings.items():
            command += [f"--{key}", str(value)]
        told = False
        while not target.exists():
            if time.monotonic() > deadline:
                return False
            folder.mkdir(parents=True, exist_ok=True)
            left = ["--max-seconds", f"{max(1.0, deadline - time.monotonic()):.1f}"] if math.isfinite(deadline) else []
            try:
                with claimed(folder / f".{name}.lock", str(target)):
                    done = target.exists()  # another process may have trained it meanwhile
                    status = 0 if done else subprocess.run([*command, *left], check=False).returncode
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


def _run_all(todo: list[Cell], out: Path, jobs: int, deadline: float) -> None:
    """Run at most `jobs` processes at a time. They share the cores evenly."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    running: list[tuple[Cell, subprocess.Popen[bytes]]] = []
    waiting = list(todo)
    try:
        while waiting or running:
            while waiting and len(running) < jobs and time.monotonic() < deadline:
                running.append(_start(waiting.pop(0), out, threads, deadline))
            for item in list(running):
                if item[1].poll() is not None:
                    running.remove(item)
                    _finish(*item, out, len(todo) - len(waiting) - len(running), len(todo))
            if not running and time.monotonic() >= deadline:
                print(f"budget spent: {len(waiting)} cells left; rerun the command to resume.", file=sys.stderr)
                return
            time.sleep(0.2)
    finally:
        for _, process in running:
            process.terminate()


def _start(cell: Cell, out: Path, threads: int, deadline: float) -> tuple[Cell, subprocess.Popen[bytes]]:
    run = out / "runs" / cell.slug
    run.mkdir(parents=True, exist_ok=True)
    recipe = run.with_suffix(".yaml")
    tree = cell.config.to_tree()
    recipe.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "dodistill", "distill", str(recipe), "--out", str(run), "--quiet", "--no-report",
               "--loop.threads", str(cell.config.loop.threads or threads)]  # fmt: skip
    if plugins.paths(tree):  # this process has run the same code to read the config, and `code` has its hash
        command.append("--allow-code")
    if math.isfinite(deadline):
        command += ["--max-seconds", f"{max(1.0, deadline - time.monotonic()):.1f}"]
    with open(run.with_suffix(".log"), "ab") as log:
        return cell, subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
        )


def _finish(cell: Cell, process: subprocess.Popen[bytes], out: Path, n: int, total: int) -> None:
    run, where = out / "runs" / cell.slug, " ".join(cell.label.values())
    if process.returncode == STOPPED:
        print(
            f"[{n}/{total}] {where}: stopped at the budget, or used by another process; rerun to resume",
            file=sys.stderr,
        )
        return
    if process.returncode:
        tail = run.with_suffix(".log").read_text().strip().splitlines()[-1:]
        print(f"[{n}/{total}] {where}: FAILED (exit status {process.returncode}) {' '.join(tail)}", file=sys.stderr)
        return
    record = record_of(cell, json.loads((run / "summary.json").read_text()))
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
    return record | {"key": cell.key, "published": cell.published, "config": cell.config.to_tree()}


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
        record = find(cell, known) or {"key": cell.key}
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
