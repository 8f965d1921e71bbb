"""Random bad inputs: settings, damaged files, damaged images. Each must be refused in one message, or be harmless.

    python soak/inputs.py [--settings 400] [--files 400] [--images 2000] [--seed 0]

Settings: each setting of each method with a value of another type, negative, NaN, infinite or huge. Files: weights,
metadata, arrays, recipes, configs, summaries, checkpoints and pools with bytes changed, cut or added. Images: files of
each format, damaged likewise. A case fails with a traceback, an unexpected error, no end within 60 s (settings that ask
for more work are left out), or a file in the folder that was not there before a refusal.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from forked import ended, kill, start
from PIL import Image

from dodistill.config import registry
from dodistill.config.tree import PLAIN, resolve
from dodistill.data import folder
from dodistill.data.images import load_images
from dodistill.engine.teach import Teach, teach
from dodistill.models import load_model, save_model
from helpers import SOURCES, tree  # of tests/

VALUES = ["-1", "-0.5", "nan", "inf", "word", "[1, 2]", "", "0", "null", "true", "1e30", str(2**70), "{a: 1}", "\u2603"]
#: They ask for as much work or memory as they say; so large values are no mistake.
AMOUNTS = ("loop.steps", "loop.batch", "source.iterations", "source.K", "pool.capacity")
PATIENCE = 60.0


class Tally:
    """Outcomes by kind, and what went wrong."""

    def __init__(self, verbose: bool = False) -> None:
        self.verbose = verbose
        self.count: Counter[str] = Counter()
        self.wrong: list[str] = []

    def judge(self, name: str, status: int | None, said: str, left: bool = False) -> None:
        kind = "refused" if status == 2 else "ran" if status == 0 else "stopped" if status == 75 else "failed"
        if status is None:
            kind = "no end"
        elif "Traceback" in said:
            kind = "unexplained"
        left = left and "not finite" not in said  # a run that diverged has begun
        if kind in ("failed", "no end", "unexplained") or (kind == "refused" and left):
            self.wrong.append(f"{name}: {kind}{' and left files' if left else ''}: {said.strip()[-300:]}")
        self.count[kind] += 1
        if self.verbose:
            print(f"{kind:<10} {name}: {said.strip()[-200:]}", flush=True)


def settings(n: int, dice: random.Random, root: Path, tally: Tally) -> None:
    """Settings of the command line."""
    cases = []
    for source in sorted(SOURCES):
        for part, cls in (("source", registry.config("source", source)), *PLAIN.items()):
            for field in dataclasses.fields(cls):
                cases += [(source, f"{part}.{field.name}", value) for value in VALUES]
    for axis in ("criterion", "update", "replay"):
        for name in registry.names(axis):
            for field in dataclasses.fields(registry.config(axis, name)):
                cases += [("fast", f"{axis}={name} {axis}.{field.name}", value) for value in VALUES]
    for source, key, value in dice.sample(cases, min(n, len(cases))):
        if key in AMOUNTS and value in ("1e30", str(2**70)):
            continue
        recipe = root / "base.yaml"
        more = {"teacher": "t.safetensors", "student": "tiny4", "data.unlabeled": "digits"}
        recipe.write_text(json.dumps(resolve(tree(source, steps=2, **more)).to_tree()))
        chosen, _, last = key.rpartition(" ")
        words = ["distill", "base.yaml", "--quiet", "--no-report", "--out", "new"]
        words += [f"--{chosen}"] if chosen else []
        one(f"--{last} {value} ({source})", [*words, f"--{last}", value], root, tally)


def one(name: str, words: list[str], root: Path, tally: Tally) -> None:
    """Run a command in a child, and judge how it ends."""
    log = root.parent / "log"
    log.unlink(missing_ok=True)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    child = start(words, log, memory_gb=16)
    status = ended(child, PATIENCE)
    if status is None:
        kill(child)
    said = log.read_text(errors="replace") if log.exists() else ""
    after = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    tally.judge(name, status, said, left=status == 2 and after.keys() != before.keys())
    shutil.rmtree(root / "new", ignore_errors=True)


def damaged(data: bytes, dice: random.Random) -> bytes:
    """The same with bytes changed, cut, doubled or added."""
    out, kind = bytearray(data), dice.randrange(5)
    if kind == 0 or len(out) < 4:
        return bytes(out[: dice.randrange(len(out) + 1)])
    if kind == 1:
        for _ in range(dice.randrange(1, 8)):
            out[dice.randrange(len(out))] = dice.randrange(256)
    elif kind == 2:
        at = dice.randrange(min(len(out), 256))
        out[at : at + dice.randrange(1, 16)] = bytes(dice.randrange(256) for _ in range(dice.randrange(16)))
    elif kind == 3:
        at = dice.randrange(len(out))
        out[at:at] = out[: dice.randrange(64)]
    else:
        out[dice.randrange(min(64, len(out)))] ^= 1 << dice.randrange(8)
    return bytes(out)


def files(n: int, dice: random.Random, root: Path, tally: Tally) -> None:
    """Files that a command reads."""
    again = ["distill", "base.yaml", "--quiet", "--no-report", "--out", "run"]
    recipe = {"base": {"teacher": "t.safetensors", "student": "tiny4"}, "grid": {"seed": [0]}}
    (root / "grid.yaml").write_text(json.dumps(recipe, indent=1))
    more = {"teacher": "t.safetensors", "student": "tiny4"}
    (root / "base.yaml").write_text(json.dumps(resolve(tree("fast", steps=2, **more)).to_tree(), indent=1))
    log = root.parent / "log"
    assert ended(start(again, log), 60) == 0, log.read_text()
    np.savez(root / "d.npz", x_test=np.zeros((40, 8, 8), np.uint8), y_test=np.arange(40) % 10)
    torch.save(load_model(str(root / "t.safetensors")).model.state_dict(), root / "w.pt")
    evaluate = ["evaluate", "t.safetensors", "--test", "d.npz"]
    reads: list[tuple[str, list[str], tuple[str, ...]]] = [
        ("t.safetensors", evaluate, ()), ("d.npz", evaluate, ()), ("base.yaml", again[:-1] + ["new"], ()),
        ("w.pt", ["evaluate", "tiny8", "--weights", "w.pt", "--image-shape", "1,8,8", "--test", "d.npz"], ()),
        ("grid.yaml", ["compare", "grid.yaml", "--dry-run"], ()),
        ("run/config.json", again, ()), ("run/summary.json", again, ()), ("run/config.json", ["report", "run"], ()),
        ("run/metrics.jsonl", ["report", "run"], ()), ("run/summary.json", ["report", "run"], ()),
        ("run/checkpoint.pt", again, ("run/summary.json",)), ("run/student.safetensors", again, ("run/checkpoint.pt",)),
        (next(p.name for p in (root / "run").glob("pool-*.pt")), ["export", "run", "new"], ()),
    ]  # fmt: skip
    kept = root.parent / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(root, kept)
    for i in range(n):
        name, words, gone = reads[i % len(reads)]
        name = f"run/{name}" if name.startswith("pool-") else name
        for other in gone:
            (root / other).unlink()
        path = root / name
        path.write_bytes(damaged(path.read_bytes(), dice))
        one(f"{name}, case {i}: {' '.join(words[:2])}", words, root, tally)
        for other in (name, *gone):
            shutil.copy(kept / other, root / other)
        shutil.rmtree(root / "run")
        shutil.copytree(kept / "run", root / "run")


def images(n: int, dice: random.Random, root: Path, tally: Tally) -> None:
    """Image files, decoded in this process."""
    made: dict[str, bytes] = {}
    picture = Image.fromarray((np.random.default_rng(0).random((24, 20, 3)) * 255).astype(np.uint8))
    for kind in (*folder.FORMATS, "TGA", "ICO", "DDS", "PCX", "SGI", "JPEG2000"):
        data = io.BytesIO()
        try:
            picture.save(data, format=kind)
        except (KeyError, OSError):  # not in this Pillow
            continue
        made[kind] = data.getvalue()
    here = root / "images"
    here.mkdir()
    (here / "good.png").write_bytes(made["PNG"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(n):
            kind = sorted(made)[i % len(made)]
            (here / "a.img").write_bytes(damaged(made[kind], dice))
            try:
                found = load_images(here, image_shape=(3, 8, 8), labels=False)
                tally.count["skipped" if found.skipped else "read"] += 1
            except BaseException as error:
                tally.count["traceback"] += 1
                tally.wrong.append(f"{kind}, case {i}: {type(error).__name__}: {error}")
    shutil.rmtree(here)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--settings", type=int, default=400)
    parser.add_argument("--files", type=int, default=400)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print every case")
    args = parser.parse_args()
    import os

    top = Path(tempfile.mkdtemp(prefix="inputs-"))
    root = top / "here"
    root.mkdir()
    os.chdir(root)
    digits = load_images("digits")
    model = load_model("tiny8", num_classes=10, in_channels=1, image_size=8, mean=[0.3], std=[0.4], seed=0)
    teach(model, digits, None, Teach(epochs=2, batch=64, pad=1, flip=False, minival=0.0))
    save_model(model, root / "t.safetensors")
    parts: dict[str, tuple[int, Callable[[int, random.Random, Path, Tally], None]]] = {
        "settings": (args.settings, settings), "files": (args.files, files), "images": (args.images, images),
    }  # fmt: skip
    bad = False
    for name, (n, part) in parts.items():
        tally = Tally(args.verbose)
        if n:
            part(n, random.Random(args.seed), root, tally)
        bad |= bool(tally.wrong)
        print(f"{name}: {sum(tally.count.values())} cases; {dict(tally.count)}; {len(tally.wrong)} wrong", flush=True)
        for line in tally.wrong:
            print(f"  {line}")
    os.chdir("/")
    shutil.rmtree(top)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
