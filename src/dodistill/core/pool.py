"""The substitution inputs: uint8 images with the teacher's logits, and the draw of batches.

The pool owns the pixels of images that were made. Of the user's images (`Rows`) it keeps the row numbers alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data.reading import ReadAhead
from ..data.rows import Pixels, Rows, Selected
from ..errors import DodistillError
from ..functional.augment import to_uint8


class Pool:
    """At most `capacity` images, with the teacher's logits of each.

    Attributes:
        x: uint8 [size, C, H, W], the filled part; a tensor, or rows of the user's images. x[index] is a tensor.
        logits: float [size, K], the teacher's logits of the clean images.
        labels: long [size], true classes where the data have them, else the teacher's.
        seen: number of images ever offered.
        version: increases with every change, so that a checkpoint can skip an unchanged pool.

    Eviction, when full: `oldest` overwrites in order of arrival (a ring); `reservoir` keeps a uniform sample of
    everything ever offered (Vitter's algorithm R).
    """

    def __init__(
        self,
        capacity: int,
        image_shape: tuple[int, int, int],
        num_classes: int,
        device: torch.device,
        eviction: str = "oldest",
        rows: Rows | None = None,
    ) -> None:
        """`rows`: the user's images, of which only numbers are kept."""
        if capacity < 1:
            raise DodistillError(f"pool capacity is {capacity}; it must be at least 1 image.")
        if eviction not in ("oldest", "reservoir"):
            raise DodistillError(f"unknown eviction {eviction!r}; use 'oldest' or 'reservoir'.")
        self.capacity, self.eviction, self.device = capacity, eviction, device
        self.image_shape, self.num_classes = image_shape, num_classes
        self._x = torch.empty(0, *image_shape, dtype=torch.uint8, device=device)  # pixels; or numbers of `rows`
        self._of: Rows | None = None  # the rows that the numbers belong to; None: `_x` holds pixels
        self._given = rows
        self._logits = torch.empty(0, num_classes, device=device)
        self._labels = torch.empty(0, dtype=torch.long, device=device)
        self.size = self.seen = self.version = 0

    def __len__(self) -> int:
        return self.size

    @property
    def x(self) -> Pixels:
        filled = self._x[: self.size]
        return filled if self._of is None else Selected(self._of, filled)

    @property
    def ahead(self) -> ReadAhead | None:
        """The reader of images that come from a disk; None for others."""
        return self._of if isinstance(self._of, ReadAhead) else None

    def announce(self, index: Tensor) -> None:
        """Begin to read the images at `index`, where they come from a disk."""
        if self.ahead is not None:
            self.ahead.announce(self._x[index.to(self._x.device)])

    def some(self, n: int) -> Tensor:
        """At most n images, evenly spaced, on the host: uint8 [n, C, H, W]."""
        n = min(n, self.size)
        return self.x[torch.arange(n, device=self.device) * self.size // max(n, 1)].cpu()

    @property
    def logits(self) -> Tensor:
        return self._logits[: self.size]

    @property
    def labels(self) -> Tensor:
        return self._labels[: self.size]

    def class_shares(self) -> Tensor:
        """[K], the share of each class among the teacher's predictions of the pool."""
        counts = torch.bincount(self.logits.argmax(1), minlength=self.num_classes).float()
        return counts / max(self.size, 1)

    def _reserve(self, wanted: int) -> None:
        """Grow the buffers (doubling) up to the capacity: a small run never allocates a large pool."""
        have = len(self._x)
        if wanted <= have:
            return
        new = min(self.capacity, max(wanted, 2 * have))

        def grown(old: Tensor) -> Tensor:
            larger = torch.empty(new, *old.shape[1:], dtype=old.dtype, device=old.device)
            larger[: self.size] = old[: self.size]
            return larger

        self._x, self._logits, self._labels = grown(self._x), grown(self._logits), grown(self._labels)

    def _kept(self, images: Pixels) -> Tensor:
        """What is kept of the images: row numbers of the user's, pixels of others."""
        if isinstance(images, Rows):
            if images.base is self._given and (self._of is not None or not self.size):
                self._keep_numbers(images.base)
                return images.numbers
            images = images[:]
        if self._of is not None:  # other images join: all become pixels
            self._x, self._of = self.x[:].to(self.device), None
        return images if images.dtype == torch.uint8 else to_uint8(images)

    def _keep_numbers(self, rows: Rows) -> None:
        if self._of is None:
            self._of = ReadAhead(rows, self.device) if rows.slow else rows
            self._x = torch.empty(len(self._x), dtype=torch.long, device=rows.device)

    def add(self, images: Pixels, logits: Tensor, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
        """Take in images (float in [0, 1] or uint8, [n, C, H, W], or rows), their teacher logits [n, K] and true
        labels [n].

        Returns the slots (long, ascending) that now hold one of them.
        """
        labels = logits.argmax(1) if labels is None else labels
        n, held = len(images), self._kept(images)
        self._reserve(min(self.size + n, self.capacity))
        free = min(n, self.capacity - self.size)
        where = torch.arange(self.size, self.size + free, device=self.device)
        if free < n:  # the other images replace old ones
            arrival = torch.arange(self.seen + free, self.seen + n, device=self.device)
            if self.eviction == "oldest":
                slot = arrival % self.capacity
            else:
                slot = (torch.rand(n - free, generator=generator, device=self.device) * (arrival + 1)).long()
            where = torch.cat([where, slot])
        order = torch.arange(n, device=self.device)
        keep = where < self.capacity
        where, order = where[keep], order[keep]
        # A slot that is drawn twice keeps its last arrival, on every device: the order of writes is explicit.
        last = torch.full((self.capacity,), -1, dtype=torch.long, device=self.device)
        last.scatter_reduce_(0, where, order, "amax")
        slots = (last >= 0).nonzero()[:, 0]
        arrivals = last[slots]
        for kept, offered in ((self._x, held), (self._logits, logits), (self._labels, labels)):
            # each from its own device, to its own
            kept[slots.to(kept.device)] = offered[arrivals.to(offered.device)].to(kept.device, kept.dtype)
        self.size = min(self.size + n, self.capacity)
        self.seen += n
        self.version += 1
        return slots

    def state_dict(self) -> dict[str, Any]:
        # Copies: torch.save would write the whole buffer of a view, with its unused part.
        images = "x" if self._of is None else "rows"
        parts = {images: self._x[: self.size].clone(), "logits": self.logits.clone(), "labels": self.labels.clone()}
        shape = {} if self._of is None else {"image_shape": list(self.image_shape)}
        return parts | shape | {"seen": self.seen, "version": self.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DodistillError for row numbers, where the run has no images that they could belong to."""
        self._of, held = None, state["rows"] if "rows" in state else state["x"]
        self.size, self.seen, self.version = len(held), state["seen"], state["version"]
        if "rows" in state:
            if self._given is None:
                raise DodistillError("the pool holds rows of unlabelled images, and the run has none; give them.")
            self._keep_numbers(self._given)
        self._x = held.to(self.device if self._of is None else self._of.device)
        self._logits = state["logits"].to(self.device)
        self._labels = state["labels"].to(self.device)


class Draw:
    """The draw of the student's inputs: uniform, or in proportion to weights over the pool.

    The cumulative weights are computed once per change of the pool; a draw is then a binary search per image, without a
    host-device sync. Draws are with replacement, except from a small pool without weights (up to `WALK` batches): such
    draws walk through the pool in random order, so that each image of a method with few fresh batches is drawn once.
    """

    WALK = 8

    def __init__(self) -> None:
        self._cumulative: Tensor | None = None
        self._size = 0
        self._device = torch.device("cpu")
        self._order: Tensor | None = None  # the order of the walk, and the position in it
        self._at = 0

    def set(self, pool: Pool, weights: Tensor | None) -> None:
        """Raises DodistillError when the weights are negative, not finite, or all zero."""
        self._size, self._device = len(pool), pool.device
        self._cumulative = self._order = None
        self._at = 0
        if weights is not None:
            if not bool(torch.isfinite(weights).all() & (weights >= 0).all() & (weights.sum() > 0)):
                raise DodistillError("the intervention's draw weights must be finite, >= 0 and not all zero.")
            cumulative = weights.double().cumsum(0)
            self._cumulative = cumulative / cumulative[-1]

    def __call__(self, n: int, generator: torch.Generator) -> Tensor:
        """[n] long indices into the pool."""
        if self._cumulative is None and self._size <= self.WALK * n:
            return self._walk(n, generator)
        if self._cumulative is None:
            return torch.randint(self._size, (n,), generator=generator, device=generator.device)
        u = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        return torch.searchsorted(self._cumulative, u, right=True).clamp_(max=self._size - 1)

    def _walk(self, n: int, generator: torch.Generator) -> Tensor:
        parts, wanted = [], n
        while wanted:
            if self._order is None or self._at >= self._size:
                self._order, self._at = torch.randperm(self._size, generator=generator, device=generator.device), 0
            parts.append(self._order[self._at : self._at + wanted])
            self._at += len(parts[-1])
            wanted -= len(parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """The position of the walk. The weights follow from the pool: call `set` before loading this state."""
        return {"order": self._order, "at": self._at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        order = state["order"]
        self._order, self._at = None if order is None else order.to(self._device), state["at"]

    def shares(self, pool: Pool) -> Tensor:
        """[K], the expected class shares (by the teacher) of what is drawn."""
        if self._cumulative is None:
            return pool.class_shares()
        weights = self._cumulative.diff(prepend=self._cumulative.new_zeros(1)).float()
        out = torch.zeros(pool.num_classes, device=pool.device)
        return out.index_add_(0, pool.logits.argmax(1), weights)
