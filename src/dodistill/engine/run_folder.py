"""The run folder: config, metrics, result, and a checkpoint of everything.

    config.json      the resolved config        metrics.jsonl   one JSON per line: log, eval, pool
    classes.json     names of the classes       (where they are known)
    inputs.safetensors, sample.safetensors: samples of the images (`engine/inputs.py`), which outlive the pool
    checkpoint.pt    everything but the pool    pool-N.pt       the pool's version N, written only when it changed
    previous.pt      the checkpoint before      summary.json    the outcome, once the run has ended

Every file is written under a temporary name and then moved, so a kill or a full disk leaves the old file intact.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ..config.plugins import label
from ..config.tree import Distill, Tree, code_in, difference, grown, resolve
from ..core.watch import Watcher
from ..data.classes import read_names
from ..data.packed import open_images
from ..data.rows import Rows, rows_of
from ..errors import DodistillError
from ..files import claim, read_object, replacing, shown
from .longer import extends, set_aside, settings_of


def write_atomically(path: Path, data: bytes) -> None:
    """Write bytes atomically; see `files.replacing`."""
    with replacing(path) as file:
        file.write(data)


def save_tensors(path: Path, state: Any) -> None:
    """Atomic torch.save; see `files.replacing`."""
    with replacing(path) as file:
        torch.save(state, file)


def load_tensors(path: Path) -> Any:
    """The content of a file of `save_tensors`: tensors and plain values, no code. Raises DodistillError for a damaged
    file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for damaged data, torch's reader can raise any error, and advises to allow code
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DodistillError(f"{path} is damaged or truncated ({reason}).") from error


def fingerprint(tensors: Iterable[Tensor], most: int = 1 << 26) -> str:
    """16 hex digits of shapes, types and values, the same on every device. Of a tensor over `most` bytes: rows evenly
    spaced."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{tuple(t.shape)} {t.dtype}".encode())
        some = t.detach()[:: -(-t.nbytes // most)] if t.nbytes > most else t.detach()
        digest.update(some.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def check_writable(path: Path) -> None:
    """Raise DodistillError if `path` is not writable. Nothing is left behind. Several processes may ask at once."""
    absent = [p for p in path.absolute().parents if not _exists(p)]
    try:
        for last in (False, False, True):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "ab") as file:
                    empty = file.tell() == 0
                break
            except FileNotFoundError:  # another process has just removed the empty folder
                if last:
                    raise
        if empty:
            path.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DodistillError(f"cannot write {shown(path)}: {reason}; choose another --out.") from error
    finally:
        _remove_empty(absent)


def _exists(path: Path) -> bool:
    """Whether something is there; a name that no file can have is not."""
    try:
        return os.path.lexists(path)
    except ValueError:
        return False


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove those that are empty, the innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            folder.rmdir()


def newest_pool(path: Path) -> dict[str, Any]:
    """The pool of a run folder: {"x": uint8 [n, C, H, W], "logits": [n, K], ...}; x is a tensor, or rows of the run's
    unlabelled images (`data.unlabeled`), which must still be there. Raises DodistillError without one."""
    files = sorted(path.glob("pool-*.pt"), key=lambda p: int(p.stem.split("-")[1]))
    if not files:
        raise DodistillError(
            f"{path} holds no pool-N.pt; the first checkpoint of a run writes it, and `compare` deletes it."
        )
    out: dict[str, Any] = load_tensors(files[-1])
    if "rows" in out:
        out["x"] = _given(path, tuple(out["image_shape"])).select(out["rows"])
    return out


def _given(path: Path, shape: tuple[int, int, int]) -> Rows:
    """The unlabelled images of a run. Raises DodistillError if they are not named, or have changed since."""
    began = load_tensors(path / "checkpoint.pt").get("made_of", {}).get("unlabelled images")
    spec = read_object(path / "config.json", "give a run folder").get("data", {}).get("unlabeled") or ""
    if not spec:
        raise DodistillError(
            f"the pool of {path} holds row numbers of images that were given in Python, not their pixels; take them "
            "from those images."
        )
    rows = rows_of(open_images(spec, labels=False, image_shape=shape).x)
    if rows.fingerprint() != began:
        raise DodistillError(f"the images of {spec} are not those that {path} was distilled with; restore them.")
    return rows


def names_of_run(path: Path) -> tuple[str, ...]:
    """The names of the classes of a run's models, finished or not; () where they are not known."""
    file = path / NAMES
    return read_names(file, "the names of classes") if file.is_file() else ()


def _require_writable(path: Path) -> None:
    """Refuse a path at which this process cannot make a run folder, or write into it. Nothing is created."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or a null byte
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) not in (errno.ENOTDIR, errno.EACCES):
            raise DodistillError(f"cannot make run folder {shown(path)!r}: {reason}; choose another --out.") from error
    there = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not os.path.isdir(there):
        raise DodistillError(f"cannot make run folder {path}: {there} is a file; choose another --out.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise DodistillError(f"cannot write to {there}: no permission; choose another --out.")


def _require_same_run(path: Path, config: Distill, tree: Tree) -> None:
    """Refuse a folder that holds something else than the run of `config`, whose tree is `tree`, or that run trained for
    fewer steps."""
    known, metrics = path / "config.json", path / "metrics.jsonl"
    if known.exists():
        old = read_object(known, "choose another --out")
        _require_same_code(path, old, tree)
        began, mine, default = (settings_of(t) for t in (old, tree, resolve(config.choices()).to_tree()))
        if not grown(began, mine, default) and not extends(began, mine, default):
            lines = difference(began, mine)
            raise DodistillError(
                f"run folder {path} belongs to another config; choose another --out, or use its config.\n  "
                + "\n  ".join(lines[:12])
            )
    elif path.is_dir() and any(p.name not in _EARLY for p in path.iterdir()):
        raise DodistillError(f"{path} is not empty and holds no config.json; choose another --out.")
    if metrics.is_symlink():  # it alone is not replaced but opened, which would follow it
        raise DodistillError(f"{metrics} is a symbolic link; remove it, or choose another --out.")


def _require_same_code(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse a folder that was begun with another version of the same method."""
    mine = code_in(new)
    for part, (name, began) in code_in(old).items():
        now, code = mine.get(part, ("", began))
        if code != began and label(now) == label(name):
            raise DodistillError(
                f"run folder {path} was begun with {name} (sha256 {began[:12]}), and {now} has changed since (sha256 "
                f"{code[:12]}). A changed method is another run: choose another --out, or restore the file."
            )


def drop_checkpoints(path: Path) -> None:
    """Delete the checkpoints of a finished run's folder. The student, metrics and report stay."""
    for pattern in ("checkpoint.pt*", "previous.pt*", "pool-*.pt"):
        for file in path.glob(pattern):
            file.unlink(missing_ok=True)


NAMES = "classes.json"
#: Files that a folder without config.json may contain: a user's recipe, or the remains of an early kill.
_EARLY = ("config.yaml", "plan.json", ".plan.json.tmp", ".config.json.tmp", ".lock")


#: What every version of dodistill has written into summary.json, and a finished run is delivered by.
_SUMMARY: dict[str, type | tuple[type, ...]] = {
    "agreement": (int, float), "delivered": str, "student_parameters": int, "teacher_parameters": int,
}  # fmt: skip


class NoFolder(Watcher):
    """The run folder of a run that writes no files."""

    keeps = False
    path: Path | None = None
    notes: tuple[str, ...] = ()

    def load(self) -> None:
        """No checkpoint."""

    def newest(self) -> None:
        """No checkpoint."""

    def due(self) -> bool:
        """Never."""
        return False

    def save(self, state: Mapping[str, Any], pool: Callable[[], Mapping[str, Any]], version: int) -> None:
        """Nothing is kept."""

    def summary(self) -> None:
        """No summary of an earlier start."""

    def abandon(self) -> None:
        """Nothing to remove."""

    def close(self) -> None:
        """Nothing is open."""


class RunFolder(Watcher):
    """One run's files. Opening it again with the same config resumes; with another config it is refused.

    As a watcher it writes metrics.jsonl, and at the start the names of the classes.
    """

    keeps = True

    def __init__(
        self,
        path: str | Path,
        config: Distill,
        create: bool = True,
        plan: Mapping[str, Any] | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        """`create=False` only checks whether the folder is usable, and writes nothing. `plan`: the content of plan.json
        (see `engine.budget`). `classes`: the names of the classes, where they are known.

        Raises DodistillError for a path that cannot be written, and for a folder that holds something else.
        """
        self.path, self.config, self.classes = Path(path), config, tuple(classes)
        self.notes: list[str] = []  #: sentences for the user, as on a damaged checkpoint that was skipped
        self._metrics: TextIO | None = None
        self._unlock: Callable[[], object] | None = None
        self._pools: set[int] = set()  #: pool versions that the two checkpoints refer to
        self._saved = time.monotonic()
        self._made: list[Path] = []  #: folders that this start created
        self._fresh = False  #: whether this start wrote the first config.json
        tree = config.to_tree()
        _require_writable(self.path)
        _require_same_run(self.path, config, tree)
        if create:
            self._create(tree, plan)

    def _create(self, tree: Tree, plan: Mapping[str, Any] | None) -> None:
        """Make the folder and write the config. Raises Busy if another process has the folder."""
        known = self.path / "config.json"
        self._made = [p for p in (self.path, *self.path.absolute().parents) if not _exists(p)]
        self._fresh = not known.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DodistillError(
                f"cannot make run folder {self.path}: {error.strerror}; choose another --out."
            ) from error
        # One process at a time: two would overwrite each other's checkpoints.
        lock = claim(self.path / ".lock", f"run folder {self.path}")
        self._unlock = weakref.finalize(self, lock.release)
        if plan is not None:
            self.write_json("plan.json", plan)
        write_atomically(known, json.dumps(tree, indent=1).encode())
        loop = self.config.loop
        if loop.restarts:  # under a time limit a finished run has other steps than its config
            set_aside(self.path, loop.steps)

    # ------------------------------------------------------------------------------------------- metrics

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        try:
            if self._metrics is None:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)  # each is of some systems only
                handle = os.open(self.path / "metrics.jsonl", flags, 0o666)
                self._metrics = os.fdopen(handle, "a", encoding="utf-8", newline="\n")
            self._metrics.write(json.dumps(values) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise DodistillError(
                f"cannot write {self.path / 'metrics.jsonl'}: {error.strerror}; make the folder writable, then rerun."
            ) from error

    def on_start(self, step: int, steps: int) -> None:
        if self.classes:
            self.write_json(NAMES, list(self.classes))

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        self.log(kind="log", step=step, **values)

    def on_eval(self, step: int, values: Mapping[str, float]) -> None:
        self.log(kind="eval", step=step, **values)

    def on_pool(self, step: int, values: Mapping[str, Any]) -> None:
        self.log(kind="pool", step=step, **values)

    def on_warning(self, step: int, symptom: str, text: str) -> None:
        self.log(kind="warning", step=step, symptom=symptom, text=text)

    def abandon(self) -> None:
        """Remove what this start created, if it has computed nothing: a refused run leaves no folder behind."""
        kept = any(self.path.glob("*.pt")) or (self.path / "summary.json").exists()
        self.close()
        if not self._fresh or kept:
            return
        for name in ("config.json", NAMES, "plan.json", "metrics.jsonl", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        _remove_empty(self._made)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._unlock is not None:
            self._unlock()

    # ---------------------------------------------------------------------------------------- checkpoint

    def due(self) -> bool:
        """Whether the last checkpoint is older than `loop.checkpoint_seconds`."""
        return time.monotonic() - self._saved > self.config.loop.checkpoint_seconds

    def save(self, state: Mapping[str, Any], pool: Callable[[], Mapping[str, Any]], version: int) -> None:
        """Write a checkpoint; the previous one stays as previous.pt. `pool` is asked only where its version is new."""
        file = self.path / f"pool-{version}.pt"
        if not file.exists():
            save_tensors(file, dict(pool()))
        metrics = self.path / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        new, current, before = (self.path / name for name in (".next.pt", "checkpoint.pt", "previous.pt"))
        save_tensors(new, {**state, "pool_version": version, "metrics_bytes": size})
        try:
            if current.exists():
                os.replace(current, before)
            os.replace(new, current)
        except OSError as error:
            raise DodistillError(
                f"cannot write {current}: {error.strerror}. The previous checkpoint is intact ({before.name}); "
                "make the folder writable, then rerun the command."
            ) from error
        self._pools = {version, *sorted(self._pools)[-1:]}  # the two newest; no checkpoint needs older pools
        for old in self.path.glob("pool-*.pt"):
            if int(old.stem.split("-")[1]) < min(self._pools):
                old.unlink(missing_ok=True)
        self._saved = time.monotonic()

    def load(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The newest intact checkpoint and its pool, or None if there is no checkpoint.

        A damaged one is skipped with a note, and the previous one loads. Raises DodistillError if none is intact.
        """
        found = [p for p in (self.path / "checkpoint.pt", self.path / "previous.pt") if p.exists()]
        for path in found:
            try:
                state, pool = self._read(path)
            except DodistillError as error:
                self.notes.append(f"{error} The previous checkpoint is used.")
                continue
            self._pools = {state["pool_version"]}
            self._forget_after(state["metrics_bytes"], state["pool_version"])
            if path.name == "previous.pt":  # the next save must not replace the intact checkpoint by the damaged one
                os.replace(path, self.path / "checkpoint.pt")
            return state, pool
        if found:
            raise DodistillError(
                " ".join(self.notes) + f" No intact checkpoint is left in {self.path}; choose another --out."
            )
        if self.summary() is None:  # a start that was killed before its first checkpoint
            self._forget_after(0, 0)
        return None

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """A checkpoint and its pool. Raises DodistillError if one is damaged or is another object."""
        state = load_tensors(path)
        numbers = ("pool_version", "metrics_bytes")
        if not isinstance(state, dict) or not all(isinstance(state.get(k), int) for k in numbers):
            raise DodistillError(f"{path} is no checkpoint of a run.")
        pool = load_tensors(self.path / f"pool-{state['pool_version']}.pt")
        if not isinstance(pool, dict):
            raise DodistillError(f"{self.path / 'pool-'}{state['pool_version']}.pt is no pool.")
        return state, pool

    def newest(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The last checkpoint of a finished run and its pool; None if one is missing or damaged. Nothing changes."""
        try:
            return self._read(self.path / "checkpoint.pt")
        except DodistillError:
            return None

    def _forget_after(self, metrics_bytes: int, pool_version: int) -> None:
        """Drop the output after a checkpoint, of a start of this run that ended before the next checkpoint."""
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            with open(metrics, "r+b") as file:
                file.truncate(min(metrics_bytes, metrics.stat().st_size))
        for pool in self.path.glob("pool-*.pt"):
            if int(pool.stem.split("-")[1]) > pool_version:
                pool.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------- outcome

    def write_json(self, name: str, value: Any) -> None:
        write_atomically(self.path / name, json.dumps(value, indent=1).encode())

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, else None."""
        path = self.path / "summary.json"
        if not path.exists():
            return None
        fix = "delete it to finish the run again, or choose another --out"
        found = read_object(path, fix)
        for key, kind in _SUMMARY.items():
            if not isinstance(found.get(key), kind):
                raise DodistillError(f"{path} is damaged ({key} is {found.get(key)!r}); {fix}.")
        if self.config.loop.restarts and found.get("steps") != self.config.loop.steps:
            return None  # of the run before it is trained longer
        return found
