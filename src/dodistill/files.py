"""A file is written whole or not at all: beside its final name first, then moved there. One process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import Busy, DodistillError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """`with replacing(path) as file: file.write(...)`. A kill or a full disk leaves what stood there before.

    Raises DodistillError where the folder may not be written or the disk is full.
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
            f"cannot write {path}: {reason}. What stood there before is untouched, a checkpoint too; make room or "
            "choose another folder, then start the same command again."
        ) from error


def claim(lock: Path, what: str) -> int | None:
    """Take the lock file `lock`; closing the handle that is returned, or the end of the process, gives it back.

    Raises Busy where another process has it, naming `what` is in use. None on a system without such locks (not POSIX).
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
