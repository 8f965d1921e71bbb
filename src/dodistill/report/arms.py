"""The course of each arm of a grid: mean and spread over its seeds, from the metrics that its runs wrote."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.monitor import read_metrics
from . import plots
from .figures import Figure
from .tables import Run, Setting, as_number

#: key of an eval line -> (title, label of the axis)
CURVES = {"test": ("Test accuracy", "accuracy, %"), "agreement": ("Agreement with the teacher", "agreement, %")}
MOST = 6  #: lines in one figure

Group = tuple[str, Sequence[Setting], Sequence[str]]  #: (label of the panel, its rows, the columns that name them)


def evaluations(row: Setting, folder: Path) -> list[list[Mapping[str, Any]]]:
    """The eval lines of each finished run of a setting; runs whose folder is gone are left out."""
    found: list[list[Mapping[str, Any]]] = []
    for run in row.runs:
        if as_number(run.get("seconds")) is not None and isinstance(run.get("folder"), str):
            found.append([*read_metrics(folder / run["folder"] / "metrics.jsonl")["eval"]])
    return [lines for lines in found if lines]


def series(name: str, runs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> plots.Series | None:
    """Mean and standard deviation over the runs at the steps that all of them evaluated; None without any."""
    each = [{int(r["step"]): float(r[key]) for r in lines if as_number(r.get(key)) is not None} for lines in runs]
    each = [values for values in each if values]
    steps = sorted(set.intersection(*map(set, each))) if each else []
    if not steps:
        return None
    at = [[values[step] for values in each] for step in steps]
    spread = [statistics.stdev(values) for values in at] if len(each) > 1 else []
    return plots.Series(name, steps, [statistics.fmean(values) for values in at], spread)


def teacher(rows: Sequence[Setting]) -> tuple[str, float] | None:
    """The teacher's accuracy, if all runs of these rows have one teacher."""
    known = [v for row in rows for run in row.runs if (v := as_number(run.get("teacher"))) is not None]
    return ("teacher", known[0]) if known and max(known) - min(known) < 0.005 else None


def figures(groups: Sequence[Group], folder: Path) -> list[tuple[str, list[Figure]]]:
    """(title, figures) of each curve; a figure for each group, or several of at most `MOST` lines."""
    read = {id(row): evaluations(row, folder) for _, rows, _ in groups for row in rows}
    found = []
    for key, (title, axis) in CURVES.items():
        made = []
        for label, rows, columns in groups:
            drawn = [(row, s) for row in rows if (s := series(_name(row, columns), read[id(row)], key)) is not None]
            for start in range(0, len(drawn), MOST):
                part = drawn[start : start + MOST]
                level = teacher([row for row, _ in part]) if key == "test" else None
                several = f" ({start + 1} to {start + len(part)} of {len(drawn)})" if len(drawn) > MOST else ""
                name = "-".join(filter(None, (f"curve-{key}", label, str(start) if start else "")))
                plot = plots.lines(name, [s for _, s in part], y_label=axis, unit=" %", reference=level)
                made.append(Figure(f"{label}{several}", "", plot))
        if made:
            found.append((title, made))
    return found


def _name(row: Setting, columns: Sequence[str]) -> str:
    return " · ".join(row.label[k] for k in columns) or "all runs"


def reports(row: Setting, folder: Path) -> list[tuple[str, str]]:
    """(seed, relative path) of each run of a setting that has a report."""
    found = []
    for run in row.runs:
        if isinstance(run.get("folder"), str) and (folder / run["folder"] / "report.html").is_file():
            found.append((str(_seed(run)), f"{run['folder']}/report.html"))
    return found


def _seed(run: Run) -> object:
    return run["label"].get("seed", "report")
