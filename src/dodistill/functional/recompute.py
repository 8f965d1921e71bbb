"""Recomputes activations in the backward pass instead of storing them: outputs of BatchNorm and the function after it.

A training pass stores BatchNorm's input and, after ReLU, its normalised copy for the next convolution. A few cheap
operations compute the copy from the input. Inside

    with recomputed():
        loss = net(x)...                 # and, for second derivatives, torch.autograd.grad(..., create_graph=True)

autograd stores a recipe in place of such a copy, and computes the copy when a derivative needs it. This saves nearly
half the activations of a network whose every convolution follows BatchNorm and ReLU (WRN), at the cost of its
elementwise operations. The first copy is bit-identical to the original. Later copies, made from its mean and variance,
are equal to rounding, and so are the derivatives of first and second order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.overrides import TorchFunctionMode

Recipe = Callable[[], Tensor]
#: Elementwise functions after BatchNorm that can be recomputed -> their in-place versions.
_ACTIVATIONS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    nnf.relu: nnf.relu, nnf.relu6: nnf.relu6, nnf.hardtanh: nnf.hardtanh, nnf.silu: nnf.silu,
    nnf.leaky_relu: nnf.leaky_relu, torch.relu: nnf.relu, torch.relu_: nnf.relu, torch.Tensor.relu: nnf.relu,
    torch.Tensor.relu_: nnf.relu,
}  # fmt: skip


class _Kept:
    """A tensor that autograd stores, or the recipe to recompute it."""

    def __init__(self, tensor: Tensor, recipe: Recipe | None) -> None:
        self.tensor, self.recipe = None if recipe is not None else tensor, recipe
        self.version = tensor._version


class recomputed(TorchFunctionMode):
    """Within the block, activations after BatchNorm in train mode are recomputed for the backward passes; see above.

    Raises RuntimeError in the backward pass, as autograd does, if a tensor that it needs was changed in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: weakref.WeakKeyDictionary[torch.UntypedStorage, tuple[Any, Recipe]] = weakref.WeakKeyDictionary()
        self.last: tuple[Recipe, Tensor] | None = None  # the last recomputed tensor
        self.fresh: list[_Kept] | None = None  # tensors stored by the running function

    def __enter__(self) -> recomputed:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self.hooks.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.hooks.__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        recipe: Recipe | None = None
        if func is nnf.batch_norm:
            recipe = _norm(*args, **kwargs)
        elif func in _ACTIVATIONS:
            before = self._find(args[0] if args else kwargs["input"])
            if before is not None:
                recipe = _then(before, func, *args, **kwargs)
        if recipe is None:
            return func(*args, **kwargs)
        self.fresh = []
        out = func(*args, **kwargs)
        for kept in self.fresh:  # ReLU stores its own output, which had no recipe yet
            if kept.tensor is not None and _same(kept.tensor, out):
                kept.tensor, kept.recipe = None, recipe
        self.fresh = None
        self._know(out, recipe)
        return out

    def _know(self, tensor: Tensor, recipe: Recipe) -> None:
        self.known[tensor.untyped_storage()] = (_view(tensor), recipe)

    def _find(self, tensor: Tensor) -> Recipe | None:
        """The recipe of a tensor, if it has one and was not changed since."""
        view, recipe = self.known.get(tensor.untyped_storage(), (None, None))
        return recipe if view == _view(tensor) else None

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor, self._find(tensor))
        if self.fresh is not None:
            self.fresh.append(kept)
        return kept

    def _unpack(self, kept: _Kept) -> Tensor:
        if kept.recipe is None:
            assert kept.tensor is not None
            return _unchanged(kept.tensor, kept.version)
        if self.last is None or self.last[0] is not kept.recipe:  # several functions in a row need the same tensor
            self.last = None
            with torch.no_grad():
                self.last = kept.recipe, kept.recipe()
            self._know(self.last[1], kept.recipe)  # a gradient that is differentiated stores it again
        return self.last[1]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage() is b.untyped_storage() and _view(a) == _view(b)


def _view(tensor: Tensor) -> tuple[Any, ...]:
    """Its layout in memory, and its version, the number of in-place changes."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor._version


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor {list(tensor.shape)} that the backward pass needs was changed in place after the forward pass "
            f"(version {tensor._version}, not {version}); replace the in-place operation, as `x += y` by `x = x + y`."
        )
    return tensor


# The parameters are those of torch.nn.functional.batch_norm, by name. None: this file does not handle the case.
def _norm(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
          bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
          eps: float = 1e-5) -> Recipe | None:  # fmt: skip
    if not training:
        return None
    tensors = [t if t is None else t.detach() for t in (input, weight, bias)]
    versions = [0 if t is None else t._version for t in tensors]
    found: list[Tensor] = []  # mean and 1 / variance, from the first computation

    def again() -> Tensor:
        x, w, b = (t if t is None else _unchanged(t, v) for t, v in zip(tensors, versions))
        out: Tensor
        if found:
            return torch.ops.aten.native_batch_norm(x, w, b, *found, False, 0.0, 0.0)[0]  # type: ignore[no-any-return]
        out, mean, r = torch.ops.aten.native_batch_norm(x, w, b, None, None, True, momentum, eps)
        found.extend((mean, 1 / (r * r)))
        return out

    return again


def _then(before: Recipe, func: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Recipe:
    """The recipe of `func` applied to the result of `before`."""
    settings = args[: {nnf.hardtanh: 2, nnf.leaky_relu: 1}.get(func, 0)]  # without a positional `inplace`
    return lambda: _ACTIVATIONS[func](before(), *settings, **kwargs | {"inplace": True})
