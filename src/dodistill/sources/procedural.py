"""Procedural: pictures drawn by formulas, selected by the teacher, as in What Makes a Good Dataset for KD (CVPR 2025).

There is no data, no generator and no training. Batched tensor code draws shapes, dead leaves, filtered noise, fractals
and stripes on the device, and the teacher labels them. The kept images are as balanced over its predictions as the
drawn ones allow: the cited study found that class-uniform predictions and mixup matter. It reports 94.0 % (shader
programs) and 92.1 % (dead leaves) on CIFAR-10 where real data give 96.0 %, ResNet-50 -> ResNet-18.

    drawn   x_i ~ mix of the five kinds,   t_i = T(x_i)                        i = 1 .. candidates
    kept    (1 - mixup) n of them, of each class argmax t_i equally many as far as there are any (`dfnd.select`)
    mixed   lam x_a + (1 - lam) x_b,   lam ~ U(0, 1),   labelled by the teacher: mixup n of them, with a and b drawn
            from the kept images so that every class is a parent equally often

Deviations, and why
 1. The study's pictures are collections of OpenGL shaders and dead leaves. Ours are formulas of a few lines.
 2. The study applies new mixup to each batch of the student. Here a share of the pool are mixed images, so that the
    loop and the stored logits need no change. Drawing parents evenly over the classes is ours: it multiplies the images
    of rare classes.
 3. `select = "balanced"` keeps random images of each class, `surest` the most confident of each class, `confident` the
    most confident of all, and `random` (no selection) is the control.
 4. For a teacher with one channel, the contrast of every picture is stretched, mostly to bright strokes on black
    (`stretch`). On grey patches a teacher of digits predicts "8" for nearly everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..core.context import Context
from ..errors import DodistillError, at_least
from ..functional.augment import to_float, to_uint8
from .dfnd import select
from .shared.base import Acquired, Kind, Source, SourceConfig
from .shared.pictures import KINDS, draw, shares, uniform

Mix = tuple[float, float, float, float, float]


@dataclass(frozen=True)
class Config(SourceConfig):
    """Which pictures are drawn, and which are kept."""

    warmup: int = 0
    every: int = 0
    n: int = 50_000  #: images kept per acquisition, mixed ones included
    candidates: int = 150_000  #: images drawn per acquisition, before the selection
    mix: Mix = (1.0, 1.0, 1.0, 1.0, 1.0)  #: shares of shapes, leaves, textures, fractals, stripes
    select: Literal["balanced", "surest", "confident", "random"] = "balanced"
    mixup: float = 0.5  #: share of the kept images that are convex combinations of two
    stretch: Literal["auto", "on", "off"] = "auto"  #: bright strokes on black; auto: for teachers of one channel
    chunk: int = 512  #: images per teacher forward

    name: ClassVar[str] = "procedural"
    kind: ClassVar[Kind] = "sampler"
    costs: ClassVar[tuple[dict[str, float], ...]] = ({"n": 64, "candidates": 64},)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "study": {
            "source": {"n": 50_000, "candidates": 150_000},
            "criterion": {"name": "kl", "temperature": 4.0},
            "optim": {"lr": 0.1, "weight_decay": 5e-4},
            "loop": {"steps": 80_000, "batch": 256},
        },
        "desk": {
            "source": {"n": 20_000, "candidates": 60_000},
            "criterion": {"name": "kl", "temperature": 4.0},
            "optim": {"lr": 0.1, "weight_decay": 5e-4},
            "loop": {"steps": 2000, "batch": 128},
        },
    }
    origin: ClassVar[dict[str, str]] = {
        "study": "50 000 balanced images, as in the CVPR 2025 study; other settings ours",
        "desk": "ours: the same on a schedule for two CPU cores",
    }

    def teacher_passes(self) -> tuple[float, float]:
        return self.candidates / self.n + self.mixup, 0.0

    def build(self, context: Context) -> Source:
        return Procedural(self, context)


class Procedural(Source):
    """Draws, labels, selects and mixes pictures. Only the random stream persists between acquisitions."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(context)
        self.config = config
        at_least(2, "source", n=config.n)
        at_least(1, "source", chunk=config.chunk)
        check_candidates(config.candidates, config.n)
        if not 0 <= config.mixup < 1:
            raise DodistillError(f"source.mixup is {config.mixup}; it must lie in [0, 1), as in 0.5.")
        if min(config.mix) < 0 or not 0 < sum(config.mix) < math.inf:
            raise DodistillError(
                f"source.mix is {list(config.mix)}; the shares of {', '.join(KINDS)} must be >= 0, and one above 0."
            )

    @torch.no_grad()
    def acquire(self, student: nn.Module, round: int) -> Acquired:
        c, ctx, g = self.config, self.context, self.generator
        stretch = ctx.image_shape[0] == 1 if c.stretch == "auto" else c.stretch == "on"
        x = draw(shares(c.mix, c.candidates), ctx.image_shape, g, stretch)
        x = x[torch.randperm(len(x), generator=g, device=x.device)]
        t = ctx.label(x, c.chunk, "labelling images")
        mixed = int(c.mixup * c.n)
        keep = choose(t, c.n - mixed, c.select, g)
        self.terms = {"drawn_entropy": evenness(t), "kept_entropy": evenness(t[keep])}
        x, t = x[keep], t[keep]
        if mixed:
            a, b = parents(t, mixed, g)
            lam = uniform(g, mixed, 1, 1, 1)
            both = to_uint8(to_float(x[a]) * lam + to_float(x[b]) * (1 - lam))
            x, t = torch.cat([x, both]), torch.cat([t, ctx.label(both, c.chunk, "labelling images")])
        return Acquired(x, t)


def check_candidates(candidates: int, n: int) -> None:
    """Raise DodistillError where fewer images are drawn than are kept."""
    if candidates < n:
        raise DodistillError(f"source.candidates is {candidates}, source.n {n}; draw at least as many as are kept.")


def choose(t: Tensor, n: int, rule: str, g: torch.Generator) -> Tensor:
    """[n] indices of the kept pictures, given teacher logits t [N, K], by the rules in the head of this file."""
    if rule == "balanced":  # the rule of `surest`, with random confidences
        t = nnf.one_hot(t.argmax(1), t.shape[1]) * uniform(g, len(t), 1, low=1, high=9)
    return select(t, n, {"surest": "balanced"}.get(rule, rule), g)


def parents(t: Tensor, n: int, g: torch.Generator) -> Tensor:
    """[2, n] indices of images to mix: every class among the predictions of t [N, K] is drawn equally often."""
    y = t.argmax(1)
    rarity = 1 / torch.bincount(y, minlength=t.shape[1])[y]
    return torch.multinomial(rarity, 2 * n, replacement=True, generator=g).view(2, n)


def evenness(t: Tensor) -> Tensor:
    """Entropy of the class shares among the predictions of logits t [n, K], over ln K: 1 balanced, 0 one class."""
    p = torch.bincount(t.argmax(1), minlength=t.shape[1]) / len(t)
    entropy: Tensor = torch.special.entr(p).sum() / math.log(t.shape[1])
    return entropy
