"""DeepInv: Dreaming to Distill, Data-free Knowledge Transfer via DeepInversion (Yin et al., CVPR 2020).

Each acquisition optimises the pixels x themselves, from noise, for labels y and the teacher's BatchNorm statistics:

    L = oh * CE(T(x), y) + bn * sum_l r_l + tv * R_tv(x) + l2 * ||x||_2 + adv * (1 - JS(T(x), S(x)))

    r_l  = || mu_l - E_l ||_2 + || var_l - V_l ||_2      statistics of each BatchNorm's input
    R_tv = sum over the four difference images (right, down, two diagonals) of their mean absolute value

The last term is Adaptive DeepInversion: it finds images on which teacher and student disagree. With `low`, the first
iterations replace each 2x2 block of x by its mean, as NVIDIA's ImageNet code does.

Deviations, and why
 1. `js = "true"` is the Jensen-Shannon divergence at temperature 3. The released code's "JS" is KL(M || P) with
    probabilities clamped to [0.01, 0.99], which has almost no gradient with 100 classes. `js = "published"` is that,
    clamped to [0, 1] as in NVIDIA's code. The toolbox does not clamp it; it can reach 1.6.
 2. `best` returns the iterate of lowest loss, as the release intends. The release's copy aliases the tensor that it
    updates in place, so it always returns the last iterate: `best = false`. NVIDIA's ImageNet code copies, one step
    late and at either resolution. Ours compares at full resolution only, as losses of two resolutions do not compare.
 3. Pixels are optimised in the teacher's normalised coordinates, as in the release, and clipped to valid pixels after
    each step. A teacher without a known normalisation gets mean 0.5 and deviation 0.25.
 4. `tv_norm = "l2"` is NVIDIA's R_tv: the sum of the four L2 norms over the batch, a thousand times as large on noise
    of 256 images. As in the two codes, L1 reads the image itself and L2 the rolled image.
 5. The toolbox has two copies. `toolbox` is the one in CMI's repository: tv 1e-3, and the student's cosine ends at 0.
    Fast's has tv 0 and ends at 2e-4. It also subtracts 0.001 of the student's BatchNorm loss. No paper has this term,
    so we leave it out.
 6. NVIDIA's ImageNet code inverts 42 hand-picked classes, or random ones (`--random_label`). Ours are random.
 7. The student of the adaptive term is the one that is trained, as in the toolbox and by the authors' replies. In
    NVIDIA's code it is fixed: a pretrained ResNet-18 for ImageNet, an untrained one for CIFAR-10.
 8. Draws from the pool, levels of pixels and the student's rate as in `fast` (its deviations 4 and 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..core.context import Context
from ..errors import DodistillError, at_least
from ..functional import losses
from ..functional.memory_format import laid_out
from ..functional.terms import detached, total
from ..models.normalized import normalised_space
from ..models.taps import batchnorm_inputs
from .shared.base import Acquired, Kind, Source, SourceConfig, drawn_labels
from .shared.best import Best

_TOOLBOX: dict[str, Any] = {
    "source": {"batch": 256, "iterations": 1000, "lr": 0.1, "betas": (0.5, 0.99), "every": 400},
    "criterion": {"name": "kl", "temperature": 20.0},
    "optim": {"lr": 0.1, "weight_decay": 1e-4, "floor": 0.0},
    "loop": {"steps": 80_000, "batch": 256},
}


def _imagenet(**source: Any) -> dict[str, Any]:
    """NVIDIA's setting 0 for ImageNet. The student's settings are ours: they were not released."""
    return {
        "source": {
            "batch": 84, "low": 2000, "iterations": 1000, "lr": 0.25, "betas": (0.5, 0.9), "schedule": "cosine",
            "lr_warmup": 100, "bn": 0.01, "first_bn": 10.0, "adv": 0.0, "js": "published", "tv": 1e-4, "tv_norm": "l2",
            "l2": 1e-5, "l2_per_image": True, "jitter": 30, "every": 240, **source,
        },
        "criterion": {"name": "kl", "temperature": 3.0},
        "optim": {"lr": 0.1, "weight_decay": 1e-4, "floor": 0.0},
        "pool": {"capacity": 140_000},
        "augment": {"pad": 28},
        "loop": {"steps": 400_000, "batch": 100},
    }  # fmt: skip


@dataclass(frozen=True)
class Config(SourceConfig):
    """Hyper-parameters of (Adaptive) DeepInversion; defaults are the toolbox's, which made the literature's tables."""

    warmup: int = 0
    every: int = 400
    batch: int = 256  #: images inverted together
    iterations: int = 1000  #: descent steps per acquisition
    low: int = 0  #: steps before them at half the resolution
    lr: float = 0.1  #: Adam's rate, in the teacher's normalised coordinates
    betas: tuple[float, float] = (0.5, 0.99)
    schedule: Literal["constant", "cosine"] = "constant"  #: of this rate, over the iterations of a resolution
    lr_warmup: int = 0  #: iterations of linear warm-up of the rate, at each resolution
    oh: float = 1.0  #: weight of the cross-entropy to the drawn labels
    bn: float = 10.0  #: weight of the BatchNorm statistics
    first_bn: float = 1.0  #: extra factor on the first BatchNorm (10 in NVIDIA's ImageNet setting)
    adv: float = 1.0  #: weight of the adaptive Jensen-Shannon term (0: plain DeepInversion)
    tv: float = 1e-3  #: weight of the total variation
    tv_norm: Literal["l1", "l2"] = "l1"  #: mean absolute differences (toolbox); L2 norm of the batch (NVIDIA)
    l2: float = 0.0  #: weight of the pixels' L2 norm
    l2_per_image: bool = False  #: the mean of the images' norms instead of the batch's (NVIDIA's ImageNet code)
    js: Literal["true", "published"] = "true"
    temperature: float = 3.0  #: of the Jensen-Shannon term
    jitter: int = 0  #: largest roll in pixels; 0 means an eighth of the height
    flip: bool = True  #: mirror the whole batch in half of the iterations (never where view.flip is off)
    clip: bool = True  #: keep pixels valid after each step
    best: bool = True  #: return the iterate of lowest loss instead of the last
    balanced: bool = False  #: every class equally often, instead of labels drawn uniformly

    name: ClassVar[str] = "deepinv"
    kind: ClassVar[Kind] = "inversion"
    together: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"batchnorm"})
    costs: ClassVar[tuple[dict[str, float], ...]] = ({"iterations": 10, "low": 0, "lr_warmup": 0}, {"batch": 16})
    trains: ClassVar[str] = "pixels"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "toolbox": _TOOLBOX,
        "nvidia": {
            **_TOOLBOX,
            "source": {
                "batch": 256, "iterations": 2000, "lr": 0.05, "betas": (0.9, 0.999), "tv": 2.5e-5, "tv_norm": "l2",
                "l2": 3e-8,
                "adv": 10.0, "jitter": 2, "every": 50, "balanced": True, "clip": False, "flip": False,
            },
            "criterion": {"name": "kl", "temperature": 3.0},
            "pool": {"capacity": 409_600},
        },
        "imagenet": _imagenet(),
        "imagenet-adaptive": _imagenet(adv=0.2, lr=0.2),
        "imagenet-single": _imagenet(low=0, iterations=2000, lr=0.2),
        "imagenet-long": _imagenet(batch=152, low=0, iterations=20_000, lr=0.2, betas=(0.9, 0.999), clip=False),
        "desk": {
            **_TOOLBOX,
            "source": {
                "batch": 128, "iterations": 60, "lr": 0.2, "betas": (0.5, 0.99), "schedule": "cosine", "every": 30,
                "best": False,
            },
            "optim": {"lr": 0.1, "weight_decay": 5e-4, "floor": 0.0},
            "loop": {"steps": 2000, "batch": 128},
        },
    }  # fmt: skip
    origin: ClassVar[dict[str, str]] = {
        "toolbox": "the DFKD toolbox's script (CMI's copy), WRN-40-2 -> WRN-16-1 on CIFAR-10; other pairs have none",
        "nvidia": "NVIDIA's CIFAR-10 flags and its authors' replies (50 steps per batch, T 3); l2 and adv unverified",
        "imagenet": "NVIDIA's ImageNet command, ResNet-50: 2000 at 112x112, 1000 at 224x224; student's schedule ours",
        "imagenet-adaptive": "the same with the command of its log for adi_scale 0.2; student's schedule ours",
        "imagenet-single": "NVIDIA's setting 1 with the command of its log: 2000 at 224x224; student's schedule ours",
        "imagenet-long": "NVIDIA's setting 2, 20 000 at 224x224, with the paper's batch; student's schedule ours",
        "desk": "ours: the same losses on a schedule for two CPU cores",
    }

    def teacher_passes(self) -> tuple[float, float]:
        return self.low + self.iterations + 1.0, float(self.low + self.iterations)

    def build(self, context: Context) -> Source:
        return DeepInv(self, context)


class DeepInv(Source):
    """Inversion of pixels. Only the random streams persist between acquisitions."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(context)
        self.config = config
        at_least(1, "source", iterations=config.iterations)
        at_least(0, "source", low=config.low, lr_warmup=config.lr_warmup)
        at_least(2, "source", batch=config.batch)
        if config.low:
            self._check_half()
        self.host = torch.Generator().manual_seed(context.seed)  # rolls and flips are drawn on the host: no sync
        self.mean, self.std = (v.to(context.device) for v in normalised_space(context.teacher.model))

    def acquire(self, student: nn.Module, round: int) -> Acquired:
        c, ctx = self.config, self.context
        shape = (c.batch, *ctx.image_shape)
        u = torch.randn(shape, generator=self.generator, device=ctx.device)
        u = laid_out(u).requires_grad_()  # normalised: x = mean + std * u
        y = drawn_labels(c.batch, ctx.num_classes, self.generator, c.balanced)
        low, high = (0 - self.mean) / self.std, (1 - self.mean) / self.std
        jitter = c.jitter or max(1, ctx.image_shape[1] // 8)
        best = Best()

        with batchnorm_inputs(ctx.teacher) as taps:
            for shrink, steps in ((2, c.low), (1, c.iterations)):
                opt = torch.optim.Adam([u], lr=c.lr, betas=c.betas, fused=True)
                for i in range(steps):
                    terms = self._terms(nnf.avg_pool2d(u, 2) if shrink > 1 else u, y, student, jitter // shrink, taps)
                    loss = total(terms)
                    if c.best and shrink == 1:
                        best.offer(loss, u)
                    opt.param_groups[0]["lr"] = self._rate(i, steps)
                    opt.zero_grad()
                    loss.backward(inputs=[u])  # no gradients for the student
                    opt.step()
                    if c.clip:
                        with torch.no_grad():
                            u.copy_(torch.minimum(torch.maximum(u, low), high))
                    ctx.progress("inverting", (shrink == 1) * c.low + i + 1, c.low + c.iterations)
        self.terms = detached(terms)
        chosen = best.tensors[0] if c.best else u.detach()
        return Acquired((self.mean + self.std * chosen).clamp_(0, 1))

    def _rate(self, i: int, steps: int) -> float:
        """Adam's rate at iteration i of the `steps` of one resolution.

        The cosine is computed in fp32, unlike that of `schedules`: the results of earlier runs depend on it.
        """
        c = self.config
        if i < c.lr_warmup:
            return c.lr * (i + 1) / c.lr_warmup
        if c.schedule == "constant":
            return c.lr
        angle = torch.pi * (i - c.lr_warmup) / (steps - c.lr_warmup)
        return c.lr * (0.5 * (1 + torch.cos(torch.tensor(angle)))).item()

    def _check_half(self) -> None:
        channels, height, width = self.context.image_shape
        half = torch.full((2, channels, height // 2, width // 2), 0.5, device=self.context.device)
        try:
            with torch.no_grad():
                self.context.teacher(half)
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            raise DodistillError(
                f"source.low is {self.config.low}, but the teacher cannot read images of {height // 2}x{width // 2}, "
                f"half of its {height}x{width}: give --source.low 0. The error was: {str(error).partition('.')[0]}."
            ) from error

    def _terms(self, u: Tensor, y: Tensor, student: nn.Module, jitter: int, taps: Any) -> dict[str, Tensor]:
        c, ctx = self.config, self.context
        dy, dx = torch.randint(-jitter, jitter + 1, (2,), generator=self.host).tolist()
        ua = u.roll((dy, dx), (2, 3))
        if c.flip and ctx.view.flip and int(torch.randint(2, (1,), generator=self.host)):
            ua = ua.flip(3)
        x = self.mean + self.std * ua
        with ctx.autocast():
            t = ctx.teacher(x)
        terms = {
            "ce": c.oh * nnf.cross_entropy(t, y),
            "bn": c.bn * losses.bn_statistics(taps, taps.modules, first=c.first_bn),
        }
        if c.tv:
            terms["tv"] = c.tv * (losses.total_variation(u, 1) if c.tv_norm == "l1" else losses.total_variation(ua, 2))
        if c.l2:
            terms["l2"] = c.l2 * losses.l2_norm(ua, c.l2_per_image)
        if c.adv:
            with ctx.autocast():
                s = student(x)
            if c.js == "true":
                js = losses.js(s.float(), t, c.temperature)
            else:
                js = losses.js_published(s.float(), t, c.temperature).clamp(0, 1)
            terms["js"] = c.adv * (1 - js)
        return terms

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"host": self.host.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.host.set_state(state["host"].cpu())
