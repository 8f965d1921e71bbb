"""k-means++ seeding and Lloyd's iterations on the tensor's device, and PCA. Every random number comes from an explicit
generator, and no step waits for the device: the number of iterations is fixed, and empty clusters need no branch.

Arthur and Vassilvitskii, k-means++ (2007), with the greedy choice among a few candidates of its closing section.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 32768  #: rows at a time: bounds the memory at about CHUNK * (clusters + dims) numbers
_ZERO = 1e-6  # squared distances below this share of the squared norms are rounding noise


def pca(x: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Mean [d] and basis [d, dims] of the leading principal axes of x [n, d], strongest first, in fp32.

    The largest entry of each axis is positive, which fixes its sign. Axes beyond the rank of x are zero columns.
    `(x - mean) @ basis` are the coordinates.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        n, d = x.shape
        mean = x.mean(0)
        keep = min(dims, d, n)
        if n < d:  # the Gram matrix is the smaller one
            centred = x - mean
            values, vectors = torch.linalg.eigh(centred @ centred.T)
            values, vectors = values.flip(0)[:keep], centred.T @ vectors.flip(1)[:, :keep]
            basis = vectors / torch.linalg.vector_norm(vectors, dim=0).clamp_min(1e-30)
        else:
            scatter = x.new_zeros(d, d)
            for part in x.split(CHUNK):
                scatter += (part - mean).T @ (part - mean)
            values, vectors = torch.linalg.eigh(scatter)
            values, basis = values.flip(0)[:keep], vectors.flip(1)[:, :keep]
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        real = values > 1e-6 * values[:1].clamp_min(1e-30)
        basis = basis * torch.where(largest < 0, -1.0, 1.0) * real
        return mean, torch.cat([basis, basis.new_zeros(d, dims - keep)], 1)


def squared_distances(x: Tensor, centres: Tensor) -> Tensor:
    """||x_j - c_i||^2 as [n, k]; exactly 0 where only rounding noise is left. Centre the data first."""
    xx, cc = x.square().sum(1, keepdim=True), centres.square().sum(1)
    size = xx + cc
    gap = torch.addmm(size, x, centres.T, alpha=-2)
    return torch.where(gap > _ZERO * size, gap, 0.0)


def assign(x: Tensor, centres: Tensor, alive: Tensor | None = None, chunk: int = CHUNK) -> Tensor:
    """Index [n] of the nearest of `centres` [k, d], the first of equals; only centres that are `alive` [k] count."""
    with torch.autocast(x.device.type, enabled=False):
        bar = None if alive is None else torch.where(alive, 0.0, math.inf)
        parts = []
        for part in x.split(chunk):
            gap = squared_distances(part, centres)
            parts.append((gap if bar is None else gap + bar).argmin(1))
        return torch.cat(parts)


def sums(x: Tensor, labels: Tensor, k: int, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Sum [k, d] and count [k] of the members of each cluster, in the type of x. A product with the one-hot labels:
    unlike scattered additions it adds in a fixed order."""
    total, count = x.new_zeros(k, x.shape[1]), x.new_zeros(k)
    index = torch.arange(k, device=x.device)
    for part, label in zip(x.split(chunk), labels.split(chunk)):
        member = (label[:, None] == index).to(x.dtype)
        total.addmm_(member.T, part)
        count += member.sum(0)
    return total, count


def seed(x: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """k-means++: centres [k, d] among the rows of x [n, d], each drawn with a chance proportional to its squared
    distance from the centres so far, the best of 2 + ln k draws. Second, which centres [k] differ from all before:
    fewer than k when x has fewer than k distinct rows."""
    n = x.shape[0]
    tries = 2 + int(math.log(k))
    first = torch.randint(n, (1,), generator=generator, device=x.device)
    chosen = [x[first]]
    alive = [torch.ones(1, dtype=torch.bool, device=x.device)]
    xx = x.square().sum(1)
    gap = _to(x, xx, chosen[0])[0]  # [n], to the nearest centre so far
    draws = torch.rand(k, tries, generator=generator, device=x.device, dtype=torch.float64)
    for i in range(1, k):
        heap = gap.double().cumsum(0)
        pick = torch.searchsorted(heap, draws[i] * heap[-1], right=True).clamp_max(n - 1)
        closer = torch.minimum(gap, _to(x, xx, x[pick]))  # [tries, n]
        best = closer.sum(1).argmin(keepdim=True)
        chosen.append(x[pick[best]])
        alive.append(gap[pick[best]] > 0)
        gap = closer.index_select(0, best)[0]
    return torch.cat(chosen), torch.cat(alive)


def _to(x: Tensor, xx: Tensor, points: Tensor) -> Tensor:
    """Squared distances of `points` [p, d] to all x [n, d], as [p, n]: long rows, so that sums over n run fast."""
    size = points.square().sum(1, keepdim=True) + xx
    gap = torch.addmm(size, points, x.T, alpha=-2)
    return torch.where(gap > _ZERO * size, gap, 0.0)


@torch.no_grad()
def kmeans(
    x: Tensor, k: int, generator: torch.Generator, iterations: int = 10, chunk: int = CHUNK
) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters the rows of x [n, d], n >= 1, around k centres.

    Returns centres [k, d], alive [k] and labels [n] with labels == assign(x, centres, alive). A centre that is not
    alive repeats an earlier one. An empty cluster keeps its centre, and no label names it. Centre x beforehand.
    """
    if x.shape[0] == 0:
        raise ValueError("k-means needs at least one row")
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        centres, alive = seed(x, k, generator)
        labels = assign(x, centres, alive, chunk)
        for _ in range(iterations):
            total, count = sums(x, labels, k, chunk)
            centres = torch.where(count[:, None] > 0, total / count.clamp_min(1)[:, None], centres)
            labels = assign(x, centres, alive, chunk)
        return centres, alive, labels
