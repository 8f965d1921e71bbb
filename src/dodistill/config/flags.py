"""Command-line flags from dataclasses: `--part.field VALUE` for every field of the config tree, with its help."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import yaml

from ..errors import DodistillError

#: What people type most, and where it lives in the tree.
SHORT = {
    "teacher": "teacher.spec", "student": "student.spec", "unlabeled": "data.unlabeled", "train": "data.unlabeled",
    "test": "data.test",
    "image_shape": "data.image_shape", "steps": "loop.steps", "batch": "loop.batch", "seed": "loop.seed",
    "device": "loop.device", "precision": "loop.precision", "threads": "loop.threads",
}  # fmt: skip


def value(text: str) -> Any:
    """A flag's text as YAML reads it; `3,32,32` is a list, `1e-3` a float."""
    try:
        out = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        return text
    if isinstance(out, str):
        if re.fullmatch(r"[-+\d.eE]+(,[-+\d.eE]+)+", out):
            return [value(part) for part in out.split(",")]
        if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", out):
            return float(out)
    return out


def raw(tokens: Sequence[str]) -> dict[str, Any]:
    """`--loop.steps 60 --kdci.renormalize` -> {"loop.steps": 60, "kdci.renormalize": True}.

    Raises DodistillError for a token that is no flag.
    """
    out: dict[str, Any] = {}
    i = 0
    while i < len(tokens):
        token = tokens[i]
        if not token.startswith("--") or len(token) < 3:
            raise DodistillError(f"did not expect {token!r}; settings are written --part.field VALUE.")
        name, given, text = token[2:].partition("=")
        name = name.replace("-", "_")
        if given:
            out[name] = value(text)
        elif i + 1 < len(tokens) and not re.match(r"--[a-zA-Z]", tokens[i + 1]):
            out[name] = value(tokens[i + 1])
            i += 1
        else:
            out[name] = True
        i += 1
    return out


def tree(given: Mapping[str, Any], short: Mapping[str, str] = SHORT) -> dict[str, Any]:
    """Flags with their short names spelled out: {"seed": 1} -> {"loop.seed": 1}. Raises DodistillError for a repeat."""
    out: dict[str, Any] = {}
    for name, setting in given.items():
        full = short.get(name, name)
        if full in out:
            raise DodistillError(f"--{name} and --{full} say the same thing; give one of them.")
        out[full] = setting
    return out


@cache
def _source(cls: type) -> str:
    return inspect.getsource(cls)  # parses the whole file


def comment(cls: type, name: str) -> str:
    """What the `#:` comment beside a field says, its own class first; without one, the values that the field takes."""
    sources = [_source(c) for c in cls.__mro__ if dataclasses.is_dataclass(c)]
    # the value may stand in brackets on a line of its own, and the comment go on over several lines
    beside = rf"^ +{name}: [^#\n]*(?:\(\n[^#\n]*)?#: *(.*(?:\n +#: .*)*)$"
    for source in sources:
        if found := re.search(beside, source, re.MULTILINE):
            return re.sub(r"\n +#: ", " ", found.group(1))
    hint = typing.get_type_hints(cls)[name]
    return ", ".join(map(str, typing.get_args(hint))) if typing.get_origin(hint) is typing.Literal else ""


def help_of(cls: type, prefix: str) -> str:
    """One line per field: flag, default, and the `#:` comment beside it in the source."""
    lines = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type) or isinstance(field.default_factory, type):
            continue
        default = "" if field.default is dataclasses.MISSING else f"[{field.default!r}]"
        lines.append(f"  --{prefix}{field.name} {default}  {comment(cls, field.name)}".rstrip())
    return "\n".join(lines)
