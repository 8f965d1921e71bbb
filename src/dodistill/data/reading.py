"""Reading images part by part, one part ahead where they come from a disk."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .rows import Pixels, Rows


def parts(images: Pixels, size: int, device: torch.device) -> Iterator[Tensor]:
    """The images on `device`, in parts of at most `size`: uint8 [B, C, H, W]. Of slow rows, one part is read ahead."""
    if isinstance(images, Tensor):
        for part in images.split(size):
            yield part.to(device, non_blocking=True)
        return
    numbers = torch.arange(len(images), device=images.device).split(size)
    if not images.slow:
        for some in numbers:
            yield images.take(some).to(device, non_blocking=True)
        return
    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(_read, images, some, device) for some in numbers[:1]]
        for k in range(len(numbers)):
            if k + 1 < len(numbers):
                ahead.append(reader.submit(_read, images, numbers[k + 1], device))
            yield ahead.pop(0).result().to(device, non_blocking=True)


def _read(rows: Rows, index: Tensor, device: torch.device) -> Tensor:
    """The rows at `index`, in pinned memory where the device copies from it."""
    x = rows.take(index)
    return x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x


class ReadAhead(Rows):
    """Rows of which the next batches are read in a thread, once they are known (`announce`)."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        """`device`: where the images are used."""
        self.rows, self.shape, self.device, self.slow = rows, rows.shape, rows.device, rows.slow
        self._to = device
        self._reader = ThreadPoolExecutor(1)
        self._coming: list[tuple[Tensor, Future[Tensor]]] = []

    def announce(self, index: Tensor) -> None:
        """Begin to read the rows at `index`, which the next `take` of the same numbers returns."""
        index = index.cpu()
        self._coming.append((index, self._reader.submit(_read, self.rows, index, self._to)))

    def forget(self) -> None:
        """Drop what was announced."""
        self._coming.clear()

    def take(self, index: Tensor) -> Tensor:
        index = index.cpu()
        for k, (known, images) in enumerate(self._coming):
            if torch.equal(known, index):
                del self._coming[: k + 1]
                return images.result()
        return self.rows.take(index)

    @property
    def base(self) -> Rows:
        return self.rows.base
