"""The flags of a run: the choices on the axes determine the flags, and a preset or a recipe their defaults."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from ..errors import DodistillError, nearest
from . import outline, registry
from .flags import LONG, Flag, Part, part, spelled, typed, value
from .methods import AUTO, asks, choosing
from .parts import Parts
from .plugins import Allow, label, paths
from .strict_yaml import read_yaml
from .tree import DEFAULTS, PLAIN, Tree, expand, merge

ABOUT = {
    "source": "where the images come from",
    "intervention": "how to cut the confounder's path to the student; join several by +",
    "criterion": "the distance between student and teacher",
    "update": "how the student's gradients are computed",
    "replay": "the memory of the student's past inputs",
}


def read_recipe(path: str) -> Tree:
    """The settings in a file; empty without a path."""
    if not path:
        return {}
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise DodistillError(f"recipe {path} must be a mapping of settings, as in `source: fast`.")
    if "grid" in tree:
        raise DodistillError(f"{path} is a grid of runs; run it by dodistill compare {shlex.quote(path)}.")
    return tree


def parts(words: Sequence[str]) -> list[Part]:
    """The flags of the run that a command line describes; its first word may be a recipe."""
    recipe = read_recipe(words[0]) if words and not words[0].startswith("-") else {}
    given = expand(typed(words, (*registry.AXES, *LONG, "preset")))
    anything = "allow_code" in {spelled(word) for word in words if word.startswith("--")}
    tree, allow = merge(expand(recipe), given), anything or paths(given)
    if asks(tree):
        preset = Flag("preset", str, "preset of the chosen source; empty: chosen with the source", "", "NAME")
        choosers = Part([*_axes(tree), preset], about=choosing())
        classes, open_part = _classes(tree, words, allow), [_any_source()]
    else:
        source = _choice(tree, "source", allow)
        tree, preset = _with_preset(tree, source)
        choosers = Part([*_axes(tree), preset], about=_listed(source))
        classes, open_part = {"source": source, **_classes(tree, words, allow)}, []
    found = [part(cls, prefix, _settings(tree, prefix)) for prefix, cls in classes.items()]
    return [choosers, *open_part, *(p for one in found for p in _with_members(one, words))]


def _with_members(whole: Part, words: Sequence[str]) -> list[Part]:
    """A part; and for its flags that hold several choices, such as `source.of`, the flags of each of these choices."""
    flags, members = [], list[Part]()
    for flag in whole.flags:
        if flag.type is Parts:
            given = _members(flag, words)
            flag = dataclasses.replace(flag, default=Parts(dict.fromkeys(given)))  # its help shows the names alone
            for name, settings in given.items():
                members.append(part(outline.choice(whole.prefix, name), f"{flag.name}.{name}", settings))
        flags.append(flag)
    return [dataclasses.replace(whole, flags=flags), *members]


def _members(flag: Flag, words: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Name -> settings of the choices that a flag holds, by its default and the command line."""
    start = f"{flag.name}."
    inner = [spelled(word).removeprefix(start) for word in words if spelled(word).startswith(start)]
    of = [flag.default, value(typed(words, [flag.name]).get(flag.name, ""))]
    given: Tree = {path.partition(".")[0]: None for path in inner if "." in path}
    for one in of:
        given = merge(given, one) if isinstance(one, Mapping) else given
    return {k: v if isinstance(v, Mapping) else {} for k, v in given.items() if v is not False}


def _with_preset(tree: Tree, source: Any) -> tuple[Tree, Flag]:
    """The tree merged over the preset that it names, as in `resolve`, and the flag `preset`."""
    preset = str(tree.get("preset") or _settings(tree, "source").get("preset", ""))
    if preset:
        if preset not in source.presets:
            raise DodistillError(f"source {source.name}: {nearest(preset, source.presets, 'preset')}")
        tree = merge(expand(source.presets[preset]), tree)
    hint = _one_of(source.presets) if source.presets else str
    return tree, Flag("preset", hint, "settings of the source, listed above", preset, "NAME")


def _listed(source: Any) -> str:
    """The presets of a source, and the origin of their numbers."""
    lines = (f"  {name}: {source.origin.get(name, '')}" for name in source.presets)
    return "\n".join([f"presets of source {source.name}:", *lines])


def _classes(tree: Tree, words: Sequence[str], allow: Allow) -> dict[str, type]:
    """Prefix -> settings: those of a tree's choices except the source, and those of every run."""
    return {
        **{cls.name: cls for cls in _interventions(tree, words, allow)},
        **{axis: _choice(tree, axis, allow) for axis in ("criterion", "update", "replay")},
        "dictionary": outline.read("interventions.shared.dictionary", "DictionaryConfig"),
        **PLAIN,
    }


def _choice(tree: Tree, axis: str, allow: Allow) -> Any:
    """The settings class of a tree's choice on an axis."""
    return outline.choice(axis, _name(tree, axis), allow, str(_settings(tree, axis).get("code", "")))


def every_part() -> list[Part]:
    """The flags of every choice on every axis, for shell completion."""
    found = parts([])
    for axis in registry.AXES:
        for name in registry.names(axis):
            prefix = name if axis == "intervention" else axis
            found.append(part(outline.choice(axis, name), prefix))
    known: dict[str, dict[str, Flag]] = {}
    for one in found:
        for flag in one.flags:
            known.setdefault(one.prefix, {}).setdefault(flag.name, flag)
    return [Part(list(flags.values()), prefix) for prefix, flags in known.items()]


def _axes(tree: Tree) -> list[Flag]:
    """A flag for the choice on each axis."""
    flags = []
    for axis, about in ABOUT.items():
        more = {"source": [AUTO], "intervention": ["none"]}.get(axis, [])
        names = [*more, *registry.known(axis)]
        hint = str if axis == "intervention" else _one_of(names)
        text = f"{about}: {', '.join(names)}; or the path of your own file, as in my_method.py"
        flags.append(Flag(axis, hint, text, _name(tree, axis), "NAME"))
    return flags


def _one_of(names: Iterable[str]) -> Any:
    return Literal[tuple(names)]


def _any_source() -> Part:
    """The flags before the source is known. Flags for its settings are checked once it is chosen."""
    seconds = Flag("source.seconds", float | None, "the time limit, in seconds; none: --max-seconds", None, "FLOAT")
    return Part([seconds], "source", "Settings of the chosen source.", open=True)


def _name(tree: Tree, axis: str) -> str:
    """The name of a tree's choice on an axis."""
    default = DEFAULTS.get(axis, "none")
    given = tree.get(axis) or default
    given = given.get("name") if isinstance(given, Mapping) else given
    return given if isinstance(given, str) else default


def _settings(tree: Tree, part: str) -> Mapping[str, Any]:
    """A tree's settings of a part; empty if they are no mapping, which `resolve` refuses."""
    given = tree.get(part)
    return given if isinstance(given, Mapping) else {}


def _interventions(tree: Tree, words: Sequence[str], allow: Allow) -> list[Any]:
    """The chosen interventions, and those for which the command line has settings."""
    chosen = [name.strip() for name in _name(tree, "intervention").split("+")]
    given = {spelled(word).partition(".")[0] for word in words if word.startswith("--")}
    names = dict.fromkeys([*chosen, *(name for name in registry.known("intervention") if name in given)])
    code = {name: str(_settings(tree, label(name)).get("code", "")) for name in names}
    return [outline.choice("intervention", n, allow, code[n]) for n in names if n not in ("", "none")]
