"""The models that a config names: teachers, which must be trained, and students, which take after their teacher."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config.plugins import Allow, model_file
from ..config.tree import Model
from ..data.classes import Given, read_names, require_count
from ..errors import DodistillError
from ..functional.modes import evaluating
from .load import PRETRAINED, RANDOM, UnknownNetwork, load_model, refuse_random, require_weights
from .normalized import Normalized, UnknownNormalisation, class_names
from .teacher import LARGEST

Shape = tuple[int, int, int]


def load_teacher(
    part: Model, shape: Shape, flag: str = "--teacher.", allow_code: Allow = False
) -> tuple[Normalized, Shape]:
    """The model of a config's `teacher`, and its input shape (C, H, W): as given, else from its weights' metadata."""
    model = load_trained(part, shape, flag, allow_code)
    return model, shape if all(shape) else shape_of(model, "the teacher")


def load_trained(part: Model, shape: Shape, flag: str = "--teacher.", allow_code: Allow = False) -> Normalized:
    """A model that must be trained. `shape`: that of its images, zeros if not given.

    Raises DodistillError, which names the flags that begin with `flag`, for a model without weights, and for one whose
    normalisation is neither known nor given. `allow_code`: see `load_model`.
    """
    if not part.spec:
        raise DodistillError("no teacher given; use --teacher SPEC [--teacher.weights FILE], as in --teacher wrn40_2.")
    weights = require_weights(part.spec, part.weights, f"{flag}weights")
    # a file of weights determines the number of channels
    known = part.weights not in ("", RANDOM, PRETRAINED) or part.spec.endswith(".safetensors")
    known &= not model_file(part.spec)  # of a network of the user's it is guessed, so what is given counts

    def load(seed: int) -> Normalized:
        return load_model(
            part.spec, num_classes=part.num_classes or None, weights=weights, **space_of(part, flag),
            in_channels=None if known else shape[0] or None, image_size=shape[1:] if all(shape) else None,
            classes=part.classes or None, seed=seed, allow_code=allow_code,
        )  # fmt: skip

    try:
        model = load(0)
    except UnknownNormalisation as error:
        raise UnknownNormalisation(error.weights, flag) from error
    except UnknownNetwork as error:
        typed = f"{flag.rstrip('.')} {{spec}} {flag}weights {{file}}" if flag != "--" else "{spec} --weights {file}"
        fix = f"{typed}{', or --allow-code' if error.spec else ''}"
        raise UnknownNetwork(error.file, error.spec, error.cls, fix) from error
    if model_file(part.spec) and not part.weights:
        refuse_random(part.spec, model, load(1), f"{flag}weights")
    if part.num_classes:
        seen = shape if all(shape) else shape_of(model, "the model" if flag == "--" else "the teacher")
        _require_outputs(model, part.num_classes, seen, f"{flag}num-classes")
    return model


def _require_outputs(model: Normalized, given: int, shape: Shape, flag: str) -> None:
    """Refuse another number of classes than a model has, as of a factory that takes none. What else may be wrong with
    its answer is refused where it is used."""
    if math.prod(shape) > LARGEST:
        return
    try:
        with evaluating(model), torch.no_grad():
            outputs = model(torch.zeros(2, *shape)).shape[-1]
    except Exception:  # a model of the user's may raise anything
        return
    if outputs != given:
        raise DodistillError(f"{flag} is {given}, but {model.spec['spec']} has {outputs} outputs; remove it.")


def open_student(file: str | Path, network: str = "", allow_code: Allow = False) -> Normalized:
    """The student in a file of weights. `network`: its spec, typed by the user, for a file that names code or nothing.

    Raises DodistillError, which names the flags `--model` and `--allow-code`, for such a file without a spec.
    """
    if network:
        return load_model(network, weights=file)
    try:
        return load_model(str(file), allow_code=allow_code)
    except UnknownNetwork as error:
        fix = f"--model {{spec}}{', or --allow-code' if error.spec else ''}"
        raise UnknownNetwork(error.file, error.spec, error.cls, fix) from error


def space_of(part: Model, flag: str) -> dict[str, Any]:
    """The normalisation of a part of the config, as arguments of `load_model`."""
    if part.normalise and (part.mean or part.std):
        raise DodistillError(
            f"{flag}normalise {part.normalise} and {flag}{'mean' if part.mean else 'std'} are both given; give a name, "
            "or mean and std."
        )
    mean = part.normalise or part.mean or None
    return {"mean": mean, "std": part.std or None, "input_range": part.input_range}


def shape_of(model: nn.Module, who: str = "the model") -> Shape:
    """(C, H, W) from the metadata of a model. Raises DodistillError, which names it by `who`, if they lack it."""
    spec = getattr(model, "spec", {}) or {}
    channels, size = spec.get("in_channels"), spec.get("image_size")
    if not channels or not size:
        raise DodistillError(
            f"{who}'s weights do not contain its image shape; give --image-shape 3,32,32 "
            "(in Python image_shape=(3, 32, 32))."
        )
    height, width = (size, size) if isinstance(size, int) else size
    return int(channels), int(height), int(width)


def load_student(
    part: Model, teacher: nn.Module, classes: int, shape: Shape, seed: int, allow_code: Allow = False
) -> Normalized:
    """A fresh student for this teacher: its classes with their names, its channels and its normalisation, unless given
    otherwise."""
    if not part.spec:
        raise DodistillError("no student given; use --student SPEC, as in --student wrn16_1.")
    if part.num_classes and part.num_classes != classes:
        raise DodistillError(
            f"student.num_classes is {part.num_classes}, but the teacher has {classes} classes; remove it, "
            f"or set it to {classes}."
        )
    space = space_of(part, "--student.")
    given = part.normalise or part.mean or part.std or part.input_range != 1
    if not given and part.weights != PRETRAINED and isinstance(teacher, Normalized):
        space = {"mean": teacher.mean.flatten().tolist(), "std": teacher.std.flatten().tolist()}
    try:
        return load_model(
            part.spec, num_classes=classes, in_channels=shape[0], image_size=shape[1:], **space,
            weights=part.weights or (RANDOM if part.spec.startswith("hf:") else None),
            classes=part.classes or class_names(teacher), seed=seed, allow_code=allow_code,
        )  # fmt: skip
    except UnknownNormalisation as error:
        raise UnknownNormalisation(error.weights, "--student.") from error


def names_for(model: nn.Module, outputs: int, given: Given | None = None) -> tuple[str, ...]:
    """The names of a model's classes: those `given`, else its own; () if they are not known. Raises DodistillError for
    another number of names than `outputs`."""
    names = read_names(given) or class_names(model)
    require_count(names, outputs, "classes")
    return names
