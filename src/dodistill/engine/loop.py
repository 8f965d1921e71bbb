"""The loop: acquire or match, then evaluate, log, save. It names no method and displays nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from torch import Tensor

from ..core.deadline import OutOfTime
from ..core.precision import trial
from ..core.ranks import Ranks
from ..core.runtime import repeatable, seeded_steps
from ..core.watch import Watcher, Watchers
from ..errors import DodistillError
from .acquire import Acquirer
from .compiled import Compiled
from .job import Job, made_of, require_same
from .match import Matcher
from .meter import Diverged, Meter
from .plan import Plan
from .run_folder import NoFolder, RunFolder
from .score import Scorer

#: Before an acquisition that is expected to take longer, in seconds, the run is saved.
LONG = 5.0

#: The layout of a checkpoint's state; another one is refused.
FORMAT = 3


class Distiller:
    """One run: its four parts and its progress. Raises DodistillError for a job that cannot run."""

    def __init__(self, job: Job, plan: Plan | None = None, ranks: Ranks | None = None) -> None:
        """`plan`: how many steps there are; None: those of the config. `ranks`: the processes that share the run."""
        self.job, self.config, self.ranks = job, job.config, ranks or Ranks()
        self.plan = plan or Plan(job.config.loop.steps, job.config.loop.restarts)
        self.context = job.context(self.ranks)
        self.ranks.require_same(lambda: self.made_of)
        assert self.context.student is not None
        self.ranks.alike(self.context.student)
        self.matcher = Matcher(self.config, self.context, self.plan)
        self.acquirer = Acquirer(self.config, self.context, self.matcher.interventions, self.matcher.needs)
        self.scorer = Scorer(self.matcher, self.acquirer, job.test if self.ranks.first else None)
        self.compiled = Compiled(self.config.loop.compile, self.matcher, self.context, self.acquirer.source)
        self.meter = Meter(self.context.num_classes, self.context.device, self.ranks)
        self.clock = Clock()
        self.step = 0  #: matching steps done
        self._begin: Callable[[int], None] = _unseeded  # seeds the global streams of a step, within `run`
        self._devices: list[str] = []  # the kinds of device that have computed it
        self._behind = False  # whether the last step was not yet evaluated and logged
        self._saved = (0, 0)  # `progress` when this start began, or at its last checkpoint
        self.stopped = ""  #: where the last `run` stopped inside an acquisition or evaluation

    # ------------------------------------------------------------------------------------------------ run

    def run(
        self, folder: RunFolder | NoFolder | None = None, watchers: Iterable[Watcher] = (), deadline: float = math.inf
    ) -> bool:
        """Run to the last step, or to `deadline` (time.monotonic()). True when the last step is done.

        Of several processes, all call this; only the first one has a folder and watchers.
        """
        c = self.context
        with repeatable(c.device), seeded_steps(c.device, c.seed, self.ranks.rank) as begin:
            self._begin = begin
            try:
                return self._run(folder or NoFolder(), watchers, deadline)
            finally:
                self._begin = _unseeded

    def _run(self, folder: RunFolder | NoFolder, watchers: Iterable[Watcher], deadline: float) -> bool:
        tell = Watchers([folder, *watchers])
        if (saved := self.ranks.share(folder.load)) is not None:
            self.load_state_dict(*saved)
        else:
            self.settle()
        self.compiled.begin()
        self.clock.start(self.step)
        tell.on_start(self.step, self.plan.steps)
        finished = False
        try:
            with self._watched(tell, deadline):
                finished = self._loop(folder, tell, deadline)
        except OutOfTime as reached:
            self.stopped = f"{reached}, of acquisition {self.acquirer.round + 1}"
        except Diverged as error:
            kept = folder.path is not None and (folder.path / "checkpoint.pt").exists()
            raise error.located(self.step, self.config.optim.lr, kept) from None
        finally:
            tell.on_end(self.step, finished)
        return finished

    @contextmanager
    def _watched(self, tell: Watcher, deadline: float) -> Iterator[None]:
        """In this block, work inside an acquisition is reported, and ends at the deadline."""

        def progress(what: str, done: int, total: int) -> None:
            tell.on_progress(what, done, total)
            late = time.monotonic() > deadline
            if self.acquirer.sharing:
                (late,) = self.ranks.any(late)
            if late and done < total:
                raise OutOfTime(f"in {what}, {done} of {total}")

        before, self.context.progress = self.context.progress, progress
        try:
            yield
        finally:
            self.context.progress = before

    def settle(self) -> None:
        """Choose precision and compilation by measurements on the first rank, before the first step."""
        precision, compiled = self.ranks.share(self._settled)
        if not self.ranks.first:
            self.context.autocast.load_state_dict(precision)
            self.compiled.load_state_dict(compiled)

    def _settled(self) -> tuple[dict[str, str], dict[str, Any]]:
        context = self.context
        work = trial(self.matcher.student, context.image_shape, context.device, context.teacher.answers)
        context.autocast.settle(work)
        self.compiled.settle(work)
        return context.autocast.state_dict(), self.compiled.state_dict()

    def _loop(self, folder: RunFolder | NoFolder, tell: Watcher, deadline: float) -> bool:
        """Acquire or match, then report and save. True at the last step, False at the deadline."""
        if self._behind and not self.reported(tell):  # stopped in the evaluation after a step
            return False
        if self.step >= self.plan.steps:  # stopped after its last step, before its delivery
            return True
        self._saved = self.progress
        while self.step < self.plan.steps:
            if self.acquirer.due(self.step):
                if self._stops_before_acquisition(folder, deadline):
                    return False
                self.acquire(tell)
            else:
                self.match()
                if not self.reported(tell):
                    self.save(folder)
                    return False
            if self.step < self.plan.steps and self._stops(folder, deadline):
                return False
        self.show_pool(tell)
        self.save(folder)
        return True

    @property
    def progress(self) -> tuple[int, int]:
        """(acquisitions, matching steps) done."""
        return self.acquirer.round, self.step

    def _stops_before_acquisition(self, folder: RunFolder | NoFolder, deadline: float) -> bool:
        """Save before an acquisition that is long, or would not end by the deadline. True in the second case.

        Nothing is saved, and nothing stops, if all progress is saved already: a stop inside the acquisition loses none.
        """
        if self.progress == self._saved:
            return False
        expected = self.acquirer.expected
        stop, long = self.ranks.any(time.monotonic() + expected > deadline, expected > LONG)
        if stop or long:
            self.save(folder)
        return stop

    def _stops(self, folder: RunFolder | NoFolder, deadline: float) -> bool:
        """Save if a checkpoint is due or the deadline has passed. True in the second case."""
        stop, due = self.ranks.any(time.monotonic() > deadline, folder.due())
        if stop or due:
            self.save(folder)
        return stop

    def acquire(self, tell: Watcher) -> None:
        """One acquisition; the pool is described from time to time."""
        source = self.config.source
        self.acquirer.acquire(self.matcher.student)
        often = max(10, self.config.loop.log_every // max(source.every, 1))
        if source.every == 0 or self.acquirer.round % often == 1:
            self.show_pool(tell)
        if self.step == 0:
            tell.on_progress("warming up the source", self.acquirer.round, source.warmup + 1)

    def match(self) -> None:
        """One step of the student."""
        self._begin(self.step)
        drawn = self.acquirer.draw()
        replayed = self.acquirer.replayed(self.matcher.student, self.step)
        self.meter.add(self.matcher.step(drawn, replayed, self.acquirer.dictionary, self.step))
        self.step += 1
        self._behind = True

    # --------------------------------------------------------------------------------- evaluate, log, save

    def reported(self, tell: Watcher) -> bool:
        """`report`; False if the deadline came during the evaluation: it then counts as not done, and is due again."""
        try:
            self.report(tell)
        except OutOfTime as reached:
            self.stopped = str(reached)
            return False
        self._behind = False
        return True

    def report(self, tell: Watcher) -> None:
        """Evaluate and log, each at its own cadence and at the last step, which a time limit may bring forward."""
        loop = self.config.loop
        if self.plan.limited and self._adjusted():
            tell.on_steps(self.step, self.plan.steps)
        last = self.step == self.plan.steps
        if last or self.step % loop.eval_every == 0:
            self.evaluate(tell, tests=last or not self.plan.limited)  # under a time limit tests count once, at the end
        if last or self.step % loop.log_every == 0:
            self.log(tell)

    def evaluate(self, tell: Watcher, tests: bool) -> None:
        """Score the student, with `tests` also on the test set. Raises Diverged for terms that are not finite."""
        self.meter.agree()
        tell.on_eval(self.step, self.ranks.share(lambda: self._scored(tests)))

    def log(self, tell: Watcher) -> None:
        """Report the mean terms since the last log line, and new symptoms of collapse."""
        values = self.read()
        values |= {"rate": self.clock.lap(self.step) * self.config.loop.batch, "lr": self.lr()}
        if self.plan.limited:
            values["steps"] = self.plan.steps  # as far as is known now
        agreement = self.scorer.last.get("agreement")
        for symptom, text in self.meter.collapsed(values, agreement, self.plan.done(self.step)).items():
            tell.on_warning(self.step, symptom, text)
        tell.on_log(self.step, {"seconds": round(self.clock.seconds, 3), **values})

    def _adjusted(self) -> bool:
        """Whether the number of steps changed, by the speed of the first rank."""
        changed, state = self.ranks.share(lambda: (self.plan.adjust(self.step), self.plan.state_dict()))
        self.plan.follow(state)
        return changed

    def _scored(self, tests: bool) -> dict[str, float]:
        self.meter.check()
        return self.scorer.evaluate(tests=tests)

    def show_pool(self, tell: Watcher) -> None:
        """Describe the pool, and offer some of its images."""
        tell.on_pool(self.step, self.acquirer.describe())
        tell.on_images(self.step, self.acquirer.pool.some)

    def lr(self) -> float:
        """The student's learning rate after the steps that are done."""
        return self.matcher.rate(self.plan.scheduled(self.step))

    def read(self) -> dict[str, float]:
        """Mean terms since the last log line, with one device sync. Raises Diverged for one that is not finite."""
        self.meter.agree()
        of_batch = self.matcher.terms(self.acquirer.dictionary)
        values = self.ranks.share(lambda: self._read(of_batch))
        self.meter.begin(values)
        return values

    def _read(self, of_batch: dict[str, Tensor]) -> dict[str, float]:
        if self.acquirer.frequent:
            self.acquirer.check()
        return self.meter.read(self.acquirer.terms() | of_batch)

    def save(self, folder: RunFolder | NoFolder) -> None:
        """Write a checkpoint. Raises Diverged for values that are not finite, to keep the last good checkpoint."""
        self.meter.agree()
        self.ranks.share(lambda: self._save(folder))
        self._saved = self.progress

    def _save(self, folder: RunFolder | NoFolder) -> None:
        self.acquirer.check()
        if bad := self.matcher.infinite():
            raise Diverged(f"the student's weights are not finite ({', '.join(bad[:3])})", self.meter.infinite())
        if folder.keeps:
            folder.save(self.state_dict(), self.acquirer.pool_state, self.acquirer.pool.version)

    # --------------------------------------------------------------------------------------------- state

    @cached_property
    def made_of(self) -> dict[str, str]:
        """Fingerprints of teacher, student and data; see `job.made_of`."""
        return made_of(self.context)

    @property
    def devices(self) -> list[str]:
        """The kinds of device that have computed this run, in order: ["cuda"], or ["cuda", "cpu"] if it has moved."""
        mine = self.context.device.type
        return self._devices if self._devices[-1:] == [mine] else [*self._devices, mine]

    def state_dict(self) -> dict[str, Any]:
        """Everything except the pool, which is saved separately when it changes."""
        return {
            "format": FORMAT, "made_of": self.made_of, "step": self.step, "seconds": self.clock.seconds,
            "precision": self.context.autocast.state_dict(), "compiled": self.compiled.state_dict(),
            "acquirer": self.acquirer.state_dict(), "matcher": self.matcher.state_dict(),
            "scorer": self.scorer.state_dict(), "meter": self.meter.state_dict(), 
            "plan": self.plan.state_dict(), "behind": self._behind, "devices": self.devices,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], pool: Mapping[str, Any]) -> None:
        """Raises DodistillError for the state of a run with another teacher, student or images, or of a version of
        dodistill with another checkpoint format."""
        if state.get("format") != FORMAT:
            raise DodistillError(
                f"this checkpoint has format {state.get('format', 1)}, but this version of dodistill reads format "
                f"{FORMAT}; finish the run with the version that began it, or choose another --out."
            )
        try:
            self._load(state, pool)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise DodistillError(
                f"the checkpoint does not hold the state of this run ({type(error).__name__}: {error}); choose another "
                "--out."
            ) from error

    def _load(self, state: Mapping[str, Any], pool: Mapping[str, Any]) -> None:
        require_same(state["made_of"], self.made_of)
        if "precision" in state:  # absent in older checkpoints
            self.context.autocast.load_state_dict(state["precision"])
            self.compiled.load_state_dict(state["compiled"])
        self.matcher.load_state_dict(state["matcher"])
        self.acquirer.load_state_dict(state["acquirer"], dict(pool))
        self.scorer.load_state_dict(state["scorer"])
        self.meter.load_state_dict(state["meter"])
        self.step = state["step"]
        self._behind = state.get("behind", False)
        own = state["acquirer"]["generators"]["draw"].shape == self.context.generator("draw").get_state().shape
        before = self.context.device.type if own else "another device"  # in checkpoints from before it was noted
        self._devices = list(state.get("devices", [before]))
        self.plan.load_state_dict(state.get("plan", {}), state["seconds"])
        self.clock = Clock(state["seconds"])


def _unseeded(_step: int) -> None:
    """A step outside `run`, which leaves the global streams alone."""


class Clock:
    """The duration of a run, over all its starts, and the pace since the last log line."""

    def __init__(self, before: float = 0.0) -> None:
        self._before, self._began = before, time.monotonic()
        self._lap = (0, self._began)

    def start(self, step: int) -> None:
        """Start to measure."""
        self._began = time.monotonic()
        self._lap = (step, self._began)

    @property
    def seconds(self) -> float:
        """The duration of the whole run so far."""
        return self._before + time.monotonic() - self._began

    def lap(self, step: int) -> float:
        """Steps per second since the last call."""
        before, self._lap = self._lap, (step, time.monotonic())
        return (step - before[0]) / max(self._lap[1] - before[1], 1e-9)
