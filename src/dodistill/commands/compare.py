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
cell resumes. Each cell runs in its own process (cell.py), and has one JSON in `cells/` (cell_runs.py). A record has a
hash of the code of its methods (`config/code.py`): a cell of older code is marked, and runs again with `--rerun
changed`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..config.code import changed, code_of
from ..config.grid import Cell, Records, cells, moved_images, not_probed, read_recipe, stored, weights_of
from ..config.tree import Tree
from ..core.deadline import Deadline, stopping
from ..engine.run_folder import check_writable, write_atomically
from ..errors import STOPPED, DodistillError, nearest
from ..report.paired import require_arm
from .cell import record_of_summary as record_of_summary
from .cell_runs import Task, run_all
from .executors import Where
from .executors.shared import Executor
from .teachers import taught_otherwise, teach_elsewhere, teach_missing


@dataclass(frozen=True)
class Arguments:
    """Run a grid of methods with equal steps, seeds and teacher.

    Finished cells are not run again. Rerun the command to run or resume the others.
    """

    recipe: Annotated[str, "RECIPE.yaml"]  #: the grid; see recipes/
    out: Annotated[str, "FOLDER"] = ""  #: folder of the results; empty: runs/NAME
    jobs: int | None = None  #: number of cells that run in parallel; none: 1, or as many as --per-gpu allows
    on: Literal["local", "ray", "slurm"] = "local"  #: where the cells run: this machine, a Ray cluster, slurm jobs
    per_gpu: int = 0  #: cells that share one GPU at most; 0: as many as --jobs needs, spread evenly over the GPUs
    address: Annotated[str, "HOST:PORT"] = ""  #: of a Ray cluster; empty: that of RAY_ADDRESS, else one on this machine
    slurm: Annotated[list[str], "KEY=VALUE"] = dataclasses.field(default_factory=list)  #: a parameter of submitit, as
    #: in partition=gpu, gpus_per_node=1, timeout_min=240
    storage: Annotated[str, "URL"] = ""  #: a path or URL for checkpoints, which all machines see; empty: for ray and
    #: slurm, OUT/storage
    budget: Annotated[str, "TIME"] = ""  #: stop cleanly after this time, as in 25m, 2h or 90s
    only: Annotated[list[str], "AXIS=LABEL"] = dataclasses.field(default_factory=list)  #: run only these cells
    table: bool = False  #: print the table of the finished cells, run nothing
    against: Annotated[str, "AXIS=LABEL,..."] = ""  #: add the differences from this arm, paired by seed
    show: Annotated[list[str], "NAME"] = dataclasses.field(default_factory=list)  #: add a logged value: kdci/F_over_S
    dry_run: bool = False  #: list the cells and which are done, run nothing
    rerun: Literal["none", "changed"] = "none"  #: changed: run cells again that were run with older code of a method
    csv: Annotated[str, "FILE"] = ""  #: also write the table as CSV; the paired one as FILE-paired.csv
    latex: Annotated[str, "FILE"] = ""  #: also write the tables as LaTeX, for the package booktabs
    allow_code: bool = False  #: allow code files that the recipe names to run
    track: Annotated[str, "NAMES"] = ""  #: log each cell to tensorboard, wandb, trackio, or several, joined by commas


def run(arguments: Arguments) -> int:
    a = arguments
    out = Path(a.out) if a.out else None
    return compare(
        Path(a.recipe), out, budget=a.budget or None, only=a.only, table=a.table, dry_run=a.dry_run, against=a.against,
        show=a.show, allow_code=a.allow_code, track=a.track, rerun=a.rerun, csv=a.csv, latex=a.latex, on=a.on,
        jobs=a.jobs, per_gpu=a.per_gpu, address=a.address, storage=a.storage, slurm=a.slurm,
    )  # fmt: skip


def seconds_of(text: str | None) -> float:
    """`90s`, `25m`, `2h` or plain seconds -> seconds; None: infinity."""
    if text is None:
        return math.inf
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([smh]?)", text.strip())
    if not match:
        raise DodistillError(f"budget is {text!r}; it must be a duration, as in 90s, 25m or 2h.")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


# ------------------------------------------------------------------------------------------------ running


def compare(path: Path, out: Path | None, jobs: int | None = None, budget: str | None = None,
            only: list[str] | None = None, table: bool = False, dry_run: bool = False, against: str = "",
            show: Sequence[str] = (), allow_code: bool = False, track: str = "", rerun: str = "none", csv: str = "",
            latex: str = "", *, on: str = "local", per_gpu: int = 0, address: str = "", storage: str = "",
            slurm: Sequence[str] = ()) -> int:  # fmt: skip
    """Run the unfinished cells within the budget, and print the table. Returns 0, or 75 when cells are left.

    `against`, as in intervention=plain or replay=none,update=plain, adds the differences from that arm, paired by seed;
    `show` adds columns to both. `allow_code`: code files that the recipe names may run.
    `track`: trackers for each cell's run; no part of a cell's identity. `rerun`: none, or changed: also the cells that
    were run with older code. `csv`, `latex`: files for the tables. `on`, `jobs`, `per_gpu`, `address`, `storage`,
    `slurm`: where the cells run, see `executors`.
    """
    recipe = read_recipe(path)
    out = out or Path("runs") / str(recipe.get("name", path.stem))
    deadline = Deadline(time.monotonic() + seconds_of(budget))
    where = Where(on, jobs, per_gpu, address, storage, slurm)
    for file in (out / "compare.html", *(Path(name) for name in (csv, latex) if name)):
        check_writable(file)
    shown = Shown(against, show, csv, latex, path.read_text(encoding="utf-8", errors="replace"))
    with stopping(deadline):
        return _compare(recipe, out, where, deadline, only or [], table, dry_run, shown, allow_code, track, rerun)


@dataclass(frozen=True)
class Shown:
    """What the table and the page have; see `compare`. `text`: the recipe's."""

    against: str = ""
    show: Sequence[str] = ()
    csv: str = ""
    latex: str = ""
    text: str = ""


def _compare(recipe: Tree, out: Path, where: Where, deadline: Deadline, only: list[str], table: bool, dry_run: bool,
             shown: Shown, allow_code: bool, track: str, rerun: str) -> int:  # fmt: skip
    if track:
        from ..report.trackers import track_names

        track = ",".join(track_names(track))

    def planned() -> tuple[list[Cell], list[Task], Records]:
        chosen, known = _chosen(list(cells(recipe, out / "teachers", allow_code)), only), stored(out)
        return chosen, _tasks(chosen, known, rerun == "changed"), known

    chosen, todo, known = planned()
    base = _arm(shown.against, list(recipe["grid"]), chosen) if shown.against else None
    for said in [*moved_images(chosen, known), *not_probed(chosen, known)]:
        print(said, file=sys.stderr)
    if said := " ".join(taught_otherwise(recipe, out / "teachers")):
        said += " Restore the recipe, delete the file to teach it again, or give the new teacher a name of its own."
        if todo and not (table or dry_run):
            raise DodistillError(said)
        print(said, file=sys.stderr)
    if todo and not (table or dry_run):
        needed = _needed_teachers(recipe, todo, out / "teachers")
        with closing(where.executor(out)) as executor:
            if not _taught(recipe | {"teachers": needed}, out, where, executor, deadline, allow_code):
                print("budget spent while training the teachers; rerun the command to resume.", file=sys.stderr)
                return STOPPED
            if needed:  # a cell is known by its teacher's weights
                chosen, todo, _ = planned()
            run_all(todo, out, executor, deadline, track, where.stored(out))
    if dry_run:
        of = {task.cell.key: "changed" if task.again else "todo" for task in todo}
        for cell in chosen:
            print(f"{of.get(cell.key, 'done')}  {cell.key}  {cell.label}")
        return 0
    return _report(recipe, chosen, out, shown, base)


def _needed_teachers(recipe: Tree, todo: Sequence[Task], folder: Path) -> Tree:
    """The recipe's teachers that the cells to run need, and that are not trained yet."""
    read = {path for task in todo for path in weights_of(task.cell.config).values()}
    return {name: how for name, how in (recipe.get("teachers") or {}).items()
            if str(folder / f"{name}.safetensors") in read}  # fmt: skip


def _taught(recipe: Tree, out: Path, where: Where, executor: Executor, deadline: Deadline, allow_code: bool) -> bool:
    """Train the missing teachers where the cells run. Returns False when the budget ends first."""
    if executor.here:
        return teach_missing(recipe, out / "teachers", deadline, allow_code)
    return teach_elsewhere(recipe, out / "teachers", executor, deadline, where.stored(out), allow_code)


def _tasks(chosen: Sequence[Cell], known: Records, again: bool) -> list[Task]:
    """The cells to run: those without a record, and with `again` those that were run with older code."""
    out, seconds = [], dict[str, list[float]]()
    for cell in chosen:
        record = known.find(cell)
        old = record is not None and bool(changed(record, code_of(cell.config)))
        if record is not None and isinstance(record.get("seconds"), int | float):
            seconds.setdefault(cell.config.source.name, []).append(record["seconds"])
        if record is None or (again and old):
            out.append((cell, old))
    typical = {name: sum(took) / len(took) for name, took in seconds.items()}
    return [Task(cell, old, typical.get(cell.config.source.name)) for cell, old in out]


def _chosen(every: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that `only` names. Raises DodistillError for an axis or a label of no cell, and if none is left."""
    wanted: dict[str, set[str]] = {}
    for item in only:
        axis, _, label = item.partition("=")
        try:
            require_arm([cell.label for cell in every], {axis: label})
        except ValueError as error:
            raise DodistillError(f"--only {item}: {error}.") from error
        wanted.setdefault(axis, set()).add(label)
    chosen = [cell for cell in every if all(cell.label[axis] in labels for axis, labels in wanted.items())]
    if not chosen:
        said = " ".join(f"--only {item}" for item in only) or "`skip`"
        raise DodistillError(f"{said} leaves no cell of the grid; remove a part of it.")
    return chosen


def _report(recipe: Tree, chosen: list[Cell], out: Path, shown: Shown, base: Mapping[str, str] | None) -> int:
    from ..report.compare_page import write_compare
    from ..report.paired import paired, paired_table
    from ..report.table_files import csv_table, latex_tables, paired_csv
    from ..report.tables import group, markdown_table

    known = stored(out)
    records: list[Tree] = []
    for cell in chosen:
        record = known.find(cell) or {"key": cell.key}
        more = {"label": cell.label, "published": cell.published, "changed": changed(record, code_of(cell.config))}
        records.append({"folder": f"runs/{cell.slug}", **record, **more})
    show = _logged(shown.show, records)
    print(markdown_table(records, show))
    pairs = paired(records, base, show)
    if base is not None:
        print(f"\n{paired_table(records, base, show)}")
    page = write_compare(
        records, out / "compare.html", str(recipe.get("name", "comparison")), recipe=shown.text, base=base,
        show=show,
    )  # fmt: skip
    if shown.csv:
        write_atomically(Path(shown.csv), csv_table(group(records, show)).encode())
        if pairs.rows:
            beside = Path(shown.csv)
            write_atomically(beside.with_name(f"{beside.stem}-paired{beside.suffix}"), paired_csv(pairs).encode())
    if shown.latex:
        write_atomically(Path(shown.latex), latex_tables(group(records, show), pairs).encode())
    left = sum("seconds" not in r for r in records)
    print(f"\n{len(records) - left} of {len(records)} cells; {page}")
    return STOPPED if left else 0


def _logged(show: Sequence[str], records: Sequence[Tree]) -> list[str]:
    """The names in `show` without those that no finished cell logged, of which it prints a note."""
    from ..report.tables import logged

    known = {
        name for r in records for name in ((r.get("summary") or {}).get("log") or {}) if logged(r, name) is not None
    }
    strange = [name for name in show if known and name not in known]
    for name in strange:
        derived = ("course/", "late/")  # many; listed only where one is meant
        said = nearest(name, {k for k in known if name.startswith(derived) or not k.startswith(derived)}, "value")
        print(f"--show {name} has no column: no finished cell logged it at its last step. {said}", file=sys.stderr)
    return [name for name in show if name not in strange]


def _arm(against: str, axes: Sequence[str], chosen: Sequence[Cell]) -> dict[str, str]:
    """axis -> label, from AXIS=LABEL,AXIS=LABEL. Raises DodistillError if no chosen cell has such a label."""
    known = "|".join(re.escape(axis) for axis in axes)
    pairs = re.split(rf",(?=(?:{known})=)", against)  # a label may contain commas
    arm = {axis: wanted for axis, _, wanted in (pair.partition("=") for pair in pairs)}
    try:
        require_arm([cell.label for cell in chosen], arm)
    except ValueError as error:
        raise DodistillError(f"--against {against}: {error}.") from error
    return arm
