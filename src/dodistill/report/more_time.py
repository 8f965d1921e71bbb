"""What more time would change in a run with a time limit, in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..config.contracts import SourceSettings
from ..config.methods import Choice
from ..evaluation.verdict import BRIEF
from .format import count, duration

RISE = 1.0  #: points in the last fifth of the steps above which a curve still rises, where chance is smaller


def more_time(
    curve: Sequence[tuple[int, float]],
    steps: int,
    source: SourceSettings,
    batch: int,
    images: int,
    held: int,
    longer: tuple[float, Choice] | None = None,
) -> str:
    """Sentences on a finished run.

    Args:
        curve: (step, agreement in %) of its evaluations.
        steps, batch: its length.
        source: its source, as it was fitted to the time.
        images: acquired in all.
        held: held-back inputs, over which the agreement was measured.
        longer: what `--source auto` takes with more time, and from which limit on.
    """
    said = [_curve(curve, steps, held)]
    if source.every == 0 and images and steps * batch / images < 4:
        said.append(
            f"Each of the {count(images)} images was drawn {steps * batch / images:.1f} times; more steps help."
        )
    if longer is not None:
        limit, choice = longer
        said.append(f"From {duration(limit)} on, --source auto takes {choice.source}, preset {choice.preset}.")
    return " ".join(said)


def _curve(curve: Sequence[tuple[int, float]], steps: int, held: int) -> str:
    before = [value for step, value in curve if step <= 0.8 * steps]
    if steps < BRIEF or not before:
        return f"Only {count(steps)} steps fitted in the time: more time should help."
    rise, p = curve[-1][1] - before[-1], (curve[-1][1] + before[-1]) / 200
    chance = 200 * math.sqrt(2 * p * (1 - p) / max(held, 1))  # two standard errors of a difference, in points
    share = f"in the last {100 - round(100 * max(s for s, _ in curve if s <= 0.8 * steps) / steps)} % of the steps"
    if rise > max(RISE, chance):
        return f"Agreement with the teacher rose by {rise:.1f} points {share}: more time should help."
    said = f"Agreement with the teacher changed by {rise:+.1f} points {share}"
    if chance > RISE:
        return (
            f"{said}, which can be chance (up to {chance:.1f} points with {count(held)} held-back inputs): it does not "
            "tell whether more time would help."
        )
    return f"{said}: more time changes little here."
