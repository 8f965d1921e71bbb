"""Learning rates over a run, as functions of its progress."""

from __future__ import annotations

import math
from collections.abc import Sequence


def cosine(done: float, high: float = 1.0, low: float = 0.0, of: float = 1.0) -> float:
    """Half a cosine, from `high` at done = 0 to `low` at done = `of`."""
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * done / of))


def share_at(step: int, steps: int, restarts: Sequence[int] = ()) -> float:
    """The share of the schedule that is done after `step` of `steps` steps; it begins anew at each of `restarts`."""
    start = max((r for r in restarts if r <= step), default=0)
    end = min((r for r in restarts if r > step), default=steps)
    return (step - start) / (end - start)


def rate_at(
    schedule: str, t: float, lr: float, floor: float = 0.0, milestones: Sequence[float] = (), warmup: float = 0.2
) -> float:
    """The rate after a share t in [0, 1] of the steps.

    `cosine`: down to `floor`. `steps`: a tenth after each milestone. `onecycle`: linearly up during the first `warmup`,
    then linearly down to 0. Otherwise the rate is constant.
    """
    if schedule == "cosine":
        return cosine(t, lr, floor)
    if schedule == "steps":
        return lr * 0.1 ** sum(t >= m for m in milestones)
    if schedule == "onecycle":
        return lr * (t / warmup if t < warmup else (1 - t) / (1 - warmup))
    return lr
