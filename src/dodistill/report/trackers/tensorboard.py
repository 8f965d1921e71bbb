"""TensorBoard: event files in RUN/tensorboard."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from .shared import Backend, TrackedRun


class TensorBoard(Backend):
    """A resumed run writes a further file, whose purge step hides what was logged after the checkpoint."""

    purges = True

    def __init__(self) -> None:
        self.writer: Any = None

    @staticmethod
    def load() -> Any:
        return importlib.import_module("torch.utils.tensorboard")

    def open(self, run: TrackedRun) -> str:
        folder = run.folder / "tensorboard"
        purge = {"purge_step": run.step + 1} if run.resumed else {}
        self.writer = self.load().SummaryWriter(str(folder), **purge)
        if not run.resumed:
            made = importlib.import_module("torch.utils.tensorboard.summary")
            for part in made.hparams(dict(run.settings), {"agreement": 0.0, "loss": 0.0}):  # the metrics' names alone
                self.writer.file_writer.add_summary(part)
        self.writer.flush()
        return f"tensorboard --logdir {folder}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a kill loses what is not written

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        self.writer.flush()

    def text(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(name, text, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
