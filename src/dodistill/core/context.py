"""What a method may read of its run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config.tree import Augment
from ..data.reading import parts
from ..data.rows import Pixels, Rows, rows_of
from ..functional.augment import View, to_float
from ..functional.memory_format import laid_out
from .precision import Precision
from .ranks import Ranks
from .runtime import at_once, generator

if TYPE_CHECKING:
    from ..models.teacher import Teacher


def _silent(_message: str, _done: int, _total: int) -> None:
    return None


@dataclass
class Context:
    """What a source, an intervention or a criterion may read of its run."""

    teacher: Teacher
    device: torch.device
    seed: int = 0
    autocast: Precision = field(default_factory=Precision.fp32)  #: `with context.autocast()`, around forward passes
    augment: Augment = field(default_factory=Augment)
    view: View = field(default_factory=View)  #: augmentation of the teacher's inputs during synthesis
    unlabeled: Rows | None = None  #: uint8 [n, C, H, W], the images of a sampler, read by row (rows[index])
    labels: Tensor | None = None  #: long [n], their true classes, if the user gives them and the source reads them
    student: nn.Module | None = None  #: before training, for the widths of its features (`taps.probe`)
    capacity: int = 65_536  #: slots of the pool, the range of `Batch.index`
    eviction: str = "oldest"  #: which image leaves the full pool: oldest, reservoir
    progress: Callable[[str, int, int], None] = _silent  #: (what, done, total) inside a long acquisition
    extra: Mapping[str, Any] = field(default_factory=dict)  #: for one part only (the model of a foreign dictionary)
    ranks: Ranks = field(default_factory=Ranks)  #: the processes of the run; one, as a rule

    def __post_init__(self) -> None:
        """`unlabeled` may be given as a tensor."""
        if isinstance(self.unlabeled, Tensor):
            self.unlabeled = rows_of(self.unlabeled)

    @property
    def num_classes(self) -> int:
        return self.teacher.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.teacher.image_shape

    def label(self, images: Pixels, chunk: int = 1000, what: str = "") -> Tensor:
        """The teacher's logits [n, K], on the run's device, of images uint8 [n, C, H, W], without gradients.

        `chunk` images at once, at most; `what` names the work for the progress display.
        """
        chunk, done = at_once(self.device, chunk), 0
        # One block for all: thousands of small ones between the images' own would scatter the memory.
        out = torch.empty(len(images), self.num_classes, device=self.device)
        for part in parts(images, chunk, self.device):
            with self.autocast():
                out[done : done + len(part)] = self.teacher.answers(laid_out(to_float(part)))
            done += len(part)
            if what:
                self.progress(what, done, len(images))
        return out

    def generator(self, purpose: str) -> torch.Generator:
        return generator(self.device, self.seed, purpose)
