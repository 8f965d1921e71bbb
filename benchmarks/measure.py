"""What the benchmarks share: alternating timings, peak memory, and the models."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import dodistill
from dodistill.commands.cli import keep_memory
from dodistill.core.runtime import pick_device
from dodistill.engine import Distiller
from dodistill.sources.shared.base import Acquired

Step = Callable[[], object]


def options(description: str, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--teacher", default="wrn40_2")
    parser.add_argument("--student", default="wrn16_1")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--image", type=int, default=32, help="height and width")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one, so that CPU time is the step's own")
    parser.add_argument("--rounds", type=int, default=rounds, help="alternations of the two sides")
    parser.add_argument("--repeat", type=int, default=1, help="steps in one timing (20 or more on a GPU)")
    return parser


def start(args: argparse.Namespace) -> torch.device:
    keep_memory()  # as the command line does
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = pick_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(
        f"{args.teacher} -> {args.student}, batch {args.batch}, {args.precision}, {name}, {args.threads} thread(s), "
        f"torch {torch.__version__}; {args.rounds} rounds of {args.repeat}"
    )
    return device


def model(spec: str, args: argparse.Namespace, device: torch.device) -> nn.Module:
    out: nn.Module = dodistill.load_model(spec, num_classes=args.classes, in_channels=3, image_size=args.image, seed=0)
    return out.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def fill(it: Distiller, images: Tensor) -> Tensor:
    """Put `images` (uint8 [n, C, H, W]) with random logits into the pool of a run, as an acquisition would.

    With `augment.views` the answers to the views are random, too. Returns the logits [n, K].
    """
    a = it.acquirer
    logits = torch.randn(len(images), it.context.num_classes, device=images.device)
    a.views.plan(float("inf"), len(images), asked_each_time=bool(a.needs))
    slots = a.pool.add(images, logits, a.generators["pool"])
    a.views.fill(slots, lambda x: torch.randn(len(x), logits.shape[1], device=x.device))
    a._rebuild(Acquired(images[:256], logits[:256]))
    return logits


def seconds(step: Step, device: torch.device, repeat: int = 1) -> float:
    """Of one step: CPU time of this process, which other processes disturb least; wall time on a GPU, after a sync."""
    clock = time.process_time
    if device.type == "cuda":
        clock = time.perf_counter
        torch.cuda.synchronize(device)
    begin = clock()
    for _ in range(repeat):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - begin) / repeat


def alternate(steps: Sequence[Step], device: torch.device, rounds: int, repeat: int = 1) -> list[list[float]]:
    """[rounds][len(steps)] seconds: one after the other in each round, in turns forwards and backwards."""
    for step in steps:
        step()
    out = []
    for i in range(rounds):
        row = [0.0] * len(steps)
        for j in range(len(steps)) if i % 2 == 0 else reversed(range(len(steps))):
            row[j] = seconds(steps[j], device, repeat)
        out.append(row)
    return out


def ratio(rows: list[list[float]], a: int, b: int) -> tuple[float, float, float]:
    """Median over the rounds of row[a] / row[b], and the least and greatest."""
    values = [row[a] / row[b] for row in rows]
    return statistics.median(values), min(values), max(values)


def median(rows: list[list[float]], a: int) -> float:
    return statistics.median(row[a] for row in rows)


def peak(step: Step, device: torch.device) -> int:
    """Most bytes that one step holds at once, beyond what was there before it.

    On a GPU the allocator's own count. On the CPU the profiler's record of every allocation and release by PyTorch's
    allocator, summed in order: exact and free of the noise of resident memory, but blind to oneDNN's private scratch.
    """
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()  # so that the sizes of what the measured step releases (the old gradients) are on record
        with torch.profiler.record_function("measured"):
            step()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    begin = next(e.start_ns() for e in events if e.name() == "measured")
    held = highest = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        if event.start_ns() >= begin:
            held += event.nbytes()
            highest = max(highest, held)
    return highest
