"""The accuracy of each class: the worst ones, the distribution, and whether rare classes explain it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.classes import titles
from ..errors import DodistillError
from ..models.weights import read_metadata
from . import plots
from .canvas import Plot
from .distribution import histogram
from .shares import shares

WORST = 10  #: rows of the table
BARS = 40  #: most classes that are drawn as bars; more are drawn as a distribution
FEWEST = 5  #: classes from which on a correlation says something
STRONG, WEAK = 0.5, 0.3  #: rank correlations


@dataclass(frozen=True)
class ClassRow:
    """One class; accuracies in %, `share` of the student's inputs in [0, 1]."""

    index: int
    name: str
    student: float
    teacher: float | None
    share: float | None
    images: int | None


@dataclass(frozen=True)
class PerClass:
    """What the page shows. `worst`: the classes with the lowest accuracy, the lowest first."""

    worst: list[ClassRow]
    known: int
    plot: Plot
    sentence: str
    named: bool
    teacher: bool


def class_names(summary: Mapping[str, Any], student: Path, classes: int) -> list[str]:
    """The names of the classes, for a page: of the summary, else of the metadata of the student's file; else []."""
    found = summary.get("classes")
    if not _names(found, classes) and student.suffix == ".safetensors" and student.is_file():
        try:
            found = read_metadata(student).get("classes")
        except DodistillError:
            found = None
    return list(titles(found)) if _names(found, classes) else []  # type: ignore[arg-type]


def _names(found: object, classes: int) -> bool:
    return isinstance(found, list) and len(found) == classes and all(isinstance(name, str) for name in found)


def per_class(summary: Mapping[str, Any], student: Path) -> PerClass | None:
    """The accuracy of each class, from a summary; None without a test set, and for a damaged summary."""
    mine = _percentages(summary.get("class_accuracy"))
    known = [k for k, v in enumerate(mine) if v is not None]
    if not known:
        return None
    theirs = _percentages(summary.get("teacher_class_accuracy"))
    theirs = theirs if len(theirs) == len(mine) else []
    seen = shares(summary.get("drawn_shares")) or shares(summary.get("class_shares"))
    share = seen.values if seen is not None and len(seen.values) == len(mine) else []
    images = summary.get("class_images")
    images = images if isinstance(images, list) and len(images) == len(mine) else []
    names = class_names(summary, student, len(mine))

    def row(k: int) -> ClassRow:
        score = mine[k]
        assert score is not None
        return ClassRow(
            k, names[k] if names else "", score, theirs[k] if theirs else None, share[k] if share else None,
            images[k] if images else None,
        )  # fmt: skip

    rows = sorted((row(k) for k in known), key=lambda r: (r.student, r.index))
    groups = [("student", mine), *([("teacher", theirs)] if theirs else [])]
    if len(mine) <= BARS:
        bars = [(what, [math.nan if v is None else v / 100 for v in values]) for what, values in groups]
        plot = plots.bars("class-accuracy", bars, x_label="class", y_label="accuracy, %", names=names)
    else:
        several = [(what, [v for v in values if v is not None]) for what, values in groups]
        plot = histogram("class-accuracy", several, x_label="accuracy of a class, %", y_label="classes")
    return PerClass(rows[:WORST], len(known), plot, _explained(rows), bool(names), bool(theirs))


def _percentages(values: object) -> list[float | None]:
    if not isinstance(values, list):
        return []
    good = (isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    return [float(v) if fine else None for v, fine in zip(values, good)]


def _explained(rows: Sequence[ClassRow]) -> str:
    """Whether rare classes explain the accuracies, in one sentence; empty where nothing can be said."""
    pairs = [(r.share, r.student - (r.teacher or 0.0)) for r in rows if r.share is not None]
    if len(pairs) < FEWEST:
        return ""
    share, score = [a for a, _ in pairs], [b for _, b in pairs]
    if max(share) <= 1.01 * min(share):
        return "Every class has the same share of the student's inputs, so rare classes do not explain the differences."
    found = rank_correlation(share, score)
    if found is None:
        return ""
    less = " minus the teacher's" if any(r.teacher is not None for r in rows) else ""
    said = (
        f"The rank correlation between a class's share of the student's inputs and its accuracy{less} is "
        f"{found:+.2f} over {len(pairs)} classes: "
    )
    if found >= STRONG:
        return said + "the student is worse on the classes that it saw less often."
    if found >= WEAK:
        return said + "rare classes explain a part of the differences."
    return said + "rare classes do not explain the differences."


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation, in [-1, 1]; None where one of the two is constant."""
    x, y = _ranks(a), _ranks(b)
    middle = (len(x) + 1) / 2
    across = math.fsum((p - middle) * (q - middle) for p, q in zip(x, y))
    size = math.fsum((p - middle) ** 2 for p in x) * math.fsum((q - middle) ** 2 for q in y)
    return across / math.sqrt(size) if size > 0 else None


def _ranks(values: Sequence[float]) -> list[float]:
    """1 for the lowest value; equal values have the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda k: values[k])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for k in order[start : end + 1]:
            ranks[k] = (start + end) / 2 + 1
        start = end + 1
    return ranks
