"""An axis is a folder, and a choice on it is a file in that folder. Helpers of an axis are in `shared/` below it."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

from ..errors import DodistillError, nearest

AXES = {
    "source": "sources",
    "intervention": "interventions",
    "criterion": "criteria",
    "update": "updates",
    "replay": "replay",
}


@cache
def names(axis: str) -> tuple[str, ...]:
    """The choices on `axis`, by file name, without importing them (so that help is quick)."""
    package = importlib.import_module(f"dodistill.{AXES[axis]}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg))


def module(axis: str, name: str) -> ModuleType:
    """The module of one choice. Raises DodistillError with the nearest names when there is none."""
    if name not in names(axis):
        raise DodistillError(nearest(name, names(axis), axis))
    return importlib.import_module(f"dodistill.{AXES[axis]}.{name}")


def config(axis: str, name: str) -> type:
    """The config dataclass of one choice: the one class in its file named `Config`."""
    cls = module(axis, name).Config
    assert isinstance(cls, type)
    return cls


def dictionary() -> type:
    """The config dataclass of the confounder dictionary, which all interventions share."""
    cls = importlib.import_module("dodistill.interventions.shared.dictionary").DictionaryConfig
    assert isinstance(cls, type)
    return cls
