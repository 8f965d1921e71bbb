"""Real images as the substitution data, with class shares of a chosen skew: the control experiment of this package.

KDCI's thesis is that the class shares of the substitution data confound the student. Here these shares are a setting:
n real images whose shares, by the teacher's prediction, fall off geometrically over the classes,

    share_k ~ skew^(-k / (K - 1)),     k = 0 .. K-1 in a seeded order,

so that the most frequent class has `skew` times the images of the rarest. Labels are never read. All other differences
between real and synthesized inputs are absent, so a grid of cheap runs (recipes/skew.yaml) shows when an intervention
helps. `skew = 1` balances the classes; `skew = 0` keeps the data's own shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.context import Context
from ..errors import DodistillError
from .shared.base import Acquired, Kind, Source, SourceConfig, ask


@dataclass(frozen=True)
class Config(SourceConfig):
    """The number of real images, and the skew of their classes."""

    warmup: int = 0
    every: int = 0
    n: int = 6000  #: images kept (fewer if the most frequent class has too few)
    skew: float = 0.0  #: ratio of the most frequent class to the rarest; 1: balanced, 0: as in the data

    name: ClassVar[str] = "real"
    kind: ClassVar[Kind] = "data"
    together: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"unlabeled"})
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "desk": {
            "source": {"n": 6000},
            "criterion": {"name": "kl", "temperature": 4.0},
            "optim": {"lr": 0.1, "weight_decay": 5e-4},
            "loop": {"steps": 1500, "batch": 128},
        }
    }
    origin: ClassVar[dict[str, str]] = {"desk": "ours"}

    def build(self, context: Context) -> Source:
        return Real(self, context)


class Real(Source):
    """Labels all images once, and keeps those that give the requested class shares."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(context)
        self.config = config
        if config.skew != 0 and config.skew < 1:
            raise DodistillError(f"source real: skew is {config.skew}; it must be 0 (as in the data) or at least 1.")

    @torch.no_grad()
    def acquire(self, student: nn.Module, round: int) -> Acquired:
        x, t = ask(self.context)
        keep = thin(t.argmax(1), self.context.num_classes, self.config.n, self.config.skew, self.generator)
        return Acquired(x.select(keep), t[keep])


def thin(y: Tensor, classes: int, n: int, skew: float, generator: torch.Generator) -> Tensor:
    """Indices of about n of the labels y [N] whose class shares fall off as skew^(-k/(K-1)), in random class order.

    If a class has fewer members than its share of n, all classes shrink in proportion, and fewer than n are kept. A
    class without members shrinks no other.
    """
    shuffled = torch.randperm(len(y), generator=generator, device=y.device)
    if skew == 0:
        return shuffled[:n]
    order = torch.randperm(classes, generator=generator, device=y.device)
    fall = torch.empty(classes, device=y.device)
    fall[order] = skew ** (-torch.arange(classes, device=y.device) / max(classes - 1, 1))
    wanted = fall / fall.sum() * n
    have = torch.bincount(y, minlength=classes).float()
    wanted = (wanted * (have / wanted)[have > 0].min().clamp(max=1)).round().clamp(min=1)
    kept = []
    for k in range(classes):
        members = shuffled[y[shuffled] == k]
        kept.append(members[: int(wanted[k])])
    return torch.cat(kept)
