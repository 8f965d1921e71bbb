"""Training longer: a finished run goes on in its folder when its command is repeated with more steps.

The schedule of the rate has ended, so it begins anew: a second cosine from where the student stands (a warm restart, as
in SGDR, Loshchilov and Hutter, ICLR 2017), or the same constant rate. `loop.restarts` holds the steps at which this
happened. It is a part of the config, so a grid never takes such a run for a plain one. A run from the start with the
same `loop.restarts` computes the same.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..config.tree import Distill, Tree, grown, lasting, portable, resolve
from ..errors import DodistillError
from ..files import read_object

#: Schedules that can begin anew. The others end in a way that a second time would undo.
AGAIN = ("cosine", "constant")


def settings_of(tree: Tree) -> Tree:
    """The settings that determine a result: all except `RUNTIME`'s."""
    return lasting(portable(tree))


def longer(out: str | Path | None, config: Distill) -> Distill:
    """`config`, with `loop.restarts` where the run folder `out` holds a run of fewer steps that can go on.

    Raises DodistillError for a run that differs only in its steps but cannot go on, and says why.
    """
    known = None if out is None else Path(out) / "config.json"
    if known is None or not os.path.exists(known) or config.loop.restarts:  # False also for a name that cannot be
        return config
    old = read_object(known, "choose another --out")
    loop = old.get("loop")
    if not isinstance(loop, Mapping) or not isinstance(loop.get("steps"), int):
        return config
    steps, before = loop["steps"], tuple(loop.get("restarts") or ())
    plain = _with(config, steps, before)
    if not grown(*(settings_of(t) for t in (old, plain.to_tree(), resolve(config.choices()).to_tree()))):
        return config  # the run folder names what differs
    if config.loop.steps == steps:
        return plain
    if config.loop.steps < steps:
        raise DodistillError(
            f"the run in {out} has {steps} steps, and {config.loop.steps} were asked for. A run can only be trained "
            f"longer: give --steps {steps} or more, or choose another --out."
        )
    _require_end(Path(out or ""), config, steps)
    return _with(config, config.loop.steps, (*before, steps))


def _with(config: Distill, steps: int, restarts: tuple[int, ...]) -> Distill:
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=steps, restarts=restarts))


def _require_end(folder: Path, config: Distill, steps: int) -> None:
    """Raise DodistillError if the run in `folder` cannot go on beyond its last step."""
    asked, schedule = config.loop.steps, config.optim.schedule
    if summary_steps(folder) is None:
        raise DodistillError(
            f"the run in {folder} has not reached the end of its {steps} steps, and its rate is scheduled for them: "
            f"finish it first, with --steps {steps}, then repeat the command with --steps {asked}; or choose another "
            "--out."
        )
    if schedule not in AGAIN:
        raise DodistillError(
            f"the run in {folder} cannot be trained longer: its schedule, {schedule}, has ended after {steps} steps; "
            f"only {' and '.join(AGAIN)} can begin anew. Choose another --out to train {asked} steps from the start."
        )
    if not any((folder / name).exists() for name in ("checkpoint.pt", "previous.pt")):
        raise DodistillError(
            f"the run in {folder} cannot be trained longer: its checkpoints were deleted (`compare` does so). Choose "
            f"another --out to train {asked} steps from the start."
        )


def summary_steps(folder: Path) -> int | None:
    """The steps of the outcome in a run folder; None without one."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    found = read_object(path, "delete it to finish the run again, or choose another --out").get("steps")
    return found if isinstance(found, int) else None


def extends(old: Tree, new: Tree, default: Tree) -> bool:
    """Whether a config tree is another one, trained longer; of `settings_of`, as `grown` takes them."""
    mine, its = dict(new["loop"]), dict(old.get("loop") or {})
    restarts, before = list(mine.get("restarts") or ()), list(its.get("restarts") or ())
    if not restarts or restarts != [*before, its.get("steps")]:
        return False
    undone = {**new, "loop": {**mine, "steps": its["steps"], "restarts": before}}
    return grown({**old, "loop": {**its, "restarts": before}}, undone, default)


def set_aside(folder: Path, steps: int) -> None:
    """Keep the outcome of fewer than `steps` steps as summary-N.json and student-N.safetensors."""
    done = summary_steps(folder)
    if done is None or done >= steps:
        return
    student, kept = folder / "student.safetensors", folder / f"student-{done}.safetensors"
    if student.exists():
        shutil.copyfile(student, folder / f".{kept.name}.tmp")
        os.replace(folder / f".{kept.name}.tmp", kept)
    os.replace(folder / "summary.json", folder / f"summary-{done}.json")


def restart_note(config: Distill) -> str:
    """How the rate went on where the run was trained longer, for the summary; empty for a plain run."""
    if not config.loop.restarts:
        return ""
    where = ", ".join(map(str, config.loop.restarts))
    how = f"the rate stayed at {config.optim.lr:g}"
    if config.optim.schedule == "cosine":
        how = f"a new cosine began at step {where}, with the rate {config.optim.lr:g} (a warm restart)"
    return (
        f"trained longer: {how}. A run of {config.loop.steps} steps from the start, with one schedule, is another run."
    )
