"""What `dodistill teach` reads and writes: labelled images, and a file of trained weights. `teach.py` has the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.folder import crop_share
from ..data.images import Images, has_test, load_images, refuse_one_class
from ..data.labels import fitted
from ..errors import DodistillError
from ..models import Normalized, load_model, save_model
from .run_folder import load_tensors, save_tensors
from .teach import Log, Teach, teach

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class LabelledData:
    """Labelled images for training, and labelled images for the final score."""

    train: Images
    test: Images | None = None
    note: str = ""  #: on the images for the score: why there are none, or which classes have none

    def steps(self, config: Teach) -> int:
        """About how many steps the schedule has."""
        return config.epochs * max(1, int(len(self.train) * (1 - config.minival)) // config.batch)


def read_labelled(data: str, test: str = "", shape: Shape | None = None, crop: float = 0.0) -> LabelledData:
    """The training images of `data`; the test images of `test`, else those of `data`, if it has any.

    Images in folders are resized to `shape`; `crop` is the share that the crop keeps of test images in folders. Raises
    DodistillError for labels of one class, and if `test` has no usable labels.
    """
    crop_share(crop, 0)
    train = load_images(data, image_shape=shape)
    refuse_one_class(train, data)
    if not (test or has_test(data)):
        return LabelledData(train)
    try:
        tested = _labelled(test or data, shape, crop, train)
        return LabelledData(train, tested, tested.note)
    except DodistillError as error:
        if test:
            raise
        return LabelledData(train, note=f"test accuracy will not be measured: {error}")


def _labelled(spec: str, shape: Shape | None, crop: float, train: Images) -> Images:
    """Test images with labels, which are those of the training images' classes."""
    images = load_images(spec, split="test", image_shape=shape, crop=crop)
    if images.y is None:
        raise DodistillError(f"the test images of {spec} have no labels; accuracy needs them: give labelled images.")
    refuse_one_class(images, f"test images of {spec}")
    fix = "give a test set whose class folders have the names of those of the training images."
    return fitted(images, train.classes, train.num_classes, f"test images of {spec}", fix)


def fresh_model(config: Teach, images: Images, **space: Any) -> Normalized:
    """The network that the schedule names, for these images. `space`: its normalisation, as `load_model` takes it."""
    channels, *size = images.image_shape
    count = config.num_classes or images.num_classes
    names = (*images.classes, *(f"class {k}" for k in range(len(images.classes), count))) if images.classes else ()
    return load_model(
        config.model, num_classes=count, in_channels=channels, image_size=size, classes=names[:count],
        seed=config.seed, **space,
    )  # fmt: skip


def teach_to_file(
    target: Path,
    model: Normalized,
    data: LabelledData,
    config: Teach,
    device: torch.device,
    on_log: Callable[[Log], None],
    on_step: Callable[[int], None],
    deadline: float,
    taught: Mapping[str, Any],
) -> Log:
    """Train `model`, and write it to `target` with its scores and `taught`, the settings that determine the weights.

    A training that was stopped resumes from its checkpoint beside `target`. Returns the result of `teach`; of a
    finished training, only the numbers. Raises DodistillError as `teach` does, and for a damaged checkpoint.
    """
    begun = target.with_suffix(".teaching.pt")
    resume = load_tensors(begun) if begun.exists() else None

    def keep(state: Log) -> None:
        save_tensors(begun, state)

    result = teach(model, data.train, data.test, config, on_log, device, resume, keep, deadline, on_step)
    if not result.get("finished", True):
        return result
    numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
    save_model(model, target, **numbers, taught=taught)
    begun.unlink(missing_ok=True)
    return numbers
