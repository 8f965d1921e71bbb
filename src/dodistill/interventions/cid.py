"""CID's intervention: the student predicts from its features and from the context that its classes stand in.

Comprehensive, Interventional Distillation (Deng and Zhang, NeurIPS 2021), as its released code has it. The bias that
the training data leave in a teacher is the context that goes with a class (grass with dogs). Contexts are one prototype
per class, a mean of the student's features f_i over one pass through the data, weighed by how sure the teacher is:

    c_k  = sum_{i: y_i = k} w_i f_i / sum_{i: y_i = k} w_i,   w_i = softmax(t_i / T)[y_i]        C [K, d]
    C   <- u C + (1 - u) C_new                       after each pass; the next pass uses it, and builds the one after
    q_i  = softmax(z_i / T),  ctx_i = q_i C          z_i the student's own logits; ctx is held constant
    z'_i = W' [f_i ; ctx_i] + b'                     what is trained on the labels, and what is deployed

The first `init` share of the run trains z alone, while C is gathered. Without true labels y_i is the teacher's answer.
The delivered student carries C and W' in its own classifier's place (`models.heads`): one module, no teacher.

Deviations, and why
 1. The back-door formula sums over contexts under their prior P(c). The code weighs them by q_i, the input's own
    prediction: an attention over prototypes. `weights` softened is the code's, prior the formula's, uniform a control.
 2. A pass is a share of the run (`refresh`), for inputs are drawn, not walked through. With 240 epochs it is the same.
 3. A class that no input of a pass belongs to keeps its prototype; there it is 0, or u times the old one.
 4. z' is added as z' + (s - z), s the prediction so far: the same alone; beside an intervention that adds to the
    logits, both act, in either order.
 5. The student's moving average ships with the head and the contexts of the student itself.
 6. W' has no weight decay unless `decay`; there it has the student's. The presets `cid-*` have it.
 7. u > 0 acts from the second pass on; there the first contexts are those of the last pass of `init` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.batch import Batch
from ..core.context import Context
from ..core.runtime import seeded
from ..errors import DodistillError, positive
from ..models import heads
from ..models.taps import classifier, probe
from .shared.base import Intervention, InterventionConfig
from .shared.dictionary import ConfounderDictionary


class CID(Intervention):
    """Until the first prototypes are there, and before `init`, it changes nothing."""

    at_test = True
    needs = frozenset({"features"})

    C: Tensor  #: [K, d], the prototypes in use
    share: Tensor  #: [K], the classes' shares in the pass that they are from (uniform: 1 / K)
    total: Tensor  #: [K, d], what gathers the next ones: sum of w_i f_i,
    mass: Tensor  #: [K], sum of w_i,
    count: Tensor  #: [K], number of inputs

    def __init__(self, config: Config, classes: int, dim: int, generator: torch.Generator):
        super().__init__()
        self.config, self.name, self.decays = config, config.name, config.decay
        self.head = seeded(nn.Linear, generator, 2 * dim, classes)
        for name, shape in (("C", (classes, dim)), ("total", (classes, dim))):
            self.register_buffer(name, torch.zeros(shape))
        for name in ("share", "mass", "count"):
            self.register_buffer(name, torch.zeros(classes))
        self.passes = 0  #: that have begun since the first
        self.gathered = self.filled = self.active = False

    def compensate(self, s: Tensor, dictionary: ConfounderDictionary | None, batch: Batch | None = None) -> Tensor:
        """s [B, K] -> z' + (s - z)."""
        if batch is None or batch.student.penultimate is None:
            raise RuntimeError("cid needs the student's features in `batch`")
        if self.training:
            self._turn(batch.done)
        if not self.active:
            return s
        z, f, c = batch.raw, batch.student.penultimate.float(), self.config
        ctx = heads.context(z.detach(), self.C, self.share, c.temperature, c.weights)
        intervened: Tensor = self.head(torch.cat([f, ctx], 1))
        return intervened + (s - z)

    @torch.no_grad()
    def observe(self, t: Tensor, batch: Batch) -> None:
        """Gather w_i f_i by class. One addition over the batch, whatever the number of classes."""
        assert batch.student.penultimate is not None
        f, y = batch.student.penultimate.float(), batch.labels
        w = torch.softmax(t / self.config.temperature, 1).gather(1, y[:, None])
        self.total.index_add_(0, y, w * f)
        self.mass.index_add_(0, y, w[:, 0])
        self.count.index_add_(0, y, torch.ones_like(w[:, 0]))
        self.gathered = True

    @torch.no_grad()
    def _turn(self, done: float) -> None:
        """At the beginning of a pass, what the last one gathered comes into use."""
        c, passes = self.config, int(done / self.config.refresh + 1e-9)
        if passes > self.passes and self.gathered:
            there = (self.mass > 0)[:, None]
            fresh = torch.where(there, self.total / self.mass.clamp_min(1e-12)[:, None], self.C)
            self.C.copy_(torch.lerp(fresh, self.C, c.u) if self.filled else fresh)
            self.share.copy_(self.count / self.count.sum())
            if c.weights == "uniform":
                self.share.fill_(1 / len(self.share))
            for gathers in (self.total, self.mass, self.count):
                gathers.zero_()
            self.gathered, self.filled, self.passes = False, True, passes
        self.active = self.active or (self.filled and done >= c.init)

    def deliver(self, student: nn.Module, dictionary: ConfounderDictionary | None) -> nn.Module:
        """A copy with the head built in; the student itself while z' is not trained yet."""
        if not self.active:
            return student
        c = self.config
        return heads.with_context(student, self.head, self.C, self.share, c.temperature, c.weights)

    @torch.no_grad()
    def log(
        self, s: Tensor, t: Tensor, dictionary: ConfounderDictionary | None, batch: Batch | None = None
    ) -> dict[str, Tensor]:
        """What it does to a batch; docs/methods/cid.md explains each quantity."""
        assert batch is not None
        label, z = t.argmax(1), batch.raw
        members = torch.zeros_like(self.count).index_add_(0, batch.labels, torch.ones_like(z[:, 0]))
        return {
            "agreement": 100 * (z.argmax(1) == label).float().mean(),
            "agreement_intervened": 100 * (self.compensate(z, dictionary, batch).argmax(1) == label).float().mean(),
            "prototypes": self.C.any(1).sum().float(),
            "prototype_spread": self.C.std(0, correction=0).norm() / self.C.mean(0).norm().clamp_min(1e-12),
            "classes_in_pairs": (members > 1).sum().float(),
        }

    def get_extra_state(self) -> dict[str, Any]:
        return {"passes": self.passes, "gathered": self.gathered, "filled": self.filled, "active": self.active}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.passes, self.gathered = state["passes"], state["gathered"]
        self.filled, self.active = state["filled"], state["active"]


@dataclass(frozen=True)
class Config(InterventionConfig):
    """CID's contexts. `criterion cid` is its loss; with another criterion z' is what that sees."""

    name: ClassVar[str] = "cid"
    weights: Literal["softened", "prior", "uniform"] = (
        "softened"  #: of the prototypes: the input's own softened prediction (released) | the classes' shares | 1/K
    )
    temperature: float = 4.0  #: T of q and w
    init: float = 20 / 240  #: share of the run before z' is trained; the criterion has one too
    refresh: float = 1 / 240  #: share of the run after which the prototypes are replaced; about one pass over the data
    u: float = 0.0  #: how much of the old prototypes stays, in [0, 1)
    decay: bool = False  #: the student's weight decay on W' and b' too (released: yes, and the presets cid-* have it)

    def build(self, context: Context) -> CID:
        positive("cid", temperature=self.temperature)
        if not (0 <= self.init < 1 and 0 < self.refresh < 1 and 0 <= self.u < 1):
            raise DodistillError(
                f"cid: init is {self.init}, refresh {self.refresh} and u {self.u}; each is a share below 1, and "
                "refresh is above 0."
            )
        assert context.student is not None
        return CID(self, context.num_classes, _width(context.student, context), context.generator("cid"))


def _width(student: nn.Module, context: Context) -> int:
    """d. Raises DodistillError for a student whose last layer is no Linear: the head takes its place."""
    _, linear = classifier(student)
    seen = probe(student, context.image_shape, CID.needs, context.device)
    f = seen.penultimate
    assert f is not None
    if not isinstance(linear, nn.Linear) or f.dim() != 2 or linear.out_features != context.num_classes:
        raise DodistillError(
            "cid: the student's last layer must be a Linear from one feature vector per image to the classes, for "
            f"that is where the intervened head goes; it is {type(linear).__name__} on {tuple(f.shape)}."
        )
    if heads.find(student) is not None:
        raise DodistillError("cid: the student has a context head already; begin with the network it was made from.")
    return f.shape[1]
