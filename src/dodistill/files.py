"""Atomic writes, to a temporary file that is then moved; and locks, for one process at a time."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from .errors import Busy, DodistillError


@contextmanager
def replacing(path: Path, several: bool = False) -> Iterator[BinaryIO]:
    """`with replacing(path) as file: file.write(...)`. A kill or a full disk leaves the old file intact.

    A symbolic link at `path` is replaced, not followed. `several`: other threads or processes may write the file at the
    same time; each has a temporary file of its own then, and the last one stays. Raises DodistillError if the folder is
    not writable or the disk is full.
    """
    mine = f".{os.getpid()}-{threading.get_ident()}" if several else ""
    temporary = path.with_name(f".{path.name}{mine}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed start; or a link, which must not be followed
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, ValueError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise DodistillError(
            f"cannot write {path}: {reason}. The previous file and checkpoints are intact; free disk space or choose "
            "another folder, then rerun the command."
        ) from error


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object in a file. Raises DodistillError, which ends in `fix`, if it is missing, damaged or another
    value."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DodistillError(f"no {path}; {fix}.") from error
    except OSError as error:
        raise DodistillError(f"cannot read {path}: {error.strerror}; {fix}.") from error
    except (ValueError, RecursionError) as error:
        raise DodistillError(f"{path} is damaged or cut short ({error}); {fix}.") from error
    if not isinstance(found, dict):
        raise DodistillError(f"{path} holds a {type(found).__name__}, not an object of settings; {fix}.")
    return found


def shown(path: str | os.PathLike[str]) -> str:
    """A path for a message or a page: bytes that are not UTF-8 become a replacement character."""
    return os.fsencode(path).decode(errors="replace")


def claim(lock: Path, what: str) -> filelock.BaseFileLock:
    """Acquire the lock file `lock`; its `release`, or the end of the process, releases it.

    Raises Busy, which names `what`, if another process has it.
    """
    held = filelock.FileLock(lock, timeout=0, mode=0o666, is_singleton=True)  # this process may claim it twice
    try:
        held.acquire()
    except filelock.Timeout as error:
        raise Busy(f"{what} is in use by another process; wait for it, or choose another --out.") from error
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DodistillError(f"cannot write to {lock.parent}: {reason}; choose another --out.") from error
    return held


@contextmanager
def claimed(lock: Path, what: str) -> Iterator[None]:
    """`claim` for the length of a block."""
    held = claim(lock, what)
    try:
        yield
    finally:
        held.release()
