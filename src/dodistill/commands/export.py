"""`dodistill export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from torch import nn

from ..config import flags, plugins
from ..config.tree import resolve
from ..data.classes import folder_names
from ..data.packed import open_images
from ..engine.inputs import read_inputs
from ..engine.run_folder import names_of_run, newest_pool
from ..errors import DodistillError
from ..files import read_object
from ..models import Normalized
from ..models.configured import load_teacher, open_student, shape_of
from ..report.front_matter import LICENCE
from ..report.hub import connect, content, push
from ..report.images import export_images
from ..report.ship import ENDINGS, Material, Shape, of_images, of_run, ship


@dataclass(frozen=True)
class Arguments:
    """Write a run's student for deployment, checked and timed, or the images of a run; or upload the student."""

    run: str  #: a run folder; for a student, also a .safetensors
    targets: Annotated[tuple[str, ...], "[OUT ...]"] = ()  #: files .onnx, .int8.onnx, .pt2, .safetensors, or a folder
    model: Annotated[str, "FILE.py:FACTORY"] = ""  #: the student's network, if its weights name code, or nothing
    allow_code: bool = False  #: allow the code that the weights name as their network to run
    image_shape: Annotated[str, "C,H,W"] = ""  #: the student's image shape, if its weights do not contain it
    calibrate: Annotated[str, "DATA"] = ""  #: unlabelled images for .int8.onnx, in place of those that the run kept
    push: Annotated[str, "OWNER/NAME"] = ""  #: upload weights, OUT files, config and model card to the Hugging Face hub
    private: bool = False  #: with --push: a private repository
    licence: Annotated[str, "ID"] = LICENCE  #: with --push: the hub's id of the licence; other: as the teacher


def run(arguments: Arguments) -> int:
    source, targets = Path(arguments.run), [Path(target) for target in arguments.targets]
    if not source.is_dir() and source.suffix != ".safetensors":
        wrong = f"{source} is neither a run folder nor a .safetensors"
        wrong = wrong if source.exists() else f"there is no run folder {source} (looked for from {Path.cwd()})"
        raise DodistillError(f"{wrong}; give the folder of a finished run, or a .safetensors.")
    if not targets and not arguments.push:
        raise DodistillError(f"export what? Give files that end in {', '.join(ENDINGS)}, or a folder for the images.")
    if len(targets) == 1 and (targets[0].is_dir() or not targets[0].suffix):
        if arguments.push:
            raise DodistillError(f"--push uploads a student, and {targets[0]} is a folder for images; remove one.")
        return _images(source, targets[0])
    hub = connect(arguments.push, arguments.private) if arguments.push else None
    if hub is not None:
        content(source, hub.repo, {}, arguments.licence)  # a folder without a finished run is refused now
    files = _student(source, targets, arguments) if targets else {}
    if hub is not None:
        uploaded = content(source, hub.repo, files, arguments.licence)
        print(f"{push(hub, uploaded)}: {', '.join(sorted(uploaded))}")
    return 0


def _images(source: Path, target: Path) -> int:
    if target.exists() and not target.is_dir():
        raise DodistillError(f"{target} is a file; give a folder for the images, or FILE.onnx for the student.")
    pool = newest_pool(source)
    labels, outputs = pool["logits"].argmax(1), pool["logits"].shape[1]
    n = export_images(pool["x"], target, labels, folder_names(names_of_run(source), outputs))
    print(f"{n} images in {target}, one folder for each class that the teacher predicts")
    return 0


def student_of(source: Path, network: str = "", allow_code: bool = False) -> tuple[Normalized, Path]:
    """The student of a run folder, or the model of a .safetensors; and its file. See `api.open_student`."""
    file = source / "student.safetensors" if source.is_dir() else source
    return open_student(file, network, allow_code), file


def _student(source: Path, targets: list[Path], arguments: Arguments) -> dict[Path, str]:
    """Write the files. Returns a sentence on each."""
    for target in targets:
        if target.suffix == ".safetensors" and target.exists():
            raise DodistillError(f"{target} is there already; choose another file, or delete it.")
    model, file = student_of(source, arguments.model, arguments.allow_code)
    shape = _shape(model, flags.shape(arguments.image_shape))
    said = ship(model, targets, shape, _material(source, shape, arguments), weights=file)
    print(said.text)
    return said.notes


def _shape(model: Normalized, given: Shape | None) -> Shape:
    """The image shape that the weights contain, else the one given. Raises DodistillError if they differ."""
    if given is None or not (model.spec.get("in_channels") and model.spec.get("image_size")):
        return given or shape_of(model)
    if given != (known := shape_of(model)):
        raise DodistillError(
            f"--image-shape is {','.join(map(str, given))}, but the weights are for images of "
            f"{','.join(map(str, known))}; remove it."
        )
    return known


def _material(source: Path, shape: Shape, arguments: Arguments) -> Material | None:
    """The images given, else those that the run kept; None without any."""
    if calibrate := arguments.calibrate:
        images = open_images(calibrate, "train", False, shape)
        return of_images(images.x, f"images of {calibrate}", _teacher(source, shape, arguments.allow_code))
    inputs = read_inputs(source) if source.is_dir() else None
    return None if inputs is None else of_run(inputs)


def _teacher(source: Path, shape: Shape, allow_code: bool) -> nn.Module | None:
    """The teacher that the config of a run names; None for one that was given in memory, that is gone, or that needs
    code to run."""
    try:
        tree = read_object(source / "config.json", "give a run folder")
        if plugins.model_file(tree["teacher"]["spec"]) and not allow_code:
            return None
        part = resolve({"teacher": tree["teacher"]}, allow_code=allow_code).teacher
        return load_teacher(part, shape, allow_code=allow_code)[0]
    except (DodistillError, KeyError, TypeError):
        return None
