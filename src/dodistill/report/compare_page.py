"""`compare.html`: a grid of runs as figures and as a table, on one offline page."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from . import plots
from .figures import Figure
from .page import render, write_figures
from .tables import FOOTNOTE, Grouped, Run, Setting, group

SHOWN = (
    ("last", "Test accuracy, last epoch", "accuracy, %"),
    ("agreement", "Agreement with the teacher", "agreement, %"),
)
PANELS = 6  #: largest number of figures for one measure
APART = 3.0, 30.0  #: times the widest panel, and points: panels that together span more have separate axes


def write_compare(runs: Sequence[Run], path: str | Path, title: str = "Comparison of runs", pdf: bool = True) -> Path:
    """Write the page. With `pdf`, each figure is also written to `figures/` beside it (page.py)."""
    found = group(runs) if runs else Grouped({}, [], [], [])
    figures = [(what, panels(found, key, unit)) for key, what, unit in SHOWN]
    shown = [(what, made) for what, made in figures if made]
    if all(len(made) == 1 for _, made in shown):  # one panel each: side by side, under one heading
        shown = [("Each seed", [Figure(what, "", made[0].plot) for what, made in shown])] if shown else []
    page = render(
        "compare.html.j2",
        Path(path),
        title=title,
        table=found,
        figures=shown,
        footnote=FOOTNOTE,
        pdf=pdf and bool(shown),
    )
    if pdf:
        write_figures(page, (f.plot for _, made in shown for f in made))
    return page


def panels(found: Grouped, key: str, unit: str) -> list[Figure]:
    """The seeds of every setting: a panel for each label of the first column, or one panel for all settings.

    The panels share an axis unless their values are far apart, as for two data sets.
    """
    split = itertools.groupby(found.rows, key=lambda r: r.label[found.columns[0]] if found.columns else "")
    groups = [(name, list(rows)) for name, rows in split]
    if len(found.columns) < 2 or len(groups) > PANELS or any(len(rows) < 2 for _, rows in groups):
        groups = [("", found.rows)] if found.rows else []
    made: list[tuple[str, list[plots.Seeds]]] = []
    for name, rows in groups:
        columns = found.columns[1:] if name else found.columns
        made.append((name, [_seeds(row, columns, key) for row in rows]))
    made = [(name, rows) for name, rows in made if any(r.values for r in rows)]
    if not made:
        return []
    whole = plots.spread([r for _, rows in made for r in rows])
    widest = max(high - low for low, high in (plots.spread(rows) for _, rows in made))
    span = whole[1] - whole[0]
    ends = None if span > APART[0] * widest and span > APART[1] else whole
    return [
        Figure(name, "", plots.dots(f"{key}-{name}" if name else key, rows, x_label=unit, ends=ends))
        for name, rows in made
    ]


def _seeds(row: Setting, columns: Sequence[str], key: str) -> plots.Seeds:
    published = row.values["published"][0] if key == "last" and row.values["published"] else None
    return plots.Seeds(" · ".join(row.label[k] for k in columns) or "all runs", row.values[key], published)
