"""The tables of settings in the method cards, generated from the code: `dodistill methods --cards docs/methods`.

Two lines in a card mark a table, and `filled` replaces the text between them:

    <!-- presets: fast -->                      the presets of a source: a column each, a row for each setting they set
    <!-- settings: replay bank -->              every setting of a choice, with its default and its meaning
    <!-- settings: replay bank in pre -->       the same, and its values in those presets of source `pre` that choose it
    <!-- settings: criterion at sp -->          of several choices on an axis
    <!-- settings: dictionary -->               of a part of the config
    <!-- end -->
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DodistillError, nearest
from . import registry
from . import tree as config
from .outline import comment
from .tree import Tree

_BLOCK = re.compile(r"^<!-- (presets|settings): (.+?) -->\n(.*?)^(<!-- (?:end|presets|settings).*?-->)$", re.M | re.S)
_OPENED = re.compile(r"^<!-- (?:presets|settings)\b.*$", re.M)
PARTS = ("dictionary", "optim", "loop", "pool", "view", "augment")
_ORDER = ("source", "criterion", "intervention", "update", "replay", *PARTS)
NONE = "–"  #: a setting that this preset's choices do not have


def blocks(text: str) -> list[tuple[str, str]]:
    """(kind, content) of each marked block of a card, as in ("presets", "fast")."""
    return [(found[1], found[2]) for found in _BLOCK.finditer(text)]


def filled(text: str, card: str) -> str:
    """The text of a card with every marked block regenerated; `card` is its name in error messages."""

    def fill(found: re.Match[str]) -> str:
        kind, what = found[1], found[2]
        try:
            table = presets(what) if kind == "presets" else settings(what)
        except DodistillError as error:
            raise DodistillError(f"{card}: <!-- {kind}: {what} -->: {error}") from error
        return f"<!-- {kind}: {what} -->\n\n{table}\n\n<!-- end -->"

    for opened in _OPENED.finditer(text):
        found = _BLOCK.match(text, opened.start())
        if not found or found[4] != "<!-- end -->":
            raise DodistillError(f"{card}: {opened[0]} needs a line <!-- end --> after its table.")
    return _BLOCK.sub(fill, text)


def described_in(cards: Path) -> dict[tuple[str, str], str]:
    """(axis, name) -> the file of the card that has its settings or presets, or else has its name."""
    out: dict[tuple[str, str], str] = {}
    for path in sorted(cards.glob("*.md")):
        for kind, what in blocks(path.read_text(encoding="utf-8")):
            axis, *names = ["source", what] if kind == "presets" else what.split(" in ")[0].split()
            for name in names:
                out.setdefault((axis, name), path.name)
    for axis in registry.AXES:
        for name in registry.names(axis):
            if (cards / f"{name}.md").exists():
                out[axis, name] = f"{name}.md"
    return out


# ------------------------------------------------------------------------------------------------------ the tables


def presets(source: str) -> str:
    """A column for each preset of a source, a row for each setting that any of them sets; then their origins."""
    cls = registry.config("source", source)
    given = {name: _flat(tree) for name, tree in cls.presets.items()}
    values = {name: _resolved(source, name) | given[name] for name in given}
    plain = _resolved(source)
    known = list(dict.fromkeys(key for each in (plain, *values.values()) for key in each))
    rows = sorted({key for each in given.values() for key in each}, key=lambda key: (_group(key), known.index(key)))
    lines = [
        [f"`{key}`", _default(key, plain, values), *(shown(values[name].get(key, NONE)) for name in given)]
        for key in rows
    ]
    origins = [f"* `{name}`: {cls.origin[name]}." for name in given]
    return "\n".join([*_table(["setting", "default", *(f"`{name}`" for name in given)], lines), "", *origins])


def settings(what: str) -> str:
    """Every setting of the choices (or the part of the config) that `what` names, by default and meaning."""
    words, _, source = what.partition(" in ")
    axis, *names = words.split()
    if axis in PARTS and not names:
        choices: dict[str, type] = {axis: {**config.PLAIN, "dictionary": registry.dictionary()}[axis]}
    elif axis in registry.AXES and names:
        choices = {name: registry.config(axis, name) for name in names}
    else:
        raise DodistillError(
            nearest(axis, (*registry.AXES, *PARTS), "axis or part") + " After an axis, give the name of a choice."
        )
    chosen = {p: v for p, v in _presets(source) if set(choices) & set(str(v.get(axis)).split("+"))} if source else {}
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, cls in choices.items():
        prefix = name if axis == "intervention" else axis
        for field in dataclasses.fields(cls):
            key = f"{prefix}.{field.name}"
            mine = [NONE if name not in str(v.get(axis, name)).split("+") else shown(v[key]) for v in chosen.values()]
            row = (f"`{key}`", shown(field.default), *mine, comment(cls, field.name))
            rows.setdefault(row, []).append(name)
    head = ["setting", "default", *(f"`{p}`" for p in chosen), "meaning"]
    if len(choices) == 1:
        return "\n".join(_table(head, rows))
    whose = ("all" if names == list(choices) else ", ".join(f"`{n}`" for n in names) for names in rows.values())
    return "\n".join(_table([axis, *head], [[who, *row] for who, row in zip(whose, rows)]))


def shown(value: Any) -> str:
    """A value in the format of the tables: 2e-3, 80 000, true, `none` for None."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ") if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        small = 0 < abs(value) < 0.01
        return re.sub(r"\.?0*e-0?", "e-", f"{value:.3e}") if small else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    return str(value) or "none"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in [list(head), ["---"] * len(head), *cells]]


def _presets(source: str) -> Iterator[tuple[str, Tree]]:
    for name in registry.config("source", source).presets:
        yield name, _resolved(source, name)


def _resolved(source: str, preset: str = "") -> Tree:
    return _flat(config.resolve({"source": source, "preset": preset}).to_tree())


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """{"source": {"name": "fast", "K": 5}} -> {"source": "fast", "source.K": 5}; the preset's own name is omitted."""
    out: Tree = {}
    for key, value in tree.items():
        if not isinstance(value, Mapping):
            out[prefix.removesuffix(".") if key == "name" else f"{prefix}{key}"] = value
        else:
            out |= _flat(value, f"{prefix}{key}.")
    return out


def _group(key: str) -> int:
    """The position in the table: by axis or part; an intervention's settings follow the intervention."""
    part = key.split(".")[0]
    return _ORDER.index("intervention" if part in registry.names("intervention") else part)


def _default(key: str, plain: Tree, values: Mapping[str, Tree]) -> str:
    """The default of a setting of the choices that the presets make: for each criterion, its own temperature."""
    axis, _, field = key.partition(".")
    if axis in registry.names("intervention"):
        return shown(getattr(registry.config("intervention", axis)(), field))
    if not field or axis not in registry.AXES:
        return shown(plain[key])
    names = list(dict.fromkeys(str(v[axis]) for v in values.values() if key in v))
    if "." in field:  # of one of several sources, as in source.of.fast.K
        _, name, field = field.split(".")
        names = [name]
    defaults = {name: shown(getattr(registry.config(axis, name)(), field)) for name in names}
    same = len(set(defaults.values())) == 1
    return next(iter(defaults.values())) if same else ", ".join(f"{value} ({name})" for name, value in defaults.items())
