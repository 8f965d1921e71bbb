"""The command line: commands, their flags, and their exit statuses.

A command is a file here with `Arguments`, a frozen dataclass whose fields and comments are its flags, and `run`, which
takes them and returns the exit status. A file is imported when its command runs, so that help does not load torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from .. import __version__
from ..config import choices, outline
from ..config.flags import Part, form, parse, part, typed
from ..config.tree import build, expand
from ..errors import STOPPED, Busy, DodistillError, Elsewhere, nearest
from ..files import shown

COMMANDS = (
    "demo", "distill", "teach", "evaluate", "compare", "report", "look", "rank", "export", "pack", "methods", "doctor",
)  # fmt: skip
PROGRAM = "dodistill"
#: how the names of modules begin that are files of the user's: methods, and factories of networks
USERS = ("dodistill_file_", "_dodistill_file_")
ABOUT = """Distil a trained image classifier into a small one without its training data, under P(S | do(X)).

first steps:
  dodistill demo                                  distillation on bundled data, in minutes
  dodistill COMMAND --help                        the flags of a command
  dodistill --version
  dodistill COMMAND ... --debug                   show the traceback of an unexpected error
  dodistill --tyro-write-completion bash FILE     write a completion script, to be sourced (also zsh, fish)"""


def _teach(_words: Sequence[str]) -> list[Part]:
    found = part(outline.read("engine.teach", "Teach"))
    return [dataclasses.replace(found, flags=[flag for flag in found.flags if flag.name != "model"])]


#: Command -> flags for the settings of a run or a training, as determined by the words of the command line.
SETTINGS: Mapping[str, Callable[[Sequence[str]], list[Part]]] = {"distill": choices.parts, "teach": _teach}
#: Command -> all such flags, for completion.
EVERY: Mapping[str, Callable[[], list[Part]]] = {"distill": choices.every_part, "teach": lambda: _teach([])}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (0 done, 2 invalid request, 75 rerun later)."""
    if arguments is None:  # called as a program
        keep_memory()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # not every terminal can encode the help's boxes and bullets
    start = time.monotonic()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        if words and words[0] in COMMANDS:
            return call(words[0], words[1:], start)
        return _overview(words)
    except Elsewhere:
        return 2
    except DodistillError as error:
        print(f"dodistill: {_rank()}{error}", file=sys.stderr)
        return STOPPED if isinstance(error, Busy) else 2
    except SystemExit as end:  # raised by tyro after the help, or after an error that it has printed
        return end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:  # the reader of the output closed the pipe
        sys.stderr.close()
        return 0
    except Exception as error:
        if debug:
            raise
        print(f"dodistill: {_rank()}{unexpected(error, words)}", file=sys.stderr)
        return 2 if isinstance(error, OSError | MemoryError) else 1
    except KeyboardInterrupt:
        print("\nstopped; rerun the command to resume from the last checkpoint.", file=sys.stderr)
        return 130


def _rank() -> str:
    """Which of several processes of one run speaks; empty for the first one."""
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    return "" if rank == "0" else f"rank {rank}: "


def unexpected(error: Exception, words: Sequence[str]) -> str:
    """A short message for an error that nothing else has explained; the traceback goes to a file.

    The file is `error-*.log` in the run folder of the command, or in the folder of temporary files.
    """
    said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
    out = typed(words, ["out"]).get("out", "")
    folder = Path(out) if out and (Path(out) / "config.json").is_file() else Path(tempfile.gettempdir())
    kept = "checkpoint.pt" if (folder / "checkpoint.pt").is_file() else ""
    try:
        handle, name = tempfile.mkstemp(".log", "error-", folder)
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        name = ""
    if ("alloc" in str(error) and isinstance(error, RuntimeError | MemoryError)) or isinstance(error, MemoryError):
        text = f"out of memory ({said}); give a smaller batch, image shape or pool."
    elif isinstance(error, OSError):
        text = f"{error.strerror or said}: {shown(error.filename) if error.filename else said}; check the path."
    elif where := _users(error):
        text = f"{where}: {said}; correct the file."
    else:
        text = f"unexpected error, please report it: {said}."
    if kept:
        text += f" The checkpoint {folder / kept} is intact; rerun the command to resume."
    return text + (f" Traceback: {name}" if name else "") + " (or add --debug)."


def _users(error: BaseException) -> str:
    """The file and the line of code of the user's in which an error arose; empty if there is none."""
    frames = traceback.walk_tb(error.__traceback__)
    mine = [(f, line) for f, line in frames if str(f.f_globals.get("__name__", "")).startswith(USERS)]
    return f"{mine[-1][0].f_code.co_filename}, line {mine[-1][1]}" if mine else ""


def call(command: str, words: Sequence[str], start: float) -> int:
    """Run a command. `start`: when it began, in time.monotonic(), before torch was imported."""
    given, settings = read(command, words)
    module = importlib.import_module(f".{command}", __package__)
    arguments = build(module.Arguments, expand(given), command)
    status: int = module.run(arguments, settings, words, start) if command in SETTINGS else module.run(arguments)
    return status


def read(command: str, words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parse the words after a command: (fields of its `Arguments`, settings)."""
    cls = outline.read(f"commands.{command}", "Arguments")
    own, more = part(cls), SETTINGS[command](words) if command in SETTINGS else []
    about = "\n\n".join(text for text in (own.about, *(p.about for p in more if not p.prefix)) if text)
    given = parse([own, *more], words, f"{PROGRAM} {command}", about)
    mine = {flag.name for flag in own.flags}
    return {k: v for k, v in given.items() if k in mine}, {k: v for k, v in given.items() if k not in mine}


def _overview(words: Sequence[str]) -> int:
    """Print the list of commands or the version, or write the completion script."""
    if words[:1] == ["--version"]:
        print(f"dodistill {__version__}")
        return 0
    if words and not words[0].startswith("-"):
        raise DodistillError(nearest(words[0], COMMANDS, "command"))
    full = any(word.startswith("--tyro") for word in words)
    every: Any = Union[tuple(_listed(command, full) for command in COMMANDS)]  # noqa: UP007
    # help is never None: for None, tyro would search the source for a comment
    chosen = Annotated[(every, tyro.conf.arg(name="", help=""), tyro.conf.OmitSubcommandPrefixes)]  # type: ignore
    top = dataclasses.make_dataclass("Top", [("command", chosen)])
    tyro.cli(top, args=words, prog=PROGRAM, description=ABOUT)
    return 2  # not reached: tyro exits


def _listed(command: str, full: bool) -> Any:
    """A command for tyro; with `full`, all flags that it can have, for completion."""
    cls = outline.read(f"commands.{command}", "Arguments")
    about = cls.__doc__.split("\n")[0]
    parts = [part(cls), *EVERY.get(command, list)()] if full else []
    return Annotated[Any, tyro.conf.subcommand(command, description=about, constructor=form(parts, about))]


def keep_memory() -> bool:
    """Make glibc keep the memory of freed tensors. False without glibc, or if the environment configures its malloc.

    By default, glibc returns this memory to the kernel after nearly every layer, and the kernel maps and zeroes new
    pages for the next layer (benchmarks/allocator.py). Results do not depend on this setting. Large blocks, as those of
    a layer of WRN-40-2 at batch 256, come from the heap too: what is mapped on its own cannot be kept.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    trim, pad, mapped = -1, -2, -4  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX: malloc.h
    return all(mallopt(name, size) for name, size in ((mapped, 0), (trim, (1 << 31) - 1), (pad, 64 << 20)))


if __name__ == "__main__":
    sys.exit(main())
