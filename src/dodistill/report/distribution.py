"""A histogram of percentages, for many classes at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .canvas import Plot, drawing
from .frame import COLOURS, add_legend, arranged, finish, locator, new_axes, set_ticks

BINS = 10  #: of ten percentage points each


def histogram(name: str, groups: Sequence[tuple[str, Sequence[float]]], *, x_label: str, y_label: str) -> Plot:
    """The number of percentages in each tenth of [0, 100], the groups side by side. 100 belongs to the last bin."""
    counts = [(what, _counts(values)) for what, values in groups]
    most = max((n for _, each in counts for n in each), default=0)
    if not most:
        return Plot(name, "Nothing was logged.")
    entries = [what for what, _ in counts]
    with drawing():
        rows, columns = arranged(entries)
        fig, ax = new_axes(rows)
        size = 100 / BINS
        wide = 0.86 * size / len(counts)
        handles: list[Any] = []
        for g, (_, each) in enumerate(counts):
            places = [size * (k + 0.07) + wide * (g + 0.5) for k in range(BINS)]
            drawn = ax.bar(places, each, wide * 0.94, color=COLOURS[g % 6], clip_on=False)
            for bar in drawn:
                bar.set_gid("class bar")
            handles.append(drawn[0])
        ax.set_xlim(0, 100)
        ax.set_ylim(0, most * 1.08)
        set_ticks(ax, log=False, most=10)
        ax.yaxis.set_major_locator(locator(5, whole=True))
        finish(fig, ax, x_label, y_label)
        add_legend(fig, handles, entries, columns)
    said = "; ".join(f"{what} {', '.join(map(str, each))}" for what, each in counts)
    return Plot(name, f"{y_label} by {x_label}, in bins of {size:g}: {said}", fig)


def _counts(values: Sequence[float]) -> list[int]:
    out = [0] * BINS
    for v in values:
        if math.isfinite(v):
            out[min(max(int(v * BINS / 100), 0), BINS - 1)] += 1
    return out
