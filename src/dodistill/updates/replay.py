"""Plain replay: the gradient of both losses, on new and on replayed inputs, at the student's weights w.

    min_w  L_Acq(w) + weight * L_Ret(w)

What MB-DFKD (Binici et al., WACV 2022) and PRE-DFKD (Binici et al., AAAI 2022) do, and what the released code of LRA
(see `retain`) comes down to.

Deviations, and why
 1. They take one mean over the new and the replayed images together, an eighth as many, so that the two losses weigh
    8:1: `weight = 0.125` has their ratio (not their scale, 8/9, which a rate absorbs).
 2. There, BatchNorm sees both kinds in one batch. Here each kind is normalised by its own statistics, and the new
    inputs alone move the running ones: so it is in `retain` too, and the two differ in what their names say and in
    nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import positive
from ..functional.terms import detached, total
from .shared.base import Objective, Update, UpdateConfig

Gradients = Sequence[Tensor | None]


def stand_in(student: nn.Module, weights: Mapping[str, Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """x -> what the student says of it at other `weights` (name -> tensor; by default its own).

    Its buffers are read and left alone: the pass through BatchNorm in train mode moves copies of them. Hooks on the
    student see this pass too.
    """
    tensors = {name: buffer.clone() for name, buffer in student.named_buffers()} | dict(weights or {})

    def call(x: Tensor) -> Tensor:
        out: Tensor = functional_call(student, tensors, (x,))
        return out

    return call


def report(terms: Mapping[str, Tensor], retained: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Both losses' terms, detached and weighted, under their names in the log."""
    return detached(terms) | {f"retain/{name}": weight * value for name, value in detached(retained).items()}


def take(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The parameters' gradients, which are then no longer there."""
    taken = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return taken


def give(parameters: Sequence[Tensor], *gradients: Gradients) -> None:
    """Add to each parameter's gradient; None adds nothing, and where all is None nothing is there."""
    for p, parts in zip(parameters, zip(*gradients)):
        for part in parts:
            if part is not None:
                p.grad = part if p.grad is None else p.grad + part


@torch.no_grad()
def alignment(g: Gradients, u: Gradients) -> dict[str, Tensor]:
    """Do the two losses pull the same way? For their gradients g (acquisition) and u (retention):

    `alignment`: their cosine over all parameters, in [-1, 1]; below 0, a step along one undoes the other.
    `retain_over_acquire`: |u| / |g|.
    """
    dot = torch.stack([(a.detach() * b).sum() for a, b in zip(g, u) if a is not None and b is not None]).sum()
    size_g, size_u = length(g), length(u)
    tiny = torch.finfo(dot.dtype).tiny
    return {
        "alignment": dot / (size_g * size_u).clamp_min(tiny),
        "retain_over_acquire": size_u / size_g.clamp_min(tiny),
    }


@torch.no_grad()
def length(tensors: Gradients) -> Tensor:
    """The Euclidean length of all of them together."""
    parts: Any = torch._foreach_norm([t.detach() for t in tensors if t is not None])
    norm: Tensor = torch.linalg.vector_norm(torch.stack(parts))
    return norm


@dataclass(frozen=True)
class Config(UpdateConfig):
    """How much the replayed inputs count."""

    weight: float = 1.0  #: of the loss on replayed inputs; the released code of PRE-DFKD and LRA amounts to 0.125

    name: ClassVar[str] = "replay"
    replays: ClassVar[bool] = True

    def build(self) -> Update:
        positive("update", ", as in 1.0", weight=self.weight)
        return Replaying(self)


class Replaying(Update):
    """Two passes, two backward passes, one sum."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def backward(self, student: nn.Module, acquire: Objective, retain: Objective | None = None) -> dict[str, Tensor]:
        weight, parameters = self.config.weight, [p for p in student.parameters() if p.requires_grad]
        before = take(parameters)
        terms, retained = acquire(student), {}
        total(terms).backward()
        g = take(parameters)
        u: Gradients = [None] * len(parameters)
        self.terms = {}
        if retain is not None:
            retained = retain(stand_in(student))
            (weight * total(retained)).backward()
            u = take(parameters)
            self.terms = alignment(g, u)
        give(parameters, before, g, u)
        return report(terms, retained, weight)
