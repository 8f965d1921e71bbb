"""CMI: Contrastive Model Inversion for Data-Free Knowledge Distillation (Fang et al., IJCAI 2021).

Images are inverted so that each differs from all earlier ones. Each acquisition reinitialises a generator G and
optimises it together with its latents z ~ N(0, I), for random labels y, on

    L    = bn * sum_l (|| mu_l - E_l || + || var_l - V_l ||) + oh * CE(T(x), y) + adv * L_adv + cr * L_cr,   x = G(z)
    L_cr = mean_i l_i over the current images + mean_i l_i over the cached ones
    l_i  = -log( exp(p_i . q_i / tau) / sum_j exp(p_i . q_j / tau) )

T receives x in two views: a global view (crop, flip), which all other terms use, and a local view (a part of the image,
resized). A small head h maps the features of a view to unit vectors: p_i = h(local) and q_i = h(global), where q_i is
constant. The features are the inputs of T's BatchNorm layers, averaged over space. A bank keeps the features of earlier
images, and each step compares with `negatives` of them. The head is kept between acquisitions. L_adv is Fast's.

Deviations, and why
 1. L_adv begins after the student's first matching step (acquisition `warmup` + 1); in the release, with the first.
 2. The bank is on the run's device and may have any size. The release's bank counts as empty in the acquisition after
    it is exactly full (the 161st). The loss is NaN there, and the first, untrained iterate is kept as the best.
 3. The global features are projected without a graph; the release detaches them afterwards. The gradients are the same.
 4. A part that would exceed the image is shrunk to fit; the release's library redraws it, and aligns corners.
 5. `cr = 0` makes no local view (one of the two releases crashes).
 6. `layers` selects other features; the release uses the inputs of the four stages, for its ResNet-34 only.
 7. Draws from the pool, levels of pixels and the student's rate as in `fast` (its deviations 4 and 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..core.context import Context
from ..core.runtime import seeded
from ..errors import DodistillError, at_least, positive
from ..functional import losses
from ..functional.augment import resized_crop
from ..functional.fresh_weights import normal_weights
from ..functional.memory_format import place
from ..functional.terms import detached, total
from ..models.taps import pooled_inputs
from .shared.banks import BankType, FeatureBank
from .shared.base import Acquired, Kind, Source, SourceConfig, drawn_labels
from .shared.best import Best
from .shared.generators import ConvGenerator


def contrast(p: Tensor, q: Tensor, n: int, tau: float) -> Tensor:
    """L_cr of unit rows p, q [N, d]: row i of p matches row i of q, and the first n rows are the current images.

    The mean of l_i over the first n, plus the mean over the others, if any; in [0, 2 (ln N + 2 / tau)]. As released.
    """
    similarity = p @ q.T / tau
    rows = similarity.logsumexp(1) - similarity.diagonal()
    current = rows[:n].mean()
    return current + rows[n:].mean() if len(rows) > n else current


class Head(nn.Module):
    """The instance discriminator h: features [B, D] -> unit vectors [B, d]."""

    def __init__(self, features: int, d: int = 256) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, d))

    def forward(self, f: Tensor) -> Tensor:
        return nnf.normalize(self.net(f).float(), dim=1)


def _preset(floor: float = 0.0, batch: int = 128, **source: Any) -> dict[str, Any]:
    """A preset: `batch` is the student's, and its cosine schedule ends at `floor`."""
    return {
        "source": {
            "batch": 256, "iterations": 200, "lr_g": 1e-3, "adv": 0.5, "bn": 1.0, "oh": 1.0, "cr": 0.8, "tau": 0.1,
            "every": 400, **source,
        },
        "criterion": {"name": "kl", "temperature": 20.0},
        "optim": {"lr": 0.1, "weight_decay": 1e-4, "floor": floor},
        "loop": {"steps": 80_000, "batch": batch},
    }  # fmt: skip


@dataclass(frozen=True)
class Config(SourceConfig):
    """Hyper-parameters of CMI; defaults are the release's for WRN-40-2 -> WRN-16-1 on CIFAR-10, its only ones."""

    warmup: int = 0
    every: int = 400
    batch: int = 256  #: images per acquisition
    iterations: int = 200  #: descent steps per acquisition
    lr_g: float = 1e-3  #: Adam's rate of the generator, the latents and the head
    latent: int = 256  #: size of z
    width: int = 64  #: channels of the generator's last hidden layer
    bn: float = 1.0  #: weight of the BatchNorm statistics
    oh: float = 1.0  #: weight of the cross-entropy to the drawn labels
    adv: float = 0.5  #: weight of the decision-adversarial term
    cr: float = 0.8  #: weight of the contrastive term (0: no local view, no bank)
    tau: float = 0.1  #: temperature of the contrastive term
    bank: int = 40_960  #: images whose features are stored
    negatives: int = 4096  #: of these, how many each step compares with
    bank_dtype: BankType = "float32"  #: bfloat16 halves the bank's memory and its checkpoint
    head: int = 256  #: size of the vectors that are contrasted
    layers: tuple[str, ...] = ()  #: teacher modules whose inputs are the features (empty: all BatchNorms)
    balanced: bool = False  #: every class equally often, instead of labels drawn uniformly

    name: ClassVar[str] = "cmi"
    kind: ClassVar[Kind] = "inversion"
    together: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"batchnorm"})
    costs: ClassVar[tuple[dict[str, float], ...]] = ({"iterations": 10}, {"batch": 16})
    trains: ClassVar[str] = "a generator per acquisition, a head"
    keeps: ClassVar[str] = "1 generator, head, Adam, bank of 2 * features per image"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cmi": _preset(),
        "cmi500": _preset(iterations=500),
        "toolbox": _preset(2e-4, 256, tau=0.2),
        "toolbox500": _preset(2e-4, 256, tau=0.2, iterations=500),
        "resnet34": _preset(iterations=500, layers=("layer1", "layer2", "layer3", "layer4")),
        "desk": {
            **_preset(batch=128, iterations=40, lr_g=0.01, width=32, every=40, bank=2048, negatives=512),
            "optim": {"lr": 0.1, "weight_decay": 5e-4, "floor": 0.0},
            "loop": {"steps": 2000, "batch": 128},
        },
    }
    origin: ClassVar[dict[str, str]] = {
        "cmi": "release script scratch_cmi, WRN-40-2 -> WRN-16-1 on CIFAR-10; other pairs have none",
        "cmi500": "the same with the 500 iterations that the tables of Fast and KDCI report",
        "toolbox": "the script for CMI in Fast's repository, same pair: tau 0.2, student's batch 256, floor 2e-4",
        "toolbox500": "toolbox with 500 iterations",
        "resnet34": "cmi500 with the features that the release uses for a ResNet-34 teacher; weights not published",
        "desk": "ours: the same losses on a schedule for two CPU cores",
    }

    def teacher_passes(self) -> tuple[float, float]:
        views = 2 if self.cr > 0 else 1
        return views * self.iterations + 1.0, float(views * self.iterations)

    def build(self, context: Context) -> Source:
        return Cmi(self, context)


class Cmi(Source):
    """The head and the bank persist; each acquisition reinitialises the generator."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(context)
        self.config = c = config
        at_least(1, "source", iterations=c.iterations, latent=c.latent, width=c.width)
        at_least(1, "source", negatives=c.negatives, head=c.head)
        at_least(2, "source", batch=c.batch)
        positive("source", ", as in 0.1", tau=c.tau)
        if c.bank < c.batch:
            raise DodistillError(f"source.bank is {c.bank}; it must be at least source.batch, {c.batch} images.")
        self.layers = [_find(context.teacher.model, name) for name in c.layers]
        features = self._width()
        args = (c.latent, context.image_shape, c.width)
        self.G = place(seeded(ConvGenerator, self.generator, *args), context.device)
        self.head = seeded(Head, self.generator, features, c.head).to(context.device)
        self.opt_head = torch.optim.Adam(self.head.parameters(), lr=c.lr_g, fused=True)
        #: the local and global features of earlier images, side by side
        self.bank = FeatureBank(c.bank if c.cr > 0 else 0, 2 * features, c.bank_dtype, context.device)

    @torch.no_grad()
    def _width(self) -> int:
        """D, the number of features."""
        x = torch.full((1, *self.context.image_shape), 0.5, device=self.context.device)
        with pooled_inputs(self.context.teacher, self.layers, moments=False) as taps:
            self.context.teacher(x)
            return taps.features.shape[1]

    def acquire(self, student: nn.Module, round: int) -> Acquired:
        c, ctx, g = self.config, self.context, self.generator
        normal_weights(self.G, g)
        z = torch.randn(c.batch, c.latent, generator=g, device=ctx.device).requires_grad_()
        y = drawn_labels(c.batch, ctx.num_classes, g, c.balanced).sort().values
        opt = torch.optim.Adam([z, *self.G.parameters()], lr=c.lr_g, betas=(0.5, 0.999), fused=True)
        trained = [z, *self.G.parameters(), *(self.head.parameters() if c.cr > 0 else ())]
        adversarial = c.adv > 0 and round > c.warmup

        best = Best()
        for i in range(c.iterations):
            with ctx.autocast():
                x = self.G(z)
            seen = ctx.view(x, g)
            with pooled_inputs(ctx.teacher, self.layers) as taps:
                with ctx.autocast():
                    t = ctx.teacher(seen)
                terms = {"bn": c.bn * losses.bn_statistics(taps, taps.modules), "ce": c.oh * nnf.cross_entropy(t, y)}
                whole = taps.features.detach()
            if adversarial:
                with ctx.autocast():
                    s = student(seen)
                terms["adv"] = c.adv * losses.adversarial(s.float(), t)
            features = []
            if c.cr > 0:
                part = self._local(x)
                terms["cr"] = c.cr * self._contrast(part, whole)
                features = [torch.cat([part.detach(), whole], 1)]
            loss = total(terms)
            best.offer(loss, x, *features)
            opt.zero_grad()
            self.opt_head.zero_grad()
            loss.backward(inputs=trained)  # no gradients for the student
            opt.step()
            self.opt_head.step()
            ctx.progress("inverting", i + 1, c.iterations)
        self.terms = detached(terms)
        images, *kept = best.tensors
        if kept:
            self.bank.add(kept[0])
            if round == 0:
                self.terms["bank_mib"] = torch.full((), self.bank.rows.nbytes / 2**20, device=ctx.device)
        return Acquired(images)

    def _local(self, x: Tensor) -> Tensor:
        """[B, D], features of the local view."""
        ctx = self.context
        view = resized_crop(x, self.generator, flip=ctx.view.flip)
        with pooled_inputs(ctx.teacher, self.layers, moments=False) as taps:
            with ctx.autocast():
                ctx.teacher(view)
            return taps.features

    def _contrast(self, part: Tensor, whole: Tensor) -> Tensor:
        """L_cr of local and global features [B, D], contrasted with each other and with rows of the bank."""
        ctx = self.context
        cached = self.bank.sample(self.config.negatives, self.generator).chunk(2, 1)
        with ctx.autocast():  # two calls: no gradient with respect to the cached rows is computed
            p = torch.cat([self.head(part), self.head(cached[0])])
        with torch.no_grad(), ctx.autocast():
            q = torch.cat([self.head(whole), self.head(cached[1])])
        return contrast(p, q, len(part), self.config.tau)

    def parts(self) -> dict[str, Any]:
        return {"head": self.head, "opt_head": self.opt_head, "bank": self.bank}


def _find(model: nn.Module, name: str) -> nn.Module:
    """The module with this name, or whose dotted name ends with it (wrappers add prefixes)."""
    found: list[nn.Module] = [m for key, m in model.named_modules() if key == name or key.endswith("." + name)]
    if len(found) != 1:
        top = ", ".join(key for key, _ in model.named_modules() if key and key.count(".") < 2)
        raise DodistillError(f"source.layers: {len(found)} modules of the teacher are called {name!r}; it has {top}.")
    return found[0]
