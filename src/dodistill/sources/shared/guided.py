"""The descent of `fast`, `fast_imagenet` and `nayer`: a generator optimises one batch under the teacher's guidance.

    L = bn * sum_l (|| mu_l - E_l ||_2 + || var_l - V_l ||_2)  +  oh * CE(T(x), y)  +  adv * L_adv

The batch statistics mu_l, var_l of the BatchNorm inputs are smoothed over batches (momentum `bn_momentum`).
L_adv = -mean(1[argmax s = argmax t] * KL(t || s)) is the decision-adversarial term. The file of each method defines x,
and the images that it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ...core.context import Context
from ...functional import losses
from ...functional.terms import detached, total
from ...models.taps import batchnorm_inputs
from .base import Source, SourceConfig
from .best import Best


@dataclass(frozen=True)
class GuidedConfig(SourceConfig):
    """The weights of the loss."""

    bn: float = 10.0  #: weight of the BatchNorm statistics
    oh: float = 0.4  #: weight of the cross-entropy to the drawn labels
    adv: float = 1.1  #: weight of the decision-adversarial term
    bn_momentum: float = 0.9  #: smoothing of batch statistics over batches (0: none)


class Guided(Source):
    """Keeps the smoothed statistics, and runs the descent."""

    config: GuidedConfig

    def __init__(self, config: GuidedConfig, context: Context) -> None:
        super().__init__(context)
        self.config = config
        #: smoothed BatchNorm input statistics, one (mean, var) per layer; empty until the first batch
        self.ema: list[tuple[Tensor, Tensor]] = []

    def _descend(
        self,
        make: Callable[[], Tensor],
        y: Tensor,
        student: nn.Module | None,
        opt: torch.optim.Optimizer,
        leaves: Sequence[Tensor],
        steps: int,
        each: Callable[[], None] = lambda: None,
        last: bool = False,
    ) -> Tensor:
        """Make `steps` steps of `opt` on the images that `make` returns; return the images of lowest loss.

        Args:
            make: -> images [n, C, H, W] in [0, 1].
            y: target classes [n].
            student: for the adversarial term; None leaves it out.
            opt: the optimiser of `leaves`.
            leaves: the tensors that get gradients. No others do.
            steps: number of steps.
            each: called between each backward pass and its step.
            last: return the images of the last step instead.
        """
        c, ctx = self.config, self.context
        best = Best()
        with batchnorm_inputs(ctx.teacher) as taps:
            for _ in range(steps):
                with ctx.autocast():
                    x = make()
                    xa = ctx.view(x, self.generator)
                    t = ctx.teacher(xa)
                terms = {
                    "bn": c.bn * losses.bn_statistics(taps, taps.modules, self.ema or None, c.bn_momentum),
                    "ce": c.oh * nnf.cross_entropy(t, y),
                }
                if student is not None:
                    with ctx.autocast():
                        s = student(xa)
                    terms["adv"] = c.adv * losses.adversarial(s.float(), t)
                loss = total(terms)
                if not last:
                    best.offer(loss, x)
                opt.zero_grad()
                loss.backward(inputs=list(leaves))  # no gradients for the student
                each()
                opt.step()
            if c.bn_momentum > 0:
                self.ema = losses.bn_average(self.ema or None, taps, c.bn_momentum)
        self.terms = detached(terms)
        return x.detach() if last else best.tensors[0]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"ema": [t for pair in self.ema for t in pair]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        flat = [t.to(self.context.device) for t in state["ema"]]
        self.ema = list(zip(flat[::2], flat[1::2]))
