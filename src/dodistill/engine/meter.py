"""The meter: mean loss terms, terms that are not finite, and symptoms of collapse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.ranks import Ranks
from ..errors import DodistillError
from ..evaluation.collapse import symptoms


class Diverged(DodistillError):
    """A loss term is no longer a finite number.

    Attributes:
        what: what happened. bad: names of the terms that are not finite.
    """

    def __init__(self, what: str, bad: list[str], advice: str = "") -> None:
        terms = f"; not finite: {', '.join(bad)}" if bad else ""
        super().__init__(f"{what}{terms}{advice}")
        self.what, self.bad = what, bad

    def located(self, step: int, lr: float, kept: bool) -> Diverged:
        """The same error with its step and a remedy. `kept`: whether there is a checkpoint."""
        term = f"the weight of {' or '.join(self.bad)}, or " if self.bad else ""
        good = "; the last good checkpoint is kept" if kept else ""
        return Diverged(self.what, self.bad, f", in step {step}. Lower {term}the rate (optim.lr is {lr}){good}.")


class Meter:
    """Sums each term of the matching steps between two log lines, and remembers the reported symptoms of collapse."""

    def __init__(self, classes: int, device: torch.device, ranks: Ranks | None = None) -> None:
        self.classes, self.device, self.ranks = classes, device, ranks or Ranks()
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.last: dict[str, float] = {}  #: the values of the last log line
        self.warnings: dict[str, str] = {}  #: symptom -> text, each reported once

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """The terms of one step. No sync with the device."""
        for name, value in terms.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def agree(self) -> None:
        """Replace the sums by their means over the processes, each of which has the terms of its part of the batch."""
        means = zip(self.sums, self.ranks.averaged(list(self.sums.values())))
        self.sums = {name: value for name, value in means if value is not None}

    def read(self, more: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean terms since the last call, and `more` unchanged, with one device sync; the matching loss as `loss`.

        Raises Diverged for a term that is not finite.
        """
        named = {k: v / self.counts[k] for k, v in self.sums.items()} | dict(more)
        values = torch.stack([v.float().reshape(()).to(self.device) for v in named.values()]).tolist()
        out = dict(zip(named, values))
        bad = [k for k, v in out.items() if not math.isfinite(v)]
        if bad:
            raise Diverged("the loss is not a finite number", bad)
        out["loss"] = sum(v for k, v in out.items() if k.startswith("match/"))
        self.begin(out)
        return out

    def begin(self, last: Mapping[str, float]) -> None:
        """Sum anew, after `last` was read: here, or by the first process of the run."""
        self.sums, self.counts, self.last = {}, {}, dict(last)

    def check(self) -> None:
        """Raise Diverged for a term that is not finite so far. Waits for the device."""
        if bad := self.infinite():
            raise Diverged("the loss is not a finite number", bad)

    def infinite(self) -> list[str]:
        """Names of the terms that are not finite so far. Waits for the device."""
        return [k for k, v in self.sums.items() if not bool(torch.isfinite(v))]

    def collapsed(self, values: Mapping[str, float], agreement: float | None, done: float) -> dict[str, str]:
        """Symptoms that occur for the first time, each with a remedy."""
        signs = {k.removeprefix("inputs/"): v for k, v in values.items() if k.startswith("inputs/")}
        found = symptoms(signs, self.classes, agreement, done)
        fresh = {k: v for k, v in found.items() if k not in self.warnings}
        self.warnings |= fresh
        return fresh

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "counts": self.counts, "last": self.last, "warnings": self.warnings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = {k: v.to(self.device) for k, v in state["sums"].items()}
        self.counts, self.last, self.warnings = (dict(state[k]) for k in ("counts", "last", "warnings"))
