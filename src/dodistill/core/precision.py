"""The precision of a run's forward passes: fp32, bf16, or the faster of the two on this model.

The faster precision depends on the CPU: bf16 is 2 to 4 times as fast with AMX, from slower to 1.5 times as fast with
AVX512-BF16 alone, and ten times slower if it is emulated. So `auto` measures both on a CPU. On CUDA `auto` is bf16.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DodistillError
from ..functional.memory_format import laid_out
from ..models.normalized import logits_of

#: bf16 is chosen if it is this many times as fast as fp32. With a smaller factor, noise would decide the choice.
GAIN = 1.2

#: Approximate limit, in seconds, for the measurement of one precision.
SECONDS = 0.3


def emulated(device: torch.device, precision: str) -> bool:
    """Whether this device emulates `precision`: bf16 on a CPU without AMX or AVX512-BF16, about ten times slower than
    fp32."""
    if device.type != "cpu" or precision != "bf16":
        return False
    has: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if has.get("architecture", "x86_64") not in ("x86_64", "amd64"):  # unknown for other architectures
        return False
    return bool(has) and not any(has.get(name) for name in ("avx512_bf16", "amx_bf16"))


class Precision:
    """A factory of contexts for forward passes. Calling it gives the context.

    `name` is `fp32`, `bf16` or `auto`. With `auto` on a CPU the contexts are fp32 until `settle` measures. Raises
    DodistillError for another name.
    """

    def __init__(self, device: torch.device, name: str = "auto") -> None:
        if name not in ("auto", "fp32", "bf16"):
            raise DodistillError(f"unknown precision {name!r}; use auto, fp32 or bf16.")
        self.device, self.name = device, name
        #: the current precision of forward passes; `reason` is its reason, a sentence for the summary
        self.chosen = "bf16" if name == "bf16" or (name == "auto" and device.type == "cuda") else "fp32"
        self.reason = f"{self.chosen}, as set" if name != "auto" else f"{self.chosen}, as `auto` is on {device.type}"
        self._open = name == "auto" and device.type == "cpu"

    @classmethod
    def fp32(cls) -> Precision:
        """fp32 on any device."""
        return cls(torch.device("cpu"), "fp32")

    def __call__(self) -> AbstractContextManager[Any]:
        return _context(self.device, self.chosen)

    def settle(self, work: Callable[[int], object]) -> None:
        """Choose the precision for this model, if `auto` has not chosen yet.

        `work(n)` does the work of a step on n images, in the active context. It is called about ten times, and must not
        change the run.
        """
        if not self._open:
            return
        self._open = False
        if emulated(self.device, "bf16"):
            self.reason = "fp32: this CPU emulates bf16"
            return
        try:
            seconds = measured(work, self.device)
        except RuntimeError as error:
            self.reason = f"fp32: this model does not run in bf16 ({str(error).splitlines()[0]})"
            return
        gain = seconds["fp32"] / seconds["bf16"]
        self.chosen = "bf16" if gain >= GAIN else "fp32"
        self.reason = f"{self.chosen}: bf16 measured {gain:.2f} times as fast as fp32 ({GAIN} needed)"

    def state_dict(self) -> dict[str, str]:
        return {"chosen": self.chosen, "reason": self.reason}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """A resumed run keeps its choice, also on another machine."""
        self.chosen, self.reason, self._open = state["chosen"], state["reason"], False


def _context(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def measured(work: Callable[[int], object], device: torch.device, most: int = 64) -> dict[str, float]:
    """The duration of `work(n)` in each precision, in seconds: the minimum of several alternating runs. n <= `most`
    keeps the measurement short.

    A first pass of two images warms up both. If bf16 is far slower in this pass, it is not measured further. On one
    thread of a CPU, seconds are those of the process: other work on the machine does not change the choice.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter

    def timed(precision: str, n: int) -> float:
        with _context(device, precision):
            start = clock()
            work(n)
        return clock() - start

    both = ("fp32", "bf16")
    for precision in both:
        timed(precision, 2)
    first = {p: timed(p, 2) for p in both}
    if first["bf16"] > 4 * first["fp32"]:
        return first
    n = max(2, min(most, int(2 * SECONDS / 4 / max(first["fp32"], 1e-6))))
    best: dict[str, float] = {}
    begun = time.perf_counter()
    for turn in range(20):
        for p in both if turn % 2 == 0 else reversed(both):
            best[p] = min(best.get(p, float("inf")), timed(p, n))
        if turn >= 2 and time.perf_counter() - begun > 2 * SECONDS:
            break
    return best


def trial(
    student: nn.Module,
    image_shape: tuple[int, int, int],
    device: torch.device,
    answers: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[int], None]:
    """`work` for `Precision.settle`: the passes of a training step on n images, by `answers` (the teacher) and a copy
    of `student`, forward and backward."""

    @functools.cache  # a run whose choice is made needs no copy
    def network() -> nn.Module:
        return copy.deepcopy(student).train()

    def work(n: int) -> None:
        stream = torch.Generator(device).manual_seed(0)
        x = laid_out(torch.rand((n, *image_shape), device=device, generator=stream))
        with torch.random.fork_rng(devices=[]):  # the network may have dropout
            s = logits_of(network()(x), "the network").float()
        t = torch.zeros_like(s) if answers is None else answers(x)
        (s - t).square().mean().backward()

    return work
