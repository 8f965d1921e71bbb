"""The confounder dictionary: prototypes Z of the teacher's predictions on the substitution data, and their shares P(z).

KDCI section 3.3: K-means++ with PCA over M = {m_j}; z_i = mean of the members of cluster i, P(z_i) = N_i / N_m.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...core.context import Context
from ...core.runtime import restore_stream
from ...errors import at_least
from ...functional import kmeans

#: Number of clusters N, and the inputs that they come from, by kind of source (KDCI section 4.3).
CLUSTERS = {"generator": 8, "inversion": 32, "sampler": 128, "data": 128}
OF: dict[str, Literal["latest", "pool"]] = {
    "generator": "latest",
    "inversion": "latest",
    "sampler": "pool",
    "data": "pool",
}
FOREIGN = "foreign"  #: key in `Context.extra` of a model that predicts M in the teacher's place (KDCI Table 5)


@dataclass(frozen=True)
class DictionaryConfig:
    name: ClassVar[str] = "dictionary"
    clusters: int | None = None  #: N; None: by kind of source, generator 8, inversion 32, sampler and data 128
    of: Literal["auto", "latest", "pool", "batch"] = (
        "auto"  #: latest (newest acquisition) | pool (all of it) | batch (each distilled one) | auto (by source)
    )
    pca_dim: int | None = None  #: PCA dimensions for the clustering; None: 32 if there are more classes; 0: no PCA
    iterations: int = 10  #: iterations of Lloyd's algorithm
    random: bool = False  #: ablation, Table 4 (3): z_i ~ N(0, 1) times the spread of M, instead of the cluster's mean

    def resolve(self, kind: str) -> DictionaryConfig:
        """With `clusters` and `of` filled in for a source of `kind`. Raises DodistillError for invalid values."""
        if kind not in CLUSTERS:
            raise ValueError(f"unknown kind of source {kind!r}; use one of {sorted(CLUSTERS)}")
        clusters = CLUSTERS[kind] if self.clusters is None else self.clusters
        at_least(1, "dictionary", clusters=clusters)
        at_least(0, "dictionary", iterations=self.iterations)
        at_least(0, "dictionary", " (0: no PCA)", pca_dim=self.pca_dim)
        return replace(self, clusters=clusters, of=OF[kind] if self.of == "auto" else self.of)

    def build(self, context: Context, kind: str) -> ConfounderDictionary:
        """An empty dictionary for a source of `kind`; its generator is the run's stream `dictionary`."""
        config = self.resolve(kind)
        assert config.clusters is not None
        return ConfounderDictionary(
            config.clusters,
            feature_dim(context),
            context.generator("dictionary"),
            pca_dim=self.pca_dim,
            iterations=self.iterations,
            random=self.random,
            of=config.of,
            foreign=context.extra.get(FOREIGN) is not None,
        )


def feature_dim(context: Context) -> int:
    """d: the class count of the model that predicts M, the teacher or the foreign one in `context.extra`."""
    model = context.extra.get(FOREIGN)
    if model is None:
        return context.num_classes
    known = getattr(model, "num_classes", None)
    if isinstance(known, int):
        return known
    with torch.no_grad():
        probe = model(torch.zeros(1, *context.image_shape, device=context.device))
    return int(probe.shape[1])


class ConfounderDictionary(nn.Module):
    """Z [N, d] and P [N] with sum 1, on the generator's device; a slot without members has P = 0 (see `valid`).

    Shapes never change, so a checkpoint fits for any number of distinct predictions. `assign` is exact: over the logits
    of the last `rebuild`, it returns slot i N_m P_i times, and z_i is the mean of these members.
    """

    Z: Tensor
    P: Tensor
    anchors: Tensor  #: [N, k], the centres of the slots in the space of the clustering
    alive: Tensor  #: [N], whether the anchor is distinct from all others
    mean: Tensor  #: [d]
    basis: Tensor | None  #: [d, k], or None without PCA
    xi: Tensor  #: [N] standard normal, redrawn by each `rebuild`: for random weights (KDCI Table 4 (2))
    noise: Tensor | None  #: [N, d] standard normal, drawn once: for random prototypes (Table 4 (3))

    def __init__(
        self,
        clusters: int,
        dim: int,
        generator: torch.Generator,
        *,
        pca_dim: int | None = None,
        iterations: int = 10,
        random: bool = False,
        of: str = "latest",
        foreign: bool = False,
    ):
        super().__init__()
        self.iterations, self.generator, self.built = iterations, generator, False
        self.of = of  #: the inputs that it is built from: latest, pool or batch
        self.foreign = foreign  #: whether M comes from another model than the teacher
        dims = (0 if dim <= 32 else 32) if pca_dim is None else min(pca_dim, dim)
        device = generator.device
        self.register_buffer("Z", torch.zeros(clusters, dim, device=device))
        self.register_buffer("P", torch.zeros(clusters, device=device))
        self.register_buffer("anchors", torch.zeros(clusters, dims or dim, device=device))
        self.register_buffer("alive", torch.zeros(clusters, dtype=torch.bool, device=device))
        self.register_buffer("mean", torch.zeros(dim, device=device))
        self.register_buffer("basis", torch.zeros(dim, dims, device=device) if dims else None)
        self.register_buffer("xi", torch.zeros(clusters, device=device))
        noise = torch.randn(clusters, dim, generator=generator, device=device) if random else None
        self.register_buffer("noise", noise)

    @property
    def valid(self) -> Tensor:
        """[N] bool: the slots with members. The others have P = 0 and are left out of a softmax."""
        return self.P > 0

    def project(self, logits: Tensor) -> Tensor:
        """[n, d] -> [n, k], the space of the clustering."""
        centred = logits.float() - self.mean
        return centred if self.basis is None else centred @ self.basis

    @torch.no_grad()
    def rebuild(self, logits: Tensor) -> None:
        """Replace Z and P by the clusters of M = `logits` [n, d], n >= 1. Only PCA waits for the device."""
        with torch.autocast(logits.device.type, enabled=False):
            M = logits.float()
            n, (N, _) = M.shape[0], self.Z.shape
            if self.basis is None:
                self.mean.copy_(M.mean(0))
            else:
                mean, basis = kmeans.pca(M, self.basis.shape[1])
                self.mean.copy_(mean)
                self.basis.copy_(basis)
            anchors, alive, labels = kmeans.kmeans(self.project(M), N, self.generator, self.iterations)
            self.anchors.copy_(anchors)
            self.alive.copy_(alive)
            total, count = self._members(M, labels)
            self.P.copy_(count / n)
            if self.noise is None:
                self.Z.copy_(total / count.clamp_min(1)[:, None])
            else:
                self.Z.copy_(self.noise * M.std(0, correction=0) * self.valid[:, None])
            self.xi.normal_(generator=self.generator)
            self.built = True

    def _members(self, M: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums [N, d] and counts [N] of the original logits in double precision, computed in parts."""
        N, d = self.Z.shape
        total, count = M.new_zeros(N, d).double(), M.new_zeros(N).double()
        for part, label in zip(M.split(kmeans.CHUNK), labels.split(kmeans.CHUNK)):
            a, b = kmeans.sums(part.double(), label, N)
            total += a
            count += b
        return total, count

    @torch.no_grad()
    def assign(self, logits: Tensor) -> Tensor:
        """Slot [n] (long) of each of `logits` [n, d]."""
        with torch.autocast(logits.device.type, enabled=False):
            parts = logits.split(kmeans.CHUNK)
            return torch.cat([kmeans.assign(self.project(m), self.anchors, self.alive) for m in parts])

    def get_extra_state(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "built": self.built}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        restore_stream(self.generator, state["generator"])
        self.built = bool(state["built"])
