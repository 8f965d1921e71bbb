"""The time that a network needs for a batch on this machine's CPU."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

BATCHES = (1, 32)  #: images at a time
LEAST, MOST, SECONDS = 3, 100, 0.3  #: repeats of a batch: at least, at most, and for how long
LONGEST = 2.0  #: seconds; a batch that would take longer is not measured


def latency(run: Callable[[Tensor], object], image_shape: tuple[int, int, int]) -> list[float | None]:
    """Milliseconds for a batch of each size in `BATCHES`: the median of repeats, after one that is not counted.

    None for a batch of 32 that would take longer than `LONGEST` seconds. `run` takes images fp32 [n, C, H, W].
    """
    out: list[float | None] = []
    for n in BATCHES:
        if out and (out[0] or 0.0) * n > 1000 * LONGEST:
            out.append(None)
            continue
        images = torch.full((n, *image_shape), 0.5)
        with torch.inference_mode():
            run(images)
            times: list[float] = []
            began = time.perf_counter()
            while len(times) < LEAST or (len(times) < MOST and time.perf_counter() - began < SECONDS):
                start = time.perf_counter()
                run(images)
                times.append(time.perf_counter() - start)
        out.append(1000 * statistics.median(times))
    return out


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch for the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_name() -> str:
    """The name of this machine's CPU, and the vector instructions that torch uses of it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
