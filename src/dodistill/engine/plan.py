"""The number of steps of a run: fixed, or under a time limit adjusted to the speed so far."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..functional.schedules import share_at

#: Under a time limit the steps are adjusted this many times in the limit, to the speed in the last `WINDOW` of them.
TIMES, WINDOW = 40, 10
#: The reserve grows at most by this factor on a machine that has become slower.
SLOWEST = 4.0


class Plan:
    """How many steps a run has, and which share of them is done.

    Args:
        steps: matching steps.
        restarts: steps at which the rate's schedule begins anew, in a run that was trained longer.
        seconds: limit for the run over all its starts; infinity: the steps are fixed.
        began: the start of this process's part of the run, in time.monotonic().
        reserve: seconds that the last evaluation and the results take.
        pace: the expected seconds of a step, acquisitions included. The reserve grows where steps are slower.
        clock: for tests.
    """

    def __init__(
        self,
        steps: int,
        restarts: Sequence[int] = (),
        seconds: float = math.inf,
        began: float = 0.0,
        reserve: float = 0.0,
        pace: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.restarts = tuple(restarts)
        self.steps, self.seconds, self.reserve, self.pace = steps, seconds, reserve, pace
        self._limit = began + seconds
        self._clock = clock
        self._anchor = (0, 0.0)  # the step of the last change of `steps`, and the share done then
        self._marks: deque[tuple[float, int]] = deque(maxlen=WINDOW)

    @property
    def limited(self) -> bool:
        """Whether there is a time limit."""
        return math.isfinite(self.seconds)

    def used(self) -> float:
        """Seconds of the run so far, over all its starts."""
        return self._clock() - self._limit + self.seconds

    def done(self, step: int) -> float:
        """The share of the run that `step` steps are: 0 at the start, 1 at the last step, above 1 where it was trained
        longer."""
        if not self.limited:
            return step / min((*self.restarts, self.steps))
        since, share = self._anchor
        return share + (1 - share) * (step - since) / max(self.steps - since, 1)

    def scheduled(self, step: int) -> float:
        """The share of the rate's schedule that is done after `step` steps."""
        return self.done(step) if self.limited else share_at(step, self.steps, self.restarts)

    def adjust(self, step: int) -> bool:
        """Set the steps that still fit, from time to time, once `step` steps are done. True if they changed.

        At the limit, the step that was just done is the last one.
        """
        if not self.limited or step >= self.steps:
            return False
        now = self._clock()
        if not self._marks:
            self._marks.append((now, step))
        (then, since), steps = self._marks[0], step
        pace = (now - then) / (step - since) if step > since else self.pace
        known = self.pace > 0 and now - then >= self.seconds / 8  # an acquisition is no sign of a slow machine
        slower = min(max(pace / self.pace, 1.0), SLOWEST) if known else 1.0
        end = self._limit - self.reserve * slower
        if now < end:
            if step == since or now - self._marks[-1][0] < self.seconds / TIMES:
                return False
            steps = step + max(1, int((end - now) / pace))
        self._marks.append((now, step))
        changed = steps != self.steps
        self._anchor, self.steps = (step, self.done(step)), steps
        return changed

    def state_dict(self) -> dict[str, Any]:
        """Empty without a time limit: the config has the steps."""
        return {"steps": self.steps, "since": self._anchor[0], "share": self._anchor[1]} if self.limited else {}

    def follow(self, state: Mapping[str, Any]) -> None:
        """Take the steps of another process of the same run, from its `state_dict`."""
        if state:
            self.steps, self._anchor = state["steps"], (state["since"], state["share"])

    def load_state_dict(self, state: Mapping[str, Any], used: float) -> None:
        """`used`: the seconds of the run before this process."""
        if state:
            self.steps, self._anchor = state["steps"], (state["since"], state["share"])
            self._limit -= used
            self._marks.clear()
