"""The adversarial family: a generator finds inputs on which student and teacher disagree. One loop serves four papers,
which differ in the discrepancy D and in the regularisation of the images; the fourth adds a moving average.

    x = G(z), z ~ N(0, I);   t = T(x);   s = S(x)
    G minimises  L_G = -adv * D(s, t) + bn * L_bn + oh * L_oh + ie * L_ie        S minimises  D(s, t) on fresh x

    zskt  Zero-Shot Knowledge Transfer via Adversarial Belief Matching (Micaelli, Storkey, NeurIPS 2019): D = KL(t || s)
    dfad  Data-Free Adversarial Distillation (Fang et al., 2019): D = mean |s - t| of the logits
    dfq   Data-Free Network Quantization with Adversarial Knowledge Distillation (Choi et al., CVPRW 2020): D = KL, and
          L_bn = sum_l (|| mu_l - E_l ||_2 + || var_l - V_l ||_2), L_oh = CE(t, argmax t), L_ie = sum_c p_c log p_c
    mad   Momentum Adversarial Distillation (Do et al., NeurIPS 2022): the student also matches on images of a moving
          average of the generator, theta~ <- ema * theta~ + (1 - ema) * theta, which changes slowly (less forgetting)

Deviations, and why
 1. D compares the teacher with the *student*. One released toolbox (Fast-Datafree) passes the teacher twice, so that D
    and its gradient are 0 for all of these methods. The other toolbox (CMI) passes the student.
 2. zskt: we leave out attention transfer (beta 250), which needs networks of one family, and the clipping of gradients
    at norm 5. The release's KL is also a mean over classes; Adam cancels this factor K. Its student uses Adam, ours SGD
    with the toolbox's settings. Its generator ends with an affine BatchNorm, without a Tanh. After G's step it makes
    the images of the same z anew for the student; ours are those from before the step (`fresh = 0`).
 3. The student is in eval mode during the generator's step. ZSKT and DFAD have it in train mode, where its BatchNorm
    uses the statistics of the batch. `student_bn = "batch"` does that, and leaves the running statistics unchanged.
    With `running` (the toolbox) the generator can increase D by images on which only the running statistics are wrong.
 4. The generator's rate is constant (ZSKT: a cosine). DFAD's README divides both rates by 10 after 20 % and 40 % of the
    run (`--scheduler`); preset `dfad` divides the student's alone.
 5. dfq: settings and large generator of the toolbox (CMI's copy), as the paper has no release. That copy makes the
    student's batches with G in eval mode; here G stays in train mode. Its student's rate falls once per epoch of 400
    steps, ours with every step. The paper compares BatchNorm statistics by a KL of Gaussians.
 6. mad: we leave out class-conditional generators, the bounds on its losses and its pretraining of G. The losses are
    those of dfq. All weights except the decay are ours, unverified against the paper.
 7. Images in normalised coordinates are clipped to [0, 1] in the generator, and 3 % of each acquisition is held back,
    as in `dafl`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.context import Context
from ..errors import DodistillError, at_least
from ..functional import losses
from ..models.batchnorm import current_statistics
from ..models.taps import batchnorm_inputs
from .dafl import information_entropy, one_hot
from .shared.base import Kind, Source
from .shared.fresh import Fresh, FreshConfig

#: D(s, t) of logits [B, K], >= 0
DISCREPANCY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"kl": losses.kl, "l1": losses.l1, "js": losses.js}


def _preset(
    source: dict[str, Any], criterion: dict[str, Any], optim: dict[str, Any], steps: int, batch: int
) -> dict[str, dict[str, Any]]:
    handed = source["batch"] * max(source["fresh"], 1) * (2 if source.get("ema") else 1)
    return {
        "source": source,
        "criterion": criterion,
        "optim": optim,
        "pool": {"capacity": handed},
        "augment": {"pad": 0, "flip": False},
        "loop": {"steps": steps, "batch": batch},
    }


_KL: dict[str, Any] = {"name": "kl", "temperature": 1.0}
_DFQ: dict[str, Any] = {
    "loss": "kl", "adv": 1.0, "bn": 1.0, "oh": 1.0, "ie": 20.0, "every": 10, "fresh": 10, "batch": 256, "latent": 256,
    "base": 256, "lr_g": 1e-3, "betas": (0.5, 0.999),
}  # fmt: skip
_DESK: dict[str, Any] = {
    "loss": "kl", "adv": 1.0, "oh": 1.0, "ie": 5.0, "warmup": 30, "every": 5, "fresh": 5,
    "g_steps": 2, "batch": 128, "latent": 128, "width": 24, "lr_g": 3e-3, "output": "standardised",
}  # fmt: skip
_RELEASE: dict[str, Any] = {"betas": (0.9, 0.999), "lr_g": 1e-3, "output": "standardised"}


@dataclass(frozen=True)
class Config(FreshConfig):
    """Hyper-parameters of the family; defaults are those of DFAD's losses with the toolbox's generator."""

    loss: Literal["kl", "l1", "js"] = "l1"  #: the discrepancy D of student and teacher, which the generator increases
    adv: float = 1.0  #: weight of the discrepancy
    bn: float = 0.0  #: weight of the teacher's BatchNorm statistics (dfq)
    oh: float = 0.0  #: weight of the one-hot loss (dfq)
    ie: float = 0.0  #: weight of the information entropy (dfq; the toolbox: `balance`)
    coverage: float = 0.0  #: weight of the coverage of classes, see `dafl`; ours
    student_bn: Literal["batch", "running"] = "batch"  #: statistics that the student's BatchNorm uses in this loss
    ema: float = 0.0  #: decay of an averaged generator, which makes as many images as the generator; 0: none

    name: ClassVar[str] = "adversarial"
    kind: ClassVar[Kind] = "generator"
    together: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "zskt": _preset(
            {**_RELEASE, "loss": "kl", "every": 10, "fresh": 0, "batch": 128, "latent": 100},
            _KL, {"lr": 0.1, "weight_decay": 1e-4}, 800_000, 128,
        ),
        "dfad": _preset(
            {**_RELEASE, "loss": "l1", "every": 5, "fresh": 5, "batch": 256, "latent": 256},
            {"name": "l1"}, {"lr": 0.1, "weight_decay": 5e-4, "schedule": "steps", "milestones": (0.2, 0.4)},
            125_000, 256,
        ),
        "dfad-mnist": _preset(
            {**_RELEASE, "loss": "l1", "every": 5, "fresh": 5, "batch": 512, "latent": 100},
            {"name": "l1"}, {"lr": 0.01, "weight_decay": 1e-4, "schedule": "constant"}, 10_000, 512,
        ),
        "dfq": _preset({**_DFQ, "student_bn": "running"}, _KL, {"lr": 0.1, "weight_decay": 1e-4}, 80_000, 256),
        "mad": _preset({**_DFQ, "ema": 0.95}, _KL, {"lr": 0.1, "weight_decay": 1e-4}, 80_000, 512),
        "desk": _preset(_DESK, _KL, {"lr": 0.1, "weight_decay": 5e-4}, 2000, 128),
        "desk-dfq": _preset({**_DESK, "bn": 1.0}, _KL, {"lr": 0.1, "weight_decay": 5e-4}, 2000, 128),
        "desk-mad": _preset(
            {**_DESK, "bn": 1.0, "ema": 0.95, "batch": 64}, _KL, {"lr": 0.1, "weight_decay": 5e-4}, 2000, 128
        ),
    }  # fmt: skip
    origin: ClassVar[dict[str, str]] = {
        "zskt": "release, WRN on CIFAR-10, without attention transfer; student SGD of the toolbox (release: Adam)",
        "dfad": "release, CIFAR, ResNet-34 -> ResNet-18",
        "dfad-mnist": "release, MNIST, LeNet-5",
        "dfq": "the DFKD toolbox's script, WRN-40-2 -> WRN-16-1 on CIFAR-10; the paper has no release",
        "mad": "the decay is the paper's; losses and schedule are those of dfq (ours)",
        "desk": "ours: zskt's discrepancy and dfq's entropy, for any teacher, on a schedule for two CPU cores",
        "desk-dfq": "ours: desk with the teacher's BatchNorm statistics",
        "desk-mad": "ours: desk-dfq, half of the images from the averaged generator",
    }

    @property
    def handed(self) -> int:
        return super().handed * (2 if self.ema else 1)

    def build(self, context: Context) -> Source:
        return Adversarial(self, context)


class Adversarial(Fresh):
    """A generator against the student, and optionally its moving average."""

    config: Config

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        c = config
        at_least(0, "source", adv=c.adv, bn=c.bn, oh=c.oh, ie=c.ie, coverage=c.coverage, ema=c.ema)
        if not (c.adv or c.bn or c.oh or c.ie or c.coverage):
            raise DodistillError(
                "source adversarial has no loss: adv, bn, oh, ie and coverage are all 0; give --source.adv 1."
            )
        if config.bn and not context.teacher.has_batchnorm:
            raise DodistillError(
                f"source.bn is {config.bn}, but this teacher has no BatchNorm layer with statistics to match; "
                "give --source.bn 0 (as in the presets zskt and dfad)."
            )
        if config.ema >= 1 or (config.ema and not config.fresh):
            raise DodistillError(
                f"source.ema is {config.ema} and source.fresh {config.fresh}: a decay lies in [0, 1), as in 0.95, and "
                "an averaged generator needs fresh batches (fresh 1 or more)."
            )
        #: the moving average of the generator's weights; it uses the statistics of its batch, like the generator
        self.average = copy.deepcopy(self.net).requires_grad_(False) if config.ema else None

    def _losses(self, x: Tensor, student: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        c, ctx = self.config, self.context
        terms: dict[str, Tensor] = {}
        with batchnorm_inputs(ctx.teacher) if c.bn else nullcontext() as taps:
            with ctx.autocast():
                t = ctx.teacher(x)
            if taps is not None:
                terms["bn"] = c.bn * losses.bn_statistics(taps, taps.modules)
        if c.adv:
            with ctx.autocast(), current_statistics(student) if c.student_bn == "batch" else nullcontext():
                s = student(x)
            terms["adv"] = -c.adv * DISCREPANCY[c.loss](s.float(), t)
        if c.oh:
            terms["oh"] = c.oh * one_hot(t)
        if c.ie:
            terms["ie"] = c.ie * information_entropy(t)
        if c.coverage:
            terms["coverage"] = c.coverage * losses.coverage(t)
        return terms, t

    def _step(self, student: nn.Module) -> tuple[Tensor, Tensor]:
        made = super()._step(student)
        if self.average is not None:
            with torch.no_grad():
                now, mean = (list[Tensor](net.parameters()) for net in (self.net, self.average))
                torch._foreach_lerp_(mean, now, 1 - self.config.ema)
        return made

    def _nets(self) -> list[nn.Module]:
        return [self.net] if self.average is None else [self.net, self.average]

    def parts(self) -> dict[str, Any]:
        return super().parts() | ({} if self.average is None else {"average": self.average})
