"""The choices on each axis. An axis is a folder, and a choice on it is a file in that folder.

Helpers of an axis are in `shared/` below it. Choices from elsewhere, by path, entry point or class, are in `plugins`.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from functools import cache
from types import ModuleType
from typing import Literal, overload

from ..errors import DodistillError, nearest
from . import plugins
from .contracts import (
    CriterionSettings,
    DictionarySettings,
    InterventionSettings,
    ReplaySettings,
    Settings,
    SourceSettings,
    UpdateSettings,
)
from .plugins import AXES as AXES
from .plugins import Allow, Method


@cache
def names(axis: str) -> tuple[str, ...]:
    """The choices on `axis` in this package, by file name, without importing them (so that help is quick)."""
    package = importlib.import_module(f"dodistill.{AXES[axis]}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg))


def known(axis: str) -> tuple[str, ...]:
    """The choices on `axis` in this package and in installed packages."""
    return (*names(axis), *sorted(set(plugins.offered(axis)) - set(names(axis))))


def own(axis: str, name: str) -> Method:
    """A choice in this package."""
    return Method(axis, name, importlib.import_module(f"dodistill.{AXES[axis]}.{name}").Config)


def find(axis: str, what: str | type, allow: Allow = False, code: str = "") -> Method:
    """The choice on `axis` given by `what`: a name, a path or a config class.

    Args:
        allow: which paths may be run; see `plugins.refuse`.
        code: the fingerprint that its file must have; empty: any.
    """
    if not isinstance(what, str):
        folder, _, file = what.__module__.rpartition(".")
        if folder == f"dodistill.{AXES[axis]}" and file in names(axis) and own(axis, file).config is what:
            return own(axis, file)
        method = plugins.from_class(axis, what, code)
        _require_free(axis, method.name, f"{axis} {what.__qualname__}")
        return method
    if plugins.is_path(what):
        plugins.refuse(what, f"--{axis} {what}", allow)
        return load(what, axis, code)
    if what in names(axis):
        if code:
            raise DodistillError(f"{axis} {what} is part of dodistill and has no file of its own; remove `code`.")
        return own(axis, what)
    if points := plugins.offered(axis).get(what):
        _require_free(axis, what, f"{axis} {what} of {plugins.packages(points)}")
        return plugins.load_entry_point(axis, what, code)
    if code:
        raise DodistillError(
            f"{axis} {what} is not part of dodistill: install the package that offers it, give the path of its file, "
            f"or in Python the object, {axis}=...; {nearest(what, known(axis), axis)}"
        )
    raise DodistillError(nearest(what, known(axis), axis))


def clash(axis: str, name: str) -> str:
    """A warning if an installed package offers a name of this package, which keeps the name; else empty."""
    rivals = plugins.offered(axis).get(name, ()) if name in names(axis) else ()
    if not rivals:
        return ""
    return (
        f"{axis} {name} is part of dodistill. {plugins.packages(rivals)} also offers a {name}, which cannot be chosen: "
        "rename its entry point."
    )


def load(path: str, axis: str = "", code: str = "") -> Method:
    """The method in a file that the user allowed to run; without `axis`, that of its Config."""
    method = plugins.load_file(path, axis, code)
    _require_free(method.axis, method.config.name, path)
    return method


def _require_free(axis: str, name: str, where: str) -> None:
    """Refuse a name that cannot be a flag or a folder, or that is taken."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise DodistillError(
            f"{where}: the name {name!r} cannot be part of flags and folders; use letters, digits and _."
        )
    if name in names(axis):
        raise DodistillError(f"{where}: {name} is a choice of dodistill on axis {axis}; choose another name.")


@overload
def config(axis: Literal["source"], name: str) -> type[SourceSettings]: ...
@overload
def config(axis: Literal["intervention"], name: str) -> type[InterventionSettings]: ...
@overload
def config(axis: Literal["criterion"], name: str) -> type[CriterionSettings]: ...
@overload
def config(axis: Literal["update"], name: str) -> type[UpdateSettings]: ...
@overload
def config(axis: Literal["replay"], name: str) -> type[ReplaySettings]: ...
@overload
def config(axis: str, name: str) -> type[Settings]: ...
def config(axis: str, name: str) -> type[Settings]:
    """The config dataclass of a choice by name: the class named `Config` in its file."""
    return (own if name in names(axis) else find)(axis, name).config


def module(axis: str, name: str) -> ModuleType:
    """The module of a choice by name."""
    return sys.modules[config(axis, name).__module__]


def dictionary() -> type[DictionarySettings]:
    """The config dataclass of the confounder dictionary, which all interventions share."""
    module = importlib.import_module("dodistill.interventions.shared.dictionary")
    found: type[DictionarySettings] = module.DictionaryConfig
    return found
