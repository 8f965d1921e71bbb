"""What the grid needs of an executor, and what it gives to it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...config.tree import Tree
from ...errors import DodistillError
from ..cell import Failed, Stopped, tail


@dataclass(frozen=True)
class Work:
    """A cell to run: the arguments of `run_cell`, as plain values.

    Attributes:
        tree: the config.
        folder: the run folder of the cell on the driver's machine.
        teachers: the folder of the teachers there.
        key: of the cell.
        device: `loop.device`.
        threads: `loop.threads`; 0: as many as the executor chooses.
        until: the time.time() at which it stops.
        storage: where its checkpoints are, under `name`; empty: in its folder alone.
        environment: variables for its process.
        cwd: the driver's folder, where a machine has it: relative paths of a recipe count from there.
    """

    tree: Mapping[str, Any]
    folder: str
    label: Mapping[str, str]
    published: float | None
    teachers: str
    key: str = ""
    device: str = "auto"
    threads: int = 0
    until: float = math.inf
    track: str = ""
    storage: str = ""
    name: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    cwd: str = ""


@dataclass(frozen=True)
class Teaching:
    """A teacher to train. `words`: those of `dodistill teach` without --out. The rest: see `Work`."""

    teacher: str
    words: Sequence[str]
    storage: str
    name: str
    until: float = math.inf
    environment: Mapping[str, str] = field(default_factory=dict)
    cwd: str = ""
    device: str = "auto"
    threads: int = 1


@dataclass(frozen=True)
class Outcome:
    """What came of some work. A value and no exception, as not every executor hands on exceptions as they are."""

    record: Tree | None = None  #: of a finished cell
    weights: bytes = b""  #: of a finished teacher
    stopped: bool = False  #: whether it can go on
    said: str = ""  #: why there is neither
    log: str = ""  #: the last lines of its process


class Handle(Protocol):
    """Some work that was given to an executor."""

    def done(self) -> bool:
        """Whether `result` returns at once."""

    def result(self) -> Outcome:
        """What came of it."""

    def cancel(self) -> None:
        """Let it save a checkpoint and stop; if it has not begun, drop it."""


class Executor(Protocol):
    """Does work, here or elsewhere."""

    jobs: int  #: how much of it is given at a time, at most
    here: bool  #: whether cells run in their folders on this machine; else their files come by the storage

    def submit(self, works: Sequence[Work | Teaching]) -> Sequence[Handle]:
        """Begin some work. Raises DodistillError if it cannot."""

    def close(self) -> None:
        """Stop what still runs."""


def outcome_of(do: Callable[[], Outcome], log: Path | None = None) -> Outcome:
    """What `do` returns, or an outcome that says why it failed, with the end of its log."""
    try:
        return do()
    except Stopped as stopped:
        return Outcome(stopped=True, said=str(stopped))
    except Failed as failed:
        return Outcome(said=f"FAILED {failed}", log="" if log is None else "\n".join(tail(log, 50)))
    except DodistillError as error:
        return Outcome(said=f"FAILED {error}")


def extra(module: str, on: str) -> Any:
    """An optional library. Raises DodistillError, which names the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DodistillError(f"--on {on} needs {module} ({error}): pip install 'dodistill[{on}]'") from error
