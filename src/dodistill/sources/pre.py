"""PRE: the generator of MB-DFKD (WACV 2022), PRE-DFKD (AAAI 2022) and LRA (CVPR 2023): DAFL's loss with an adversarial
term.

The term finds inputs on which student and teacher disagree. The three papers (Binici et al., twice; Patel et al.) add a
memory and an update to this generator. Each is on its own axis, and the presets combine them.

    L_G = oh * L_oh + ie * L_ie + act * L_a + adv * (1 - D(S(x), T(x)))          x = G(z), z ~ N(0, I)

L_oh, L_ie, L_a are DAFL's (see `dafl`). One step of G, then `every` steps of the student, each on a fresh batch.

Deviations, and why
 1. D = JS at temperature 3, without the constant 1. The release's D (`js_repo`) also averages over classes and clamps
    probabilities to [0.01, 0.99]. With 100 classes it almost vanishes, and G is nearly DAFL's. The presets of the
    papers use it. `js` is the Jensen-Shannon divergence, as in `desk`.
 2. In `js_repo` the teacher's side is constant, as released. In the others the gradient flows through both sides.
 3. The student is in eval mode during G's step. In the release it is in train mode: D uses the statistics of G's batch,
    and this batch updates the running statistics.
 4. The student's rate falls each step; in the release, each epoch (360 of its steps at batch 1024, 720 at 512).
 5. Images are in the teacher's normalised coordinates, and the generator clips them to [0, 1], as in `dafl`. 3 % of an
    acquisition are held back. Its batches are mixed, and rounded to 256 levels.
 6. The released LRA halves the batch, so it makes twice the steps of the other two. Its presets do the same; compare
    them at equal `loop.steps` only.
 7. Spectral norm estimates the singular vectors by 15 power iterations at the start; the release starts from random
    vectors. Both then make one iteration per pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ..core.context import Context
from ..core.runtime import seeded
from ..errors import at_least
from ..functional import losses
from ..functional.fresh_weights import uniform_weights
from . import dafl
from .shared.base import Source


def js_repo(s: Tensor, t: Tensor) -> Tensor:
    """The JS of the releases of PRE-DFKD and LRA: `losses.js_published` divided by K, in [0, 1]; t is constant."""
    return (losses.js_published(s, t.detach()) / s.shape[1]).clamp(0, 1)


#: D(s, t) of logits [B, K], >= 0
DISTANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "js_repo": js_repo, "js": losses.js, "kl": losses.kl, "l1": losses.l1,
}  # fmt: skip


def _released(batch: int, steps: int, update: dict[str, Any], replay: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The release's settings for CIFAR-100. The defaults below are its other settings."""
    return {
        "source": {"batch": batch},
        "update": update,
        "replay": replay,
        "criterion": {"name": "l1"},
        "optim": {"lr": 0.1, "weight_decay": 5e-4},
        "pool": {"capacity": 10 * batch},
        "augment": {"pad": 0, "flip": False},
        "loop": {"steps": steps, "batch": batch, "eval_every": steps // 400},
    }


_PLAIN: dict[str, Any] = {"name": "replay", "weight": 0.125}
_LRA: dict[str, Any] = {"name": "retain", "alpha": 0.9, "order": "exact", "weight": 1.0}
_VAE: dict[str, Any] = {"name": "generative", "shapes_decoder": True}


@dataclass(frozen=True)
class Config(dafl.Config):
    """Hyper-parameters of the generator; defaults are the release's."""

    every: int = 10
    fresh: int = 10  #: new batches per acquisition; 0: the batch of the generator's last step
    batch: int = 1024  #: images per step of the generator, and per new batch
    lr_g: float = 0.02  #: Adam's rate of the generator, constant
    betas: tuple[float, float] = (0.9, 0.999)
    latent: int = 1000  #: size of z
    eps: float = 0.8  #: of the generator's hidden BatchNorms
    output: Literal["sigmoid", "standardised"] = "standardised"  #: pixels, or the teacher's normalised coordinates
    ie: float = 5.0  #: weight of the information entropy
    act: float = 0.1  #: weight of the activation loss
    log: Literal["natural", "log10"] = "log10"  #: logarithm of the information entropy
    adv: float = 1.0  #: weight of the distance between student and teacher, which the generator increases
    distance: Literal["js_repo", "js", "kl", "l1"] = "js_repo"  #: that distance
    spectral: bool = True  #: convolutions of spectral norm 1, and all initial weights uniform in +-0.08

    name: ClassVar[str] = "pre"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "mb": _released(1024, 144_000, _PLAIN, {"name": "bank", "size": 128, "every": 180, "first": 36}),
        "pre": _released(1024, 144_000, _PLAIN, {**_VAE, "size": 128, "new": 512}),
        "lra-bank": _released(512, 288_000, _LRA, {"name": "bank", "size": 64, "every": 360, "first": 72}),
        "lra-generative": _released(512, 288_000, _LRA, {**_VAE, "size": 64, "new": 256}),
        "desk": {
            "source": {
                "warmup": 30, "every": 5, "fresh": 5, "g_steps": 2, "batch": 128, "latent": 128, "width": 32,
                "lr_g": 3e-3, "log": "natural", "act": 1e-3, "distance": "js",
            },
            "update": {"name": "retain", "alpha": 0.1},
            "replay": {"name": "bank", "size": 64, "every": 10, "first": 10},
            "criterion": {"name": "l1"},
            "optim": {"lr": 0.1, "weight_decay": 5e-4},
            "pool": {"capacity": 5 * 128},
            "augment": {"pad": 0, "flip": False},
            "loop": {"steps": 2000, "batch": 128, "eval_every": 50},
        },
    }  # fmt: skip
    origin: ClassVar[dict[str, str]] = {
        "mb": "release of LRA, MB-DFKD for CIFAR-100, ResNet-34 -> ResNet-18",
        "pre": "release, CIFAR-100, ResNet-34 -> ResNet-18",
        "lra-bank": "release, CIFAR-100, ResNet-34 -> ResNet-18; the paper's update (the release loses its gradient)",
        "lra-generative": "the same with the generative memory",
        "desk": "ours: the same on a schedule for two CPU cores, with a true JS term",
    }

    def build(self, context: Context) -> Source:
        return Pre(self, context)


class Pre(dafl.Dafl):
    """DAFL's generator with an adversarial term."""

    config: Config

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        at_least(0, "source", adv=config.adv)
        if config.spectral:
            self._constrain()

    def _constrain(self) -> None:
        """Initialise the weights as released, and divide each convolution by its largest singular value from now on."""
        device, c = self.context.device, self.config
        uniform_weights(self.net, 0.08, self.generator)

        def spectral(net: nn.Module) -> nn.Module:
            for m in net.modules():
                if isinstance(m, nn.Conv2d):
                    parametrizations.spectral_norm(m)
            return net

        seeded(spectral, self.generator, self.net.cpu()).to(device)  # its first vectors are drawn on the CPU
        self.opt = torch.optim.Adam(self.net.parameters(), lr=c.lr_g, betas=c.betas, fused=True)

    def _losses(self, x: Tensor, student: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        c, ctx = self.config, self.context
        terms, t = super()._losses(x, student)
        if c.adv:
            with ctx.autocast():
                s = student(x)
            terms["adv"] = -c.adv * DISTANCE[c.distance](s.float(), t)
        return terms, t
