"""One cell of a grid, for any executor: `run_cell` runs or resumes it in a process of its own, and returns its record.

    from concurrent.futures import ThreadPoolExecutor
    from dodistill import run_cell
    from dodistill.config.grid import cells, read_recipe

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(run_cell, c.config, out / "runs" / c.slug, c.label, threads=1)
                   for c in cells(read_recipe(path), out / "teachers")]
        records = [future.result() for future in waiting]

runs four cells at a time, as `compare --jobs 4` does.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from ..config import plugins
from ..config.grid import cell_key, weights_of
from ..config.plugins import Allow
from ..config.tree import Distill, Tree, resolve
from ..errors import STOPPED, DodistillError
from ..files import read_object, replacing
from .storage import Storage, Unwritable
from .stored_run import StoredRun

#: A child process. -P keeps the current folder off its import path: a yaml.py that lies there is not imported.
DODISTILL = (sys.executable, "-P", "-m", "dodistill")
#: The same for one that ends with this process.
TIED = (sys.executable, "-P", "-m", "dodistill.commands.child")


class Stopped(DodistillError):
    """A cell was stopped before its end, or another process has its folder. The same call resumes it."""


class Failed(DodistillError):
    """The process of a cell failed with an exit status; `said` is its last line."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(status, said)  # as they are: exceptions pickle by their arguments
        self.status, self.said = status, said

    def __str__(self) -> str:
        return f"(exit status {self.status}) {self.said}"


class Flag(Protocol):
    """Tells that a cell must stop, as a threading.Event does."""

    def is_set(self) -> bool: ...


def run_cell(
    config: Distill | Mapping[str, Any],
    folder: str | Path,
    label: Mapping[str, str] | None = None,
    *,
    published: float | None = None,
    teachers: str | Path = "",
    threads: int = 0,
    seconds: float = math.inf,
    track: str = "",
    storage: str = "",
    name: str = "",
    environment: Mapping[str, str] | None = None,
    allow_code: Allow = False,
    tied: bool = True,
    stop: Flag | None = None,
) -> Tree:
    """Run one cell, or resume it, in a process of its own.

    The arguments without `stop` can be pickled, so that an executor on another machine can call this function: a plain
    tree always, a config only if its methods are importable. Nothing is kept in this process.

    Args:
        config: a resolved config, or a config tree.
        folder: the run folder. A run that was begun there goes on. Its settings and its log lie beside it, as
            FOLDER.yaml and FOLDER.log.
        label: axis -> label.
        published: the published value, for tables.
        teachers: a folder that the record names "{teachers}", as records hold no path of a machine.
        threads: CPU threads, unless the config sets `loop.threads`; 0: one for each core.
        seconds: the run stops cleanly after this time.
        track: trackers, as in "tensorboard,wandb".
        storage: a path, or a URL that fsspec writes. The newest checkpoint there is fetched first; each one is put
            there, and at the end the outcome.
        name: what the storage calls the run; empty: the key of the cell.
        environment: variables for the process, as CUDA_VISIBLE_DEVICES.
        allow_code: which code files that the config names may run; see `resolve`.
        tied: the process stops, with a checkpoint, when this process ends.
        stop: when it is set, the run saves a checkpoint and stops.

    Returns the record, the content of cells/KEY.json: `last`, `best`, `agreement`, ..., `key`, `config`, `weights`.

    Raises:
        Stopped: the run stopped before its end, or another process has the folder.
        Failed: the process failed, with its exit status and its last line.
        storage.Unwritable: the storage refuses; what the run computed is in the folder.
        DodistillError: the config does not resolve.
    """
    if not isinstance(config, Distill):
        config = resolve(config, allow_code=allow_code)
    run, tree = Path(folder), config.to_tree()
    of_cell = {"key": cell_key(config), "published": published, "config": tree, "weights": weights_of(config)}
    run.mkdir(parents=True, exist_ok=True)
    write_settings(run, tree)
    threads = threads or os.cpu_count() or 1
    words = [*(TIED if tied else DODISTILL), *arguments(config, run, threads, seconds, track)]
    stored = None
    if storage:
        stored = StoredRun(Storage(storage), name or str(of_cell["key"]), run, {"{teachers}": str(teachers)})
    variables = {"OMP_NUM_THREADS": str(threads), **(environment or {})}
    status = supervise(words, beside(run, ".log"), variables, tied, stop, stored)
    if status in (STOPPED, -signal.SIGTERM):
        raise Stopped("stopped at the budget, or used by another process; rerun to resume")
    if status:
        raise Failed(status, " ".join(tail(beside(run, ".log"), 1)))
    summary = read_object(run / "summary.json", "delete the run's folder, and rerun the command")
    record = record_of_summary(label or {}, summary) | of_cell | {"folder": f"{run.parent.name}/{run.name}"}
    return placed(record, str(teachers), "{teachers}") if str(teachers) else record


def placed(tree: Mapping[str, Any], before: str, now: str) -> Tree:
    """A tree with the path of a folder replaced; no path is empty."""
    old, new = (json.dumps(path)[1:-1] for path in (before, now))  # letters beyond ASCII and \\ as the text has them
    out: Tree = json.loads(json.dumps(tree).replace(old, new) if before else json.dumps(tree))
    return out


def arguments(config: Distill, run: Path, threads: int, seconds: float = math.inf, track: str = "") -> list[str]:
    """The words of `dodistill distill` that run a cell, whose settings lie beside the run folder."""
    words = ["distill", str(beside(run, ".yaml")), "--out", str(run), "--quiet", "--no-report",
             "--loop.threads", str(config.loop.threads or threads)]  # fmt: skip
    if plugins.paths(config.to_tree()):  # this process ran the same code to read the config; `code` has its hash
        words.append("--allow-code")
    if track:
        words += ["--track", track]
    if math.isfinite(seconds):
        words += ["--max-seconds", f"{max(1.0, seconds):.1f}"]
    return words


def supervise(
    words: Sequence[str], log: Path, environment: Mapping[str, str], tied: bool = False, stop: Flag | None = None,
    stored: StoredRun | None = None,
) -> int:  # fmt: skip
    """Run a command to its end, and return its exit status. If this call is interrupted, the command saves and ends.

    `stored`: its files in a storage, which go on from there and are put there. Raises storage.Unwritable.
    """
    if stored is not None:
        stored.fetch()
    with open(log, "ab") as file:
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE if tied else None, stdout=file, stderr=file, env={**os.environ, **environment}
        )
    try:
        while process.poll() is None:
            if stop is not None and stop.is_set():
                process.terminate()
            if stored is not None:
                stored.sync()
            time.sleep(0.1)
    finally:
        process.terminate()
        _outlast(process)
        if process.stdin is not None:
            process.stdin.close()
        if stored is not None and process.returncode:  # its last checkpoint
            try:
                stored.close(finished=False)
            except Unwritable:
                if process.returncode in (STOPPED, -signal.SIGTERM):  # else the failure counts
                    raise
    if stored is not None and not process.returncode:
        stored.close(finished=True)
    return process.returncode


def _outlast(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a command that was told to stop. A second interrupt does not cut its saving short."""
    while process.returncode is None:
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()


def beside(run: Path, suffix: str) -> Path:
    """A file beside a run folder. A label may have a dot, so `with_suffix` would give two cells one file."""
    return run.with_name(run.name + suffix)


def write_settings(run: Path, tree: Tree) -> None:
    """Write FOLDER.yaml in one move: other drivers and their processes may write or read it at the same time."""
    with replacing(beside(run, ".yaml"), several=True) as file:
        file.write(yaml.safe_dump(tree, allow_unicode=True).encode())


def tail(log: Path, lines: int) -> list[str]:
    """The last lines of a log."""
    return log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:]


def record_of_summary(label: Mapping[str, str], summary: Mapping[str, Any]) -> Tree:
    """The measures of one finished run, under its label."""
    shares = summary["class_shares"]
    return {
        "label": dict(label),
        "last": summary.get("student_accuracy"),
        "best": summary.get("best_on_test"),
        "delivered": summary.get("delivered_accuracy"),
        "teacher": summary.get("teacher_accuracy"),
        "agreement": summary["agreement"],
        "seconds": summary["seconds"],
        "share_ratio": max(shares) / max(min(shares), 0.5 / max(summary["images"], 1)),
        "code": summary.get("code", {}),
        # the command and the verdict name paths of this machine
        "summary": {k: v for k, v in summary.items() if k not in ("command", "verdict", "code")},
    }
