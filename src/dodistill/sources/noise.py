"""Noise: Noise-engineered Data-free Knowledge Distillation (Raikwar and Mishra, NeurIPS 2022), current statistics.

The inputs are noise, and nothing is trained. On noise, a teacher's activations do not have the distribution of its
running BatchNorm statistics, and it predicts one or two classes for all images. If every BatchNorm normalises with the
statistics of the current batch instead ("current statistics"), the shift disappears:

    x ~ N(mean, std^2) per pixel in the teacher's normalisation (`gaussian`), or U(0, 1) (`uniform`)
    t = T(x) with (h - mu_B) / sqrt(var_B + eps) in every BatchNorm, mu_B, var_B over the batch x

NormShift-KD (under review, 2026) adds rejection, which balances the classes: of `candidates` > `n` images, it keeps
equally many of each predicted class, as far as there are any.

Deviations, and why
 1. Pixels are valid: Gaussian values outside [0, 1] are clipped, and the pool rounds to 256 levels.
 2. The teacher is in eval mode except for its BatchNorms. The release has all of it in train mode, including dropout,
    and its running statistics drift.
 3. The delivered student. After training on noise, its running statistics are those of noise. On real images they cause
    the same shift, and the accuracy is far below what the student has learned. The release avoids this because it
    evaluates in train mode: each test batch is normalised with its own statistics (and its schedule follows the test
    loss). That is `current_statistics(student)` (models/batchnorm.py). `calibrate(student, images)` also works: it
    takes the running statistics from a few unlabelled real images, so that the prediction of an image does not depend
    on its batch. The engine's evaluation does neither, and the run's summary says so.
 4. After rejection, the student's batches differ from those of the teacher's statistics. Batches of a few hundred have
    nearly the same statistics.
 5. The logits in the pool are used only without augmentation (as in the preset). With it, the teacher evaluates the
    augmented images with its running statistics. The summary says so.
 6. The release trains with Adam at 1e-3 and a soft cross-entropy at T = 1, on new noise at every step. Here the loop's
    SGD and the criterion are separate axes, and noise is kept for `every` steps.
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
    """The distribution of the noise, and how it is labelled."""

    warmup: int = 0
    every: int = 5
    n: int = 1280  #: images kept per acquisition
    candidates: int = 1280  #: images drawn per acquisition; more than n: balanced over the teacher's classes
    batch: int = 256  #: images per forward of the teacher; its BatchNorms use the statistics of these
    law: Literal["gaussian", "uniform"] = "gaussian"
    statistics: Literal["current", "running"] = "current"  #: of the teacher's BatchNorms; running: the control

    name: ClassVar[str] = "noise"
    kind: ClassVar[Kind] = "sampler"
    needs: ClassVar[frozenset[str]] = frozenset({"batchnorm"})
    costs: ClassVar[tuple[dict[str, float], ...]] = ({"n": 64, "candidates": 64},)
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
    """Only the random stream persists between acquisitions."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(context)
        self.config = config
        at_least(2, "source", n=config.n, batch=config.batch)
        check_candidates(config.candidates, config.n)
        mean, std = normalised_space(context.teacher.model)
        self.notes.append(
            "This student's BatchNorm statistics are those of noise. For real images, calibrate it with a few "
            "unlabelled images, or normalise with batch statistics (docs/methods/noise.md)."
        )
        if config.statistics == "current" and context.augment.moves:
            self.notes.append(
                "With augmentation, the teacher's logits are computed again, with its running statistics; for current "
                "statistics give --augment.crop shift --augment.pad 0 --augment.flip false (preset desk)."
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
        most = len(x) // 2  # a BatchNorm needs two images
        parts = x.tensor_split(max(1, min(-(-len(x) // self.config.batch), most)))  # of nearly equal size
        with current_statistics(self.context.teacher) if current else nullcontext(), self.context.autocast():
            return torch.cat([self.context.teacher(to_float(part)) for part in parts])
