"""Images by row number, from memory or from a packed file (`pack`) that may be larger than the memory.

rows = FileRows("images.npy")            600 000 images that stay on the disk
rows[torch.tensor([5, 0])]               two of them, uint8 [2, C, H, W]
rows.select(torch.arange(1000))          the first thousand, as rows: nothing is read
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DodistillError
from ..functional.augment import to_uint8

READERS = 8  #: reads at a time; a disk that is asked for one row after the other is slower
SAMPLED = 1 << 26  #: bytes of the rows that a fingerprint reads

Index = Tensor | slice


class Rows(ABC):
    """n images, uint8 [n, C, H, W], read by row.

    `rows[index]` reads the images at `index`, long [B], a slice or a number, as a tensor on the rows' own device. As a
    tensor, rows have `shape`, `ndim`, `dtype`, `device` and a length.
    """

    shape: tuple[int, int, int, int]  #: (n, C, H, W)
    device: torch.device = torch.device("cpu")  #: where the images are read to, and row numbers best lie
    slow: bool = False  #: whether reading is worth a thread of its own (see `reading`)
    ndim: ClassVar[int] = 4
    dtype: ClassVar[torch.dtype] = torch.uint8

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.shape[1:]

    @property
    def nbytes(self) -> int:
        """Bytes of all images."""
        return int(np.prod(self.shape))

    @abstractmethod
    def take(self, index: Tensor) -> Tensor:
        """The images uint8 [B, C, H, W], on the rows' device, of the row numbers `index` [B], in its order.

        Raises DodistillError for a file that has changed or was cut, IndexError for a row that does not exist.
        """

    def __getitem__(self, index: Index | int) -> Tensor:
        if isinstance(index, int):
            return self.take(torch.tensor([index]))[0]
        return self.take(torch.arange(len(self))[index] if isinstance(index, slice) else index)

    def select(self, index: Index) -> Rows:
        """The images at `index`, in its order, as rows; nothing is read."""
        numbers = torch.arange(len(self), device=self.device)[index] if isinstance(index, slice) else index
        return Selected(self, numbers)

    @property
    def base(self) -> Rows:
        """The rows that hold the images."""
        return self

    @property
    def numbers(self) -> Tensor:
        """Long [n], the numbers of these images in `base`."""
        return torch.arange(len(self), device=self.device)

    def fingerprint(self) -> str:
        """16 hex digits of shape and content, the same for a tensor and a file that hold the same images.

        Of more than `SAMPLED` bytes, rows evenly spaced are read.
        """
        step = max(1, -(-self.nbytes // SAMPLED))
        digest = hashlib.sha256(f"{self.shape} {self.dtype}".encode())
        for some in torch.arange(0, len(self), step).split(256):
            digest.update(self.take(some).cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def _require(self, index: Tensor) -> None:
        if len(index) and not (int(index.min()) >= 0 and int(index.max()) < len(self)):
            raise IndexError(f"rows {int(index.min())} to {int(index.max())} of {len(self)}")


#: Images as a tensor uint8 [n, C, H, W] or as rows. Both have len, shape, dtype, device and [index].
Pixels = Tensor | Rows


class TensorRows(Rows):
    """Rows of a tensor uint8 [n, C, H, W], which stays where it is."""

    def __init__(self, x: Tensor) -> None:
        if x.dtype != torch.uint8 or x.ndim != 4:
            raise DodistillError(f"images are {x.dtype} {tuple(x.shape)}; rows must be uint8 [n, C, H, W].")
        n, c, h, w = x.shape
        self.x, self.shape, self.device = x, (n, c, h, w), x.device

    def take(self, index: Tensor) -> Tensor:
        return self.x[index.to(self.device)]


class Selected(Rows):
    """Some rows of others, by their numbers, long [n]."""

    def __init__(self, rows: Rows, numbers: Tensor) -> None:
        numbers = numbers.to(rows.device)
        self.rows, self._numbers = rows, numbers
        if isinstance(rows, Selected):
            self.rows, self._numbers = rows.rows, rows.numbers[numbers]
        self.shape, self.device, self.slow = (len(numbers), *rows.image_shape), rows.device, rows.slow

    @property
    def base(self) -> Rows:
        return self.rows.base

    @property
    def numbers(self) -> Tensor:
        return self._numbers

    def take(self, index: Tensor) -> Tensor:
        return self.rows.take(self._numbers[index.to(self.device)])


class FileRows(Rows):
    """Rows of a .npy file, uint8 [n, C, H, W], read by position, several at a time. Nothing stays in memory.

    Raises DodistillError for another array, and for a file that is shorter than its header says.
    """

    slow = True

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.shape, self._start = _header(file, self.path)
            self._file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._close = weakref.finalize(self, os.close, self._file)
        except OSError as error:
            raise DodistillError(
                f"cannot read {self.path}: {error.strerror}; give a file of `dodistill pack`."
            ) from error
        self._row = int(np.prod(self.image_shape))
        self._seek = threading.Lock()
        self._readers = ThreadPoolExecutor(READERS)
        have, want = os.fstat(self._file).st_size, self._start + len(self) * self._row
        if have < want:
            self.close()
            raise DodistillError(
                f"{self.path} is truncated: {have:,} bytes for {len(self):,} images, which take {want:,}; pack it "
                "again."
            )

    def take(self, index: Tensor) -> Tensor:
        index = index.cpu()
        self._require(index)
        out = np.empty((len(index), *self.image_shape), np.uint8)
        order = np.argsort(index.numpy(), kind="stable")  # in the order of the file
        parts = np.array_split(order, min(READERS, max(1, len(order))))
        list(self._readers.map(lambda part: self._fill(out, index.numpy(), part), parts))
        return torch.from_numpy(out)

    def _fill(self, out: NDArray[np.uint8], index: NDArray[np.int64], part: NDArray[np.int64]) -> None:
        for slot in part:
            row = memoryview(out[slot].reshape(-1))
            if self._read(row, self._start + int(index[slot]) * self._row) != self._row:
                raise DodistillError(f"{self.path} became shorter while it was read; pack it again.")

    def _read(self, into: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file, [into], start)
        with self._seek:  # Windows has no positioned reads
            os.lseek(self._file, start, os.SEEK_SET)
            found = os.read(self._file, len(into))
        into[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """Close the file. Reading after it raises an error."""
        self._readers.shutdown()
        self._close()


def _header(file: object, path: Path) -> tuple[tuple[int, int, int, int], int]:
    """The shape in a .npy header, and where the data begin."""
    try:
        version = np.lib.format.read_magic(file)  # type: ignore[arg-type]
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)  # type: ignore[arg-type]
    except ValueError as error:
        raise DodistillError(f"{path} is no .npy file ({error}); make one with `dodistill pack`.") from error
    if dtype != np.uint8 or len(shape) != 4 or fortran or shape[1] not in (1, 3) or 0 in shape:
        raise DodistillError(
            f"{path} holds {dtype} {shape}; rows are read from uint8 [n, C, H, W] with 1 or 3 channels, as `dodistill "
            "pack` writes them."
        )
    return shape, file.tell()  # type: ignore[attr-defined]


def rows_of(images: Pixels) -> Rows:
    """The images as rows; no copy."""
    return TensorRows(images) if isinstance(images, Tensor) else images


def as_uint8(images: Pixels) -> Pixels:
    """Images in 256 levels: those of a float tensor in [0, 1] are rounded; rows and uint8 stay as they are."""
    return to_uint8(images) if isinstance(images, Tensor) and images.dtype != torch.uint8 else images


def chosen(images: Pixels, index: Index) -> Pixels:
    """The images at `index`: of a tensor a tensor, of rows rows, of which nothing is read."""
    if isinstance(images, Rows):
        return images.select(index)
    return images[index if isinstance(index, slice) else index.to(images.device)]
