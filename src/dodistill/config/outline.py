"""Classes of settings, and the comments beside their fields, read from a file that is not imported.

The help must not load torch, which the files of sources, criteria and commands import. A class of settings consists of
its fields, its bases, and the constants and functions that its values use; none of these needs torch. `read` runs only
those statements of a file, without the methods of classes. The returned class has the fields, defaults, presets and
docstring of the real class, and no behaviour; a run imports the real class.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import io
import sys
import tokenize
import typing
from functools import cache
from pathlib import Path
from typing import Any, cast

from . import registry
from .plugins import Allow

PACKAGE = __name__.split(".")[0]
ROOT = Path(__file__).parent.parent


def read(module: str, name: str) -> Any:
    """The top-level object `name` of `module` in this package, as in read("engine.teach", "Teach").

    Raises Unreadable if it depends on a library outside the standard library.
    """
    return _outline(module).get(name)


def choice(axis: str, name: str, allow: Allow = False, code: str = "") -> type:
    """The settings of one choice on an axis. A choice from outside of this package is imported: `registry.find`.

    Raises DodistillError for an unknown name, with the nearest names, and for a path that may not run.
    """
    if name in registry.names(axis):
        try:
            cls: Any = read(f"{registry.AXES[axis]}.{name}", "Config")
            cls.name = name
            return cast(type, cls)
        except Unreadable:
            pass
    return registry.find(axis, name, allow, code).config


class Unreadable(Exception):
    """The object cannot be read without importing its file."""


def _path(module: str) -> Path:
    """The path of a module of this package."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _statements(path: Path) -> tuple[list[str], list[ast.stmt]]:
    """The lines of a file, and its statements."""
    source = path.read_text(encoding="utf-8")
    return source.splitlines(keepends=True), ast.parse(source).body


@cache
def _outline(module: str) -> Outline:
    return Outline(module)


class Outline:
    """The top-level names of one file, each defined on demand."""

    def __init__(self, module: str) -> None:
        self.module, self.path = module, _path(module)
        self.known: dict[str, Any] = {"__name__": f"{PACKAGE}.{module}"}
        self.statements: dict[str, ast.stmt] = {}
        self.running: list[ast.stmt] = []
        for node in _statements(self.path)[1]:
            for name in _bound(node):
                self.statements[name] = node

    def get(self, name: str) -> Any:
        if name not in self.known:
            node = self.statements[name]
            if isinstance(node, ast.ImportFrom) and node.level:
                self.known[name] = self._from_package(node, name)
            elif node not in self.running:  # else a recursive function
                self.running.append(node)
                self._run(node)
        return self.known.get(name)

    def _from_package(self, node: ast.ImportFrom, name: str) -> Any:
        above = [*self.module.split(".")[: -node.level], *(node.module or "").split(".")]
        package = ".".join(part for part in above if part)
        if package == "config.parts":  # a class whose instances are defaults; its methods are needed, and no torch
            return getattr(importlib.import_module(f"{PACKAGE}.{package}"), name)
        name = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        inner = f"{package}.{name}".lstrip(".")
        return _Names(inner) if _path(inner).is_file() else read(package, name)

    def _run(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            wanted = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for library in wanted:
                if library.split(".")[0] not in sys.stdlib_module_names:
                    raise Unreadable(f"{self.path} needs {library} for its settings.")
        _strip(node)
        for used in ast.walk(node):
            if isinstance(used, ast.Name) and isinstance(used.ctx, ast.Load) and used.id in self.statements:
                self.get(used.id)
        # annotations in classes are evaluated as types; those of functions are not needed
        later = 0 if isinstance(node, ast.ClassDef) else annotations.compiler_flag
        code = compile(ast.Module([node], []), str(self.path), "exec", flags=later, dont_inherit=True)
        exec(code, self.known)


class _Names:
    """A module of this package, as in `from . import dafl`, whose names are read on demand."""

    def __init__(self, module: str) -> None:
        self.__module = module

    def __getattr__(self, name: str) -> Any:
        return read(self.__module, name)


def _bound(node: ast.stmt) -> list[str]:
    """The names that a statement at the top of a file defines."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _strip(node: ast.stmt) -> None:
    """Remove the methods of a class, and the annotations of a function: they may need any library."""
    if isinstance(node, ast.ClassDef):
        fields = [part for part in node.body if not isinstance(part, ast.FunctionDef)]
        node.body = fields or [ast.copy_location(ast.Pass(), node)]
    if isinstance(node, ast.FunctionDef):
        node.returns = None
        for part in ast.walk(node):
            if isinstance(part, ast.arg):
                part.annotation = None


# -------------------------------------------------------------------------------------------------- comments


def comment(cls: type, name: str) -> str:
    """The `#:` comment beside a field, of its own class first; without a comment, the values that the field takes."""
    for base in cls.__mro__:
        if dataclasses.is_dataclass(base) and (text := _comments(base).get(name)):
            return text
    hint = typing.get_type_hints(cls)[name]
    return ", ".join(map(str, typing.get_args(hint))) if typing.get_origin(hint) is typing.Literal else ""


@cache
def _comments(cls: type) -> dict[str, str]:
    """{field: comment} of the fields that a class itself has; empty if its file is not found."""
    try:
        inside, _, module = cls.__module__.partition(".")
        path = _path(module) if inside == PACKAGE else Path(inspect.getsourcefile(cls) or "")
        lines, statements = _statements(path)
    except (OSError, TypeError):  # defined at a prompt
        return {}
    return {
        node.target.id: _comment(lines, node)
        for statement in statements
        if isinstance(statement, ast.ClassDef) and statement.name == cls.__name__
        for node in statement.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _comment(lines: list[str], node: ast.stmt) -> str:
    """The text after `#:` in the lines of a statement, and in the comment lines directly below it."""
    end = node.end_lineno or node.lineno
    while end < len(lines) and lines[end].lstrip().startswith("#:"):
        end += 1
    text = io.StringIO("".join(lines[node.lineno - 1 : end]))
    words = [t.string for t in tokenize.generate_tokens(text.readline) if t.type == tokenize.COMMENT]
    return " ".join(word.removeprefix("#:").strip() for word in words if word.startswith("#:"))
