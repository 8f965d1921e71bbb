"""Methods that are not part of this package: from a file, from an installed package, or from a class in Python.

    --source my_method.py              a path that the user typed; `load_file` runs the file
    [project.entry-points."dodistill.sources"]
    my_method = "my_package.my_method" a module of an installed package, by its entry point; `load_entry_point`
    distill(..., source=MySource())    an object, or its class; `from_class`

A path in a recipe, a config.json or a checkpoint is not enough to run its code: `permitted` tells whether the user
allowed the path. A method is identified by its name and by the sha256 of its file, so that a run resumes only with the
method that it began with. This module imports torch only through the methods that it loads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, get_args, get_type_hints

from ..errors import DodistillError
from .contracts import Kind, Settings

AXES = {
    "source": "sources",
    "intervention": "interventions",
    "criterion": "criteria",
    "update": "updates",
    "replay": "replay",
}
#: Which code that a config names may run: all (True), none (False), or the files at these paths.
Allow = bool | Collection[str]
DOCS = "see docs/tutorial.md"
UNKNOWN = "unknown"  #: the fingerprint of a class without a file, as in a notebook
_RESERVED = ("name", "preset", "code")  #: keys beside the settings in a config


@dataclass(frozen=True)
class Method:
    """One choice on an axis.

    Attributes:
        axis: source, intervention, criterion, update or replay.
        name: as in the config: fast, my_method.py, MySource.
        config: the dataclass of its settings.
        code: sha256 of its file's text; empty for a method of this package.
    """

    axis: str
    name: str
    config: type[Settings]
    code: str = ""


class Named:
    """Base of all config classes. `name` defaults to the name of the file, or else of the class."""

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            file = cls.__module__.rpartition(".")[2]
            cls.name = file if cls.__name__ == "Config" and file != "__main__" else cls.__name__


# ---------------------------------------------------------------------------------------------------- paths


def is_path(name: str) -> bool:
    """Whether the name of a choice is a file: my_method.py, ./my_method.py, methods/mine.py."""
    return name.endswith(".py") or "/" in name or "\\" in name


def tidy(path: str) -> str:
    """A path in the form of the config: ./my_method.py becomes my_method.py. A relative path stays relative."""
    return Path(os.path.normpath(os.path.expanduser(path))).as_posix()


def label(name: str) -> str:
    """The name of a choice in text, folders and flags: my_method for methods/my_method.py."""
    return Path(name).stem if is_path(name) else name


def same(a: object, b: object) -> bool:
    """Whether two choices, each given by name, path or class, are the same."""
    if not (isinstance(a, str) and isinstance(b, str)):
        return a is b
    if is_path(a) and is_path(b):
        return os.path.abspath(tidy(a)) == os.path.abspath(tidy(b))
    return a == b


def names_in(given: object) -> list[str]:
    """The names in a choice of a config tree; interventions are joined by +. Classes and objects have none."""
    given = given.get("name") if isinstance(given, Mapping) else given
    return [n.strip() for n in given.split("+")] if isinstance(given, str) else []


def model_file(spec: str) -> str:
    """The file in `net.py:make`, the grammar of models; empty for other models."""
    file, found, _ = spec.rpartition(":")
    return file if found and file.endswith(".py") else ""


def paths(tree: Mapping[str, Any]) -> dict[str, str]:
    """{code file: flag that names it} for all files that an expanded config tree names, as choices or as models."""
    found = {n: f"--{axis} {n}" for axis in AXES for n in names_in(tree.get(axis)) if is_path(n)}
    data = tree.get("data")
    models = {"teacher": tree.get("teacher"), "student": tree.get("student")}
    models["data.foreign"] = data.get("foreign") if isinstance(data, Mapping) else None
    for flag, model in models.items():
        spec = model.get("spec") if isinstance(model, Mapping) else model
        if isinstance(spec, str) and (file := model_file(spec)):
            found[file] = f"--{flag} {spec}"
    return found


def permitted(path: str, allow: Allow) -> bool:
    """Whether the user allowed the code at `path`."""
    return allow if isinstance(allow, bool) else any(same(path, other) for other in allow)


def refuse(path: str, flag: str, allow: Allow) -> None:
    """Raise DodistillError for a path in a config that the user did not allow; `flag` is the flag to type it."""
    if not permitted(path, allow):
        raise DodistillError(
            f"the config names the code in {path}. Code that a recipe names runs only if you allow it: read the file, "
            f"then give --allow-code, or type the path yourself ({flag}); in Python give allow_code=True."
        )


# -------------------------------------------------------------------------------------------------- loading


def text_of(path: str) -> bytes:
    """The bytes of a method's file. Raises DodistillError where there is none."""
    file = Path(tidy(path))
    try:
        return file.read_bytes()
    except OSError as error:
        if file.exists():
            raise DodistillError(f"{path} cannot be read: {error.strerror}; give a Python file.") from error
        raise DodistillError(f"there is no file {path} (looked for from {Path.cwd()}); correct the path.") from error


def fingerprint(text: bytes) -> str:
    """The sha256 of a file, as `sha256sum` prints it."""
    return hashlib.sha256(text).hexdigest()


def load_file(path: str, axis: str = "", began: str = "") -> Method:
    """The method in a file. Runs the file, once for each content.

    Args:
        path: of the file. The user allowed it: see `refuse`.
        axis: the axis on which it is chosen; empty: that of its Config.
        began: the fingerprint that the file must have; empty: any.
    """
    text, name = text_of(path), tidy(path)
    code = fingerprint(text)
    require_code(path, began, code)
    module = _run(Path(name).absolute(), text, path)
    cls = getattr(module, "Config", None)
    if not isinstance(cls, type):
        raise DodistillError(f"{path} has no class Config; {DOCS}.")
    axis, config = check(cls, path, axis)
    if config.name != label(name):
        raise DodistillError(
            f"{path}: Config.name is {config.name!r}, but the file is called {label(name)!r}; remove `name`."
        )
    return Method(axis, name, config, code)


def _run(file: Path, text: bytes, path: str) -> ModuleType:
    """Import a file under a unique module name: files with the same stem, and versions of an edited file, do not
    collide."""
    package = f"dodistill_file_{hashlib.sha256(str(file).encode() + text).hexdigest()[:16]}"
    name = f"{package}.{file.stem}"  # the last part is the default of Config.name
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    parent = ModuleType(package)
    parent.__path__ = []
    sys.modules |= {package: parent, name: module}  # dataclasses, type hints and pickling look there
    try:
        exec(compile(text, str(file), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name], sys.modules[package]
        raise DodistillError(f"{path}, {_reason(error, file, package)}") from error
    return module


def _reason(error: BaseException, file: Path, package: str) -> str:
    """Why a file does not import, and where in it."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"line {error.lineno}: {error.msg}; correct the file."
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, ImportError) and (error.name or "").startswith(package):
        what = "a single file has no relative imports; write `from dodistill.sources import ...`, with the full name."
    return f"line {lines[-1] if lines else 1}: {what}"


def from_class(axis: str, cls: type, began: str = "") -> Method:
    """The method of a class in Python, identified by its name and by the file that contains it."""
    config = check(cls, f"{axis} {cls.__qualname__}", axis)[1]
    code = code_of(cls)
    require_code(f"{axis} {cls.__qualname__}", began, code)
    return Method(axis, config.name, config, code)


def code_of(cls: type) -> str:
    """The fingerprint of the file that contains a class; without a file, that of its source text; else UNKNOWN."""
    try:
        file = inspect.getsourcefile(cls)
        if file and Path(file).is_file():
            return fingerprint(Path(file).read_bytes())
        return fingerprint(inspect.getsource(cls).encode())
    except (OSError, TypeError):
        return UNKNOWN


def require_code(what: str, began: str, code: str) -> None:
    """Refuse a method whose file differs from the file that the config was made with."""
    if began and began != code:
        raise DodistillError(
            f"{what} has changed: the config has sha256 {began[:12]} for its file, which now has {code[:12]}. A "
            "changed method is another run: restore the file, or remove the line `code` from the config."
        )


# --------------------------------------------------------------------------------------------- entry points


def offered(axis: str) -> Mapping[str, tuple[importlib.metadata.EntryPoint, ...]]:
    """The entry points of installed packages on `axis`, by name, without importing them."""
    return _offered(AXES[axis], tuple(sys.path))


@cache
def _offered(folder: str, _path: tuple[str, ...]) -> Mapping[str, tuple[importlib.metadata.EntryPoint, ...]]:
    out: dict[str, tuple[importlib.metadata.EntryPoint, ...]] = {}
    for point in importlib.metadata.entry_points(group=f"dodistill.{folder}"):
        if point not in out.get(point.name, ()):  # one package may be found twice on the path
            out[point.name] = (*out.get(point.name, ()), point)
    return out


def packages(points: Iterable[importlib.metadata.EntryPoint]) -> str:
    """Which installed packages have these entry points."""
    dists = {f"{p.dist.name} {p.dist.version}" if p.dist is not None else p.value for p in points}
    return " and ".join(sorted(dists))


def load_entry_point(axis: str, name: str, began: str = "") -> Method:
    """The method that an installed package offers as `name`."""
    points = offered(axis)[name]
    who = f"{axis} {name} of {packages(points)}"
    if len(points) > 1:
        raise DodistillError(f"{who}: several packages offer this name; uninstall all but one.")
    point = points[0]
    try:
        module = importlib.import_module(point.module)
    except (Exception, SystemExit) as error:
        raise DodistillError(
            f"{who}: {point.module} does not import: {type(error).__name__}: {error}. Repair or uninstall the package."
        ) from error
    cls = getattr(module, "Config", None)
    if point.attr or not isinstance(cls, type):
        raise DodistillError(
            f"{who}: its entry point is {point.value}; it must name a module that has a class Config; {DOCS}."
        )
    config = check(cls, f"{who} ({point.module})", axis)[1]
    if config.name != name:
        raise DodistillError(
            f"{who}: the entry point is called {name!r}, but its Config.name is {config.name!r}; use one name for both."
        )
    code = code_of(cls)
    require_code(who, began, code)
    return Method(axis, name, config, code)


# ------------------------------------------------------------------------------------------------- checking


def base(axis: str) -> Any:
    """The class that every `Config` on an axis derives from."""
    module = importlib.import_module(f"dodistill.{AXES[axis]}.shared.base")
    return getattr(module, f"{axis.capitalize()}Config")


def check(cls: Any, where: str, axis: str = "") -> tuple[str, type[Settings]]:
    """Refuse a class that is no complete `Config`, and name what it lacks. Returns its axis and the class."""
    its = next((a for a in AXES if issubclass(cls, base(a))), None)
    what = cls.__name__
    if its is None:
        need = f"{axis.capitalize()}Config" if axis else "SourceConfig, or that of another axis"
        raise DodistillError(
            f"{where}: {what} does not derive from {need}; write `class {what}({need.split(',')[0]}):`, {DOCS}."
        )
    if axis and its != axis:
        raise DodistillError(f"{where}: {what} is a choice on axis {its}, not {axis}; give it by --{its}.")
    if "__dataclass_fields__" not in vars(cls):
        raise DodistillError(f"{where}: {what} is not a dataclass; put @dataclass(frozen=True) above it, {DOCS}.")
    if cls.build is base(its).build:
        made = "Update" if its == "update" else its.capitalize()
        given = "self" if its == "update" else "self, context"
        raise DodistillError(f"{where}: {what} has no method `build({given}) -> {made}`; {DOCS}.")
    if inspect.isabstract(cls):
        lacks = ", ".join(sorted(cls.__abstractmethods__))
        raise DodistillError(f"{where}: {what} lacks {lacks}; {DOCS}.")
    try:
        get_type_hints(cls)
    except Exception as error:
        raise DodistillError(
            f"{where}: the types of {what}'s fields cannot be read ({error}); import the names that they use."
        ) from error
    for field in dataclasses.fields(cls):
        if field.name in _RESERVED:
            raise DodistillError(f"{where}: {what}.{field.name} is a reserved key of the config; rename the setting.")
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise DodistillError(f"{where}: {what}.{field.name} has no default; every setting needs one.")
    if its == "source":
        _check_source(cls, where)
    return its, cls


def _check_source(cls: Any, where: str) -> None:
    kinds = get_args(Kind)
    if getattr(cls, "kind", None) not in kinds:
        raise DodistillError(
            f"{where}: {cls.__name__}.kind is {getattr(cls, 'kind', None)!r}; it must be one of {', '.join(kinds)}."
        )
    if not set(cls.needs) <= {"attention", "batchnorm", "unlabeled"}:
        raise DodistillError(
            f"{where}: {cls.__name__}.needs is {set(cls.needs)}; it may hold attention, batchnorm, unlabeled."
        )
    if not isinstance(cls.presets, Mapping) or not all(isinstance(p, Mapping) for p in cls.presets.values()):
        raise DodistillError(
            f"{where}: {cls.__name__}.presets must be a mapping of name -> settings, as in "
            '{"desk": {"optim": {"lr": 0.1}}}.'
        )
