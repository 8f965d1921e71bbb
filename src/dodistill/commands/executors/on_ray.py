"""Work as tasks of a Ray cluster: https://docs.ray.io."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DodistillError
from .elsewhere import work_on
from .shared import Outcome, Teaching, Work, extra

#: How often a task is begun again whose node or process was lost.
RETRIES = 100
#: Seconds after which a task that was told to stop, and runs on, is told again: an interrupt can get lost.
AGAIN = 20.0


def _work_on(work: Work | Teaching, names: Sequence[str], *weights: bytes) -> Outcome:
    """A task. Ray passes the objects behind references in place of `weights`."""
    return work_on(work, dict(zip(names, weights)))


@dataclass
class Sent:
    """A task of the cluster."""

    ray: Any
    reference: Any
    cancelled: float | None = None  #: when it was last told to stop, time.monotonic()

    def done(self) -> bool:
        done = bool(self.ray.wait([self.reference], timeout=0)[0])
        if not done and self.cancelled is not None and time.monotonic() - self.cancelled > AGAIN:
            self._interrupt()
        return done

    def result(self) -> Outcome:
        try:
            out: Outcome = self.ray.get(self.reference)
        except self.ray.exceptions.RayError as error:
            if self.cancelled is not None:
                return Outcome(stopped=True, said="stopped; rerun to resume")
            return Outcome(said=f"FAILED {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        return out

    def cancel(self) -> None:
        if self.cancelled is None:
            self._interrupt()

    def _interrupt(self) -> None:
        self.cancelled = time.monotonic()
        self.ray.cancel(self.reference)  # an interrupt in the task, which saves and stores its run


class OnRay:
    """A cluster that was there, or one of this machine alone. Ray queues what does not fit."""

    here = False

    def __init__(self, address: str = "", jobs: int | None = None, per_gpu: int = 0) -> None:
        """`per_gpu`: cells that share a GPU; 0: one on each, where the cluster has GPUs."""
        self._ray = ray = extra("ray", "ray")
        self._began = not ray.is_initialized()
        where = address or os.environ.get("RAY_ADDRESS") or "local"
        if self._began:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine
            more = {"include_dashboard": False} if where == "local" else {}
            before = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(address=where, logging_level=logging.WARNING, **more)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise DodistillError(f"no Ray cluster at {where}: {error}; correct --address.") from error
            finally:  # Ray would end this process at SIGTERM, before the cells have saved
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, before)
        self.jobs = jobs or 10**6
        self._gpus = 1 / per_gpu if per_gpu else float(ray.cluster_resources().get("GPU", 0) > 0)
        self._task = ray.remote(_work_on)
        self._weights: dict[str, Any] = {}  #: path of a teacher -> reference to its bytes
        self._sent: list[Sent] = []

    def submit(self, works: Sequence[Work | Teaching]) -> list[Sent]:
        sent = [Sent(self._ray, self._submit(work)) for work in works]
        self._sent += sent
        return sent

    def _submit(self, work: Work | Teaching) -> Any:
        names = [] if isinstance(work, Teaching) else self._teachers(work)
        gpus = 0.0 if work.device == "cpu" else self._gpus
        task = self._task.options(num_cpus=work.threads or 1, num_gpus=gpus, max_retries=RETRIES, name=work.name)
        return task.remote(work, names, *(self._weights[name] for name in names))

    def _teachers(self, work: Work) -> list[str]:
        """The names of the teachers that a cell loads; their weights are put into the cluster once."""
        text, folder = json.dumps(work.tree), Path(work.teachers)
        names = [path.name for path in sorted(folder.glob("*.safetensors")) if json.dumps(str(path))[1:-1] in text]
        for name in names:
            if name not in self._weights:
                self._weights[name] = self._ray.put((folder / name).read_bytes())
        return names

    def close(self) -> None:
        for it in self._sent:
            if not it.done():
                it.cancel()
        if self._began:
            self._ray.shutdown()
