"""The view: the augmentation of the teacher's inputs during synthesis, from the config or chosen without data.

A teacher's BatchNorm statistics are those of its training images as augmented: shifted over a black border, reflected
at the border, or cropped and resized. Under another view natural images do not have these statistics, and a generator
that matches them learns other images. `auto` passes drawn pictures through the teacher under each candidate view. It
chooses the view whose statistics are nearest to the teacher's.
"""

from __future__ import annotations

import torch

from ..config.tree import ViewConfig
from ..errors import DodistillError
from ..functional import losses
from ..functional.augment import View, to_float
from ..models.taps import batchnorm_inputs
from ..models.teacher import Teacher
from ..sources.shared.pictures import draw

#: Pictures by which `auto` chooses, and how many.
PICTURES = {"shapes": 256, "leaves": 256}


def candidates(c: ViewConfig, image_shape: tuple[int, int, int]) -> dict[str, View]:
    """The candidate views of the config, by name; a single one if no setting is `auto`."""
    shorter = min(image_shape[1:])
    if shorter == 1 and c.padding in ("reflect", "auto") and c.crop != "resized":
        raise DodistillError(
            f"images of {image_shape[1]}x{image_shape[2]} have nothing to reflect; give --view.padding zeros."
        )
    pad = c.pad or max(1, shorter // 8)
    flip = image_shape[0] > 1 if c.flip is None else c.flip
    out = {}
    if c.crop in ("shift", "auto"):
        for padding in ("zeros", "reflect", "none") if c.padding == "auto" else (c.padding,):
            out[padding] = View("shift", padding, pad, flip, c.scale)
    if c.crop in ("resized", "auto"):
        out["resized"] = View("resized", "none", 0, flip, c.scale)
    return out


@torch.no_grad()
def mismatch(view: View, teacher: Teacher, seed: int = 0) -> float:
    """The BatchNorm loss of plain pictures under `view`: the distance from the teacher's running statistics, >= 0."""
    device = next(teacher.parameters()).device
    g = torch.Generator().manual_seed(seed)
    total = 0.0
    for kind, n in PICTURES.items():
        x = to_float(draw({kind: n}, teacher.image_shape, g, teacher.image_shape[0] == 1))
        x = view(x, torch.Generator().manual_seed(seed)).to(device)
        with batchnorm_inputs(teacher) as taps:
            teacher(x)
            total += float(losses.bn_statistics(taps, taps.modules))
    return total


def choose_view(c: ViewConfig, teacher: Teacher) -> View:
    """The view of a run. Raises DodistillError for `auto` with a teacher that has no BatchNorm statistics."""
    open_ = candidates(c, teacher.image_shape)
    if len(open_) == 1:
        return next(iter(open_.values()))
    if not teacher.has_batchnorm:
        raise DodistillError(
            "view: auto compares BatchNorm statistics, but this teacher has none; give --view.crop shift "
            "--view.padding zeros (or reflect, none)."
        )
    scores = {name: mismatch(view, teacher) for name, view in open_.items()}
    return open_[min(scores, key=lambda name: scores[name])]
