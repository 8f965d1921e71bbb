"""A folder of image files as one tensor. What is no image, or a broken one, is counted and said, never fatal."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .errors import DodistillError

Decoded = tuple[torch.Tensor, torch.Tensor | None, int, str]  #: x uint8 [n, C, H, W], y long [n], files skipped, note


def load_folder(folder: Path, split: str, labels: bool, image_shape: tuple[int, int, int] | None) -> Decoded:
    """Every image below `folder`, in order of path, resized to `image_shape` (1 or 3 channels).

    Labels are the class subfolders, numbered in order of name, when every image lies in one and `labels`.
    Raises DodistillError for an empty folder, or one in which nothing can be decoded.
    """
    inner = [folder / name for name in ((split, "val") if split == "test" else (split,))]
    folder = next((f for f in inner if f.is_dir()), folder)
    if image_shape is None:
        raise DodistillError(f"images in the folder {folder} are resized on reading: give image_shape=(C, H, W).")
    c, h, w = image_shape
    if c not in (1, 3):
        raise DodistillError(f"image files have 1 or 3 channels; image_shape is {tuple(image_shape)}.")
    try:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
    except OSError as error:
        raise DodistillError(f"cannot read {folder}: {error}") from error
    if not files:
        raise DodistillError(f"the folder {folder} is empty; put images (PNG, JPEG, ...) into it or its subfolders.")
    x = np.empty((len(files), c, h, w), np.uint8)

    def decode(index: int) -> bool:
        pixels = _decode(files[index], c, h, w)
        if pixels is not None:
            x[index] = pixels.transpose(2, 0, 1)
        return pixels is not None

    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files; the count below says it better
        good = np.fromiter(pool.map(decode, range(len(files))), bool, len(files))
    bad = [p for p, ok in zip(files, good) if not ok]
    if not good.any():
        raise DodistillError(
            f"none of the {len(files)} files in {folder} is a readable image (the first: {bad[0].name})."
        )
    note = ""
    if bad:
        named = ", ".join(str(p.relative_to(folder)) for p in bad[:3]) + (", ..." if len(bad) > 3 else "")
        note = f"skipped {len(bad)} of {len(files)} files in {folder}, broken or no images: {named}"
    kept = [p.relative_to(folder) for p, ok in zip(files, good) if ok]
    y = None
    if labels and all(len(p.parts) > 1 for p in kept):
        classes = {name: k for k, name in enumerate(sorted({p.parts[0] for p in kept}))}
        y = torch.tensor([classes[p.parts[0]] for p in kept])
    return torch.from_numpy(x[good] if bad else x), y, len(bad), note  # no second copy of what may fill the memory


def _decode(path: Path, c: int, h: int, w: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]] | None:
    """One image [h, w, c]: the short side resized, the centre kept. None for what Pillow cannot read to its end."""
    try:
        with Image.open(path) as image:
            image.load()
            fitted = ImageOps.fit(image.convert("RGB" if c == 3 else "L"), (w, h), Image.Resampling.BILINEAR)
            return np.asarray(fitted, np.uint8).reshape(h, w, c)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return None
