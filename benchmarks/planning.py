"""The time that `compare` takes to plan a grid: to resolve its cells, and to find their records.

    python benchmarks/planning.py [--recipe recipes/table1.yaml]

"older records": every cell has one, of a version that lacked two settings.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path


def timed(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parent.parent / "recipes" / "table1.yaml")
    path = parser.parse_args().recipe
    began = time.process_time()
    from dodistill.config.grid import Records, cells, read_recipe

    imports, teachers = time.process_time() - began, Path("teachers")
    resolved = timed(lambda: list(cells(read_recipe(path), teachers)))  # the first time also imports the methods
    chosen = list(cells(read_recipe(path), teachers))
    old = [{"config": cell.config.to_tree()} for cell in chosen]
    for record in old:
        del record["config"]["pool"]["holdout"], record["config"]["optim"]["momentum"]
    records: list[Records] = []
    read = timed(lambda: records.append(Records(old, teachers)))
    found = timed(lambda: [records[0].find(cell) for cell in chosen])
    assert all(records[0].find(cell) is not None for cell in chosen)
    print("| recipe | cells | imports, s | cells resolved, s | older records read, s | found, s |")
    print("|---|---:|---:|---:|---:|---:|")
    print(f"| {path.stem} | {len(chosen)} | {imports:.2f} | {resolved:.2f} | {read:.2f} | {found:.2f} |")


if __name__ == "__main__":
    main()
