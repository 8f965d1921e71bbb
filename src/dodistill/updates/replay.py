"""Plain replay: the gradient of both losses, on new and on replayed inputs, at the student's weights w.

    min_w  L_Acq(w) + weight * L_Ret(w)

This is the update of MB-DFKD (Binici et al., WACV 2022) and PRE-DFKD (Binici et al., AAAI 2022). The released code of
LRA is equivalent to it (see `retain`).

Deviations, and why
 1. The papers take one mean over new and replayed images together. There are eight times as many new images, so the two
    losses weigh 8:1. `weight = 0.125` has this ratio. The scale is not corrected: the gradient is 9/8 of theirs
    at the same rate.
 2. In the papers, BatchNorm normalises both kinds in one batch. Here each kind has its own statistics, and only the new
    inputs update the running ones. `retain` does the same, so that the two updates differ in nothing else.
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
    """x -> the student's logits at other `weights` (name -> tensor; default: its own).

    The student's buffers stay unchanged: BatchNorm in train mode updates copies of them. Hooks on the student see this
    pass too.
    """
    tensors = {name: buffer.clone() for name, buffer in student.named_buffers()} | dict(weights or {})

    def call(x: Tensor) -> Tensor:
        out: Tensor = functional_call(student, tensors, (x,))
        return out

    return call


def report(terms: Mapping[str, Tensor], retained: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """The terms of both losses, detached and weighted, under their names in the log."""
    return detached(terms) | {f"retain/{name}": weight * value for name, value in detached(retained).items()}


def take(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the parameters' gradients, and set them to None."""
    taken = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return taken


def give(parameters: Sequence[Tensor], *gradients: Gradients) -> None:
    """Add to each parameter's gradient. None adds nothing; a gradient stays None if all parts are None."""
    for p, parts in zip(parameters, zip(*gradients)):
        for part in parts:
            if part is not None:
                p.grad = part if p.grad is None else p.grad + part


@torch.no_grad()
def alignment(g: Gradients, u: Gradients) -> dict[str, Tensor]:
    """Whether the gradients g (acquisition) and u (retention) agree.

    `alignment`: their cosine over all parameters, in [-1, 1]. Below 0, a step along one increases the other loss.
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
    """The Euclidean norm of all of them together."""
    parts: Any = torch._foreach_norm([t.detach() for t in tensors if t is not None])
    norm: Tensor = torch.linalg.vector_norm(torch.stack(parts))
    return norm


@dataclass(frozen=True)
class Config(UpdateConfig):
    """The weight of the replayed inputs."""

    weight: float = 1.0  #: weight of the loss on replayed inputs; the released code of PRE-DFKD and LRA has 0.125

    name: ClassVar[str] = "replay"
    replays: ClassVar[bool] = True

    def build(self) -> Update:
        positive("update", ", as in 1.0", weight=self.weight)
        return Replaying(self)


class Replaying(Update):
    """Two forward and two backward passes, and the sum of their gradients."""

    couples = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def backward(self, student: nn.Module, acquire: Objective, retain: Objective | None = None) -> dict[str, Tensor]:
        weight, parameters = self.config.weight, [p for p in student.parameters() if p.requires_grad]
        before = take(parameters)
        terms, retained = acquire(student), {}
        total(terms).backward()
        g: Gradients = take(parameters)
        u: Gradients = [None] * len(parameters)
        self.terms = {}
        if retain is not None:
            retained = retain(stand_in(student))
            (weight * total(retained)).backward()
            u = take(parameters)
            g, u = (self.ranks.averaged(v) for v in (g, u))
            self.terms = alignment(g, u)
        give(parameters, before, g, u)
        return report(terms, retained, weight)
