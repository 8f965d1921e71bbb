"""`compare.html`: a grid of runs as tables and figures, on one offline page."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from . import arms, plots
from .figures import Figure
from .page import render, write_figures
from .paired import Paired, paired
from .table_files import csv_table, latex_tables, paired_csv
from .tables import Grouped, Run, Setting, footnote, group

SHOWN = (
    ("last", "Test accuracy, last epoch", "accuracy, %"),
    ("agreement", "Agreement with the teacher", "agreement, %"),
)
PANELS = 6  #: largest number of figures for one measure
APART = 3.0, 30.0  #: times the widest panel, and points: panels that together span more have separate axes


def write_compare(
    runs: Sequence[Run], path: str | Path, title: str = "Comparison of runs", pdf: bool = True, *, recipe: str = "",
    base: Mapping[str, str] | None = None, show: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write the page. With `pdf`, each figure is also written to `figures/` beside it (page.py).

    Args:
        runs: the records of the cells; `folder`, relative to the page, is where a run's metrics and report are.
        recipe: the text of the recipe.
        base: the arm from which the differences are taken (axis -> label); None: the first one.
        show: logged values with a column of their own.
    """
    path = Path(path)
    found = group(runs, show) if runs else Grouped({}, [], [], [])
    figures = [(what, panels(found, key, unit)) for key, what, unit in SHOWN]
    shown = [(what, made) for what, made in figures if made]
    if all(len(made) == 1 for _, made in shown):  # one panel each: side by side, under one heading
        shown = [("Each seed", [Figure(what, "", made[0].plot) for what, made in shown])] if shown else []
    courses = arms.figures(_groups(found), path.parent)
    if courses and all(len(made) == 1 for _, made in courses):
        courses = [("During training", [Figure(what, "", made[0].plot) for what, made in courses])]
    pairs = paired(runs, base, show) if runs else None
    page = render(
        "compare.html.j2",
        path,
        title=title,
        table=found,
        figures=shown,
        courses=courses,
        reports={id(row): links for row in found.rows if (links := arms.reports(row, path.parent))},
        pairs=pairs,
        files=_files(found, pairs) if found.rows else [],
        recipe=recipe,
        footnote=footnote(found),
        pdf=pdf and bool(shown),
    )
    if pdf:
        write_figures(page, (f.plot for _, made in (*courses, *shown) for f in made))
    return page


def _files(found: Grouped, pairs: Paired | None) -> list[tuple[str, str, Markup]]:
    """(text, file name, data URI) of each table, so that the page holds them itself."""
    several = [("CSV", "compare.csv", csv_table(found)), ("LaTeX", "compare.tex", latex_tables(found, pairs))]
    if pairs is not None and pairs.rows:
        several.insert(1, ("CSV of the differences", "compare-paired.csv", paired_csv(pairs)))
    return [
        (what, name, Markup("data:text/plain;base64,{}").format(base64.b64encode(text.encode()).decode()))
        for what, name, text in several
    ]


def _groups(found: Grouped) -> list[arms.Group]:
    """A panel for each label of the first column, or one for all settings."""
    split = itertools.groupby(found.rows, key=lambda r: r.label[found.columns[0]] if found.columns else "")
    groups = [(name, list(rows)) for name, rows in split]
    if len(found.columns) < 2 or len(groups) > PANELS or any(len(rows) < 2 for _, rows in groups):
        groups = [("", found.rows)] if found.rows else []
    return [(name, rows, found.columns[1:] if name else found.columns) for name, rows in groups]


def panels(found: Grouped, key: str, unit: str) -> list[Figure]:
    """The seeds of every setting: a panel for each label of the first column, or one panel for all settings.

    The panels share an axis unless their values are far apart, as for two data sets.
    """
    made = [(name, [_seeds(row, columns, key) for row in rows]) for name, rows, columns in _groups(found)]
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
