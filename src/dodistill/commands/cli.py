"""The command line: which command, its flags, and the exit status of what becomes of it.

A command is a file here with `Arguments`, a frozen dataclass whose fields and comments are its flags, and `run`, which
takes them and returns the exit status. A file is imported when its command runs, so that help does not wait for torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Union

import tyro

from .. import __version__
from ..config import choices, outline
from ..config.flags import Part, form, parse, part
from ..config.tree import build
from ..errors import STOPPED, Busy, DodistillError, nearest

COMMANDS = ("demo", "distill", "teach", "evaluate", "compare", "report", "look", "export", "methods", "doctor")
PROGRAM = "dodistill"
ABOUT = """Distil a trained image classifier into a small one without its training data, under P(S | do(X)).

first steps:
  dodistill demo                                  the main job on bundled data, in minutes
  dodistill COMMAND --help                        the flags of a command
  dodistill --version
  dodistill --tyro-write-completion bash FILE     a script for `source` that completes commands and flags (zsh, fish)"""


def _teach(_words: Sequence[str]) -> list[Part]:
    found = part(outline.read("engine.teach", "Teach"))
    return [dataclasses.replace(found, flags=[flag for flag in found.flags if flag.name != "model"])]


#: Flags that are settings of what the command makes, and not of the command; the words behind it may decide which.
SETTINGS: Mapping[str, Callable[[Sequence[str]], list[Part]]] = {"distill": choices.parts, "teach": _teach}
#: All such flags that there can be.
EVERY: Mapping[str, Callable[[], list[Part]]] = {"distill": choices.every_part, "teach": lambda: _teach([])}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (0 done, 2 a mistake in what was asked, 75 try again)."""
    if arguments is None:  # a process of our own
        keep_memory()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # the help has boxes and bullets, which not every terminal has
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words and words[0] in COMMANDS:
            return call(words[0], words[1:])
        return _overview(words)
    except DodistillError as error:
        print(f"dodistill: {error}", file=sys.stderr)
        return STOPPED if isinstance(error, Busy) else 2
    except SystemExit as end:  # of tyro, behind the help or a mistake that it has told
        return end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130


def call(command: str, words: Sequence[str]) -> int:
    """Run a command."""
    given, settings = read(command, words)
    module = importlib.import_module(f".{command}", __package__)
    arguments = build(module.Arguments, given, command)
    status: int = module.run(arguments, settings, words) if command in SETTINGS else module.run(arguments)
    return status


def read(command: str, words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the words behind a command say: to its `Arguments`, and as settings."""
    cls = outline.read(f"commands.{command}", "Arguments")
    own, more = part(cls), SETTINGS[command](words) if command in SETTINGS else []
    about = "\n\n".join(text for text in (own.about, *(p.about for p in more if not p.prefix)) if text)
    given = parse([own, *more], words, f"{PROGRAM} {command}", about)
    mine = {flag.name for flag in own.flags}
    return {k: v for k, v in given.items() if k in mine}, {k: v for k, v in given.items() if k not in mine}


def _overview(words: Sequence[str]) -> int:
    """The help that lists the commands, the version, or the script that completes them in a shell."""
    if words[:1] == ["--version"]:
        print(f"dodistill {__version__}")
        return 0
    if words and not words[0].startswith("-"):
        raise DodistillError(nearest(words[0], COMMANDS, "command"))
    full = any(word.startswith("--tyro") for word in words)
    every: Any = Union[tuple(_listed(command, full) for command in COMMANDS)]  # noqa: UP007
    # help is never None, with which tyro would look for a comment in the source
    chosen = Annotated[(every, tyro.conf.arg(name="", help=""), tyro.conf.OmitSubcommandPrefixes)]  # type: ignore
    top = dataclasses.make_dataclass("Top", [("command", chosen)])
    tyro.cli(top, args=words, prog=PROGRAM, description=ABOUT)
    return 2  # not reached: tyro exits


def _listed(command: str, full: bool) -> Any:
    """A command for tyro, with every flag that it can have where `full`, for completion."""
    cls = outline.read(f"commands.{command}", "Arguments")
    about = cls.__doc__.split("\n")[0]
    parts = [part(cls), *EVERY.get(command, list)()] if full else []
    return Annotated[Any, tyro.conf.subcommand(command, description=about, constructor=form(parts, about))]


def keep_memory() -> bool:
    """Ask glibc to keep what tensors have freed; False where there is no glibc, or the environment has settings for it.

    By default it goes back to the kernel after nearly every layer, and is mapped and zeroed anew, page by page, for the
    next one (benchmarks/allocator.py). Results do not depend on it.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    trim, pad, largest = -1, -2, -3  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD: malloc.h
    return all(mallopt(name, size) for name, size in ((largest, 32 << 20), (trim, (1 << 31) - 1), (pad, 64 << 20)))


if __name__ == "__main__":
    sys.exit(main())
