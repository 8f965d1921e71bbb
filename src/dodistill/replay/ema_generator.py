"""An averaged generator as a memory: it generates images like those of some time ago (MAD, NeurIPS 2022).

Momentum Adversarial Distillation: Handling Large Distribution Shifts in Data-Free Knowledge Distillation (Do et al.).

A copy of the source's generator G(z; theta) follows it slowly,

    theta~ <- decay * theta~ + (1 - decay) * theta

and each step of the student replays `size` images G(z; theta~), z ~ N(0, I). No image is kept; the memory is a second
generator. This needs a source that trains one generator through the whole run.

Deviations, and why
 1. The average is updated after each acquisition, by decay^g_steps where the generator makes several steps per
    acquisition; in the paper, after each step. The two differ only by the weights between the steps of an acquisition.
 2. The decay warms up, min(decay, (1 + n) / (10 + n)) after n acquisitions, as is usual, and the average starts as the
    generator after the first one. Otherwise it generates untrained images for the first hundred steps.
 3. In the paper the student matches on both kinds in one batch. So does the preset `mad` of source `adversarial`, where
    the averaged generator's images join the pool. Here the update decides how to use them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import registry
from ..core.context import Context
from ..data.rows import Pixels
from ..errors import DodistillError, at_least
from ..functional.augment import to_float, to_uint8
from .shared.base import Replay, ReplayConfig


@dataclass(frozen=True)
class Config(ReplayConfig):
    """The rate of the average."""

    size: int = 128  #: images replayed per step
    decay: float = 0.95  #: decay of the average, per step of the generator

    name: ClassVar[str] = "ema_generator"

    def build(self, context: Context) -> Replay:
        return Ema(self, context)


class Ema(Replay):
    """The averaged generator. Like the source's generator, it uses the statistics of its batch."""

    net: nn.Module

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(context)
        at_least(2, "replay", size=config.size)
        if not 0 <= config.decay < 1:
            raise DodistillError(f"replay.decay is {config.decay}; it must lie in [0, 1), as in 0.95.")
        self.config, self.seen = config, 0

    def follow(self, source: Any) -> None:
        made = source.makes_with()
        if made is None:
            able = [n for n in registry.names("source") if registry.config("source", n).generates]
            raise DodistillError(
                "replay ema_generator averages a generator that is trained through the run, but this source has none; "
                f"use one of {', '.join(able)}, or --replay bank."
            )
        self.live, self.latent, self.steps = made
        self.net = copy.deepcopy(self.live).requires_grad_(False)

    @property
    def ready(self) -> bool:
        return self.seen > 0

    @torch.no_grad()
    def remember(self, images: Pixels, logits: Tensor, round: int) -> None:
        if self.seen:
            decay = min(self.config.decay**self.steps, (1 + self.seen) / (10 + self.seen))
            torch._foreach_lerp_(list(self.net.parameters()), list(self.live.parameters()), 1 - decay)
        else:
            self.net.load_state_dict(self.live.state_dict())
        self.seen += 1

    @torch.no_grad()
    def draw(self, student: nn.Module, step: int) -> tuple[Tensor, None]:
        z = torch.randn(self.config.size, self.latent, generator=self.generator, device=self.context.device)
        with self.context.autocast():
            return to_float(to_uint8(self.net(z))), None

    def parts(self) -> dict[str, Any]:
        return {"net": self.net}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.seen = state["seen"]
