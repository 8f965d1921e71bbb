"""The student's training passes, the teacher's label passes and the source's generators, by torch.compile; the first
two also as CUDA graphs.

A compiled network rounds differently from the eager one. A CUDA graph runs the kernels of the eager network without the
launches from Python, which bound the steps of small networks on a GPU. The choice is made once, before the first step,
and a resumed run keeps it. Both ignore hooks and have no second derivatives: runs that read features and updates that
need second derivatives stay eager.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from ..core.context import Context
from ..errors import DodistillError
from ..functional.memory_format import laid_out
from ..sources.shared.base import Source
from .graphs import recorded, recorded_training
from .match import Matcher

#: Compilation takes up to minutes and saves at most a fifth of a step. `auto` compiles for this many seconds of steps.
REPAYS = 1800.0


class Compiled:
    """How a run's networks are run, and the reason.

    Args:
        mode: `off`, `on` (torch.compile), `graphs` (CUDA graphs; eager on a CPU), or `auto`: graphs on a GPU; on a CPU
            torch.compile if the remaining steps repay it.
    """

    def __init__(self, mode: str, matcher: Matcher, context: Context, source: Source) -> None:
        if mode == "auto" and context.device.type == "cuda":
            mode = "graphs"
        self.mode, self.matcher, self.context, self.source = mode, matcher, context, source
        #: whether they are compiled or recorded, and the reason in one sentence for the summary
        self.on = mode in ("on", "graphs")
        hint = "; graphs is faster on a GPU" if context.device.type == "cuda" else ""
        self.reason = {"on": "compiled", "graphs": "CUDA graphs"}.get(mode, f"eager (loop.compile is off{hint})")
        self._begun = False
        if mode != "off" and (against := self._against()):
            self.on, self.mode, self.reason = False, "off", f"eager: {against}"

    def _against(self) -> str:
        """The reason why neither can be used for this run; else empty."""
        if self.mode == "graphs" and self.context.device.type != "cuda":
            return f"CUDA graphs need a GPU, and the device is {self.context.device}"
        if self.context.ranks.world > 1:
            return "several processes synchronise BatchNorm, which torch.compile does not trace"
        if self.matcher.needs:
            return "the run reads features of the networks, by hooks that torch.compile ignores"
        if self.matcher.update.fp32:
            return f"update {self.matcher.config.update.name} needs second derivatives, which torch.compile lacks"
        return ""

    def settle(self, work: Callable[[int], object]) -> None:
        """With `auto`, decide whether to compile. `work(n)` does the work of a step on n images."""
        if self.mode != "auto":
            return
        loop = self.matcher.config.loop
        n, seconds = min(loop.batch, 32), float("inf")
        for _ in range(2):
            start = time.perf_counter()
            work(n)
            seconds = min(seconds, (time.perf_counter() - start) * loop.steps * loop.batch / n)
        self.on = seconds >= REPAYS
        verb = "repay" if self.on else "do not repay"
        self.reason = f"{'compiled' if self.on else 'eager'}: {seconds:.3g} s of steps {verb} compiling"

    def begin(self) -> None:
        """Compile or record, if so decided. Raises DodistillError if it fails, unless `auto` can choose eager."""
        if not self.on:
            return
        what = "a CUDA graph" if self.mode == "graphs" else "torch.compile"
        try:
            self._prepare()
        except Exception as error:  # errors of many kinds; on the CPU it needs a C++ compiler
            self.matcher.compiled = None
            self.context.teacher.prepare_answers(None)
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            if self.matcher.config.loop.compile != "auto" or self._begun:
                raise DodistillError(f"{what} fails here ({said}); use --loop.compile off.") from error
            self.on, self.reason = False, f"eager: {what} fails here ({said})"

    def _prepare(self) -> None:
        """Run each network at the sizes of the run, so that it compiles, or fails, before the first step."""
        m, context = self.matcher, self.context
        grey = laid_out(torch.full((m.config.loop.batch, *context.image_shape), 0.5, device=context.device))
        kept = {k: v.clone() for k, v in m.student.state_dict().items()}
        m.student.train()
        with torch.random.fork_rng(devices=[context.device] if context.device.type == "cuda" else []):  # dropout
            if self.mode == "graphs":
                m.compiled = recorded_training(m.student, grey, context.autocast)
                context.teacher.prepare_answers(lambda network: recorded(network, grey, context.autocast))
            else:
                m.compiled = torch.compile(m.student, dynamic=False)
                context.teacher.prepare_answers(lambda network: torch.compile(network, dynamic=True))
            with context.autocast():
                s = m.compiled(grey)
            s.float().square().mean().backward()
        m.student.zero_grad()
        m.student.load_state_dict(kept)
        m.student.eval()
        with nullcontext() if self.mode == "graphs" else context.autocast():
            context.teacher.answers(grey)
        if self.mode != "graphs":
            for net in self.source.generators():
                net.compile(dynamic=False)  # in place; each is compiled by its first batch

    def state_dict(self) -> dict[str, Any]:
        return {"on": self.on, "reason": self.reason, "graphs": self.on and self.mode == "graphs"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A resumed run keeps its choice, where it can be compiled."""
        if self.context.ranks.world > 1:
            return
        self.on, self.reason, self._begun = state["on"], state["reason"], True
        if self.on:
            self.mode = "graphs" if state.get("graphs") else "on"
