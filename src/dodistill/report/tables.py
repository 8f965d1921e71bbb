"""A grid of runs as a Markdown table: a row for each setting, mean and standard deviation over its seeds."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
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
MISSING = "class missing"  #: in place of a ratio
CHANGED = "†"  #: the mark of a row with cells of older code


@dataclass(frozen=True)
class Setting:
    """A row of the table; `values`: measure -> values of its finished runs."""

    label: dict[str, str]
    seeds: int
    unfinished: int
    values: dict[str, list[float]]
    runs: Sequence[Run] = ()  #: all of its cells

    @property
    def changed(self) -> bool:
        """Whether some of its cells were run with older code."""
        return any(run.get("changed") for run in self.runs)

    @property
    def n(self) -> str:
        """Its finished seeds, with a mark for older code."""
        n = f"{self.seeds} of {self.seeds + self.unfinished}" if self.unfinished else str(self.seeds)
        return f"{n} {CHANGED}" if self.changed else n

    def text(self, key: str) -> str:
        values = self.values.get(key, [])
        if not values:
            return "–"
        mean = statistics.fmean(values)
        if key == "seconds":
            return duration(mean)
        if key == "share_ratio":
            return MISSING if any(map(_lacks_a_class, self.runs)) else f"{number(mean, 3)}:1"
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


def footnote(found: Grouped) -> str:
    """What the columns and marks of the table mean; nothing about columns that it does not have."""
    shown = {key for key, _ in found.measures}
    says = []
    if "best" in shown:
        says.append("* chosen on the test set, as in the literature, and biased upwards.")
    if any(row.seeds > 1 for row in found.rows):
        says.append("Mean ± standard deviation over the seeds.")
    if "agreement" in shown:
        says.append("Agreement: with the teacher, on held-back substitution data.")
    if "share_ratio" in shown:
        says.append(
            "Class max:min: the ratio of the most frequent class of the substitution data to the least frequent."
        )
        if any(row.text("share_ratio") == MISSING for row in found.rows):
            says.append(f"{MISSING.capitalize()}: in a run, the teacher assigns no image to some class.")
    return " ".join([*says, *_about_conditions(found), *_about_code(found)])


def _about_conditions(found: Grouped) -> list[str]:
    """A sentence where the runs had not one precision or one machine, as `loop.precision auto` and several computers
    allow: the difference of two rows may be theirs."""
    summaries = [run.get("summary") or {} for row in found.rows for run in row.runs if _done(run)]
    says = []
    for what in ("precision", "machine"):
        # the choice without its reason, the machine without its threads
        kinds = Counter(re.split("[,:]", str(s[what]))[0] for s in summaries if s.get(what))
        if len(kinds) > 1:
            says.append(f"{what} ({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))})")
    return [f"The runs differ in {' and '.join(says)}: a difference of rows may come from that."] if says else []


def _about_code(found: Grouped) -> list[str]:
    """Sentences on cells that were run with older or unknown code."""
    runs = [run for row in found.rows for run in row.runs if _done(run)]
    old = [run["changed"] for run in runs if run.get("changed")]
    unknown = sum("changed" in run and run["changed"] is None for run in runs)
    says = []
    if old:
        names = ", ".join(sorted({name for each in old for name in each}))
        cells = "1 cell was" if len(old) == 1 else f"{len(old)} cells were"
        says.append(f"{CHANGED} {cells} run with older code of {names}; --rerun changed runs them again.")
    if unknown:
        cells = "1 cell" if unknown == 1 else f"{unknown} cells"
        says.append(f"Code unknown: {cells}, recorded before records had a hash of the code.")
    return says


def _lacks_a_class(run: Run) -> bool:
    """Whether the teacher assigns none of a finished run's images to some class. The shares have 5 digits: with 200 000
    images in the pool, 0 may be one of them."""
    summary, pool = run.get("summary") or {}, (run.get("config") or {}).get("pool") or {}
    shares, kept = summary.get("class_shares") or [1], min(summary.get("images", 0), pool.get("capacity", math.inf))
    return bool(min(shares) == 0 and kept < 200_000)


def _done(cell: Run) -> bool:
    return any(as_number(cell.get(k)) is not None for k in ("last", "agreement"))


def as_number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def logged(cell: Run, name: str) -> float | None:
    """A value that the run logged at its last step."""
    return as_number(((cell.get("summary") or {}).get("log") or {}).get(name))


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
        done = [c for c in members if _done(c)]
        values = {}
        for measure, _ in MEASURES:
            source = members if measure == "published" else done
            found = [as_number(c.get(measure)) for c in source]
            values[measure] = [v for v in found if v is not None]
        for name in show:
            values[name] = [v for c in done if (v := logged(c, name)) is not None]
        rows.append(Setting(dict(zip(names, key)), len(done), len(members) - len(done), values, members))
    shared = {k: rows[0].label[k] for k in names if len({r.label[k] for r in rows}) == 1} if len(rows) > 1 else {}
    columns = [k for k in names if k not in shared]
    measures = [(k, title) for k, title in MEASURES if any(r.values[k] for r in rows)] or [*MEASURES[:1]]
    measures += [(name, name) for name in show]
    return Grouped(shared, columns, measures, rows)


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def aligned(lines: Sequence[Sequence[str]], text_columns: int) -> list[str]:
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
    table = aligned([head, *body], len(found.columns))
    return "\n".join([*table, *notes, footnote(found).replace("*", "\\*", 1)]).rstrip()
