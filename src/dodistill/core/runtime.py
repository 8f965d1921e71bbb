"""Device and random numbers, for all parts of a run."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

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
    if device.type == "meta":
        raise DodistillError(f"device {name!r} computes nothing; use auto, cpu, cuda or cuda:0.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DodistillError(f"device is {name!r}, but torch finds no CUDA device; use --device cpu (or auto).")
    try:
        torch.empty(1, device=device)
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError: each backend has its own
        said = str(error).partition("\n")[0] or type(error).__name__
        raise DodistillError(f"device is {name!r}, which torch cannot use here ({said}); use --device cpu.") from error
    return device


def at_once(device: torch.device, most: int) -> int:
    """The batch size of a pass without gradients, at most `most`.

    On the CPU it is 64: larger batches exceed the cache, and the allocator maps new memory for them in every layer.
    WRN-16-2 is 1.7 times as fast with 64 images at a time as with 512 (benchmarks/README.md).
    """
    return min(most, 64) if device.type == "cpu" else most


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """In this block a GPU runs its deterministic kernels, so that two runs have the same bits. A CPU always does.

    The few operations that have no deterministic kernel run as they are.
    """
    if device.type != "cuda":
        yield
        return
    # cuBLAS reads this when it is first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn, fill = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    before = (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic, fill.fill_uninitialized_memory,
    )  # fmt: skip
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        cudnn.deterministic, fill.fill_uninitialized_memory = True, False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic implementation.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, fill.fill_uninitialized_memory = before[2:]


def peak_memory_mb(device: torch.device) -> float | None:
    """The most memory so far, in MiB: allocated on a CUDA device, else resident in this process. None where the system
    does not tell (Windows)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def generator(device: torch.device, seed: int, purpose: str) -> torch.Generator:
    """An explicit stream of random numbers, independent for each `purpose` under one run seed."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def restore_stream(stream: torch.Generator, state: torch.Tensor) -> None:
    """Give a stream the state that `get_state` returned, as of a checkpoint.

    The states of CPU and GPU differ in kind. One of the other kind seeds the stream: the run goes on, with other random
    numbers than on one device.
    """
    state = state.cpu()
    if state.shape == stream.get_state().shape:
        stream.set_state(state)
    else:
        digest = hashlib.sha256(state.numpy().tobytes()).digest()
        stream.manual_seed(int.from_bytes(digest[:7], "big"))


@contextmanager
def limited_threads(n: int) -> Iterator[None]:
    """In this block torch computes with `n` CPU threads; 0: as before. (Even the number that is set already changes
    how MKL chooses its threads, and with it bits.)"""
    if not n:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def seeded_steps(device: torch.device, seed: int, rank: int = 0) -> Iterator[Callable[[int], None]]:
    """In this block, `begin(step)` seeds torch's global streams, from which dropout draws, for one step of a run.

    So a resumed run draws the masks of one that was not stopped, and no two runs in a process share a stream. `rank`:
    which of several processes this is. Afterwards the streams are as before.
    """
    base = generator(device, seed, f"global {rank}").initial_seed()
    streams = [torch.default_generator]  # torch.manual_seed would take a millisecond without a GPU
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        streams.append(torch.cuda.default_generators[index])

    def begin(step: int) -> None:
        for stream in streams:
            stream.manual_seed(base + step)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield begin


M = TypeVar("M", bound=nn.Module)


def seeded(build: Callable[..., M], generator: torch.Generator, *args: object) -> M:
    """Construct a module with PyTorch's default initialisation, seeded from `generator`."""
    with seeding(int(torch.randint(2**31, (1,), generator=generator, device=generator.device))):
        return build(*args)
