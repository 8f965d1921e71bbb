"""`load_model`: one grammar for networks of the zoo, of libraries and of files."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..data.classes import Given, read_names, require_count
from ..errors import DodistillError, at_least, nearest
from ..functional.fresh_weights import seeding
from ..functional.memory_format import place
from . import zoo
from .heads import attach
from .names import names_of_origin
from .normalized import NORMALISATION, Normalized, constants
from .weights import guess_channels, guess_classes, load_state, read_metadata, read_weights

Values = Sequence[float]
Size = int | Sequence[int]  #: pixels of a side of square images, or (height, width)
_GRAMMAR = "a zoo name, timm:NAME, torchvision:NAME, path/to/file.py:factory, or a .safetensors file saved by dodistill"


def load_model(
    spec: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: Size | None = None,
    weights: str | Path | None = None,
    mean: str | Values | None = None,
    std: str | Values | None = None,
    classes: Given | None = None,
    seed: int | None = None,
) -> Normalized:
    """A network with its normalisation, from images [B, C, H, W] in [0, 1] to logits [B, num_classes].

    `spec` is a zoo name (`wrn40_2`), `timm:NAME`, `torchvision:NAME`, `path/to/file.py:factory` (the file is imported;
    the factory is called with `num_classes` and `in_channels` if it takes them), or a `.safetensors` file of
    `save_model`, which contains the rest. Nothing is downloaded: weights come from `weights` (`.safetensors`, or a
    torch file of tensors). Omitted values are read from the weights. `mean` and `std` are values per channel or a name
    (`cifar10`); else those of the saved file, of timm, or of torchvision (ImageNet); else none. `image_size` is a
    number for square images, or (height, width). `classes` are the names of the classes in the order of the logits: a
    list, a file with one a line, "cat,dog", or Hugging Face's `id2label` (`data.classes`); else those of the saved
    file, of timm, torchvision or Hugging Face; () for none. `seed` fixes the fresh weights and leaves torch's global
    random state unchanged; without a seed they are drawn from that state. The memory format is that of
    `memory_format.place`.

    Raises DodistillError, with the fix, for arguments that do not fit.
    """
    saved: dict[str, Any] = {}
    named = read_names(classes)
    if not isinstance(spec, str) or not spec:
        raise DodistillError(f"a model is named by a text, not by {spec!r}: {_GRAMMAR}.")
    if spec.endswith(".safetensors"):
        if weights is not None:
            raise DodistillError(
                f"{spec} already contains weights, but weights is {weights}; give a network's name in place of {spec}."
            )
        saved = read_metadata(spec)
        weights, spec = spec, str(saved.get("spec", ""))
        if not spec:
            raise DodistillError(
                f"{weights} does not contain the name of its network; use load_model(NAME, weights='{weights}')."
            )
        if ".py:" in spec:
            raise DodistillError(
                f"{weights} names the code {spec}; code runs only if you name it yourself: "
                f"load_model('{spec}', weights='{weights}')."
            )
    elif weights is not None and str(weights).endswith(".safetensors"):
        saved = read_metadata(weights)
    _check_grammar(spec)
    state = None if weights is None else read_weights(weights)
    if state is not None:
        in_weights = saved.get("num_classes") or guess_classes(state)
        num_classes = in_weights if num_classes is None else num_classes
        in_channels = saved.get("in_channels") or guess_channels(state) if in_channels is None else in_channels
    num_classes = len(named) or None if num_classes is None else num_classes
    at_least(1, "", num_classes=num_classes, in_channels=in_channels)
    image_size = _size(saved.get("image_size") if image_size is None else image_size)
    with seeding(seed):
        net, own = _build(spec, num_classes, in_channels, image_size)
    built = net
    if isinstance(net, Normalized):  # a factory may bring its own normalisation
        own = (net.mean.flatten().tolist(), net.std.flatten().tolist())
        net = net.model
    if isinstance(saved.get("head"), dict):
        attach(net, **saved["head"])
    if state is not None:
        load_state(net, state, str(weights))
    fresh = net.state_dict()
    in_channels = in_channels or guess_channels(fresh)
    wanted = constants(mean, std, in_channels)
    if wanted is None:
        try:
            wanted = constants(saved.get("mean"), saved.get("std"), in_channels)
        except DodistillError as error:
            raise DodistillError(f"{weights}: mean and std in its metadata do not fit: {error}") from error
    known: dict[str, Any] = {
        "spec": spec,
        "num_classes": num_classes or guess_classes(fresh),
        "in_channels": in_channels,
        "image_size": image_size,
    }
    if classes is None:
        named = tuple(saved.get("classes") or ()) or names_of_origin(spec, built, known["num_classes"])
    require_count(named, known["num_classes"], "classes" if classes is not None else str(weights))
    known |= {"classes": named} if named else {}
    return place(Normalized(net, *(wanted or own or NORMALISATION["none"]), spec=known))


def _size(given: Size | None) -> Size | None:
    """A number for square images, else (height, width)."""
    sides = () if given is None else (given,) if isinstance(given, int) else tuple(given)
    if len(sides) > 2 or not all(isinstance(s, int) and s > 0 for s in sides) or (given is not None and not sides):
        raise DodistillError(f"image_size is {given!r}; give pixels, as in 32, or (height, width), as in (32, 48).")
    return None if not sides else sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])


#: In place of a file of weights: random ones are meant.
RANDOM = "random"


def require_weights(spec: str, weights: str, flag: str) -> str | None:
    """The file of weights of a model that must be trained; None where it brings its own, or where `weights` is RANDOM.

    Raises DodistillError, which names `flag`, for a network without weights: its answers would be random.
    """
    if not weights and not spec.endswith(".safetensors") and ".py:" not in spec:
        _check_grammar(spec)
        raise DodistillError(
            f"{spec} has no weights, so its predictions would be random; give {flag} FILE (or {flag} {RANDOM}, if that "
            "is meant)."
        )
    return None if weights in ("", RANDOM) else weights


_Own = tuple[Values, Values] | None  # a normalisation that belongs to the network's origin


def _check_grammar(spec: str) -> None:
    """Refuse an invalid model spec, and name the fix."""
    origin, colon, _ = spec.partition(":")
    if ".py:" in spec or (colon and origin in ("timm", "torchvision")):
        return
    if spec.endswith(".py"):
        raise DodistillError(f"{spec} is a file; name the function in it that builds the model: {spec}:FACTORY.")
    if spec.endswith((".pt", ".pth", ".th", ".bin", ".ckpt")):
        raise DodistillError(f"{spec} contains weights, not a network; use load_model(NAME, weights='{spec}').")
    if colon:
        raise DodistillError(f"{nearest(origin, ['timm', 'torchvision'], 'origin of models')} A model is {_GRAMMAR}.")
    if (Path(spec) / "student.safetensors").is_file():
        raise DodistillError(f"{spec} is a run folder; its student is {Path(spec) / 'student.safetensors'}.")
    if "/" in spec or "\\" in spec or "." in spec:
        raise DodistillError(f"{spec!r} is not a model; use {_GRAMMAR}.")


def _build(
    spec: str, num_classes: int | None, in_channels: int | None, image_size: Size | None
) -> tuple[nn.Module, _Own]:
    if ".py:" in spec:
        return _from_file(spec, num_classes, in_channels), None
    if spec.startswith("timm:"):
        return _from_timm(spec[5:], num_classes, in_channels, image_size)
    if spec.startswith("torchvision:"):
        return _from_torchvision(spec[12:], num_classes, in_channels), NORMALISATION["imagenet"]
    if num_classes is None and (spec in zoo.zoo_names() or spec.startswith("tiny")):
        raise DodistillError(f"cannot infer num_classes for {spec}; pass it, or weights to read it from.")
    return zoo.build(spec, num_classes or 1, in_channels or zoo.default_channels(spec)), None


def _from_timm(name: str, classes: int | None, channels: int | None, size: Size | None) -> tuple[nn.Module, _Own]:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises RuntimeError
        raise DodistillError(f"timm:{name} needs timm ({error}): pip install 'dodistill[timm]'") from error
    if not timm.is_model(name.partition(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise DodistillError(f"timm has no model {name!r}; similar names: {', '.join(close) or 'none'}.")
    kwargs: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if channels is not None:
        kwargs["in_chans"] = channels
    net: Any
    try:
        net = timm.create_model(name, pretrained=False, **(kwargs | ({"img_size": size} if size else {})))
    except TypeError:  # convolutional networks take no img_size
        net = timm.create_model(name, pretrained=False, **kwargs)
    own = (list(net.pretrained_cfg["mean"]), list(net.pretrained_cfg["std"]))
    if channels == 1:
        own = ([sum(own[0]) / len(own[0])], [sum(own[1]) / len(own[1])])
    return net, own if channels in (None, 1, len(own[0])) else None


def _from_torchvision(name: str, classes: int | None, channels: int | None) -> nn.Module:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise DodistillError(
            f"torchvision:{name} needs a torchvision that fits this torch ({error}): pip install 'dodistill[timm]'"
        ) from error
    known = models.list_models(module=models)
    if name not in known:
        raise DodistillError(nearest(name, known, "torchvision model"))
    if channels not in (None, 3):
        raise DodistillError(f"torchvision:{name} takes 3 channels, not {channels}; use the zoo or timm:NAME.")
    net = models.get_model(name, weights=None, **({} if classes is None else {"num_classes": classes}))
    assert isinstance(net, nn.Module)
    return net


def _from_file(spec: str, classes: int | None, channels: int | None) -> nn.Module:
    """Import the file under a unique name and call its factory."""
    path, name = spec.rsplit(":", 1)
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise DodistillError(f"there is no file {path} of {spec!r} (looked for from {Path.cwd()}); correct the path.")
    module_spec = importlib.util.spec_from_file_location(f"_dodistill_file_{file.stem}", file)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickling look there
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a file must not end the program, least of all with exit status 0
        raise DodistillError(f"{path} does not import: {type(error).__name__}: {error}. Correct the file.") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        callables = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise DodistillError(f"{path}: {nearest(name, callables, 'factory')}")
    given = {"num_classes": classes, "in_channels": channels}
    try:
        net = factory(**{k: v for k, v in given.items() if k in _parameters(factory) and v is not None})
    except (Exception, SystemExit) as error:
        raise DodistillError(f"{spec} failed: {type(error).__name__}: {error}") from error
    if not isinstance(net, nn.Module):
        raise DodistillError(f"{spec} returned a {type(net).__name__}; it must return a torch.nn.Module.")
    return net


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    """The names of its parameters; empty for callables in C without a signature."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return ()
