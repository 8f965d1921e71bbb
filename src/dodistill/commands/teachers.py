"""The teachers of a recipe: those that are missing are trained before the cells, here or by an executor."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import plugins
from ..config.tree import Tree, build, expand
from ..core.deadline import Deadline
from ..engine.run_folder import write_atomically
from ..engine.teach import Teach
from ..errors import STOPPED, Busy, DodistillError
from ..files import claimed
from ..models import read_metadata
from .cell import DODISTILL
from .cell_runs import environment
from .cli import read
from .executors.shared import Executor, Teaching
from .storage import Storage
from .teach import Arguments, taught


def _teach_commands(recipe: Tree, allow_code: bool) -> Iterator[tuple[str, list[str]]]:
    """The name of each teacher, and the words of `dodistill teach` without --out."""
    for name, settings in (recipe.get("teachers") or {}).items():
        settings = dict(settings)
        if file := plugins.model_file(str(settings["model"])):
            plugins.refuse(file, f"dodistill teach {settings['model']}", allow_code)
        words = [str(settings.pop("model"))]
        for key, value in settings.items():
            words += [f"--{key}", str(value)]
        yield name, words


def taught_otherwise(recipe: Tree, folder: Path) -> list[str]:
    """A sentence for each teacher in `folder` that was taught by other settings than the recipe's. Files of an older
    version, and those that were not taught here, do not say how."""
    said = []
    for name, words in _teach_commands(recipe, allow_code=True):  # which does not run here
        file = folder / f"{name}.safetensors"
        then = _metadata(file).get("taught")
        if isinstance(then, dict):
            given, settings = read("teach", words)
            arguments = build(Arguments, expand(given), "teach")
            now = taught(arguments, build(Teach, {**settings, "model": arguments.model}, "teach"))
            other = [key for key in then if key in now and then[key] != now[key]]
            if other:
                was, says = (", ".join(f"{key} {some[key]}" for key in other) for some in (then, now))
                said.append(f"{file} was taught with {was}, and the recipe's teachers.{name} now says {says}.")
    return said


def _metadata(file: Path) -> dict[str, Any]:
    """The metadata of a teacher's file; {} where there is none, or a damaged one, which the cells that read it name."""
    try:
        return read_metadata(file)
    except DodistillError:
        return {}


def teach_missing(recipe: Tree, folder: Path, deadline: Deadline, allow_code: bool = False) -> bool:
    """Train the recipe's missing teachers, one after another. Returns False when the budget ends first."""
    for name, (model, *flags) in _teach_commands(recipe, allow_code):
        target, told = folder / f"{name}.safetensors", False
        command = [*DODISTILL, "teach", model, "--out", str(target), *flags]
        while not target.exists():
            if deadline.passed:
                return False
            folder.mkdir(parents=True, exist_ok=True)
            left = ["--max-seconds", f"{max(1.0, deadline - time.monotonic()):.1f}"] if math.isfinite(deadline) else []
            try:
                with claimed(folder / f".{name}.lock", str(target)):
                    done = target.exists()  # another process may have trained it meanwhile
                    status = 0 if done else _status([*command, *left], deadline)
            except Busy as busy:
                if not told:
                    print(f"{busy} Waiting.", file=sys.stderr)
                told = True
                time.sleep(min(2.0, max(0.0, deadline - time.monotonic()) + 0.1))
                continue
            if status == STOPPED:
                return False
            if status:
                raise DodistillError(f"training teacher {name} failed, with the error above: {' '.join(command)}")
    return True


def _status(command: Sequence[str], deadline: Deadline) -> int:
    """The exit status of a command, which is told to stop when this process is."""
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            if deadline.stopped:
                process.terminate()
            time.sleep(0.1)
    finally:
        process.terminate()
        process.wait()
    return STOPPED if process.returncode == -signal.SIGTERM else process.returncode


def teach_elsewhere(
    recipe: Tree, folder: Path, executor: Executor, deadline: Deadline, storage: str, allow_code: bool = False
) -> bool:
    """Let an executor train the missing teachers, all at once. Returns False when the budget ends first."""
    every = _teach_commands(recipe, allow_code)
    missing = [(name, words) for name, words in every if not (folder / f"{name}.safetensors").exists()]
    left = deadline - time.monotonic()
    until = time.time() + left if math.isfinite(left) else math.inf
    works = [
        Teaching(name, words, storage, f"teacher-{name}-{_digest(words)}", until, environment(), os.getcwd())
        for name, words in missing
    ]
    if not works or deadline.passed:
        return not works
    print(f"training {', '.join(name for name, _ in missing)}", file=sys.stderr)
    handles = executor.submit(works)
    while not all(handle.done() for handle in handles):
        if deadline.passed:
            for handle in handles:
                handle.cancel()
        time.sleep(0.2)
    outcomes = [handle.result() for handle in handles]
    for work, outcome in zip(works, outcomes):
        if outcome.weights:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / f"{work.teacher}.safetensors", outcome.weights)
            Storage(storage).remove(work.name)
    for work, outcome in zip(works, outcomes):
        if not outcome.weights and not outcome.stopped:
            raise DodistillError(f"training teacher {work.teacher}: {outcome.said} {outcome.log}")
    return not any(outcome.stopped for outcome in outcomes)


def _digest(words: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:8]
