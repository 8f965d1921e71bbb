"""Fast: Up to 100x Faster Data-Free Knowledge Distillation (Fang et al., AAAI 2022), "FastDFKD".

A meta-generator G_meta learns initial weights from which a few steps suffice. Per acquisition, a copy G of it and
latents z ~ N(0, I), with random labels y, are optimised together for K steps on

    L = bn * sum_l (|| mu_l - E_l ||_2 + || var_l - V_l ||_2)  +  oh * CE(T(x), y)  +  adv * L_adv,     x = G(z)

The batch statistics of the BatchNorm inputs are smoothed over acquisitions (momentum `bn_momentum`).
L_adv = -mean(1[argmax s = argmax t] * KL(t || s)) is the decision-adversarial term. G_meta then takes a step along the
sum of the inner gradients (`fomaml`) or towards the copy (`reptile`). The batch of lowest loss joins the pool.

Deviations, and why
 1. L_adv begins with the first acquisition after the student's first matching step: the 22nd, for a warm-up of 20. In
    the release it begins with the 20th, so that two acquisitions have it against an untrained student.
 2. With `balanced`, all labels are equally frequent in a batch. The default is the published uniform draw.
 3. At acquisition 120 + warm-up, the 140th, the release redraws the first layer and the first BatchNorm. The paper does
    not mention it. Here this is `reset_at` (0: never).
 4. Batches are drawn from the pool with replacement; the release iterates over PNG files on disk in shuffled order.
    Pixels are rounded to 256 levels; those of the release are truncated. 3 % are held back to score the student.
 5. The student's rate falls with every step; in the release, once per epoch of 400 steps.
 6. With `extra`, G makes further images from new latents after its K steps: twice as many as are kept, and the choice
    is even over the teacher's classes. Such an image costs two forward passes of G and of the teacher; an optimised
    one costs K forward and backward passes. The default, 0, is the published method.
The published settings are presets by teacher-student pair. For every pair the release has K = 2, 5 and 10, the paper's
Fast-2, -5 and -10. A preset without a number is Fast-10, the row that KDCI compares with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.context import Context
from ..core.runtime import seeded
from ..errors import at_least
from ..functional.augment import to_uint8
from ..functional.draws import even
from ..functional.memory_format import place
from .shared.base import Acquired, Kind, Source, drawn_labels
from .shared.generators import ConvGenerator
from .shared.guided import Guided, GuidedConfig

_COMMON: dict[str, Any] = {
    "source": {
        "batch": 256, "warmup": 20, "every": 400, "bn": 10.0, "bn_momentum": 0.9, "latent": 256, "reset_at": 120,
    },
    "criterion": {"name": "kl", "temperature": 20.0},
    "optim": {"lr": 0.2, "weight_decay": 1e-4, "floor": 2e-4},
    "loop": {"steps": 80_000, "batch": 256},
}  # fmt: skip


#: K -> (lr_g, lr_z), the same for every pair
_RATES = {2: (5e-3, 0.015), 5: (3e-3, 0.01), 10: (2e-3, 0.01)}


def _pair(K: int, adv: float, oh: float) -> dict[str, Any]:
    lr_g, lr_z = _RATES[K]
    return {**_COMMON, "source": {**_COMMON["source"], "K": K, "lr_g": lr_g, "lr_z": lr_z, "adv": adv, "oh": oh}}


def _pairs(name: str, adv: float, oh: float) -> dict[str, dict[str, Any]]:
    """The presets of one pair: `name` is Fast-10; `name`-5 and `name`-2 are Fast-5 and Fast-2."""
    return {name if K == 10 else f"{name}-{K}": _pair(K, adv, oh) for K in (10, 5, 2)}


def _origins(name: str, pair: str) -> dict[str, str]:
    return {name if K == 10 else f"{name}-{K}": f"release script, {pair}, Fast-{K}" for K in (10, 5, 2)}


@dataclass(frozen=True)
class Config(GuidedConfig):
    """Hyper-parameters of FastDFKD; defaults are those for WRN teachers on CIFAR."""

    warmup: int = 20
    every: int = 400
    batch: int = 256  #: images per acquisition
    K: int = 10  #: inner steps per acquisition
    lr_g: float = 2e-3  #: inner rate of the generator; its meta rate is K * lr_g
    lr_z: float = 0.01  #: inner rate of the latents
    latent: int = 256  #: size of z
    width: int = 64  #: channels of the generator's last hidden layer
    meta: Literal["fomaml", "reptile", "none"] = "fomaml"
    reptile_factor: float = 67.0  #: Reptile's meta-gradient is this times (meta - fast)
    reset_at: int = 120  #: redraw the first layers at acquisition number reset_at + warmup, from 1 (0: never)
    balanced: bool = False  #: every class equally often in a batch, instead of labels drawn uniformly
    extra: int = 0  #: further batches per acquisition, from the optimised generator at new latents (ours)

    name: ClassVar[str] = "fast"
    kind: ClassVar[Kind] = "generator"
    together: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"batchnorm"})
    costs: ClassVar[tuple[dict[str, float], ...]] = ({"K": 2, "extra": 0}, {"batch": 16})
    trains: ClassVar[str] = "a meta-generator, a copy per acquisition"
    keeps: ClassVar[str] = "2 generators, Adam"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        **_pairs("wrn", 1.1, 0.4),
        **_pairs("vgg11", 1.0, 0.5),
        **_pairs("resnet34", 1.33, 0.5),
        "desk": {
            **_COMMON,
            "source": {"K": 5, "batch": 128, "width": 32, "warmup": 10, "every": 20, "reset_at": 0},
            "optim": {"lr": 0.1, "weight_decay": 5e-4, "floor": 0.0},
            "loop": {"steps": 2000, "batch": 128},
        },
        "hour": {
            **_COMMON,
            "source": {"K": 10, "batch": 256, "width": 32, "warmup": 5, "every": 120, "reset_at": 0},
            "optim": {"lr": 0.1, "weight_decay": 5e-4, "floor": 0.0},
            "augment": {"mix": "cutmix"},
            "loop": {"steps": 6000, "batch": 64},
        },
    }
    origin: ClassVar[dict[str, str]] = {
        **_origins("wrn", "WRN-40-2 pairs on CIFAR"),
        **_origins("vgg11", "VGG-11 -> ResNet-18 on CIFAR"),
        **_origins("resnet34", "ResNet-34 -> ResNet-18 on CIFAR"),
        "desk": "ours: the same losses on a schedule for two CPU cores",
        "hour": "ours: Fast-10, cutmix, batches of 64; chosen by recipes/hour_search.yaml and recipes/hour_core.yaml",
    }

    def teacher_passes(self) -> tuple[float, float]:
        batches = 1 + self.extra
        return (self.K + 1 + 2 * self.extra) / batches, self.K / batches

    def build(self, context: Context) -> Source:
        return Fast(self, context)


class Fast(Guided):
    """The meta-generator and its inner descent."""

    config: Config

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        at_least(1, "source", K=config.K, latent=config.latent, width=config.width)
        at_least(2, "source", batch=config.batch)
        at_least(0, "source", " (0: none)", extra=config.extra)
        args = (config.latent, context.image_shape, config.width)
        self.meta = place(seeded(ConvGenerator, self.generator, *args), context.device)
        self.fast = place(seeded(ConvGenerator, self.generator, *args), context.device)  # overwritten each time
        self.opt_meta = torch.optim.Adam(
            self.meta.parameters(), lr=config.lr_g * config.K, betas=(0.5, 0.999), fused=True
        )

    def acquire(self, student: nn.Module, round: int) -> Acquired:
        c, ctx = self.config, self.context
        if c.reset_at and round + 1 == c.reset_at + c.warmup:
            self.meta.reset_first_layers(self.generator)
        z = torch.randn(c.batch, c.latent, generator=self.generator, device=ctx.device).requires_grad_()
        y = drawn_labels(c.batch, ctx.num_classes, self.generator, c.balanced)
        with torch.no_grad():
            self.fast.load_state_dict(self.meta.state_dict())
        groups = [{"params": self.fast.parameters(), "lr": c.lr_g}, {"params": [z], "lr": c.lr_z}]
        opt = torch.optim.Adam(groups, betas=(0.5, 0.999), fused=True)
        self.opt_meta.zero_grad()
        adversarial = c.adv > 0 and round > c.warmup

        best = self._descend(
            lambda: self.fast(z), y, student if adversarial else None, opt, [z, *self.fast.parameters()], c.K,
            each=self._accumulate if c.meta == "fomaml" else lambda: None,
        )  # fmt: skip
        if c.meta == "none":
            self.meta.load_state_dict(self.fast.state_dict())
        else:
            if c.meta == "reptile":
                for p, q in zip(self.meta.parameters(), self.fast.parameters()):
                    p.grad = c.reptile_factor * (p.detach() - q.detach())
            self.opt_meta.step()
        return self._with_more(best) if c.extra else Acquired(best)

    @torch.no_grad()
    def _with_more(self, best: Tensor) -> Acquired:
        """The batch `best` with `extra` more of G at new latents."""
        c, ctx, made = self.config, self.context, []
        for _ in range(2 * c.extra):
            z = torch.randn(c.batch, c.latent, generator=self.generator, device=ctx.device)
            with ctx.autocast():
                made.append(to_uint8(self.fast(z)))
        more, images = torch.cat(made), to_uint8(best)
        t = ctx.label(more)
        kept = even(t.argmax(1), c.extra * c.batch, self.generator)
        return Acquired(torch.cat([images, more[kept]]), torch.cat([ctx.label(images), t[kept]]))

    def _accumulate(self) -> None:
        """First-order MAML: the meta-gradient is the sum of the inner gradients."""
        for p, q in zip(self.meta.parameters(), self.fast.parameters()):
            assert q.grad is not None
            p.grad = q.grad.clone() if p.grad is None else p.grad.add_(q.grad)

    def parts(self) -> dict[str, Any]:
        return {"meta": self.meta, "opt_meta": self.opt_meta}
