"""The pictures of docs/results.md that are drawn from committed cells.

    python benchmarks/pictures.py [--results results] [--out docs/images]

`minutes.svg`: test accuracy at the last step against the minutes of one CPU core, by preset of `fast`, the mean and the
range of the seeds, from `recipes/minutes.yaml`; at 60 minutes from `recipes/hour.yaml`, whose settings are the same. It
reads the cells' JSON, and runs nothing.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from dodistill.report.canvas import LIGHT, Plot, drawing
from dodistill.report.plots import Series, lines


def minutes(results: Path) -> tuple[Plot, list[str]]:
    """The plot, and the rows of its table: preset, minutes, accuracy of each seed."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells(results / "minutes"):
        label = cell["label"]
        found[label["preset"]][float(label["minutes"])].append(cell["last"])
    for cell in cells(results / "hour"):
        if cell["config"]["source"]["name"] == "fast" and cell["config"]["loop"]["time"] == "60m":
            found["hour"][60.0].append(cell["last"])
    series, rows = [], []
    for preset, by_time in sorted(found.items()):
        x = sorted(by_time)
        means = [sum(by_time[t]) / len(by_time[t]) for t in x]
        half = [(max(by_time[t]) - min(by_time[t])) / 2 for t in x]
        series.append(Series(f"preset {preset}", x, means, half))
        rows += [f"| `{preset}` | {t:g} | {', '.join(f'{v:.2f}' for v in by_time[t])} |" for t in x]
    label = "Test accuracy after minutes of one CPU core, without data, by preset of fast"
    return lines(label, series, y_label="accuracy", x_label="minutes of one core", unit=" %"), rows


def cells(grid: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(grid.glob("cells/*.json"))]


def save(plot: Plot, path: Path) -> None:
    assert plot.figure is not None
    with drawing(plot.name):
        plot.figure.savefig(path, facecolor=LIGHT["page"], metadata={"Date": None})
    print(path)


def main() -> None:
    root = Path(__file__).parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=root / "results")
    parser.add_argument("--out", type=Path, default=root / "docs" / "images")
    args = parser.parse_args()
    plot, rows = minutes(args.results)
    print("\n".join(["| preset | minutes | last step, by seed |", "|---|---:|---|", *rows]))
    save(plot, args.out / "minutes.svg")


if __name__ == "__main__":
    main()
