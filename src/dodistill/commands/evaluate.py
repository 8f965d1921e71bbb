"""`dodistill evaluate`: scores of a classifier on labelled images."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

from ..config import flags
from ..config.tree import Model
from ..core.runtime import pick_device
from ..data.classes import titles
from ..data.folder import crop_share
from ..data.images import Images, contexts_of, load_images, refuse_one_class, require_fit
from ..data.labels import fitted
from ..data.packed import Given, Packed, open_images
from ..engine.normalisation import doubt
from ..engine.run_folder import check_writable
from ..errors import DodistillError, reworded
from ..evaluation import evaluate
from ..evaluation.probe import context_gap, halves, linear_probe
from ..functional.modes import evaluating
from ..models import Normalized, save_model
from ..models.batchnorm import calibrate
from ..models.configured import Shape, load_trained, names_for, shape_of
from ..models.normalized import class_names
from ..models.onnx import read_onnx
from ..models.teacher import require_shape
from ..report.delivery import parameters


@dataclass(frozen=True)
class Arguments:
    """Score a model on labelled images, by agreement with a teacher, or by a linear probe on other data."""

    model: str  #: a .safetensors that dodistill wrote, an exported .onnx, or a model spec with --weights
    weights: Annotated[str, "FILE"] = ""  #: the weights of a model that is given by its spec; or pretrained, or random
    image_shape: Annotated[str, "C,H,W"] = ""  #: the model's image shape, if its weights do not contain it
    num_classes: int = 0  #: 0: from the weights
    normalise: Annotated[str, "NAME"] = ""  #: the model's normalisation, if its weights do not contain it
    mean: tuple[float, ...] = ()  #: in place of a name: of each channel, or one for all, as in 0.5,0.5,0.5
    std: tuple[float, ...] = ()  #: likewise, with mean
    input_range: float = 1.0  #: the model's value for white, 1 or 255; mean and std are in this range
    allow_code: bool = False  #: allow the code that a .safetensors names as its network to run
    classes: Annotated[str, "FILE"] = ""  #: names of its classes, one a line, or cat,dog,...; empty: as its weights say
    test: Annotated[str, "DATA"] = ""  #: labelled images: .npz, folder, or a data set's name
    crop_share: float = 0.0  #: centre crop / short side, for images in folders; 0: 0.875 from 160 pixels on, else 1
    probe: Annotated[str, "DATA"] = ""  #: transfer: train a linear classifier on its frozen features
    teacher: Model = field(default_factory=Model)  #: another model; report the agreement with its predictions
    calibrate: Annotated[str, "DATA"] = ""  #: first compute BatchNorm's statistics on these unlabelled images
    n: int = 1000  #: number of calibration images
    out: Annotated[str, "FILE"] = ""  #: write the calibrated model, .safetensors


@dataclass(frozen=True)
class Data:
    """The images, all read before any computation."""

    test: Images | Packed | None
    probe: tuple[Images, Images] | None  #: training and test set of the probe
    calibrate: Images | Packed | None
    contexts: list[Images]  #: test sets of a planted context: aligned, conflicting


def run(arguments: Arguments) -> int:
    _check(arguments)
    model = _model(arguments)
    shape = flags.shape(arguments.image_shape) or shape_of(model)
    model.spec["num_classes"] = _outputs(model, shape)
    data = _read(arguments, shape, model)
    device = torch.device("cpu") if _exported(arguments) else pick_device()
    model.to(device)
    teacher = None
    if arguments.teacher.spec and data.test is not None:
        teacher = load_trained(arguments.teacher, shape, allow_code=arguments.allow_code).to(device)
    for name, network in (("the model", model), ("the teacher", teacher)):
        if network is not None and (text := doubt(network, shape)):
            print(f"warning: {name}: {text}", file=sys.stderr)
    if data.calibrate is not None:
        _calibrate(arguments, model, data.calibrate)
    if data.probe is not None:
        found = linear_probe(model, *data.probe)
        print(f"probe      {found['test']:.2f} % on {arguments.probe} (train {found['train']:.2f} %), features frozen")
    if data.test is not None:
        _score(arguments.model, model, data.test, teacher)
    if data.contexts:
        said = ", ".join(f"{name} {score:.2f}" for name, score in context_gap(model, data.contexts).items())
        print(f"context    accuracy in %: {said}")
    return 0


def _check(arguments: Arguments) -> None:
    if not (arguments.test or arguments.probe or arguments.calibrate):
        raise DodistillError("evaluate needs images: give --test DATA, --probe DATA or --calibrate DATA, or several.")
    if arguments.out and not arguments.calibrate:
        raise DodistillError(
            f"--out {arguments.out} without --calibrate has no effect; add --calibrate DATA, or remove --out."
        )
    if arguments.out:
        if Path(arguments.out).suffix != ".safetensors":
            raise DodistillError(f"--out is {arguments.out}; weights are written as FILE.safetensors.")
        if Path(arguments.out).exists():
            raise DodistillError(f"{arguments.out} is there already; choose another --out, or delete it.")
        check_writable(Path(arguments.out))
    if arguments.n < 2:
        raise DodistillError(f"--n is {arguments.n}; statistics need at least 2 images.")
    if _exported(arguments):
        for name in ("weights", "image_shape", "num_classes", "normalise", "mean", "std", "input_range", "probe",
                     "calibrate"):  # fmt: skip
            if getattr(arguments, name) != getattr(Arguments, name, ()):
                raise DodistillError(
                    f"--{name.replace('_', '-')} is not for {arguments.model}, an exported network with its "
                    "normalisation inside; remove it, or evaluate the student.safetensors of its run."
                )


def _exported(arguments: Arguments) -> bool:
    return arguments.model.endswith(".onnx")


def _model(arguments: Arguments) -> Normalized:
    a = arguments
    if _exported(a):
        model = read_onnx(a.model)
        model.spec["classes"] = names_for(model, model.spec["num_classes"], a.classes or None)
        return model
    named = Model(
        spec=a.model, weights=a.weights, num_classes=a.num_classes, normalise=a.normalise, mean=a.mean, std=a.std,
        input_range=a.input_range, classes=a.classes,
    )  # fmt: skip
    return load_trained(named, flags.shape(a.image_shape) or (0, 0, 0), "--", a.allow_code)


def _outputs(model: Normalized, shape: Shape) -> int:
    """The number of outputs for images of `shape`. Raises DodistillError if the model does not take them, or returns
    another shape than (images, outputs)."""
    name = model.spec["spec"]
    require_shape(shape)
    refused = f"{name} does not take images of shape {shape} (channels, height, width)"
    with reworded(lambda e: f"{refused}: {e}; give its --image-shape."), evaluating(model), torch.no_grad():
        out = model(torch.full((2, *shape), 0.5))
    if out.dim() != 2 or len(out) != 2 or not out.is_floating_point():
        raise DodistillError(
            f"{name} returns {str(out.dtype).removeprefix('torch.')} of shape {tuple(out.shape)} for 2 images; it must "
            "return logits of shape (2, classes)."
        )
    return int(out.shape[1])


def _read(arguments: Arguments, shape: Shape, model: Normalized) -> Data:
    """Read all images, cropped as test images."""
    share, names, outputs = crop_share(arguments.crop_share, shape[1]), class_names(model), model.spec["num_classes"]

    def own(images: Given, spec: str) -> Given:
        """The labels as the model's classes; those of a probe are other classes."""
        images = fitted(images, names, outputs, spec)
        require_fit(images, shape, outputs or 1 << 31, spec)
        return images

    def labelled(images: Given, spec: str) -> Given:
        if images.y is None:
            raise DodistillError(f"{spec} has no labels; accuracy needs them: give labelled images.")
        refuse_one_class(images, spec)
        return images

    test, probe, plain = arguments.test, arguments.probe, arguments.calibrate
    return Data(
        own(labelled(open_images(test, "test", True, shape, share), test), test) if test else None,
        halves(probe, shape, share) if probe else None,
        open_images(plain, "train", False, shape, share) if plain else None,
        [own(labelled(load_images(spec, "test", True, shape, crop=share), spec), spec) for spec in contexts_of(test)],
    )


def _calibrate(arguments: Arguments, model: Normalized, images: Images | Packed) -> None:
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: arguments.n]
    calibrate(model, images.x[chosen])
    print(f"calibrated with {len(chosen):,} images of {arguments.calibrate}, without labels")
    if arguments.out:
        print(f"weights    {save_model(model, arguments.out)}")


def _score(name: str, model: nn.Module, test: Images | Packed, teacher: nn.Module | None) -> None:
    found = evaluate.scores(model, test, teacher)
    size = f"{n:,} parameters" if (n := parameters(model)) else "exported"
    print(f"model      {name}, {size}")
    print(f"accuracy   {found['accuracy']:.2f} % of {found['images']:,} images")
    print(f"ECE        {found['ECE']:.4f}")
    print(f"predicted class shares (%)  {_shares(found['class_shares'], class_names(model))}")
    if test.note:
        print(f"note       {test.note}")
    if teacher is not None:
        print(f"teacher    {found['teacher']:.2f} %, agreement {found['agreement']:.2f} %")


def _shares(shares: list[float], names: tuple[str, ...], most: int = 20) -> str:
    """The share of each class in percent, by name where the names are known; of many, the largest."""
    if not names:
        return ", ".join(f"{100 * v:.1f}" for v in shares[:most])
    called, order = titles(names), list(range(len(shares)))
    if len(shares) > most:
        order = sorted(order, key=lambda k: -shares[k])[: most // 2]
    said = ", ".join(f"{called[k]} {100 * shares[k]:.1f}" for k in order)
    return said if len(shares) <= most else f"{said}, ... of {len(shares)} classes"
