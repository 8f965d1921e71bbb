"""PSAQ: the images of PSAQ-ViT, Patch Similarity Aware Data-Free Quantization for Vision Transformers (Li et al., ECCV
2022), for a teacher that attends to patches.

On noise the patches of a ViT are all alike; on an image, foreground and background differ. Each acquisition optimises
the pixels x, from noise, for labels y and for a broad spread of these similarities:

    L = oh * CE(T(x), y) + tv * |R_tv(x) - c| - entropy * sum_l H_l

    s_ij = cosine of u_i and u_j       u_i: output of attention layer l for patch i, the mean over its heads
    p(s) = mean_ij N(s; s_ij, h^2)     of each image, at `points` values from the batch's least s_ij to its greatest
    H_l  = mean over images of the integral of -p log p (trapezoids)
    R_tv = the sum over the four difference images of their L2 norms; c is drawn per acquisition

The equations and numbers are the released code's.

Deviations, and why
 1. Largest rolls are given as shares of the height: 15 pixels in the first pass and 30 in the second at 224, as
    released. Rows and columns roll by the same offset there, and here.
 2. `tv_target` is scaled by the root of the number of values in the batch. The release has 2500 to 3000 for 32 images
    of 3x224x224, and says so.
 3. For Swin the release leaves out the first patch of each window, as if it were a class token. Ours leaves out class
    and register tokens only.
 4. `balanced` and other values of `bandwidth` are ours. With the released h = 0.01 and ten points most pairs of
    patches lie between the points, and get no gradient.
 5. Quantisation needs 32 images, a student thousands: the student's schedule is ours. So is `adv`, after the
    competitive idea of PSAQ-ViT V2 (TNNLS 2023), which the released repository does not hold: DeepInversion's term for
    images on which teacher and student disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..core.context import Context
from ..errors import at_least, positive
from ..functional import losses
from ..functional.density import kernel_entropy
from ..functional.memory_format import laid_out
from ..functional.schedules import cosine
from ..functional.terms import detached, total
from ..models.normalized import normalised_space
from ..models.patches import PatchTokens, patch_tokens, require_patches
from .shared.base import Acquired, Kind, Source, SourceConfig, drawn_labels

#: Values of the batch for which the release gives `tv_target`.
_RELEASED = 32 * 3 * 224 * 224


def _released(**source: Any) -> dict[str, Any]:
    """The released code's numbers. The student's settings are ours: quantisation trains none."""
    return {
        "source": {
            "batch": 32, "iterations": 500, "lr": 0.2, "betas": (0.5, 0.9), "lr_warmup": 100, "every": 240, **source,
        },
        "criterion": {"name": "kl", "temperature": 3.0},
        "optim": {"lr": 0.1, "weight_decay": 1e-4, "floor": 0.0},
        "augment": {"pad": 28},
        "loop": {"steps": 400_000, "batch": 100},
    }  # fmt: skip


@dataclass(frozen=True)
class Config(SourceConfig):
    """Hyper-parameters of PSAQ-ViT's images; defaults are the released code's for ViT and DeiT."""

    warmup: int = 0
    every: int = 400
    batch: int = 32  #: images optimised together
    iterations: int = 500  #: descent steps of each of the two passes
    lr: float = 0.2  #: Adam's peak rate, in the teacher's normalised coordinates
    betas: tuple[float, float] = (0.5, 0.9)
    lr_warmup: int = 100  #: iterations of linear warm-up of the rate, in each pass; then a cosine to 0
    entropy: float = 1.0  #: weight of the entropy of the patches' similarities
    oh: float = 1.0  #: weight of the cross-entropy to the drawn labels
    tv: float = 0.05  #: weight of the total variation's distance to its target
    tv_target: tuple[float, float] = (2500.0, 3000.0)  #: range of the target, of 32 images of 3x224x224
    bandwidth: float = 0.01  #: h, deviation of the kernel on the cosines
    points: int = 10  #: values of s at which the density is computed
    adv: float = 0.0  #: weight of the Jensen-Shannon divergence of teacher and student, which the images seek
    jitter: tuple[float, float] = (0.067, 0.134)  #: largest roll in the first and second pass, as a share of the height
    flip: bool = True  #: mirror the whole batch in half of the iterations (never where view.flip is off)
    balanced: bool = False  #: every class equally often, instead of labels drawn uniformly

    name: ClassVar[str] = "psaq"
    kind: ClassVar[Kind] = "inversion"
    costs: ClassVar[tuple[dict[str, float], ...]] = ({"iterations": 10, "lr_warmup": 0}, {"batch": 16})
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    trains: ClassVar[str] = "pixels"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "vit": _released(),
        "swin": _released(lr=0.25),
        "desk": {
            "source": {
                "batch": 128, "iterations": 30, "lr_warmup": 6, "bandwidth": 0.05, "balanced": True, "every": 30,
            },
            "criterion": {"name": "kl", "temperature": 4.0},
            "optim": {"lr": 0.1, "weight_decay": 5e-4, "floor": 0.0},
            "loop": {"steps": 2000, "batch": 128},
        },
    }  # fmt: skip
    origin: ClassVar[dict[str, str]] = {
        "vit": "the released code, ViT and DeiT at 224x224; student's schedule ours, as in deepinv's imagenet",
        "swin": "the released code, Swin at 224x224; student's schedule ours",
        "desk": "ours: the same losses on a schedule for two CPU cores, with a kernel as wide as half a step of s",
    }

    def teacher_passes(self) -> tuple[float, float]:
        return 2.0 * self.iterations + 1, 2.0 * self.iterations

    def build(self, context: Context) -> Source:
        return PSAQ(self, context)


def similarities(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of all pairs of patches in a window, [B, G, n, d] -> [B, G * n * (n + 1) / 2], and how many of the n * n
    ordered pairs each of them stands for: 2, or 1 for a patch with itself."""
    u = patches / torch.linalg.vector_norm(patches, dim=-1, keepdim=True).clamp_min(1e-8)
    i, j = torch.triu_indices(u.shape[2], u.shape[2], device=u.device)
    cosines = (u @ u.transpose(-1, -2))[:, :, i, j].flatten(1)
    return cosines, (1 + (i != j)).repeat(u.shape[1])


class PSAQ(Source):
    """Inversion of pixels. Only the random streams persist between acquisitions."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(context)
        self.config = config
        at_least(1, "source", iterations=config.iterations)
        at_least(0, "source", lr_warmup=config.lr_warmup)
        at_least(2, "source", batch=config.batch, points=config.points)
        positive("source", lr=config.lr, bandwidth=config.bandwidth)
        require_patches(context.teacher, context.image_shape, config.name, context.device)
        self.host = torch.Generator().manual_seed(context.seed)  # rolls and flips are drawn on the host: no sync
        self.mean, self.std = (v.to(context.device) for v in normalised_space(context.teacher.model))

    def acquire(self, student: nn.Module, round: int) -> Acquired:
        c, ctx = self.config, self.context
        shape = (c.batch, *ctx.image_shape)
        u = torch.randn(shape, generator=self.generator, device=ctx.device)
        u = laid_out(u).requires_grad_()  # normalised: x = mean + std * u
        y = drawn_labels(c.batch, ctx.num_classes, self.generator, c.balanced)
        least, most = c.tv_target
        share = float(torch.rand((), generator=self.host))
        target = (least + share * (most - least)) * math.sqrt(u.numel() / _RELEASED)
        low, high = (0 - self.mean) / self.std, (1 - self.mean) / self.std
        opt = torch.optim.Adam([u], lr=c.lr, betas=c.betas, fused=True)
        with patch_tokens(ctx.teacher) as taps:
            for part, jitter in enumerate(int(share * shape[2] + 0.5) for share in c.jitter):
                for i in range(c.iterations):
                    terms = self._terms(u, y, student, jitter, target, taps)
                    loss = total(terms)
                    opt.param_groups[0]["lr"] = self._rate(i)
                    opt.zero_grad()
                    loss.backward(inputs=[u])  # no gradients for the student
                    opt.step()
                    with torch.no_grad():
                        u.copy_(torch.minimum(torch.maximum(u, low), high))
                    ctx.progress("inverting", part * c.iterations + i + 1, 2 * c.iterations)
        self.terms = detached(terms)
        return Acquired((self.mean + self.std * u.detach()).clamp_(0, 1))

    def _rate(self, i: int) -> float:
        """Adam's rate at iteration i of a pass."""
        c = self.config
        if i < c.lr_warmup:
            return c.lr * (i + 1) / c.lr_warmup
        return cosine(i - c.lr_warmup, c.lr, of=c.iterations - c.lr_warmup)

    def _terms(
        self, u: Tensor, y: Tensor, student: nn.Module, jitter: int, target: float, taps: PatchTokens
    ) -> dict[str, Tensor]:
        c, ctx = self.config, self.context
        offset = int(torch.randint(-jitter, jitter + 1, (1,), generator=self.host))
        ua = u.roll((offset, offset), (2, 3))
        if c.flip and ctx.view.flip and int(torch.randint(2, (1,), generator=self.host)):
            ua = ua.flip(3)
        x = self.mean + self.std * ua
        with ctx.autocast():
            t = ctx.teacher(x)
        terms = {"ce": c.oh * nnf.cross_entropy(t, y)}
        if c.entropy:
            pairs = [similarities(patches) for patches in taps.layers]
            entropies = [kernel_entropy(cosines, c.bandwidth, c.points, twice) for cosines, twice in pairs]
            terms["entropy"] = -c.entropy * torch.stack(entropies).sum()
        if c.tv:
            terms["tv"] = c.tv * (losses.total_variation(ua, 2) - target).abs()
        if c.adv:
            with ctx.autocast():
                s = student(x)
            terms["js"] = c.adv * (1 - losses.js(s.float(), t, 3.0))
        return terms

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"host": self.host.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.host.set_state(state["host"].cpu())
