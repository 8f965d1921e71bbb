"""The pages in a real browser: nothing fails to load, no error, nothing cut off, readable on a phone, dark and light.

The pictures are kept for a person: in the folder DODISTILL_SCREENSHOTS, or in the test's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser, installed
from dodistill.api import distill_config
from dodistill.commands.compare import record_of_summary
from dodistill.commands.look import look
from dodistill.config.tree import resolve
from dodistill.report.compare_page import write_compare
from dodistill.report.report import write_report
from helpers import tree

pytest.importorskip("sklearn")
CHROMIUM = installed()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH: the pages were not opened"
)

PHONE, DESK = 375, 1280
READABLE = 9.0  #: pixels: the smallest text in a figure
CONTRAST = 4.5  #: of text against the page (WCAG AA)

#: what is wrong with a page that has loaded, as a list of sentences
FAULTS = """(() => {
  const faults = [], root = document.documentElement, edge = 1.5;
  if (root.scrollWidth > root.clientWidth)
    faults.push(`the page is ${root.scrollWidth} pixels wide in a window of ${root.clientWidth}`);
  for (const image of document.images)
    if (!image.naturalWidth) faults.push(`an image is broken: ${image.alt}`);
  const channels = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255);
  const light = colour => channels(colour).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const page = light(getComputedStyle(document.body).backgroundColor);
  for (const plot of document.querySelectorAll("svg.plot")) {
    const box = plot.getBoundingClientRect(), name = plot.getAttribute("aria-label");
    if (!name) faults.push("a figure has no name");
    const texts = [...plot.querySelectorAll("text")].map(t => [t, t.getBoundingClientRect()]);
    for (const [t, r] of texts) {
      const inside = r.left > box.left - edge && r.right < box.right + edge;
      if (!inside || r.top < box.top - edge || r.bottom > box.bottom + edge)
        faults.push(`"${t.textContent}" is cut off in: ${name}`);
      const size = parseFloat(getComputedStyle(t).fontSize) * plot.getScreenCTM().a;
      if (size < READABLE) faults.push(`"${t.textContent}" is ${size.toFixed(1)} pixels high in: ${name}`);
      const [a, b] = [light(getComputedStyle(t).fill), page].sort((a, b) => b - a);
      if ((a + .05) / (b + .05) < CONTRAST) faults.push(`"${t.textContent}" is too faint in: ${name}`);
    }
    if (plot.querySelector(".points")) continue;  // the classes of a map lie where they lie
    texts.forEach(([t, r], i) => texts.slice(i + 1).forEach(([u, s]) => {
      if (Math.min(r.right, s.right) - Math.max(r.left, s.left) > edge &&
          Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top) > edge)
        faults.push(`"${t.textContent}" and "${u.textContent}" overlap in: ${name}`);
    }));
  }
  return faults;
})()""".replace("READABLE", str(READABLE)).replace("CONTRAST", str(CONTRAST))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as it:
        yield it


@pytest.fixture(scope="module")
def pages(teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report, a comparison and a look, from four short runs."""
    folder = tmp_path_factory.mktemp("pages")
    records = []
    data = {"unlabeled": "strokes:300", "test": "digits", "image_shape": [1, 8, 8]}
    for arm in ("none", "kdci+stratified"):
        for seed in (0, 1):
            models = {"teacher": {"spec": str(teacher_file)}, "student": {"spec": "tiny4"}}
            given = tree("dfnd", arm, steps=40, data=data, **models)
            given["loop"]["seed"] = seed
            result = distill_config(resolve(given), folder / f"{arm}-{seed}", verbose=False, report=False)
            label = {"source": "dfnd", "intervention": arm, "seed": str(seed)}
            records.append(record_of_summary(label, result.summary) | {"published": 88.0 if seed else None})
    runs = [folder / "none-0", folder / "kdci+stratified-0"]
    look(runs, "digits", folder / "look.html", n=120)
    return {
        "report": write_report(runs[1], pdf=False),
        "compare": write_compare(records, folder / "compare.html", pdf=False),
        "look": folder / "look.html",
    }


def faults(browser: Browser, page: Path, width: int, dark: bool) -> list[str]:
    browser.open(page, width, dark=dark)
    return browser.complaints + browser.evaluate(FAULTS)


@pytest.mark.slow
def test_the_pages_in_a_browser(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    shots = Path(os.environ.get("DODISTILL_SCREENSHOTS") or tmp_path)
    shots.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[str]] = {}
    for name, page in pages.items():
        for width in (PHONE, DESK):
            for dark in (False, True):
                which = f"{name}-{width}-{'dark' if dark else 'light'}"
                found[which] = faults(browser, page, width, dark)
                assert browser.picture(shots / f"{which}.png").stat().st_size > 20_000
        assert browser.print(shots / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert browser.evaluate("document.querySelectorAll('svg.plot').length") >= 2
    print(f"pictures of the pages: {shots}")
    assert {k: v for k, v in found.items() if v} == {}, f"pictures of the pages: {shots}"


BROKEN = {
    "failed to load": ("</header>", '</header><img src="missing.png" alt="gone">'),
    "script": ("</header>", "</header><script>nowhere()</script>"),
    "asks for": ("</header>", '</header><link rel="stylesheet" href="http://localhost:9/x.css">'),
    "pixels wide": ("</header>", '</header><div style="width:500px">wide</div>'),
    "an image is broken": ("</header>", '</header><img src="data:image/png;base64,AAAA" alt="torn">'),
    "is cut off": ("</svg>", '<text x="335" y="100" style="font-size:10.5px">too far to the right</text></svg>'),
    "pixels high": ("</svg>", '<text x="100" y="100" style="font-size:4px">tiny</text></svg>'),
    "is too faint": ("</svg>", '<text x="100" y="100" style="font-size:10.5px;fill:#ddd">faint</text></svg>'),
    "overlap": ("</svg>", '<text x="9" y="9" style="font-size:20px">over the legend</text></svg>'),
    "has no name": ('aria-label="', 'data-label="'),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_is_noticed(fault: str, browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    old, new = BROKEN[fault]
    broken = tmp_path / "broken.html"
    text = pages["compare"].read_text()
    assert old in text
    broken.write_text(text.replace(old, new))
    assert any(fault in said for said in faults(browser, broken, PHONE, dark=False))
