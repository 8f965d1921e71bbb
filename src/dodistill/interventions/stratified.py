"""`stratified` (ours): the back-door adjustment, applied to the draw.

The confounder determines which inputs exist: the student is matched under the P(z|X) of the substitution data.
Back-door adjustment asks for sum_z P(S|X, z) P*(z) with a prior P* of our choice. Here z is the stratum of an input:
the teacher's class, or the cluster of its prediction. Each input is drawn with weight P*(z) / (share of z in the pool),
so that the strata occur at the rates of P*. The predictions stay unchanged: a fixed teacher's logits of an input do not
depend on the shares. The shares only determine how often the student sees the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.batch import Batch
from ..core.context import Context
from ..errors import DodistillError, at_least
from .shared.base import Intervention, InterventionConfig, PoolLike
from .shared.dictionary import ConfounderDictionary


def stratum_weights(share: Tensor, target: Tensor, power: float = 1.0, cap: float = torch.inf) -> Tensor:
    """Weight [k] of a member of each stratum, with mean 1 over the members: sum_z share_z weight_z = 1.

    share [k] >= 0 with sum 1, the strata in the pool; target [k] >= 0, the prior P*, any scale, taken over the strata
    that have members. weight_z ~ (target_z / share_z)^power, and at most `cap` >= 1. The weight above the cap is
    distributed to the other strata in proportion. An empty stratum gets 0.
    """
    there = share > 0
    w = torch.where(there, (target / share.clamp_min(1e-12)) ** power, 0.0)
    w = w / (share * w).sum().clamp_min(1e-12)
    # Weights min(a w, cap) with mean 1, in closed form. With the j largest capped, the others need the factor a_j. The
    # smallest j for which a_j keeps the next one below the cap is the solution (strata of weight 0 stay at 0).
    w_down, order = w.sort(descending=True)
    mass = share[order]
    capped = mass.cumsum(0) - mass
    rest = (mass * w_down).flip(0).cumsum(0).flip(0)
    a = ((1 - cap * capped) if cap != torch.inf else torch.ones_like(mass)) / rest.clamp_min(1e-12)
    fits = (a * w_down <= cap) & (w_down > 0)
    j = fits.float().argmax(keepdim=True)  # the first that fits; index_select avoids a sync
    factor = torch.where(fits.any(), a.index_select(0, j)[0], torch.inf)
    return torch.where(w > 0, (factor * w).clamp_max(cap), 0.0)


class Stratified(Intervention):
    """`ess` and `largest` describe the last weights: the effective sample size as a share of the pool,
    (sum w)^2 / (n sum w^2), and the largest weight relative to the mean."""

    ess: Tensor
    largest: Tensor

    def __init__(self, config: Config, classes: int):
        super().__init__()
        self.config, self.name, self.classes = config, config.name, classes
        self.register_buffer("ess", torch.ones(()))
        self.register_buffer("largest", torch.ones(()))

    @torch.no_grad()
    def weights(self, pool: PoolLike, dictionary: ConfounderDictionary | None) -> Tensor:
        """[len(pool)], mean 1 unless the cap makes that impossible."""
        logits = pool.logits
        if self.config.by == "class":
            stratum, k = logits.argmax(1), self.classes
        else:
            if dictionary is None or not dictionary.built:
                raise RuntimeError("stratified by cluster needs a confounder dictionary, built before the first draw")
            if dictionary.foreign:
                raise DodistillError(
                    "stratified: by=cluster needs the teacher's own dictionary, not a foreign model's; use by=class, "
                    "or remove data.foreign."
                )
            if dictionary.of == "batch":
                raise DodistillError(
                    "stratified: by=cluster needs persistent clusters, but dictionary.of=batch makes new ones "
                    "for each batch; use dictionary.of=pool or latest."
                )
            stratum, k = dictionary.assign(logits), dictionary.P.numel()
        count = torch.zeros(k, dtype=torch.long, device=logits.device)
        count.scatter_add_(0, stratum, torch.ones_like(stratum))
        share = (count / len(stratum)).float()
        w = stratum_weights(share, self._target(k, share), self.config.power, self.config.cap)
        self.ess.copy_((share * w).sum() ** 2 / (share * w * w).sum())
        self.largest.copy_(w.max() / (share * w).sum())
        return w[stratum]

    def _target(self, k: int, like: Tensor) -> Tensor:
        prior = self.config.prior
        if prior is None:
            return torch.ones_like(like)
        if len(prior) != k:
            raise DodistillError(
                f"stratified: prior has {len(prior)} entries for {k} strata (by={self.config.by}); give {k}, or none "
                "for a uniform one."
            )
        return torch.tensor(list(prior), device=like.device, dtype=like.dtype)

    def log(
        self, s: Tensor, t: Tensor, dictionary: ConfounderDictionary | None, batch: Batch | None = None
    ) -> dict[str, Tensor]:
        return {"ess": self.ess.clone(), "largest_weight": self.largest.clone()}


@dataclass(frozen=True)
class Config(InterventionConfig):
    name: ClassVar[str] = "stratified"
    by: Literal["class", "cluster"] = "class"  #: class (the teacher's) | cluster (of the confounder dictionary)
    prior: tuple[float, ...] | None = None  #: P*, one number >= 0 for each stratum, any scale; None: uniform
    power: float = 1.0  #: in [0, 1]: 0 leaves the draw unchanged, 1 reaches P* (up to the cap)
    cap: float = 20.0  #: >= 1, the largest weight of an image relative to the mean; keeps a stratum of two or three
    #: images from filling 1/K of each batch, and hardly affects class shares of up to 100:1

    @property
    def needs_dictionary(self) -> bool:
        return self.by == "cluster"

    def build(self, context: Context) -> Stratified:
        if not 0 <= self.power <= 1:
            raise DodistillError(f"stratified: power is {self.power}; it must lie in [0, 1].")
        at_least(1, "stratified", ", the mean weight", cap=self.cap)
        if self.prior is not None and (min(self.prior, default=-1) < 0 or not sum(self.prior) > 0):
            raise DodistillError(f"stratified: prior is {list(self.prior)}; it must be numbers >= 0, not all 0.")
        module = Stratified(self, context.num_classes)
        if self.prior is not None and self.by == "class":
            module._target(context.num_classes, torch.ones(context.num_classes))
        return module.to(context.device)
