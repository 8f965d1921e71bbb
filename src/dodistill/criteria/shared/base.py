"""The base classes of a criterion: the distance between the student's (compensated) logits and the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as nnf
from torch import Tensor, nn

from ...config.plugins import Named
from ...core.batch import Batch
from ...core.context import Context
from ...errors import DodistillError
from ...functional import losses
from ...models.taps import Features, probe


class Criterion(nn.Module):
    """Logits s (after the interventions), t [B, K] -> named terms, each a scalar; the loss is their sum."""

    own_lr: float | None = None  #: learning rate of an Adam for its own parameters; None: the student's optimiser
    needs: frozenset[str] = frozenset()  #: of both networks, for `batch`: `features` (penultimate), `stages` (maps)
    #: whether the images of a batch are coupled, for runs in several processes. False: each term is a mean over images
    #: of a value of each image, and `observe` stores nothing; each process gets its part of the batch. True: each gets
    #: the whole batch, and must compute the same. None: unknown, which several processes refuse.
    couples: ClassVar[bool | None] = None

    def forward(self, s: Tensor, t: Tensor, batch: Batch | None = None) -> dict[str, Tensor]:
        raise NotImplementedError

    def observe(self, t: Tensor, batch: Batch) -> None:
        """Called once per matching step, after the backward pass, to store statistics of the batch.

        `forward` may be called several times in a step: by updates that look ahead, and for replayed inputs.
        """


@dataclass(frozen=True)
class CriterionConfig(Named):
    """The flags of a criterion. A file in this folder has one subclass of it, named `Config`."""

    def build(self, context: Context) -> Criterion:
        raise NotImplementedError


class Labelled(Criterion):
    """The base of the baselines: ce * CE(s, y) + kd * T^2 KL(t || s), to which each adds its own term.

    y are the labels of the data, else the teacher's predictions. A term of weight 0 is left out.
    """

    couples = False

    def __init__(self, config: LabelledConfig) -> None:
        super().__init__()
        if min(config.ce, config.kd) < 0 or not config.temperature > 0:
            raise DodistillError(
                f"criterion {config.name}: ce is {config.ce}, kd {config.kd} and temperature {config.temperature}; "
                "weights are at least 0, and the temperature is above 0."
            )
        self.ce, self.kd, self.temperature = config.ce, config.kd, config.temperature

    def own(self, s: Tensor, t: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The criterion's own term."""
        return {}

    def forward(self, s: Tensor, t: Tensor, batch: Batch | None = None) -> dict[str, Tensor]:
        assert batch is not None
        terms = {"ce": self.ce * nnf.cross_entropy(s, batch.labels)} if self.ce else {}
        terms |= {"kd": self.kd * losses.kl(s, t, self.temperature)} if self.kd else {}
        return terms | self.own(s, t, batch)


@dataclass(frozen=True)
class LabelledConfig(CriterionConfig):
    """The weights of RepDistiller (Tian et al.), in whose loop the baselines are compared."""

    ce: float = 1.0  #: weight of the cross-entropy to the labels (the data's, else the teacher's)
    kd: float = 0.0  #: weight of Hinton's KL
    temperature: float = 4.0  #: T of that KL


def probes(context: Context, needs: frozenset[str]) -> tuple[Features, Features]:
    """The features of student and teacher on two images, for widths and resolutions."""
    assert context.student is not None
    shape, device = context.image_shape, context.device
    return probe(context.student, shape, needs, device), probe(context.teacher, shape, needs, device)


def widths(context: Context) -> tuple[int, int]:
    """(ds, dt), of the penultimate features of student and teacher."""
    student, teacher = probes(context, frozenset({"features"}))
    f, h = both(student, teacher)
    return f.shape[1], h.shape[1]


def both(student: Features, teacher: Features) -> tuple[Tensor, Tensor]:
    """The penultimate features of student and teacher, fp32. Raises DodistillError for other than one vector each."""
    f, h = student.penultimate, teacher.penultimate
    assert f is not None
    assert h is not None
    if f.dim() != 2 or h.dim() != 2:
        raise DodistillError(
            f"this criterion reads one feature vector per image; the student's are {tuple(f.shape)}, the teacher's "
            f"{tuple(h.shape)}. Use a criterion on logits, such as kl."
        )
    return f.float(), h.float()


def paired(student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
    """The feature maps [B, C, H, W] of student and teacher at each resolution that both have, the finest first.

    Raises DodistillError without a common resolution.
    """
    theirs = {m.shape[2:]: m for m in teacher.stages}
    pairs = [(m.float(), theirs[m.shape[2:]].float()) for m in student.stages if m.shape[2:] in theirs]
    if not pairs:
        sizes = [", ".join(f"{m.shape[2]}x{m.shape[3]}" for m in f.stages) or "none" for f in (student, teacher)]
        raise DodistillError(
            f"this criterion compares feature maps of equal size; the student has {sizes[0]}, the teacher "
            f"{sizes[1]}. Use a criterion on logits, such as kl."
        )
    return pairs
