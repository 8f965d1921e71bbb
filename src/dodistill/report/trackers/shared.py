"""What all trackers share: names of values, which steps a resumed run has already logged, and failures."""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ...config.tree import Distill
from ...core.watch import Watcher
from ...evaluation.monitor import read_metrics
from ...files import replacing
from ..images import grid

#: The most classes whose shares are logged one by one; of more, the smallest and the largest share.
CLASSES = 100
#: Images of the pool in one picture.
SHOWN = 32

Scalar = bool | int | float | str


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker opens its run with.

    Attributes:
        folder: the run folder; files that belong to the tracker lie in it.
        id: the tracker's id of this run, the same after every resumption.
        settings: the config as `source.K` -> value.
        step: matching steps done: 0, or those of the checkpoint.
        resumed: whether an earlier process has logged to this run.
    """

    folder: Path
    id: str
    settings: Mapping[str, Scalar]
    step: int
    resumed: bool


class Backend(ABC):
    """One tracking library. Any method may raise; `Tracking` handles it."""

    #: Whether `open` hides what was logged after `run.step`, so that it can be logged again.
    purges = False

    @staticmethod
    @abstractmethod
    def load() -> Any:
        """The library's module. Raises ImportError."""

    @abstractmethod
    def open(self, run: TrackedRun) -> str:
        """Begin the run, or go on in it. Returns where its files lie, and the command that shows or uploads them."""

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    @abstractmethod
    def image(self, step: int, name: str, picture: Image.Image) -> None: ...

    @abstractmethod
    def text(self, step: int, name: str, text: str) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Write what is left."""


class Tracking(Watcher):
    """Logs a run to one `Backend`. The first exception of the backend ends the tracking, not the run."""

    def __init__(self, name: str, backend: Backend, folder: Path, config: Distill, say: Callable[[str], None]) -> None:
        self.name, self.backend, self.folder, self._say = name, backend, folder, say
        self.settings = dict(_flat(config.to_tree()))
        self.failure = ""  #: why it has stopped
        self._opened = False
        self._step = 0
        self._before: list[tuple[str, str]] = []  # texts from before the first step
        known = _ids(folder).get(name)
        self.id, self.resumed = known or uuid.uuid4().hex[:8], known is not None
        # kind -> the last step that an earlier process has logged, as metrics.jsonl has it before it is shortened
        lines = read_metrics(folder / "metrics.jsonl") if self.resumed else {}
        self._logged = {kind: int(found[-1]["step"]) for kind, found in lines.items() if found}
        for kind, told_with in (("images", "pool"), ("warning", "log")):
            self._logged[kind] = self._logged.get(told_with, -1)

    def on_start(self, step: int, steps: int) -> None:
        self._step = step
        if self.backend.purges:
            self._logged = {kind: min(last, step) for kind, last in self._logged.items()}

    def on_note(self, text: str) -> None:
        self._before.append(("notes", text))

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        self._scalars("log", step, values)

    def on_eval(self, step: int, values: Mapping[str, float]) -> None:
        self._scalars("eval", step, values)

    def on_pool(self, step: int, values: Mapping[str, Any]) -> None:
        self._scalars("pool", step, dict(_pool(values)))

    def on_images(self, step: int, images: Callable[[int], Tensor]) -> None:
        if self._new("images", step):
            self._do(lambda: self.backend.image(step, "pool/images", _opaque(grid(images(SHOWN)))))

    def on_warning(self, step: int, symptom: str, text: str) -> None:
        if self._new("warning", step):
            self._do(lambda: self.backend.text(step, f"warnings/{symptom}", text))

    def on_end(self, step: int, finished: bool) -> None:
        if self._opened:
            self._do(self.backend.close)

    def _new(self, kind: str, step: int) -> bool:
        """Whether nothing of this kind was logged at this step, or later, by this process or an earlier one."""
        last = self._logged.get(kind, -1)
        if kind in ("pool", "images"):  # a warm-up describes the pool several times at step 0
            self._logged[kind] = max(step, last)
        return step > last

    def _scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        if self._new(kind, step):
            self._do(lambda: self.backend.scalars(step, values))

    def _do(self, act: Callable[[], object]) -> None:
        """Open the run if it is not open, then act. Not before the first value: a refused run leaves no files."""
        if self.failure:
            return
        try:
            if not self._opened:
                where = self.backend.open(TrackedRun(self.folder, self.id, self.settings, self._step, self.resumed))
                self._opened = True
                _keep(self.folder, self.name, self.id)
                self._say(f"{self.name}: {where}")
                for name, text in [] if self.resumed else self._before:
                    self.backend.text(0, name, text)
            act()
        except Exception as error:  # the library's own, a full disk, a lost network
            said = str(error).strip().partition("\n")[0][:200]
            self.failure = f"{self.name} stopped: {type(error).__name__}: {said}; the run goes on without it."
            self._say(self.failure)


def _ids(folder: Path) -> dict[str, str]:
    """Tracker -> run id, as an earlier start has left them. A damaged file counts as none."""
    try:
        found = json.loads((folder / "tracking.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _keep(folder: Path, name: str, run_id: str) -> None:
    with replacing(folder / "tracking.json") as file:
        file.write(json.dumps({**_ids(folder), name: run_id}).encode())


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    """`source.K` -> value; what is no plain value, as text."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, bool | int | float | str) else str(value)


def _pool(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """A description of the pool as scalars: pool/size, class_shares/3, class_shares/smallest."""
    for key, value in values.items():
        if not isinstance(value, list):
            yield f"pool/{key}", float(value)
            continue
        if len(value) <= CLASSES:
            yield from ((f"{key}/{i}", share) for i, share in enumerate(value))
        if value:
            yield from ((f"{key}/smallest", min(value)), (f"{key}/largest", max(value)))


def _opaque(picture: Image.Image) -> Image.Image:
    """On white: trackers show transparent gaps black."""
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
