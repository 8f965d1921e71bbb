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


class Plan:
    """How many steps a run has, and which share of them is done.

    Args:
        steps: matching steps.
        restarts: steps at which the rate's schedule begins anew, in a run that was trained longer.
        seconds: limit for the run over all its starts; infinity: the steps are fixed.
        began: the start of this process's part of the run, in time.monotonic().
        reserve: seconds that the last evaluation and the results take.
        clock: for tests.
    """

    def __init__(
        self,
        steps: int,
        restarts: Sequence[int] = (),
        seconds: float = math.inf,
        began: float = 0.0,
        reserve: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.restarts = tuple(restarts)
        self.steps, self.seconds, self.began, self.reserve = steps, seconds, began, reserve
        self.end = began + seconds - reserve  #: when the last step should be done
        self._clock = clock
        self._anchor = (0, 0.0)  # the step of the last change of `steps`, and the share done then
        self._marks: deque[tuple[float, int]] = deque(maxlen=WINDOW)

    @property
    def limited(self) -> bool:
        """Whether there is a time limit."""
        return math.isfinite(self.seconds)

    def used(self) -> float:
        """Seconds of the run so far, over all its starts."""
        return self._clock() - self.end + self.seconds - self.reserve

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
        elif now < self.end and now - self._marks[-1][0] < self.seconds / TIMES:
            return False
        (then, since), steps = self._marks[0], step
        if now < self.end and step > since:
            steps = step + max(1, int((self.end - now) * (step - since) / (now - then)))
        elif now < self.end:
            return False
        self._marks.append((now, step))
        changed = steps != self.steps
        self._anchor, self.steps = (step, self.done(step)), steps
        return changed

    def state_dict(self) -> dict[str, Any]:
        """Empty without a time limit: the config has the steps."""
        return {"steps": self.steps, "since": self._anchor[0], "share": self._anchor[1]} if self.limited else {}

    def load_state_dict(self, state: Mapping[str, Any], used: float) -> None:
        """`used`: the seconds of the run before this process."""
        if state:
            self.steps, self._anchor = state["steps"], (state["since"], state["share"])
            self.end -= used
            self._marks.clear()
