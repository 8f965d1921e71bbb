"""Does the agreement on held-back inputs tell how good a student is? Over the committed cells of all grids.

    python benchmarks/agreement.py [--results results] [--least 6]

Prints, for each source and test set with enough cells, the range of the agreement with the teacher on held-back inputs,
that of the test accuracy as a share of the teacher's, the range of their difference in points, and Spearman's rank
correlation of the two. It reads the cells' JSON, and runs nothing.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dodistill.evaluation.ranking import correlation

Point = tuple[float, float]  # agreement in %; test accuracy in % of the teacher's


def points(folder: Path) -> Iterator[tuple[str, str, Point]]:
    """(test set, source, point) of each cell with a test accuracy; a cell that lies in two folders counts once."""
    seen = set()
    for file in sorted(folder.glob("*/cells/*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        agreement, last, teacher = cell["summary"].get("agreement_last"), cell.get("last"), cell.get("teacher")
        if agreement and last and teacher and cell["key"] not in seen:
            seen.add(cell["key"])
            yield cell["config"]["data"]["test"], cell["config"]["source"]["name"], (agreement, 100 * last / teacher)


def row(name: str, found: Sequence[Point]) -> str:
    a, b = (np.array(column) for column in zip(*found))
    spans = [f"{v.min():.0f} to {v.max():.0f}" for v in (a, b)] + [f"{(a - b).min():+.0f} to {(a - b).max():+.0f}"]
    return f"| {name} | {len(found)} | {' | '.join(spans)} | {correlation(*zip(*found)):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent.parent / "results")
    parser.add_argument("--least", type=int, default=6, help="cells that a row needs")
    args = parser.parse_args()
    groups: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for test, source, point in points(args.results):
        groups[test, source].append(point)
    print(
        "| test set, source | cells | agreement, % | accuracy, % of the teacher's | difference, points "
        "| rank correlation |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for (test, source), found in sorted(groups.items()):
        if len(found) >= args.least:
            print(row(f"{test}, `{source}`", found))
    print(row("all", [point for found in groups.values() for point in found]))


if __name__ == "__main__":
    main()
