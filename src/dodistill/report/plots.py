"""The kinds of plots: lines, bars, dots of seeds, points of a map, a heat map. Each takes numbers and returns a `Plot`.

A new kind of plot is a function here. A new figure of a run's report is an entry in `figures.curves`; a page shows any
`Plot` with `{{ plot }}`. Lengths are pixels of the page.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .canvas import LIGHT, WIDTH, Plot, drawing, new_figure
from .format import number
from .frame import (
    CHARACTER,
    COLOURS,
    LEFT,
    add_legend,
    arranged,
    draw_band,
    draw_line,
    draw_reference,
    finish,
    locator,
    new_axes,
    set_ticks,
    shortened,
    thin,
    tick,
)  # fmt: skip

NAMED = 24  #: most places of `bars` whose names fit below them


@dataclass(frozen=True)
class Series:
    """`spread`: half the height of a band around each y; empty: no band."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] = ()

    @property
    def band(self) -> list[tuple[float, float]]:
        """The lower and upper end of the band at each x."""
        return [(y - s, y + s) for y, s in zip(self.y, self.spread)]


@dataclass(frozen=True)
class Seeds:
    """A row of `dots`: the value of each seed, and the published number."""

    name: str
    values: Sequence[float]
    published: float | None = None


def lines(
    name: str,
    series: Sequence[Series],
    *,
    y_label: str,
    x_label: str = "step",
    unit: str = "",
    log: bool = False,
    reference: tuple[str, float] | None = None,
    zero: bool = False,
    last: bool = True,
) -> Plot:
    """Lines over `x`. NaN is a gap; on a logarithmic scale, so are values <= 0.

    `reference` is a level with a name; `zero` starts the axis at 0; `last` puts the last values into the legend.
    """

    def fits(v: float) -> bool:
        return math.isfinite(v) and (v > 0 or not log)

    values = [v for s in series for v in (*s.y, *(e for low, high in s.band for e in (low, high))) if fits(v)]
    places = [float(x) for s in series for x in s.x]
    level = reference if reference is not None and fits(reference[1]) else None
    if not values or not places:
        return Plot(name, "No values were logged.")
    low, high = min([*values, *([level[1]] if level else [])]), max([*values, *([level[1]] if level else [])])
    x0, x1 = min(places), max(places)
    entries = []
    for s in series:
        final = next((v for v in reversed(s.y) if math.isfinite(v)), math.nan)
        entries.append(f"{s.name} {number(final)}{unit}" if last else s.name)
    entries += [f"{level[0]} {number(level[1])}{unit}"] if level else []
    with drawing():
        rows, columns = arranged(entries)
        fig, ax = new_axes(rows)
        if log:
            ax.set_yscale("log")
            low, high = low / 1.15, high * 1.15
        elif x0 == x1 and "%" in unit and low >= 0 and high <= 100:  # one evaluation: nothing to enlarge
            low, high = 0.0, 100.0
        else:
            pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
            top = 100.0 if "%" in unit and high <= 100 < high + pad else high + pad
            low, high = (low - pad if low < 0 or (low > pad and not zero) else 0.0), top
        ax.set_ylim(low, high)
        ax.set_xlim(*_across(x0, x1))
        handles: list[Any] = []
        for i, s in enumerate(series):
            draw_band(ax, s.x, s.band, i)
            xs, ys = thin(s.x, s.y)
            ys = [y if fits(y) else math.nan for y in ys]
            handles.append(draw_line(ax, xs, ys, i))
        if level:
            handles.append(draw_reference(ax, level[1]))
        set_ticks(ax, log)
        finish(fig, ax, x_label, y_label)
        add_legend(fig, handles, entries, columns)
    said = ", ".join(entries)
    return Plot(name, f"{y_label} by {x_label}: {said}", fig)


def _across(x0: float, x1: float) -> tuple[float, float]:
    """The ends of a horizontal axis. For one place above 0, as the only evaluation of a run: from the run's start."""
    if x1 > x0:
        return x0, x1
    return (0.0, x1) if x1 > 0 else (x0 - 1, x1 + 1)


def bars(
    name: str,
    groups: Sequence[tuple[str, Sequence[float]]],
    *,
    x_label: str,
    y_label: str = "share, %",
    reference: tuple[str, float] | None = None,
    names: Sequence[str] = (),
) -> Plot:
    """Bars of shares in [0, 1], the groups side by side; more than 64 places are drawn as a line from high to low.

    `names` stand below the places in place of their numbers, if there are at most `NAMED`.
    """
    many = max((len(values) for _, values in groups), default=0)
    if many == 0:
        return Plot(name, "Nothing was logged.")
    level = (reference[0], 100 * reference[1]) if reference is not None else None
    if many > 64:
        order = sorted(range(len(groups[0][1])), key=lambda k: -groups[0][1][k])
        ranked = [Series(what, range(1, len(v) + 1), [100 * v[k] for k in order if k < len(v)]) for what, v in groups]
        x_label = f"{x_label}, from the most frequent on"
        return lines(name, ranked, x_label=x_label, y_label=y_label, unit=" %", reference=level, last=False)
    top = 100 * max([v for _, values in groups for v in values if math.isfinite(v)] + [1e-6])
    entries = [what for what, _ in groups] + ([f"{level[0]} {number(level[1], 3)} %"] if level else [])
    with drawing():
        rows, columns = arranged(entries)
        below = [shortened(text, 16) for text in names] if len(names) == many <= NAMED else []
        long = max(map(len, below), default=0) * CHARACTER
        turned = long > 240 / many
        fig, ax = new_axes(rows, below=long if turned else 0.0)
        wide = 0.8 / len(groups)
        handles: list[Any] = []
        for g, (_, values) in enumerate(groups):
            places = [k - 0.4 + wide * (g + 0.5) for k in range(len(values))]
            heights = [100 * v if math.isfinite(v) else 0.0 for v in values]
            drawn = ax.bar(places, heights, wide * 0.94, color=COLOURS[g % 6], clip_on=False)
            for bar in drawn:
                bar.set_gid("class bar")
            handles.append(drawn[0] if len(drawn) else None)
        ax.set_xlim(-0.6, many - 0.4)
        ax.set_ylim(0, max(top, level[1] if level else 0) * 1.08)
        if level:
            handles.append(draw_reference(ax, level[1]))
        set_ticks(ax, log=False, most=12)
        if below:
            ax.set_xticks(range(many), below, rotation=90 if turned else 0)
        finish(fig, ax, x_label, y_label)
        add_legend(fig, handles, entries, columns)
    said = ", ".join(f"{text} {number(100 * v, 3)}" for text, v in zip(below, groups[0][1]))
    return Plot(name, f"{y_label} by {x_label}: {', '.join(entries)}" + (f"; {said}" if said else ""), fig)


def dots(
    name: str,
    rows: Sequence[Seeds],
    *,
    x_label: str,
    ends: tuple[float, float] | None = None,
) -> Plot:
    """A row for each setting: a dot for each seed, a bar at their mean, a diamond at the published number.

    `ends` are the limits of the axis; without them, it fits these rows.
    """
    seen = [[v for v in r.values if math.isfinite(v)] for r in rows]
    if not any(seen):
        return Plot(name, "No run has finished yet.")
    labels = [textwrap.wrap(shortened(r.name, 60), 22) or ["–"] for r in rows]
    left = max(len(t) for label in labels for t in label) * CHARACTER + 12
    tall = [13.0 * len(label) + 7 for label in labels]
    places = [math.fsum(tall[:i]) + tall[i] / 2 for i in range(len(rows))]
    seeds = [(v, y) for y, values in zip(places, seen) for v in values]
    means = [(math.fsum(values) / len(values), y) for y, values in zip(places, seen) if values]
    means = means if len(seeds) > len(means) else []
    published = [(r.published, y) for y, r in zip(places, rows) if r.published is not None]
    with drawing():
        fig, ax = new_axes(1, math.fsum(tall) + 4, left)
        ax.set_xlim(*(ends or spread(rows)))
        ax.set_ylim(math.fsum(tall) + 4, 0)
        handles: list[Any] = []
        entries: list[str] = []
        for what, marks, style in (
            ("mean", means, {"marker": "|", "ms": 11, "mew": 2, "color": LIGHT["ink"]}),
            (
                "seed",
                seeds,
                {"marker": "o", "ms": 6, "mew": 0, "alpha": 0.75, "color": COLOURS[0], "gid": "class seeds"},
            ),
            ("published", published, {"marker": "D", "ms": 5.5, "mew": 1.5, "mfc": "none", "color": COLOURS[1]}),
        ):
            if marks:
                handles += ax.plot(*zip(*marks), ls="", clip_on=False, **style)  # type: ignore[arg-type]
                entries.append(what)
        ax.set_yticks(places, ["\n".join(label) for label in labels], linespacing=1.05)
        ax.tick_params(axis="y", labelcolor=LIGHT["ink"], pad=6)
        ax.xaxis.set_major_locator(locator(5))
        ax.xaxis.set_major_formatter(lambda v, _: tick(v))
        finish(fig, ax, x_label, "")
        add_legend(fig, handles, entries, 3)
    said = ", ".join(f"{r.name} {number(math.fsum(v) / len(v))}" for r, v in zip(rows, seen) if v)
    return Plot(name, f"{x_label}, mean of the seeds: {said}", fig)


def spread(rows: Sequence[Seeds]) -> tuple[float, float]:
    """The ends of an axis for every seed and every published number of these rows."""
    values = [v for r in rows for v in (*r.values, r.published) if v is not None and math.isfinite(v)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    pad = (high - low) * 0.06 or max(1.0, 0.02 * abs(high))
    return low - pad, high + pad


def points(
    name: str, x: Sequence[float], y: Sequence[float], kinds: Sequence[int], *, label: str, names: Sequence[str] = ()
) -> Plot:
    """Points in the plane, coloured by kind (0, 1, ...); at most 20 kinds have their number, or name, above them.

    The axes have no meaning and are not drawn; both have one scale.
    """
    if not len(x):
        return Plot(name, "Nothing to draw.")
    import numpy as np

    px, py, kind = np.asarray(x, float), np.asarray(y, float), np.asarray(kinds)
    shown = np.unique(kind)
    with drawing():
        above = 14  # for a number over the highest points
        fig = new_figure(WIDTH + above)
        ax = fig.add_axes((0, 0, 1, WIDTH / (WIDTH + above)))
        ax.set_axis_off()
        far = 1e-6 * float(max(np.abs(px).max(), np.abs(py).max()))  # of one point far from 0: no zero width
        side = max(float(np.ptp(px)), float(np.ptp(py)), far, 1e-9) * 0.53
        ax.set_xlim((px.max() + px.min()) / 2 - side, (px.max() + px.min()) / 2 + side)
        ax.set_ylim((py.max() + py.min()) / 2 - side, (py.max() + py.min()) / 2 + side)
        for k, colour in zip(shown, _kinds(len(shown))):
            mine = kind == k
            ax.plot(px[mine], py[mine], "o", ms=4, mew=0, alpha=0.75, color=colour, clip_on=False, gid="class points")
        for k in shown if len(shown) <= 20 else ():
            mine = py[kind == k]
            text, middle = shortened(names[k], 12) if names else str(k), float(np.median(px[kind == k]))
            top = min(mine.max(), np.median(mine) + 1.9 * np.median(np.abs(mine - np.median(mine))))
            ax.annotate(
                text, (middle, float(top)), (0, 5), textcoords="offset points",
                ha="center", va="bottom", weight="bold",
                bbox={"boxstyle": "round,pad=0.1", "fc": LIGHT["page"], "ec": "none", "alpha": 0.7},
            )  # fmt: skip
    return Plot(name, label, fig)


def _kinds(n: int) -> list[Any]:
    """Colours of n kinds: up to ten easily distinguishable ones, or n hues of one lightness."""
    if n <= 10:
        return [LIGHT[f"k{i}"] for i in range(n)]
    import colorsys

    return [colorsys.hls_to_rgb(i / n, 0.5, 0.65) for i in range(n)]


def heatmap(name: str, table: Any, *, x_label: str, y_label: str, value: str) -> Plot:
    """Signed values: blue below zero, orange above, transparent at zero, which suits light and dark pages."""
    import numpy as np

    try:
        cells = np.asarray(table, dtype=np.float64)
    except (TypeError, ValueError):
        cells = np.zeros((0, 0))
    if cells.ndim != 2 or cells.size == 0:
        return Plot(name, "Nothing was logged.")
    finite = np.nan_to_num(cells, nan=0.0, posinf=0.0, neginf=0.0)
    size = float(np.abs(finite).max()) or 1.0
    n = len(finite)
    with drawing():
        fig, ax = new_axes(1, min(max(n * 14.0, 100.0), 320.0))
        ax.grid(visible=False)
        ax.imshow(_signed(finite / size), aspect="auto", interpolation="none", clip_on=False)
        for locate, most in ((ax.xaxis, 10), (ax.yaxis, 8)):
            locate.set_major_locator(locator(most, whole=True))
            locate.set_major_formatter(lambda v, _: str(int(v)))
        for side in ax.spines.values():
            side.set_visible(True)
        finish(fig, ax, x_label, y_label)
        high = fig.get_figheight() * 72
        row = 1 - 11 / high
        ramp = fig.add_axes((LEFT / WIDTH, row, 90 / WIDTH, 8 / high))
        ramp.imshow(_signed(np.linspace(-1, 1, 65)[None]), aspect="auto", interpolation="none", clip_on=False)
        ramp.set_axis_off()
        fig.text((LEFT - 6) / WIDTH, row, number(-size, 3), ha="right", va="baseline", color=LIGHT["quiet"])
        fig.text((LEFT + 96) / WIDTH, row, f"{number(size, 3)}   {value}", va="baseline", color=LIGHT["quiet"])
    return Plot(name, f"{value} by {y_label} and {x_label}, from {number(-size, 3)} to {number(size, 3)}", fig)


def _signed(values: Any) -> Any:
    """[-1, 1] -> RGBA."""
    import numpy as np

    rgb = np.where(values[..., None] < 0, np.array([30, 130, 205]), np.array([230, 120, 0]))
    return np.concatenate([rgb, np.round(255 * np.abs(values))[..., None]], -1).astype(np.uint8)
