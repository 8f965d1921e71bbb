"""`pack`: decodes images once, into one file of uint8 rows that is read by position (`rows.FileRows`).

    OUT.npy           uint8 [n, C, H, W], in the order of the records
    OUT.labels.npy    int64 [n], where every image has a class
    OUT.json          where it came from: specification, split, shape, rows, skipped, names of the classes

While it works, the rows are in OUT.npy.part, their classes in OUT.npy.part.labels, and its state in OUT.npy.part.json.
A second start goes on from there.
"""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DodistillError, at_least
from ..files import claimed, read_object, replacing
from .classes import in_order
from .folder import crop_share, decode
from .records import Record, as_file, read_records

BLOCK = 256  #: records that are decoded together
SAVED = 32  #: blocks between two states
HEADER = 128  #: bytes before the rows

Shape = tuple[int, int, int]


@dataclass
class State:
    """What a start has done: `done` records, of which `rows` became rows; the `first` of those that were skipped."""

    given: dict[str, Any]
    done: int = 0
    rows: int = 0
    skipped: int = 0
    first: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Packed:
    """A packed file. `first`: the names of the first records that were skipped."""

    path: Path
    rows: int
    skipped: int
    first: tuple[str, ...]
    labelled: bool


def _silent(_done: int, _total: int) -> None:
    return None


def pack(
    spec: str,
    out: str | Path,
    image_shape: Shape,
    split: str = "train",
    labels: bool = True,
    crop: float = 0.0,
    workers: int = 0,
    progress: Callable[[int, int], None] = _silent,
) -> Packed:
    """Decode the images of `spec` (see `records`) into OUT.npy, resized to `image_shape` as folders are.

    Args:
        split: train or test.
        labels: keep the classes, where every image has one.
        crop: as in `load_images`.
        workers: threads that decode; 0: one for each core.
        progress: called with (records done, records in all, or 0 if that is unknown).

    Raises DodistillError for a specification without a readable image, and for an OUT that is there already.
    """
    path = Path(out)
    if path.suffix != ".npy":
        raise DodistillError(f"{path} must end in .npy; the file holds an array of images.")
    if path.exists():
        raise DodistillError(f"{path} is there already; delete it, or choose another file.")
    at_least(0, "pack", " (0: one for each core)", workers=workers)
    c, h, w = image_shape
    if c not in (1, 3) or min(h, w) < 1:
        raise DodistillError(f"image_shape is {tuple(image_shape)}; give channels (1 or 3), height and width.")
    part = crop_share(crop or (1.0 if split == "train" else 0.0), h)
    given = {"spec": spec, "split": split, "labels": labels, "image_shape": list(image_shape), "crop": part}
    path.parent.mkdir(parents=True, exist_ok=True)
    with claimed(path.with_name(f".{path.name}.lock"), str(path)):
        return _pack(given, path, image_shape, part, workers, progress)


def _pack(
    given: dict[str, Any], path: Path, shape: Shape, crop: float, workers: int, progress: Callable[[int, int], None]
) -> Packed:
    records = read_records(given["spec"], given["split"], given["labels"])
    raw, kept, listed = (path.with_name(f"{path.name}.part{ending}") for ending in ("", ".json", ".labels"))
    state, size = _state(kept, raw, given), int(np.prod(shape))
    lines = listed.read_bytes().split(b"\n")[:-1][: state.rows] if state.rows and listed.exists() else []
    if len(lines) < state.rows:
        raise DodistillError(
            f"{listed} has the classes of {len(lines)} of the {state.rows} images that are packed already; delete "
            f"{kept} and {raw.name} to begin anew."
        )
    labels = [line.decode() for line in lines]

    def decoded(record: Record) -> bytes | None:
        found = None if record.image is None else decode(as_file(record.image), *shape, crop)
        return None if found is None else found.transpose(2, 0, 1).tobytes()

    todo = itertools.islice(records.of, state.done, None)
    with (
        open(raw, "r+b" if raw.exists() else "w+b") as file, open(listed, "r+b" if listed.exists() else "w+b") as names,
        ThreadPoolExecutor(workers or os.cpu_count()) as pool, warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")  # Pillow's warnings; the count replaces them
        for one, end in ((file, HEADER + state.rows * size), (names, sum(len(line) + 1 for line in lines))):
            one.truncate(end)  # what the state counts on stays as it is
            one.seek(0, os.SEEK_END)
        for turn in itertools.count(1):
            block = list(itertools.islice(todo, BLOCK))
            for record, row in zip(block, pool.map(decoded, block)):
                state.done += 1
                if row is None:
                    state.skipped += 1
                    state.first = [*state.first, record.name][:3]
                    continue
                state.rows += 1
                labels.append(" ".join(record.label.split()))
                file.write(row)
                names.write(f"{labels[-1]}\n".encode())
            if not block or turn % SAVED == 0:
                for one in (file, names):
                    one.flush()
                    os.fsync(one.fileno())
                with replacing(kept) as saved:
                    saved.write(json.dumps(asdict(state)).encode())
            progress(state.done, records.total)
            if not block:
                break
        if not state.rows:
            raise DodistillError(f"none of the {state.done} records of {given['spec']} is a readable image.")
        file.seek(0)
        file.write(_header(state.rows, shape))
    done = _finish(path, raw, state, labels, records.classes)
    for part in (kept, listed):
        part.unlink(missing_ok=True)
    return done


def _state(kept: Path, raw: Path, given: dict[str, Any]) -> State:
    if not kept.exists() or not raw.exists():
        return State(given)
    found = read_object(kept, f"delete it and {raw.name} to begin anew")
    if found.get("given") != given:
        raise DodistillError(
            f"{kept} is of another start ({found.get('given')}); repeat that, or delete it and {raw.name}, to begin "
            "anew."
        )
    return State(**found)


def _header(rows: int, shape: Shape) -> bytes:
    """A .npy header (version 1.0) of `HEADER` bytes."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {(rows, *shape)}, }}"
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.ljust(HEADER - 11).encode() + b"\n"


def _finish(path: Path, raw: Path, state: State, labels: list[str], known: tuple[str, ...]) -> Packed:
    """The other files first: where OUT.npy is, everything is there."""
    labelled = bool(state.given["labels"]) and all(labels)
    classes: tuple[str, ...] = ()
    if labelled:
        classes = known if set(labels) <= set(known) else in_order({*labels, *known})
        number = {name: k for k, name in enumerate(classes)}
        with replacing(path.with_suffix(".labels.npy")) as file:
            np.save(file, np.array([number[name] for name in labels], np.int64))
    else:  # those of an earlier OUT.npy are not of these images
        path.with_suffix(".labels.npy").unlink(missing_ok=True)
    about = {**state.given, "rows": state.rows, "skipped": state.skipped, "classes": list(classes)}
    with replacing(path.with_suffix(".json")) as file:
        file.write(json.dumps(about, indent=1).encode())
    os.replace(raw, path)
    return Packed(path, state.rows, state.skipped, tuple(state.first), labelled)
