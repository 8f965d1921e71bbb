"""The ranges of the settings, checked once when a config is resolved and before anything is loaded.

A method checks what only it knows, in its `build`. Here are the settings of the run, and rules that hold for the
numbers of all methods of this package.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ..errors import DodistillError, at_least, positive

if TYPE_CHECKING:
    from .tree import Distill

#: Names of settings that are shares, whichever method has them: 0 <= x <= 1, or below 1.
_SHARES = {"bn_momentum": False, "momentum": True, "decay": True, "ema": True, "teacher_accuracy": True, "init": True}
#: Names of settings that divide, or without which nothing moves.
_POSITIVE = ("temperature", "tau", "lr", "lr_g")


def check(config: Distill) -> None:
    """Raise DodistillError, with value and fix, for the first setting that is out of range."""
    for where, settings in _parts(config):
        for name, value in _numbers(settings):
            if not math.isfinite(value):
                raise DodistillError(f"{where}.{name} is {value}; it must be a finite number.")
    _run(config)
    outside = {id(m.config) for m in config.methods}
    for where, settings in _parts(config):
        if id(type(settings)) not in outside and where in ("source", "criterion", "update", "replay", *_acts(config)):
            _method(where, settings)
    for name, part in config.source.members.items():
        _method(f"source.of.{name}", part)


def seconds_in(text: str, name: str) -> float:
    """The seconds in a duration: 90, 90s, 10m, 1.5h, 1h30m. Infinity for an empty text.

    Raises DodistillError, which names the setting `name`, for another text and for no time at all.
    """
    if not text:
        return math.inf
    found = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text.strip().lower().replace(" ", ""))
    try:
        hours, minutes, seconds = (float(part or 0) for part in (found.groups() if found else ("x", "", "")))
    except ValueError:
        raise DodistillError(f"{name} is {text!r}; give a duration, as in 90s, 10m or 1h30m.") from None
    total = 3600 * hours + 60 * minutes + seconds
    if not total > 0:
        raise DodistillError(f"{name} is {text!r}; it must be above 0, as in 90s, 10m or 1h30m.")
    return total


def _acts(config: Distill) -> list[str]:
    return [act.name for act in config.interventions]


def _parts(config: Distill) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield field.name, value
    for act in config.interventions:
        yield act.name, act


def _numbers(settings: Any) -> Iterator[tuple[str, float]]:
    """The fields that hold numbers, and the entries of tuples of them."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, int | float) and not isinstance(one, bool):
                yield field.name, one


def _method(where: str, settings: Any) -> None:
    """Numbers are at least 0, unless the default is below; shares and divisors by their names."""
    defaults = {f.name: f.default for f in dataclasses.fields(settings)}
    for name, value in _numbers(settings):
        default = defaults[name]
        if not (isinstance(default, int | float) and default < 0):
            at_least(0, where, "", **{name: value})
        if name in _POSITIVE:
            positive(where, "", **{name: value})
        if name in _SHARES and not (0 <= value <= 1 if _SHARES[name] else 0 <= value < 1):
            raise DodistillError(f"{where}.{name} is {value}; it must lie between 0 and 1.")


def _run(config: Distill) -> None:
    loop, pool, optim, augment, view, data = (
        config.loop, config.pool, config.optim, config.augment, config.view, config.data
    )  # fmt: skip
    at_least(1, "loop", steps=loop.steps, log_every=loop.log_every, eval_every=loop.eval_every)
    seconds_in(loop.time, "loop.time")
    at_least(2, "loop", ", which BatchNorm needs", batch=loop.batch)
    at_least(0, "loop", " (0: PyTorch's choice)", threads=loop.threads)
    at_least(0, "loop", seed=loop.seed, checkpoint_seconds=loop.checkpoint_seconds)
    at_least(1, "pool", capacity=pool.capacity, holdout_capacity=pool.holdout_capacity)
    if not 0 < pool.holdout < 1:
        raise DodistillError(f"pool.holdout is {pool.holdout}; it must lie between 0 and 1, as in 0.03.")
    if not 0 <= loop.ema < 1:
        raise DodistillError(f"loop.ema is {loop.ema}; it must lie in [0, 1), as in 0.998.")
    if config.update.replays != (config.replay.name != "none"):
        use, fix = "uses no", "give --update replay or retain"
        if config.update.replays:
            use, fix = "needs", "give --replay NAME"
        raise DodistillError(
            f"update {config.update.name} {use} replayed inputs, but replay is {config.replay.name}: {fix}."
        )
    ends = (0, *loop.restarts, loop.steps)
    if loop.restarts and any(a >= b for a, b in itertools.pairwise(ends)):
        raise DodistillError(
            f"loop.restarts is {list(loop.restarts)}; give rising steps between 0 and loop.steps, {loop.steps}."
        )
    named = Counter(PurePath(spec).name for spec in data.probe)
    if twice := [name for name, n in named.items() if n > 1]:
        raise DodistillError(
            f"data.probe names {twice[0]} twice; results are kept by the last name of a path: rename one."
        )
    at_least(0, "augment", " (0: new views at each draw)", views=augment.views)
    positive("augment", ", as in 2", views_gb=augment.views_gb)
    for part, (low, high) in (("augment", augment.scale), ("view", view.scale)):
        if not 0 < low <= high <= 1:
            raise DodistillError(f"{part}.scale is {[low, high]}; give shares 0 < low <= high <= 1, as in [0.08, 1].")
    if not 0 < augment.mix_share <= 1:
        raise DodistillError(f"augment.mix_share is {augment.mix_share}; it must lie in (0, 1], as in 0.5.")
    at_least(0, "view", " (0: an eighth of the height)", pad=view.pad)
    if not 0 <= data.crop_share <= 1:
        raise DodistillError(
            f"data.crop_share is {data.crop_share}; it must lie in (0, 1], as in 0.875, or be 0, the default."
        )
    if any(data.image_shape) and min(data.image_shape) < 1:
        raise DodistillError(
            f"data.image_shape is {list(data.image_shape)}; give channels, height and width, as in 3,32,32."
        )
    for part, model in (("teacher", config.teacher), ("student", config.student)):
        at_least(0, part, " (0: from the weights)", num_classes=model.num_classes)
        positive(part, ", as in 255", input_range=model.input_range)
    positive("optim", ", as in 0.1", lr=optim.lr)
    if not 0 <= optim.momentum < 1 or (optim.nesterov and not optim.momentum):
        raise DodistillError(f"optim.momentum is {optim.momentum}; it must lie in [0, 1), and above 0 for nesterov.")
    at_least(0, "optim", ", as in 5e-4", weight_decay=optim.weight_decay)
    if not 0 <= optim.floor <= optim.lr:
        raise DodistillError(f"optim.floor is {optim.floor}; it must lie between 0 and optim.lr, {optim.lr}.")
    if not all(0 < m < 1 for m in optim.milestones):
        raise DodistillError(
            f"optim.milestones is {list(optim.milestones)}; give shares between 0 and 1, as in [0.4, 0.8]."
        )
