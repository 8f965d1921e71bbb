"""Cells as processes of this machine, each with a GPU, or a share of one, where there are GPUs."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ..cell import run_cell
from .shared import Outcome, Teaching, Work, outcome_of


def visible_gpus() -> list[str]:
    """The names of this process's GPUs, as CUDA_VISIBLE_DEVICES has them."""
    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in given.split(",") if name.strip()][:count] or [str(i) for i in range(count)]


@dataclass(frozen=True)
class Running:
    """A cell in a thread, which waits for its process."""

    future: Future[Outcome]
    stop: threading.Event

    def done(self) -> bool:
        return self.future.done()

    def result(self) -> Outcome:
        return self.future.result()

    def cancel(self) -> None:
        self.stop.set()


class Local:
    """At most `jobs` cells at a time. They share the cores evenly."""

    here = True

    def __init__(self, jobs: int | None = None, per_gpu: int = 0, gpus: Sequence[str] = ()) -> None:
        """`jobs`: None: 1, or with `per_gpu` as many as the cards take. `per_gpu`: cells that share a card at most; 0:
        as many as `jobs` needs, spread evenly. `gpus`: names as CUDA_VISIBLE_DEVICES has them."""
        most = len(gpus) * per_gpu
        self.jobs = min(jobs or most, most) if most else jobs or 1
        self._threads = max(1, (os.cpu_count() or 1) // self.jobs)
        self._pool = ThreadPoolExecutor(self.jobs)
        self._stops: list[threading.Event] = []
        self._cards: queue.SimpleQueue[str] = queue.SimpleQueue()
        shares = -(-self.jobs // len(gpus)) if gpus else 0
        for name in [*gpus] * shares:  # one share of each card before the second of any
            self._cards.put(name)

    def submit(self, works: Sequence[Work | Teaching]) -> list[Running]:
        return [self._begin(work) for work in works if isinstance(work, Work)]

    def _begin(self, work: Work) -> Running:
        stop = threading.Event()
        self._stops.append(stop)
        return Running(self._pool.submit(self._run, work, stop), stop)

    def _run(self, work: Work, stop: threading.Event) -> Outcome:
        card = self._cards.get() if work.device in ("auto", "cuda") and not self._cards.empty() else None
        environment = {**work.environment, **({"CUDA_VISIBLE_DEVICES": card} if card is not None else {})}

        def do() -> Outcome:
            return Outcome(
                run_cell(
                    work.tree, work.folder, work.label, published=work.published, teachers=work.teachers,
                    threads=self._threads, seconds=work.until - time.time(), track=work.track, storage=work.storage,
                    name=work.name, environment=environment, allow_code=True, tied=False, stop=stop,
                )
            )  # fmt: skip

        try:
            return outcome_of(do)
        finally:
            if card is not None:
                self._cards.put(card)

    def close(self) -> None:
        for stop in self._stops:
            stop.set()
        self._pool.shutdown()
