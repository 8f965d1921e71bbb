"""MosaicKD: Mosaicking to Distill, Knowledge Distillation from Out-of-Domain Data (Fang et al., NeurIPS 2021).

Images of other classes consist of the same patches. A generator G makes images that the teacher T assigns to its own
classes, and whose patches a discriminator D cannot tell from those of the out-of-domain images u. With x = G(z),

    D:  min  local * 1/2 [ sum softplus(D(x)) + sum softplus(-D(u)) ]
    G:  min  local * sum softplus(-D(x)) + align * H(T(x)) - adv * KL(T(x) || S(x)) + balance * sum_k p_k log2 p_k

Sums run over the patches of an image, and every term is a mean over images. H is the entropy of the teacher's
prediction, p the mean prediction over the batch. The terms of G favour images of one class each, all classes in a
batch, and a disagreement between T and the student S. An acquisition is one step of D and one of G. S then makes
`every` steps, each on fresh x and u in equal numbers.

Deviations, and why (tests/test_parity_wild.py has the released numbers)
 1. In G's step, S normalises with the statistics of the batch. So does the release, where S is in train mode and its
    running statistics take in the generated batch. Here the running statistics stay unchanged, as a source does
    not modify its inputs. `student_bn = "running"` is eval mode; see `adversarial` for a reason against it.
 2. The `every` batches of an acquisition are mixed, so each batch of S is half x and half u only on average. In the
    release it is exactly half. 3 % of an acquisition are held back to score S.
 3. u is drawn with replacement; in the release, by epochs. S receives images in 256 levels.
 4. A source does not know the length of the run, so its rates fall by a cosine over `anneal` acquisitions (steps /
    every). The rate of S falls with every step; in the release it is constant during the `every` steps.
 5. The teacher's normalisation applies to u everywhere. In the release it applies to the input of D. The inputs of T
    and S have the constants of the set of u: mean 0.5 and deviation 0.5 for ImageNet and Places at 32x32
    (`ood_normalise = "half"`), CIFAR-10's for CIFAR-10 under a CIFAR-100 teacher (no switch: pixels leave [0, 1]).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.context import Context
from ..core.runtime import seeded
from ..errors import DodistillError, at_least
from ..functional import losses
from ..functional.augment import crop_flip, to_float, to_uint8
from ..functional.memory_format import place
from ..functional.schedules import cosine
from ..functional.terms import detached, total
from ..models.batchnorm import current_statistics
from ..models.normalized import Normalized, normalised_space
from .shared.base import Acquired, Kind, Source, SourceConfig, ask
from .shared.discriminator import PatchDiscriminator, patch_loss
from .shared.generators import ConvGenerator
from .shared.wild import WildImages

_PAPER: dict[str, Any] = {
    "source": {
        "batch": 256, "every": 5, "latent": 100, "lr_g": 1e-3, "anneal": 39_200, "local": 1.0, "align": 1.0,
        "adv": 1.0, "balance": 10.0,
    },
    "criterion": {"name": "kl", "temperature": 1.0},
    "optim": {"lr": 0.1, "weight_decay": 1e-4, "floor": 0.0},
    "pool": {"capacity": 2560},
    "augment": {"pad": 0, "flip": False},
    "loop": {"steps": 196_000, "batch": 512},
}  # fmt: skip


@dataclass(frozen=True)
class Config(SourceConfig):
    """Hyper-parameters of MosaicKD; defaults are the release's for CIFAR-100, the same for every pair."""

    warmup: int = 0
    every: int = 5
    batch: int = 256  #: images of each kind, generated and real: for D and G, and per step of the student
    latent: int = 100  #: size of z
    width: int = 64  #: channels of the generator's last hidden layer
    base: int = 256  #: channels of the generator's first layer
    patches: int = 128  #: channels of the discriminator's first layer
    lr_g: float = 1e-3  #: Adam's rate of generator and discriminator
    anneal: int = 0  #: acquisitions over which that rate falls to 0 by a cosine (0: constant)
    local: float = 1.0  #: weight of the discriminator's loss on patches
    align: float = 1.0  #: weight of the entropy of the teacher's predictions
    adv: float = 1.0  #: weight of the divergence between teacher and student
    balance: float = 10.0  #: weight of the balance of classes
    n: int = 0  #: out-of-domain images kept: those with the most uncertain teacher prediction (0: all)
    pad: int = 4  #: padding in pixels before a random crop of the student's out-of-domain images (0: no crop)
    flip: bool = True  #: random horizontal flip of the student's out-of-domain images
    padding: Literal["zeros", "reflect"] = "zeros"  #: values of the pixels outside the image
    student_bn: Literal["batch", "running"] = "batch"  #: statistics that the student's BatchNorm uses in G's step
    ood_normalise: Literal["teacher", "half"] = "teacher"  #: half: as if normalised with mean 0.5 and deviation 0.5

    name: ClassVar[str] = "mosaic"
    kind: ClassVar[Kind] = "sampler"
    together: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"unlabeled"})
    generates: ClassVar[bool] = True
    costs: ClassVar[tuple[dict[str, float], ...]] = ({"batch": 16},)
    trains: ClassVar[str] = "a generator, a patch discriminator"
    keeps: ClassVar[str] = "both, Adam, the unlabelled images"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": _PAPER,
        "subset": {**_PAPER, "source": {**_PAPER["source"], "n": 50_000}},
        "desk": {
            **_PAPER,
            "source": {
                **_PAPER["source"], "batch": 64, "width": 32, "base": 128, "patches": 64, "warmup": 30, "lr_g": 3e-3,
                "anneal": 430, "local": 0.1,
            },
            "optim": {"lr": 0.1, "weight_decay": 5e-4, "floor": 0.0},
            "pool": {"capacity": 640},
            "loop": {"steps": 2000, "batch": 128},
        },
    }  # fmt: skip
    origin: ClassVar[dict[str, str]] = {
        "paper": "release README, CIFAR-100 from CIFAR-10, one setting for all pairs",
        "subset": "the same from the 50 000 most uncertain images of ImageNet or Places at 32x32",
        "desk": "ours: a higher rate of the generator, `local` 0.1, on a schedule for two CPU cores",
    }

    def teacher_passes(self) -> tuple[float, float]:
        own = 1 / (2 * self.every)  # one step of the generator, for `every` batches of both kinds
        return 1 + own, own

    def build(self, context: Context) -> Source:
        return Mosaic(self, context)


class Mosaic(Source):
    """Generator and discriminator, and the out-of-domain images on the run's device."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(context)
        self.config = c = config
        at_least(1, "source", every=c.every, latent=c.latent, width=c.width, base=c.base, patches=c.patches)
        at_least(2, "source", batch=c.batch)
        at_least(0, "source", n=c.n, pad=c.pad, anneal=c.anneal)
        have = 0 if context.unlabeled is None else len(context.unlabeled)
        if have < 2 or c.n == 1:
            raise DodistillError(
                f"source mosaic has {min(have, c.n or have)} out-of-domain image(s), but needs at least 2; give "
                "--data.unlabeled FOLDER (or .npz, .npy), and a larger source.n."
            )
        channels, height, width = context.image_shape
        if c.pad >= min(height, width):
            raise DodistillError(
                f"source.pad is {c.pad}; for images of {height}x{width} it must be below {min(height, width)}."
            )
        model = context.teacher.model
        if c.ood_normalise == "half" and not isinstance(model, Normalized):
            raise DodistillError(
                "source.ood_normalise is half, but this teacher has no known normalisation; give "
                "--source.ood_normalise teacher."
            )
        self.mean, self.std = (v.to(context.device) for v in normalised_space(model))
        args = (c.latent, context.image_shape, c.width, c.base)
        self.G = place(seeded(ConvGenerator, self.generator, *args), context.device)
        self.D = place(seeded(PatchDiscriminator, self.generator, channels, c.patches), context.device)
        self.opt_G, self.opt_D = (
            torch.optim.Adam(net.parameters(), lr=c.lr_g, betas=(0.5, 0.999), fused=True) for net in (self.G, self.D)
        )
        self.ood = WildImages(context)

    def acquire(self, student: nn.Module, round: int) -> Acquired:
        c = self.config
        reference = self._look() if round == 0 else None
        rate = cosine(min(round / c.anneal, 1), c.lr_g) if c.anneal else c.lr_g
        for opt in (self.opt_G, self.opt_D):
            opt.param_groups[0]["lr"] = rate
        self.G.train()
        with self.context.autocast():
            x = self.G(self._z())
        self.terms = {"d": self._discriminate(x.detach())} | self._generate(x, student)
        images, logits = self._material()
        return Acquired(images, logits, reference=reference)

    def _look(self) -> Acquired:
        """Choose the out-of-domain images, and return them with the teacher's logits."""
        _, t = ask(self.context)
        if self.config.n:
            keep = losses.entropy(t).argsort(descending=True, stable=True)[: self.config.n]
            self.ood.choose(keep)
            t = t[keep]
        return Acquired(self.ood.rows, t)

    def _z(self) -> Tensor:
        return torch.randn(self.config.batch, self.config.latent, generator=self.generator, device=self.context.device)

    def _patches(self, x: Tensor) -> Tensor:
        """D of images in [0, 1]."""
        with self.context.autocast():
            d: Tensor = self.D((x - self.mean) / self.std)
        return d

    def _discriminate(self, x: Tensor) -> Tensor:
        """One step of D on generated images x and as many real ones. Returns its loss."""
        u = to_float(self.ood.draw(len(x), self.generator))
        loss = 0.5 * self.config.local * (patch_loss(self._patches(x), False) + patch_loss(self._patches(u), True))
        self.opt_D.zero_grad()
        loss.backward()
        self.opt_D.step()
        return loss.detach()

    def _generate(self, x: Tensor, student: nn.Module) -> dict[str, Tensor]:
        """One step of G, which made x. Returns its weighted terms."""
        c, ctx = self.config, self.context
        with ctx.autocast():
            t = ctx.teacher(x)
            with current_statistics(student) if c.student_bn == "batch" else nullcontext():
                s = student(x)
        terms = {
            "local": c.local * patch_loss(self._patches(x), True),
            "align": c.align * losses.entropy(t).mean(),
            "adv": -c.adv * losses.kl(s.float(), t),
            "balance": c.balance * losses.balance(t),
        }
        self.opt_G.zero_grad()
        loss = total(terms)
        loss.backward(inputs=list(self.G.parameters()))  # no gradients for D and the student
        self.opt_G.step()
        return detached(terms)

    @torch.no_grad()
    def _material(self) -> tuple[Tensor, Tensor]:
        """The inputs of the student until the next acquisition: uint8 images, generated and real, and their logits."""
        c, g, images, logits = self.config, self.generator, list[Tensor](), list[Tensor]()
        for _ in range(c.every):
            with self.context.autocast():
                x = to_uint8(self.G(self._z()))
            u = self._as_normalised(crop_flip(self.ood.draw(c.batch, g), c.pad, g, c.flip, c.padding))
            images.append(torch.cat([x, u]))
            with self.context.autocast():
                logits.append(self.context.teacher(to_float(images[-1])))
        return torch.cat(images), torch.cat(logits)

    def _as_normalised(self, u: Tensor) -> Tensor:
        """u (uint8). Under `half`: pixels whose normalised values are (u - 0.5) / 0.5, clipped to [0, 1]."""
        if self.config.ood_normalise == "teacher":
            return u
        model = self.context.teacher.model
        assert isinstance(model, Normalized)  # checked in __init__
        return to_uint8((to_float(u) - 0.5) / 0.5 * model.std + model.mean)

    def makes_with(self) -> tuple[nn.Module, int, int]:
        return self.G, self.config.latent, 1

    def parts(self) -> dict[str, Any]:
        return {"G": self.G, "D": self.D, "opt_G": self.opt_G, "opt_D": self.opt_D}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"keep": self.ood.keep}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.ood.choose(state["keep"])
