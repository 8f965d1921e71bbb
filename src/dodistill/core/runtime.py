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
    """`auto` is CUDA if available, else the CPU. Raises DodistillError for an unavailable device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DodistillError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:0.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DodistillError(f"device is {name!r}, but torch finds no CUDA device; use --device cpu (or auto).")
    return device


def at_once(device: torch.device, most: int) -> int:
    """The batch size of a pass without gradients, at most `most`.

    On the CPU it is 64: larger batches exceed the cache, and the allocator maps new memory for them in every layer.
    WRN-16-2 is 1.7 times as fast with 64 images at a time as with 512 (benchmarks/README.md).
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
    """Whether this device emulates `precision`: bf16 on a CPU without AMX or AVX512-BF16, about ten times slower than
    fp32."""
    if device.type != "cpu" or precision != "bf16":
        return False
    has: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if has.get("architecture", "x86_64") not in ("x86_64", "amd64"):  # unknown for other architectures
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
