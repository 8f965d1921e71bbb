"""Which files of a folder are read, and the class of each. No file is decoded here.

* Class folders: `CLASS/.../FILE`, perhaps below `train` and `test` (or `val`). Classes are numbered in order of name,
  or of value if all names are numbers. If both splits exist, the classes of both are numbered together, so that a label
  means the same in either. A class folder may be a symbolic link, as for torchvision's ImageFolder.
* Tiny-ImageNet as published (the folder `tiny-imagenet-200`, known by its `wnids.txt`): `train/WNID/images/FILE`;
  `val/images/FILE` with one line `FILE WNID ...` for each in `val/val_annotations.txt`. Split `test` is `val`: the
  folder `test` has no labels. The classes are those of `wnids.txt`, numbered in order of name, as torchvision's
  ImageFolder numbers `train`; the file itself is not sorted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import DodistillError

_CLASSES, _LIST = "wnids.txt", "val_annotations.txt"


@dataclass(frozen=True)
class Listing:
    """Files and the name of each one's class ("" where it has none)."""

    folder: Path
    files: list[Path]
    names: list[str]
    classes: tuple[str, ...] = ()  #: all class names in order, including classes without a file here


def listing(folder: Path, split: str, labels: bool) -> Listing:
    """The files of the `split` of `folder`, in order of path; all files where there is no such subfolder.

    Raises DodistillError for a folder that is unreadable or empty, and, with `labels`, if Tiny-ImageNet's lists do not
    fit its files.
    """
    try:
        found = _tiny_imagenet(folder, split, labels) or _class_folders(folder, split, labels)
    except (OSError, UnicodeDecodeError) as error:
        raise DodistillError(f"cannot read {folder}: {error}") from error
    if not found.files:
        raise DodistillError(
            f"the folder {found.folder} is empty; put images (PNG, JPEG, ...) into it or its subfolders."
        )
    return found


def _class_folders(folder: Path, split: str, labels: bool) -> Listing:
    if labels and any((part / _LIST).is_file() for part in (folder, folder / "val")):
        raise DodistillError(
            f"{folder} holds Tiny-ImageNet's {_LIST} without its {_CLASSES}, which numbers the classes; put {_CLASSES} "
            "beside the folders train and val, as published."
        )
    splits = {"train": ("train",), "test": ("test", "val")}
    followed = {
        name: next((folder / n for n in names if (folder / n).is_dir()), None) for name, names in splits.items()
    }
    here, other = followed[split] or folder, followed["train" if split == "test" else "test"]
    files = sorted(p for p in _below(here) if p.is_file())
    names = [_first(p.relative_to(here)) for p in files]
    beside = _with_images(other) if labels and here != folder and other is not None else set()
    return Listing(here, files, names, tuple(sorted(beside)) if beside & set(names) else ())


def _with_images(folder: Path) -> set[str]:
    """The subfolders of `folder` that hold a file with the name of an image."""
    endings = Image.registered_extensions()
    return {
        sub.name for sub in folder.iterdir() if sub.is_dir() and any(p.suffix.lower() in endings for p in _below(sub))
    }


def _below(top: Path) -> Iterator[Path]:
    """What is below `top` and no folder. Links to folders are followed, but not to one that they are in."""
    real = Path(os.path.realpath(top))
    above = {os.fspath(top): frozenset(map(str, (real, *real.parents)))}
    for here, folders, files in os.walk(top, followlinks=True):
        chain = above.pop(here)
        inside = {name: os.path.realpath(os.path.join(here, name)) for name in folders}
        folders[:] = [name for name in folders if inside[name] not in chain]
        above |= {os.path.join(here, name): chain | {inside[name]} for name in folders}
        yield from (Path(here, name) for name in files)


def _first(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else ""


def _tiny_imagenet(folder: Path, split: str, labels: bool) -> Listing | None:
    """None for another layout. `folder` may also be its `train` or `val` alone, whatever the split."""
    root, part = folder, "train" if split == "train" else "val"
    if not (root / _CLASSES).is_file() and folder.name in ("train", "val"):
        root, part = folder.parent, folder.name
    here = root / part
    if not (root / _CLASSES).is_file() or not here.is_dir():
        return None
    if part == "val" and (here / "images").is_dir():
        here = here / "images"
    files = sorted(p for p in _below(here) if _visible(p))
    if not labels:
        return Listing(here, files, [""] * len(files))
    classes = {line.split()[0] for line in (root / _CLASSES).read_text(encoding="utf-8").splitlines() if line.strip()}
    if not classes:
        raise DodistillError(f"{root / _CLASSES} is empty; it must name the classes, one on each line.")
    if here.name == "images":
        wnid = _annotated(root / part / _LIST, {p.relative_to(here).as_posix() for p in files}, classes)
        return Listing(here, files, [wnid[p.relative_to(here).as_posix()] for p in files], tuple(classes))
    names = [_first(p.relative_to(here)) for p in files]
    for path, name in zip(files, names):
        if name not in classes:
            raise DodistillError(
                f"{path} is in no folder of a class of {root / _CLASSES}; remove it, or add its class to that list."
            )
    return Listing(here, files, names, tuple(classes))


def _visible(path: Path) -> bool:
    """Whether `path` is a visible file, and not a text file published beside the images (boxes, annotations)."""
    return path.is_file() and path.suffix != ".txt" and not path.name.startswith(".")


def _annotated(file: Path, images: set[str], classes: set[str]) -> dict[str, str]:
    """File name -> class, from the lines of `file`. Each name in `images` must be there once."""
    if not file.is_file():
        raise DodistillError(
            f"no {file}, which has the labels of {file.parent / 'images'}; copy it from the published folder."
        )
    wnid: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        name, label = ([*line.split(), "", ""])[:2]
        if not name:
            continue
        where = f"{file}, line {number}:"
        if not label:
            raise DodistillError(f"{where} {line!r} names no class; a line is FILE, WNID and a box.")
        if label not in classes:
            raise DodistillError(f"{where} {name} is of class {label!r}, which {_CLASSES} does not have.")
        if name in wnid:
            raise DodistillError(f"{where} {name} already has a line; remove one of the two.")
        if name not in images:
            raise DodistillError(
                f"{where} {name} is not in {file.parent / 'images'}; copy it there, or remove the line."
            )
        wnid[name] = label
    if unnamed := sorted(images - wnid.keys()):
        raise DodistillError(f"{file} has no line for images/{unnamed[0]}; add one, or remove the image.")
    return wnid
