"""Finished runs that a command compares: their configs, their students, and whether one teacher taught them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..config import plugins
from ..config.grid import weights_of
from ..config.tree import Distill, Model, resolve
from ..core.runtime import pick_device
from ..engine.normalisation import doubt
from ..engine.run_folder import fingerprint
from ..errors import DodistillError
from ..files import read_object
from ..models.configured import Shape, load_teacher, open_student
from ..models.normalized import Normalized


@dataclass(frozen=True)
class Finished:
    """Runs of one teacher, opened on a device.

    Attributes:
        configs: the teacher and the data of each run's config.
        teacher: the teacher's model, and `shape`, the images (C, H, W) that it reads.
        students: the student of each run.
        notes: what a reader should know of the teacher, in sentences.
    """

    configs: list[Distill]
    teacher: Normalized
    shape: Shape
    students: list[Normalized]
    device: torch.device
    notes: list[str]


def opened(
    folders: Sequence[Path], teacher: str | Model = "", network: str = "", allow_code: bool = False, classes: str = ""
) -> Finished:
    """The runs in these folders.

    `teacher` is needed for a run that was given its teacher in memory, `network` (a spec) for students whose weights
    name code or nothing, unless `allow_code` lets the code that runs name run; `classes` names the teacher's classes.
    Raises DodistillError for missing files, and for runs of several teachers.
    """
    part = Model(spec=teacher) if isinstance(teacher, str) else teacher
    configs = [config_of(f, bool(part.spec), allow_code) for f in folders]
    if not part.spec:
        one_teacher(folders, configs)
        part = configs[0].teacher
    part = replace(part, classes=classes or part.classes)
    model, shape = load_teacher(part, configs[0].data.image_shape, allow_code=allow_code)
    device = pick_device()
    model.to(device)
    students = [open_student(f / "student.safetensors", network, allow_code).to(device) for f in folders]
    notes = [note for f in folders for note in strangers(f, model)]
    notes += [text] if (text := doubt(model, shape)) else []
    return Finished(configs, model, shape, students, device, notes)


def config_of(folder: Path, typed: bool, allow_code: bool) -> Distill:
    """The teacher and the data in a run's config. The code of its methods does not run. The code of its teacher's file
    runs only if the user typed the teacher, or allowed it."""
    if not (folder / "student.safetensors").is_file():
        raise DodistillError(f"{folder} holds no student.safetensors; give the folder of a finished run.")
    tree = read_object(folder / "config.json", "give the folder of a finished run")
    if not (typed or allow_code) and plugins.model_file(tree["teacher"]["spec"]):
        raise DodistillError(
            f"the config of {folder} names code, {tree['teacher']['spec']}; code runs only if you name it yourself: "
            f"--teacher {tree['teacher']['spec']}, or --allow-code."
        )
    return resolve({"teacher": {} if typed else tree["teacher"], "data": tree["data"]}, allow_code=True)


def source_of(folder: Path) -> str:
    """The name of a run's source."""
    source = read_object(folder / "config.json", "give the folder of a finished run")["source"]
    return str(source["name"] if isinstance(source, dict) else source)


def one_teacher(folders: Sequence[Path], configs: Sequence[Distill]) -> None:
    """Refuse runs of more than one teacher. Copies of one file of weights are one teacher."""
    for f, c in zip(folders, configs):
        if not c.teacher.spec:
            raise DodistillError(f"{f} received its teacher in memory; name that teacher by --teacher FILE.")
    found: dict[tuple[str, str], Path] = {}
    for f, c in zip(folders, configs):
        files = weights_of(c)
        found.setdefault(
            (files.get("teacher.spec", c.teacher.spec), files.get("teacher.weights", c.teacher.weights)), f
        )
    if len(found) > 1:
        (_, one), (_, other), *_ = found.items()
        raise DodistillError(
            f"{one} and {other} have different teachers, by their config.json; give runs of one teacher, or name it: "
            "--teacher FILE."
        )


def strangers(folder: Path, model: nn.Module) -> list[str]:
    """A warning if the run's teacher had other weights than `model`."""
    path = folder / "summary.json"
    summary = read_object(path, "give the folder of a finished run") if path.exists() else {}
    began = summary.get("made_of", {}).get("teacher")
    if began in (None, fingerprint([*model.parameters(), *model.buffers()])):
        return []
    return [f"{folder.name} was distilled from a teacher with other weights than the one shown here."]
