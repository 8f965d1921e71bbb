"""Errors that a user can cause. Each says what was wrong, with the value, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: Exit status of what the same command does later: a run stopped at its deadline, or a folder in use. (EX_TEMPFAIL.)
STOPPED = 75


class DodistillError(Exception):
    """A mistake in what was asked for, not in the program. The CLI prints the message alone and exits with 2."""


class Busy(DodistillError):
    """Another process is at it; nothing is wrong. The CLI prints the message alone and exits with 75."""


def nearest(name: str, known: Iterable[str], what: str = "name") -> str:
    """A sentence that refuses `name` and names its nearest relatives in `known`.

    >>> nearest("fats", ["fast", "deepinv"], "source")
    "unknown source 'fats'; did you mean 'fast'? Known: deepinv, fast."
    """
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=2, cutoff=0.5)
    hint = "; did you mean " + " or ".join(repr(c) for c in close) + "?" if close else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(options)}."
