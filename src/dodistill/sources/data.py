"""Distillation with data: every image of a real dataset, with its label where it has one.

This is the setting of most of the distillation literature, as one more source. The whole set enters the pool once, with
the teacher's logits. Everything else (loop, interventions, replay, report) is the same as without data. The delivered
student is chosen on held-back images of the set, never on a test set.

Criteria with a cross-entropy (`hinton`, `cid`, the baselines) read the labels. Where there are none, the teacher's
predictions replace them. Source `real` never reads labels, and can skew the classes.

The presets hold the student's schedule of CID and RepDistiller: 240 passes over CIFAR's 50 000 images in batches of 64.
Deviations: batches are drawn with replacement, and 3 % of the images (1024 at most) are held back for evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..core.context import Context
from ..errors import DodistillError
from .shared.base import Acquired, Kind, Source, SourceConfig, ask

_SCHEDULE: dict[str, Any] = {
    "optim": {
        "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4,
        "schedule": "steps", "milestones": [0.625, 0.75, 0.875],
    },
    "augment": {"pad": 4, "flip": True},
    "loop": {"steps": 187_680, "batch": 64, "eval_every": 7820},
}  # fmt: skip


def _cid(b: float, c: float, lr: float = 0.05) -> dict[str, Any]:
    """CID's setting for one pair."""
    return _SCHEDULE | {
        "source": {}, "intervention": "cid", "cid": {"decay": True},
        "criterion": {"name": "cid", "a": 1.0, "b": b, "c": c},
        "optim": _SCHEDULE["optim"] | {"lr": lr},
    }  # fmt: skip


@dataclass(frozen=True)
class Config(SourceConfig):
    """The share of the data."""

    warmup: int = 0
    every: int = 0
    share: float = 1.0  #: share of the images, in (0, 1]; the same images for every seed

    name: ClassVar[str] = "data"
    kind: ClassVar[Kind] = "data"
    together: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"unlabeled"})
    reads_labels: ClassVar[bool] = True
    costs: ClassVar[tuple[dict[str, float], ...]] = ({"share": 0.0},)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cid-wrn40_4-wrn16_2": _cid(55.0, 0.1),
        "cid-wrn40_2-wrn16_2": _cid(65.0, 1.0),
        "cid-resnet56-resnet20": _cid(10.0, 1.0),
        "cid-resnet50-mobilenetv2": _cid(33.0, 0.1, 0.01),
        "cid-resnet50-vgg8": _cid(8.0, 2.0),
        "repdistiller": _SCHEDULE
        | {
            "source": {},
            "criterion": {"name": "hinton", "ce": 0.1, "kd": 0.9},
            "optim": _SCHEDULE["optim"] | {"nesterov": False},
        },
        "desk": {
            "source": {},
            "criterion": {"name": "hinton", "ce": 0.1, "kd": 0.9},
            "optim": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
            "loop": {"steps": 2000, "batch": 64},
            "cid": {"refresh": 0.05},
        },
    }
    origin: ClassVar[dict[str, str]] = {
        "cid-wrn40_4-wrn16_2": "CID's released settings, CIFAR-100",
        "cid-wrn40_2-wrn16_2": "CID's released settings, CIFAR-100",
        "cid-resnet56-resnet20": "CID's released settings, CIFAR-100",
        "cid-resnet50-mobilenetv2": "CID's released settings, CIFAR-100",
        "cid-resnet50-vgg8": "CID's released settings, CIFAR-100",
        "repdistiller": "RepDistiller, CIFAR-100; Hinton's loss unless a criterion is named",
        "desk": "ours: the same losses on a schedule for two CPU cores",
    }

    def build(self, context: Context) -> Source:
        return Data(self, context)


class Data(Source):
    """Returns the images once."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(context)
        self.config = config
        if not 0 < config.share <= 1:
            raise DodistillError(f"source.share is {config.share}; it must lie in (0, 1], as in 0.2.")
        x, y = context.unlabeled, context.labels
        n = 0 if x is None else len(x)
        if y is not None and (y.shape != (n,) or not 0 <= int(y.min()) <= int(y.max()) < context.num_classes):
            raise DodistillError(
                f"the labels have shape {tuple(y.shape)} and run from {int(y.min())} to {int(y.max())}; they must be "
                f"{n} class numbers below {context.num_classes}, the teacher's class count."
            )
        self.n = max(1, round(config.share * n))
        if self.n > context.capacity:
            raise DodistillError(
                f"the data are {self.n} images, but pool.capacity is {context.capacity}; give --pool.capacity "
                f"{self.n}, or use a part of the images by --source.share."
            )

    @torch.no_grad()
    def acquire(self, student: nn.Module, round: int) -> Acquired:
        x, y, keep = self.context.unlabeled, self.context.labels, None
        assert x is not None
        if self.n < len(x):
            keep = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: self.n]
        return Acquired(*ask(self.context, some=keep), y if y is None or keep is None else y[keep.to(y.device)])
