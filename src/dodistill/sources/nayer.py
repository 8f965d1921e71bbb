"""NAYER: Noisy Layer Data Generation for Efficient and Effective Data-free KD (Tran et al., CVPR 2024), data-free form.

The source of randomness is a layer, and the input is constant: the embedding E_y of label y. Per batch the noisy layer
is drawn anew, W ~ N(0, 1), b = 0, one layer for each group of K labels ("K-to-1"), and then descends, together with the
generator G, which is kept, on

    x = G( W_g BN(E_y) + b_g ),        y: every class equally often
    L = bn * sum_l (|| mu_l - E_l ||_2 + || var_l - V_l ||_2)  +  oh * CE(T(x), y)  +  adv * L_adv

with smoothed batch statistics and L_adv as in `fast`. The batch of lowest L joins the pool. An acquisition makes
`loops` such batches (`warmup_loops` before the first match); G starts anew every `life` acquisitions.

Which E: the paper embeds the class names with CLIP. That is knowledge from outside, so here it is the exception:
`classifier` (the rows of the teacher's last layer) and `orthogonal` need the teacher alone; a FILE with [classes, d]
numbers is the prior-assisted form, another league, and the run's summary says so.

Deviations, and why
 1. E, see above. The release reads pickled CLIP vectors; we read .npy, .npz or .safetensors, which run no code.
 2. L_adv sets in once the student has matched at all, as in our `fast`; the release starts one acquisition earlier.
 3. The release carries the lowest L over from one batch of an acquisition to the next, so that a later batch may hold
    its first iterate. Here each batch has its own.
 4. A generator that starts anew gets PyTorch's initialisation, as the release's does.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as nnf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import losses
from ..augment import crop_flip
from ..errors import DodistillError
from ..runtime import Context, seeded
from ..taps import batchnorm_inputs, penultimate
from .base import Acquired, Kind, Source, SourceConfig, at_least
from .generators import ConvGenerator


def classifier_rows(model: nn.Module, classes: int) -> Tensor:
    """E [K, d]: row k is the weight of class k in the last linear layer of `model` (or its last 1x1 convolution)."""
    with penultimate(model) as tap:
        rows = tap.layer.weight.detach().float().flatten(1)
    if len(rows) != classes:
        raise DodistillError(
            f"the teacher's last layer has {len(rows)} rows for {classes} classes, so they are no label embeddings; "
            "use --source.embedding orthogonal."
        )
    return rows.clone()


def orthogonal_rows(classes: int, generator: torch.Generator) -> Tensor:
    """E [K, K] with orthonormal rows, drawn from `generator`: labels that have nothing to do with one another."""
    q, r = torch.linalg.qr(torch.randn(classes, classes, generator=generator, device=generator.device))
    rows: Tensor = q * r.diagonal().sign()
    return rows


def read_embedding(path: str, classes: int) -> Tensor:
    """E [K, d] from the only (or first) array of a .npy, .npz or .safetensors file. No code of the file is run."""
    file, kinds = Path(path).expanduser(), (".npy", ".npz", ".safetensors")
    if file.suffix not in kinds:
        raise DodistillError(
            f"source.embedding is {path!r}; it must be classifier, orthogonal, or a file ending in {', '.join(kinds)}."
        )
    if not file.is_file():
        raise DodistillError(f"source.embedding: there is no file {path}; check the path.")
    try:
        if file.suffix == ".safetensors":
            rows = next(iter(load_file(file).values()))
        else:
            found = np.load(file, allow_pickle=False)
            rows = torch.from_numpy(np.array(found if file.suffix == ".npy" else found[found.files[0]], np.float32))
    except (SafetensorError, OSError, ValueError, TypeError, EOFError, IndexError, StopIteration, KeyError,
            zipfile.BadZipFile) as error:  # fmt: skip
        raise DodistillError(f"source.embedding: cannot read numbers from {path} ({error}).") from error
    if rows.dim() != 2 or len(rows) != classes or not rows.shape[1]:
        raise DodistillError(
            f"source.embedding: {path} holds shape {tuple(rows.shape)}; it must be ({classes}, d), a row per class."
        )
    if not bool(torch.isfinite(rows.float()).all()):
        raise DodistillError(f"source.embedding: {path} holds NaN or infinity.")
    return rows.float()


class NoisyGenerator(nn.Module):
    """Labels -> BatchNorm of their embeddings -> one noisy linear layer per group -> ConvGenerator.

    Args:
        E: label embeddings [K, d], kept as a buffer.
        groups: how many noisy layers; a batch is cut into so many runs of `group` labels, the last one perhaps shorter.
        group: labels per noisy layer.
        noise: outputs of the noisy layer.
        image_shape, width: of the ConvGenerator.
    """

    E: Tensor

    def __init__(
        self, E: Tensor, groups: int, group: int, noise: int, image_shape: tuple[int, int, int], width: int
    ) -> None:
        super().__init__()
        self.group = group
        self.register_buffer("E", E)
        self.norm = nn.BatchNorm1d(E.shape[1])
        self.W = nn.Parameter(torch.empty(groups, E.shape[1], noise))
        self.b = nn.Parameter(torch.empty(groups, 1, noise))
        self.net = ConvGenerator(noise, image_shape, width)

    @torch.no_grad()
    def redraw_noise(self, generator: torch.Generator) -> None:
        """W ~ N(0, 1), b = 0."""
        self.W.copy_(torch.randn(self.W.shape, generator=generator, device=self.W.device))
        self.b.zero_()

    def forward(self, y: Tensor) -> Tensor:
        """Labels [n] -> images [n, C, H, W] in [0, 1]."""
        e = self.norm(self.E[y])
        groups = self.W.shape[0]
        e = nnf.pad(e, (0, 0, 0, groups * self.group - len(y))).view(groups, self.group, -1)
        z = torch.baddbmm(self.b, e, self.W).flatten(0, 1)[: len(y)]
        out: Tensor = self.net(z)
        return out


def _published(iterations: int, acquisitions: int) -> dict[str, Any]:
    return {
        "source": {"iterations": iterations},
        "criterion": {"name": "kl", "temperature": 20.0},
        "optim": {"lr": 0.2, "weight_decay": 1e-4, "floor": 2e-4},
        "loop": {"steps": 400 * acquisitions, "batch": 512},
        "pool": {"capacity": 400 * (20 * 10 + 2 * acquisitions)},  # everything, as on the release's disk
    }


@dataclass(frozen=True)
class Config(SourceConfig):
    """Hyper-parameters of NAYER; defaults are the release's for CIFAR-100."""

    warmup: int = 20
    every: int = 400
    embedding: str = "classifier"  #: classifier, orthogonal, or FILE (.npy, .npz, .safetensors) with [classes, d]
    batch: int = 400  #: images made together
    loops: int = 2  #: batches per acquisition
    warmup_loops: int = 10  #: batches per acquisition before the first match
    iterations: int = 40  #: descent steps per batch
    lr: float = 4e-3  #: Adam's rate for generator and noisy layer
    group: int = 0  #: images that share a noisy layer; 0: as many as there are classes
    noise: int = 1000  #: outputs of the noisy layer
    width: int = 64  #: channels of the generator's last hidden layer
    life: int = 10  #: the generator starts anew after so many acquisitions (0: never)
    bn: float = 10.0  #: weight of the BatchNorm statistics
    oh: float = 0.5  #: weight of the cross-entropy to the labels
    adv: float = 1.33  #: weight of the decision-adversarial term
    bn_momentum: float = 0.9  #: smoothing of batch statistics over batches (0: none)

    name: ClassVar[str] = "nayer"
    kind: ClassVar[Kind] = "generator"
    needs: ClassVar[frozenset[str]] = frozenset({"batchnorm"})
    trains: ClassVar[str] = "a generator, noisy layers per batch"
    keeps: ClassVar[str] = "1 generator, noisy layers"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100": _published(40, 300),
        "cifar10": _published(30, 300),
        "cifar100-100": _published(40, 100),
        "cifar10-100": _published(30, 100),
        "desk": {
            "source": {
                "batch": 128, "loops": 1, "warmup_loops": 1, "warmup": 10, "every": 20, "iterations": 5,
                "noise": 256, "width": 32, "life": 0,
            },
            "criterion": {"name": "kl", "temperature": 20.0},
            "optim": {"lr": 0.1, "weight_decay": 5e-4, "floor": 0.0},
            "loop": {"steps": 2000, "batch": 128},
        },
    }  # fmt: skip
    origin: ClassVar[dict[str, str]] = {
        "cifar100": "release scripts, CIFAR-100, 300 epochs, any of its pairs; embedding ours",
        "cifar10": "release scripts, CIFAR-10, 300 epochs, any of its pairs; embedding ours",
        "cifar100-100": "the same, 100 epochs",
        "cifar10-100": "the same, 100 epochs",
        "desk": "ours: the same losses on a schedule for two CPU cores",
    }

    def teacher_passes(self) -> tuple[float, float]:
        return self.iterations + 1.0, float(self.iterations)

    def build(self, context: Context) -> Source:
        return Nayer(self, context)


class Nayer(Source):
    """One generator, and noisy layers that live for one batch."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(context)
        self.config = config
        at_least(config, 1, "loops", "warmup_loops", "iterations", "noise", "width")
        at_least(config, 0, "group", "life")
        at_least(config, 2, "batch")
        classes, device = context.num_classes, context.device
        if config.embedding == "classifier":
            E = classifier_rows(context.teacher.model, classes)
        elif config.embedding == "orthogonal":
            E = orthogonal_rows(classes, self.generator)
        else:
            E = read_embedding(config.embedding, classes)
            self.notes.append(
                f"Prior-assisted: the labels' embeddings come from {config.embedding}, so this run knows more than the "
                "teacher. Compare it with methods of that league, not with strictly data-free ones."
            )
        group = min(config.group or classes, config.batch)
        groups = math.ceil(config.batch / group)
        self.net = seeded(
            NoisyGenerator, self.generator, E.to(device), groups, group, config.noise, context.image_shape, config.width
        ).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        #: smoothed BatchNorm input statistics, one (mean, var) per layer; empty until the first batch
        self.ema: list[tuple[Tensor, Tensor]] = []

    def _labels(self) -> Tensor:
        """[batch]: runs of all classes in order, so that each noisy layer sees each once; then a few at random."""
        n, classes, g = self.config.batch, self.context.num_classes, self.generator
        rest = torch.randint(classes, (n % classes,), generator=g, device=g.device)
        return torch.cat([torch.arange(n - len(rest), device=g.device) % classes, rest])

    def acquire(self, student: nn.Module, round: int) -> Acquired:
        c = self.config
        if c.life and round and round % c.life == 0:
            fresh = seeded(ConvGenerator, self.generator, c.noise, self.context.image_shape, c.width)
            self.net.net.load_state_dict(fresh.state_dict())
            self.net.norm.reset_parameters()
        loops = c.loops if round >= c.warmup else c.warmup_loops
        batches = []
        for i in range(loops):
            batches.append(self._batch(student, c.adv > 0 and round > c.warmup))
            self.context.progress("making images", i + 1, loops)
        return Acquired(torch.cat(batches))

    def _batch(self, student: nn.Module, adversarial: bool) -> Tensor:
        """One batch of images [batch, C, H, W], from a fresh noisy layer."""
        c, ctx = self.config, self.context
        self.net.redraw_noise(self.generator)
        y = self._labels()
        parameters = list(self.net.parameters())
        opt = torch.optim.Adam(parameters, lr=c.lr, betas=(0.5, 0.999), fused=True)
        best = torch.empty(0)
        lowest = torch.full((), float("inf"), device=ctx.device)
        with batchnorm_inputs(ctx.teacher) as taps:
            for k in range(c.iterations):
                with ctx.autocast():
                    x = self.net(y)
                    xa = crop_flip(x, ctx.augment.pad, self.generator, ctx.augment.flip)
                    t = ctx.teacher(xa)
                terms = {
                    "bn": c.bn * losses.bn_statistics(taps, taps.modules, self.ema or None, c.bn_momentum),
                    "ce": c.oh * nnf.cross_entropy(t, y),
                }
                if adversarial:
                    with ctx.autocast():
                        s = student(xa)
                    terms["adv"] = c.adv * losses.adversarial(s.float(), t)
                loss = torch.stack(list(terms.values())).sum()
                with torch.no_grad():
                    better = loss < lowest
                    best = torch.where(better, x, best) if k else x.detach().clone()
                    lowest = torch.minimum(loss, lowest)
                opt.zero_grad()
                loss.backward(inputs=parameters)  # the student gets no gradients, nor pays for them
                opt.step()
            if c.bn_momentum > 0:
                self.ema = losses.bn_average(self.ema or None, taps, c.bn_momentum)
        self.terms = {name: value.detach() for name, value in terms.items()}
        return best.detach()

    def parts(self) -> dict[str, Any]:
        return {"net": self.net}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"ema": [t for pair in self.ema for t in pair]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        flat = [t.to(self.context.device) for t in state["ema"]]
        self.ema = list(zip(flat[::2], flat[1::2]))
