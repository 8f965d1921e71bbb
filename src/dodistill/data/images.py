"""Images from arrays, folders and bundled samples, all as one uint8 tensor."""

from __future__ import annotations

import math
import os
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DodistillError, nearest
from ..files import read_object
from ..functional.resize import resized
from .classes import KNOWN
from .folder import load_folder
from .planted import contexts, palette, plant

Shape = tuple[int, int, int]
_NAMED = ("mnist", "cifar10", "cifar100", "tiny_imagenet", "imagenet32", "imagenet64", "imagenet", "flickr")
_SAMPLES = ("digits", "photos", "strokes")


class Labelled(Protocol):
    """What has images of one shape and, where known, labels: `Images`, and `packed.Packed`."""

    @property
    def y(self) -> Tensor | None: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def by_number(self) -> bool: ...
    @property
    def image_shape(self) -> Shape: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Images:
    """Images x uint8 [n, C, H, W] and, where known, labels y int64 [n]."""

    x: Tensor
    y: Tensor | None = None
    skipped: int = 0  #: number of files that are broken or not images
    note: str = ""  #: a sentence for the user, or ""
    classes: tuple[str, ...] = ()  #: the names of the classes, if they are known, as of class folders
    by_number: bool = False  #: the labels are the data set's own numbers; else they follow from the names of folders

    def __len__(self) -> int:
        return len(self.x)

    @property
    def image_shape(self) -> Shape:
        c, h, w = self.x.shape[1:]
        return c, h, w

    @property
    def num_classes(self) -> int:
        """The number of class names, or the largest label + 1. Raises DodistillError without labels."""
        if self.y is None:
            raise DodistillError("these images have no labels, so the number of classes is unknown; pass num_classes.")
        return len(self.classes) or int(self.y.max()) + 1

    def select(self, index: Tensor) -> Images:
        """The images at `index`, in its order."""
        return replace(self, x=self.x[index], y=None if self.y is None else self.y[index], skipped=0)

    def to(self, device: torch.device) -> Images:
        """The same, on `device`."""
        return replace(self, x=self.x.to(device), y=None if self.y is None else self.y.to(device))


def load_images(
    spec: str | Path,
    split: str = "train",
    labels: bool = True,
    image_shape: Shape | None = None,
    n: int = 6000,
    seed: int = 0,
    crop: float = 0.0,
    resize: bool = False,
) -> Images:
    """Load images by `spec`.

    * `.npz` with `x_train, y_train, x_test, y_test` (uint8, [n, H, W, C] or [n, H, W]; the y are optional);
    * `.npy`, uint8, the same shapes; labels where `dodistill pack` has written them beside it;
    * a folder, searched recursively: images are decoded, resized to `image_shape` (see `crop`) and, with `labels`,
      labelled by class subfolders, if there are any; a `train` or `test` (or `val`) subfolder is the split, if there is
      one; Tiny-ImageNet as published is read by its own lists (see `layouts`);
    * `mnist`, `cifar10`, `cifar100`, `tiny_imagenet`, `imagenet32`, `imagenet64`, `imagenet`, `flickr`:
      `$DODISTILL_DATA/NAME.npz`; the last five may be a folder `$DODISTILL_DATA/NAME` instead, or for the train split
      a packed file `$DODISTILL_DATA/NAME.npy`;
    * `digits`: scikit-learn's 1797 scans (8x8, or resized to `image_shape`), 1297 for train and 500 for test;
    * `photos` or `photos:20000`: `n` (or the given number of) random patches of scikit-learn's two photographs at
      `image_shape` and several scales, by `seed`;
    * `strokes` or `strokes:20000`: the same patches, stretched in contrast to bright strokes on black, like digits;
    * `planted:SPEC` or `planted:SPEC:0.9`: the images of SPEC in colour, with a context that matches the class with
      probability `rho` = 0.95 (or the given one) in the train split and by chance in the test split;
      `planted:SPEC:aligned` and `planted:SPEC:conflicting`: it matches always or never, in both splits (see `planted`).

    `crop`, for images in folders: the side of the centre crop over the picture's short side (see `folder`). 0: in train
    1, the whole short side; in test 0.875 from 160 pixels on (Resize(256), CenterCrop(224)), else 1.

    `resize`: an array of another shape than `image_shape` is resized too (see `functional.resize`), and not refused.

    Raises DodistillError for images that are missing, empty, broken, or of another shape than `image_shape`.
    """
    if split not in ("train", "test"):
        raise DodistillError(f"unknown split {split!r}; use train or test.")
    name = str(spec)
    if name.startswith("planted:"):
        return _planted(name.removeprefix("planted:"), split, labels, image_shape, seed, crop, resize)
    if name == "digits":
        return _digits(split, labels, image_shape)
    kind, _, number = name.partition(":")
    if kind in ("photos", "strokes"):
        if number and not number.isdigit():
            raise DodistillError(f"{name!r} has no number of patches; write it as in {kind}:20000.")
        patches = _photos(split, image_shape or (3, 32, 32), int(number or n), seed)
        return patches if kind == "photos" else Images(_strokes(patches.x, seed))
    folder, file = _named_folder(name), packed_file(name, split)
    if name in _NAMED and folder is None and file is None:
        images = _named(name, split)
    else:
        path = file or folder or Path(spec).expanduser()
        if path.is_dir():
            whole = 1.0 if split == "train" else 0.0
            return Images(*load_folder(path, split, labels, image_shape, crop or whole))
        if path.suffix not in (".npz", ".npy") or not path.is_file():
            if path.suffix or len(path.parts) > 1:
                raise DodistillError(f"no images at {spec}; give an existing .npz or .npy file, or a folder.")
            raise DodistillError(nearest(name, [*_NAMED, *_SAMPLES], "data set") + " Or give a file or folder.")
        images = _npz(path, split) if path.suffix == ".npz" else _npy(path)
    if resize:
        images = replace(images, x=_resized(images.x, image_shape))
    if image_shape is not None and images.image_shape != tuple(image_shape):
        raise DodistillError(
            f"{spec} holds images of shape {images.image_shape} (channels, height, width), but the model takes "
            f"{tuple(image_shape)}; resize the array, or give the images as a folder, which is resized on reading."
        )
    return images if labels else Images(images.x, note=images.note)


def _resized(x: Tensor, shape: Shape | None) -> Tensor:
    """The images at `shape`, if it is given and can be had from them; else as they are."""
    return resized(x, shape) if shape is not None and {x.shape[1], shape[0]} <= {1, 3} else x


def refuse_one_class(images: Labelled, what: str) -> None:
    """Refuse labels that are all the same: the usual cause is a wrong folder. Images without labels pass; `what` names
    the images in the message."""
    y = images.y
    if y is None or len(y) == 0 or int(y.min()) != int(y.max()):
        return
    name, fix = str(int(y[0])), "correct the labels; at least two classes are needed."
    if images.classes:
        name = images.classes[int(y[0])]
    if images.classes and not images.by_number:
        fix = (
            "give the folder whose subfolders are the classes (for Tiny-ImageNet, the folder with wnids.txt); to use "
            "the images without labels, give their own folder."
        )
    raise DodistillError(
        f"{what}: all {len(y):,} images are of one class, {name!r}, so the labels carry no information; {fix}"
    )


def require_fit(images: Labelled, shape: Shape, classes: int, what: str) -> None:
    """Refuse labelled images that a model of `classes` classes for images of `shape` cannot be scored on; `what` names
    them in the message."""
    if images.image_shape != tuple(shape):
        raise DodistillError(f"{what}: images have shape {images.image_shape}, but the model reads {tuple(shape)}.")
    if images.y is None:
        raise DodistillError(f"{what} has no labels; accuracy needs them.")
    n = len(images)
    if images.y.shape != (n,):
        raise DodistillError(f"{what}: labels have shape {tuple(images.y.shape)}; give {n}, one for each image.")
    low, high = int(images.y.min()), int(images.y.max())
    if low < 0 or high >= classes:
        bad = low if low < 0 else high
        raise DodistillError(f"{what}: a label is {bad}, but the model has {classes} classes (0 to {classes - 1}).")


def has_test(spec: str) -> bool:
    """Whether `spec` can have its own test split. A packed file has none, nor has a folder without `test` or `val`."""
    if spec.startswith("planted:"):
        return has_test(_rho(spec.removeprefix("planted:"))[0])
    if packed_file(spec, "test") is not None:
        return False
    folder = _named_folder(spec) or Path(spec).expanduser()
    return not folder.is_dir() or any((folder / name).is_dir() for name in ("test", "val"))


def contexts_of(spec: str) -> list[str]:
    """The two test sets that measure a planted context, [aligned, conflicting]; [] for other data."""
    if not spec.startswith("planted:"):
        return []
    base, _ = _rho(spec.removeprefix("planted:"))
    return [f"planted:{base}:{which}" for which in ("aligned", "conflicting")]


def _rho(spec: str) -> tuple[str, str]:
    """`mnist:0.9` -> ("mnist", "0.9"). The default is 0.95."""
    base, _, which = spec.rpartition(":")
    if base and (which in ("aligned", "conflicting") or re.fullmatch(r"[\d.]+", which)):
        return base, which
    return spec, "0.95"


def _planted(
    spec: str, split: str, labels: bool, image_shape: Shape | None, seed: int, crop: float, resize: bool
) -> Images:
    base, which = _rho(spec)
    inner = image_shape if Path(base).expanduser().is_dir() else None
    if base == "digits" and image_shape is not None:
        inner = (1, *image_shape[1:])
    images = load_images(base, split, True, inner, seed=seed, crop=crop)
    if images.y is None:
        raise DodistillError(
            f"planted:{spec}: {base} has no labels; a planted context needs them: give labelled images."
        )
    rho = {"aligned": 1.0, "conflicting": 0.0}.get(which)
    if rho is None:
        rho = float(which) if re.fullmatch(r"\d+(\.\d*)?|\.\d+", which) else 2.0
        if not 0 <= rho <= 1:
            raise DodistillError(
                f"planted:{spec}: {which} is not a share in [0, 1]; write 0.95, aligned or conflicting after the data."
            )
        rho = 1 / images.num_classes if split == "test" else rho
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    shown = contexts(images.y, images.num_classes, rho, generator)
    x = plant(images.x, shown, palette(images.num_classes))
    if resize:
        x = _resized(x, image_shape)
    if image_shape is not None and tuple(x.shape[1:]) != tuple(image_shape):
        raise DodistillError(
            f"image_shape is {tuple(image_shape)}, but planted:{spec} holds {tuple(x.shape[1:])}; give that."
        )
    return replace(images, x=x, y=images.y if labels else None)


def minival(n: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices 0..n-1 in two seeded random parts: (train, minival), the second one `fraction` of n, rounded."""
    if not 0 <= fraction < 1:
        raise DodistillError(f"minival fraction is {fraction}; it must be in [0, 1).")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held = round(n * fraction)
    return order[held:], order[:held]


def _read(path: Path, *keys: str) -> dict[str, np.ndarray[Any, Any]]:
    """Those of the arrays `keys` that a .npz file has; the array of a .npy file under ""."""
    try:
        _require_size(path)
        with open(path, "rb") as file:  # not np.load(path), which does not close a broken file
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return {"": found}
            with found:
                if keys[0] in found.files:
                    return {k: found[k] for k in keys if k in found.files}
                has = ", ".join(found.files) or "nothing"
    except DodistillError:
        raise
    except Exception as error:  # numpy and zipfile raise errors of many types for damaged files
        raise DodistillError(f"{path} is not a readable numpy file of numbers, or is truncated ({error}).") from error
    raise DodistillError(f"{path} has no {keys[0]!r} (it has {has}); {_RECIPE}")


#: Most GB that an array may unpack to; the environment variable DODISTILL_MAX_GB sets another limit.
MOST_GB = 64.0


def _require_size(path: Path) -> None:
    """Refuse a file whose header claims more than it holds, or an archive that unpacks to more than `MOST_GB`."""
    most = float(os.environ.get("DODISTILL_MAX_GB", MOST_GB))
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            if (size := _claimed(file)) > path.stat().st_size:
                raise ValueError(f"its header claims {size:,} bytes, and the file has {path.stat().st_size:,}")
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as inside:
                size = _claimed(inside)
            if size > member.file_size:
                raise ValueError(f"{member.filename} claims {size:,} bytes, and has {member.file_size:,}")
            if member.file_size > most * 1e9:
                raise DodistillError(
                    f"{path}: {member.filename} unpacks to {member.file_size / 1e9:.3g} GB, more than the {most:g} GB "
                    "allowed; set DODISTILL_MAX_GB to allow it."
                )


def _claimed(file: IO[bytes]) -> int:
    """Bytes of the array that a .npy header describes; 0 without such a header."""
    if file.read(6) != b"\x93NUMPY":
        return 0
    first = tuple(file.read(2)) == (1, 0)
    shape, _, dtype = (np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0)(file)
    return math.prod(shape) * dtype.itemsize


def _npz(path: Path, split: str) -> Images:
    key = f"x_{split}"
    arrays = _read(path, key, f"y_{split}")
    x, y = arrays[key], arrays.get(f"y_{split}")
    pixels = _channels_first(x, f"{path}:{key}")
    if y is None:
        return Images(pixels)
    if y.ndim != 1 or len(y) != len(x) or y.dtype.kind not in "iu" or (len(y) and y.min() < 0):
        raise DodistillError(
            f"{path}: y_{split} has shape {y.shape} and type {y.dtype}; it must be {len(x)} class numbers from 0."
        )
    return Images(pixels, torch.from_numpy(y.astype(np.int64)))


def _npy(path: Path) -> Images:
    """The array of a .npy file, with the labels and class names that `pack` has written beside it."""
    x = _channels_first(_read(path)[""], str(path))
    y, names = beside(path, len(x))
    return Images(x, y, classes=names)


def beside(path: Path, n: int) -> tuple[Tensor | None, tuple[str, ...]]:
    """The labels, int64 [n], and class names that `pack` has written beside a file; (None, ()) without labels."""
    file = path.with_suffix(".labels.npy")
    if not file.is_file():
        return None, ()
    y = _read(file)[""]
    if y.shape != (n,) or y.dtype.kind not in "iu" or y.min() < 0:
        raise DodistillError(f"{file} has shape {y.shape} and type {y.dtype}; it must be {n} class numbers from 0.")
    names = read_object(path.with_suffix(".json"), "pack the images again").get("classes") or []
    return torch.from_numpy(y.astype(np.int64)), tuple(map(str, names))


_RECIPE = "make one with numpy.savez(FILE, x_train=..., y_train=..., x_test=..., y_test=...), uint8 [n, H, W, C]."


def _channels_first(x: np.ndarray[Any, Any], where: str) -> Tensor:
    """uint8 [n, H, W], [n, H, W, C] or [n, C, H, W] -> uint8 [n, C, H, W]."""
    if x.dtype != np.uint8:
        raise DodistillError(f"{where} is {x.dtype}; images must be uint8 (0..255).")
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or 0 in x.shape:
        raise DodistillError(f"{where} has shape {x.shape}; images must be [n, H, W] or [n, H, W, C], and not empty.")
    if x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
        return torch.from_numpy(np.ascontiguousarray(x))
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def _named_folder(name: str) -> Path | None:
    """`$DODISTILL_DATA/NAME/`, for data sets of image files, where there is no NAME.npz."""
    root = os.environ.get("DODISTILL_DATA", "")
    if not root or name not in _NAMED or name in _TORCHVISION or (Path(root) / f"{name}.npz").is_file():
        return None
    folder = Path(root) / name
    return folder if folder.is_dir() else None


def packed_file(spec: str | Path, split: str) -> Path | None:
    """The packed file that `spec` is, or the one of a data set by name, where there is no NAME.npz; None for others."""
    root, name, path = os.environ.get("DODISTILL_DATA", ""), str(spec), Path(spec).expanduser()
    if root and split == "train" and name in _NAMED and not (Path(root) / f"{name}.npz").is_file():
        path = Path(root) / f"{name}.npy"
    return path if path.suffix == ".npy" and path.is_file() else None


def _named(name: str, split: str) -> Images:
    root = os.environ.get("DODISTILL_DATA", "")
    if not root:
        raise DodistillError(f"no {name}: DODISTILL_DATA is not set; set it to the folder of {name}.npz; {_RECIPE}")
    path = Path(root) / f"{name}.npz"
    if path.is_file():
        return _known(_npz(path, split), name)
    kept = _torchvision(name, root, split == "train")
    if kept is None:
        also = " nor a copy by torchvision" if name in _TORCHVISION else f" nor a folder {name}"
        raise DodistillError(f"no {name}: {root} has neither {name}.npz{also}; {_RECIPE}")
    return _known(kept, name)


def _known(images: Images, name: str) -> Images:
    """The images of a data set by name, with the names of its classes, where they are known and the labels are its."""
    names = KNOWN.get(name, ())
    fits = images.y is not None and len(names) == int(images.y.max()) + 1 if len(images) else False
    return replace(images, classes=names, by_number=True) if names and fits else images


_TORCHVISION = {"mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}


def _torchvision(name: str, root: str, train: bool) -> Images | None:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError):
        return None
    if name not in _TORCHVISION:
        return None
    try:
        found = getattr(datasets, _TORCHVISION[name])(root, train=train, download=False)
    except RuntimeError:  # no copy
        return None
    return Images(_channels_first(np.asarray(found.data), name), torch.as_tensor(found.targets, dtype=torch.int64))


def _sklearn() -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DodistillError("digits and photos need scikit-learn: pip install 'dodistill[demo]'") from error
    return datasets


def _digits(split: str, labels: bool, image_shape: Shape | None) -> Images:
    found = _sklearn().load_digits()
    x = torch.from_numpy(found.images).float()[:, None] * (255 / 16)
    c, h, w = image_shape or (1, 8, 8)
    if (h, w) != (8, 8):
        x = F.interpolate(x, (h, w), mode="bilinear", align_corners=False)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    part = order[:1297] if split == "train" else order[1297:]
    pixels = x.round().to(torch.uint8).expand(-1, c, -1, -1)[part].contiguous()
    return _known(Images(pixels, torch.from_numpy(found.target).long()[part] if labels else None), "digits")


def _strokes(x: Tensor, seed: int) -> Tensor:
    """Each patch, inverted or not, stretched so that its p-th to 98th percentile of brightness becomes 0 to 255.

    p is drawn from 30 to 90 for each patch. The result is bright lines and blobs on black, like handwritten digits.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = x.flatten(1).float()
    inverted = torch.rand(len(x), generator=generator) < 0.5
    flat = torch.where(inverted[:, None], 255 - flat, flat)
    steps = torch.quantile(flat, torch.linspace(0, 1, 51), dim=1)  # [51, n], every second percentile
    p = 15 + (torch.rand(len(x), generator=generator) * 30).long()
    low, high = steps.gather(0, p[None])[0][:, None], steps[49][:, None]
    return ((flat - low) / (high - low + 1) * 255).round().clamp(0, 255).to(torch.uint8).view_as(x)


def _photos(split: str, image_shape: Shape, n: int, seed: int) -> Images:
    """Square patches: each photograph is shrunk by several factors, and patches are cut anywhere in each."""
    if n < 1:
        raise DodistillError(f"the number of patches is {n}; it must be at least 1.")
    c, h, w = image_shape
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    scales: list[Tensor] = []
    for photo in _sklearn().load_sample_images().images:
        image = torch.tensor(np.asarray(photo)).permute(2, 0, 1)[None].float()
        if c == 1:
            image = (image * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        most = min(image.shape[2] / h, image.shape[3] / w)
        for power in torch.linspace(0, 0.85, 6).tolist():  # from every pixel to half the height in one patch
            size = [max(round(s / most**power), t) for s, t in zip(image.shape[2:], (h, w))]
            scales.append(F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)[0])
    which = torch.randint(len(scales), (n,), generator=generator)
    out = torch.empty((n, scales[0].shape[0], h, w), dtype=torch.uint8)
    for k, scale in enumerate(scales):
        mine = (which == k).nonzero()[:, 0]
        top = torch.randint(scale.shape[1] - h + 1, (len(mine),), generator=generator)
        left = torch.randint(scale.shape[2] - w + 1, (len(mine),), generator=generator)
        rows, columns = top[:, None] + torch.arange(h), left[:, None] + torch.arange(w)
        patches = scale[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)
        out[mine] = patches.round().clamp(0, 255).to(torch.uint8)
    if out.shape[1] != c:
        raise DodistillError(f"image_shape is {image_shape}; photos have 1 or 3 channels.")
    return Images(out)
