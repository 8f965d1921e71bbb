"""What a run folder keeps of the run's images. The pool is large, and `compare` deletes it with the checkpoints.

`inputs.safetensors` has a few hundred images, at even shares of the teacher's classes: exports are calibrated and
checked on them. `sample.safetensors` has up to 10 000 of the pool, drawn at random, for `look`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..data.rows import Pixels
from ..errors import DodistillError
from ..files import replacing
from ..functional.draws import even
from .run_folder import load_tensors, newest_pool

FILE = "inputs.safetensors"
MOST = 512  #: images of each kind
LARGEST = 32 << 20  #: bytes of each kind
POOL_FILE = "sample.safetensors"
POOL_MOST = 10_000  #: images of the pool


@dataclass(frozen=True)
class Inputs:
    """Some of the images of a run, with the teacher's logits of each.

    Attributes:
        x: uint8 [n, C, H, W], images that the student learned from, drawn at even shares of the teacher's classes.
        t: fp32 [n, K], the teacher's logits of them.
        held: uint8 [m, C, H, W], images that were held back from training, drawn at random.
        held_t: fp32 [m, K], the teacher's logits of them.
    """

    x: Tensor
    t: Tensor
    held: Tensor
    held_t: Tensor


def sample(x: Pixels, logits: Tensor, held: Pixels, held_logits: Tensor) -> Inputs:
    """The sample of a pool and of its held-back images; the same for the same pool."""
    n = max(1, min(MOST, LARGEST // max(1, math.prod(x.shape[1:])))) if len(x) else MOST
    g = torch.Generator().manual_seed(0)
    some = even(logits.argmax(1), n, g).to(x.device)
    other = torch.randperm(len(held), generator=g)[:n].to(held.device)
    return Inputs(x[some].cpu(), logits[some].float().cpu(), held[other].cpu(), held_logits[other].float().cpu())


def write_inputs(folder: Path, inputs: Inputs) -> None:
    """Write the sample into a run folder, atomically."""
    with replacing(folder / FILE) as file:
        file.write(save({name: value.contiguous() for name, value in vars(inputs).items()}))


def read_inputs(folder: Path) -> Inputs | None:
    """The sample in a run folder; of a run without the file, from its checkpoint; None if it has neither.

    Raises DodistillError for a damaged file.
    """
    path = folder / FILE
    if path.exists():
        return _read(path)
    try:
        pool = newest_pool(folder)
        held = load_tensors(folder / "checkpoint.pt")["acquirer"]["holdout"]
        return sample(pool["x"], pool["logits"], held["x"], held["logits"])
    except (DodistillError, KeyError, TypeError):
        return None


def keep_pool(folder: Path) -> None:
    """Write a random sample of a run's pool into its folder, atomically; nothing if it has no pool."""
    try:
        pool = newest_pool(folder)
    except DodistillError:
        return
    x, logits = pool["x"], pool["logits"]
    most = min(POOL_MOST, max(1, LARGEST // math.prod(x.shape[1:])))
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:most]
    with replacing(folder / POOL_FILE) as file:
        file.write(save({"x": x[some].contiguous(), "logits": logits[some].contiguous()}))


def read_pool(folder: Path) -> dict[str, Any] | None:
    """{"x": uint8 [n, C, H, W], "logits": [n, K]}: the pool of a run, or what `keep_pool` kept; None without both.

    Raises DodistillError for a damaged file.
    """
    path = folder / POOL_FILE
    try:
        return newest_pool(folder)
    except DodistillError:
        if not path.exists():
            return None
    try:
        parts = load(path.read_bytes())
        return {"x": parts["x"], "logits": parts["logits"]}
    except (SafetensorError, OSError, KeyError) as error:
        raise DodistillError(f"{path} is damaged ({error}); delete it.") from error


def _read(path: Path) -> Inputs:
    try:
        parts = load(path.read_bytes())
        _check(path, parts)
        return Inputs(**parts)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise DodistillError(f"{path} is damaged ({error}); delete it, and give --calibrate DATA.") from error


def _check(path: Path, parts: Mapping[str, Tensor]) -> None:
    for images, logits in (("x", "t"), ("held", "held_t")):
        x, t = parts[images], parts[logits]
        if x.dtype != torch.uint8 or x.dim() != 4 or t.dim() != 2 or len(x) != len(t) or not t.is_floating_point():
            raise DodistillError(
                f"{path} is damaged ({images} {x.dtype} {tuple(x.shape)}, {logits} {t.dtype} {tuple(t.shape)}); delete "
                "it, and give --calibrate DATA."
            )
