"""LRA: Learning to Retain while Acquiring (Patel, Mopuri, Qiu, CVPR 2023).

The student is trained on new inputs such that one step on them does not increase the loss on replayed inputs:

    min_w  L_Acq(w) + weight * L_Ret(w'),      w' = w - alpha * grad L_Acq(w)

L_Acq is the loss on new inputs, L_Ret the loss on replayed ones. By the paper's Taylor expansion, the gradient of the
second term is grad L_Ret - alpha * grad <grad L_Ret, grad L_Acq> + O(alpha^2): it rewards gradients that agree.
With u = weight * grad L_Ret(w') and H the Hessian of L_Acq at w,

    exact         grad = grad L_Acq(w) + u - alpha * H u
    first_order   grad = grad L_Acq(w) + u            no derivative through w', as in first-order MAML

H u is exact, and H is never formed: H u is the gradient of <grad L_Acq, u> with u held constant. The student's passes
of an exact step are in fp32, whatever `loop.precision` says: in bf16 the cosine of its gradient with fp32's is 0.97 at
alpha 0.1 and 0.90 at 0.9 (WRN-16-1, untrained, batch 32). The parameters of criteria and interventions get the exact
gradient of the same objective, also through w' (first_order: the gradient of each loss). While there is nothing to
replay, this is the plain update.

Deviations, and why
 1. The released code loses the meta-gradient. Its inner loop copies the initial weights by a default of a library,
    which detaches them, so that L_Ret(w') has no gradient with respect to the student. What remains is one mean over
    both kinds of inputs at w, 8/9 L_Acq + 1/9 L_Ret: update `replay` with `weight` 0.125, up to scale. Without the
    detachment it would be 8/9 L_Acq(w) + 1/9 L_Ret(w) + L_Ret(w'), with retention twice. Here the equation holds. Tests
    compare it with finite differences, and with the released code changed to keep its graph.
 2. alpha: we do not know the paper's value. 0.9 is `lr_S_in` of both released configurations, constant over the run; by
    (1) it had no effect on the weights. The presets `lra-*` use it; our `desk` uses 0.1.
 3. The release's inner step has weight decay (5e-4), which the equation does not have. Its momentum has no history.
 4. BatchNorm: the running statistics are updated once per step, by the pass at w on new inputs. The pass at w' does not
    update them.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import at_least, positive
from ..functional.curvature import second_derivatives
from ..functional.recompute import recomputed
from ..functional.terms import total
from .replay import Gradients, alignment, give, length, report, stand_in, take
from .shared.base import Objective, Update, UpdateConfig


@dataclass(frozen=True)
class Config(UpdateConfig):
    """The inner step, and how it is differentiated."""

    alpha: float = 0.9  #: rate of the inner step, from w to w'; the rate of the outer step is optim.lr
    order: Literal["exact", "first_order"] = "exact"  #: with or without the Hessian product
    weight: float = 1.0  #: weight of the retention loss

    name: ClassVar[str] = "retain"
    replays: ClassVar[bool] = True

    def build(self) -> Update:
        at_least(0, "update", ", as in 0.1", alpha=self.alpha)
        positive("update", ", as in 1.0", weight=self.weight)
        return Retain(self)


class Retain(Update):
    """The inner step, the retention pass at its end, and the gradient of both losses at its start."""

    couples = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @property
    def fp32(self) -> bool:
        """In bf16 the Hessian product is too inexact; see the head of this file."""
        return self._exact

    @property
    def _exact(self) -> bool:
        return self.config.order == "exact" and self.config.alpha > 0

    def backward(self, student: nn.Module, acquire: Objective, retain: Objective | None = None) -> dict[str, Tensor]:
        c, named = self.config, {n: p for n, p in student.named_parameters() if p.requires_grad}
        parameters, exact = list(named.values()), self._exact
        self.terms = {}
        if retain is None:
            terms = acquire(student)
            total(terms).backward()
            return report(terms, {}, c.weight)

        before = take(parameters)
        with ExitStack() as twice:
            if exact:
                twice.enter_context(second_derivatives())
                twice.enter_context(recomputed())
            terms = acquire(student)
            loss = total(terms)
            g: Gradients
            if exact:
                g = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            else:
                loss.backward()
                g = take(parameters)
        mean = self.ranks.averaged(g)
        with torch.no_grad():
            moved = {n: p if d is None else p - c.alpha * d for (n, p), d in zip(named.items(), mean)}
        moved = {n: w.detach().requires_grad_() for n, w in moved.items()}
        with recomputed() if exact else nullcontext():
            retained = retain(stand_in(student, moved))
        (c.weight * total(retained)).backward()
        u = self.ranks.averaged([w.grad for w in moved.values()])
        del moved
        self.terms = alignment(mean, u) | {"inner_step": c.alpha * length(mean) / length(parameters)}
        del mean
        if exact:
            # grad L_Acq - alpha * H u in one pass: the loss with weight 1 and its gradients with weight -alpha * u
            reached = [v for v in u if v is not None]
            torch._foreach_mul_(reached, -c.alpha)  # in place: a student may be larger than its activations
            pairs = [(d, v) for d, v in zip(g, u) if d is not None and v is not None and d.requires_grad]
            torch.autograd.backward([loss, *(d for d, _ in pairs)], [None, *(v for _, v in pairs)])  # type: ignore[list-item]
            g = take(parameters)
            torch._foreach_div_(reached, -c.alpha)
        give(parameters, before, g, u)
        return report(terms, retained, c.weight)
