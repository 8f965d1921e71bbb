"""The files of a run in a storage, so that another machine goes on with it.

Below the run's name lie

    files/SHA256                what a file of the run holds; written once
    sets/NUMBER-ATTEMPT.json    which files make one checkpoint, written after all of them

A set counts if every file of it is there and has its hash. An upload that was cut short has no set, so the one before
it counts. Numbers grow from set to set, and each attempt names its own: two machines that run the same cell by accident
do not touch each other's files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from ..errors import DodistillError
from .storage import Storage, Unwritable

#: Files that only an unfinished run needs.
UNFINISHED = ("checkpoint.pt", "previous.pt", "pool-*.pt", "*.teaching.pt")
#: Endings of files in which paths of a machine stand.
TEXT = (".json", ".md", ".yaml", ".html")
#: Seconds before a checkpoint that the storage refused is tried again.
PAUSE = 30.0


@dataclass(frozen=True)
class Set:
    """One checkpoint, or the outcome: name -> (sha256, bytes)."""

    number: int
    finished: bool
    files: Mapping[str, tuple[str, int]]


class StoredRun:
    """A run folder and its copy in a storage."""

    def __init__(
        self, storage: Storage, name: str, folder: Path, paths: Mapping[str, str], mark: str = "checkpoint.pt"
    ) -> None:
        """`paths`: {"{teachers}": a path of this machine}, which the storage keeps by its name. `mark`: the file that a
        checkpoint replaces last."""
        self._storage, self._name, self._folder, self._mark = storage, name, folder, mark
        self._paths = {"{folder}": str(folder), **paths}
        self._attempt = uuid.uuid4().hex[:8]
        self._number = 0  #: of the newest set that is known
        self._began = 0  #: number of the set that this attempt went on from; 0: from the beginning
        self._seen: object = None  #: the mark that was last written
        self._hashes: dict[tuple[int, int, int], str] = {}  #: of files that do not change
        self._there: set[str] = set()  #: hashes of files in the storage
        self._next = 0.0  #: no earlier try, in time.monotonic()

    # --------------------------------------------------------------------------------------------- reading

    def fetch(self) -> bool:
        """Put the newest intact set into the folder, unless the folder is as new. Whether it did. Raises Unwritable."""
        before: list[tuple[int, str]] = []
        while (sets := self._sets()) != before:  # another machine may replace them meanwhile
            before = sets
            self._number = max(number for number, _ in sets)
            here = self._marker.read_text(encoding="utf-8") if self._marker.exists() else ""
            for number, name in sets:
                found = self._read(name)
                if found is None or (here.isdigit() and int(here) >= number):
                    continue
                if not here and self._state() is not None and not found.finished:
                    return False  # begun here without the storage
                if self._download(found):
                    self._began = number
                    self._marker.write_text(str(number), encoding="utf-8")
                    self._seen = self._state()
                    return True
        return False

    def peek(self, file: str) -> bytes | None:
        """What the newest set holds of one file."""
        with contextlib.suppress(FileNotFoundError, Unwritable):
            for _, name in self._sets()[:1]:
                found = self._read(name)
                if found is not None and file in found.files:
                    return self._storage.read(f"{self._name}/files/{found.files[file][0]}")
        return None

    def _sets(self) -> list[tuple[int, str]]:
        """(number, name) of the sets, the newest first."""
        names = [n for n in self._storage.names(f"{self._name}/sets") if n.split("-")[0].isdigit()]
        return sorted(((int(n.split("-")[0]), n) for n in names), reverse=True)

    def _read(self, name: str) -> Set | None:
        """A set; None for a damaged one."""
        try:
            tree = json.loads(self._storage.read(f"{self._name}/sets/{name}"))
            files = {str(n): (str(digest), int(size)) for n, (digest, size) in tree["files"].items()}
            finished = bool(tree["finished"])
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError):
            return None
        if any(PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts for n in files):
            return None
        return Set(int(name.split("-")[0]), finished, files)

    def _download(self, found: Set) -> bool:
        """Move the files of a set into the folder, the mark last; False, and nothing moved, if one is damaged."""
        with self._beside() as new:
            for name, (digest, size) in found.files.items():
                path = new / name
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._storage.get(f"{self._name}/files/{digest}", path)
                except FileNotFoundError:
                    return False
                if path.stat().st_size != size or _sha256(path) != digest:
                    return False
                self._there.add(digest)
                self._reworded(path, self._paths)
            for name in sorted(found.files, key=lambda n: (n == self._mark, n == "summary.json")):
                (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(new / name, self._folder / name)
        return True

    # --------------------------------------------------------------------------------------------- writing

    def sync(self) -> None:
        """Write the newest checkpoint, if there is one that the storage has not. What the storage refuses is tried
        again later, at the end by `close`; the run goes on."""
        state = self._state()
        if state is None or state == self._seen or time.monotonic() < self._next:
            return
        try:
            self._upload(finished=False)
            self._seen = state
        except Unwritable:
            self._next = time.monotonic() + PAUSE

    def close(self, finished: bool) -> None:
        """Write what the run left: its outcome, or its last checkpoint. Raises Unwritable, which says where it is."""
        try:
            if finished:
                self._there.clear()  # another attempt that finished first has deleted what was there
                self._upload(finished=True)
            elif (state := self._state()) is not None and state != self._seen:
                self._upload(finished=False)
        except Unwritable as error:
            where = f"{self._folder} on {platform.node()}"
            raise Unwritable(f"{error} What the run has computed is in {where}.") from error

    def drop(self) -> None:
        """Delete what the storage holds of the run. Raises Unwritable."""
        self._storage.remove(self._name)
        self._marker.unlink(missing_ok=True)

    def _upload(self, finished: bool) -> None:
        with self._beside() as staged:
            self._stage(staged, finished)
            files = {}
            for path in sorted(p for p in staged.rglob("*") if p.is_file()):
                digest = self._hash(path)
                if digest not in self._there:
                    self._storage.put(path, f"{self._name}/files/{digest}")
                    self._there.add(digest)
                files[path.relative_to(staged).as_posix()] = (digest, path.stat().st_size)
        number = self._number + 1
        name = f"{number:08d}-{self._attempt}.json"
        text = json.dumps({"finished": finished, "began": self._began, "files": files}).encode()
        self._storage.write(f"{self._name}/sets/{name}", text)
        self._number = number
        self._marker.write_text(str(number), encoding="utf-8")
        with contextlib.suppress(DodistillError):  # what is left is deleted with the cell
            self._prune(number if finished else number - 1)

    def _stage(self, staged: Path, finished: bool) -> None:
        """Links to, or copies of, the files of one checkpoint. While a run saves, there may be files of the next."""
        for _ in range(10):
            before = self._state()
            for path in sorted(p for p in self._folder.rglob("*") if p.is_file()):
                name = path.relative_to(self._folder)
                left_out = UNFINISHED if finished else ("previous.pt",)
                if any(part.startswith(".") for part in name.parts) or any(fnmatch(path.name, p) for p in left_out):
                    continue
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # replaced or deleted by the run
                    _link(path, staged / name)
                    self._reworded(staged / name, {its: word for word, its in self._paths.items()})
            if finished or (before == self._state() and (staged / self._mark).exists()):
                return
            shutil.rmtree(staged)
            staged.mkdir()
        raise Unwritable(f"{self._folder} changes faster than it can be copied; give a larger loop.checkpoint_seconds.")

    def _prune(self, least: int) -> None:
        """Delete the sets below a number, and the files that they alone name."""
        sets = self._sets()
        kept = [it for number, name in sets if number >= least and (it := self._read(name)) is not None]
        needed = {digest for it in kept for digest, _ in it.files.values()}
        for number, name in sets:
            if number < least:
                it = self._read(name)
                self._storage.remove(f"{self._name}/sets/{name}")
                for digest in {d for d, _ in it.files.values()} - needed if it is not None else ():
                    self._storage.remove(f"{self._name}/files/{digest}")
                    self._there.discard(digest)

    # ----------------------------------------------------------------------------------------------- files

    @property
    def _marker(self) -> Path:
        """Beside the folder: the number of the set that it was last equal to."""
        return self._folder.with_name(self._folder.name + ".stored")

    def _state(self) -> tuple[int, int, int] | None:
        """What changes when the mark is replaced; None without one."""
        try:
            status = (self._folder / self._mark).stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    @contextlib.contextmanager
    def _beside(self) -> Iterator[Path]:
        """An empty folder on the same file system."""
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".kept-", dir=self._folder.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _hash(self, path: Path) -> str:
        status = path.stat()
        key = (status.st_ino, status.st_mtime_ns, status.st_size)
        if path.suffix != ".pt":  # copies
            return _sha256(path)
        if key not in self._hashes:
            self._hashes[key] = _sha256(path)
        return self._hashes[key]

    @staticmethod
    def _reworded(path: Path, words: Mapping[str, str]) -> None:
        """Replace words in a text. In JSON they stand as JSON escapes them: \\u00e9, and two backslashes for one."""
        if path.suffix in TEXT:
            text = path.read_text(encoding="utf-8")
            for old, new in sorted(words.items(), key=lambda pair: -len(pair[0])):
                if path.suffix == ".json":
                    old, new = json.dumps(old)[1:-1], json.dumps(new)[1:-1]
                text = text.replace(old, new) if old else text
            path.write_text(text, encoding="utf-8")


def _link(path: Path, new: Path) -> None:
    """A second name for a file that is only ever replaced; a copy of any other, or where there are no links."""
    if path.suffix == ".pt":
        with contextlib.suppress(OSError):
            os.link(path, new)
            return
    shutil.copyfile(path, new)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
