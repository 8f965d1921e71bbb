"""A grid of runs as a Markdown table: a row for each setting, mean and standard deviation over its seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .format import duration, number, percent

Run = Mapping[str, Any]  #: the labels and measures of one run of the grid

MEASURES: tuple[tuple[str, str], ...] = (
    ("last", "last epoch"),
    ("best", "best on test*"),
    ("published", "published"),
    ("agreement", "agreement"),
    ("share_ratio", "class max:min"),
    ("seconds", "time"),
)
FOOTNOTE = (
    "* chosen on the test set, as in the literature, and biased upwards. Mean ± standard deviation over the seeds. "
    "Agreement: with the teacher, on held-back substitution data. "
    "Class max:min: the ratio of the most frequent class of the substitution data to the least frequent."
)


@dataclass(frozen=True)
class Setting:
    """A row of the table; `values`: measure -> values of its finished runs."""

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
        if "/" in key:
            spread = f" ± {number(statistics.stdev(values), 2)}" if len(values) > 1 else ""
            return number(mean, 3) + spread
        if key == "published" or len(values) < 2:
            return percent(mean).removesuffix(" %")
        return f"{mean:.2f} ± {statistics.stdev(values):.2f}"


@dataclass(frozen=True)
class Grouped:
    """`shared` are the labels that all rows have in common; `columns` are those that differ."""

    shared: dict[str, str]
    columns: list[str]
    measures: list[tuple[str, str]]
    rows: list[Setting]


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def _logged(cell: Run, name: str) -> float | None:
    """A value that the run logged at its last step."""
    return _number(((cell.get("summary") or {}).get("log") or {}).get(name))


def group(cells: Sequence[Run], show: Sequence[str] = ()) -> Grouped:
    """Group over the label "seed". A cell without "last" and "agreement" is unfinished: it is counted, not averaged.

    `show` adds columns of values logged at the last step, as in `kdci/F_over_S`.
    """
    names: list[str] = []
    for cell in cells:
        names += [k for k in cell["label"] if k != "seed" and k not in names]
    buckets: dict[tuple[str, ...], list[Run]] = {}
    for cell in cells:
        label = cell["label"]
        key = tuple("–" if label.get(k) is None else str(label[k]) for k in names)
        buckets.setdefault(key, []).append(cell)
    rows: list[Setting] = []
    for key, members in buckets.items():
        done = [c for c in members if any(_number(c.get(k)) is not None for k in ("last", "agreement"))]
        values = {}
        for measure, _ in MEASURES:
            source = members if measure == "published" else done
            found = [_number(c.get(measure)) for c in source]
            values[measure] = [v for v in found if v is not None]
        for name in show:
            values[name] = [v for c in done if (v := _logged(c, name)) is not None]
        rows.append(Setting(dict(zip(names, key)), len(done), len(members) - len(done), values))
    shared = {k: rows[0].label[k] for k in names if len({r.label[k] for r in rows}) == 1} if len(rows) > 1 else {}
    columns = [k for k in names if k not in shared]
    always = ("last", "best", "agreement")
    measures = [(k, title) for k, title in MEASURES if k in always or any(r.values[k] for r in rows)]
    measures += [(name, name) for name in show]
    return Grouped(shared, columns, measures, rows)


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def _aligned(lines: Sequence[Sequence[str]], text_columns: int) -> list[str]:
    """A Markdown table, head first, also readable in a terminal: text to the left, numbers to the right."""
    lines = [[_plain(text) for text in line] for line in lines]
    wide = [max(3, *(len(line[j]) for line in lines)) for j in range(len(lines[0]))]

    def show(line: Sequence[str]) -> str:
        fitted = (t.ljust(w) if j < text_columns else t.rjust(w) for j, (t, w) in enumerate(zip(line, wide)))
        return "| " + " | ".join(fitted) + " |"

    rule = "|" + "|".join("-" * (w + 2) if j < text_columns else "-" * (w + 1) + ":" for j, w in enumerate(wide)) + "|"
    return [show(lines[0]), rule, *map(show, lines[1:])]


def markdown_table(cells: Sequence[Run], show: Sequence[str] = ()) -> str:
    """The grid as Markdown: a row per setting."""
    if not cells:
        return "No runs yet."
    found = group(cells, show)
    head = [*found.columns, *(title for _, title in found.measures), "n"]
    body = []
    for row in found.rows:
        body.append([*(row.label[k] for k in found.columns), *(row.text(k) for k, _ in found.measures), row.n])
    shared = ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in found.shared.items())
    notes = ["", f"In all rows: {shared}.", ""] if shared else [""]
    table = _aligned([head, *body], len(found.columns))
    return "\n".join([*table, *notes, FOOTNOTE.replace("*", "\\*", 1)])


def paired_table(cells: Sequence[Run], base: Mapping[str, str], show: Sequence[str] = ()) -> str:
    """ "last epoch" of every arm minus that of the arm `base` (axis -> label) with the same other labels and seed.

    `show` adds the same for values logged at the last step. Pairing removes the variation that runs of one seed share
    (initial weights, the selection, the draw). Raises ValueError if no cell has those labels.
    """
    for axis, wanted in base.items():
        if not any(str(cell["label"].get(axis)) == wanted for cell in cells):
            known = sorted({str(cell["label"].get(axis)) for cell in cells})
            raise ValueError(f"no cell has {axis}={wanted}; the values are {', '.join(known)}")
    read = {"last": lambda c: _number(c.get("last"))} | {n: (lambda c, n=n: _logged(c, n)) for n in show}
    score = {k: {tuple(sorted(c["label"].items())): f(c) for c in cells} for k, f in read.items()}
    names = [k for k in group(cells).columns if k not in base] + list(base)
    rows: dict[tuple[str, ...], dict[str, list[tuple[str, float]]]] = {}
    for cell in cells:
        label = cell["label"]
        if all(str(label.get(axis)) == wanted for axis, wanted in base.items()):
            continue
        for k in read:
            mine = score[k].get(tuple(sorted(label.items())))
            its = score[k].get(tuple(sorted({**label, **base}.items())))
            if mine is not None and its is not None:
                found = rows.setdefault(tuple(str(label[a]) for a in names), {})
                found.setdefault(k, []).append((str(label.get("seed", "")), mine - its))
    body = []
    for key, found in rows.items():
        last = found.get("last", [])
        by_seed = ", ".join(f"{d:+.2f}" for _, d in sorted(last)) or "–"
        changes = [_change([d for _, d in found.get(k, [])]) for k in read]
        body.append([*key, changes[0], by_seed, *changes[1:], str(len(last))])
    minus = f"minus {', '.join(base.values())}"
    head = [*names, f"last epoch, {minus}", "by seed", *(f"{n}, {minus}" for n in show), "n"]
    return "\n".join(_aligned([head, *body], len(names))) if body else "No pair is complete yet."


def _change(differences: Sequence[float]) -> str:
    if not differences:
        return "–"
    spread = f" ± {statistics.stdev(differences):.2f}" if len(differences) > 1 else ""
    return f"{statistics.fmean(differences):+.2f}{spread}"
