"""`dodistill export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..api import shape_of
from ..data.classes import folder_names
from ..engine.run_folder import check_writable, names_of_run, newest_pool
from ..errors import DodistillError
from ..models import load_model
from ..models.onnx import export_onnx
from ..report.images import export_images


@dataclass(frozen=True)
class Arguments:
    """Write the pool of a run as images, or its student as ONNX."""

    run: str  #: a run folder; for ONNX, also a .safetensors
    target: str  #: a folder for the images, or FILE.onnx


def run(arguments: Arguments) -> int:
    source, target = Path(arguments.run), Path(arguments.target)
    if target.suffix == ".onnx":
        check_writable(target)
        model = load_model(str(source / "student.safetensors" if source.is_dir() else source))
        print(export_onnx(model, target, shape_of(model)))
        return 0
    if target.exists() and not target.is_dir():
        raise DodistillError(f"{target} is a file; give a folder for the images, or FILE.onnx for the student.")
    pool = newest_pool(source)
    labels, outputs = pool["logits"].argmax(1), pool["logits"].shape[1]
    n = export_images(pool["x"], target, labels, folder_names(names_of_run(source), outputs))
    print(f"{n} images in {target}, one folder for each class that the teacher predicts")
    return 0
