"""Errors that a user can cause. Each message names what is wrong, the value, and the fix."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

#: Exit status if the same command can succeed later: a run stopped at its deadline, or a folder in use. (EX_TEMPFAIL.)
STOPPED = 75


class DodistillError(Exception):
    """An error in the user's input, not in the program. The CLI prints the message alone and exits with 2."""


class Busy(DodistillError):
    """Another process uses the file or folder. The CLI prints the message alone and exits with 75."""


class Elsewhere(DodistillError):
    """Another process of the same run has stopped by an error, which it reports itself. The CLI exits with 2."""


@contextmanager
def reworded(text: Callable[[str], str]) -> Iterator[None]:
    """For code of the user's, which may raise anything: its exception becomes DodistillError(text(reason)), where
    reason is its type and first line. A DodistillError passes."""
    try:
        yield
    except DodistillError:
        raise
    except Exception as error:
        raise DodistillError(text(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")) from error


def nearest(name: str, known: Iterable[str], what: str = "name") -> str:
    """A sentence that refuses `name` and lists the most similar names in `known`.

    >>> nearest("fats", ["fast", "deepinv"], "source")
    "unknown source 'fats'; did you mean 'fast'? Known: deepinv, fast."
    """
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=2, cutoff=0.5)
    hint = "; did you mean " + " or ".join(repr(c) for c in close) + "?" if close else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(options)}."


def at_least(least: float, part: str, /, hint: str = "", **settings: float | None) -> None:
    """Raise DodistillError for the first of the settings of `part` that is below `least`. None, a default, passes.

    >>> at_least(1, "loop", steps=0, batch=128)
    DodistillError: loop.steps is 0; it must be at least 1.
    """
    for name, value in settings.items():
        if value is not None and not value >= least:
            raise DodistillError(f"{_dotted(part, name)} is {value}; it must be at least {least}{hint}.")


def positive(part: str, /, hint: str = "", **settings: float | None) -> None:
    """Raise DodistillError for the first of the settings of `part` that is 0, below, infinite or NaN. None passes."""
    for name, value in settings.items():
        if value is not None and not 0 < value < math.inf:
            raise DodistillError(f"{_dotted(part, name)} is {value}; it must be a positive number{hint}.")


def _dotted(part: str, name: str) -> str:
    return f"{part}.{name}" if part else name
