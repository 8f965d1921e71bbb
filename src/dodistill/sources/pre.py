"""PRE: the generator of MB-DFKD (WACV 2022), PRE-DFKD (AAAI 2022) and LRA (CVPR 2023): DAFL's, with an eye on the
student.

It also looks for inputs on which student and teacher disagree. What the three papers (Binici et al., twice; Patel et
al.) add to it is a memory and an update, each on its own axis; the presets put them together.

    L_G = oh * L_oh + ie * L_ie + act * L_a + adv * (1 - D(S(x), T(x)))          x = G(z), z ~ N(0, I)

L_oh, L_ie, L_a are DAFL's (see `dafl`). One step of G, then `every` steps of the student, each on a fresh batch.

Deviations, and why
 1. D = JS at temperature 3, and 1 is left out, being constant. The release's D (`js_repo`) averages over classes too
    and clamps probabilities to [0.01, 0.99]: with 100 classes it is all but gone, and G is nearly DAFL's. It is what
    the presets of the papers have; `js` is the Jensen-Shannon divergence, as in `desk`.
 2. In `js_repo` the teacher's side is a constant, as released; in the others the gradient goes through both.
 3. The student is in eval mode while G steps; there it is in train mode, D is measured with the statistics of G's
    batch, and that batch moves the running ones.
 4. The student's rate falls each step; there, each epoch (360 of its steps at batch 1024, 720 at 512).
 5. Images are in the teacher's normalised coordinates and are clipped to [0, 1] by the generator, as in `dafl`.
 6. The released LRA halves the batch and so makes twice the steps of the other two. Its presets do so too; compare
    them at equal `loop.steps` only.
 7. Spectral norm estimates the singular vectors by 15 power iterations at the start; there, by one per pass from
    random vectors. Both go on with one per pass.
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
    """What the releases of PRE-DFKD and LRA compute for JS: `losses.js_published` over K, in [0, 1]; t is a
    constant."""
    return (losses.js_published(s, t.detach()) / s.shape[1]).clamp(0, 1)


#: D(s, t) of logits [B, K], >= 0
DISTANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "js_repo": js_repo, "js": losses.js, "kl": losses.kl, "l1": losses.l1,
}  # fmt: skip


def _released(batch: int, steps: int, update: dict[str, Any], replay: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The release's settings for CIFAR-100; what else it has are the defaults below."""
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
    fresh: int = 10  #: new batches handed over per acquisition; 0: the batch of the generator's own last step
    batch: int = 1024  #: images per step of the generator, and per batch handed over
    lr_g: float = 0.02  #: Adam's rate of the generator, constant
    betas: tuple[float, float] = (0.9, 0.999)
    latent: int = 1000  #: size of z
    eps: float = 0.8  #: of the generator's hidden BatchNorms
    output: Literal["sigmoid", "standardised"] = "standardised"  #: pixels, or the teacher's normalised coordinates
    ie: float = 5.0  #: weight of the information entropy
    act: float = 0.1  #: weight of the activation loss
    log: Literal["natural", "log10"] = "log10"  #: logarithm of the information entropy
    adv: float = 1.0  #: weight of the distance between student and teacher, which the generator widens
    distance: Literal["js_repo", "js", "kl", "l1"] = "js_repo"  #: that distance
    spectral: bool = True  #: convolutions of spectral norm 1, and all weights started uniform in +-0.08

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
        "lra-bank": "release, CIFAR-100, ResNet-34 -> ResNet-18; the update as in the paper, which the release loses",
        "lra-generative": "likewise, with the generative memory",
        "desk": "ours: the same on a schedule for two CPU cores, with a true JS term",
    }

    def build(self, context: Context) -> Source:
        return Pre(self, context)


class Pre(dafl.Dafl):
    """DAFL's generator with one term more."""

    config: Config

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        at_least(0, "source", adv=config.adv)
        if config.spectral:
            self._constrain()

    def _constrain(self) -> None:
        """Start the weights as released, and divide each convolution by its largest singular value from then on."""
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
