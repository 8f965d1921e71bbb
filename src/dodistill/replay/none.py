"""No replay: the student is matched on the pool alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.context import Context
from .shared.base import Replay, ReplayConfig


@dataclass(frozen=True)
class Config(ReplayConfig):
    """Nothing to set."""

    name: ClassVar[str] = "none"

    def build(self, context: Context) -> Replay:
        return Replay(context)
