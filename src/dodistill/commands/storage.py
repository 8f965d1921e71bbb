"""Files that several machines share: in a folder, or at a URL that fsspec writes (s3://, gs://, sftp://, ...)."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..errors import DodistillError

T = TypeVar("T")
#: Seconds before each further try of what a storage refused.
AGAIN = (1.0, 4.0)


class Unwritable(DodistillError):
    """A storage refuses reading or writing."""


class Files(Protocol):
    """What a storage can do. Names are relative, with /; a missing file is a FileNotFoundError."""

    def put(self, path: Path, name: str) -> None: ...
    def get(self, name: str, path: Path) -> None: ...
    def write(self, name: str, data: bytes) -> None: ...
    def read(self, name: str) -> bytes: ...
    def names(self, folder: str) -> list[str]: ...
    def remove(self, name: str) -> None: ...


class Folder:
    """A folder of this machine, or one that several machines mount. A file appears whole or not at all."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, path: Path, name: str) -> None:
        with self._replacing(name) as new:
            shutil.copyfile(path, new)

    def write(self, name: str, data: bytes) -> None:
        with self._replacing(name) as new:
            new.write_bytes(data)

    @contextlib.contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{uuid.uuid4().hex[:8]}.tmp")
        try:
            yield new
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)

    def get(self, name: str, path: Path) -> None:
        shutil.copyfile(self._root / name, path)

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(p.name for p in (self._root / folder).iterdir() if not p.name.startswith("."))
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        path = self._root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class Remote:
    """A file system of fsspec."""

    def __init__(self, system: Any, root: str) -> None:
        self._system, self._root = system, root.rstrip("/")

    def put(self, path: Path, name: str) -> None:
        self._system.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
        self._system.put_file(str(path), f"{self._root}/{name}")

    def write(self, name: str, data: bytes) -> None:
        self._system.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
        self._system.pipe_file(f"{self._root}/{name}", data)

    def get(self, name: str, path: Path) -> None:
        self._system.get_file(f"{self._root}/{name}", str(path))

    def read(self, name: str) -> bytes:
        found: bytes = self._system.cat_file(f"{self._root}/{name}")
        return found

    def names(self, folder: str) -> list[str]:
        self._system.invalidate_cache()  # other machines write, too
        try:
            found = self._system.ls(f"{self._root}/{folder}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._system.rm(f"{self._root}/{name}", recursive=True)


class Storage:
    """Files below a URL or a path. What fails is tried again, then raises Unwritable with the reason."""

    def __init__(self, url: str) -> None:
        """Raises DodistillError for a URL without fsspec, or of a kind that it does not know."""
        self.url = url.rstrip("/")
        self._files: Files = Folder(Path(url.removeprefix("file://")).expanduser())
        if "://" in url and not url.startswith("file://"):
            try:
                import fsspec
            except ImportError as error:
                raise DodistillError(
                    f"--storage {url} needs fsspec: pip install 'dodistill[remote]'; a path needs nothing."
                ) from error
            try:
                self._files = Remote(*fsspec.core.url_to_fs(url))
            except (ImportError, ValueError) as error:
                raise DodistillError(f"--storage {url}: {error}; install that, or give a path.") from error

    def check(self) -> None:
        """Write a small file, read it back, and delete it. Raises Unwritable."""
        name, data = f"probe-{uuid.uuid4().hex[:8]}", b"dodistill"
        self.write(name, data)
        if self.read(name) != data:
            raise Unwritable(f"{self.url} does not give back what was written; give another --storage.")
        self.remove(name)

    def put(self, path: Path, name: str) -> None:
        self._tried("write", name, lambda: self._files.put(path, name))

    def get(self, name: str, path: Path) -> None:
        """Raises FileNotFoundError for a missing file."""
        self._tried("read", name, lambda: self._files.get(name, path))

    def write(self, name: str, data: bytes) -> None:
        self._tried("write", name, lambda: self._files.write(name, data))

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError for a missing file."""
        return self._tried("read", name, lambda: self._files.read(name))

    def names(self, folder: str) -> list[str]:
        """What lies in a folder, sorted; nothing if there is no such folder."""
        return self._tried("list", folder, lambda: self._files.names(folder))

    def remove(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it."""
        self._tried("delete", name, lambda: self._files.remove(name))

    def _tried(self, verb: str, name: str, do: Callable[[], T]) -> T:
        for wait in (*AGAIN, None):
            try:
                return do()
            except FileNotFoundError:
                if verb == "read":
                    raise
                reason = "no such folder"
            except Exception as error:  # each system of fsspec has its own
                reason = str(getattr(error, "strerror", None) or error).partition("\n")[0] or type(error).__name__
            if wait is not None:
                time.sleep(wait)
        raise Unwritable(f"cannot {verb} {self.url}/{name}: {reason}; make it writable, or give another --storage.")
