"""Atomic writes, to a temporary file that is then moved; and locks, for one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import Busy, DodistillError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """`with replacing(path) as file: file.write(...)`. A kill or a full disk leaves the old file intact.

    Raises DodistillError if the folder is not writable or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise DodistillError(
            f"cannot write {path}: {reason}. The previous file and checkpoints are intact; free disk space or choose "
            "another folder, then rerun the command."
        ) from error


def claim(lock: Path, what: str) -> int | None:
    """Acquire the lock file `lock`; closing the returned handle, or the end of the process, releases it.

    Raises Busy, which names `what`, if another process has it. None on a system without such locks (not POSIX).
    """
    try:
        import fcntl
    except ImportError:
        return None
    handle = None
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if handle is not None:
            os.close(handle)
        if isinstance(error, BlockingIOError):
            raise Busy(f"{what} is in use by another process; wait for it, or choose another --out.") from error
        raise DodistillError(f"cannot write to {lock.parent}: {error.strerror}; choose another --out.") from error
    return handle


@contextmanager
def claimed(lock: Path, what: str) -> Iterator[None]:
    """`claim` for the length of a block."""
    handle = claim(lock, what)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
