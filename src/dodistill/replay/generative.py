"""Generative replay: a small VAE learns the student's past inputs (PRE-DFKD, AAAI 2022; LRA, CVPR 2023).

PRE-DFKD: Robust and Resource-Efficient Data-Free Knowledge Distillation by Generative Pseudo Replay (Binici et al.).

An encoder E and a decoder D learn from inputs x. Some are new, and some come from D itself ("self-decoded", so that D
does not forget), with (mu, sigma) = E(x), x^ = D(mu + sigma * eps):

    L = |x^ - x| + |T(x^) - T(x)| + kld * KL(N(mu, sigma) || N(0, I))      synthetic-data-aware reconstruction

means over elements, with x in the teacher's normalised coordinates. The second term keeps the teacher's predictions of
the images. The replayed images are balanced over classes: z ~ N(0, I) first takes one step of Adam (lr_z) on

    ie * sum_c p_c log10 p_c + oh * CE(T(D(z)), argmax) + MSE(var z, 1) + MSE(mean z, 0)      p = mean softmax T(D(z))

with moments over the batch of z, per latent. A step of the student replays `size` such images.

Deviations, and why
 1. With `shapes_decoder` off, the tuning of z changes z only. In the release the gradient of that loss stays in the
    decoder and is added to its next step, so that D also learns to make confident images of balanced classes. We cannot
    tell whether this is intended. It is on in the presets `pre` and `lra-generative`.
 2. D makes `train` steps per acquisition, at the acquisition, each on its own part of the new images. In the release it
    makes one after each of the first 4 of the 10 student steps between two acquisitions, on the images of that step.
    Here replay begins after the first of them; in the release it begins with images of an untrained decoder.
 3. The first step uses only new images, later ones also D's own; in the release the first 4 use only new images.
 4. Images outside [0, 1] are clipped before teacher and student read them; the release clips nothing.
 5. A teacher without a known normalisation gets mean 0.5 and deviation 0.25. The released decoders know the
    normalisation only by the standardisation of their last layer. Height and width must be divisible by 4; in the
    release, by 8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..core.context import Context
from ..data.rows import Pixels
from ..errors import DodistillError, at_least, positive
from ..functional.augment import to_float
from ..functional.terms import detached, total
from ..models.normalized import normalised_space
from .shared.base import Replay, ReplayConfig
from .shared.vae import kl_to_normal, vae


def balance(t: Tensor, z: Tensor, ie: float, oh: float) -> dict[str, Tensor]:
    """The loss that tunes latents z [B, d], given the teacher's logits t [B, K] of their decoded images; see above."""
    log_p = torch.logsumexp(nnf.log_softmax(t, 1), 0) - math.log(len(t))
    variance, mean = z.var(0), z.mean(0)
    return {
        "ie": ie * (log_p.exp() * log_p).sum() / math.log(10),
        "oh": oh * nnf.cross_entropy(t, t.argmax(1)),
        "moments": (variance - 1).square().mean() + mean.square().mean(),
    }


@dataclass(frozen=True)
class Config(ReplayConfig):
    """The VAE and how it learns; defaults are those for batches of 1024."""

    size: int = 128  #: images replayed per step, and self-decoded per training step (papers: an eighth of the batch)
    new: int = 512  #: new images per training step (the papers: half the batch)
    train: int = 4  #: training steps per acquisition
    latent: int = 1000  #: size of z
    width: int = 64  #: channels of the outer convolutions; the inner ones have twice as many
    lr: float = 5e-4  #: Adam's rate of encoder and decoder (the release: lr_g / 40)
    lr_z: float = 0.02  #: Adam's rate of the one step that tunes z (the release: lr_g)
    ie: float = 5.0  #: weight of the information entropy in the tuning of z
    oh: float = 1.0  #: weight of the one-hot loss in the tuning of z
    kld: float = 1e-5  #: weight of the KL divergence to the prior
    shapes_decoder: bool = False  #: the loss that tunes z trains the decoder too, in its training steps (released: yes)

    name: ClassVar[str] = "generative"

    def build(self, context: Context) -> Replay:
        return Generative(self, context)


class Generative(Replay):
    """The VAE, its optimiser, and the tuned latents of every draw."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(context)
        at_least(2, "replay", size=config.size, new=config.new)
        at_least(1, "replay", train=config.train, latent=config.latent, width=config.width)
        at_least(0, "replay", ie=config.ie, oh=config.oh, kld=config.kld, lr_z=config.lr_z)
        positive("replay", ", as in 5e-4", lr=config.lr)
        _, height, width = shape = context.image_shape
        if height % 4 or width % 4:
            raise DodistillError(
                "replay generative makes images whose height and width are multiples of 4, but the teacher takes "
                f"{height}x{width}; give --replay bank."
            )
        self.config, self.rounds = config, 0
        self.mean, self.std = (v.to(context.device) for v in normalised_space(context.teacher.model))
        self.encoder, self.decoder = vae(config.latent, shape, config.width, self.generator)
        self.parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.opt = torch.optim.Adam(self.parameters, lr=config.lr, fused=True)

    @property
    def ready(self) -> bool:
        return self.rounds > 0

    def remember(self, images: Pixels, logits: Tensor, round: int) -> None:
        c, device = self.config, self.context.device
        self.encoder.train()
        self.decoder.train()
        order = torch.randperm(len(images), generator=self.generator, device=device).to(images.device)
        for k in range(c.train):
            part = order.roll(-k * c.new)[: c.new]
            x, t = to_float(images[part].to(device)), logits[part.to(logits.device)].to(device)
            self.opt.zero_grad()
            self._train(*(self._with_own(x, t) if self.ready or k else (x, t)))
        self.rounds += 1

    def _with_own(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and their teacher logits, with newly decoded images and their logits appended."""
        mine = self._decode_balanced(self.config.shapes_decoder)
        with torch.no_grad(), self.context.autocast():
            return torch.cat([x, mine]), torch.cat([t, self.context.teacher(mine).float()])

    def _train(self, x: Tensor, t: Tensor) -> None:
        """One step of Adam on inputs x [n, C, H, W] and their teacher logits t [n, K]. It adds to the gradients that
        the parameters already have."""
        with self.context.autocast():
            mu, log_var = self.encoder((x - self.mean) / self.std)
            eps = torch.randn(mu.shape, generator=self.generator, device=mu.device)
            made = self._decode(mu + (0.5 * log_var).exp() * eps)
            answer = self.context.teacher(made.clamp(0, 1)).float()
        terms = {
            "image": ((made - x) / self.std).abs().mean(),
            "logits": (answer - t).abs().mean(),
            "kld": self.config.kld * kl_to_normal(mu, log_var),
        }
        total(terms).backward(inputs=self.parameters)
        self.opt.step()
        self.terms |= detached(terms)

    def _decode(self, z: Tensor) -> Tensor:
        """Pixels of z. They may lie outside [0, 1]."""
        out: Tensor = self.mean + self.std * self.decoder(z)
        return out

    def _decode_balanced(self, shapes_decoder: bool = False) -> Tensor:
        """`size` images in [0, 1] of tuned latents, without a graph. `shapes_decoder`: add the gradient of the tuning
        to the decoder's."""
        c = self.config
        z = torch.randn(c.size, c.latent, generator=self.generator, device=self.context.device).requires_grad_()
        with self.context.autocast():
            t = self.context.teacher(self._decode(z).clamp(0, 1)).float()
        terms = balance(t, z, c.ie, c.oh)
        total(terms).backward(inputs=[z, *self.decoder.parameters()] if shapes_decoder else [z])
        g = z.grad
        assert g is not None
        self.terms |= detached(terms)
        with torch.no_grad(), self.context.autocast():
            return self._decode(z - c.lr_z * g / (g.abs() + 1e-8)).clamp(0, 1)  # Adam's first step

    def draw(self, student: nn.Module, step: int) -> tuple[Tensor, Tensor | None]:
        self.decoder.eval()
        return self._decode_balanced(), None

    def parts(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "decoder": self.decoder, "opt": self.opt}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"rounds": self.rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.rounds = state["rounds"]
