"""DFND on more images than fit into memory: peak memory, checkpoint, resumption, and the cost of reading rows.

    python benchmarks/rows.py [--n 600000] [--side 224] [--steps 20]

The packed file is sparse: 600 000 images of 3x224x224 pixels claim 90 GB and take no room on the disk, except for
`--written` images of random pixels, evenly spaced. The teacher labels all, DFND keeps the half with the most confident
predictions, and the student learns from these. The networks are small (one strided convolution), so that reading
counts. A second start loads the checkpoint of the middle and must end in the same bits. Then steps that read from the
file alternate with steps on a tensor of as many images as `--fits` says; both in wall time. The file's pages are in the
system's cache where the machine has the memory; `--cold` drops them before each step (with `--written` as large as
`--n`, since a hole of a sparse file needs no disk).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dodistill.commands.cli import keep_memory
from dodistill.config.tree import resolve
from dodistill.core.runtime import peak_memory_mb
from dodistill.core.watch import Watcher
from dodistill.data.rows import FileRows, Rows
from dodistill.engine import Distiller, Job
from dodistill.engine.run_folder import RunFolder, fingerprint
from dodistill.functional.fresh_weights import seeding


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=600_000, help="images in the file")
    parser.add_argument("--side", type=int, default=224, help="height and width")
    parser.add_argument("--steps", type=int, default=20, help="steps of the student")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--written", type=int, default=512, help="images with pixels; the others are zero")
    parser.add_argument("--fits", type=int, default=2000, help="images of the tensor to compare with")
    parser.add_argument("--rounds", type=int, default=6, help="alternations of the comparison")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="drop the file from the system's cache before each step")
    parser.add_argument("--folder", default=None, help="where the sparse file is made; default: the system's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()  # as the command line does
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run(args, Path(folder))


def run(args: argparse.Namespace, folder: Path) -> None:
    shape = (3, args.side, args.side)
    file = folder / "images.npy"
    pixels = np.lib.format.open_memmap(file, "w+", np.uint8, (args.n, *shape))
    random = np.random.default_rng(0)
    for row in np.linspace(0, args.n - 1, min(args.written, args.n)).astype(int):
        pixels[row] = random.integers(0, 256, shape, np.uint8)
    del pixels
    rows = FileRows(file)
    on_disk = file.stat().st_blocks * 512 / 1e6
    print(f"{args.n:,} images of {shape}: {rows.nbytes / 1e9:.1f} GB claimed, {on_disk:.0f} MB on the disk")

    config = resolve({
        "source": {"name": "dfnd", "n": args.n // 2, "chunk": 32}, "criterion": "kl", "pool": {"capacity": args.n},
        "augment": {"pad": 4, "flip": True, "views": 0},
        "loop": {"steps": args.steps, "batch": args.batch, "precision": "fp32", "threads": args.threads},
    })  # fmt: skip

    def begin(images: Rows | torch.Tensor) -> Distiller:
        return Distiller(Job(config, network(0), network(1), shape, images))

    it, run_folder = begin(rows), RunFolder(folder / "run", config)
    it.settle()
    start = time.perf_counter()
    it.acquire(Watcher())
    took = time.perf_counter() - start
    print(f"labelled, selected and split: {took:.0f} s, {args.n / took:,.0f} images/s; pool {len(it.acquirer.pool):,}")
    for _ in range(args.steps // 2):
        it.match()
    it.save(run_folder)
    size = sum(p.stat().st_size for p in (folder / "run").glob("*.pt")) / 1e6
    for _ in range(args.steps - args.steps // 2):
        it.match()
    print(f"peak resident memory after {args.steps} steps: {peak_memory_mb(torch.device('cpu')) or 0:,.0f} MiB")
    print(f"checkpoint: {size:.1f} MB")

    again = begin(rows)
    saved = run_folder.load()
    assert saved is not None
    again.load_state_dict(*saved)
    while again.step < args.steps:
        again.match()
    same = fingerprint(it.matcher.student.state_dict().values()) == fingerprint(
        again.matcher.student.state_dict().values()
    )
    run_folder.close()
    print(f"resumed in the middle: {'the same bits' if same else 'OTHER BITS'}")

    memory = begin(rows[torch.linspace(0, args.n - 1, args.fits).long()])
    memory.settle()
    memory.acquire(Watcher())
    found: dict[str, list[float]] = {"file": [], "tensor": []}
    for i in range(args.rounds + 1):
        for name, which in (("file", it), ("tensor", memory)) if i % 2 else (("tensor", memory), ("file", it)):
            if args.cold:
                evict(file)
            start = time.perf_counter()
            which.match()
            if i:
                found[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(found["file"], found["tensor"])]
    print(
        f"a step on the file {1e3 * statistics.median(found['file']):.0f} ms, on a tensor "
        f"{1e3 * statistics.median(found['tensor']):.0f} ms; ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


def evict(file: Path) -> None:
    """Drop a file from the system's cache."""
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def network(seed: int) -> nn.Module:
    """One convolution of 8x8 patches, and a linear layer: images in [0, 1] to 10 logits."""
    with seeding(seed):
        return nn.Sequential(
            nn.Conv2d(3, 16, 8, 8, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
            nn.Linear(256, 10),
        )  # fmt: skip


if __name__ == "__main__":
    main()
