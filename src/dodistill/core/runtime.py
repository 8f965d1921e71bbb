"""Device, precision and random numbers, as all parts of a run use them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import DodistillError
from ..functional.fresh_weights import seeding


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
    """How many images, at most `most`, a pass without gradients takes at once.

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


def seeded(build: Callable[..., M], generator: torch.Generator, *args: object) -> M:
    """Construct a module with PyTorch's default initialisation, seeded from `generator`."""
    with seeding(int(torch.randint(2**31, (1,), generator=generator, device=generator.device))):
        return build(*args)
