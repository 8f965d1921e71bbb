"""Common parts of the plots: axes with room for their labels, round ticks, a legend above, thinned lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .canvas import FONT, LIGHT, WIDTH, new_figure, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEFT, RIGHT, BOTTOM = 54.0, 14.0, 36.0  # margins around the axes
HEIGHT = 152.0  # of the axes
CHARACTER = 0.59 * FONT  # about the width of a letter
MOST_POINTS = 320
COLOURS = [LIGHT[f"c{i}"] for i in range(6)]
DASHES: list[Any] = ["-", (0, (3.6, 2.0)), (0, (1.0, 1.7)), (0, (5, 1.6, 1.2, 1.6)), (0, (1.8, 1.2)), (0, (7, 2))]
ROUND = [1, 2, 5, 10]  # steps between ticks, times a power of ten


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most about `most` points: the lowest and the highest of each interval, so that every spike stays visible."""
    if len(x) <= most:
        return list(x), list(y)
    xs: list[float] = []
    ys: list[float] = []
    size = -(-len(x) // (most // 2))
    for start in range(0, len(x), size):
        part = range(start, min(start + size, len(x)))
        finite = [i for i in part if math.isfinite(y[i])]
        keep = sorted({min(finite, key=lambda i: y[i]), max(finite, key=lambda i: y[i])}) if finite else [start]
        xs += [x[i] for i in keep]
        ys += [y[i] for i in keep]
    return xs, ys


def tick(value: float) -> str:
    """The number at a tick: 0.05, 20, 12k, 3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def locator(most: int, whole: bool = False) -> Any:
    """Ticks at round numbers, with at most `most` intervals between them."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, steps=ROUND, integer=whole)


def set_ticks(ax: Axes, log: bool, most: int = 6) -> None:
    """Round numbers inside the axes. A logarithmic axis has powers of ten; with 2 and 5 where fewer than two fit."""
    from matplotlib.ticker import FixedLocator, NullLocator

    ax.xaxis.set_major_locator(locator(most, whole=True))
    low, high = ax.get_ylim()
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        tens = [10.0**p for p in powers if low <= 10.0**p <= high]
        fine = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
        plain = [v for v in locator(4).tick_values(low, high) if low <= v <= high]
        ticks = tens[:: max(1, -(-len(tens) // 6))] if len(tens) >= 2 else fine if len(fine) >= 2 else plain
        ax.yaxis.set_major_locator(FixedLocator(ticks))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.yaxis.set_major_locator(locator(6))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda v, _: tick(v))


def new_axes(legend_rows: int, height: float = HEIGHT, left: float = LEFT, below: float = 0.0) -> tuple[Figure, Axes]:
    """A figure with axes of `height`, room for `legend_rows` above and for labels to the left and below; `below` is the
    height of labels on the x axis that are taller than a line."""
    top = 17.0 * legend_rows + 8
    bottom = BOTTOM + max(0.0, below - FONT)
    whole = top + height + bottom
    fig = new_figure(whole)
    ax = fig.add_axes((left / WIDTH, bottom / whole, (WIDTH - left - RIGHT) / WIDTH, height / whole))
    ax.grid(axis="x", visible=False)
    return fig, ax


def draw_line(ax: Axes, x: Sequence[float], y: Sequence[float], i: int) -> Any:
    """Series i, and its entry in a legend. Points between two gaps have a dot, as have series of at most 12 points."""
    from matplotlib.lines import Line2D

    known = [False, *map(math.isfinite, y), False]
    alone = [j for j in range(len(y)) if known[j + 1] and not known[j] and not known[j + 2]]
    marked = alone if len(y) > 12 else [j for j in range(len(y)) if known[j + 1]]
    size = 4.0 if sum(known) > 1 else max(8.0 - 2 * i, 4.0)  # a lone dot does not hide the dot of an earlier series
    ax.plot(
        x, y, color=COLOURS[i % 6], ls=DASHES[i % 6], marker="o", ms=size, mew=0, markevery=marked, clip_on=False,
        gid="class series",
    )  # fmt: skip
    return Line2D([], [], color=COLOURS[i % 6], ls=DASHES[i % 6])


def draw_band(ax: Axes, x: Sequence[float], band: Sequence[tuple[float, float]], i: int) -> None:
    """The spread of series i, below its line; nothing for fewer than two places."""
    known = [(a, low, high) for a, (low, high) in zip(x, band) if math.isfinite(low) and math.isfinite(high)]
    if len(known) > 1:
        places, lows, highs = zip(*known)
        ax.fill_between(places, lows, highs, color=COLOURS[i % 6], alpha=0.18, lw=0, clip_on=False, gid="class band")


def draw_reference(ax: Axes, y: float) -> Any:
    return ax.axhline(y, color=LIGHT["quiet"], lw=1.2, ls=(0, (1.5, 2.2)), clip_on=False, gid="class reference")


def finish(fig: Figure, ax: Axes, x_label: str, y_label: str) -> None:
    """Labels of the axes, at the same place in every figure."""
    box = ax.get_position()
    high = fig.get_figheight() * 72
    fig.text(box.x1, 4 / high, x_label, ha="right", va="baseline", color=LIGHT["quiet"])
    if y_label:
        fig.text(9 / WIDTH, (box.y0 + box.y1) / 2, y_label, ha="center", va="center", rotation=90, color=LIGHT["quiet"])


def shortened(text: str, most: int) -> str:
    text = printable(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def arranged(entries: Sequence[str]) -> tuple[int, int]:
    """(rows, columns) of a legend: as many columns as fit."""
    between = 1.2 * FONT  # as in `add_legend`: columnspacing; handlelength and handletextpad are 2.8
    wide = [min(len(e), 50) * CHARACTER + 2.8 * FONT + between for e in entries]
    for columns in range(len(entries), 1, -1):
        rows = -(-len(entries) // columns)
        if sum(max(wide[i : i + rows]) for i in range(0, len(wide), rows)) <= WIDTH + between:
            return rows, columns
    return len(entries), 1


def add_legend(fig: Figure, handles: Sequence[Any], entries: Sequence[str], columns: int) -> None:
    """The names of the series above the axes, clear of the data."""
    shown = [(h, shortened(e, 50)) for h, e in zip(handles, entries) if h is not None]
    fig.legend(
        [h for h, _ in shown], [e for _, e in shown], loc="upper left", bbox_to_anchor=(0, 1), ncols=columns,
        borderaxespad=0, borderpad=0, handlelength=2.2, handletextpad=0.6, columnspacing=1.2, labelspacing=0.45,
    )  # fmt: skip
