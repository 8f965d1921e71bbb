"""What the cells of a paper's table need: each one at its true size, for two steps, with made-up weights and images.

    python benchmarks/papers.py recipes/table2.yaml
    python benchmarks/papers.py recipes/table3.yaml --arm kdci --where student=resnet18
    python benchmarks/papers.py recipes/table3.yaml --arithmetic

Image sizes, batches, networks and the numbers of classes are the recipe's. Made-up are the weights, 64 unlabelled
images, and the number of iterations of an acquisition (one for each resolution). Each cell is a process of its own,
since its peak of resident memory is one of the figures. Then the whole cell by arithmetic: from the recipe's numbers of
steps and acquisitions, and the multiply-adds of both networks as PyTorch counts them.

Columns
    peak        GiB of this process after two steps, on the CPU resident memory
    pool        GiB of the full pool, of synthesised images on the device, of the user's images row numbers
    step        s of a matching step of the student on this machine, without the acquisition
    PFLOP       10^15 operations (2 for a multiply-add) of the whole cell: the student's three passes, the teacher's
                passes, no generator
    hours       these at `--tflops` a second
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dodistill
from dodistill.config.grid import Cell, cells, read_recipe
from dodistill.config.tree import Distill
from dodistill.core.runtime import peak_memory_mb, pick_device
from dodistill.core.watch import Watcher
from dodistill.engine import Distiller, Job

#: the fewest iterations of an acquisition that still run each part of it
SHORT = {"K": 1, "iterations": 1, "low": 1, "lr_warmup": 0, "warmup": 0, "candidates": 64, "per_class": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--arm", default="kdci", help="label of the intervention axis")
    parser.add_argument("--where", nargs="*", default=[], help="AXIS=LABEL of the cells to run; default: all")
    parser.add_argument("--tflops", type=float, default=100.0, help="10^12 operations a second, for the last column")
    parser.add_argument("--arithmetic", action="store_true", help="no steps: pool, operations and hours alone")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cell", type=int, default=-1, help="this cell alone, in this process")
    args = parser.parse_args()
    found = list(cells(read_recipe(args.recipe), Path("teachers")))
    wanted = {"seed": "0", "intervention": args.arm} | dict(w.split("=") for w in args.where)
    if args.cell >= 0:
        print(row(found[args.cell], args))
        return
    print(f"{args.recipe.name}, {args.arm}, {args.threads} thread(s), torch {torch.__version__}")
    columns = ["cell", "batch", "pool, GiB", "PFLOP", "hours"]
    if not args.arithmetic:
        columns += ["peak, GiB", "step, s", "acquisition of one iteration, s"]
    print("| " + " | ".join(columns) + " |")
    print("|---" + "|---:" * (len(columns) - 1) + "|", flush=True)
    for i, cell in enumerate(found):
        if all(cell.label.get(axis, label) == label for axis, label in wanted.items()):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--cell", str(i)], check=True)


def row(cell: Cell, args: argparse.Namespace) -> str:
    """One line of the table."""
    torch.set_num_threads(args.threads)
    device, config = pick_device(args.device), cell.config
    shape, classes = config.data.image_shape, {64: 200, 224: 1000}[config.data.image_shape[1]]
    teacher, student = (
        model("resnet34" if classes == 200 else config.teacher.spec, classes, shape),
        model(config.student.spec, classes, shape),
    )
    work = operations(config, *(flops(m, torch.zeros(1, *shape)) for m in (teacher, student)))
    name = " ".join(v for k, v in cell.label.items() if k not in ("seed", "intervention"))
    known = [name, f"{config.loop.batch}", f"{pool(config, classes):.1f}", f"{work / 1e15:,.0f}"]
    known.append(f"{work / args.tflops / 1e12 / 3600:,.0f}")
    if args.arithmetic:
        return "| " + " | ".join(known) + " |"
    images = torch.randint(0, 256, (64, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    given = images if "unlabeled" in config.source.needs else None
    it = Distiller(Job(short(config, args), teacher, student, shape, given))
    it.settle()
    start = time.perf_counter()
    it.acquire(Watcher())
    acquired = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(2):
        it.match()
    step = (time.perf_counter() - start) / 2
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    known += [f"{(peak_memory_mb(device) or 0) / 1024:.1f}", f"{step:.1f}", f"{acquired:.0f}"]
    return "| " + " | ".join(known) + " |"


def short(config: Distill, args: argparse.Namespace) -> Distill:
    """The config with two steps and acquisitions as short as they can be."""
    source = config.source
    fields = {f.name for f in dataclasses.fields(source)}  # type: ignore[arg-type]
    less: dict[str, Any] = {k: v for k, v in SHORT.items() if k in fields and getattr(source, k)}
    loop = dataclasses.replace(
        config.loop, steps=2, device=args.device, threads=args.threads, precision="fp32", compile="off"
    )
    data = dataclasses.replace(config.data, unlabeled="", test="")
    return dataclasses.replace(config, source=dataclasses.replace(source, **less), loop=loop, data=data)  # type: ignore[type-var]


def model(spec: str, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    size = {} if ":" in spec else {"in_channels": shape[0], "image_size": shape[1]}
    out: nn.Module = dodistill.load_model(spec, num_classes=classes, seed=0, **size)
    return out


def flops(network: nn.Module, image: Tensor) -> float:
    """Operations of a forward pass of one image."""
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    return float(counter.get_total_flops())


def operations(config: Distill, teacher: float, student: float) -> float:
    """Operations of the whole cell, without generators: a backward pass of the student counts as two forward passes, of
    the teacher (towards its input alone) as one."""
    loop, source = config.loop, config.source
    rounds = source.warmup + (-(-loop.steps // source.every) if source.every else 1)
    each = getattr(source, "batch", 0) or getattr(source, "candidates", 0) or getattr(source, "n", 0)
    forward, backward = source.teacher_passes()
    steps = loop.steps * loop.batch * (3 * student + teacher)
    return steps + rounds * each * (forward + backward) * teacher


def pool(config: Distill, classes: int) -> float:
    """GiB of the full pool."""
    c, h, w = config.data.image_shape
    mine = 8 if config.source.kind in ("sampler", "data") else c * h * w
    return config.pool.capacity * (mine + 4 * classes + 8) / 2**30


if __name__ == "__main__":
    main()
