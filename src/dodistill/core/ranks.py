"""The processes of one run: the operations on the group that its parts need.

Every process, called a rank, holds the same pool, dictionary, weights and random streams. Each draws the same batch,
and trains on its part of it. The first rank (0) acquires, evaluates and writes; the others get its results. `Ranks` is
a group of one process: it copies nothing and changes no bits. `core/launch.py` makes the group of a launch by torchrun.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config.tree import difference
from ..errors import DodistillError, Elsewhere
from ..models.teacher import Teacher
from .collective import Lost, gathered, own_rows, reduced, spread, synchronised
from .deadline import OutOfTime
from .passes import shared_passes

T = TypeVar("T")


class Ranks:
    """A group of one process."""

    rank, world = 0, 1

    @property
    def first(self) -> bool:
        """Whether this rank acquires, evaluates and writes."""
        return self.rank == 0

    def require_device(self, device: torch.device) -> None:
        """Raise DodistillError unless each rank can have a device of this kind for itself."""

    def cut(self, x: T, n: int) -> T:
        """This rank's part of a batch of n: of a tensor [n, ...]; None stays None."""
        return x

    def weight(self, n: int) -> float:
        """The factor on a mean over this rank's part, so that the mean over the ranks is that over the batch of n."""
        return 1.0

    def whole(self, x: Tensor, n: int) -> Tensor:
        """The batch [n, ...] of which x is this rank's part. Its gradient is exact if each rank computes the same
        scalar of it."""
        return x

    def synchronised(self) -> AbstractContextManager[Any]:
        """Within the block, BatchNorm in train mode has the statistics of the whole batch."""
        return nullcontext()

    def sharing(self, teacher: Teacher, student: nn.Module) -> AbstractContextManager[Any]:
        """Within the block, each rank passes its part of a batch that all have; see `core/passes.py`."""
        return nullcontext()

    def averaged(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Their means over the ranks, without a graph. None, the same on every rank, stays None."""
        return list(values)

    def average(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradients of parameters by their means over the ranks."""

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag, whether it is true on any rank."""
        return flags

    def share(self, work: Callable[[], T], held: Sequence[object] = ()) -> T:
        """Call `work()` on the first rank, and return its result on every rank; the others wait.

        A tensor in the result lies on each rank's own device of the same kind. `held`: objects of which each rank has
        its own copy, such as the images to which row numbers in the result refer; they are not sent. An exception of
        `work` is raised on every rank: OutOfTime as it is, others on the other ranks as `Elsewhere`.
        """
        return work()

    def alike(self, module: nn.Module) -> None:
        """Give a module the weights that it has on the first rank."""

    def require_same(self, what: Callable[[], Mapping[str, Any]]) -> None:
        """Raise DodistillError, which names a rank and what differs, unless `what()` is the same on every rank: plain
        values, nested by name."""


class Group(Ranks):
    """A group of several processes of torch.distributed, all of which call the same methods in the same order."""

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        """`device`: where this rank's tensors of a GPU lie."""
        self.rank, self.world, self.device = rank, world, device

    def _rows(self, n: int) -> slice:
        """See `own_rows`. Raises DodistillError for fewer images than processes."""
        if n < self.world:
            raise DodistillError(
                f"{self.world} processes cannot share a batch of {n}; give a batch of {self.world} or more, or start "
                "fewer processes."
            )
        return own_rows(n, self.rank, self.world)

    def require_device(self, device: torch.device) -> None:
        if device.type not in ("cpu", "cuda") or device.index is not None:
            raise DodistillError(
                f"device is {str(device)!r}, but {self.world} processes need one each; give --device cuda "
                "(each process takes its own) or cpu."
            )
        if device.type == "cuda" and self.device.type != "cuda":
            raise DodistillError(
                f"rank {self.rank} finds no GPU of its own: there are {torch.cuda.device_count()} here; start as many "
                "processes as there are GPUs (torchrun --nproc-per-node gpu)."
            )

    def cut(self, x: Any, n: int) -> Any:
        return None if x is None else x[self._rows(n)]

    def weight(self, n: int) -> float:
        rows = self._rows(n)
        size: int = rows.stop - rows.start
        return size * self.world / n

    def whole(self, x: Tensor, n: int) -> Tensor:
        return gathered(x, self._rows(n), n)

    def synchronised(self) -> AbstractContextManager[Any]:
        return synchronised(self.rank, self.world)

    def sharing(self, teacher: Teacher, student: nn.Module) -> AbstractContextManager[Any]:
        return shared_passes(teacher, student, self.rank, self.world)

    @torch.no_grad()
    def averaged(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        there = [v.detach() for v in values if v is not None]
        if not there:
            return list(values)
        flat = reduced(torch.cat([v.reshape(-1) for v in there])).div_(self.world)
        parts = zip(there, flat.split([v.numel() for v in there]))
        means = iter([torch.empty_like(v).copy_(part.view(v.shape)) for v, part in parts])
        return [None if v is None else next(means) for v in values]

    def average(self, parameters: Iterable[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for g, mean in zip(gradients, self.averaged(gradients)):
            assert mean is not None
            g.copy_(mean)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        return tuple(v > 0 for v in reduced(torch.tensor([int(f) for f in flags])).tolist())

    def share(self, work: Callable[[], T], held: Sequence[object] = ()) -> T:
        found: tuple[str, Any] = ("", None)
        failed: Exception | None = None
        tensors: list[Tensor] = []
        if self.first:
            try:
                found = ("found", work())
            except Lost:
                raise
            except Exception as error:
                failed = error
                found = ("time" if isinstance(error, OutOfTime) else "error", _said(error))
            packed, tensors = _packed(found, held)
            size = torch.tensor([len(packed)])
        else:
            size = torch.zeros(1, dtype=torch.long)
        size = spread(size)
        data = torch.frombuffer(bytearray(packed), dtype=torch.uint8) if self.first else _bytes(size)
        spread(data)
        if not self.first:
            found, tensors = _unpacked(data.numpy().tobytes(), held, self.device)
        for tensor in tensors:
            spread(tensor)
        if failed is not None:
            raise failed
        if found[0] == "time":
            raise OutOfTime(found[1])
        if found[0] == "error":
            raise Elsewhere(f"rank 0 has stopped: {found[1]}")
        result: T = found[1]
        return result

    def alike(self, module: nn.Module) -> None:
        weights = self.share(module.state_dict)
        if not self.first:
            module.load_state_dict(weights)

    def require_same(self, what: Callable[[], Mapping[str, Any]]) -> None:
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, dict(what()))
        for rank, its in enumerate(every):
            if its != every[0]:
                lines = "; ".join(difference(every[0], its)[:6])
                raise DodistillError(
                    f"rank {rank} differs from rank 0 in {lines} (rank 0 -> rank {rank}). Give all processes the same "
                    "command, files and versions."
                )


def _said(error: Exception) -> str:
    text = str(error)
    return text if isinstance(error, DodistillError | OutOfTime) else f"{type(error).__name__}: {text}"


class _Pickler(pickle.Pickler):
    """Leaves out tensors, which are sent separately, and `held` objects, of which each rank has its own copy."""

    def __init__(self, file: io.BytesIO, held: Sequence[object]) -> None:
        super().__init__(file)
        self.held, self.tensors = held, list[Tensor]()

    def persistent_id(self, value: Any) -> Any:
        for place, own in enumerate(self.held):
            if value is own and value is not None:
                return "held", place
        if isinstance(value, torch.device):
            return "device", value.type
        if not isinstance(value, Tensor):
            return None
        x = value.detach()
        # Strides are kept: fused optimisers need those of a parameter in its momentum.
        x = x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
        self.tensors.append(x)
        return "tensor", tuple(x.shape), x.stride(), x.dtype, x.device.type


class _Unpickler(pickle.Unpickler):
    """Reads what another process of the same run has sent."""

    def __init__(self, file: io.BytesIO, held: Sequence[object], device: torch.device) -> None:
        super().__init__(file)
        self.held, self.device, self.tensors = held, device, list[Tensor]()

    def persistent_load(self, what: Any) -> Any:
        if what[0] == "held":
            return self.held[what[1]]
        device = self.device if what[-1] == self.device.type else torch.device(what[-1])
        if what[0] == "device":
            return device
        _, shape, stride, dtype, _ = what
        self.tensors.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
        return self.tensors[-1]


def _packed(value: Any, held: Sequence[object]) -> tuple[bytes, list[Tensor]]:
    file = io.BytesIO()
    pickler = _Pickler(file, held)
    pickler.dump(value)
    return file.getvalue(), pickler.tensors


def _unpacked(data: bytes, held: Sequence[object], device: torch.device) -> tuple[Any, list[Tensor]]:
    unpickler = _Unpickler(io.BytesIO(data), held, device)
    return unpickler.load(), unpickler.tensors


def _bytes(size: Tensor) -> Tensor:
    return torch.empty(int(size), dtype=torch.uint8)
