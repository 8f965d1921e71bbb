"""Differences between the arms of a grid, paired by seed.

Pairing removes the variation that runs of one seed share (initial weights, the selection, the draw).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .tables import Run, aligned, as_number, group, logged


@dataclass(frozen=True)
class Pair:
    """An arm minus the base. `differences`: measure -> (seed, difference) of each complete pair, in order of seed."""

    label: tuple[str, ...]
    differences: dict[str, list[tuple[str, float]]]

    def values(self, key: str) -> list[float]:
        """The differences of a measure."""
        return [d for _, d in self.differences.get(key, [])]

    @property
    def n(self) -> int:
        """The pairs of the first measure."""
        return len(next(iter(self.differences.values()), []))

    def change(self, key: str) -> str:
        """Mean ± standard deviation, with sign."""
        return change(self.values(key))

    def by_seed(self, key: str) -> str:
        """Each difference, with sign."""
        return ", ".join(f"{d:+.2f}" for d in self.values(key)) or "–"


@dataclass(frozen=True)
class Paired:
    """All arms minus `base` (axis -> label). `measures`: key -> title; the first one is also shown by seed."""

    base: dict[str, str]
    names: list[str]
    measures: dict[str, str]
    rows: list[Pair]

    @property
    def minus(self) -> str:
        return f"minus {', '.join(self.base.values())}"

    @property
    def first(self) -> str:
        """The key of the measure that is shown by seed."""
        return next(iter(self.measures))


def first_arm(cells: Sequence[Run]) -> dict[str, str]:
    """The first label on the last axis on which the cells differ, the seed aside; {} if there is no such axis."""
    columns = group(cells).columns if cells else []
    labels = {c: list(dict.fromkeys(str(cell["label"].get(c)) for cell in cells)) for c in columns}
    several = [c for c in columns if len(labels[c]) > 1]
    return {several[-1]: labels[several[-1]][0]} if several else {}


def require_arm(labels: Sequence[Mapping[str, object]], arm: Mapping[str, str]) -> None:
    """Raise ValueError for the first axis of `arm` on which no cell has its label. `labels`: of each cell."""
    for axis, wanted in arm.items():
        known = list(dict.fromkeys(str(label[axis]) for label in labels if axis in label))
        if wanted not in known:
            axes = ", ".join(dict.fromkeys(axis for label in labels for axis in label))
            fix = f"the values are {', '.join(known)}" if known else f"write AXIS=LABEL, with one of the axes {axes}"
            raise ValueError(f"no cell has {axis}={wanted}; {fix}")


def paired(cells: Sequence[Run], base: Mapping[str, str] | None = None, show: Sequence[str] = ()) -> Paired:
    """Every arm minus the arm `base` (axis -> label; None: `first_arm`) with the same other labels and seed.

    Compares test accuracies of the last epoch, or agreements where no cell has one; `show` adds values logged at the
    last step. Raises ValueError if no cell has the labels of `base`.
    """
    base = first_arm(cells) if base is None else dict(base)
    require_arm([cell["label"] for cell in cells], base)
    tested = any(as_number(c.get("last")) is not None for c in cells)
    main, title = ("last", "last epoch") if tested or not cells else ("agreement", "agreement")
    read = {main: lambda c: as_number(c.get(main))} | {n: (lambda c, n=n: logged(c, n)) for n in show}
    score = {k: {tuple(sorted(c["label"].items())): f(c) for c in cells} for k, f in read.items()}
    columns = group(cells).columns if cells else []
    names = [k for k in columns if k not in base] + list(base)
    rows: dict[tuple[str, ...], dict[str, list[tuple[str, float]]]] = {}
    for cell in cells if base else ():
        label = cell["label"]
        if all(str(label.get(axis)) == wanted for axis, wanted in base.items()):
            continue
        for k in read:
            mine = score[k].get(tuple(sorted(label.items())))
            its = score[k].get(tuple(sorted({**label, **base}.items())))
            if mine is not None and its is not None:
                found = rows.setdefault(tuple(str(label[a]) for a in names), {key: [] for key in read})
                found[k].append((str(label.get("seed", "")), mine - its))
    pairs = [Pair(label, {k: sorted(found[k]) for k in found}) for label, found in rows.items()]
    return Paired(base, names, {main: title} | {name: name for name in show}, pairs)


def paired_table(cells: Sequence[Run], base: Mapping[str, str] | None = None, show: Sequence[str] = ()) -> str:
    """`paired` as Markdown."""
    found = paired(cells, base, show)
    first, *others = found.measures
    head = [*found.names, f"{found.measures[first]}, {found.minus}", "by seed"]
    head += [*(f"{found.measures[k]}, {found.minus}" for k in others), "n"]
    body = [
        [*row.label, row.change(first), row.by_seed(first), *(row.change(k) for k in others), str(row.n)]
        for row in found.rows
    ]
    return "\n".join(aligned([head, *body], len(found.names))) if body else "No pair is complete yet."


def change(differences: Sequence[float]) -> str:
    """Mean ± standard deviation of differences, with sign."""
    if not differences:
        return "–"
    spread = f" ± {statistics.stdev(differences):.2f}" if len(differences) > 1 else ""
    return f"{statistics.fmean(differences):+.2f}{spread}"
