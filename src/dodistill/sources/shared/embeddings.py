"""Label embeddings for a generator: one row of numbers per class."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...errors import DodistillError
from ...models.taps import penultimate


def classifier_rows(model: nn.Module, classes: int) -> Tensor:
    """E [K, d]: row k is the weight of class k in the last linear layer of `model` (or its last 1x1 convolution)."""
    with penultimate(model) as tap:
        rows = tap.layer.weight.detach().float().flatten(1)
    if len(rows) != classes:
        raise DodistillError(
            f"the teacher's last layer has {len(rows)} rows for {classes} classes, so they cannot be label embeddings; "
            "use --source.embedding orthogonal."
        )
    return rows.clone()


def orthogonal_rows(classes: int, generator: torch.Generator) -> Tensor:
    """E [K, K] with random orthonormal rows: no two labels are similar."""
    q, r = torch.linalg.qr(torch.randn(classes, classes, generator=generator, device=generator.device))
    rows: Tensor = q * r.diagonal().sign()
    return rows


def read_embedding(path: str, classes: int) -> Tensor:
    """E [K, d] from the only (or first) array of a .npy, .npz or .safetensors file. Reading it runs no code."""
    file, kinds = Path(path).expanduser(), (".npy", ".npz", ".safetensors")
    if file.suffix not in kinds:
        raise DodistillError(
            f"source.embedding is {path!r}; it must be classifier, orthogonal, or a file ending in {', '.join(kinds)}."
        )
    if not file.is_file():
        raise DodistillError(f"source.embedding: there is no file {path}; correct the path.")
    try:
        if file.suffix == ".safetensors":
            rows = next(iter(load_file(file).values()))
        else:
            found = np.load(file, allow_pickle=False)
            rows = torch.from_numpy(np.array(found if file.suffix == ".npy" else found[found.files[0]], np.float32))
    except (SafetensorError, OSError, ValueError, TypeError, EOFError, IndexError, StopIteration, KeyError,
            zipfile.BadZipFile) as error:  # fmt: skip
        raise DodistillError(
            f"source.embedding: {path} holds no readable numbers ({error}); give an array [{classes}, d]."
        ) from error
    if rows.dim() != 2 or len(rows) != classes or not rows.shape[1]:
        raise DodistillError(
            f"source.embedding: {path} holds shape {tuple(rows.shape)}; it must be ({classes}, d), one row per class."
        )
    if not bool(torch.isfinite(rows.float()).all()):
        raise DodistillError(f"source.embedding: {path} holds NaN or infinity; all numbers must be finite.")
    return rows.float()
