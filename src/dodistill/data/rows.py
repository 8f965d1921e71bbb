"""Images by row number, from memory or from a packed file (`pack`) that may be larger than the memory."""

from __future__ import annotations

import hashlib
import os
import threading
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DodistillError

READERS = 8  #: reads at a time; a disk that is asked for one row after the other is slower
SAMPLED = 1 << 26  #: bytes of the rows that a fingerprint reads


class Rows(ABC):
    """n images, uint8 [n, C, H, W], read by row."""

    shape: tuple[int, int, int, int]  #: (n, C, H, W)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.shape[1:]

    @abstractmethod
    def take(self, index: Tensor) -> Tensor:
        """The images uint8 [B, C, H, W], on the host, of the row numbers `index` [B], in its order.

        Raises DodistillError for a file that has changed or was cut, IndexError for a row that does not exist.
        """

    def fingerprint(self) -> str:
        """16 hex digits of the shape and of rows evenly spaced, as many as `SAMPLED` bytes have."""
        row = max(1, int(np.prod(self.image_shape)))
        step = max(1, -(-len(self) * row // SAMPLED))
        digest = hashlib.sha256(str(self.shape).encode())
        for some in torch.arange(0, len(self), step).split(256):
            digest.update(self.take(some).numpy().data)
        return digest.hexdigest()[:16]

    def _require(self, index: Tensor) -> None:
        if len(index) and not (int(index.min()) >= 0 and int(index.max()) < len(self)):
            raise IndexError(f"rows {int(index.min())} to {int(index.max())} of {len(self)}")


class TensorRows(Rows):
    """Rows of a tensor uint8 [n, C, H, W], which stays where it is."""

    def __init__(self, x: Tensor) -> None:
        if x.dtype != torch.uint8 or x.ndim != 4:
            raise DodistillError(f"images are {x.dtype} {tuple(x.shape)}; rows must be uint8 [n, C, H, W].")
        n, c, h, w = x.shape
        self.x, self.shape = x, (n, c, h, w)

    def take(self, index: Tensor) -> Tensor:
        self._require(index)
        return self.x[index.to(self.x.device)].cpu()


class FileRows(Rows):
    """Rows of a .npy file, uint8 [n, C, H, W], read by position, several at a time. Nothing stays in memory.

    Raises DodistillError for another array, and for a file that is shorter than its header says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.shape, self._start = _header(file, self.path)
            self._file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
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
        os.close(self._file)


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
