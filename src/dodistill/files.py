"""A file is written whole or not at all: beside its final name first, then moved there. One process at a time."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
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


def claim(owner: object, lock: Path, what: str) -> Callable[[], object]:
    """Take the lock file `lock` for as long as `owner` lives, or until what is returned is called.

    It goes when its process ends, however it ends. Raises Busy where another process has it: `what` is in use. On a
    system that is not POSIX there is no such lock, and nothing is taken.
    """
    try:
        import fcntl
    except ImportError:
        return lambda: None
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        release = weakref.finalize(owner, os.close, handle)
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Busy(f"{what} is in use by another process; wait for it, or choose another --out.") from error
    except OSError as error:
        raise DodistillError(f"cannot write to {lock.parent}: {error.strerror}; choose another --out.") from error
    return release
