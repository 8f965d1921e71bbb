"""`crd`: contrastive matching of the embeddings of each input in student and teacher.

Tian et al., Contrastive Representation Distillation (ICLR 2020). Both networks' penultimate features are embedded on
the unit sphere, v and w [B, 128]. Each embedding is compared with entries of the other network's memory: the one of the
same input (positive), and N of inputs of other classes (negatives). h is the probability that an entry is the positive:

    h(v, w) = e^{v.w / tau} / Z  /  ( e^{v.w / tau} / Z + N )
    L_CRD   = mean_i [ -log h(v_i, w_own) - sum_n log(1 - h(v_i, w_n)) ]  + the same with v and w exchanged
    memory <- (m memory + (1 - m) embedding) / length,   Z = mean e^{v.w / tau} over the first batch

Deviations, and why
 1. The memory has one entry for each slot of the pool, so it suits a pool that does not change (source `data`, a
    sampler). When a slot takes a new input, its entry stays that of the old input until the new one is drawn.
 2. The negatives are drawn once for each batch. Those of an input's own class are masked, and the others are weighted
    up to N. This costs one product [B, N] in place of B N gathered rows.
 3. Z leaves out the number of inputs, which cancels with the 1/n of the noise distribution.
 4. The embeddings have no weight decay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..core.batch import Batch
from ..core.context import Context
from ..core.runtime import restore_stream, seeded
from ..errors import DodistillError
from .shared.base import Criterion, Labelled, LabelledConfig, both, widths


def contrast(positive: Tensor, negatives: Tensor, valid: Tensor, N: int) -> Tensor:
    """L_CRD of one side, [B], from log(e^{v.w / tau} / Z): positive [B], negatives [B, n]; valid [B, n] masks them."""
    noise = math.log(N)
    share = valid / valid.sum(1, keepdim=True).clamp_min(1)
    return nnf.softplus(noise - positive) + N * (share * nnf.softplus(negatives - noise)).sum(1)


class CRD(Labelled):
    needs = frozenset({"features"})
    couples = True

    memory: Tensor  #: [2, slots + 1, d], of student and teacher; the last slot is for inputs without one
    label: Tensor  #: [slots + 1], -1 for an unused slot
    top: Tensor  #: the slots below it are in use
    log_Z: Tensor  #: [2]

    def __init__(self, config: Config, widths: tuple[int, int], slots: int, generator: torch.Generator) -> None:
        super().__init__(config)
        self.config, self.slots, self.generator = config, slots, generator
        self.embed = nn.ModuleList(seeded(nn.Linear, generator, w, config.width) for w in widths)
        start = torch.rand(2, slots + 1, config.width, generator=generator, device=generator.device)
        self.register_buffer("memory", nnf.normalize(2 * start - 1, dim=2))
        self.register_buffer("label", torch.full((slots + 1,), -1))
        self.register_buffer("top", torch.zeros((), dtype=torch.long))
        self.register_buffer("log_Z", torch.zeros(2))
        self.begun = False  #: whether Z is known

    def embeddings(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """v, w [B, d], of length 1."""
        f, h = (nnf.normalize(e(x), dim=1) for e, x in zip(self.embed, both(batch.student, batch.teacher)))
        return f, h

    def _slots(self, batch: Batch) -> Tensor:
        return torch.where(batch.index < 0, self.slots, batch.index)

    def own(self, s: Tensor, t: Tensor, batch: Batch) -> dict[str, Tensor]:
        c, own, there = self.config, self._slots(batch), (batch.index >= 0).float()
        top = torch.maximum(self.top, batch.index.max() + 1).clamp_min(1)
        u = torch.rand(c.negatives, generator=self.generator, device=self.generator.device)
        drawn = (u * top).long().clamp_max(self.slots - 1)
        valid = ((self.label[drawn] != batch.labels[:, None]) & (drawn != own[:, None])).float()
        sides = []
        for side, v in enumerate(self.embeddings(batch)):
            other = self.memory[1 - side]
            positive, negatives = (v * other[own]).sum(1) / c.tau, v @ other[drawn].T / c.tau
            if not self.begun:
                every = torch.cat([positive[:, None], negatives], 1).detach()
                self.log_Z[side] = every.logsumexp((0, 1)) - math.log(every.numel())
            rows = contrast(positive - self.log_Z[side], negatives - self.log_Z[side], valid, c.negatives)
            sides.append((there * rows).sum() / there.sum().clamp_min(1))
        self.begun = True
        return {"contrast": c.weight * torch.stack(sides).sum()}

    @torch.no_grad()
    def observe(self, t: Tensor, batch: Batch) -> None:
        """Add the batch's embeddings to the memory. Two inputs of one slot are both added."""
        own = self._slots(batch)
        for memory, v in zip(self.memory, self.embeddings(batch)):
            memory.index_add_(0, own, (1 - self.config.momentum) * (v - memory[own]))
            memory[own] = nnf.normalize(memory[own], dim=1)
        self.label[own] = batch.labels
        self.top.copy_(torch.maximum(self.top, batch.index.max() + 1))

    def get_extra_state(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "begun": self.begun}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        restore_stream(self.generator, state["generator"])
        self.begun = bool(state["begun"])


@dataclass(frozen=True)
class Config(LabelledConfig):
    """The released settings of RepDistiller, where the student's loss is CE + 0.8 CRD."""

    name: ClassVar[str] = "crd"
    weight: float = 0.8  #: weight of L_CRD
    negatives: int = 16_384  #: N, the number of negatives, drawn once per batch
    width: int = 128  #: size of the embeddings
    tau: float = 0.07  #: temperature of the contrast
    momentum: float = 0.5  #: momentum of the memory

    def build(self, context: Context) -> Criterion:
        if self.negatives < 1 or self.width < 1 or not self.tau > 0 or not 0 <= self.momentum < 1:
            raise DodistillError(
                f"criterion crd: negatives is {self.negatives}, width {self.width}, tau {self.tau} and momentum "
                f"{self.momentum}; the first two are at least 1, tau is above 0, momentum a share below 1."
            )
        return CRD(self, widths(context), context.capacity, context.generator("criterion"))
