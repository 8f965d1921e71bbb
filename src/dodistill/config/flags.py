"""Command-line flags from dataclasses: one for every field, `--part.field VALUE`. tyro reads them and writes the help.

Only the typed flags are passed on, to `tree.resolve` or `tree.build`, which check them: the default of a flag never
overrides a preset or a recipe. Differences from plain tyro:

* Comments come from `outline`. tyro reads only those of imported classes, misses a `#:` after a bracket, and takes the
  second line of a comment for a comment on the next field.
* Values are parsed as YAML, so that `3,32,32` is a list and `--flag` alone is true, as in a recipe.
* The error for an unknown flag is one sentence, like every other error. tyro prints a box of several lines, of which a
  log may keep only the last.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import tyro
import yaml
from tyro.constructors import PrimitiveConstructorSpec

from ..errors import DodistillError, nearest
from . import registry
from .outline import comment

#: Short names of common flags -> their names in the tree.
SHORT = {
    "teacher": "teacher.spec", "student": "student.spec", "unlabeled": "data.unlabeled", "train": "data.unlabeled",
    "test": "data.test", "probe": "data.probe",
    "image_shape": "data.image_shape", "steps": "loop.steps", "batch": "loop.batch", "seed": "loop.seed",
    "time": "loop.time", "lr": "optim.lr", "foreign": "data.foreign.spec",
    "device": "loop.device", "precision": "loop.precision", "threads": "loop.threads",
    "data.foreign": "data.foreign.spec", "classes": "teacher.classes",
}  # fmt: skip
#: Names in the tree -> the names of these flags in the help.
LONG = {f"{axis}.name": axis for axis in registry.AXES if axis != "intervention"} | {"source.preset": "preset"}
REQUIRED = object()  #: the default of a required flag


@dataclass(frozen=True)
class Flag:
    """One flag."""

    name: str  #: as in the tree: loop.steps
    type: Any
    help: str = ""
    default: Any = REQUIRED
    metavar: str = ""
    word: bool = False  #: given without its name, as in `teach MODEL`
    switch: bool = False  #: takes no value

    @property
    def others(self) -> tuple[str, ...]:
        """Further names."""
        return tuple(short for short, name in SHORT.items() if name == self.name)

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values of a boolean or a Literal; else empty."""
        if self.type is bool:
            return ("true", "false")
        return tuple(map(str, get_args(self.type))) if get_origin(self.type) is Literal else ()

    def read(self, words: Sequence[str]) -> Any:
        """The typed value, converted as far as its text determines it. A boolean needs no value."""
        if self.type is bool and not words:
            return True
        if len(words) > 1 and get_origin(self.type) is not tuple:
            raise DodistillError(f"unexpected {words[1]!r} after --{self.name} {words[0]}; give one value.")
        if self.type is str or get_origin(self.type) is Literal:
            return words[0]
        if self.word:
            return tuple(words)
        if types.NoneType in get_args(self.type) and words[0].lower() in ("none", "null"):
            return None
        found = value(words[0])
        if get_origin(self.type) is tuple and isinstance(found, str) and found:
            return [value(word.strip()) for word in found.split(",")]
        if get_origin(self.type) is tuple and isinstance(found, int | float):
            return [found]
        return found


@dataclass(frozen=True)
class Part:
    """Flags with one prefix, under one heading of the help."""

    flags: Sequence[Flag]
    prefix: str = ""
    about: str = ""
    open: bool = False  #: unknown flags with this prefix are accepted, and checked later


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


def shape(text: str) -> tuple[int, int, int] | None:
    """(C, H, W) from "3,32,48", None from nothing."""
    if not text:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() and int(p) for p in parts):
        raise DodistillError(f"--image-shape is {text!r}; it must be channels, height, width, as in 3,32,32.")
    return int(parts[0]), int(parts[1]), int(parts[2])


# ---------------------------------------------------------------------------------------- from a dataclass


def part(settings: type, prefix: str = "", instead: Mapping[str, Any] = types.MappingProxyType({})) -> Part:
    """The flags of a class of settings. `instead`: values of a preset or a recipe, shown as the defaults.

    The help shows the value of a field of type Annotated[str, "DATA"] as DATA. A field without a default, or shown as
    "[FILE]", is positional. A boolean with default False and without a prefix takes no value.
    """
    flags = list(_flags(settings, prefix, instead))
    about = inspect.cleandoc(settings.__doc__ or "")
    return Part(flags, prefix, "" if about.startswith(f"{settings.__name__}(") else about)


def _flags(settings: type, prefix: str, instead: Mapping[str, Any]) -> Iterator[Flag]:
    hints = typing.get_type_hints(settings, include_extras=True)
    for field in dataclasses.fields(settings):
        name, hint, called = f"{prefix}.{field.name}".lstrip("."), hints[field.name], ""
        if get_origin(hint) is Annotated:
            hint, called = get_args(hint)[:2]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            first, *rest = _flags(hint, name, _mapping(instead.get(field.name)))
            yield dataclasses.replace(first, help=f"{comment(settings, field.name)}: {first.help}")
            yield from rest
            continue
        if get_origin(hint) is list:
            default: Any = ()
        else:
            default = instead.get(field.name, REQUIRED if field.default is dataclasses.MISSING else field.default)
        word = default is REQUIRED or called.startswith("[")
        metavar = called.strip("[]") or (field.name.upper() if word else _metavar(hint))
        switch = hint is bool and not prefix and default is False
        text = comment(settings, field.name)
        yield Flag(name, hint, "" if text in metavar else text, default, metavar, word, switch)


def _mapping(given: Any) -> Mapping[str, Any]:
    """A part of a tree; a model may be given by its spec alone."""
    return given if isinstance(given, Mapping) else {"spec": given} if given else {}


def _metavar(hint: Any) -> str:
    """The placeholder for a value of this type in the help."""
    options = [a for a in get_args(hint) if a is not types.NoneType]
    if get_origin(hint) is Literal:
        return "{" + ", ".join(map(str, options)) + "}"
    if get_origin(hint) in (typing.Union, types.UnionType):
        return "|".join([*map(_metavar, options), "none"])
    if get_origin(hint) is tuple:
        return ",".join(_metavar(a) if a is not ... else "..." for a in get_args(hint))
    return {bool: "{true, false}", str: "TEXT"}.get(hint, getattr(hint, "__name__", "VALUE").upper())


def shown(default: Any) -> str:
    """A default in the form in which a user types it."""
    if isinstance(default, bool) or default is None:
        return str(default).lower()
    if isinstance(default, list | tuple):
        return ",".join(map(shown, default))
    return f"{default:.6g}" if isinstance(default, float) else str(default)


# ------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Said:
    """The text that the user typed for a flag, to distinguish it from a default."""

    words: Sequence[Any]


def typed(words: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """{name: text} of those flags that `words` give; the last one counts."""
    found = {}
    for word, following in zip(words, [*words[1:], ""]):
        text = word.partition("=")[2] if "=" in word else following
        if word.startswith("--") and spelled(word) in names and text and not text.startswith("--"):
            found[spelled(word)] = text
    return found


def parse(parts: Sequence[Part], words: Sequence[str], program: str, about: str = "") -> dict[str, Any]:
    """{flag's name: value} of the flags that `words` give. Exits, as tyro does, after the help or for a missing value.

    Raises DodistillError for a flag that is unknown or given under two names, and for an extra word.
    """
    names = {flag.name for part in parts for flag in part.flags}
    words = _dotted(words, names)
    _refuse_twins(words, names)
    form = cast(Callable[..., object], _form(parts))
    plain = [_shortened(word) for word in words]
    filled, unknown = tyro.cli(form, args=plain, prog=program, description=about, return_unknown_args=True)
    given = dict(_unknown(unknown, parts, program.split()[-1]))
    for flag, answer in _answers(parts, filled):
        if isinstance(answer, _Said) and list(answer.words) != [[]]:  # tyro's value in place of an unknown flag
            given[flag.name] = flag.read(answer.words)
        elif (flag.switch or get_origin(flag.type) is list) and answer:
            given[flag.name] = answer
    return given


def form(parts: Sequence[Part], about: str = "") -> type:
    """A dataclass for tyro's help and shell completion, with the values that each flag can have."""
    made = _form(parts, closed=True)
    made.__doc__ = about
    return made


def _form(parts: Sequence[Part], closed: bool = False) -> type:
    """The dataclass that tyro fills in: fields f0, f1, ... for flags without a prefix, and one for each other part."""
    fields: list[tuple[str, Any, Any]] = []
    names = {flag.name for part in parts for flag in part.flags}
    for i, part in enumerate(parts):
        mine = [(f"f{i}_{k}", *_field(flag, part.prefix, closed, names)) for k, flag in enumerate(part.flags)]
        if not part.prefix:
            fields += mine
        elif mine:
            inner = dataclasses.make_dataclass(f"Part{i}", mine)
            inner.__doc__ = part.about
            named = _annotated(inner, tyro.conf.arg(name=part.prefix, help=part.about))
            fields.append((f"part{i}", named, dataclasses.field(default_factory=inner)))
    fields.sort(key=lambda field: field[2] is not dataclasses.MISSING)
    return dataclasses.make_dataclass("Form", fields)


def _annotated(kind: Any, *more: Any) -> Any:
    return Annotated[(kind, *more)]


def _field(flag: Flag, prefix: str, closed: bool, names: Collection[str]) -> tuple[Any, Any]:
    """The type and the default of a field that stands for a flag."""
    said = "" if flag.default in ("", (), [], REQUIRED) or flag.switch else f"(default: {shown(flag.default)})"
    # help is never None: for None, tyro would search the source for a comment
    told: dict[str, Any] = {"help": flag.help or said, "help_behavior_hint": said if flag.help else ""}
    if not flag.word:
        told["name"] = flag.name.removeprefix(f"{prefix}.") if prefix else flag.name
        told["aliases"] = [f"--{other.replace('_', '-')}" for other in flag.others if other not in names] or None
    if flag.switch:
        return _annotated(bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(**told)), False
    if get_origin(flag.type) is list:
        told |= {"metavar": flag.metavar, "help_behavior_hint": "(repeatable)"}
        several = _annotated(list[str], tyro.conf.UseAppendAction, tyro.conf.arg(**told))
        return several, dataclasses.field(default_factory=list)
    many: Any = (0, 1) if flag.type is bool else "*" if flag.word and get_origin(flag.type) is tuple else 1
    spec: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
        nargs=many, metavar=flag.metavar, instance_from_str=_Said, is_instance=lambda _: True,
        str_from_instance=lambda default: [str(default)], choices=flag.choices or None if closed else None,
    )  # fmt: skip
    kind = _annotated(str, spec, tyro.conf.arg(**told), *([tyro.conf.Positional] if flag.word else []))
    return kind, dataclasses.MISSING if flag.default is REQUIRED else ""


def _answers(parts: Sequence[Part], filled: Any) -> Iterator[tuple[Flag, Any]]:
    for i, part in enumerate(parts):
        where = getattr(filled, f"part{i}", filled) if part.prefix else filled
        for k, flag in enumerate(part.flags):
            yield flag, getattr(where, f"f{i}_{k}")


def spelled(token: str) -> str:
    """The name of a flag in the tree: --loop.log-every=5 -> loop.log_every."""
    return token.removeprefix("--").partition("=")[0].replace("-", "_")


def _dotted(words: Sequence[str], names: Collection[str]) -> list[str]:
    """The words with each flag of a part by its name there: --teacher-weights and --teacher_weights are
    --teacher.weights, unless another flag has that name."""
    others = {name.replace(".", "_"): name for name in names if "." in name}
    out = []
    for word in words:
        name = spelled(word)
        dotted = others.get(name) if word.startswith("--") and name not in names and name not in SHORT else None
        out.append(f"--{dotted}{word[len(name) + 2 :]}" if dotted else word)
    return out


def _shortened(word: str) -> str:
    """--source.name=fast -> --source=fast"""
    name = spelled(word)
    return f"--{LONG[name]}{word[len(name) + 2 :]}" if word.startswith("--") and name in LONG else word


def _refuse_twins(words: Sequence[str], names: Collection[str]) -> None:
    """Refuse two spellings of one setting. `names`: of the flags; a short name among them stands for itself."""
    short = {name: full for name, full in SHORT.items() if name not in names}
    given = {spelled(word) for word in words if word.startswith("--")}
    for name in sorted(given):
        full = short.get(name, name)
        for other in sorted(given - {name}):
            if short.get(other, other) == full:
                raise DodistillError(f"--{name} and --{other} are the same setting; give one of them.")


def _unknown(tokens: Sequence[str], parts: Sequence[Part], command: str) -> Iterator[tuple[str, Any]]:
    """The flags of open parts among those that tyro does not know. Raises DodistillError for any other."""
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not re.match(r"--\w", token):
            raise DodistillError(f"unexpected argument {token!r}; give settings as --flag VALUE.")
        text = token.partition("=")[2] if "=" in token else rest.pop(0) if rest and not rest[0].startswith("--") else ""
        name = spelled(token)
        if any(part.open and name.startswith(f"{part.prefix}.") for part in parts):
            yield name, value(text) if text else True
            continue
        said = f"{token.partition('=')[0]} {text}".rstrip()
        raise DodistillError(f"{_no_flag(name, parts, command)} You wrote {said}.")


def _no_flag(name: str, parts: Sequence[Part], command: str) -> str:
    """A sentence that names the nearest flags, within the same part where there is one."""
    known = {other for part in parts for flag in part.flags for other in (flag.name, *flag.others)}
    within, _, key = name.rpartition(".")
    inside = {other.removeprefix(f"{within}.") for other in known if other.startswith(f"{within}.")}
    if within and inside:
        return f"{within}: {nearest(key, inside, 'key')}"
    if within in known:  # of several choices joined by +, each has its settings under its own name
        ends = [f"--{other.replace('_', '-')}" for other in sorted(known) if other.endswith(f".{key}")]
        hint = f"did you mean {' or '.join(ends)}?" if ends else "--help lists all flags."
        return f"{command}: --{within} has no settings of its own; {hint}"
    if ends := [f"--{other.replace('_', '-')}" for other in sorted(known) if other.endswith(f".{name}")]:
        return f"{command}: unknown key {name!r}; did you mean {' or '.join(ends)}?"
    return f"{command}: {nearest(name.split('.')[0], {other.split('.')[0] for other in known}, 'key')}"
