"""`dodistill teach`: trains a classifier on labelled images. The fields of `engine.teach.Teach` are flags, too."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from ..config import flags
from ..config.grid import content
from ..config.tree import Model, build
from ..core.deadline import Deadline, stopping
from ..core.precision import emulated
from ..core.runtime import pick_device
from ..engine.run_folder import check_writable
from ..engine.teach import Log, Teach
from ..engine.teach_files import fresh_model, read_labelled, teach_to_file
from ..errors import STOPPED, DodistillError, at_least
from ..files import claimed, shown
from ..models.configured import space_of
from ..report.progress import Progress


@dataclass(frozen=True)
class Arguments:
    """Train a teacher (or a student on real data, the upper bound).

    Rerun the command to resume a training that was stopped.
    """

    model: str  #: a network, by the grammar of `load_model`: wrn40_2, timm:NAME, file.py:factory
    data: Annotated[str, "DATA"] = ""  #: labelled images: a data set's name, a .npz, or a folder of class folders
    test: Annotated[str, "DATA"] = ""  #: test images, if `data` has none
    image_shape: Annotated[str, "C,H,W"] = ""  #: images in folders are resized to this shape
    crop_share: float = 0.0  #: centre crop / short side, for test images in folders; 0: 0.875 from 160 pixels, else 1
    normalise: Annotated[str, "NAME"] = ""  #: cifar10, cifar100, imagenet, mnist or none
    mean: tuple[float, ...] = ()  #: in place of a name: of each channel, or one for all, as in 0.5,0.5,0.5
    std: tuple[float, ...] = ()  #: likewise, with mean
    input_range: float = 1.0  #: the model's value for white, 1 or 255; mean and std are in this range
    out: Annotated[str, "FILE"] = "teacher.safetensors"  #: the weights
    max_seconds: float = math.inf  #: stop cleanly after this many seconds; rerun the command to resume


def taught(arguments: Arguments, config: Teach) -> dict[str, Any]:
    """What the weights come from, for their file: the settings, with code by its content and images by their name."""
    a, shape = arguments, flags.shape(arguments.image_shape)
    space = {"normalise": a.normalise, "mean": a.mean, "std": a.std, "input_range": a.input_range}
    of = asdict(config) | {"model": content(config.model), "data": Path(a.data).name, "image_shape": shape, **space}
    plain: dict[str, Any] = json.loads(json.dumps(of))
    return plain


def run(arguments: Arguments, settings: Mapping[str, Any], _words: Sequence[str], _start: float) -> int:
    """`settings` are fields of `Teach`."""
    at_least(0, "teach", ", as in 600", max_seconds=arguments.max_seconds)
    deadline, target = Deadline(time.monotonic() + arguments.max_seconds), Path(arguments.out)
    shape = flags.shape(arguments.image_shape)
    if not arguments.data:
        raise DodistillError("teach needs labelled images; give --data cifar10, a .npz, or a folder of class folders.")
    config = build(Teach, {**settings, "model": arguments.model}, "teach")
    if target.suffix != ".safetensors":
        raise DodistillError(f"--out is {shown(target)}; weights are written as FILE.safetensors.")
    if target.exists():
        raise DodistillError(f"{shown(target)} is there already; choose another --out, or delete it to train again.")
    check_writable(target)
    data = read_labelled(arguments.data, arguments.test, shape, arguments.crop_share)
    a = arguments
    space = space_of(Model(normalise=a.normalise, mean=a.mean, std=a.std, input_range=a.input_range), "--")
    model, device = fresh_model(config, data.train, **space), pick_device()
    lock = target.with_name(f".{target.name}.lock")
    with (
        claimed(lock, str(target)),
        Progress(data.steps(config), f"teach {config.model} on {arguments.data}") as progress,
    ):

        def on_log(log: Log) -> None:
            progress.update(int(log["step"]), loss=float(log["loss"]), accuracy=float(log["minival"] or 0.0))

        if emulated(device, config.precision):
            progress.note("bf16 is emulated on this CPU, about ten times slower than fp32; use --precision fp32.")
        if data.note:
            progress.note(data.note)
        with stopping(deadline):
            how = taught(arguments, config)
            result = teach_to_file(target, model, data, config, device, on_log, progress.update, deadline, how)
    if not result.get("finished", True):
        print(
            f"stopped after epoch {result['epoch']} of {config.epochs}; rerun the command to resume.", file=sys.stderr
        )
        return STOPPED
    lock.unlink(missing_ok=True)
    print(json.dumps(result))
    print(f"weights    {target}")
    return 0
