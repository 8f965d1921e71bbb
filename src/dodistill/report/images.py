"""Images of a pool, as one grid or as one PNG file each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ..data.classes import folder_names
from ..errors import DodistillError
from ..files import replacing

GAP = 2
TILE = 64
LARGEST = 96


def _as_rgb(x: Tensor) -> npt.NDArray[np.uint8]:
    """[n, C, H, W], uint8 or float in [0, 1] -> uint8 [n, H, W, 3]. Without 3 channels, the first is shown as grey."""
    if x.ndim != 4:
        raise ValueError(f"images must have the shape [n, C, H, W], got {tuple(x.shape)}")
    x = x.detach().cpu()
    if x.dtype != torch.uint8:
        x = x.float().nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    x = x if x.shape[1] == 3 else x[:, :1].expand(-1, 3, -1, -1)
    return x.permute(0, 2, 3, 1).contiguous().numpy()


def grid(x: Tensor, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Tile `x` [n, C, H, W] (uint8, or float in [0, 1]) row by row; the gaps are transparent.

    Without `columns` the sheet is about 4:1; without `scale` a tile is about 64 pixels: small images are enlarged by a
    whole factor, images beyond `LARGEST` pixels are averaged down.
    """
    if scale is None:
        side = max(1, *x.shape[-2:]) if x.ndim == 4 else 1
        if side > LARGEST and len(x):
            size = [max(1, s * LARGEST // side) for s in x.shape[-2:]]
            x = torch.nn.functional.interpolate(x.detach().cpu().float(), size, mode="area").to(x.dtype)
        scale = max(1, round(TILE / side))
    tiles = _as_rgb(x)
    n, height, width = tiles.shape[:3]
    if n == 0:
        return Image.new("RGBA", (1, 1), (0, 0, 0, 0))
    columns = max(1, min(n, columns or -(-n // max(1, round((n / 4) ** 0.5)))))
    rows = -(-n // columns)
    tiles = tiles.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale
    sheet = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 4), dtype=np.uint8)
    for i in range(n):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[top : top + height, left : left + width, :3] = tiles[i]
        sheet[top : top + height, left : left + width, 3] = 255
    return Image.fromarray(sheet)


def save_grid(x: Tensor, path: str | Path, columns: int | None = None, scale: int | None = None) -> Path:
    """Write `grid(x)` as PNG, atomically."""
    path = Path(path)
    with replacing(path) as file:
        grid(x, columns, scale).save(file, format="PNG")
    return path


def export_images(
    pool_x: Tensor,
    folder: str | Path,
    labels: Tensor | Sequence[int] | None = None,
    names: Sequence[str] = (),
) -> int:
    """Write each image as PNG: `folder/CLASS/000012.png` with labels, `folder/000012.png` without. Returns n.

    CLASS is the class's of `names`, else its number, with zeros in front (`data.classes.folder_names`): `load_images`
    and a model of these classes read the labels back. Raises DodistillError for a folder that holds images already.
    """
    folder = Path(folder)
    endings = Image.registered_extensions()
    if there := next((p for p in folder.rglob("*") if p.suffix.lower() in endings), None):
        raise DodistillError(f"{folder} holds images already ({there.name}); delete them, or choose another folder.")
    n = int(pool_x.shape[0])
    numbers: list[int] | None = None
    if labels is not None:
        numbers = [int(k) for k in (labels.tolist() if isinstance(labels, Tensor) else labels)]
        if len(numbers) != n:
            raise ValueError(f"{n} images but {len(numbers)} labels")
        names = names or folder_names((), max(numbers, default=0) + 1)
    folder.mkdir(parents=True, exist_ok=True)
    made: set[Path] = set()
    for start in range(0, n, 512):
        grey = pool_x.shape[1] != 3
        for i, tile in enumerate(_as_rgb(pool_x[start : start + 512]), start):
            where = folder if numbers is None else folder / names[numbers[i]]
            if where.is_symlink():
                raise DodistillError(f"{where} is a symbolic link; remove it, or choose another folder.")
            if where not in made:
                where.mkdir(exist_ok=True)
                made.add(where)
            Image.fromarray(tile[:, :, 0] if grey else tile).save(where / f"{i:06d}.png")
    return n
