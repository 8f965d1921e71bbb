"""A second device that is not there: another device by name, the CPU's memory in fact.

It finds what the CPU forgives and a GPU does not: tensors of two devices in one operation, an index lying elsewhere,
a generator of the wrong device, state that was loaded and left behind. It knows nothing of kernels, streams, precision.
The name is "lazy:0": a device that PyTorch knows, needs no driver for, and has no kernels of.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dodistill.commands import finished
from dodistill.core import context, runtime
from dodistill.engine import job, teach
from dodistill.evaluation import probe

THERE = torch.device("lazy:0")
aten = torch.ops.aten
_CROSSING = (aten.copy_.default, aten._to_copy.default)
_JOINING = (aten.cat.default, aten.stack.default)  #: take numbers, too, from one device only
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)  #: may be indexed from the CPU


class There(Tensor):
    """A tensor that says it lies THERE, around one of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=THERE,
        )  # fmt: skip
        return made

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"There({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Stream(torch.Generator):
    """A generator that says it lies THERE. Known again by its address, for the dispatcher wraps generators anew."""

    device = THERE  # type: ignore[assignment]
    known: ClassVar[dict[int, torch.Generator]] = {}

    def __init__(self) -> None:
        self.known[self._cdata] = self  # type: ignore[attr-defined]  # for good: no other gets its address


class _Pretend(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def bare(x: Any) -> Any:
    """What lies inside, also of nested state: as it would be read from a file."""
    return tree_map(lambda v: v.inner if isinstance(v, There) else v, x)


def _run(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    there = [x for x in leaves if isinstance(x, There)]
    here = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, There)]
    goes = bool(there)  # where the result will lie
    if kwargs.get("device") is not None:
        goes = torch.device(kwargs["device"]) == THERE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func is aten.copy_.default:
        goes = isinstance(args[0], There)
    elif func not in _CROSSING and there and here:
        _together(func, args, here)
    for x in leaves:
        if isinstance(x, torch.Generator) and (x._cdata in Stream.known) != goes:  # type: ignore[attr-defined]
            raise RuntimeError(f"{func}: the result lies {'there' if goes else 'here'}, its generator does not")
    out = func(*bare(args), **bare(kwargs))
    own = {id(bare(x)): x for x in leaves if isinstance(x, Tensor)}  # what was changed in place is handed back

    def handed(v: Any) -> Any:
        return v if not goes or not isinstance(v, Tensor) else own[id(v)] if id(v) in own else There(v)

    return tree_map(handed, out)


def _together(func: Any, args: Any, here: list[Tensor]) -> None:
    """Raise RuntimeError where a GPU would: a number may lie elsewhere, and the index of a tensor that lies there."""
    stray = [x for x in here if x.dim() or func in _JOINING]
    if func in _INDEXED:
        if not isinstance(args[0], There):
            raise RuntimeError(f"{func}: indices should be on the same device as the indexed tensor (cpu)")
        indices = {id(x) for x in tree_leaves(args[1])}
        stray = [x for x in stray if id(x) not in indices]
    if stray:
        raise RuntimeError(f"{func}: all tensors must be on one device; on the CPU: {[tuple(x.shape) for x in stray]}")


@contextlib.contextmanager
def pretended(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, every run believes in THERE; `patch` undoes it."""
    made, auto, asked = runtime.generator, torch.autocast, torch.is_autocast_enabled
    tensor, save = torch.tensor, torch.save

    def generator(device: torch.device, seed: int, purpose: str) -> torch.Generator:
        like = made(torch.device("cpu"), seed, purpose)
        return Stream().manual_seed(like.initial_seed()) if device == THERE else like

    def autocast(kind: str, **rest: Any) -> Any:
        return contextlib.nullcontext() if kind == THERE.type else auto(kind, **rest)

    def numbers(*args: Any, device: Any = None, **rest: Any) -> Tensor:  # the one factory that no mode sees
        return tensor(*args, **rest).to(device)

    for user in (job, finished, runtime):
        patch.setattr(user, "pick_device", lambda _="auto": THERE)
    for module in (context, runtime, teach, probe):
        patch.setattr(module, "generator", generator)
    patch.setattr(torch, "autocast", autocast)
    patch.setattr(torch, "is_autocast_enabled", lambda kind: kind != THERE.type and asked(kind))
    patch.setattr(torch, "tensor", numbers)
    patch.setattr(torch, "save", lambda what, *args, **rest: save(bare(what), *args, **rest))
    patch.setattr(importlib.import_module("torch.optim.optimizer"), "_get_fused_kernels_supported_devices",
                  lambda: [THERE.type, "cpu"])  # fmt: skip
    # `parameter.data = ...` would change what a wrapper says of itself, and not what lies inside.
    patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    with _Pretend():
        yield
