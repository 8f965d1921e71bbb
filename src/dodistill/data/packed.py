"""Images that stay in their file: a packed file (`pack`) too large for the memory, with its labels."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..errors import DodistillError
from .images import Images, Shape, beside, load_images, packed_file
from .rows import FileRows, Rows

#: Packed files of more GB stay on the disk; the environment variable DODISTILL_MEMORY_GB sets another limit.
MEMORY_GB = 2.0


@dataclass(frozen=True)
class Packed:
    """Images x, rows of uint8 [n, C, H, W], and, where known, labels y int64 [n]. The fields are those of `Images`."""

    x: Rows
    y: Tensor | None = None
    note: str = ""
    classes: tuple[str, ...] = ()
    by_number: bool = False

    def __len__(self) -> int:
        return len(self.x)

    @property
    def image_shape(self) -> Shape:
        return self.x.image_shape

    def select(self, index: Tensor) -> Packed:
        """The images at `index`, in its order; nothing is read."""
        return replace(self, x=self.x.select(index), y=None if self.y is None else self.y[index])


#: One of the two, for functions that return what they are given.
Given = TypeVar("Given", bound=Images | Packed)


def open_images(
    spec: str | Path,
    split: str = "train",
    labels: bool = True,
    image_shape: Shape | None = None,
    crop: float = 0.0,
    **more: Any,
) -> Images | Packed:
    """`load_images`, except that a packed file of more than `MEMORY_GB` is not read: its images stay rows.

    Raises DodistillError as `load_images` does.
    """
    path = packed_file(spec, split)
    if path is None or path.stat().st_size <= 1e9 * _memory():
        return load_images(spec, split, labels, image_shape, crop=crop, **more)
    rows = FileRows(path)
    if image_shape is not None and rows.image_shape != tuple(image_shape):
        raise DodistillError(
            f"{spec} holds images of shape {rows.image_shape} (channels, height, width), but the model takes "
            f"{tuple(image_shape)}; pack them again with --image-shape {','.join(map(str, image_shape))}."
        )
    y, classes = beside(path, len(rows)) if labels else (None, ())
    return Packed(rows, y, classes=classes)


def _memory() -> float:
    """`MEMORY_GB`, or what the environment says."""
    said = os.environ.get("DODISTILL_MEMORY_GB", "")
    try:
        limit = float(said) if said else MEMORY_GB
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise DodistillError(f"DODISTILL_MEMORY_GB is {said!r}; set it to a number of GB from 0, as 4.")
    return limit
