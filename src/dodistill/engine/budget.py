"""`loop.time`: fits acquisitions and steps to a time limit, by the speed of this machine.

    limit - used - reserve = warm-up * a + steps * (s + a / every)

with a the time of one acquisition, s that of one matching step, both measured on parts of it, and the reserve for the
last evaluation and the results. A schedule that fits keeps its acquisitions, and gets more steps. Otherwise
acquisitions become fewer, then smaller, and the steps fewer. During the run `plan.Plan` adjusts the steps.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config.checks import seconds_in
from ..config.contracts import SourceSettings
from ..config.tree import Distill, grown, resolve
from ..core.context import Context
from ..core.precision import trial
from ..core.ranks import Ranks
from ..data.rows import as_uint8
from ..evaluation.evaluate import predict
from ..files import read_object
from ..functional.memory_format import place
from ..models.teacher import Teacher
from ..sources.shared.base import scaled
from .job import Job
from .longer import settings_of
from .plan import Plan

ACQUIRE = 0.4  #: largest share of the time for acquisitions, where they must be cut
ONCE = 0.2  #: the same where there is one acquisition: a short run has no use for many images
WARM = 0.15  #: largest share of it for the warm-up of a source
ROUNDS = 8  #: acquisitions that a run has at least, where its source has several
LOOK = 0.05  #: largest share for evaluations during the run
TESTS = 0.1  #: largest share for the test images at its end; else a random part of them counts
FEWEST = 200  #: test images that count at least
RESULTS = 3.0  #: seconds for weights, figures and report
PATIENCE = 0.005, 1.0  #: share of the time, and seconds at most, for one measurement; there are up to eight
FILE = "plan.json"


@dataclass(frozen=True)
class Speed:
    """Measured durations in seconds."""

    step: float  #: one matching step, with the teacher's logits
    acquisition: float  #: one acquisition under the settings of the run; 0: unknown
    answer: float  #: the student's logits of one image
    asked: float  #: the teacher's


@dataclass(frozen=True)
class Fitted:
    """A job that fits its time limit, the plan of its steps, and the content of plan.json."""

    job: Job
    plan: Plan
    record: dict[str, Any]


def begun(config: Distill, folder: str | Path | None) -> Distill:
    """The config as it was fitted when the run in this folder began; else `config` itself."""
    record = _record(config, folder)
    return config if record is None else _with(config, record)


def fit(job: Job, folder: str | Path | None, began: float, ranks: Ranks | None = None) -> Fitted:
    """Fit a job to `loop.time`, counted from `began` (time.monotonic()). A run begun in `folder` keeps its fit.

    Of several processes (`ranks`), the first one measures its own speed; the steps then follow that of the group.
    """
    if ranks is None or ranks.world == 1:
        return _fit(job, folder, began)
    mine: list[Fitted] = []

    def record() -> dict[str, Any]:
        mine.append(_fit(job, folder, began))
        return mine[0].record

    shared, seconds = ranks.share(record), seconds_in(job.config.loop.time, "loop.time")
    return mine[0] if mine else _fitted(job, _with(job.config, shared), shared, seconds, began)


def _fit(job: Job, folder: str | Path | None, began: float) -> Fitted:
    config, seconds = job.config, seconds_in(job.config.loop.time, "loop.time")
    if (record := _record(config, folder)) is not None:
        return _fitted(job, _with(config, record), record, seconds, began)
    speed = measured(job, min(PATIENCE[0] * seconds, PATIENCE[1]))
    tests = whole = 0 if job.test is None else len(job.test.x)
    each = 2 * speed.answer + speed.asked  # the last student, its average, the teacher
    if tests * each > TESTS * seconds:
        tests = min(tests, max(FEWEST, int(TESTS * seconds / each)))
    held = 2 * speed.answer * min(config.pool.holdout_capacity, 512)
    reserve = held + tests * each + RESULTS
    left = max(0.0, seconds - reserve - (time.monotonic() - began))
    source = config.source.counted(0 if job.unlabeled is None else len(job.unlabeled))
    mine, said = fitted(source, config, speed, left, held)
    if tests < whole:
        said.append(f"accuracies are of {tests} of the {whole} test images")
    record = {
        "tests": tests, "pace": pace(mine, source, speed),
        "given": config.to_tree(), "reserve": round(reserve, 3), "said": said,
        "source": {k: getattr(mine.source, k) for k in ("warmup", "every", *_names(mine.source))},
        "loop": {"steps": mine.loop.steps, "eval_every": mine.loop.eval_every},
    }  # fmt: skip
    return _fitted(job, mine, record, seconds, began)


def _fitted(job: Job, config: Distill, record: dict[str, Any], seconds: float, began: float) -> Fitted:
    test = job.test
    if test is not None and record["tests"] < len(test.x):
        some = torch.randperm(len(test.x), generator=torch.Generator().manual_seed(0))[: record["tests"]]
        test = replace(test, x=test.x[some.to(test.x.device)], y=test.y[some.to(test.y.device)])
    plan = Plan(config.loop.steps, (), seconds, began, record["reserve"], record["pace"])
    return Fitted(replace(job, config=config, test=test, notes=(*job.notes, spoken(record))), plan, record)


def spoken(record: Mapping[str, Any]) -> str:
    """What a fit changed, in one sentence."""
    limit = record["given"]["loop"]["time"]
    return f"time {limit}: " + ("; ".join(record["said"]) or "nothing was cut") + "; the steps then follow the speed."


def _record(config: Distill, folder: str | Path | None) -> dict[str, Any] | None:
    path = None if folder is None else Path(folder) / FILE
    if path is None or not os.path.exists(path):
        return None
    record = read_object(path, "choose another --out")
    given = record.get("given")
    if not isinstance(given, dict):
        return None
    began, mine, default = (settings_of(t) for t in (given, config.to_tree(), resolve(config.choices()).to_tree()))
    return record if grown(began, mine, default) else None


def _with(config: Distill, record: Mapping[str, Any]) -> Distill:
    return replace(config, source=_set(config.source, record["source"]), loop=replace(config.loop, **record["loop"]))


def _set(source: SourceSettings, values: Mapping[str, Any]) -> Any:
    return replace(source, **values)  # type: ignore[type-var]


def _names(source: SourceSettings) -> list[str]:
    return [name for group in source.costs for name in group]


# ------------------------------------------------------------------------------------------------- measuring


def answer_rate(teacher: Teacher, device: torch.device) -> float:
    """Images that the teacher answers in a second on a device, to which it is moved. Measured in a moment."""
    place(teacher, device)
    grey = torch.full((64, *teacher.image_shape), 127, dtype=torch.uint8)
    return 64 / max(_timed(lambda: predict(teacher, grey), device), 1e-9)


def measured(job: Job, patience: float = PATIENCE[1]) -> Speed:
    """The durations of the parts of a run, each from parts of it that take about `patience` seconds. Nothing of the run
    changes: all streams are its own."""
    config, context = job.config, job.context()
    assert context.student is not None
    student, batch = copy.deepcopy(context.student), config.loop.batch
    work = trial(student, context.image_shape, context.device, context.teacher.answers)
    context.autocast.settle(work)  # the passes below run in the precision of the run

    def some(share: float) -> tuple[float, float]:
        n = max(min(batch, 32), round(share * batch))
        with context.autocast():
            return _timed(lambda: work(n), context.device), n / batch

    step = extrapolated(some, patience)
    grey = torch.full((64, *context.image_shape), 127, dtype=torch.uint8)
    answer = _timed(lambda: predict(student, grey, autocast=context.autocast), context.device) / 64
    asked = _timed(lambda: predict(context.teacher, grey, autocast=context.autocast), context.device) / 64
    given = 0 if job.unlabeled is None else len(job.unlabeled)
    acquisition = _acquisition(config.source.counted(given), context, student, patience)
    return Speed(step, acquisition, answer, asked)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """The duration of `work` at its second call, if the first was short."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        if seconds > 2:
            break
    return seconds


def extrapolated(timed: Callable[[float], tuple[float, float]], patience: float) -> float:
    """The seconds of the whole of a piece of work, from timings of parts of it.

    `timed(share)` does about this share of the work (0: as little as possible), and returns its seconds and the share
    that it did. Small parts are slow for their size, on a fast processor several times. So where the smallest one took
    less than `patience` seconds, a larger one of at most twice that is timed too, and the line through both continued.
    """
    few, least = timed(0.0)
    if few >= patience or least >= 1:
        return few / least
    many, share = timed(min(1.0, least * max(2.0, patience / max(few, 1e-9))))
    if share <= least:
        return few / least
    return many + max(0.0, many - few) / (share - least) * (1 - share)


def _acquisition(settings: SourceSettings, context: Context, student: torch.nn.Module, patience: float) -> float:
    """The duration of one acquisition, from smaller ones; 0 if the settings do not say what it costs."""
    if not settings.costs:
        return 0.0

    def some(share: float) -> tuple[float, float]:
        small, reached = scaled(settings, share)
        source = small.build(context)

        def work() -> None:
            got = source.acquire(student.eval(), small.warmup + 1)
            if got.logits is None:
                context.label(as_uint8(got.images))

        return _timed(work, context.device), reached

    return extrapolated(some, patience)


# --------------------------------------------------------------------------------------------------- fitting


def fitted(
    source: SourceSettings, config: Distill, speed: Speed, left: float, evaluation: float
) -> tuple[Distill, list[str]]:
    """A config for `left` seconds of acquisitions and steps, and sentences on what was cut. `source` is the config's,
    with its numbers of images known (`counted`); `evaluation`: seconds of one."""
    s, a, loop, said = max(speed.step, 1e-9), speed.acquisition, config.loop, []
    every, warmup = source.every, source.warmup
    if _steps(left, s, a, warmup, every) < loop.steps:  # the schedule does not fit
        most = ACQUIRE * left / ROUNDS if every else ONCE * left
        if a > most:
            was, (source, share) = source, scaled(source, most / a)
            a *= share
            names = [n for n in _names(source) if getattr(source, n) != getattr(was, n)]
            said += [f"source.{n} {_short(getattr(source, n))} instead of {_short(getattr(was, n))}" for n in names]
        if warmup * a > WARM * left:
            warmup = int(WARM * left / a)
            said.append(f"source.warmup {warmup} instead of {source.warmup}")
        if every:
            every = max(every, math.ceil(a * (1 - ACQUIRE) / (ACQUIRE * s)))
            fit = int(ACQUIRE * left / max(a, 1e-9)) - warmup  # a is 0 where the source does not say what it costs
            steps, rounds = _steps(left, s, a, warmup, every), max(1, min(ROUNDS, fit))
            if steps < rounds * every:
                every = max(1, int((left - a * (warmup + rounds)) / s) // rounds)
        if every != source.every:
            said.append(f"source.every {every} instead of {source.every}")
    steps = max(1, _steps(left, s, a, warmup, every))
    looks = max(1.0, LOOK * left / max(evaluation, 1e-9))
    eval_every = max(1, min(loop.eval_every, steps // 4), math.ceil(steps / looks))
    source = _set(source, {"warmup": warmup, "every": every})
    said = [f"{steps} steps planned instead of {loop.steps}", *said] if steps != loop.steps else said
    return replace(config, source=source, loop=replace(loop, steps=steps, eval_every=eval_every)), said


def pace(config: Distill, source: SourceSettings, speed: Speed) -> float:
    """The expected seconds of a step of a fitted config, acquisitions included. `source`: that of `speed`."""
    share = math.prod(
        next((getattr(config.source, n) / getattr(source, n) for n in group if getattr(source, n)), 1.0)
        for group in source.costs
    )
    every = config.source.every
    return speed.step + (speed.acquisition * share / every if every else 0.0)


def _steps(left: float, step: float, acquisition: float, warmup: int, every: int) -> int:
    """The steps that fit in `left` seconds."""
    before = acquisition * (warmup + 1)  # the first step follows one acquisition after the warm-up
    return max(0, int((left - before) / (step + (acquisition / every if every else 0.0))))


def _short(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
