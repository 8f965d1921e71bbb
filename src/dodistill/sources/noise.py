"""Noise: Noise-engineered Data-free Knowledge Distillation (Raikwar and Mishra, NeurIPS 2022), current statistics.

The inputs are noise, and nothing is trained. On noise the activations of a teacher are not distributed as its
BatchNorms remember, and it names one or two classes for everything. Let every BatchNorm normalise by the statistics of
the current batch instead ("current statistics"), and the shift is gone:

    x ~ N(mean, std^2) per pixel in the teacher's normalisation (`gaussian`), or U(0, 1) (`uniform`)
    t = T(x) with (h - mu_B) / sqrt(var_B + eps) in every BatchNorm, mu_B, var_B over the batch x

NormShift-KD (under review, 2026) adds rejection so that the classes are balanced: `candidates` > `n` images, of which
as many of each predicted class are kept as there are.

Deviations, and why
 1. Pixels are valid: what the Gaussian puts outside [0, 1] is clipped, and the pool rounds to 256 levels.
 2. The teacher is in eval mode but for its BatchNorms. The release has the whole of it in train mode, dropout included,
    and lets its running statistics drift.
 3. What is delivered. After training on noise the student's running statistics are those of noise, and at test they
    shift real images as noise shifts the teacher: far below what it has learned. The release never meets this, since
    it leaves the student in train mode when it measures: each test batch is normalised by itself (and its schedule
    follows the test loss). That is `current_statistics(student)`. The other reading that works, `calibrate(student,
    images)` (evaluation/calibrate.py), takes the running statistics from a few unlabelled real images, so that each
    image has one answer. The engine's evaluation does neither, and the run's summary says so.
 4. After rejection the student meets other batches than those that the teacher's statistics were taken over. Batches of
    a few hundred have nearly the same.
 5. The labels in the pool count only without augmentation (the preset's): with it the engine asks the teacher again,
    under its own statistics. The summary says that too.
 6. The release trains with Adam at 1e-3 and a soft cross-entropy at T = 1, on new noise at every step; here the loop's
    SGD and the criterion are axes of their own, and noise is kept for `every` steps.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.context import Context
from ..errors import at_least
from ..functional.augment import to_float, to_uint8
from ..models.batchnorm import current_statistics
from ..models.normalized import normalised_space
from .procedural import check_candidates, choose, evenness
from .shared.base import Acquired, Kind, Source, SourceConfig


@dataclass(frozen=True)
class Config(SourceConfig):
    """Which noise, and how it is labelled."""

    warmup: int = 0
    every: int = 5
    n: int = 1280  #: images kept per acquisition
    candidates: int = 1280  #: images drawn per acquisition; more than n: balanced over the teacher's classes
    batch: int = 256  #: images per forward of the teacher, over which its BatchNorms take their statistics
    law: Literal["gaussian", "uniform"] = "gaussian"
    statistics: Literal["current", "running"] = "current"  #: of the teacher's BatchNorms; running: the control

    name: ClassVar[str] = "noise"
    kind: ClassVar[Kind] = "sampler"
    needs: ClassVar[frozenset[str]] = frozenset({"batchnorm"})
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "desk": {
            "source": {"n": 1280, "candidates": 2560, "every": 10, "batch": 256},
            "criterion": {"name": "kl", "temperature": 4.0},
            "optim": {"lr": 0.1, "weight_decay": 5e-4},
            "pool": {"capacity": 1280},
            "augment": {"pad": 0, "flip": False},
            "loop": {"steps": 2000, "batch": 128},
        },
    }
    origin: ClassVar[dict[str, str]] = {"desk": "ours"}

    def teacher_passes(self) -> tuple[float, float]:
        return self.candidates / self.n, 0.0

    def build(self, context: Context) -> Source:
        return Noise(self, context)


class Noise(Source):
    """Nothing but the random stream lives from one acquisition to the next."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(context)
        self.config = config
        at_least(2, "source", n=config.n, batch=config.batch)
        check_candidates(config.candidates, config.n)
        mean, std = normalised_space(context.teacher.model)
        self.notes.append(
            "This student's BatchNorm statistics are those of noise, and on real images they mislead it: calibrate it "
            "with a few unlabelled images, or let it normalise by the batch (docs/methods/noise.md)."
        )
        if config.statistics == "current" and (context.augment.pad or context.augment.flip):
            self.notes.append(
                "Augmentation has the teacher asked again under its own statistics; give --augment.pad 0 "
                "--augment.flip false (preset desk) for the current ones."
            )
        self.mean, self.std = mean.to(context.device), std.to(context.device)

    @torch.no_grad()
    def acquire(self, student: nn.Module, round: int) -> Acquired:
        c, ctx, g = self.config, self.context, self.generator
        size = (c.candidates, *ctx.image_shape)
        if c.law == "gaussian":
            x = to_uint8(self.mean + self.std * torch.randn(size, generator=g, device=ctx.device))
        else:
            x = to_uint8(torch.rand(size, generator=g, device=ctx.device))
        t = self._ask(x)
        self.terms = {"drawn_entropy": evenness(t)}
        if c.candidates > c.n:
            keep = choose(t, c.n, "balanced", g)
            x, t = x[keep], t[keep]
            self.terms["kept_entropy"] = evenness(t)
        return Acquired(x, t)

    def _ask(self, x: Tensor) -> Tensor:
        """The teacher's logits of uint8 images, in batches."""
        current = self.config.statistics == "current"
        parts = x.tensor_split(-(-len(x) // self.config.batch))  # of nearly equal size
        with current_statistics(self.context.teacher) if current else nullcontext(), self.context.autocast():
            return torch.cat([self.context.teacher(to_float(part)) for part in parts])
