"""DAFL: Data-Free Learning of Student Networks (Chen et al., ICCV 2019).

A generator is trained to make images on which the teacher behaves as on its training data. Three properties of the
teacher's logits t = T(x) and features f (the input of its classifier), on a batch x = G(z), z ~ N(0, I), measure it:

    L_oh = CE(t, argmax t)      one-hot: each image is clearly of some class
    L_a  = -mean |f|            activation: the images activate the teacher's features
    L_ie = sum_c p_c log p_c    information entropy: all classes are equally frequent in the batch; p = mean softmax(t)
    L_c  = mean_c max(0, ln(1 / 4K) - ln p_c)            coverage (ours, weight 0 in what is published)
    L_G  = oh * L_oh + act * L_a + ie * L_ie + coverage * L_c

The student matches the teacher on fresh batches. The generator's loss does not depend on the student.

Deviations, and why
 1. Huawei's code makes one batch, and steps generator and student on it: `fresh = 0`. Its images are in the teacher's
    normalised coordinates (`output = "standardised"`), where they may exceed valid pixels. Ours are clipped to [0, 1]
    in the generator, so that teacher and student read the same images. When they were clipped only afterwards, MNIST
    images of ten classes became images of five. Without a known normalisation: mean 0.5, deviation 0.25.
 2. Huawei's entropy uses log10, and its weights assume that: `log = "log10"`. The toolbox uses the natural logarithm.
 3. Huawei's hidden BatchNorms have eps 0.8, a slip of older code that its authors kept on purpose: `eps`.
 4. The toolbox's script says T = 20, but its code matches at T = 1 for this method; the presets use 1. `toolbox` is the
    copy in Fast's repository. CMI's copy has a larger generator, and makes the student's batches with it in eval mode.
    The student's rate falls with every step; in the toolbox, once per epoch of 400 steps.
 5. Huawei's MNIST student uses Adam; ours uses SGD at a rate of our choice. The f of its LeNet-5 is the input of the
    first of two Linear layers (120 numbers), ours that of the last (84). Its CIFAR-100 teacher has CIFAR-10's
    normalisation; ours has its own.
 6. 3 % of each acquisition is held back to score the student. The student draws as many of the others twice.
 7. `coverage` (ours): the gradient of L_ie with respect to class c is proportional to p_c. A class that is absent from
    the batch has p_c near 0, so L_ie does not bring it back. The gradient of L_c is 1/K for such a class, and 0 for any
    class with at least a quarter of its share.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..core.context import Context
from ..errors import DodistillError, at_least
from ..functional import losses
from ..models.taps import penultimate
from .shared.base import Kind, Source
from .shared.fresh import Fresh, FreshConfig, pooled


def one_hot(t: Tensor) -> Tensor:
    """CE of logits t [B, K] to their own argmax, mean over the batch, >= 0. Chen et al. (2019), Eq. 2.

    0 where the teacher is certain of every image; at most ln K.
    """
    return nnf.cross_entropy(t, t.argmax(1))


def information_entropy(t: Tensor, log: str = "natural") -> Tensor:
    """sum_c p_c log p_c with p = mean over the batch of softmax(t), logits t [B, K]. Chen et al. (2019), Eq. 4.

    The negative entropy of the batch's classes: -log K where they are equally frequent, 0 where there is one class.
    `log`: "natural" or "log10". Finite for any finite t, even where p_c underflows.
    """
    log_p = torch.logsumexp(nnf.log_softmax(t, 1), 0) - math.log(len(t))
    entropy = (log_p.exp() * log_p).sum()
    return entropy / math.log(10) if log == "log10" else entropy


def activation(f: Tensor) -> Tensor:
    """-mean |f| over features f [B, D], <= 0. Chen et al. (2019), Eq. 3, with the mean in place of the sum."""
    return -f.abs().mean()


def _preset(
    source: dict[str, Any], optim: dict[str, Any], steps: int, batch: int, handed: int
) -> dict[str, dict[str, Any]]:
    """A preset whose acquisitions return `handed` images, which the pool keeps until the next acquisition."""
    return {
        "source": source,
        "criterion": {"name": "kl", "temperature": 1.0},
        "optim": optim,
        "pool": {"capacity": pooled(handed)},
        "augment": {"pad": 0, "flip": False},
        "loop": {"steps": steps, "batch": batch},
    }


def _huawei(oh: float, ie: float, act: float) -> dict[str, dict[str, Any]]:
    source = {
        "every": 1, "fresh": 0, "batch": 1024, "latent": 1000, "lr_g": 0.02, "betas": (0.9, 0.999), "eps": 0.8,
        "output": "standardised", "log": "log10", "oh": oh, "ie": ie, "act": act,
    }  # fmt: skip
    optim = {"lr": 0.1, "weight_decay": 5e-4, "schedule": "steps"}
    return _preset(source, optim, 240_000, 1024, 1024)


@dataclass(frozen=True)
class Config(FreshConfig):
    """Hyper-parameters of DAFL; defaults are the toolbox's, used for most of the literature's tables."""

    latent: int = 512  #: size of z
    oh: float = 1.0  #: weight of the one-hot loss
    ie: float = 20.0  #: weight of the information entropy (the toolbox: `balance`)
    act: float = 1e-3  #: weight of the activation loss
    log: Literal["natural", "log10"] = "natural"  #: logarithm of the information entropy
    coverage: float = 0.0  #: weight of L_c (ours), a loss for absent classes

    name: ClassVar[str] = "dafl"
    kind: ClassVar[Kind] = "generator"
    together: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "huawei": _huawei(0.05, 5.0, 0.01),
        "huawei-cifar100": _huawei(0.5, 20.0, 0.1),
        "huawei-mnist": _preset(
            {**_huawei(1.0, 5.0, 0.1)["source"], "batch": 512, "latent": 100, "lr_g": 0.2},
            {"lr": 0.02, "weight_decay": 5e-4}, 24_000, 512, 512,
        ),
        "toolbox": _preset(
            {"every": 5, "fresh": 5, "batch": 256, "latent": 512, "lr_g": 1e-3, "oh": 1.0, "ie": 20.0, "act": 1e-3},
            {"lr": 0.1, "weight_decay": 1e-4, "floor": 2e-4}, 80_000, 256, 5 * 256,
        ),
        "desk": _preset(
            {"warmup": 30, "every": 5, "fresh": 5, "g_steps": 2, "batch": 128, "latent": 128, "width": 24, "lr_g": 3e-3,
             "output": "standardised", "oh": 1.0, "ie": 5.0, "coverage": 5.0, "act": 1e-3},
            {"lr": 0.1, "weight_decay": 5e-4}, 2000, 128, 5 * 128,
        ),
    }  # fmt: skip
    origin: ClassVar[dict[str, str]] = {
        "huawei": "release, CIFAR-10, ResNet-34 -> ResNet-18",
        "huawei-cifar100": "release, CIFAR-100, ResNet-34 -> ResNet-18",
        "huawei-mnist": "release, MNIST, LeNet-5; the student's SGD is ours (release: Adam)",
        "toolbox": "the DFKD toolbox's script (Fast's copy), WRN-40-2 -> WRN-16-1 on CIFAR-10; other pairs have none",
        "desk": "ours: entropy and coverage, two generator steps per acquisition, a schedule for two CPU cores",
    }

    def build(self, context: Context) -> Source:
        return Dafl(self, context)


class Dafl(Fresh):
    """The generator of DAFL."""

    config: Config

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        at_least(0, "source", oh=config.oh, ie=config.ie, act=config.act, coverage=config.coverage)
        if not (config.oh or config.ie or config.act or config.coverage):
            raise DodistillError(
                f"source {config.name} has no loss: oh, ie, act and coverage are all 0; give --source.oh 1."
            )

    def _losses(self, x: Tensor, student: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        c, ctx = self.config, self.context
        with penultimate(ctx.teacher) if c.act else nullcontext() as features:
            with ctx.autocast():
                t = ctx.teacher(x)
            terms = {"oh": c.oh * one_hot(t)}
            if c.ie:
                terms["ie"] = c.ie * information_entropy(t, c.log)
            if features is not None:
                terms["act"] = c.act * activation(features.value.float())
            if c.coverage:
                terms["coverage"] = c.coverage * losses.coverage(t)
        return terms, t
