"""What the grid needs of an executor, and what it gives to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...config.tree import Tree


@dataclass(frozen=True)
class Work:
    """A cell to run: the arguments of `run_cell`, as plain values.

    Attributes:
        tree: the config.
        folder: the run folder of the cell on the driver's machine.
        teachers: the folder of the teachers there.
        device: `loop.device`.
        threads: `loop.threads`; 0: as many as the executor chooses.
        until: the time.time() at which it stops.
    """

    tree: Mapping[str, Any]
    folder: str
    label: Mapping[str, str]
    published: float | None
    teachers: str
    device: str = "auto"
    threads: int = 0
    until: float = math.inf
    track: str = ""


class Handle(Protocol):
    """A cell that was given to an executor."""

    def done(self) -> bool:
        """Whether `result` returns or raises at once."""

    def result(self) -> Tree:
        """The record. Raises what `run_cell` raises, and DodistillError for what failed around it."""

    def cancel(self) -> None:
        """Let it save a checkpoint and stop."""


class Executor(Protocol):
    """Runs cells."""

    jobs: int  #: cells that it is given at a time, at most
    shared: bool  #: whether cells run in their folder on this machine, and stop there at a budget by themselves

    def submit(self, works: Sequence[Work]) -> list[Handle]:
        """Begin to run cells. Raises DodistillError if it cannot."""

    def close(self) -> None:
        """Stop what runs, and wait for it."""
