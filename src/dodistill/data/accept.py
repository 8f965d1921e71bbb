"""Images as people have them: tensors, arrays, data sets of torch, paths, names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DodistillError
from .images import Images, Shape
from .packed import Packed, open_images
from .rows import Rows

FORMS = (
    "a tensor or array, (images, labels), a torch Dataset or DataLoader, what load_images returns, FileRows of a "
    "packed file, or the path or name of a data set"
)


def accept(given: Any, shape: Shape, what: str, split: str = "train", labels: bool = False) -> Images | Packed:
    """Images uint8 [n, C, H, W] and, where there are some, labels. Those of a large packed file stay rows.

    Args:
        given: one of `FORMS`. Arrays are [n, C, H, W], [n, H, W, C] or [n, H, W] (grey), by which of them fits
            `shape`; they are uint8, or floats in [0, 1]. Items of a Dataset are an image or (image, label, ...); an
            image is a tensor [C, H, W] or a picture of Pillow. It is read to its end, once.
        shape: (C, H, W) of the model.
        what: names the images in messages.
        split: of a data set by path or name.
        labels: whether they are wanted; else those that come with the images are left out.

    Raises DodistillError, which names type or shape and the fix, for anything else.
    """
    if isinstance(given, str | Path):
        return open_images(given, split, labels, shape)
    if isinstance(given, Rows):
        given = Packed(given)
    if isinstance(given, Packed):
        return _rows(given, shape, what, labels)
    x, y, classes, by_number = given, None, _classes(given), False
    if hasattr(given, "x") and hasattr(given, "y"):  # Images, and what looks like them
        x, y, by_number = given.x, given.y, bool(getattr(given, "by_number", False))
    elif isinstance(given, tuple) or (isinstance(given, list) and len(given) == 2):
        if len(given) != 2:
            raise DodistillError(f"{what}: a tuple of {len(given)}; give (images, labels).")
        x, y = given
    elif not isinstance(given, Tensor | np.ndarray | list):
        x, y = _collected(given, shape[0], what)
    pixels = as_pixels(x, shape, what)
    if not labels or y is None:
        return Images(pixels)
    return Images(pixels, as_labels(y, len(pixels)), classes=classes, by_number=by_number)


def _rows(given: Packed, shape: Shape, what: str, labels: bool) -> Packed:
    if given.image_shape != tuple(shape):
        raise DodistillError(
            f"{what} images have shape {given.image_shape}, but the model reads {tuple(shape)} (C, H, W); pack them "
            "again."
        )
    return given if labels else Packed(given.x)


def _classes(given: Any) -> tuple[str, ...]:
    """The names of class folders by which labels are numbered, of `Images` and of torchvision's ImageFolder."""
    while hasattr(given, "dataset"):  # of a DataLoader, or of a part of a data set
        given = given.dataset
    if hasattr(given, "y") or (hasattr(given, "class_to_idx") and hasattr(given, "samples")):
        return tuple(map(str, getattr(given, "classes", ())))
    return ()


def as_pixels(given: Any, shape: Shape, what: str) -> Tensor:
    """uint8 [n, C, H, W] of a tensor or an array; see `accept`."""
    x = _tensor(given, f"{what} images")
    c, h, w = shape
    if x.dim() == 3 and c == 1:
        x = x[:, None]
    if x.dim() != 4 or 0 in x.shape:
        raise DodistillError(
            f"{what} images have shape {tuple(x.shape)}; they must be [n, C, H, W] or [n, H, W, C], and not empty."
        )
    if tuple(x.shape[1:]) != shape and tuple(x.shape[1:]) == (h, w, c):
        x = x.permute(0, 3, 1, 2).contiguous()
    if tuple(x.shape[1:]) != shape:
        raise DodistillError(
            f"{what} images have shape {tuple(x.shape[1:])}, but the model reads {shape} (C, H, W); resize them."
        )
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        kind = str(x.dtype).removeprefix("torch.")
        raise DodistillError(f"{what} images are {kind}; give uint8, or floats in [0, 1].")
    if not bool(torch.isfinite(x).all()):
        raise DodistillError(f"{what} images contain NaN or infinity; give uint8, or floats in [0, 1].")
    low, high = float(x.min()), float(x.max())
    if low < 0 or high > 1:
        raise DodistillError(
            f"{what} images range from {low:.3g} to {high:.3g}; give uint8, or floats in [0, 1], without normalisation."
        )
    return (x * 255).round().to(torch.uint8)


def as_labels(given: Any, n: int) -> Tensor:
    """Class numbers, long [n]."""
    y = _tensor(given, "labels")
    if y.shape != (n,):
        raise DodistillError(f"labels have shape {tuple(y.shape)}; give {n}, one for each image.")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        kind = str(y.dtype).removeprefix("torch.")
        raise DodistillError(f"labels are {kind}; give class numbers, as integers from 0.")
    return y.long()


def _tensor(value: Any, what: str) -> Tensor:
    """A tensor, a numpy array or nested lists of numbers as a tensor."""
    try:
        out: Tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DodistillError(f"{what} are a {type(value).__name__}; give {FORMS} ({error}).") from error
    return out


def _collected(given: Any, channels: int, what: str) -> tuple[Tensor, Tensor | None]:
    """All images of a Dataset (item by item) or a DataLoader (batch by batch), and all labels."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for item in _items(given, what):
        parts = item if isinstance(item, tuple | list) else (item,)
        x = parts[0] if isinstance(parts[0], Tensor) else _picture(parts[0], channels, what)
        images.append(x if x.dim() == 4 else x[None])
        if len(parts) > 1:
            labels.append(torch.as_tensor(parts[1]).reshape(-1))
    if not images:
        raise DodistillError(f"{what}: {type(given).__name__} has no items; give images.")
    try:
        return torch.cat(images), torch.cat(labels) if labels else None
    except (RuntimeError, TypeError) as error:
        raise DodistillError(f"{what}: the images are not of one size and type ({error}); resize them.") from error


def _items(given: Any, what: str) -> Iterator[Any]:
    if isinstance(given, Mapping):
        raise DodistillError(f"{what} are a {type(given).__name__}; give {FORMS}.")
    if hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        yield from (given[i] for i in range(len(given)))
    elif hasattr(given, "__iter__"):
        yield from given
    else:
        raise DodistillError(f"{what} are a {type(given).__name__}; give {FORMS}.")


def _picture(item: Any, channels: int, what: str) -> Tensor:
    """uint8 [C, H, W] of a picture of Pillow or an array [H, W] or [H, W, C]. One with a palette has the colours, or
    the greys, that a model of so many `channels` reads."""
    if isinstance(item, Image.Image) and item.mode in ("P", "PA", "1"):
        item = item.convert("RGB" if channels == 3 and item.mode != "1" else "L")
    try:
        x = torch.as_tensor(np.array(item))
    except (TypeError, ValueError) as error:
        raise DodistillError(f"{what}: an item is a {type(item).__name__}; give {FORMS}.") from error
    if x.dim() not in (2, 3) or x.dtype != torch.uint8:
        raise DodistillError(f"{what}: an item is a {type(item).__name__}; give pictures of 8 bits, or tensors.")
    return x[None] if x.dim() == 2 else x.permute(2, 0, 1)
