"""A file is written whole or not at all: beside its final name first, then moved there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import DodistillError


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
