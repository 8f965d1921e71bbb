"""Learning rates over a run: plain functions of the share t in [0, 1] of its steps that are done."""

from __future__ import annotations

import math
from collections.abc import Sequence


def cosine(t: float, high: float = 1.0, low: float = 0.0) -> float:
    """From `high` at t = 0 down to `low` at t = 1, along half a cosine."""
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * t))


def rate_at(
    schedule: str, t: float, lr: float, floor: float = 0.0, milestones: Sequence[float] = (), warmup: float = 0.2
) -> float:
    """The rate at t under `cosine` (down to `floor`), `steps` (a tenth after each milestone), `onecycle` (up during the
    first `warmup`, then down to 0, both linear) or `constant`."""
    if schedule == "cosine":
        return cosine(t, lr, floor)
    if schedule == "steps":
        return lr * 0.1 ** sum(t >= m for m in milestones)
    if schedule == "onecycle":
        return lr * (t / warmup if t < warmup else (1 - t) / (1 - warmup))
    return lr
