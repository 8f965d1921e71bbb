"""DFND: Learning Student Networks in the Wild (Chen et al., CVPR 2021), a sampler of unlabelled images.

From a large unlabelled set it keeps the n images with the most confident teacher predictions: those of smallest

    v(x) = CE(T(x), argmax T(x)),

once, before the first step. The student then matches the teacher on them with the noisy-adaptation criterion (matrix
Q). It belongs to the method, but is a choice on another axis here: `criterion: adaptation`.

Deviations, and why (tests/test_parity_wild.py has the released numbers)
 1. `select = "balanced"` (ours) keeps the most confident images of each predicted class in equal numbers, as far as
    there are any. Under the published rule the class shares follow the teacher's confidence. `random` is the paper's
    own baseline.
 2. Unlabelled images get the teacher's normalisation. The release gives a CIFAR teacher images with ImageNet's
    constants.
 3. Training length is `loop.steps`; 40 000 / n * 512 epochs of n images in batches of 256 are 80 000 steps. The release
    rounds down to epochs and stops one short, at 77 352. Images are drawn with replacement; the release shuffles.
 4. Larger images of a folder are cropped to their centre square; the release squashes them to 32x32. Images of the
    required size, such as those of downsampled ImageNet, stay unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..core.context import Context
from ..errors import DodistillError, at_least
from .shared.base import Acquired, Kind, Source, SourceConfig, ask


@dataclass(frozen=True)
class Config(SourceConfig):
    """Hyper-parameters of the sampler."""

    warmup: int = 0
    every: int = 0
    n: int = 600_000  #: images kept (all, where there are fewer)
    candidates: int = 0  #: images that the teacher labels, drawn at random; 0: all
    select: Literal["confident", "balanced", "random"] = "confident"
    chunk: int = 512  #: images per teacher forward

    name: ClassVar[str] = "dfnd"
    kind: ClassVar[Kind] = "sampler"
    together: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"unlabeled"})
    costs: ClassVar[tuple[dict[str, float], ...]] = ({"candidates": 64},)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "source": {"n": 600_000},
            "pool": {"capacity": 600_000},
            "criterion": {"name": "adaptation", "temperature": 4.0},
            "optim": {"lr": 0.1, "weight_decay": 5e-4, "schedule": "steps"},
            "loop": {"steps": 80_000, "batch": 256},
        },
        "desk": {
            "source": {"n": 25_000},
            "criterion": {"name": "adaptation", "temperature": 4.0},
            "optim": {"lr": 0.1, "weight_decay": 5e-4, "schedule": "cosine"},
            "loop": {"steps": 2000, "batch": 128},
        },
    }
    origin: ClassVar[dict[str, str]] = {
        "paper": "released code, ResNet-34 -> ResNet-18, imagenet32 as the unlabelled set; set the teacher's accuracy",
        "desk": "ours: the same losses on a schedule for two CPU cores",
    }

    def counted(self, unlabeled: int) -> Self:
        return replace(self, candidates=min(self.candidates or unlabeled, unlabeled))

    def build(self, context: Context) -> Source:
        return Dfnd(self, context)


class Dfnd(Source):
    """Labels the unlabelled images once, and keeps n."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(context)
        self.config = config
        at_least(2, "source", n=config.n)
        if config.candidates:
            at_least(2, "source", " (0: all)", candidates=config.candidates)
        at_least(1, "source", chunk=config.chunk)
        have = 0 if context.unlabeled is None else len(context.unlabeled)
        if have < 2:
            raise DodistillError(
                f"source dfnd has {have} unlabelled image(s), but needs at least 2; give --data.unlabeled FOLDER "
                "(or .npz, .npy)."
            )

    @torch.no_grad()
    def acquire(self, student: nn.Module, round: int) -> Acquired:
        c, images, some = self.config, self.context.unlabeled, None
        if images is not None and 0 < c.candidates < len(images):
            some = torch.randperm(len(images), generator=self.generator, device=self.context.device)[: c.candidates]
        x, t = ask(self.context, c.chunk, some)
        keep = select(t, min(c.n, len(x)), c.select, self.generator)
        self.terms = {
            "selected": torch.tensor(float(len(keep)), device=t.device),
            "ce": nnf.cross_entropy(t[keep], t[keep].argmax(1)),
        }
        return Acquired(x.select(keep), t[keep])


def select(t: Tensor, n: int, rule: str, generator: torch.Generator) -> Tensor:
    """[n] indices of the images kept, given teacher logits t [N, K], by `confident`, `balanced` or `random`."""
    if rule == "random":
        return torch.randperm(len(t), generator=generator, device=t.device)[:n]
    v = nnf.cross_entropy(t, t.argmax(1), reduction="none")
    surest = v.argsort(stable=True)
    if rule == "confident":
        return surest[:n]
    # Rank of every image within its class, most confident first: the n smallest ranks are as balanced as possible.
    y = t.argmax(1)[surest]
    rank = torch.zeros_like(surest)
    for k in range(t.shape[1]):
        members = (y == k).nonzero()[:, 0]
        rank[members] = torch.arange(len(members), device=t.device)
    return surest[rank.argsort(stable=True)[:n]]
