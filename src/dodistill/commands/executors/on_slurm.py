"""Work as slurm jobs, which submitit writes, queues and queues again: https://github.com/facebookincubator/submitit."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config.flags import value
from ...errors import DodistillError
from .elsewhere import work_on
from .shared import Outcome, Teaching, Work, extra

#: Seconds for the last checkpoint, once slurm has announced the end of a job.
GRACE = 60.0
#: Parameters that submitit knows for every cluster; the others begin with the name of theirs.
COMMON = (
    "name",
    "timeout_min",
    "mem_gb",
    "nodes",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "stderr_to_stdout",
)


class Job:
    """What runs in a job. When slurm preempts it or its time is up, it saves, stores, and asks to be queued again."""

    def __init__(self, work: Work | Teaching) -> None:
        self._work = work
        self._stop: threading.Event | None = None
        self._future: Future[Outcome] | None = None

    def __call__(self) -> Outcome:
        self._stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:  # the main thread takes signals
            self._future = pool.submit(work_on, self._work, {}, self._stop)
            return self._future.result()

    def checkpoint(self) -> Any:
        """Called by submitit in the job that ends; returns what the next one calls."""
        if self._stop is not None and self._future is not None:
            self._stop.set()
            wait([self._future], GRACE)
        return extra("submitit", "slurm").helpers.DelayedSubmission(Job(self._work))


@dataclass
class Queued:
    """A job of submitit."""

    job: Any
    cancelled: bool = False

    def done(self) -> bool:
        return bool(self.job.done())

    def result(self) -> Outcome:
        try:
            out: Outcome = self.job.result()
        except Exception as error:  # of submitit, with the job's whole log
            if self.cancelled:
                return Outcome(stopped=True, said="stopped; rerun to resume")
            said = str(error).strip().splitlines() or [type(error).__name__]
            return Outcome(said=f"FAILED {said[0]}", log="\n".join(said[-50:]))
        return out

    def cancel(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            self.job.cancel(check=False)


class OnSlurm:
    """Jobs in arrays. Their files are in `folder`, which all machines must see, as the teachers' folder."""

    here = False

    def __init__(self, folder: Path, jobs: int | None = None, options: Sequence[str] = ()) -> None:
        """`options`: "partition=gpu", "timeout_min=240", ...; "cluster=local" runs the jobs on this machine, as a
        trial."""
        submitit = extra("submitit", "slurm")
        given = {"name": "dodistill", "timeout_min": 240, "cluster": "slurm"}
        for option in options:
            key, found, text = option.partition("=")
            if not found:
                raise DodistillError(f"--slurm {option}: write KEY=VALUE, as in partition=gpu or timeout_min=240.")
            given[key] = value(text)
        self._cluster = str(given.pop("cluster"))
        if self._cluster == "slurm" and jobs:
            given.setdefault("array_parallelism", jobs)
        prefixed = {key if key in COMMON else f"{self._cluster}_{key}": it for key, it in given.items()}
        try:
            self._executor = submitit.AutoExecutor(
                folder=str(folder), cluster=self._cluster, slurm_max_num_timeout=1000
            )
            self._executor.update_parameters(**prefixed)
        except (RuntimeError, ValueError, NameError, AssertionError) as error:
            raise DodistillError(f"--on slurm: {error}") from error
        self._cpus = given.get("cpus_per_task")
        self.jobs = jobs or 1000
        self._queued: list[Queued] = []

    def submit(self, works: Sequence[Work | Teaching]) -> list[Queued]:
        if self._cpus is None:
            self._executor.update_parameters(cpus_per_task=max(work.threads or 1 for work in works))
        with self._executor.batch():
            jobs = [self._executor.submit(Job(work)) for work in works]
        queued = [Queued(job) for job in jobs]
        self._queued += queued
        return queued

    def close(self) -> None:
        for it in self._queued:
            if not it.done():
                it.cancel()
