"""A folder of image files as one tensor. Files that are not images, and broken images, are counted and reported.

`share`, the side of the crop over the short side of the picture, selects one of two ways to h x w pixels:

* 1: resizes the largest centre crop of the target's aspect ratio. Used for all training images, and for small images.
* below 1, for evaluation: resizes the picture to a short side of h / share, and keeps the centre h x w pixels.
  0.875 is Resize(256) and CenterCrop(224), the protocol of published ImageNet accuracies. Training on random resized
  crops shows larger objects than the uncropped picture does, so a model scores less on uncropped pictures (Touvron et
  al., Fixing the train-test resolution discrepancy, NeurIPS 2019). Sizes and offsets are torchvision's, the filter is
  Pillow's bilinear one.
"""

from __future__ import annotations

import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import DodistillError
from ..files import shown
from .classes import in_order
from .layouts import listing

#: Raster formats, told apart by content. Pillow reads others by running programs of the system, such as Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
LARGE = 160  #: image height from which evaluation uses ImageNet's protocol

#: x uint8 [n, C, H, W], y long [n], files skipped, note, class names
Decoded = tuple[torch.Tensor, torch.Tensor | None, int, str, tuple[str, ...]]


def crop_share(given: float, height: int) -> float:
    """`given`; for 0, the usual share for images of `height`: 0.875 from 160 pixels on, else 1."""
    if not isinstance(given, int | float) or not 0 <= given <= 1:
        raise DodistillError(f"crop_share is {given!r}; it must lie in (0, 1], as in 0.875, or be 0, the default.")
    return float(given) or (0.875 if height >= LARGE else 1.0)


def load_folder(
    folder: Path, split: str, labels: bool, image_shape: tuple[int, int, int] | None, share: float = 1.0
) -> Decoded:
    """Every image of a split of `folder`, in order of path, resized to `image_shape` (1 or 3 channels).

    With `labels`, the labels of `layouts.listing`, if every image has one.
    Raises DodistillError for an empty folder, one whose lists do not fit, or one in which nothing can be decoded.
    """
    if image_shape is None:
        raise DodistillError(
            f"images in the folder {folder} are resized on reading: give image_shape=(C, H, W), on the command line "
            "--image-shape 3,64,64."
        )
    c, h, w = image_shape
    if c not in (1, 3):
        raise DodistillError(f"image_shape is {tuple(image_shape)}; image files have 1 or 3 channels.")
    part = crop_share(share, h)
    found = listing(folder, split, labels)
    folder, files = found.folder, found.files
    x = np.empty((len(files), c, h, w), np.uint8)

    def fill(index: int) -> bool:
        pixels = decode(files[index], c, h, w, part)
        if pixels is not None:
            x[index] = pixels.transpose(2, 0, 1)
        return pixels is not None

    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # Pillow's warnings; the count below replaces them
        good = np.fromiter(pool.map(fill, range(len(files))), bool, len(files))
    bad = [p for p, ok in zip(files, good) if not ok]
    if not good.any():
        raise DodistillError(
            f"none of the {len(files)} files in {shown(folder)} is a readable image (the first: "
            f"{shown(bad[0].name)}); give images."
        )
    note = ""
    if bad:
        named = ", ".join(shown(p.relative_to(folder)) for p in bad[:3]) + (", ..." if len(bad) > 3 else "")
        note = f"skipped {len(bad)} of {len(files)} files in {folder}, broken or not images: {named}"
    kept = [name for name, ok in zip(found.names, good) if ok]
    y: torch.Tensor | None = None
    classes: tuple[str, ...] = ()
    if labels and all(kept):
        classes = in_order({*kept, *found.classes})
        number = {name: k for k, name in enumerate(classes)}
        y = torch.tensor([number[name] for name in kept])
    # x itself where possible: a second copy may not fit into memory
    return torch.from_numpy(x[good] if bad else x), y, len(bad), note, classes


def decode(file: Path | IO[bytes], c: int, h: int, w: int, share: float) -> NDArray[np.uint8] | None:
    """One image [h, w, c]. None for a file that Pillow cannot read completely as one of `FORMATS`."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            image.load()
            whole = _eight_bits(image).convert("RGB" if c == 3 else "L")
            if share == 1:
                fitted = ImageOps.fit(whole, (w, h), Image.Resampling.BILINEAR)
            else:
                fitted = _centre(whole, h, w, share)
            return np.asarray(fitted, np.uint8).reshape(h, w, c)
    except Exception:  # its readers raise errors of many types for damaged files
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits a value with its shades in 8; Pillow's own conversion cuts all above 255 to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65_535) / 257).round().astype(np.uint8))


def _centre(image: Image.Image, h: int, w: int, share: float) -> Image.Image:
    """The centre h x w of `image`, resized so that it just covers h / share x w / share."""
    tall, wide = (math.floor(side / share + 1e-6) for side in (h, w))
    if image.width * tall < image.height * wide:  # the width is the short side
        tall = max(tall, image.height * wide // image.width)
    else:
        wide = max(wide, image.width * tall // image.height)
    left, top = round((wide - w) / 2), round((tall - h) / 2)
    right, bottom = left + w, top + h
    if wide * tall > 64 * w * h:  # a strip, too long to be resized as a whole: the same part, to rounding
        x, y = image.width / wide, image.height / tall
        return image.resize((w, h), Image.Resampling.BILINEAR, box=(left * x, top * y, right * x, bottom * y))
    return image.resize((wide, tall), Image.Resampling.BILINEAR).crop((left, top, right, bottom))
