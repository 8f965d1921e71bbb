"""Trackio: a local database that its dashboard reads; TRACKIO_SPACE_ID sends it to a Hugging Face Space."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Mapping
from typing import Any

from PIL import Image

from .shared import Backend, TrackedRun


class Trackio(Backend):
    """A resumed run goes on under its name. Steps that an earlier process has logged are not logged again."""

    def __init__(self) -> None:
        self.run: Any = None

    @staticmethod
    def load() -> Any:
        return importlib.import_module("trackio")

    def open(self, run: TrackedRun) -> str:
        project = os.environ.get("TRACKIO_PROJECT") or "dodistill"
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a greeting, where the command's result belongs
            self.run = self.load().init(
                project=project, name=f"{run.folder.name}-{run.id}", resume="allow", config=dict(run.settings),
                embed=False, auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        return f"trackio show --project {project}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self.run.log({name: self.load().Image(picture)}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self.run.log({name: self.load().Markdown(text)}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.run.finish()
