"""A grid of runs as a table: one row per setting, mean and standard deviation over its seeds; Markdown and HTML."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .format import duration, number, percent
from .page import render

Cell = Mapping[str, Any]

MEASURES: tuple[tuple[str, str], ...] = (
    ("last", "last epoch"),
    ("best", "best on test*"),
    ("published", "published"),
    ("agreement", "agreement"),
    ("share_ratio", "class max:min"),
    ("seconds", "time"),
)
FOOTNOTE = (
    "* chosen on the test set, as the literature reports; it flatters. Mean ± standard deviation over the seeds. "
    "Agreement: with the teacher, on held-back substitution data. "
    "Class max:min: the most frequent class of the substitution data beside the least."
)


@dataclass(frozen=True)
class Row:
    """One setting; `values` holds what its finished cells measured, per measure."""

    label: dict[str, str]
    seeds: int
    unfinished: int
    values: dict[str, list[float]]

    @property
    def n(self) -> str:
        return f"{self.seeds} of {self.seeds + self.unfinished}" if self.unfinished else str(self.seeds)

    def text(self, key: str) -> str:
        values = self.values.get(key, [])
        if not values:
            return "–"
        mean = statistics.fmean(values)
        if key == "seconds":
            return duration(mean)
        if key == "share_ratio":
            return f"{number(mean, 3)}:1" if math.isfinite(mean) else "class missing"
        if key == "published" or len(values) < 2:
            return percent(mean).removesuffix(" %")
        return f"{mean:.2f} ± {statistics.stdev(values):.2f}"


@dataclass(frozen=True)
class Grouped:
    """`shared` are the labels that all rows have in common, `columns` those that tell them apart."""

    shared: dict[str, str]
    columns: list[str]
    measures: list[tuple[str, str]]
    rows: list[Row]


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def group(cells: Sequence[Cell]) -> Grouped:
    """Group over the label "seed". A cell without "last" and "agreement" is unfinished: it is counted, not averaged."""
    names: list[str] = []
    for cell in cells:
        names += [k for k in cell["label"] if k != "seed" and k not in names]
    buckets: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        label = cell["label"]
        key = tuple("–" if label.get(k) is None else str(label[k]) for k in names)
        buckets.setdefault(key, []).append(cell)
    rows: list[Row] = []
    for key, members in buckets.items():
        done = [c for c in members if any(_number(c.get(k)) is not None for k in ("last", "agreement"))]
        values = {}
        for measure, _ in MEASURES:
            source = members if measure == "published" else done
            found = [_number(c.get(measure)) for c in source]
            values[measure] = [v for v in found if v is not None]
        rows.append(Row(dict(zip(names, key)), len(done), len(members) - len(done), values))
    shared = {k: rows[0].label[k] for k in names if len({r.label[k] for r in rows}) == 1} if len(rows) > 1 else {}
    columns = [k for k in names if k not in shared]
    always = ("last", "best", "agreement")
    measures = [(k, title) for k, title in MEASURES if k in always or any(r.values[k] for r in rows)]
    return Grouped(shared, columns, measures, rows)


def markdown_table(cells: Sequence[Cell]) -> str:
    """The grid as Markdown that also reads well in a terminal."""
    if not cells:
        return "No runs yet."
    found = group(cells)

    def plain(text: str) -> str:
        return text.replace("\n", " ").replace("|", "\\|")

    head = [*found.columns, *(title for _, title in found.measures), "n"]
    body = []
    for row in found.rows:
        body.append([*(row.label[k] for k in found.columns), *(row.text(k) for k, _ in found.measures), row.n])
    lines = [[plain(text) for text in line] for line in [head, *body]]
    wide = [max(3, *(len(line[j]) for line in lines)) for j in range(len(head))]
    text_columns = len(found.columns)

    def show(line: list[str]) -> str:
        fitted = (t.ljust(w) if j < text_columns else t.rjust(w) for j, (t, w) in enumerate(zip(line, wide)))
        return "| " + " | ".join(fitted) + " |"

    rule = "|" + "|".join("-" * (w + 2) if j < text_columns else "-" * (w + 1) + ":" for j, w in enumerate(wide)) + "|"
    shared = ", ".join(f"{plain(k)} {plain(v)}" for k, v in found.shared.items())
    notes = ["", f"In all rows: {shared}.", ""] if shared else [""]
    return "\n".join([show(lines[0]), rule, *map(show, lines[1:]), *notes, FOOTNOTE.replace("*", "\\*", 1)])


def strips(rows: Sequence[Row]) -> tuple[list[list[float]], list[float | None], tuple[float, float]]:
    """Places in [0, 100] of every seed's "last" and of the published number on one common axis, and that axis' ends."""
    values = [v for r in rows for k in ("last", "published") for v in r.values[k] if math.isfinite(v)]
    if not values:
        return [[] for _ in rows], [None for _ in rows], (0.0, 0.0)
    low, high = min(values), max(values)
    pad = (high - low) * 0.08 or 1.0
    low, high = low - pad, high + pad

    def place(v: float) -> float:
        return 100 * (v - low) / (high - low)

    dots = [[place(v) for v in r.values["last"] if math.isfinite(v)] for r in rows]
    marks = [place(r.values["published"][0]) if r.values["published"] else None for r in rows]
    return dots, marks, (low, high)


def write_compare(cells: Sequence[Cell], path: str | Path, title: str = "Comparison of runs") -> Path:
    """The grid as one self-contained HTML page."""
    found = group(cells) if cells else Grouped({}, [], [], [])
    dots, marks, ends = strips(found.rows)
    return render(
        "compare.html.j2",
        Path(path),
        title=title,
        table=found,
        strips=list(zip(dots, marks)),
        ends=ends,
        footnote=FOOTNOTE,
    )
