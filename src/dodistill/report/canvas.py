"""One figure of matplotlib: for the page as SVG in the page's colours and font, for papers as PDF.

matplotlib draws in the colours of LIGHT. In the SVG, each of them becomes a variable of the page's style sheet, so that
the figure follows the page's dark mode and print style. The SVG has no style sheet, no metadata, and no ids that
another figure could have; equal data give equal bytes. pyplot is not used, and matplotlib is imported when a figure is
drawn. Nothing is clipped: every plot sets limits that contain its data.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 340  #: of a figure, in pixels of the page (points of a PDF): a column of the page, or a phone's screen
FONT = 10.5  #: size of the text in a figure

#: The colours of page and figures. c0 to c5 are lines and bars (after Okabe and Ito), k0 to k9 are classes (after
#: Petroff, arXiv 2107.02270): both are safe for colour-blind readers. No two colours of LIGHT are equal.
LIGHT = {
    "page": "#fdfdfc", "ink": "#1b2026", "quiet": "#58616b", "line": "#e3e5e3", "soft": "#f4f5f2",
    "good": "#1a7f5a", "warn": "#b45309", "warnbg": "#fdf5e6",
    "c0": "#0072b2", "c1": "#d55e00", "c2": "#009e73", "c3": "#a8508a", "c4": "#8a6d00", "c5": "#3a9bd1",
    "k0": "#3f90da", "k1": "#ffa90e", "k2": "#bd1f01", "k3": "#94a4a2", "k4": "#832db6",
    "k5": "#a96b59", "k6": "#e76300", "k7": "#b9ac70", "k8": "#717581", "k9": "#5fc3c7",
}  # fmt: skip
DARK = {
    "page": "#14171a", "ink": "#e6e8ea", "quiet": "#a0a9b2", "line": "#2f353b", "soft": "#1d2125",
    "good": "#5ec79c", "warn": "#f0b35a", "warnbg": "#2a2317",
    "c0": "#5aaee6", "c1": "#f2904a", "c2": "#3fc79c", "c3": "#dd92c2", "c4": "#e2c04a", "c5": "#93d1f5",
    "k0": "#5aa9ee", "k1": "#ffb93b", "k2": "#ee5b45", "k3": "#aebcba", "k4": "#b476e0",
    "k5": "#c58c7b", "k6": "#ff8a3a", "k7": "#cfc28a", "k8": "#9096a3", "k9": "#8be0e3",
}  # fmt: skip
_NAME = {value: name for name, value in LIGHT.items()}

_STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": FONT, "text.color": LIGHT["ink"], "text.parse_math": False,
    "axes.edgecolor": LIGHT["line"], "axes.labelcolor": LIGHT["quiet"], "axes.linewidth": 1.0, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True,
    "grid.color": LIGHT["line"], "grid.linewidth": 1.0, "xtick.labelcolor": LIGHT["quiet"], "xtick.major.size": 0,
    "ytick.labelcolor": LIGHT["quiet"], "ytick.major.size": 0, "ytick.major.pad": 6,
    "lines.linewidth": 1.9, "lines.solid_capstyle": "round", "lines.solid_joinstyle": "round",
    "legend.frameon": False, "legend.labelcolor": LIGHT["quiet"], "figure.facecolor": "none", "axes.facecolor": "none",
    "svg.fonttype": "none", "pdf.fonttype": 42, "path.simplify": False,
}  # fmt: skip


@contextmanager
def drawing(salt: str = "") -> Iterator[None]:
    """matplotlib with our settings, without the user's matplotlibrc; restores the previous settings at the end."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": f"dodistill {salt}"})
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the page's font has more letters than DejaVu Sans
        yield


def printable(text: str) -> str:
    """The text on one line, without control characters and unpaired surrogates, which are invalid in SVG."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def new_figure(height: float) -> Figure:
    """An empty figure of WIDTH x `height` pixels; call it inside `drawing`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH / 72, height / 72), dpi=72)


@dataclass(frozen=True)
class Plot:
    """A figure of a page: `{{ plot }}` in a template is its SVG, or without a figure its label."""

    name: str  #: of its PDF
    label: str  #: the alternative text; without a figure, the text in its place
    figure: Figure | None = None

    def __html__(self) -> str:
        if self.figure is None:
            return str(escape(f"{self.label}").join(("<p class='quiet'>", "</p>")))
        return _for_page(self._saved("svg").decode(), self.label)

    __str__ = __html__

    def pdf(self) -> bytes:
        """The figure for a paper: TrueType fonts inside, no date."""
        return self._saved("pdf")

    def _saved(self, kind: str) -> bytes:
        assert self.figure is not None
        nothing = {"svg": ("Date", "Creator", "Format", "Type"), "pdf": ("CreationDate", "Creator", "Producer")}[kind]
        data = io.BytesIO()
        with drawing(self.name):
            self.figure.savefig(data, format=kind, metadata=dict.fromkeys(nothing))
        return data.getvalue()


_COLOUR = re.compile(r"#[0-9a-f]{6}")
_FONT = re.compile(r"(?:(\w+) )?([\d.]+px)")
_DIGITS = re.compile(r"-?\d+\.\d+")
_OURS = "class "  #: an artist with the gid "class NAME" is a group with that class in the SVG
_LINK = "{http://www.w3.org/1999/xlink}href"


def _for_page(text: str, label: str) -> str:
    """matplotlib's SVG, as an element of the page."""
    label = printable(label)
    root = ET.fromstring(text)
    used = set(re.findall(r"#([a-z][0-9a-f]{10})\b", text))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style", "}clipPath")):
                parent.remove(child)
    for part in root.iter():
        part.tag = part.tag.rpartition("}")[2]
        part.text = part.text if part.tag == "text" else None
        part.tail = None
        _clean(part, used)
    root.attrib = {"class": "plot", "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    title = ET.Element("title")
    title.text = label
    root.insert(0, title)
    return ET.tostring(root, encoding="unicode")


def _clean(part: ET.Element, used: set[str]) -> None:
    """Attributes of one element: short, with the page's variables for colours, and without unused ids."""
    name = part.attrib.pop("id", "")
    part.attrib.pop("clip-path", None)
    if name.startswith(_OURS):
        part.set("class", name.removeprefix(_OURS))
    elif name in used:
        part.set("id", name)
    if _LINK in part.attrib:
        part.set("href", part.attrib.pop(_LINK).replace("\n", ""))
    for key in ("d", "x", "y"):
        if key in part.attrib:
            numbers = _DIGITS.sub(lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), part.attrib[key])
            part.set(key, " ".join(numbers.split()))
    if part.attrib.get("transform", "").startswith("rotate(-0 "):
        del part.attrib["transform"]
    if "style" in part.attrib:
        pairs = (pair.partition(":") for pair in part.attrib["style"].split(";"))
        style = {key.strip(): value.strip() for key, _, value in pairs if value}
        style.pop("font-family", None)
        if font := _FONT.match(style.pop("font", "")):  # matplotlib before 3.10
            style |= {"font-weight": font[1], "font-size": font[2]} if font[1] else {"font-size": font[2]}
        inherited = {"stroke-dashoffset": "0", "stroke-linejoin": "round", "text-anchor": "start"}
        kept = [f"{k}:{v}" for k, v in style.items() if inherited.get(k) != v]
        part.set("style", _COLOUR.sub(lambda m: f"var(--{_NAME[m[0]]})" if m[0] in _NAME else m[0], ";".join(kept)))
