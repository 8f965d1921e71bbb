"""Small plots as inline SVG: lines, bars, heat-map. The page's style sheet gives colours and type (classes c0-c5)."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from .format import number

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 34
MOST_POINTS = 320


@dataclass(frozen=True)
class Series:
    name: str
    x: Sequence[float]
    y: Sequence[float]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) inside [low, high].

    >>> ticks(0, 97)
    [0.0, 20.0, 40.0, 60.0, 80.0]
    """
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else []
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high]; with 2 and 5 between them where fewer than two fit."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**p for p in powers if low * 0.999 <= 10.0**p <= high * 1.001]
    if len(tens) >= 2:
        return tens[:: max(1, -(-len(tens) // 6))]
    fine = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    return fine if len(fine) >= 2 else ticks(low, high, 4)


def _tick(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:.4g}".replace("-", "−")


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most about `most` points: the lowest and the highest of each stretch, so that no spike is lost."""
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


def _legend(entries: Sequence[tuple[str, str, str]]) -> Markup:
    """Entries of (class, name, value)."""
    items = [
        Markup('<li><svg class="key" viewBox="0 0 24 8"><path class="{}" d="M0 4H24"/></svg>{}{}</li>').format(
            style, name, Markup(" <b>{}</b>").format(value) if value else ""
        )
        for style, name, value in entries
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def _frame(marks: list[str], label: str, height: int = HEIGHT) -> Markup:
    return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, label, Markup("".join(marks))
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _path(points: Sequence[tuple[float, float] | None], style: str) -> str:
    """A polyline that breaks at None; a point alone is a dot."""
    out: list[str] = []
    run: list[tuple[float, float]] = []
    for point in [*points, None]:
        if point is not None:
            run.append(point)
            continue
        if len(run) == 1:
            out.append(f'<circle class="{style} dot" cx="{run[0][0]:.1f}" cy="{run[0][1]:.1f}" r="3"/>')
        elif run:
            out.append(f'<path class="{style}" d="M' + "L".join(f"{x:.1f} {y:.1f}" for x, y in run) + '"/>')
        run = []
    return "".join(out)


def line_plot(
    series: Sequence[Series],
    *,
    log: bool = False,
    x_label: str = "step",
    unit: str = "",
    reference: tuple[str, float] | None = None,
    zero: bool = False,
    last: bool = True,
) -> Markup:
    """Lines over `x`, NaN is a gap; with `log`, so is what is not positive.

    `reference` is a level with a name; `zero` starts the axis at 0; `last` puts the last values in the legend.
    """

    def fits(v: float) -> bool:
        return math.isfinite(v) and (v > 0 or not log)

    values = [v for s in series for v in s.y if fits(v)]
    places = [float(x) for s in series for x in s.x]
    if reference is not None and fits(reference[1]):
        values.append(reference[1])
    if not values or not places:
        return Markup('<p class="quiet">No values were logged.</p>')
    low, high = min(values), max(values)
    if log:
        low, high = (low / 1.15, high * 1.15)
    else:
        pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = (low - pad if low < 0 or (low > pad and not zero) else 0.0), high + pad
    x0, x1 = min(places), max(places)
    if x1 == x0:
        x0, x1 = x0 - 1, x1 + 1

    def across(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    marks: list[str] = []
    for v in log_ticks(low, high) if log else ticks(low, high):
        marks.append(f'<path class="rule" d="M{LEFT} {down(v):.1f}H{WIDTH - RIGHT}"/>')
        marks.append(_text(LEFT - 6, down(v) + 3.5, _tick(v), "end"))
    for v in ticks(x0, x1, 5):
        marks.append(_text(across(v), HEIGHT - BOTTOM + 15, _tick(v)))
    marks.append(_text(WIDTH - RIGHT, HEIGHT - 4, x_label, "end", "tick quiet"))
    entries: list[tuple[str, str, str]] = []
    if reference is not None and fits(reference[1]):
        marks.append(f'<path class="reference" d="M{LEFT} {down(reference[1]):.1f}H{WIDTH - RIGHT}"/>')
    for i, s in enumerate(series):
        style = f"line c{i % 6}"
        xs, ys = thin(s.x, s.y)
        marks.append(_path([(across(x), down(y)) if fits(y) else None for x, y in zip(xs, ys)], style))
        final = next((v for v in reversed(s.y) if math.isfinite(v)), math.nan)
        entries.append((style, s.name, number(final) + unit if last else ""))
    if reference is not None and fits(reference[1]):
        entries.append(("reference", reference[0], number(reference[1]) + unit))
    return _legend(entries) + _frame(marks, ", ".join(s.name for s in series) + f" over {x_label}")


def bars(
    groups: Sequence[tuple[str, Sequence[float]]],
    *,
    x_label: str,
    reference: tuple[str, float] | None = None,
) -> Markup:
    """Bars of shares in [0, 1], the groups side by side; more than 64 places are drawn as a line from high to low."""
    many = max((len(values) for _, values in groups), default=0)
    if many == 0:
        return Markup('<p class="quiet">Nothing was logged.</p>')
    if many > 64:
        order = sorted(range(len(groups[0][1])), key=lambda k: -groups[0][1][k])
        ranked = [Series(name, range(1, len(v) + 1), [100 * v[k] for k in order if k < len(v)]) for name, v in groups]
        mark = (reference[0], 100 * reference[1]) if reference else None
        return line_plot(ranked, x_label=f"{x_label}, most frequent first", unit=" %", reference=mark, last=False)
    top = 100 * max([v for _, values in groups for v in values if math.isfinite(v)] + [1e-6])
    if reference is not None:
        top = max(top, 100 * reference[1])
    top *= 1.08
    slot = (WIDTH - LEFT - RIGHT) / many
    wide = slot * 0.76 / len(groups)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    marks: list[str] = []
    for v in ticks(0, top, 4):
        marks.append(f'<path class="rule" d="M{LEFT} {down(v):.1f}H{WIDTH - RIGHT}"/>')
        marks.append(_text(LEFT - 6, down(v) + 3.5, f"{_tick(v)} %", "end"))
    for g, (_, values) in enumerate(groups):
        for k, v in enumerate(values):
            if math.isfinite(v) and v > 0:
                x, y = LEFT + slot * k + slot * 0.12 + wide * g, down(100 * v)
                box = f'x="{x:.1f}" y="{y:.1f}" width="{max(wide - 0.6, 0.6):.1f}" height="{HEIGHT - BOTTOM - y:.1f}"'
                marks.append(f'<rect class="bar c{g}" {box}/>')
    every = -(-many // 20)
    marks += [_text(LEFT + slot * (k + 0.5), HEIGHT - BOTTOM + 15, str(k)) for k in range(0, many, every)]
    marks.append(_text(WIDTH - RIGHT, HEIGHT - 4, x_label, "end", "tick quiet"))
    entries = [(f"line thick c{g}", name, "") for g, (name, _) in enumerate(groups)]
    if reference is not None:
        y = down(100 * reference[1])
        marks.append(f'<path class="reference" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        entries.append(("reference", reference[0], ""))
    return _legend(entries) + _frame(marks, ", ".join(name for name, _ in groups) + f" by {x_label}")


def scatter(x: Sequence[float], y: Sequence[float], kinds: Sequence[int], *, label: str) -> Markup:
    """Points in the plane, coloured by kind (0, 1, ...); at most 20 kinds have their number at their median.

    The axes have no meaning and are not drawn; both have one scale.
    """
    if not len(x):
        return Markup('<p class="quiet">Nothing to draw.</p>')
    px, py, kind = np.asarray(x, float), np.asarray(y, float), np.asarray(kinds)
    tall = 380
    scale = min((WIDTH - 24) / max(np.ptp(px), 1e-9), (tall - 24) / max(np.ptp(py), 1e-9))
    across = WIDTH / 2 + scale * (px - (px.max() + px.min()) / 2)
    down = tall / 2 - scale * (py - (py.max() + py.min()) / 2)
    n = int(kind.max()) + 1
    marks = [
        f'<circle cx="{a:.1f}" cy="{d:.1f}" r="2.2" fill="hsl({360 * k / n:.0f} 65% 50%)" fill-opacity=".7"/>'
        for a, d, k in zip(across, down, kind)
    ]
    for k in np.unique(kind) if n <= 20 else []:
        a, d = np.median(across[kind == k]), np.median(down[kind == k])
        marks.append(_text(float(a), float(d) + 5, str(k), style="mark"))
    return _frame(marks, label, tall)


def heatmap(rows: Sequence[Sequence[float]], *, x_label: str, y_label: str) -> Markup:
    """Signed values: blue below zero, orange above, clear at zero. The cells are one embedded PNG."""
    try:
        table = np.asarray(rows, dtype=np.float64)
    except ValueError:
        table = np.zeros((0, 0))
    if table.ndim != 2 or table.size == 0:
        return Markup('<p class="quiet">Nothing was logged.</p>')
    finite = np.nan_to_num(table, nan=0.0, posinf=0.0, neginf=0.0)
    size = float(np.abs(finite).max()) or 1.0
    cells = np.zeros((*table.shape, 4), dtype=np.uint8)
    cells[..., :3] = np.where(finite[..., None] < 0, np.array([30, 130, 205]), np.array([230, 120, 0]))
    cells[..., 3] = np.round(255 * np.abs(finite) / size)
    data = io.BytesIO()
    Image.fromarray(cells).save(data, format="PNG")
    uri = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    n, k = table.shape
    inner = WIDTH - LEFT - RIGHT
    tall = min(max(n * 14, 100), 320)
    box = f'x="{LEFT}" y="{TOP}" width="{inner}" height="{tall}"'
    marks = [
        f'<image {box} preserveAspectRatio="none" style="image-rendering:pixelated" href="{uri}"/>',
        f'<rect class="edge" {box}/>',
    ]
    columns, lines = -(-k // 20), -(-n // 16)
    marks += [_text(LEFT + inner * (j + 0.5) / k, TOP + tall + 15, str(j)) for j in range(0, k, columns)]
    marks += [_text(LEFT - 6, TOP + tall * (i + 0.5) / n + 3.5, str(i), "end") for i in range(0, n, lines)]
    marks.append(_text(WIDTH - RIGHT, TOP + tall + 30, f"{x_label} →   {y_label} ↓", "end", "tick quiet"))
    scale = Markup('<p class="scale"><b>{}</b><span class="ramp"></span><b>{}</b></p>').format(
        number(-size, 3), "+" + number(size, 3)
    )
    return scale + _frame(marks, f"{y_label} by {x_label}", TOP + tall + BOTTOM)
