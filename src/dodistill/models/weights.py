"""Reads and writes weights: no code of a file runs, writes are atomic, and mismatches are refused."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import shlex
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ..errors import DodistillError
from ..files import replacing
from . import zoo
from .heads import attach, describe
from .normalized import Normalized

_INSIDE = ("state_dict", "model_state_dict", "model", "net")  # where training scripts put the state dict
_HEAD = re.compile(r"(^|\.)(fc|linear|classifier|head|heads)(\.\w+)?\.weight$")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Normalized

_REFUSED = """{path} is a pickle that would run code when read ({reason}); refused. Ask its author for a state dict, \
or, if you trust it, convert it once yourself:
  python -c "import sys, torch; o = torch.load(sys.argv[1], map_location='cpu', weights_only=False); \
d = o if isinstance(o, dict) else {{}}; m = torch.nn.Module; \
o = next((v for v in [*map(d.get, {inside}), *(v for v in d.values() if isinstance(v, m))] \
if isinstance(v, (dict, m))), o); \
torch.save(o.state_dict() if hasattr(o, 'state_dict') else o, 'converted.pt')" {quoted}"""


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `save_model` wrote into a `.safetensors` file; {} for a file of another origin."""
    path = _existing(path)
    try:
        with safe_open(path, "pt") as f:
            raw = f.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DodistillError(f"{path} is damaged or truncated ({error}); copy or download it again.") from error
    metadata = {}
    for key, value in raw.items():
        with contextlib.suppress(ValueError, RecursionError):  # other programs' metadata need not be JSON
            metadata[key] = json.loads(value)
    for key, (right, kind) in _METADATA.items():
        if metadata.get(key) is not None and not right(metadata[key]):
            raise DodistillError(
                f"{path}: its metadata say {key} = {metadata[key]!r}; it must be {kind}. Save the model again."
            )
    return metadata


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _values(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, int | float) for v in value)


def _size(value: object) -> bool:
    return _positive(value) or (isinstance(value, list) and len(value) == 2 and all(map(_positive, value)))


def _names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v.strip() and v.isprintable() for v in value)


def _head(value: object) -> bool:
    return isinstance(value, dict) and set(value) <= {"temperature", "weights"}


#: What `save_model` writes and `load_model` reads: key -> (whether a value is sound, what it must be).
_METADATA: dict[str, tuple[Callable[[object], bool], str]] = {
    "spec": (lambda v: isinstance(v, str), "the name of a network"),
    "num_classes": (_positive, "a number of classes"),
    "in_channels": (_positive, "a number of channels"),
    "image_size": (_size, "a height in pixels, or [height, width]"),
    "classes": (_names, "a list of names"),
    "mean": (_values, "a list of numbers"),
    "class": (lambda v: isinstance(v, str), "the name of a class"),
    "config": (lambda v: isinstance(v, dict), "the config of a Hugging Face network"),
    "std": (lambda v: _values(v) and all(s > 0 for s in v), "a list of positive numbers"),  # type: ignore[attr-defined]
    "head": (_head, "the settings of a context head"),
}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file, or in a torch file (`.pt`, `.pth`, `.th`) that holds only tensors.

    Raises DodistillError for a file that is missing, damaged, would run code, or contains something else.
    """
    path = _existing(path)
    damaged = f"{path} is damaged or truncated ({{}}); copy or download it again."
    if named_safetensors(path):
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise DodistillError(damaged.format(error)) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings on pickle protocols; the error below replaces them
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted or path.read_bytes()[:1] == b"\x80":
            reason = f"it calls {wanted[1]}" if wanted else "it holds more than tensors"
            raise DodistillError(
                _REFUSED.format(path=path, reason=reason, quoted=shlex.quote(str(path)), inside=_INSIDE)
            ) from error
        raise DodistillError(damaged.format("it is not a torch file")) from error
    except Exception as error:  # damage raises many types: RuntimeError, EOFError, KeyError, ...
        raise DodistillError(damaged.format(str(error).splitlines()[0] if str(error) else repr(error))) from error
    for key in _INSIDE:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if (
        not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values())
        or not all(isinstance(k, str) for k in content)
    ):  # fmt: skip
        found = sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__
        raise DodistillError(
            f"{path} holds no state dict (found {found}); save one with torch.save(net.state_dict(), ..)."
        )
    return dict(content)


def named_safetensors(name: str | Path) -> bool:
    """Whether a file has the suffix .safetensors; case does not matter."""
    return str(name).lower().endswith(".safetensors")


def _require_weights(path: Path) -> None:
    """Refuse whole files of other kinds, which are no damaged weights."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise DodistillError(f"{path} is a pointer of Git LFS, not the file itself; run git lfs pull.")
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith(".npy") for name in names):
        raise DodistillError(
            f"{path} holds numpy arrays; give a .safetensors file, or save a state dict: "
            "torch.save({name: torch.from_numpy(array), ...}, 'weights.pt')."
        )
    if any(name.endswith("/constants.pkl") for name in names):
        raise DodistillError(
            f"{path} is a TorchScript program, which may hold code, not weights. If you trust it, convert it once "
            f"yourself:\n  python -c \"import sys, torch; torch.save(torch.jit.load(sys.argv[1], 'cpu').state_dict(), "
            f"'converted.pt')\" {shlex.quote(str(path))}"
        )


def guess_classes(state: Mapping[str, Tensor]) -> int | None:
    """Class count by the rows of the classifier: the last matrix, one with a classifier's name first (files may be
    sorted by name). None without a matrix."""
    matrices = {k: v.shape[0] for k, v in state.items() if v.dim() == 2 and k.endswith("weight")}
    heads = [rows for k, rows in matrices.items() if _HEAD.search(k)]
    rows = heads or list(matrices.values())
    return rows[-1] if rows else None


#: Names of first convolutions. A file may list its tensors in any order (safetensors: by name).
_STEM = re.compile(r"^(conv1|conv_stem|stem\.\w+|features\.0(\.0)?|block0\.0|patch_embed\.proj)\.weight$")


def guess_channels(state: Mapping[str, Tensor]) -> int | None:
    """Input channels of the first convolution: by its name, else the file's first if it reads 1 to 4. None: unsure."""
    convolutions = {k: v.shape[1] for k, v in state.items() if v.dim() == 4 and k.endswith("weight")}
    stem = next((width for k, width in convolutions.items() if _STEM.match(k)), None)
    first = next(iter(convolutions.values()), 0)
    return stem or (first if 1 <= first <= 4 else None)


def load_state(net: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load `state` into `net`, strictly, except for a known prefix and BatchNorm's step counters.

    Raises DodistillError that names what differs: the class count, shapes, missing and unexpected keys.
    """
    own = net.state_dict()
    state = _stripped(state, own)
    for key, value in state.items():
        _require_numbers(key, value, key in own and own[key].is_floating_point(), name)
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    matrices = [k for k in own if own[k].dim() == 2 and k.endswith("weight")]
    head = matrices[-1] if matrices else ""
    if head in shapes and own[head].shape[1:] == state[head].shape[1:]:
        raise DodistillError(
            f"weights {name} have {state[head].shape[0]} classes, but num_classes is {own[head].shape[0]} "
            f"({head}: {tuple(state[head].shape)} against {tuple(own[head].shape)}); "
            f"use num_classes={state[head].shape[0]} or other weights."
        )
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own and not k.endswith("num_batches_tracked")]
    if shapes or missing or unexpected:
        differ = [f"{k} is {tuple(state[k].shape)}, the network has {tuple(own[k].shape)}" for k in shapes]
        lines = [("other shapes", differ), ("missing", missing), ("unexpected", unexpected)]
        told = "; ".join(f"{what}: {_few(keys)}" for what, keys in lines if keys)
        others = zoo.fitting(state, guess_classes(state) or 1, guess_channels(state) or 3)
        fix = f"they fit {' and '.join(others)}" if others else "give the weights of this one"
        raise DodistillError(f"weights {name} belong to another network; {fix}. {told}.")
    net.load_state_dict(dict(state), strict=False)


def _require_numbers(key: str, value: Tensor, floating: bool, name: str) -> None:
    """Refuse a tensor that is not dense numbers in memory, not floating point where the network is, or not finite."""
    fix = "save the network's own state dict, in floating point"
    if value.layout != torch.strided or value.is_meta:
        raise DodistillError(f"weights {name}: {key} is {'meta' if value.is_meta else 'sparse'}; {fix}.")
    if value.is_complex() or (floating and not value.is_floating_point()):
        raise DodistillError(f"weights {name}: {key} is {str(value.dtype).removeprefix('torch.')}; {fix}.")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        bad = "NaN" if bool(torch.isnan(value).any()) else "infinity"
        raise DodistillError(f"weights {name}: {key} contains {bad}; give the weights of a training that did not fail.")


def load_saved(model: nn.Module, path: str | Path) -> None:
    """Load into `model`, in place, weights that `save_model` wrote for the same network, and its context head, if
    any."""
    net, known = model.model if isinstance(model, Normalized) else model, read_metadata(path)
    if "head" in known:
        attach(net, **known["head"])
    load_state(net, read_weights(path), str(path))


def save_model(model: nn.Module, path: str | Path, **extra_metadata: Any) -> Path:
    """Write weights as `.safetensors`, atomically, with the metadata for `load_model(path)` to rebuild the network.

    The keys are those of the bare network. Metadata (JSON strings): `spec, num_classes, in_channels, image_size,
    classes, mean, std` of a `Normalized`, `head` of a network with a context head, and `extra_metadata`. Raises
    DodistillError when the disk is full or not writable.
    """
    path, net, metadata = Path(path), model, dict[str, Any]()
    if isinstance(model, Normalized):
        net, metadata = model.model, dict(model.spec)
        metadata |= {"mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist()}
    metadata |= describe(net) | extra_metadata
    # cloned: safetensors needs dense tensors without shared memory
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in net.state_dict().items()}
    data = to_bytes(tensors, {"format": "pt"} | {k: json.dumps(v) for k, v in metadata.items()})
    with replacing(path) as file:
        file.write(data)
    return path


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise DodistillError(f"no weights file at {path} (looked for from {Path.cwd()}); correct the path.")
    _require_weights(path)
    return path


def _stripped(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    while True:
        prefix = next((p for p in _PREFIXES if state and all(k.startswith(p) for k in state)), None)
        if prefix is None or any(k in own for k in state):
            return state
        state = {k[len(prefix) :]: v for k, v in state.items()}


def _few(items: list[str], n: int = 4) -> str:
    return ", ".join(items[:n]) + (f" and {len(items) - n} more" if len(items) > n else "")
