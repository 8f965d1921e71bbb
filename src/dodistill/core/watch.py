"""Watchers: objects that follow a run. The engine calls them, and shows nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import DodistillError


class Watcher:
    """Base of all watchers: the run folder's metrics, the progress display, a tracker, or your own.

    All methods do nothing by default. Values are plain numbers, and a watcher cannot change the run. `step` is the
    number of matching steps done. After a resume, it continues from the checkpoint.
    """

    def on_start(self, step: int, steps: int) -> None:
        """Once, before the first step of this process. `step` is above 0 where a checkpoint was loaded."""

    def on_steps(self, step: int, steps: int) -> None:
        """Under a time limit, when the number of steps changes: `steps` is the new one."""

    def on_note(self, text: str) -> None:
        """A sentence for the user about the whole run."""

    def on_progress(self, what: str, done: int, total: int) -> None:
        """Inside a long acquisition: `done` of `total` units of `what`."""

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        """Every `loop.log_every` steps: mean loss terms since the last log, `loss`, `rate` (images/s), `lr`,
        `seconds`."""

    def on_eval(self, step: int, values: Mapping[str, float]) -> None:
        """Every `loop.eval_every` steps: agreement with the teacher and accuracies, in percent."""

    def on_pool(self, step: int, values: Mapping[str, Any]) -> None:
        """From time to time: the pool's size, and the class shares of its images and of the draws."""

    def on_images(self, step: int, images: Callable[[int], Tensor]) -> None:
        """After `on_pool`: `images(n)` copies n images, evenly spaced in the pool, to the host: uint8 [n, C, H, W]."""

    def on_warning(self, step: int, symptom: str, text: str) -> None:
        """A symptom of collapse, reported once."""

    def on_end(self, step: int, finished: bool) -> None:
        """Once, when the loop ends: at its last step, at the deadline, or by an error (`finished` is False)."""


def require_watchers(given: object) -> None:
    """Raise DodistillError unless `given` is a sequence of watchers: of objects with all methods of `Watcher`."""
    if not isinstance(given, Sequence):
        raise DodistillError(f"watchers is {given!r}; it must be a list, as in watchers=[MyWatcher()].")
    names = [name for name in vars(Watcher) if name.startswith("on_")]
    for part in given:
        if isinstance(part, type) or not all(callable(getattr(part, name, None)) for name in names):
            fix = (
                "derive its class from dodistill.core.watch.Watcher, whose methods do nothing, and give an object of it"
            )
            raise DodistillError(f"watchers has {part!r}, which is no watcher; {fix}.")


class Watchers(Watcher):
    """Calls several watchers in order."""

    def __init__(self, parts: Iterable[Watcher] = ()) -> None:
        self.parts = list(parts)

    def on_start(self, step: int, steps: int) -> None:
        for part in self.parts:
            part.on_start(step, steps)

    def on_steps(self, step: int, steps: int) -> None:
        for part in self.parts:
            part.on_steps(step, steps)

    def on_note(self, text: str) -> None:
        for part in self.parts:
            part.on_note(text)

    def on_progress(self, what: str, done: int, total: int) -> None:
        for part in self.parts:
            part.on_progress(what, done, total)

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        for part in self.parts:
            part.on_log(step, values)

    def on_eval(self, step: int, values: Mapping[str, float]) -> None:
        for part in self.parts:
            part.on_eval(step, values)

    def on_pool(self, step: int, values: Mapping[str, Any]) -> None:
        for part in self.parts:
            part.on_pool(step, values)

    def on_images(self, step: int, images: Callable[[int], Tensor]) -> None:
        for part in self.parts:
            part.on_images(step, images)

    def on_warning(self, step: int, symptom: str, text: str) -> None:
        for part in self.parts:
            part.on_warning(step, symptom, text)

    def on_end(self, step: int, finished: bool) -> None:
        for part in self.parts:
            part.on_end(step, finished)
