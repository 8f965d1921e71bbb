"""`load_model`: one grammar for networks of the zoo, of libraries and of files."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import plugins
from ..config.plugins import Allow
from ..data.classes import Given, read_names, require_count
from ..errors import DodistillError, at_least, nearest
from ..functional.fresh_weights import seeding
from ..functional.memory_format import place
from .heads import attach
from .names import names_of_origin
from .normalized import NORMALISATION, Normalized, UnknownNormalisation, constants
from .origins import LIBRARIES, build
from .weights import guess_channels, guess_classes, load_state, named_safetensors, read_metadata, read_weights

Values = Sequence[float]
Size = int | Sequence[int]  #: pixels of a side of square images, or (height, width)
_GRAMMAR = (
    "a zoo name, timm:NAME, torchvision:NAME, hf:OWNER/NAME, path/to/file.py:factory, or a .safetensors file saved by "
    "dodistill"
)
#: In place of a file of weights: those that timm, torchvision or Hugging Face publish with the name.
PRETRAINED = "pretrained"
#: In place of a file of weights: random ones are meant.
RANDOM = "random"


class UnknownNetwork(DodistillError):
    """A file of weights does not name its network, or names code that the user did not allow to run."""

    def __init__(self, file: str | Path, spec: str, cls: str = "", fix: str = "") -> None:
        self.file, self.spec, self.cls = file, spec, cls
        name = spec or ("path/to/file.py:factory" if cls else "NAME")
        its = f", your class {cls}" if cls else ""
        typed = {"spec": shlex.quote(name), "file": shlex.quote(str(file))}
        fix = fix.format(**typed) or f"load_model({name!r}, weights={str(file)!r})"
        super().__init__(
            f"{file} names the code {spec}; code runs only if you name it yourself: {fix}."
            if spec
            else f"{file} does not contain the name of its network{its}; use {fix}."
        )


def load_model(
    spec: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: Size | None = None,
    weights: str | Path | None = None,
    mean: str | Values | None = None,
    std: str | Values | None = None,
    input_range: float = 1.0,
    classes: Given | None = None,
    seed: int | None = None,
    allow_code: Allow = False,
) -> Normalized:
    """A network with its normalisation, from images [B, C, H, W] in [0, 1] to logits [B, num_classes].

    `spec` is a zoo name (`wrn40_2`), `timm:NAME`, `torchvision:NAME`, `hf:OWNER/NAME` or `hf:path/to/folder`,
    `path/to/file.py:factory` (the file is imported; the factory is called with `num_classes` and `in_channels` if it
    takes them), or a `.safetensors` file of `save_model`, which contains the rest. If that file names the code of its
    network, the code runs only with `allow_code`: all (True), or those at these paths.

    `weights` is a file (`.safetensors`, or a torch file of tensors), "pretrained" (those published for a name of timm,
    torchvision or Hugging Face, from a local cache or the network; for `hf:` the default), or "random". Omitted values
    are read from the weights. `mean` and `std` are values per channel or a name (`cifar10`), in the range of what the
    network calls white, `input_range` (1, or 255); else those of the saved file, or of timm, torchvision or Hugging
    Face; else none, for fresh weights. `image_size` is a number for square images, or (height, width). `classes` are
    the names of the classes in the order of the logits: a list, a file with one a line, "cat,dog", or Hugging Face's
    `id2label` (`data.classes`); else those of the saved file, of timm, torchvision or Hugging Face; () for none. `seed`
    fixes the fresh weights and leaves torch's global random state unchanged; without a seed they are drawn from that
    state. The memory format is that of `memory_format.place`.

    Raises DodistillError, with the fix, for arguments that do not fit; UnknownNormalisation, which is one, for a file
    of weights whose normalisation is neither known nor given.
    """
    saved: dict[str, Any] = {}
    named = read_names(classes)
    if not isinstance(spec, str) or not spec:
        raise DodistillError(f"a model is named by a text, not by {spec!r}: {_GRAMMAR}.")
    file = None if weights in (None, PRETRAINED, RANDOM) else weights
    if spec.endswith(".safetensors"):
        if weights is not None:
            raise DodistillError(
                f"{spec} already contains weights, but weights is {weights}; give a network's name in place of {spec}."
            )
        saved = read_metadata(spec)
        file, spec = spec, named_network(spec, saved, allow_code)
    elif file is not None and named_safetensors(file):
        saved = read_metadata(file)
    _check_grammar(spec)
    pretrained = weights == PRETRAINED or (file is None and weights is None and spec.startswith("hf:"))
    if pretrained and spec.partition(":")[0] not in LIBRARIES:
        raise DodistillError(f"{spec} has no published weights; give a file of weights.")
    state = None if file is None else read_weights(file)
    counted = saved.get("num_classes") if num_classes is None else num_classes
    asked = saved.get("in_channels") if in_channels is None else in_channels
    if state is not None:
        in_weights = saved.get("num_classes") or guess_classes(state)
        num_classes = in_weights if num_classes is None else num_classes
        in_channels = saved.get("in_channels") or guess_channels(state) if in_channels is None else in_channels
    num_classes = len(named) or None if num_classes is None else num_classes
    at_least(1, "", num_classes=num_classes, in_channels=in_channels)
    image_size = _size(saved.get("image_size") if image_size is None else image_size)
    with seeding(seed):
        built = build(spec, num_classes, in_channels, image_size, pretrained, saved.get("config"))
    net = built.net.float()
    if isinstance(saved.get("head"), dict):
        attach(net, **saved["head"])
    if state is not None:
        load_state(net, state, str(file))
    fresh = net.state_dict()
    convolution = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    first = 0 if convolution is None or convolution.in_channels > 4 else convolution.in_channels
    guessed = in_channels if asked is None and ".py:" in spec else None  # by a list of layers, maybe sorted by name
    in_channels = (None if guessed else in_channels) or built.in_channels or first or guess_channels(fresh) or guessed
    wanted = constants(mean, std, in_channels, input_range)
    if wanted is None:
        try:
            wanted = constants(saved.get("mean"), saved.get("std"), in_channels)
        except DodistillError as error:
            raise DodistillError(f"{file}: mean and std in its metadata do not fit: {error}") from error
    if wanted is None and built.space is None and (file is not None or pretrained):
        raise UnknownNormalisation(spec if file is None else str(file))
    known: dict[str, Any] = {
        "spec": spec,
        # the network lists its layers in their order, a file of weights by name
        "num_classes": counted or built.num_classes or guess_classes(fresh) or num_classes,
        "in_channels": in_channels,
        "image_size": image_size or _size(built.image_size),
    }
    if classes is None:
        named = tuple(saved.get("classes") or ()) or names_of_origin(spec, built.whole or net, known["num_classes"])
    require_count(named, known["num_classes"], "classes" if classes is not None else str(file))
    known |= {"classes": named} if named else {}
    if built.config is not None:
        known["config"] = dict(built.config)
    space = wanted or built.space or NORMALISATION["none"]
    return place(Normalized(net, space[0], space[1], spec=known))


def _size(given: Size | None) -> Size | None:
    """A number for square images, else (height, width)."""
    sides = () if given is None else (given,) if isinstance(given, int) else tuple(given)
    if len(sides) > 2 or not all(isinstance(s, int) and s > 0 for s in sides) or (given is not None and not sides):
        raise DodistillError(f"image_size is {given!r}; give pixels, as in 32, or (height, width), as in (32, 48).")
    return None if not sides else sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])


def named_network(file: str | Path, saved: dict[str, Any], allow_code: Allow = False) -> str:
    """The network that the metadata of a file of weights name. Refuses code that the user did not allow."""
    spec = str(saved.get("spec", ""))
    code = plugins.model_file(spec)
    if not spec or (code and not plugins.permitted(code, allow_code)):
        raise UnknownNetwork(file, spec, str(saved.get("class", "")))
    return spec


def require_weights(spec: str, weights: str, flag: str) -> str | None:
    """`weights` of a model that must be trained, for `load_model`; None where the model brings its own.

    Raises DodistillError, which names `flag`, for a network without weights: its answers would be random.
    """
    if not weights and not spec.endswith(".safetensors") and ".py:" not in spec and not spec.startswith("hf:"):
        _check_grammar(spec)
        published = (
            f"{flag} {PRETRAINED}, for those that are published, " if spec.partition(":")[0] in LIBRARIES else ""
        )
        raise DodistillError(
            f"{spec} has no weights, so its predictions would be random; give {flag} FILE ({published}or {flag} "
            f"{RANDOM}, if that is meant)."
        )
    return weights or None


def refuse_random(spec: str, model: nn.Module, again: nn.Module, flag: str) -> None:
    """Refuse a factory that draws weights: two of its networks, from other seeds, differ."""
    mine = again.state_dict()
    if drawn := [k for k, v in model.state_dict().items() if not torch.equal(v, mine[k])]:
        raise DodistillError(
            f"{spec} returns random weights ({drawn[0]} differs from call to call), so its predictions would be "
            f"random; give {flag} FILE (or {flag} {RANDOM}, if that is meant)."
        )


def _check_grammar(spec: str) -> None:
    """Refuse an invalid model spec, and name the fix."""
    origin, colon, _ = spec.partition(":")
    if ".py:" in spec or (colon and origin in LIBRARIES):
        return
    if spec.endswith(".py"):
        raise DodistillError(f"{spec} is a file; name the function in it that builds the model: {spec}:FACTORY.")
    if spec.endswith((".pt", ".pth", ".th", ".bin", ".ckpt")):
        raise DodistillError(f"{spec} contains weights, not a network; use load_model(NAME, weights='{spec}').")
    if spec.endswith((".onnx", ".pt2")):
        raise DodistillError(f"{spec} is an exported file, not a model; give the student.safetensors of its run.")
    if colon:
        raise DodistillError(f"{nearest(origin, LIBRARIES, 'origin of models')} A model is {_GRAMMAR}.")
    if (Path(spec) / "student.safetensors").is_file():
        raise DodistillError(f"{spec} is a run folder; its student is {Path(spec) / 'student.safetensors'}.")
    if "/" in spec or "\\" in spec or "." in spec:
        raise DodistillError(f"{spec!r} is not a model; use {_GRAMMAR}.")
