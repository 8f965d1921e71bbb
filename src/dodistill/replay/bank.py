"""A memory bank: keeps some of the student's past inputs unchanged (MB-DFKD, WACV 2022; LRA, CVPR 2023).

MB-DFKD: Preventing Catastrophic Forgetting and Distribution Mismatch in Knowledge Distillation via Synthetic Data
(Binici et al.).

    eviction oldest      a ring of `capacity` batches of `size` images, as published. `size` images of every `every`-th
                         acquisition replace the oldest batch. A step replays one whole batch; all are equally likely.
    eviction reservoir   ours: a uniform sample of all images of these acquisitions (Vitter's algorithm R), with
                         capacity * size images. A step replays `size` of them, drawn with replacement.

Images are kept as uint8 on the device with the teacher's logits, so that replay needs no pass through the teacher.

Deviations, and why
 1. The release adds a batch at the end of epochs 0, 5, 10, ... An epoch is 36 acquisitions of its generator at batch
    1024, 72 at batch 512. Here that is `first` = 36, `every` = 180 (72 and 360), in acquisitions.
 2. The release keeps floats in normalised coordinates on the host, and evaluates the teacher again. Here the bank keeps
    pixels in 256 levels, like all inputs of the student, and the teacher's logits of these.
 3. A batch is added when it is acquired, before the student's steps on it; in the release, after them. It is a random
    part of the acquisition; in the release, the first eighth of its last batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.context import Context
from ..core.pool import Pool
from ..data.rows import Pixels, chosen
from ..errors import DodistillError, at_least
from ..functional.augment import to_float
from .shared.base import Replay, ReplayConfig


@dataclass(frozen=True)
class Config(ReplayConfig):
    """How much is kept, and how often it is replaced; the defaults are for batches of 1024."""

    capacity: int = 10  #: batches that are kept
    size: int = 128  #: images per batch, and replayed per step (the papers: an eighth of the student's batch)
    every: int = 180  #: acquisitions between two additions
    first: int = 36  #: acquisitions up to and including the first addition
    eviction: Literal["oldest", "reservoir"] = "oldest"  #: a ring of batches, or a uniform sample of all images

    name: ClassVar[str] = "bank"

    def build(self, context: Context) -> Replay:
        return Bank(self, context)


class Bank(Replay):
    """A pool that is written rarely and read at every step."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(context)
        at_least(1, "replay", capacity=config.capacity, every=config.every, first=config.first)
        at_least(2, "replay", size=config.size)
        self.config = config
        room = config.capacity * config.size
        self.bank = Pool(
            room, context.image_shape, context.num_classes, context.device, config.eviction, context.unlabeled
        )

    @property
    def ready(self) -> bool:
        return len(self.bank) > 0

    def remember(self, images: Pixels, logits: Tensor, round: int) -> None:
        c = self.config
        if len(images) < c.size:
            raise DodistillError(
                f"replay.size is {c.size}, but an acquisition has {len(images)} images to train on; "
                f"give --replay.size {max(len(images) // 2, 2)}, or a source that acquires more at a time."
            )
        if round + 1 < c.first or (round + 1 - c.first) % c.every:
            return
        n = c.size if c.eviction == "oldest" else len(images)  # the images are in random order
        self.bank.add(chosen(images, slice(n)), logits[:n], self.generator)

    def draw(self, student: nn.Module, step: int) -> tuple[Tensor, Tensor | None]:
        size, device = self.config.size, self.context.device
        if self.config.eviction == "oldest":  # the pool's slots hold the batches one after the other
            batch = torch.randint(len(self.bank) // size, (1,), generator=self.generator, device=device)
            index = batch * size + torch.arange(size, device=device)
        else:
            index = torch.randint(len(self.bank), (size,), generator=self.generator, device=device)
        return to_float(self.bank.x[index].to(device)), self.bank.logits[index]

    def parts(self) -> dict[str, Any]:
        return {"bank": self.bank}
