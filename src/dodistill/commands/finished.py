"""Finished runs that a command compares: their configs, their students, and whether one teacher taught them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
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
from ..models.weights import read_metadata


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

    `teacher` is needed for a run that was given its teacher in memory; the spec of the runs' own teacher lets its code
    run, and changes nothing else. `network` (a spec) is needed for students whose weights name code or nothing, unless
    `allow_code` lets the code that runs name run; `classes` names the teacher's classes. Raises DodistillError for
    missing files, and for runs of several teachers.
    """
    part = Model(spec=teacher) if isinstance(teacher, str) else teacher
    configs = [config_of(f) for f in folders]
    allowed = _permitted(folders, configs, part.spec, network, allow_code)
    if part.spec and all(_same(part.spec, c.teacher.spec) for c in configs):
        if not part.weights:
            one_teacher(folders, configs)
        part = _over(configs[0].teacher, part)
    elif not part.spec:
        one_teacher(folders, configs)
        part = configs[0].teacher
    part = replace(part, classes=classes or part.classes)
    model, shape = load_teacher(part, configs[0].data.image_shape, allow_code=allowed)
    device = pick_device()
    model.to(device)
    students = [open_student(f / "student.safetensors", network, allowed).to(device) for f in folders]
    notes = [note for f in folders for note in strangers(f, model)]
    notes += [text] if (text := doubt(model, shape)) else []
    return Finished(configs, model, shape, students, device, notes)


def config_of(folder: Path) -> Distill:
    """The teacher and the data in a run's config. No code runs."""
    if not (folder / "student.safetensors").is_file():
        raise DodistillError(f"{folder} holds no student.safetensors; give the folder of a finished run.")
    tree = read_object(folder / "config.json", "give the folder of a finished run")
    return resolve({"teacher": tree["teacher"], "data": tree["data"]}, allow_code=True)


def _permitted(
    folders: Sequence[Path], configs: Sequence[Distill], teacher: str, network: str, allow_code: bool
) -> plugins.Allow:
    """The code that may run: what the user allowed or typed. Raises DodistillError, with all flags that are missing,
    for other code of teachers and students."""
    if allow_code:
        return True
    typed = {file for spec in (teacher, network) if (file := plugins.model_file(spec))}
    teachers = [] if teacher else _code([c.teacher.spec for c in configs], typed)
    if not teachers:
        return typed  # `open_student` asks for the students' code
    saved = [] if network else [read_metadata(f / "student.safetensors").get("spec") or "" for f in folders]
    students = _code(saved, typed | {plugins.model_file(teachers[0])})
    fix = " ".join([f"--teacher {teachers[0]}", *(f"--model {spec}" for spec in students)])
    fix = f"{fix}, or --allow-code" if len(teachers) == 1 and len(students) < 2 else "--allow-code"
    raise DodistillError(
        f"the runs name code, {', '.join([*teachers, *students])}; code runs only if you name it yourself: {fix}."
    )


def _code(specs: Sequence[str], allowed: plugins.Allow) -> list[str]:
    """Those of the specs, each once, that name code which is not allowed."""
    found = [s for s in specs if (file := plugins.model_file(s)) and not plugins.permitted(file, allowed)]
    return list(dict.fromkeys(found))


def _same(one: str, other: str) -> bool:
    """Whether two specs name the same model, however their paths are written."""
    a, b = plugins.model_file(one), plugins.model_file(other)
    return one == other if not (a and b) else plugins.same(a, b) and one.removeprefix(a) == other.removeprefix(b)


def _over(own: Model, typed: Model) -> Model:
    """`own` with the fields that were typed; a typed normalisation replaces the whole of its own."""
    given = {f.name: v for f in fields(Model) if (v := getattr(typed, f.name)) != f.default}
    space = ("normalise", "mean", "std", "input_range")
    if given.keys() & set(space):
        given = {name: getattr(typed, name) for name in space} | given
    return replace(own, **given)


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
