"""`path/to/file.py:factory`: a function of the user's that builds a network."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import DodistillError, nearest
from ..normalized import Normalized
from .shared import Built


def build(spec: str, classes: int | None, channels: int | None) -> Built:
    """Import the file under a unique name and call its factory. A `Normalized` brings its own normalisation."""
    net = _made(spec, classes, channels)
    if isinstance(net, Normalized):
        return Built(net.model, (net.mean.flatten().tolist(), net.std.flatten().tolist()), whole=net)
    return Built(net)


def _made(spec: str, classes: int | None, channels: int | None) -> nn.Module:
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
    if isinstance(factory, nn.Module):
        raise DodistillError(
            f"{spec} is a network, not a function that builds one; add def make(): return {name} to {path}, and give "
            f"{path}:make."
        )
    if not callable(factory):
        callables = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise DodistillError(f"{path}: {nearest(name, callables, 'factory')}")
    given = {"num_classes": classes, "in_channels": channels}
    try:
        net = factory(**{k: v for k, v in given.items() if k in _parameters(factory) and v is not None})
    except (Exception, SystemExit) as error:
        raise DodistillError(
            f"{spec} failed: {type(error).__name__}: {error}. It is called with num_classes and in_channels, if it "
            "takes them, and nothing else; give other parameters defaults."
        ) from error
    if not isinstance(net, nn.Module):
        raise DodistillError(f"{spec} returned a {type(net).__name__}; it must return a torch.nn.Module.")
    return net


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    """The names of its parameters; empty for callables in C without a signature."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return ()
