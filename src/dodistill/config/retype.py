"""A command line of `dodistill distill` with other settings: the next command for a person to type."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from .flags import LONG, SHORT, shown, spelled

#: Flags that belong to the command that was typed, not to the run: how long it may take, and what it shows.
_OF_THE_COMMAND = ("max_seconds", "quiet", "no_report")
#: Names in the tree -> the short flag that the printed command has.
_FLAG = {
    "loop.steps": "steps",
    "loop.time": "time",
    "loop.batch": "batch",
    "source.name": "source",
    "source.preset": "preset",
}


def _full(word: str) -> str:
    """The name in the tree of a typed flag: --seed and --loop.seed give loop.seed."""
    name = spelled(word)
    return {short: name for name, short in LONG.items()}.get(name) or SHORT.get(name, name)


def _flags(words: list[str]) -> Iterator[list[str]]:
    """The words in groups: a flag with its value, or one word without a flag."""
    at = 0
    while at < len(words):
        size = 1
        if words[at].startswith("--") and "=" not in words[at] and at + 1 < len(words):
            size = 1 if words[at + 1].startswith("--") else 2
        yield words[at : at + size]
        at += size


def retyped(command: str, changes: Mapping[str, Any], out: str = "", without: Collection[str] = ()) -> str:
    """`command` with the settings `changes` (dotted names of the tree) in place of those that it gives.

    Args:
        command: as in summary.json; empty, or one that is not `dodistill distill`, gives an empty text.
        out: the run folder of the new command; empty: as in `command`.
        without: parts of the config whose settings are left out, as `source` where the source changes.
    """
    words = shlex.split(command)
    if words[:2] != ["dodistill", "distill"]:
        return ""
    gone = {*changes, *_OF_THE_COMMAND, *(["out"] if out else [])}
    gone |= {"loop.time"} if "loop.steps" in changes else set()  # one of them is given
    kept = []
    for group in _flags(words):
        name = _full(group[0]) if group[0].startswith("--") else ""
        if name in gone or name.partition(".")[0] in without:
            continue
        kept += group
    for name, value in changes.items():
        kept += [f"--{_FLAG.get(name, name)}", shown(value)]
    return shlex.join([*kept, *(["--out", out] if out else [])])
