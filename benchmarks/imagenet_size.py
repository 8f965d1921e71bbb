"""Memory and time of an acquisition at ImageNet's size, on made-up weights: a few steps measured, then arithmetic.

    python benchmarks/imagenet_size.py fast --batch 100
    python benchmarks/imagenet_size.py per-class --batch 100 --classes 2
    python benchmarks/imagenet_size.py deepinv --batch 84

Each call is a process of its own, since its peak of resident memory is what it states. Times are CPU time of one
thread, on a GPU wall time.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import time

import torch
from torch import nn

import dodistill
from dodistill.config.tree import resolve
from dodistill.core.context import Context
from dodistill.core.precision import Precision
from dodistill.core.runtime import pick_device
from dodistill.functional.augment import View
from dodistill.functional.memory_format import place
from dodistill.models.teacher import Teacher


def peak(device: torch.device) -> float:
    """GiB: the allocator's peak on a GPU, the process's resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["fast", "per-class", "deepinv"])
    parser.add_argument("--teacher", default="torchvision:resnet50")
    parser.add_argument("--student", default="torchvision:resnet18")
    parser.add_argument("--batch", type=int, default=0, help="0: the preset's")
    parser.add_argument("--steps", type=int, default=2, help="measured, of each resolution")
    parser.add_argument("--classes", type=int, default=2, help="of an acquisition, for per-class")
    parser.add_argument("--adv", type=float, default=-1.0, help="weight of the adversarial term; below 0: the preset's")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, shape = pick_device(args.device), (3, args.side, args.side)

    def model(spec: str, seed: int) -> nn.Module:
        return place(dodistill.load_model(spec, num_classes=1000, seed=seed), device)

    preset = {"fast": "resnet18", "per-class": "per-class", "deepinv": "imagenet"}[args.what]
    published = resolve({"source": "deepinv" if args.what == "deepinv" else "fast_imagenet", "preset": preset})
    source = dataclasses.replace(published.source, batch=args.batch or published.source.batch)
    if args.adv >= 0:
        source = dataclasses.replace(source, adv=args.adv)
    if args.what == "deepinv":
        full = {"half": source.low, "full": source.iterations}
        source = dataclasses.replace(source, low=args.steps, iterations=args.steps)
    else:
        full = {"full": source.K}
        source = dataclasses.replace(source, K=args.steps)
        if args.what == "per-class":
            source = dataclasses.replace(source, per_class=args.classes)

    student = model(args.student, 1).eval()
    view, v = published.view, published.view.scale
    ctx = Context(
        Teacher(model(args.teacher, 0), shape), device, autocast=Precision(device, args.precision),
        view=View(view.crop, view.padding, args.side // 8, True, v),
    )  # fmt: skip
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    marks: list[float] = []
    ctx.progress = lambda _what, _done, _total: marks.append(clock())
    made = source.build(ctx)
    before, start = peak(device), clock()
    made.acquire(student, 1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ends = [marks[args.steps - 1], clock()] if args.what == "deepinv" else [clock()]
    seconds = [(b - a) / args.steps for a, b in zip([start, *ends], ends)]
    whole = sum(s * steps for s, steps in zip(seconds, full.values()))
    each = ", ".join(f"{s:.2f} s a step at {n} resolution (of {k})" for s, (n, k) in zip(seconds, full.items()))
    print(
        f"{args.what}: batch {source.batch} at {args.side}x{args.side}, {args.teacher}, {args.precision}, {device.type}"
    )
    print(f"  {each}; an acquisition by arithmetic {whole / 60:.0f} min")
    print(f"  peak {peak(device):.2f} GiB, of which {before:.2f} were there before the acquisition")
    for name, value in made.terms.items():
        print(f"  source/{name} {float(value):.4g}")
    for note in made.notes:
        print(f"  {note}")


if __name__ == "__main__":
    main()
