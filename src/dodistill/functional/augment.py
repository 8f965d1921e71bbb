"""Augmentation of whole batches on their device, each image with its own draw. Pure functions of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class View:
    """One way to show images to a network: `view(x, generator)`, each image with its own draw.

    crop: `shift` by up to `pad` pixels each way, or `resized`: a random part that keeps a share U(scale) of the area.
    padding: the pixels outside the image in a shift, `zeros` (black) or `reflect`; `none`: no shift at all.
    flip: mirror each image with probability 1/2.
    """

    crop: str = "shift"
    padding: str = "zeros"
    pad: int = 4
    flip: bool = True
    scale: tuple[float, float] = (0.08, 1.0)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x [B, C, H, W], float in [0, 1] -> the same shape and range; differentiable in x."""
        if self.crop == "resized":
            return resized_crop(x, generator, self.scale, self.flip)
        shifted = self.padding != "none"
        return crop_flip(x, self.pad if shifted else 0, generator, self.flip, self.padding if shifted else "zeros")

    def __str__(self) -> str:
        if self.crop == "resized":
            what = f"random resized crops of {self.scale[0]:g} to {self.scale[1]:g} of the area"
        else:
            what = "no crop" if self.padding == "none" else f"shifts by up to {self.pad} pixels, {self.padding} outside"
        return what + (", flips" if self.flip else ", no flips")


def crop_flip(x: Tensor, pad: int, generator: torch.Generator, flip: bool = True, mode: str = "zeros") -> Tensor:
    """Shift each image of x [B, C, H, W] by up to `pad` pixels each way; mirror it with probability 1/2 if `flip`.

    Any dtype; for floats differentiable in x. `generator` lives on x's device. Pixels outside the image
    are reflected (`mode="reflect"`, pad < H, W) or zero (`mode="zeros"`). Never synchronises with the device.
    """
    shifts, mirrored = shift_draws(len(x), pad, generator, flip)
    return shift_flip(x, shifts[0], shifts[1], mirrored, mode, pad)


def shift_draws(n: int, pad: int, generator: torch.Generator, flip: bool = True) -> tuple[Tensor, Tensor]:
    """The draws of `crop_flip`: shifts dy and dx [2, n] in pixels, and mirrored [n] bool, on the generator's device."""
    shifts = torch.randint(-pad, pad + 1, (2, n), device=generator.device, generator=generator)
    mirrored = torch.rand(n, device=generator.device, generator=generator) < 0.5
    return shifts, mirrored if flip else torch.zeros_like(mirrored)


def shift_flip(x: Tensor, dy: Tensor, dx: Tensor, mirrored: Tensor, mode: str, limit: int) -> Tensor:
    """`crop_flip` with given draws: dy, dx [B] in [-limit, limit] pixels, mirrored [B] bool.

    out[b, c, i, j] = x[b, c, i + dy[b], j' + dx[b]], j' = W-1-j where mirrored. One gather over flat pixels: of seven
    ways to index, the fastest on the CPU in uint8 and in float, forward and backward.
    """
    b, c, h, w = x.shape
    if mode not in ("reflect", "zeros"):
        raise ValueError(f"unknown padding {mode!r}; use reflect or zeros.")
    if mode == "reflect" and limit >= min(h, w):
        raise ValueError(f"cannot reflect {limit} pixels in images of {h}x{w}; use a smaller pad or mode='zeros'.")
    column = torch.arange(w, device=x.device)
    rows = torch.arange(h, device=x.device) + dy[:, None]  # [B, H]
    columns = torch.where(mirrored[:, None], column.flip(0), column) + dx[:, None]  # [B, W]
    pixels = _inside(rows, h, mode)[:, :, None] * w + _inside(columns, w, mode)[:, None, :]
    out = x.flatten(2).gather(2, pixels.view(b, 1, h * w).expand(b, c, h * w)).view(b, c, h, w)
    if mode == "zeros" and limit:
        seen = ((rows >= 0) & (rows < h))[:, None, :, None] & ((columns >= 0) & (columns < w))[:, None, None, :]
        out = torch.where(seen, out, torch.zeros((), dtype=x.dtype, device=x.device))
    return out


def resized_crop(
    x: Tensor, generator: torch.Generator, scale: tuple[float, float] = (0.25, 1.0), flip: bool = True
) -> Tensor:
    """A random part of each image of x [B, C, H, W], resized to H x W, mirrored with probability 1/2 if `flip`.

    The part has a share U(scale) of the area and an aspect ratio between 3/4 and 4/3, log-uniform; sides are cut to the
    image's. Bilinear, differentiable in x, one draw per image, in [min x, max x].
    """
    return resized_part(x, torch.rand(5, len(x), generator=generator, device=x.device), scale, flip)


def resized_part(x: Tensor, u: Tensor, scale: tuple[float, float], flip: bool) -> Tensor:
    """`resized_crop` with given draws u, uniform in [0, 1), [5, B]: area, aspect ratio, place (2), flip."""
    area = scale[0] + (scale[1] - scale[0]) * u[0]
    ratio = ((2 * u[1] - 1) * math.log(4 / 3)).exp()
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    cx, cy = (2 * u[2] - 1) * (1 - w), (2 * u[3] - 1) * (1 - h)  # the part's centre; the image is [-1, 1]^2
    if flip:
        w = torch.where(u[4] < 0.5, -w, w)
    zero = torch.zeros_like(w)
    theta = torch.stack([w, zero, cx, zero, h, cy], 1).view(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False)


def mix_weights(u: Tensor, h: int, w: int, how: str, share: float) -> Tensor:
    """Weights [n, 1, h, w] of each image against its partner: x m + y (1 - m); 1 outside of a random `share` of n.

    u: uniform draws in [0, 1), [4, n]. The first says whether an image is blended, the others how.
    `mixup`: one weight lam ~ U(0, 1) for the whole image (Zhang et al., 2018). `cutmix`: 0 in a box that covers a share
    1 - lam of the area before it is cut at the border, its centre uniform, else 1 (Yun et al., 2019).
    """
    keep = u[0] >= share
    if how == "mixup":
        return torch.where(keep, 1.0, u[1])[:, None, None, None].expand(-1, 1, h, w)
    half = (1 - u[1]).sqrt()[:, None] / 2

    def outside(centre: Tensor, length: int) -> Tensor:
        at_pixel = (torch.arange(length, device=u.device) + 0.5) / length
        return (at_pixel - centre[:, None]).abs() >= half

    box = ~(outside(u[2], h)[:, :, None] | outside(u[3], w)[:, None, :])
    return (keep[:, None, None] | ~box).float()[:, None]


def to_float(x: Tensor) -> Tensor:
    """uint8 0..255 -> fp32 in [0, 1]."""
    return x.to(torch.float32).mul_(1 / 255)


def to_uint8(x: Tensor, truncate: bool = False) -> Tensor:
    """Float, clipped to [0, 1] -> uint8, to the nearest level; `truncate` rounds down, as in some released code."""
    levels = x.detach().float().clamp(0, 1) * 255
    return (levels if truncate else levels + 0.5).to(torch.uint8)


def _inside(index: Tensor, n: int, mode: str) -> Tensor:
    """Indices outside 0..n-1 mapped into it: reflected without repetition of the edge, or clamped to the edge."""
    if mode == "zeros":
        return index.clamp(0, n - 1)
    index = index.abs()
    return torch.where(index >= n, 2 * (n - 1) - index, index)
