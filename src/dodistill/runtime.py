"""Device, precision and random numbers: what every part needs and none should decide alone."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .augment import View
from .config import Augment
from .errors import DodistillError

if TYPE_CHECKING:
    from .teacher import Teacher


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises DodistillError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DodistillError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:0.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DodistillError(f"device {name!r} asked for, but torch sees no CUDA here; use --device cpu (or auto).")
    return device


def at_once(device: torch.device, most: int) -> int:
    """How many images, `most` at most, a pass without gradients takes at once.

    On the CPU 64: larger batches fall out of the cache, and the allocator maps their memory anew in every layer; for
    WRN-16-2 64 images at a time are 1.7 times as fast as 512 (benchmarks/README.md).
    """
    return min(most, 64) if device.type == "cpu" else most


def autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[Any]]:
    """A factory of contexts for forward passes: `fp32`, `bf16`, or `auto` (bf16 on CUDA, fp32 on the CPU)."""
    if precision not in ("auto", "fp32", "bf16"):
        raise DodistillError(f"unknown precision {precision!r}; use auto, fp32 or bf16.")
    low = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    if not low:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def emulated(device: torch.device, precision: str) -> bool:
    """Whether this device has no arithmetic of its own for `precision`: bf16 on a CPU without AMX or AVX512-BF16 is
    emulated, and some ten times slower than fp32."""
    if device.type != "cpu" or precision != "bf16":
        return False
    has: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if has.get("architecture", "x86_64") not in ("x86_64", "amd64"):  # nothing is known of others
        return False
    return bool(has) and not any(has.get(name) for name in ("avx512_bf16", "amx_bf16"))


def generator(device: torch.device, seed: int, purpose: str) -> torch.Generator:
    """An explicit stream of random numbers, independent for each `purpose` under one run seed."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


M = TypeVar("M", bound=nn.Module)


def place(model: M, device: torch.device | None = None) -> M:
    """`model`, in place, on `device` (None: where it is) and in the package's one memory format, channels_last.

    The kernels of two formats round differently. So every network that is loaded, trained or delivered goes through
    here, and every batch through `laid_out`: a student from its file answers as the one in memory did, on one machine
    to the bit.
    """
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def laid_out(x: Tensor) -> Tensor:
    """Images x [B, C, H, W] in the memory format of `place`."""
    return x.contiguous(memory_format=torch.channels_last)


def seeded(build: Callable[..., M], generator: torch.Generator, *args: object) -> M:
    """Construct a module with PyTorch's default initialisation, from an explicit stream and no global state."""
    seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(*args)


def _silent(_message: str, _done: int, _total: int) -> None:
    return None


@dataclass
class Context:
    """What a source, an intervention or a criterion may know of the run it is built for."""

    teacher: Teacher
    device: torch.device
    seed: int = 0
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    augment: Augment = field(default_factory=Augment)
    view: View = field(default_factory=View)  #: what the teacher is shown during synthesis
    unlabeled: Tensor | None = None  #: uint8 [n, C, H, W], the images of a sampler
    labels: Tensor | None = None  #: long [n], their true classes, where the user has them and the source is data
    student: nn.Module | None = None  #: as it is before training, to read widths off (`taps.probe`)
    capacity: int = 65_536  #: slots of the pool, the range of `Batch.index`
    progress: Callable[[str, int, int], None] = _silent  #: (what, done, total) inside a long acquisition
    extra: Mapping[str, Any] = field(default_factory=dict)  #: what only one part needs (a foreign dictionary's model)

    @property
    def num_classes(self) -> int:
        return self.teacher.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.teacher.image_shape

    def generator(self, purpose: str) -> torch.Generator:
        return generator(self.device, self.seed, purpose)
