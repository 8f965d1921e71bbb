"""NAYER: Noisy Layer Data Generation for Efficient and Effective Data-free KD (Tran et al., CVPR 2024), data-free form.

The randomness is in a layer. The input is constant: the embedding E_y of the label y. Each batch redraws the noisy
layer, W ~ N(0, 1), b = 0, one layer for each group of K labels ("K-to-1"). The layer and the generator G, which is
kept, are then optimised together on

    x = G( W_g BN(E_y) + b_g ),        y: every class equally often
    L = bn * sum_l (|| mu_l - E_l ||_2 + || var_l - V_l ||_2)  +  oh * CE(T(x), y)  +  adv * L_adv

with smoothed batch statistics and L_adv as in `fast`. The batch of lowest L joins the pool. An acquisition makes
`loops` such batches (`warmup_loops` before the first match). G is reinitialised every `life` acquisitions.

The embedding E: the paper embeds the class names with CLIP, which is external knowledge. Here the defaults need only
the teacher: `classifier` (the rows of its last layer) or `orthogonal`. A FILE with [classes, d] numbers makes the run
prior-assisted; its summary says so, because such runs do not compare with data-free ones.

Deviations, and why
 1. E, see above. The release reads pickled CLIP vectors; we read .npy, .npz or .safetensors, which run no code.
 2. L_adv begins after the student's first matching step, as in our `fast`; in the release, one acquisition earlier.
 3. A reinitialised generator has PyTorch's initialisation, as in the release. The release also counts `life` from the
    end of the warm-up, which is the same where `life` divides `warmup`, as in the presets.
 4. Draws from the pool, levels of pixels and the student's rate as in `fast` (its deviations 4 and 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..core.context import Context
from ..core.runtime import seeded
from ..errors import at_least
from ..functional.memory_format import place
from .shared.base import Acquired, Kind, Source
from .shared.embeddings import classifier_rows, orthogonal_rows, read_embedding
from .shared.generators import ConvGenerator, Generator
from .shared.guided import Guided, GuidedConfig


class NoisyGenerator(Generator):
    """Labels -> BatchNorm of their embeddings -> one noisy linear layer per group -> ConvGenerator.

    Args:
        E: label embeddings [K, d], kept as a buffer.
        groups: number of noisy layers. A batch is cut into this many runs of `group` labels; the last may be shorter.
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
class Config(GuidedConfig):
    """Hyper-parameters of NAYER; defaults are the release's for CIFAR-100."""

    warmup: int = 20
    every: int = 400
    embedding: str = "classifier"  #: classifier, orthogonal, or FILE (.npy, .npz, .safetensors) with [classes, d]
    batch: int = 400  #: images made together
    loops: int = 2  #: batches per acquisition
    warmup_loops: int = 10  #: batches per acquisition before the first match
    iterations: int = 40  #: descent steps per batch
    lr: float = 4e-3  #: Adam's rate for generator and noisy layer
    group: int = 0  #: images that share a noisy layer; 0: the number of classes
    noise: int = 1000  #: outputs of the noisy layer
    width: int = 64  #: channels of the generator's last hidden layer
    life: int = 10  #: acquisitions after which the generator is reinitialised (0: never)
    oh: float = 0.5
    adv: float = 1.33

    name: ClassVar[str] = "nayer"
    kind: ClassVar[Kind] = "generator"
    together: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"batchnorm"})
    costs: ClassVar[tuple[dict[str, float], ...]] = ({"iterations": 2}, {"batch": 16})
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


class Nayer(Guided):
    """One generator, and noisy layers that live for one batch."""

    config: Config

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        at_least(1, "source", loops=config.loops, warmup_loops=config.warmup_loops, iterations=config.iterations)
        at_least(1, "source", noise=config.noise, width=config.width)
        at_least(0, "source", group=config.group, life=config.life)
        at_least(2, "source", batch=config.batch)
        classes, device = context.num_classes, context.device
        if config.embedding == "classifier":
            E = classifier_rows(context.teacher.model, classes)
        elif config.embedding == "orthogonal":
            E = orthogonal_rows(classes, self.generator)
        else:
            E = read_embedding(config.embedding, classes)
            self.notes.append(
                f"Prior-assisted: the labels' embeddings come from {config.embedding}, so this run uses knowledge "
                "beyond the teacher's. Compare it with prior-assisted methods, not with strictly data-free ones."
            )
        group = min(config.group or classes, config.batch)
        groups = math.ceil(config.batch / group)
        args = (E.to(device), groups, group, config.noise, context.image_shape, config.width)
        self.net = place(seeded(NoisyGenerator, self.generator, *args), device)

    def expected(self, first: int, rounds: int) -> float:
        c = self.config
        warm = min(c.warmup, rounds)
        loops = warm * c.warmup_loops + (rounds - warm) * c.loops
        return first * loops / (c.warmup_loops if c.warmup else c.loops)

    def _labels(self) -> Tensor:
        """[batch]: repeated runs of all classes in order, so that each noisy layer gets each once; the rest random."""
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
        c = self.config
        self.net.redraw_noise(self.generator)
        y = self._labels()
        parameters = list(self.net.parameters())
        opt = torch.optim.Adam(parameters, lr=c.lr, betas=(0.5, 0.999), fused=True)
        return self._descend(lambda: self.net(y), y, student if adversarial else None, opt, parameters, c.iterations)

    def parts(self) -> dict[str, Any]:
        return {"net": self.net}
