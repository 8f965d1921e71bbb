"""SIGKILL at random instants: each run must end in the bits of one that was not killed.

    python soak/kills.py [--kills 200] [--seed 0]

Runs of every source, update and replay in turn, at the size of the tests, with a checkpoint after every step, so that
many kills fall into the writing of one. A run is killed up to `--most` times, at an instant drawn over its whole
length, and started again by the same command. At the end, weights, metrics and class shares are compared with those of
an uninterrupted run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from forked import ended, kill, start
from safetensors.torch import load_file

from dodistill.data.images import load_images
from dodistill.engine.teach import Teach, teach
from dodistill.models import load_model, save_model
from helpers import SOURCES, metrics, tree  # of tests/

UPDATES: list[dict[str, Any]] = [
    {},
    {"update": "replay", "replay": {"name": "bank", "size": 8, "every": 1, "first": 1}},
    {"update": "replay", "replay": {"name": "ema_generator", "size": 8}},
    {"update": "retain", "replay": {"name": "bank", "size": 8, "every": 1, "first": 1}},
    {"update": "retain", "replay": {"name": "generative", "size": 8, "new": 8, "train": 1, "latent": 4, "width": 4}},
]
ARMS = ("none", "kdci+stratified")


def same(a: Path, b: Path) -> str:
    """What differs between two finished runs; "" for nothing."""
    mine, theirs = load_file(a / "student.safetensors"), load_file(b / "student.safetensors")
    if mine.keys() != theirs.keys() or not all(torch.equal(mine[k], theirs[k]) for k in mine):
        return "weights"
    if metrics(a) != metrics(b):
        return "metrics"
    shares = [json.loads((p / "summary.json").read_text())["class_shares"] for p in (a, b)]
    return "" if shares[0] == shares[1] else "class shares"


def grids(kills: int, dice: random.Random, root: Path) -> list[str]:
    """Kill `compare --jobs 2` and its children together; in the end all cells must be those of a grid that was not."""
    base = tree("fast", steps=60, teacher=str(root / "t.safetensors"), student="tiny4")
    base["loop"] |= {"checkpoint_seconds": 0.0}
    recipe = root / "grid.yaml"
    recipe.write_text(yaml.safe_dump(json.loads(json.dumps({"base": base, "grid": {"seed": [0, 1, 2]}}))))

    def command(out: Path) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-P", "-m", "dodistill", "compare", str(recipe), "--out", str(out), "--jobs", "2"]
        with open(root / "log", "ab") as log:
            return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)

    def cells(out: Path) -> dict[str, Any]:
        found = [json.loads(p.read_text()) for p in sorted((out / "cells").glob("*.json"))]
        return {r["key"]: [r["agreement"], r["summary"]["class_shares"], r["summary"]["log"]] for r in found}

    clock = time.monotonic()
    command(root / "grid-whole").wait()
    length, done, out = time.monotonic() - clock, 0, root / "grid-cut"
    while done < kills:
        process = command(out)
        try:
            process.wait(dice.uniform(0.3, 1.0) * length)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
            continue
        shutil.rmtree(out)  # it ended: begin another
    command(out).wait()
    same = cells(root / "grid-whole") == cells(out) and len(cells(out)) == 3
    print(f"{done} kills of compare --jobs 2: the cells are {'the same' if same else 'NOT the same'}")
    return [] if same else ["compare: the cells differ"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--each", action="store_true", help="each combination once, however many kills")
    parser.add_argument("--most", type=int, default=8, help="kills of one run")
    parser.add_argument("--grids", type=int, default=10, help="kills of `compare --jobs 2` with its children")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dice, root = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="soak-"))
    digits = load_images("digits")
    model = load_model("tiny8", num_classes=10, in_channels=1, image_size=8, mean=[0.3], std=[0.4], seed=0)
    teach(model, digits, None, Teach(epochs=4, batch=64, pad=1, flip=False, minival=0.0))
    save_model(model, root / "t.safetensors")
    kills = lives = runs = writing = refused = 0
    wrong: list[str] = []
    begun = time.monotonic()
    kinds = itertools.cycle(itertools.product(sorted(SOURCES), UPDATES, ARMS))
    order = [next(kinds) for _ in range(len(SOURCES) * len(UPDATES) * len(ARMS))]
    dice.shuffle(order)
    for source, update, arm in order if args.each else itertools.cycle(order):
        if kills >= args.kills and not args.each:
            break
        whole, cut, recipe = root / f"{runs}-whole", root / f"{runs}-cut", root / f"{runs}.yaml"
        more = {"teacher": str(root / "t.safetensors"), "student": "tiny4", "data.unlabeled": "digits"}
        more |= {"loop.checkpoint_seconds": 0.0, "loop.seed": runs, **update}
        recipe.write_text(yaml.safe_dump(json.loads(json.dumps(tree(source, arm, steps=12, **more)))))
        words = ["distill", str(recipe), "--quiet", "--no-report", "--out"]
        clock = time.monotonic()
        status = ended(start([*words, str(whole)], root / "log"), 120)
        length = time.monotonic() - clock
        if status == 2:  # a combination that dodistill refuses: no generator to average, too few images to replay
            refused += 1
            shutil.rmtree(whole, ignore_errors=True)
            continue
        if status != 0:
            wrong.append(f"{source} {update} {arm}: the whole run ended with {status}")
            print((root / "log").read_text()[-400:])
            runs += 1
            continue
        status = None
        for _ in range(args.most):
            child = start([*words, str(cut)], root / "log")
            lives += 1
            status = ended(child, dice.uniform(0, 1.1 * length))
            if status is not None:
                break
            kill(child)
            kills += 1
            writing += any(cut.glob(".*.tmp"))
        if status is None:
            status = ended(start([*words, str(cut)], root / "log"), 120)
            lives += 1
        if status != 0:
            wrong.append(f"{source} {update} {arm}: ended with {status}: {(root / 'log').read_text()[-300:]}")
        elif differs := same(whole, cut):
            wrong.append(f"{source} {update} {arm}: {differs} differ")
        runs += 1
        if sys.stderr.isatty() or runs % 10 == 0:
            print(
                f"{kills} kills of {args.kills}, {runs} runs, {len(wrong)} wrong, {time.monotonic() - begun:.0f} s",
                flush=True,
            )
        for path in (whole, cut):
            shutil.rmtree(path, ignore_errors=True)
    print(f"{refused} combinations were refused") if refused else None
    print(f"{kills} kills ({writing} while a file was being written), {runs} runs, {lives} lives: {len(wrong)} wrong")
    if args.grids:
        wrong += grids(args.grids, dice, root)
    for line in wrong:
        print(f"  {line}")
    shutil.rmtree(root)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
