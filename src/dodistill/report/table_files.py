"""The tables of a grid for other programs: CSV with plain numbers, LaTeX for the package booktabs."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence

from .paired import Paired
from .tables import CHANGED, Grouped, footnote

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "−": "$-$", "<": "$<$",
    ">": "$>$", "∞": r"$\infty$", CHANGED: r"\dag{}", "|": r"$|$",
}  # fmt: skip


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _mean_sd(values: Sequence[float]) -> list[float | str]:
    """[mean, standard deviation], empty texts in place of what is not known."""
    return [statistics.fmean(values) if values else "", statistics.stdev(values) if len(values) > 1 else ""]


def csv_table(found: Grouped) -> str:
    """A row per setting: its labels, shared ones included, then mean and standard deviation of each measure, in the
    unit of the page (seconds for the time), then the number of seeds, and whether all were run with today's code."""
    names = [*found.shared, *found.columns]
    head = [*names]
    for _, title in found.measures:
        head += [title.rstrip("*"), f"{title.rstrip('*')} sd"]
    rows: list[list[object]] = [[*head, "n", "older code"]]
    for row in found.rows:
        line: list[object] = [row.label[name] for name in names]
        for key, _ in found.measures:
            line += _mean_sd(row.values.get(key, []))
        rows.append([*line, row.seeds, "yes" if row.changed else "no"])
    return _csv(rows)


def paired_csv(pairs: Paired) -> str:
    """A row per arm: its labels, then mean and standard deviation of each difference, the pairs, and each of them."""
    seeds = list(dict.fromkeys(seed for row in pairs.rows for seed, _ in row.differences.get(pairs.first, [])))
    head = [*pairs.names]
    for title in pairs.measures.values():
        head += [f"{title}, {pairs.minus}", f"{title}, {pairs.minus}, sd"]
    rows: list[list[object]] = [[*head, "n", *(f"seed {seed}" for seed in seeds)]]
    for row in pairs.rows:
        line: list[object] = [*row.label]
        for key in pairs.measures:
            line += _mean_sd(row.values(key))
        each = dict(row.differences.get(pairs.first, []))
        rows.append([*line, row.n, *(each.get(seed, "") for seed in seeds)])
    return _csv(rows)


def latex(text: str) -> str:
    """Text in LaTeX."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _line(cells: Sequence[str]) -> str:
    r"""One line; `{}` in front of a [ or *, which the \\ or \midrule before it would take as its own argument."""
    text = " & ".join(map(latex, cells)) + r" \\"
    return "{}" + text if text[0] in "[*" else text


def _tabular(head: Sequence[str], body: Sequence[Sequence[str]], text_columns: int) -> str:
    columns = "l" * text_columns + "r" * (len(head) - text_columns)
    lines = [r"\begin{tabular}{" + columns + "}", r"\toprule", _line(head), r"\midrule"]
    for i, row in enumerate(body):
        if i and text_columns > 1 and row[0] != body[i - 1][0]:
            lines.append(r"\midrule")
        lines.append(_line(row))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def latex_tables(found: Grouped, pairs: Paired | None = None) -> str:
    r"""The table, and the differences if there are some, as `tabular`s; they need \usepackage{booktabs}."""
    head = [*found.columns, *(title for _, title in found.measures), "n"]
    body = [[*(r.label[c] for c in found.columns), *(r.text(k) for k, _ in found.measures), r.n] for r in found.rows]
    notes = [f"in all rows: {', '.join(f'{k} {v}' for k, v in found.shared.items())}"] if found.shared else []
    comments = [f"% {line}" for line in [r"\usepackage{booktabs}", *notes, footnote(found)] if line]
    parts = ["\n".join(c.replace("\n", " ") for c in comments), _tabular(head, body, len(found.columns))]
    if pairs is not None and pairs.rows:
        first, *others = pairs.measures
        head = [*pairs.names, f"{pairs.measures[first]}, {pairs.minus}", *(pairs.measures[k] for k in others), "n"]
        body = [[*r.label, r.change(first), *(r.change(k) for k in others), str(r.n)] for r in pairs.rows]
        parts += [
            f"% each arm {pairs.minus}, paired by seed".replace("\n", " "),
            _tabular(head, body, len(pairs.names)),
        ]
    return "\n".join(parts) + "\n"
