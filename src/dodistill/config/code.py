"""Which code a run's methods had: one hash for each of its choices, of the file of that choice.

The hash is of what Python reads: comments, docstrings, blank lines and line breaks do not count, so that a reworded
file is the same code. Helpers of an axis (`shared/`), the engine and the models are not part of it. A method that is
not part of this package is identified by the sha256 of its file, which also belongs to the identity of its cells.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from . import registry
from .tree import Distill

ROOT = Path(__file__).parent.parent


def code_of(config: Distill) -> dict[str, str]:
    """{"source fast": 16 hex digits, "intervention kdci": ...} for each choice of a config."""
    outside = {(m.axis, m.config): m.code for m in config.methods}
    chosen = [(axis, getattr(config, axis)) for axis in ("source", "criterion", "update", "replay")]
    chosen += [("source", part) for part in config.source.members.values()]
    chosen += [("intervention", act) for act in config.interventions]
    out = {}
    for axis, settings in chosen:
        fingerprint = outside.get((axis, type(settings)))
        own = ROOT / registry.AXES[axis] / f"{settings.name}.py"
        out[f"{axis} {settings.name}"] = _of_file(own) if fingerprint is None else fingerprint[:16]
    return out


def changed(record: Mapping[str, Any], now: Mapping[str, str]) -> list[str] | None:
    """The choices whose code is not that of a record of a cell; None for a record without hashes."""
    then = record.get("code")
    if not isinstance(then, Mapping) or not then:
        return None
    return [name for name, code in now.items() if then.get(name) != code]


@cache
def _of_file(path: Path) -> str:
    return hash_of(path.read_text(encoding="utf-8"))


def hash_of(text: str) -> str:
    """16 hex digits of Python source, the same in every version of Python that reads it alike."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0].value if node.body and isinstance(node.body[0], ast.Expr) else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                node.body = node.body[1:]
    return hashlib.sha256(_written(tree).encode()).hexdigest()[:16]


def _written(node: object) -> str:
    """A syntax tree as text. Empty fields are left out: newer versions of Python have more of them."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({','.join(f'{name}={_written(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_written, node))}]"
    return repr(node)
