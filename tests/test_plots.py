"""Figures: finite numbers, round ticks, one scale, the page's colours, equal bytes for equal data, no global state."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

from dodistill.report import frame, page, plots
from dodistill.report.canvas import DARK, LIGHT, Plot
from helpers import Page

RUNS = [plots.Seeds("plain", [80.0, 81.0, 85.0], 88.0), plots.Seeds("kdci", [79.5])]


def each() -> list[Plot]:
    """A plot of every kind."""
    curve = plots.Series("student", range(40), [100 / (i + 1) for i in range(40)])
    groups = [("pool", [0.5, 0.3, 0.2]), ("as drawn", [0.4, 0.3, 0.3])]
    return [
        plots.lines("curve", [curve], y_label="loss", log=True, reference=("level", 3.0)),
        plots.bars("shares", groups, x_label="class", reference=("even", 1 / 3)),
        plots.dots("seeds", RUNS, x_label="accuracy, %"),
        plots.points("map", [0.0, 1.0, 2.0], [0.0, 1.0, 0.5], [0, 1, 1], label="three points"),
        plots.heatmap("Z", [[1.0, -2.0], [0.5, 0.0]], x_label="class", y_label="cluster", value="mean logit"),
    ]


@pytest.mark.parametrize(
    ("y", "log"),
    [
        ([1.0], False),
        ([5.0] * 4, False),
        ([0.0] * 4, True),
        ([math.nan] * 3, False),
        ([1, math.nan, 2, math.nan, 3, 4], False),
        ([1e-6, 1.0, 1e5], True),
        ([-1.0, 0.0, 10.0], True),
        ([math.inf, 1.0], False),
        ([], False),
        ([1e12, 1e12 + 1], False),
        ([float(i % 7) for i in range(5000)], False),
    ],
)
def test_line_plots_hold_only_finite_numbers(y: list[float], log: bool) -> None:
    plot = str(plots.lines("p", [plots.Series("a<b", list(range(len(y))), y)], log=log, y_label="value"))
    Page(plot)
    assert "a<b" not in plot
    assert not re.search(r'(?:d|x|y|cx|cy|r)="[^"]*(?:nan|inf)', plot)


def test_thinning_keeps_spikes_and_gaps_break_the_line() -> None:
    y = [0.0] * 5000
    y[2501] = 9.0
    assert max(frame.thin(range(5000), y)[1]) == 9.0
    assert len(frame.thin(range(5000), y)[0]) <= frame.MOST_POINTS
    plot = str(plots.lines("p", [plots.Series("a", range(5), [1, 2, math.nan, 3, 4])], y_label="value"))
    (path,) = re.findall(r'<g class="series"><path d="([^"]*)"', plot)
    assert path.count("M") == 2  # two stretches


def marks(low: float, high: float, log: bool = False) -> list[float]:
    """The numbers at the ticks of the vertical axis of a curve from `low` to `high`."""
    plot = str(plots.lines("p", [plots.Series("a", [0, 1], [low, high])], log=log, y_label="value"))
    texts = re.findall(r"<text [^>]*text-anchor:end[^>]*>([^<]*)</text>", plot)
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    return [float(t.rstrip("kMG").replace("−", "-")) * units.get(t[-1], 1) for t in texts if t != "step"]


def test_ticks_are_round_and_inside() -> None:
    assert marks(0, 97) == [0, 20, 40, 60, 80, 100]
    assert marks(0.05, 200, log=True) == [0.1, 1, 10, 100]
    assert marks(0.3, 0.9, log=True) == [0.5, 1]
    for low, high in ((0.013, 0.017), (-3, 4e6), (1e-9, 2e-9)):
        found, pad = marks(low, high), 0.07 * (high - low)
        assert 2 <= len(found) <= 7
        assert all(low - pad <= t <= high + pad for t in found)
        step = found[1] - found[0]
        assert f"{step:.0e}"[0] in "125"


@pytest.mark.parametrize("k", [1, 10, 100, 1000])
def test_bars_and_heatmap_of_any_width(k: int) -> None:
    groups = [("a", [1 / k] * k), ("b", [0.0] * k)]
    Page(str(plots.bars("b", groups, x_label="class", reference=("even", 1 / k))))
    table = [[math.nan] + [1.0] * (k - 1)] * 128
    heat = str(plots.heatmap("h", table, x_label="class", y_label="cluster", value="logit"))
    Page(heat)
    assert len(heat) < 60_000


def test_points_of_a_map() -> None:
    plot = str(plots.points("map", [0, 10, 20], [0, 0, 5], [0, 1, 1], label="three"))
    places = [(float(a), float(b)) for a, b in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', plot)]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 == y1
    assert (y1 - y2) == pytest.approx((x2 - x1) / 2, abs=0.2)  # one scale, and up is up
    assert set(re.findall(r"<use [^>]*fill:(var\(--k\d\))", plot)) == {"var(--k0)", "var(--k1)"}
    assert len(re.findall("<text", plot)) == 2
    many = str(plots.points("map", list(range(30)), [0.0] * 30, list(range(30)), label="thirty"))
    assert "<text" not in many
    assert len(set(re.findall(r"<use [^>]*fill:(#\w+)", many))) == 30
    assert "Nothing to draw" in str(plots.points("map", [], [], [], label="none"))


def test_dots_lie_where_the_seeds_are() -> None:
    plot = plots.dots("seeds", RUNS, x_label="accuracy, %")
    text = str(plot)
    seeds = [(float(x), float(y)) for x, y in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', text)]
    groups = re.findall(r'<g class="seeds">(.*?)</g></g>', text)
    assert sum(g.count("<use ") for g in groups) == 4  # every seed of every row
    seeds = [(x, y) for x, y in seeds if y > 20]  # below the legend
    xs = sorted({x for x, _ in seeds})
    assert len({y for _, y in seeds}) == 2  # a row each
    assert len(xs) == 6  # four seeds, the mean of three, the published number; the mean of one is its seed
    for name in ("plain", "kdci", "seed", "mean", "published", "accuracy, %"):
        assert f">{name}</text>" in text
    assert "plain 82" in plot.label
    assert "No run has finished" in str(plots.dots("none", [plots.Seeds("plain", [], 88.0)], x_label="accuracy, %"))
    assert ">mean</text>" not in str(plots.dots("one", RUNS[1:], x_label="%"))


@pytest.mark.parametrize("plot", each(), ids=lambda p: p.name)
def test_a_figure_follows_the_page_and_has_a_name(plot: Plot) -> None:
    text = str(plot)
    tags = Page(text).tags
    assert tags[0][0] == "svg"
    assert tags[0][1]["role"] == "img"
    assert tags[0][1]["aria-label"] == plot.label
    assert f"<title>{plot.label}</title>" in text
    assert not set(re.findall(r"#[0-9a-f]{6}\b", text)) & set(LIGHT.values())  # each is a variable of the page
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= set(LIGHT) & set(DARK)
    assert "font-family" not in text
    assert "DejaVu" not in text
    assert "<style" not in text
    assert "metadata" not in text


@pytest.mark.parametrize("i", range(5))
def test_equal_data_give_equal_bytes(i: int) -> None:
    a, b = each()[i], each()[i]
    assert str(a) == str(b)
    assert a.pdf() == b.pdf()
    assert a.pdf().startswith(b"%PDF")
    assert b"CreationDate" not in a.pdf()
    assert b"/FontFile2" in a.pdf()  # TrueType, as publishers ask for


def test_figures_are_written_beside_the_page_and_none_twice(tmp_path: Path) -> None:
    first, second = (plots.bars("a/b c", [("x", [0.1 * k, 1.0])], x_label="class") for k in (1, 2))
    nothing = plots.lines("empty", [], y_label="loss")
    made = page.write_figures(tmp_path / "look.html", [first, None, nothing, second])
    assert [p.relative_to(tmp_path).as_posix() for p in made] == ["figures/look-a-b-c.pdf", "figures/look-a-b-c-2.pdf"]
    assert made[0].read_bytes() != made[1].read_bytes()


def test_any_text_can_be_a_name() -> None:
    odd = "a\x00\x1b\ud800\n<b>&\t" + "long " * 40
    for plot in (
        plots.lines("p", [plots.Series(odd, [0, 1], [1, 2])], y_label="loss"),
        plots.dots("p", [plots.Seeds(odd, [1.0]), plots.Seeds("", [2.0])], x_label="%"),
        plots.bars("p", [(odd, [0.5, 0.5])], x_label="class"),
        plots.points("p", [0.0, 1.0], [0.0, 1.0], [0, 1], label=odd),
    ):
        text = str(plot)
        Page(text)
        assert "<b>" not in text
        assert "\x00" not in text
        assert text.encode()
        assert plot.pdf()


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    with matplotlib.rc_context({"font.size": 33, "axes.grid": False, "text.parse_math": True}):
        before, text = dict(matplotlib.rcParams), str(each()[0])
        assert dict(matplotlib.rcParams) == before
    assert "33px" not in text
    assert "$x$" in str(plots.lines("p", [plots.Series("$x$", [0, 1], [1, 2])], y_label="$y$"))


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = (
        "import sys, dodistill, dodistill.api, dodistill.commands.look, dodistill.commands.compare\n"
        "import dodistill.report.plots, dodistill.report.report, dodistill.report.compare_page\n"
        "print([m for m in sys.modules if m.partition('.')[0] == 'matplotlib'])\n"
        "str(dodistill.report.plots.bars('b', [('a', [1.0])], x_label='class'))\n"
        "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["[]", "True False"], done.stderr


@pytest.mark.parametrize(("x", "y", "log"), [(300, 31.5, False), (0, 5.0, False), (300, 0.7, True), (1, 0.0, False)])
def test_one_point_is_visible_on_sensible_axes(x: int, y: float, log: bool) -> None:
    """A run with one evaluation: the axis goes from the run's start, a percentage has all of 0 to 100."""
    plot = plots.lines("p", [plots.Series("student", [x], [y])], log=log, y_label="accuracy, %", unit=" %")
    assert plot.figure is not None
    (ax,) = plot.figure.axes
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    assert left < right
    assert low < high
    assert (left, right) == ((0, x) if x else (-1, 1))
    assert (low, high) == (0, 100) or log
    text = str(plot)
    place = re.search(r'<g class="series">.*?<use [^>]*x="([\d.]+)" y="([\d.]+)"', text)
    assert place is not None  # a dot
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert box is not None
    assert 0 < float(place[1]) < float(box[1])
    assert 0 < float(place[2]) < float(box[2])
    marks = [t for t in re.findall(r"<text [^>]*>([^<]*)</text>", text) if re.fullmatch(r"[−\d.k]+", t)]
    assert len(marks) >= 4  # two numbers on each axis, at least


def test_no_axis_has_zero_width() -> None:
    for value in (0.0, 55.0, 1e9):
        dots = plots.dots("d", [plots.Seeds("a", [value])], x_label="%")
        point = plots.points("m", [value], [value], [0], label="one")
        line = plots.lines("p", [plots.Series("s", [1, 2], [value, value])], y_label="v")
        for plot in (dots, point, line):
            assert plot.figure is not None
            for low, high in (plot.figure.axes[0].get_xlim(), plot.figure.axes[0].get_ylim()):
                assert abs(high - low) > 1e-9 * abs(high)
            Page(str(plot))
