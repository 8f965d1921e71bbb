"""Encoded images one after the other, from a folder, from tar files (WebDataset) or from a Hugging Face data set.

A specification is a folder; a .tar file, or several as `shards/{000..012}.tar` or `shards/*.tar`, on this machine or at
a URL that fsspec reads (http://, s3://, ...); or `hf:OWNER/NAME`.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image

from ..errors import DodistillError
from .layouts import listing

Encoded = Path | bytes | Image.Image


@dataclass(frozen=True)
class Record:
    """One image: its name, its file, bytes or picture (None: unreadable), and the name of its class ("": unknown)."""

    name: str
    image: Encoded | None
    label: str = ""


@dataclass(frozen=True)
class Records:
    """Records in a fixed order. `total`: how many, if that is known beforehand; `classes`: names known beforehand."""

    of: Iterator[Record]
    total: int = 0
    classes: tuple[str, ...] = ()


def read_records(spec: str, split: str, labels: bool) -> Records:
    """The records of a specification. Raises DodistillError for one that is missing, empty or needs an extra."""
    if spec.startswith("hf:"):
        return _hugging_face(spec[3:], split)
    folder = Path(spec).expanduser()
    if ".tar" in spec and not folder.is_dir():
        shards = expand(spec)
        return Records(itertools.chain.from_iterable(_tar(shard) for shard in shards))
    if not folder.is_dir():
        raise DodistillError(f"{spec} is no folder, no .tar and no hf:OWNER/NAME; give one of them.")
    found = listing(folder, split, labels)
    named = (Record(str(p.relative_to(found.folder)), p, name) for p, name in zip(found.files, found.names))
    return Records(named, len(found.files), found.classes)


# -------------------------------------------------------------------------------------------------- tar files


def expand(spec: str) -> list[str]:
    """The files of `a/{000..012}.tar`, `a/{x,y}.tar` or `a/*.tar`, in order."""
    braces = re.search(r"\{([^{}]*)\}", spec)
    if braces:
        inner = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
        options = braces[1].split(",")
        if inner:
            low, high = int(inner[1]), int(inner[2])
            options = [f"{n:0{len(inner[1])}}" for n in range(low, high + 1)]
        return [file for o in options for file in expand(spec[: braces.start()] + o + spec[braces.end() :])]
    if "*" not in spec:
        return [spec]
    folder, _, pattern = spec.rpartition("/")
    if "://" in spec:
        files = sorted(str(f) for f in _fsspec().open_files(spec, "rb") or [])
    else:
        files = sorted(str(p) for p in Path(folder or ".").expanduser().glob(pattern))
    if not files:
        raise DodistillError(f"no file matches {spec}; correct the path.")
    return files


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise DodistillError("files at a URL need fsspec: pip install 'dodistill[remote]'") from error
    return fsspec


def _opened(shard: str) -> IO[bytes]:
    try:
        return _fsspec().open(shard, "rb").open() if "://" in shard else open(Path(shard).expanduser(), "rb")
    except OSError as error:
        raise DodistillError(f"cannot read {shard}: {error.strerror or error}; correct the path.") from error


def _tar(shard: str) -> Iterator[Record]:
    """The samples of a WebDataset shard: members that share a name up to its first dot; `.cls` or `.json` has the
    class.

    A member that is cut ends the shard with an unreadable record.
    """
    with _opened(shard) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|*") as archive:
                yield from _samples(shard, archive)
        except (tarfile.TarError, EOFError, OSError) as error:
            yield Record(f"{shard} ({error})", None)


def _samples(shard: str, archive: tarfile.TarFile) -> Iterator[Record]:
    endings = Image.registered_extensions()
    key, image, label = "", None, ""
    for member in archive:
        if not member.isfile():
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        mine = f"{folder}/{stem}"
        if mine != key and image is not None:
            yield Record(f"{shard}:{key}", image, label)
            image, label = None, ""
        key = mine
        found = archive.extractfile(member)
        content = b"" if found is None else found.read()
        if f".{ending.rpartition('.')[2].lower()}" in endings:
            image = content
        elif ending in ("cls", "cls.txt"):
            label = content.decode(errors="replace").strip()
        elif ending == "json" and not label:
            label = _label_in(content)
    if image is not None:
        yield Record(f"{shard}:{key}", image, label)


def _label_in(content: bytes) -> str:
    try:
        found = json.loads(content)
    except ValueError:
        return ""
    label = found.get("label", found.get("cls")) if isinstance(found, dict) else None
    return "" if label is None else str(label)


# ------------------------------------------------------------------------------------------------ Hugging Face


def _hugging_face(name: str, split: str) -> Records:
    """The rows of a data set of the hub or of a folder of it, streamed in its order."""
    try:
        import datasets
    except ImportError as error:
        raise DodistillError(f"hf:{name} needs datasets: pip install 'dodistill[datasets]'") from error
    wanted = {"train": ("train",), "test": ("test", "validation", "valid", "val")}[split]
    try:
        known = datasets.get_dataset_split_names(name)
        mine = next((s for s in wanted if s in known), known[0] if len(known) == 1 else None)
        if mine is None:
            raise DodistillError(f"hf:{name} has the splits {', '.join(known)}; none is {split}.")
        rows = datasets.load_dataset(name, split=mine, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        said = str(error).strip().partition("\n")[0]
        raise DodistillError(f"cannot read hf:{name}: {said}; correct the name, or give a folder.") from error
    features = rows.features or {}
    image = next((k for k, f in features.items() if isinstance(f, datasets.Image)), "image")
    label = next((k for k, f in features.items() if isinstance(f, datasets.ClassLabel)), "")
    names = tuple(features[label].names) if label else ()
    rows = rows.cast_column(image, datasets.Image(decode=False)) if image in features else rows
    size = rows.info.splits[mine].num_examples if rows.info.splits and mine in rows.info.splits else 0

    def each() -> Iterator[Record]:
        for i, row in enumerate(rows):
            found = row.get(image)
            found = (found.get("bytes") or Path(found["path"])) if isinstance(found, dict) else found
            known = names[row[label]] if label and row.get(label) is not None and row[label] >= 0 else ""
            yield Record(f"hf:{name}, row {i}", found, known)

    return Records(each(), size or 0, names)


def as_file(image: Encoded) -> Path | IO[bytes]:
    """What Pillow opens."""
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return io.BytesIO(file.getvalue())
    return io.BytesIO(image) if isinstance(image, bytes) else image
