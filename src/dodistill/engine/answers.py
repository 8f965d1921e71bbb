"""What methods return, checked: a method in a file of the user's may return anything."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..data.rows import Rows
from ..errors import DodistillError
from ..sources.shared.base import Acquired

MARGIN = 0.5  #: how far pixels may lie outside [0, 1]: they are clipped


def require_acquired(got: object, source: str, shape: tuple[int, int, int], classes: int) -> None:
    """Refuse a result that is no acquisition, images that the teacher does not take, and logits or labels that are not
    one for each image. Does not wait for the device."""
    if not isinstance(got, Acquired):
        raise DodistillError(
            f"source {source}: acquire returned {type(got).__name__}; it must return Acquired(images)."
        )
    x, t, y = got.images, got.logits, got.labels
    if not isinstance(x, Tensor | Rows):
        raise DodistillError(f"source {source}: acquire made images in a {type(x).__name__}; give a torch.Tensor.")
    if x.ndim != 4 or tuple(x.shape[1:]) != shape:
        raise DodistillError(
            f"source {source}: acquire made images of shape {tuple(x.shape)}; they must be [n, "
            f"{', '.join(map(str, shape))}], the teacher's image shape."
        )
    if isinstance(x, Tensor) and not x.is_floating_point() and x.dtype != torch.uint8:
        raise DodistillError(
            f"source {source}: acquire made images of type {_kind(x)}; give uint8, or floats in [0, 1]."
        )
    n = len(x)
    if n < 2:
        raise DodistillError(
            f"source {source}: an acquisition has {n} image(s); it needs at least 2, one to train on and one held back."
        )
    if t is not None and (not isinstance(t, Tensor) or tuple(t.shape) != (n, classes) or not t.is_floating_point()):
        raise DodistillError(
            f"source {source}: acquire returned logits that are {_said(t)}; they must be floats of shape "
            f"({n}, {classes}), the teacher's of each image."
        )
    if y is not None and (not isinstance(y, Tensor) or tuple(y.shape) != (n,) or y.dtype != torch.long):
        raise DodistillError(
            f"source {source}: acquire returned labels that are {_said(y)}; they must be int64 of shape ({n},), a "
            "class of each image."
        )


def require_sound(got: Acquired, source: str, classes: int) -> None:
    """Refuse images far outside [0, 1], and labels of no class. Waits for the device."""
    x, y = got.images, got.labels
    if isinstance(x, Tensor) and x.is_floating_point():
        low, high = (float(v) for v in x.detach().aminmax())
        if low < -MARGIN or high > 1 + MARGIN:
            raise DodistillError(
                f"source {source}: acquire made images from {low:.3g} to {high:.3g}; they must lie in [0, 1], without "
                "normalisation. Map them there, as [-1, 1] by (x + 1) / 2."
            )
    if y is not None and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise DodistillError(
            f"source {source}: acquire returned labels from {int(y.min())} to {int(y.max())}; the teacher has classes "
            f"0 to {classes - 1}."
        )


def require_terms(terms: object, who: str, trained: bool = False) -> None:
    """Refuse what is no mapping name -> scalar tensor. `trained`: they are a loss, of at least one term with a
    gradient."""
    if not isinstance(terms, Mapping):
        raise DodistillError(f'{who} returned {_said(terms)}; it must return a dict of scalars, as {{"gap": loss}}.')
    for name, value in terms.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise DodistillError(f"{who}: the term {name!r} is {_said(value)}; it must be a tensor of one number.")
    if trained and not any(value.requires_grad for value in terms.values()):
        raise DodistillError(
            f"{who} returned {'terms without a gradient' if terms else 'no terms'}; the student cannot learn from "
            "that. Compute them from the student's logits, without detach() or item()."
        )


def require_logits(made: object, s: Tensor, who: str) -> None:
    """Refuse compensated logits of another shape than the student's logits s."""
    if not isinstance(made, Tensor) or made.shape != s.shape:
        raise DodistillError(
            f"{who}: compensate returned {_said(made)}; it must return the student's logits, {tuple(s.shape)}."
        )


def require_gradient(student: nn.Module, who: str) -> None:
    """Refuse an update that has given no parameter of the student a gradient."""
    if all(p.grad is None for p in student.parameters()):
        raise DodistillError(
            f"{who}: backward gave the student no gradient, so it would not learn; call backward() on the sum of the "
            "terms."
        )


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _said(value: object) -> str:
    return (
        f"a {_kind(value)} tensor of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else (f"a {type(value).__name__}")
    )
