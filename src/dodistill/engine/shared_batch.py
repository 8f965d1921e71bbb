"""Which parts of a method can share a batch among several processes, and the whole batch for those that couple it."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from ..core.batch import Batch
from ..core.ranks import Ranks
from ..errors import DodistillError
from ..models.taps import Features

#: Methods in which a part may couple the images of a batch.
_ACTS = ("forward", "own", "compensate", "observe", "backward")


def couples(part: object) -> bool | None:
    """The attribute `couples` of a criterion, an intervention or an update.

    None if the attribute does not cover all methods: the class, or one between it and the class that has the attribute,
    replaces a method of `_ACTS`.
    """
    for cls in type(part).__mro__:
        if "couples" in vars(cls):
            said: bool | None = vars(cls)["couples"]
            return said
        if any(name in vars(cls) for name in _ACTS):
            return None
    return None


def require_shareable(parts: dict[str, object], student: nn.Module, ranks: Ranks, batch: int) -> None:
    """Refuse what several processes would compute wrongly. `parts`: name, as in `criterion kl`, -> object."""
    if ranks.world == 1:
        return
    for name, part in parts.items():
        if couples(part) is None:
            raise DodistillError(
                f"{name} does not say whether it couples the images of a batch, which {ranks.world} processes "
                f"would share. If not, write `couples = False` into its class {type(part).__name__}; if so, "
                "`couples = True`, and each process computes it on the whole batch (docs/scale.md). Or start one."
            )
    if any(type(m).__module__.startswith("torch.jit") for m in student.modules()):
        raise DodistillError(
            "the student is a TorchScript module, whose BatchNorm cannot be synchronised over several processes; give "
            "a Python module, or start one process."
        )
    ranks.weight(batch)


def whole(batch: Batch, n: int, ranks: Ranks) -> Batch:
    """The batch of n images of which each process has a part; differentiable."""

    def features(part: Features) -> Features:
        last = None if part.penultimate is None else ranks.whole(part.penultimate, n)
        return Features(last, [ranks.whole(m, n) for m in part.stages])

    def tensor(part: Tensor) -> Tensor:
        return ranks.whole(part, n)

    return dataclasses.replace(
        batch, index=tensor(batch.index), labels=tensor(batch.labels), raw=tensor(batch.raw),
        student=features(batch.student), teacher=features(batch.teacher),
    )  # fmt: skip
