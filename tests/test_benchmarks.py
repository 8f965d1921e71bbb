"""Every benchmark runs, at a size at which its numbers mean nothing."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = "--teacher tiny8 --student tiny8 --batch 8 --rounds 1 --precision fp32"
#: what each is run with, and what it prints
RUNS = {
    "step": (f"{SMALL} --pool 50 --views 2", "throughput"),
    "kdci": (f"{SMALL} --clusters 4", "F alone"),
    "update": (f"{SMALL} --share 1", "exact"),
    "synthesis": (
        "--batch 8 --rounds 1 --iterations 1 --teacher wrn16_1 --student tiny8 --image 16 --sources fast dfnd "
        "--profile",
        "| fast |",
    ),
    "cid": (f"{SMALL} --counts 10 --pool 50", "CID / KD"),
    "upsample": ("--batch 2 --rounds 1 --image 16", "times as fast"),
    "predict": (f"{SMALL} --image 8", "at once"),
    "scale": (f"{SMALL} --image 8 --pools 100 200 --counts 10 20 --clusters 4 8", "| 200 |"),
    "rows": ("--n 120 --side 16 --steps 4 --batch 8 --rounds 1 --fits 60 --written 100", "the same bits"),
    "agreement": ("--least 30", "| cifar10, `fast` |"),
    "pictures": ("--out .", "| `hour` | 60 |"),
    "planning": (f"--recipe {BENCHMARKS.parent / 'recipes' / 'mnist.yaml'}", "| mnist | 18 |"),
    "whole": (f"{SMALL} --teacher wrn16_1 --image 16 --K 1 --width 4 --real-steps 4 --views 2", "measured parts"),
}  # fmt: skip
#: these take minutes at any size, or start processes of their own
NOT_HERE = {"allocator", "imagenet_size", "papers", "view", "measure"}


def test_each_is_run_here_or_named() -> None:
    assert {p.stem for p in BENCHMARKS.glob("*.py")} == set(RUNS) | NOT_HERE


@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_runs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, said = RUNS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    assert said in capsys.readouterr().out
