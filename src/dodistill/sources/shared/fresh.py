"""The base of sources whose generator makes fresh batches at each acquisition.

Per acquisition the generator G makes `g_steps` steps of Adam on a loss of x = G(z), z ~ N(0, I). It then generates
`fresh` batches from new z. The student matches on them for `every` steps, and the next acquisition replaces them in the
pool: the presets of `dafl` set its capacity by `pooled`; those of `adversarial` and `pre` to all images of an
acquisition, so that 3 % are left of the one before. The method is the loss, in a file of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...config.tree import PoolConfig
from ...core.context import Context
from ...core.runtime import seeded
from ...errors import at_least, positive
from ...functional.augment import to_uint8
from ...functional.memory_format import place
from ...functional.terms import detached, total
from ...models.normalized import normalised_space
from .base import Acquired, Source, SourceConfig
from .generators import ConvGenerator


def pooled(images: int) -> int:
    """The number of an acquisition's `images` that join the pool, under the default held-back share.

    A pool of this capacity holds the newest acquisition and nothing else.
    """
    return images - max(1, round(images * PoolConfig().holdout))


@dataclass(frozen=True)
class FreshConfig(SourceConfig):
    """The settings that these sources share."""

    warmup: int = 0
    every: int = 5
    fresh: int = 5  #: new batches per acquisition; 0: the batch of the generator's last step
    batch: int = 256  #: images per step of the generator, and per new batch
    g_steps: int = 1  #: steps of the generator per acquisition
    lr_g: float = 1e-3  #: Adam's rate of the generator, constant
    betas: tuple[float, float] = (0.5, 0.999)
    latent: int = 256  #: size of z
    width: int = 64  #: channels of the generator's last hidden layer
    base: int = 0  #: channels of its first map; 0: twice the width
    eps: float = 1e-5  #: of the generator's hidden BatchNorms
    output: Literal["sigmoid", "standardised"] = "sigmoid"  #: pixels, or the teacher's normalised coordinates

    generates: ClassVar[bool] = True
    costs: ClassVar[tuple[dict[str, float], ...]] = ({"batch": 16},)
    trains: ClassVar[str] = "a generator"
    keeps: ClassVar[str] = "1 generator, Adam"

    @property
    def handed(self) -> int:
        """Batches that an acquisition returns."""
        return max(self.fresh, 1)

    def teacher_passes(self) -> tuple[float, float]:
        own = self.g_steps / self.handed
        return own + (1.0 if self.fresh else 0.0), own  # the images of its last step already have teacher logits


class Fresh(Source):
    """A generator, its Adam, and the loop of one acquisition. `_losses` is the method."""

    config: FreshConfig

    def __init__(self, config: FreshConfig, context: Context) -> None:
        super().__init__(context)
        self.config = config
        at_least(1, "source", latent=config.latent, width=config.width, g_steps=config.g_steps)
        at_least(0, "source", fresh=config.fresh, base=config.base)
        at_least(2, "source", batch=config.batch)
        positive("source", lr_g=config.lr_g, eps=config.eps)
        space = normalised_space(context.teacher.model) if config.output == "standardised" else None
        args = (config.latent, context.image_shape, config.width, config.base, config.eps, space)
        self.net = place(seeded(ConvGenerator, self.generator, *args), context.device)
        self.opt = torch.optim.Adam(self.net.parameters(), lr=config.lr_g, betas=config.betas, fused=True)

    @abstractmethod
    def _losses(self, x: Tensor, student: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted terms of the generator's loss at its images x [B, C, H, W], and the teacher's logits of x."""

    def acquire(self, student: nn.Module, round: int) -> Acquired:
        c = self.config
        for _ in range(c.g_steps):
            x, t = self._step(student)
        if c.fresh:
            return Acquired(torch.cat([self._make(net) for _ in range(c.fresh) for net in self._nets()]))
        return Acquired(to_uint8(x), t.detach())

    def _step(self, student: nn.Module) -> tuple[Tensor, Tensor]:
        """One step of the generator. Returns its images and their teacher logits from before the step."""
        with self.context.autocast():
            x: Tensor = self.net(self._z())
        terms, t = self._losses(x, student)
        self.opt.zero_grad()
        loss = total(terms)
        loss.backward(inputs=list(self.net.parameters()))  # no gradients for the student
        self.opt.step()
        self.terms = detached(terms)
        return x, t

    def makes_with(self) -> tuple[nn.Module, int, int]:
        return self.net, self.config.latent, self.config.g_steps

    def _nets(self) -> list[nn.Module]:
        """The networks that each generate `fresh` batches."""
        return [self.net]

    def _z(self) -> Tensor:
        c = self.config
        return torch.randn(c.batch, c.latent, generator=self.generator, device=self.context.device)

    @torch.no_grad()
    def _make(self, net: nn.Module) -> Tensor:
        """One new batch of `net`, uint8, as the pool keeps it."""
        with self.context.autocast():
            return to_uint8(net(self._z()))

    def parts(self) -> dict[str, Any]:
        return {"net": self.net, "opt": self.opt}
