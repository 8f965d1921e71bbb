"""torch.compile for a run's networks: the student's training step and the teacher's label passes.

A compiled network rounds differently from the eager one. So the choice is made once, before the first step, and a
resumed run keeps it. torch.compile ignores hooks, and its networks have no second derivatives: runs that read features
and updates that need second derivatives stay eager.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..core.context import Context
from ..errors import DodistillError
from ..functional.memory_format import laid_out
from .match import Matcher

#: Compilation takes up to minutes and saves at most a fifth of a step. `auto` compiles for this many seconds of steps.
REPAYS = 1800.0


class Compiled:
    """Whether a run's networks are compiled, and the reason.

    Args:
        mode: `off`, `on`, or `auto`: if the remaining steps repay the compilation.
    """

    def __init__(self, mode: str, matcher: Matcher, context: Context) -> None:
        self.mode, self.matcher, self.context = mode, matcher, context
        #: whether they are compiled, and the reason in one sentence for the summary
        self.on, self.reason = mode == "on", "compiled" if mode == "on" else "eager (loop.compile is off)"
        self._begun = False
        if mode != "off" and (against := self._against()):
            self.on, self.mode, self.reason = False, "off", f"eager: {against}"

    def _against(self) -> str:
        """The reason why torch.compile cannot be used for this run; else empty."""
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
        """Compile, if so decided. Raises DodistillError if torch.compile fails, unless `auto` can choose eager."""
        if not self.on:
            return
        try:
            self._compile()
        except Exception as error:  # errors of many kinds; on the CPU it needs a C++ compiler
            self.matcher.compiled = None
            self.context.teacher.compile_answers(False)
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            if self.mode == "on" or self._begun:
                raise DodistillError(f"torch.compile fails here ({said}); use --loop.compile off.") from error
            self.on, self.reason = False, f"eager: torch.compile fails here ({said})"

    def _compile(self) -> None:
        """Run each network once at the sizes of the run, so that it compiles, or fails, before the first step."""
        m, context = self.matcher, self.context
        grey = laid_out(torch.full((m.config.loop.batch, *context.image_shape), 0.5, device=context.device))
        kept = {k: v.clone() for k, v in m.student.state_dict().items()}
        m.compiled = torch.compile(m.student, dynamic=False)
        m.student.train()
        with torch.random.fork_rng(devices=[]):  # a student may have dropout
            with context.autocast():
                s = m.compiled(grey)
            s.float().square().mean().backward()
        m.student.zero_grad()
        m.student.load_state_dict(kept)
        m.student.eval()
        context.teacher.compile_answers()
        with context.autocast():
            context.teacher.answers(grey)

    def state_dict(self) -> dict[str, Any]:
        return {"on": self.on, "reason": self.reason}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A resumed run keeps its choice, where it can be compiled."""
        if self.context.ranks.world > 1:
            return
        self.on, self.reason, self._begun = state["on"], state["reason"], True
