"""One batch of inputs: as drawn for the student, and as criteria and interventions read it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..models.taps import Features


@dataclass
class Batch:
    """A batch of B inputs, for criteria and interventions. It has features only if one of them `needs` features.

    Attributes:
        index: long [B], the inputs' slots in the pool; -1 for replayed inputs.
        labels: long [B], true classes where the data have them, else the teacher's prediction.
        raw: [B, K], the student's own logits, before any intervention.
        done: share of the run's steps that are done, in [0, 1); above 1 in a run that was trained longer.
        student, teacher: their features. The student's are in the graph, the teacher's are constants.
    """

    index: Tensor
    labels: Tensor
    raw: Tensor
    done: float = 0.0
    student: Features = field(default_factory=Features)
    teacher: Features = field(default_factory=Features)


@dataclass
class Drawn:
    """A batch of B inputs for the student, with the teacher's logits.

    Attributes:
        x: float in [0, 1], [B, C, H, W], channels last.
        t: the teacher's logits of x, [B, K].
        labels: long [B], true classes where the data have them, else the teacher's.
        index: long [B], slots in the pool; -1 for replayed inputs.
        theirs: the teacher's features of x, where a criterion or an intervention needs them.
        total: images of the whole batch, of which several processes have a part each; 0: B.
    """

    x: Tensor
    t: Tensor
    labels: Tensor
    index: Tensor
    theirs: Features = field(default_factory=Features)
    total: int = 0
