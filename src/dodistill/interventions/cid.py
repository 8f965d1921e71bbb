"""CID's intervention: the student predicts from its features and from the contexts of its classes.

Comprehensive Knowledge Distillation with Causal Intervention (Deng and Zhang, NeurIPS 2021), as its released code has
it. Training data bias a teacher by the context of a class (grass with dogs). The contexts are one prototype per class:
the mean of the student's features f_i over one pass through the data, weighted by the teacher's confidence:

    c_k  = sum_{i: y_i = k} w_i f_i / sum_{i: y_i = k} w_i,   w_i = softmax(t_i / T)[y_i]        C [K, d]
    C   <- u C + (1 - u) C_new                       after each pass, for use in the next pass
    q_i  = softmax(z_i / T),  ctx_i = q_i C          z_i the student's own logits; ctx is held constant
    z'_i = W' [f_i ; ctx_i] + b'                     what is trained on the labels, and what is deployed

The first `init` share of the run trains only z, and gathers C. Without true labels, y_i is the teacher's prediction.
In the delivered student, C and W' replace the classifier (`models.heads`): one module, no teacher.

Deviations, and why
 1. The back-door formula sums over contexts under their prior P(c). The code weights them by q_i, the input's own
    prediction: an attention over prototypes. `weights`: softened is the code, prior the formula, uniform a control.
 2. A pass is a share of the run (`refresh`), as inputs are drawn at random. With 240 epochs it is the same.
 3. A class without inputs in a pass keeps its prototype; in the release it becomes 0, or u times the old one.
 4. The result is z' + (s - z), where s is the prediction so far. Alone, this is z'. Together with an intervention that
    adds to the logits, both act, in either order.
 5. The delivered moving average has the head and the contexts of the student itself.
 6. W' has no weight decay unless `decay` is set; in the release it has the student's. The presets `cid-*` set it.
 7. u > 0 acts from the second pass on; in the release the first contexts come only from the last pass of `init`.
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
    """Changes nothing before the first prototypes exist, and before `init`."""

    at_test = True
    needs = frozenset({"features"})
    couples = True

    C: Tensor  #: [K, d], the current prototypes
    share: Tensor  #: [K], class shares in the pass of these prototypes (uniform: 1 / K)
    total: Tensor  #: [K, d], sums for the next prototypes: of w_i f_i,
    mass: Tensor  #: [K], of w_i,
    count: Tensor  #: [K], and the number of inputs

    def __init__(self, config: Config, classes: int, dim: int, generator: torch.Generator):
        super().__init__()
        self.config, self.name, self.decays = config, config.name, config.decay
        self.head = seeded(nn.Linear, generator, 2 * dim, classes)
        for name, shape in (("C", (classes, dim)), ("total", (classes, dim))):
            self.register_buffer(name, torch.zeros(shape))
        for name in ("share", "mass", "count"):
            self.register_buffer(name, torch.zeros(classes))
        self.passes = 0  #: passes begun since the first
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
        """At the beginning of a pass, update the prototypes from the sums of the last pass."""
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
        """A copy with the head built in; the student itself while z' is not yet trained."""
        if not self.active:
            return student
        c = self.config
        return heads.with_context(student, self.head, self.C, self.share, c.temperature, c.weights)

    @torch.no_grad()
    def log(
        self, s: Tensor, t: Tensor, dictionary: ConfounderDictionary | None, batch: Batch | None = None
    ) -> dict[str, Tensor]:
        """Quantities of a batch; docs/methods/cid.md explains each."""
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
    """CID's contexts. `criterion cid` is its loss; another criterion gets z' as the prediction."""

    name: ClassVar[str] = "cid"
    weights: Literal["softened", "prior", "uniform"] = (
        "softened"  #: of each prototype: the input's own softened prediction (released) | the class shares | 1/K
    )
    temperature: float = 4.0  #: T of q and w
    init: float = 20 / 240  #: share of the run before z' is trained; the criterion has the same setting
    refresh: float = 1 / 240  #: share of the run between two updates of the prototypes; about one pass over the data
    u: float = 0.0  #: weight of the old prototypes in an update, in [0, 1)
    decay: bool = False  #: apply the student's weight decay to W' and b' (the release and the presets cid-* do)

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
    """d. Raises DodistillError for a student whose last layer is not a Linear, as the head replaces this layer."""
    _, linear = classifier(student)
    seen = probe(student, context.image_shape, CID.needs, context.device)
    f = seen.penultimate
    assert f is not None
    if not isinstance(linear, nn.Linear) or f.dim() != 2 or linear.out_features != context.num_classes:
        raise DodistillError(
            "cid: the student's last layer must be a Linear from one feature vector per image to the classes, because "
            f"the intervened head replaces it; it is {type(linear).__name__} on {tuple(f.shape)}."
        )
    if heads.find(student) is not None:
        raise DodistillError("cid: the student already has a context head; start from the network without it.")
    return f.shape[1]
