"""Weights & Biases: online with a key and a network, else offline in RUN/wandb."""

from __future__ import annotations

import html
import importlib
import netrc
import os
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from .shared import Backend, TrackedRun


def host_and_port() -> tuple[str, int]:
    """The server's, as WANDB_BASE_URL says."""
    url = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    return url.hostname or "", url.port or (80 if url.scheme == "http" else 443)


def has_key(host: str) -> bool:
    """Whether an API key is in the environment or in the netrc file, where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def reachable(host: str, port: int, seconds: float = 3.0) -> bool:
    """Whether the server accepts a connection."""
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return True
    except OSError:
        return False


def mode() -> str:
    """WANDB_MODE where it is set; else online with a key and a network, and offline without."""
    if chosen := os.environ.get("WANDB_MODE"):
        return chosen
    host, port = host_and_port()
    return "online" if has_key(host) and reachable(host, port) else "offline"


class Wandb(Backend):
    """A resumed run goes on under its id. Steps that an earlier process has logged are not logged again."""

    def __init__(self) -> None:
        self.run: Any = None

    @staticmethod
    def load() -> Any:
        module = importlib.import_module("wandb")
        if not hasattr(module, "init"):  # a folder ./wandb, which W&B itself makes, imports as an empty package
            raise ImportError("not installed")
        return module

    def open(self, run: TrackedRun) -> str:
        chosen = mode()
        try:
            self._init(run, chosen)
        except Exception:
            if chosen != "online":
                raise
            chosen = "offline"  # the key is refused, or the network fails now
            self._init(run, chosen)
        if chosen == "online":
            return str(self.run.url)
        return f"{chosen}; to upload the run: wandb sync {run.folder / 'wandb' / f'offline-run-*-{run.id}'}"

    def _init(self, run: TrackedRun, mode: str) -> None:
        wandb = self.load()
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "dodistill", name=run.folder.name, id=run.id, resume="allow",
            config=dict(run.settings), dir=str(run.folder), mode=mode, reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self.run.log({name: self.load().Image(picture)}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self.run.log({name: self.load().Html(html.escape(text), inject=False)}, step=step)

    def close(self) -> None:
        self.run.finish()
