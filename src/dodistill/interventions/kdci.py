"""KDCI as published: compensate the student's predictions with a prior F(z) over the confounder dictionary.

De-confounded Data-free Knowledge Distillation for Handling Distribution Shifts (CVPR 2024), section 3.3:

    F(z)     = sum_i lam_i z_i P(z_i)                                      (Eq. 4)
    lam_i    = softmax_i( W_t^T tanh(W_q f_S(X) + W_k z_i) )               (Eq. 5)
    P(S|do(X)) is approximated by  f_S(X) + F(z)      in the distillation loss only, before the temperature

The NWGM derivation (Eq. 2-3) serves as motivation only. On 22 points the paper is unspecified or its types do not fit.
Each has a default reading here, and a switch where another is defensible; docs/methods/kdci.md lists them all. The
ablations of its Tables 4 and 5, and a control that it lacks, are the same module with another argument:

    Table 4 (2) random weights      weights="random"
    Table 4 (3) random dictionary   DictionaryConfig(random=True)
    Table 4 (4) no proportions      proportions=False
    Table 5 foreign dictionary      data.foreign, another model; W_m maps it to the student's classes
    control: no attention           weights="constant"   F = sum_i z_i P(z_i), the same for every X
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.batch import Batch
from ..core.context import Context
from ..errors import at_least, positive
from .shared.base import Intervention, InterventionConfig
from .shared.dictionary import FOREIGN, ConfounderDictionary, feature_dim

#: Largest B N d_n for which tanh in Eq. 5 keeps its output for the backward pass. Above it, the score is computed in
#: parts, which are recomputed in the backward pass: 11 % less memory of a step for 0.3 % more time (batch 256, 100
#: classes, N = 128).
ROOM = 2**19


def _matrix(rows: int, columns: int, generator: torch.Generator) -> nn.Parameter:
    """Uniform in +-1/sqrt(columns), as nn.Linear(columns, rows) initialises its weight."""
    values = torch.rand(rows, columns, generator=generator, device=generator.device)
    return nn.Parameter((2 * values - 1) / math.sqrt(columns))


class PriorAttention(nn.Module):
    """lam [B, N] of Eq. 5, over the `valid` slots. The same matrices apply to every dictionary: the sum over i does not
    depend on the order of the slots, so a new clustering does not invalidate them."""

    def __init__(self, classes: int, dim: int, width: int, generator: torch.Generator):
        super().__init__()
        self.W_q = _matrix(width, classes, generator)
        self.W_k = _matrix(width, dim, generator)
        self.W_t = _matrix(1, width, generator)

    def forward(self, s: Tensor, Z: Tensor, valid: Tensor) -> Tensor:
        """s [B, K], Z [N, d], valid [N] -> [B, N], rows sum to 1."""
        query, key = s @ self.W_q.T, Z @ self.W_k.T  # [B, d_n], [N, d_n]
        rows = max(1, ROOM // key.numel())
        if len(query) <= rows:
            score = self._score(query, key)
        else:
            parts = [
                checkpoint(self._score, part, key, use_reentrant=False, preserve_rng_state=False)
                for part in query.split(rows)
            ]
            score = torch.cat(parts)
        return torch.softmax(score.masked_fill(~valid, -math.inf), 1)

    def _score(self, query: Tensor, key: Tensor) -> Tensor:
        """W_t^T tanh(query_b + key_i): [B, d_n], [N, d_n] -> [B, N]."""
        score: Tensor = (query[:, None] + key).tanh_() @ self.W_t[0]
        return score


class KDCI(Intervention):
    couples = False

    def __init__(self, config: Config, classes: int, dim: int, mapped: bool, generator: torch.Generator):
        super().__init__()
        self.config, self.name = config, config.name
        self.own_lr, self.at_test = config.own_lr, config.at_test
        attention = config.weights == "attention"
        self.attention = PriorAttention(classes, dim, config.width or classes, generator) if attention else None
        self.W_m = _matrix(classes, dim, generator) if mapped else None

    def lam(self, s: Tensor, dictionary: ConfounderDictionary) -> Tensor:
        """The weights lam_i, [B, N], or [1, N] where they do not depend on s."""
        valid = dictionary.valid
        if self.attention is not None:
            lam: Tensor = self.attention(s.detach() if self.config.detach_query else s, dictionary.Z, valid)
            return lam
        if self.config.weights == "random":
            return torch.softmax(dictionary.xi.masked_fill(~valid, -math.inf), 0)[None]
        flat = valid.float()  # constant: P alone gives the weights; without P, the plain mean of the prototypes
        return (flat if self.config.proportions else flat / flat.sum())[None]

    def F(self, lam: Tensor, dictionary: ConfounderDictionary) -> Tensor:
        """Eq. 4: [B, N] -> [B, K]."""
        weight = lam * dictionary.P if self.config.proportions else lam
        if self.config.renormalize:
            weight = weight / weight.sum(1, keepdim=True)
        Z = dictionary.Z if self.W_m is None else dictionary.Z @ self.W_m.T
        return self.config.scale * (weight @ Z)

    def compensate(self, s: Tensor, dictionary: ConfounderDictionary | None, batch: Batch | None = None) -> Tensor:
        """s + F(z), in fp32 also under autocast. z and P are constants; the gradient reaches s also through lam."""
        dictionary = _ready(dictionary)
        with torch.autocast(s.device.type, enabled=False):
            s = s.float()
            return s + self.F(self.lam(s, dictionary), dictionary)

    @torch.no_grad()
    def log(
        self, s: Tensor, t: Tensor, dictionary: ConfounderDictionary | None, batch: Batch | None = None
    ) -> dict[str, Tensor]:
        """Quantities of this batch; docs/methods/kdci.md explains each."""
        dictionary = _ready(dictionary)
        with torch.autocast(s.device.type, enabled=False):
            s = s.float()
            lam = self.lam(s, dictionary)
            F = self.F(lam, dictionary).expand_as(s)
            share = lam / lam.sum(1, keepdim=True)
            P, label = dictionary.P, t.argmax(1)
            return {
                "F_over_S": _norm(F) / _norm(s),
                "F_over_S_centred": _norm(F - F.mean(1, keepdim=True)) / _norm(s - s.mean(1, keepdim=True)),
                "F_std": F.std(0, correction=0).mean(),
                "attention_entropy": torch.special.entr(share).sum(1).mean(),
                "attention_entropy_max": dictionary.valid.sum().log(),
                "P_entropy": torch.special.entr(P).sum(),
                "P_max": P.max(),
                "clusters": dictionary.valid.sum().float(),
                "agreement": 100 * (s.argmax(1) == label).float().mean(),
                "agreement_with_F": 100 * ((s + F).argmax(1) == label).float().mean(),
            }


def _norm(x: Tensor) -> Tensor:
    """Mean length of the rows."""
    return (x.square().sum(1).sqrt()).mean()


def _ready(dictionary: ConfounderDictionary | None) -> ConfounderDictionary:
    if dictionary is None or not dictionary.built:
        raise RuntimeError("kdci needs a confounder dictionary, built before the first distillation step")
    return dictionary


@dataclass(frozen=True)
class Config(InterventionConfig):
    name: ClassVar[str] = "kdci"
    width: int | None = None  #: d_n; None: the number of classes, the only literal reading of W_q [d_n, d_n]
    weights: Literal["attention", "random", "constant"] = (
        "attention"  #: attention (Eq. 5) | random (Table 4 (2), fixed between builds) | constant (control)
    )
    proportions: bool = True  #: False: F = sum_i lam_i z_i, Table 4 (4)
    renormalize: bool = False  #: divide lam_i P_i by their sum, which makes F an average of prototypes
    scale: float = 1.0  #: factor on F
    detach_query: bool = False  #: True: no gradient reaches the student through lam
    mapping: bool = False  #: a learnable W_m [K, d] on z_i; always present with a foreign dictionary
    at_test: bool = False  #: True: the delivered student keeps F (as in its predecessor CCIM)
    own_lr: float | None = None  #: rate of a separate Adam for W_* (such as 1e-3); None: the student's optimiser

    @property
    def needs_dictionary(self) -> bool:
        return True

    def build(self, context: Context) -> KDCI:
        at_least(1, "kdci", width=self.width)
        positive("kdci", ", or none", own_lr=self.own_lr)
        mapped = self.mapping or context.extra.get(FOREIGN) is not None
        return KDCI(self, context.num_classes, feature_dim(context), mapped, context.generator("kdci"))
