"""The labels of images as the numbers of a model's classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..errors import DodistillError
from .classes import listed, match
from .packed import Given

FIX = (
    "give the names in the order of the model's outputs: --classes FILE (one name a line) or --classes cat,dog,... "
    "(in Python classes=[...])."
)


def fitted(images: Given, names: Sequence[str], outputs: int | None, what: str, fix: str = FIX) -> Given:
    """The images with labels that are numbers of the model's classes, which have `names`, or are `outputs` in number.

    The classes of folders are matched by `classes.match`; labels that are numbers already are left as they are. The
    note names the model's classes that have no images. `what` names the images in messages; `fix` ends them. Raises
    DodistillError for folders that are not the model's classes.
    """
    y = images.y
    if y is None or images.by_number or not images.classes:
        return images
    found = match(images.classes, names, outputs, what, fix)
    if found is None:
        return images
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(found):
        raise DodistillError(
            f"{what}: labels go from {int(y.min())} to {int(y.max())}, but it has {len(found)} classes."
        )
    wanted = torch.tensor(found)[y]
    count = len(names) or outputs or 0
    shown = tuple(names) or (images.classes if len(images.classes) == count else tuple(map(str, range(count))))
    said = [images.note, _order(images.classes, found, names, what), _absent(wanted, shown, what)]
    note = " ".join(dict.fromkeys(text for text in said if text))
    return replace(images, y=wanted, classes=shown, note=note)


def _order(folders: Sequence[str], found: Sequence[int], names: Sequence[str], what: str) -> str:
    """A sentence where folders are words without names of the model to match, or numbers that are neither the model's
    names nor the numbers of its classes."""
    if not all(f.isascii() and f.isdigit() for f in folders):
        if names:
            return ""
        order = listed(folders, 8)
        return f"{what}: its folders are taken for the model's classes in this order: {order}; otherwise {FIX}"
    if all(name.isdigit() for name in names) if names else list(found) == list(map(int, folders)):
        return ""
    pairs = [f"{folder} is {names[k] if names else f'class {k}'}" for folder, k in zip(folders, found)]
    return f"{what}: the class folders are numbers: {listed(pairs, 4)}."


def _absent(y: torch.Tensor, shown: Sequence[str], what: str) -> str:
    """A sentence on the classes without images."""
    there = torch.bincount(y, minlength=len(shown)).tolist()
    lost = [name for name, n in zip(shown, there) if not n]
    if not lost:
        return ""
    which = f"{len(lost)} of the model's {len(shown)} classes" if len(lost) > 1 else f"one of the {len(shown)} classes"
    return f"{what} has no images of {which}: {listed(lost)}."
