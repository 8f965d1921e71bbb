"""The cells of a recipe, and which of them were run already. No torch here, except through methods that a recipe names.

A cell is identified by its resolved config, with weights and code by their content and data sets by their name. A
record of a cell holds the content of the weights that it was run with, so that a replaced file is noticed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ..errors import DodistillError, nearest
from ..files import read_object
from . import plugins
from .plugins import Allow
from .strict_yaml import read_yaml
from .tree import Distill, Tree, expand, lasting, merge, portable, resolve

KEYS = ("name", "about", "teachers", "base", "grid", "when", "skip", "published")
SHORT = {"seed": "loop.seed", "steps": "loop.steps", "lr": "optim.lr", "student": "student.spec"}
#: What a name in a recipe may be, as it becomes the name of a folder or a file.
_NAME = re.compile(r"\w[\w .+-]*")
#: The most letters of a run folder's name that are of its labels.
LONGEST = 150
#: The settings of `data` that name images. Of a path, the last name alone counts.
IMAGES = ("unlabeled", "test")


@dataclass
class Cell:
    """One run of the grid."""

    label: dict[str, str]  #: axis -> label
    config: Distill
    key: str
    published: float | None

    @cached_property
    def identity(self) -> Tree:
        """`identity` of its config, with the weights as they are at the first call."""
        return identity(self.config.to_tree())

    @property
    def slug(self) -> str:
        """The name of its run folder. Labels are cut, as a label may be a path, and a name has at most 255 letters."""
        words = re.sub(r"[^A-Za-z0-9_.+-]+", "_", "-".join(self.label.values()))
        return f"{words[:LONGEST]}-{self.key}"


def read_recipe(path: Path) -> Tree:
    """The recipe. Raises DodistillError, which names the place and the value, for whatever is not as it must be."""
    tree = read_yaml(path)
    where = f"recipe {path}"
    if not isinstance(tree, dict) or not isinstance(tree.get("grid"), dict) or not tree["grid"]:
        raise DodistillError(f"{where} has no mapping `grid` of axes; add one (recipes/ has examples).")
    for key in tree:
        if key not in KEYS:
            raise DodistillError(f"{where}: {nearest(str(key), KEYS, 'key')}")
    name = tree.get("name", path.stem)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DodistillError(f"{where}: name is {name!r}; use letters, digits, and . _ + - within it.")
    _mapping(tree.get("base") or {}, f"{where}: base", "settings")
    for axis, values in tree["grid"].items():
        _options(str(axis), values, where)
    _check_teachers(tree.get("teachers") or {}, where)
    axes = [str(axis) for axis in tree["grid"]]
    for part, others in (("skip", ()), ("when", ("then",)), ("published", ("value",))):
        _check_rules(tree.get(part) or [], part, others, axes, where)
    return tree


def _mapping(value: Any, where: str, of: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DodistillError(f"{where} is {value!r}; it must be a mapping of {of}.")
    return value


def _check_teachers(teachers: Any, where: str) -> None:
    for name, settings in _mapping(teachers, f"{where}: teachers", "names and settings").items():
        here = f"{where}: teachers.{name}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise DodistillError(f"{here}: the name becomes a file's; use letters, digits, and . _ + - within it.")
        if "model" not in _mapping(settings, here, "settings, such as model and data"):
            raise DodistillError(f"{here} has no `model`; name the network, as in model: wrn40_2.")
        for key in settings:
            if key in ("out", "max_seconds", "max-seconds"):
                raise DodistillError(f"{here}: {key} is not for a recipe to say; remove it.")


def _check_rules(rules: Any, part: str, others: Sequence[str], axes: Sequence[str], where: str) -> None:
    """`skip` is a list of mappings axis -> label; `when` and `published` have such a mapping at `where`."""
    if not isinstance(rules, list):
        raise DodistillError(f"{where}: {part} is {rules!r}; it must be a list.")
    for i, rule in enumerate(rules):
        here = f"{where}: {part}[{i}]"
        if others:
            for key in ("where", *others):
                if key not in _mapping(rule, here, f"where and {', '.join(others)}"):
                    raise DodistillError(f"{here} has no `{key}`; write where: {{AXIS: LABEL}} and {others[0]}.")
            if part == "when":
                _mapping(rule["then"], f"{here}.then", "settings")
            elif isinstance(rule["value"], bool) or not isinstance(rule["value"], int | float):
                raise DodistillError(f"{here}.value is {rule['value']!r}; it must be a number.")
        for axis in _mapping(rule["where"] if others else rule, here, "AXIS: LABEL"):
            if str(axis) not in axes:
                raise DodistillError(f"{here}: {nearest(str(axis), axes, 'axis')}")


def _options(axis: str, values: Any, where: str = "recipe") -> list[tuple[str, Tree]]:
    """(label, overrides) of each value on an axis: a list of plain values, or a mapping label -> overrides."""
    here = f"{where}: grid.{axis}"
    if not values or not isinstance(values, list | Mapping):
        raise DodistillError(f"{here} is {values!r}; it must be a list of values, or a mapping label -> settings.")
    if isinstance(values, Mapping):
        return [(str(k), dict(_mapping(v or {}, f"{here}.{k}", "settings"))) for k, v in values.items()]
    if twice := [label for label, n in Counter(map(str, values)).items() if n > 1]:
        raise DodistillError(f"{here} has the label {twice[0]!r} twice, and would count its runs twice; remove one.")
    return [(str(v), {SHORT.get(axis, axis): v}) for v in values]


def cells(recipe: Tree, teachers: Path, allow_code: Allow = False) -> Iterator[Cell]:
    """The grid's cells, in the order in which they run. `allow_code`: see `resolve`."""
    axes = {axis: _options(axis, values) for axis, values in recipe["grid"].items()}
    base = expand(_fill(recipe.get("base") or {}, teachers))
    first: dict[str, Cell] = {}
    for combination in itertools.product(*axes.values()):
        label = {axis: name for axis, (name, _) in zip(axes, combination)}
        if any(_matches(where, label) for where in recipe.get("skip") or []):
            continue
        tree = base
        for _, over in combination:
            tree = merge(tree, expand(_fill(over, teachers)))
        for rule in recipe.get("when") or []:
            if _matches(rule["where"], label):
                tree = merge(tree, expand(_fill(rule["then"], teachers)))
        try:
            config = resolve(tree, allow_code=allow_code)
        except DodistillError as error:
            raise DodistillError(f"cell {label}: {error}") from error
        published = next(
            (float(p["value"]) for p in recipe.get("published") or [] if _matches(p["where"], label)), None
        )
        cell = Cell(label, config, "", published)
        cell.key = _key(cell.identity)
        _refuse_namesakes(cell, first.setdefault(cell.key, cell))
        yield cell


def _refuse_namesakes(cell: Cell, other: Cell) -> None:
    """Refuse two cells of one key that read or probe other images: the second would never run."""
    if cell.config.data.probe != other.config.data.probe:
        raise DodistillError(
            f"the cells {other.label} and {cell.label} differ in data.probe alone, which makes no other cell: give all "
            "data sets in one list, as data.probe of `base`."
        )
    for field in IMAGES:
        mine, its = getattr(cell.config.data, field), getattr(other.config.data, field)
        if not plugins.same(mine, its):
            raise DodistillError(
                f"the cells {other.label} and {cell.label} read {its} and {mine} as data.{field}. A cell knows images "
                f"by the last name of their path alone, so both would have one result; rename one of the two, or give "
                "it by a link of another name."
            )


def _matches(where: Mapping[str, Any], label: Mapping[str, str]) -> bool:
    return all(label.get(axis) == str(value) for axis, value in where.items())


def _fill(tree: Any, teachers: Path) -> Any:
    if isinstance(tree, Mapping):
        return {k: _fill(v, teachers) for k, v in tree.items()}
    return tree.replace("{teachers}", str(teachers)) if isinstance(tree, str) else tree


# --------------------------------------------------------------------------------------------------- identity


def content(path: str) -> str:
    """16 hex digits of the weights in a file, or `path` itself where there is no such file: a zoo name, or a teacher
    that is not trained yet. Metadata of a .safetensors do not count: they hold the time that the training took.

    Of hf:path/to/folder, the digits of its files; of hf:OWNER/NAME, the name with the commit in the local cache. Of
    net.py:make, the digits of the file, and the name of the factory.
    """
    if file := plugins.model_file(path):
        return f"{content(plugins.tidy(file))}:{path.rpartition(':')[2]}"
    if path.startswith("hf:"):
        return _of_hub(path[3:])
    try:
        status = Path(path).stat()
        return _content(path, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError):
        return path


def _of_hub(name: str) -> str:
    """The content of a Hugging Face model: of a folder, or of what the cache holds of a name on the hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors"))
        found = [(p.name, content(str(p))) for p in files]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
    repo, _, revision = name.partition("@")
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cached = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    try:
        refs = cached / f"models--{repo.replace('/', '--')}" / "refs"
        commit = (refs / (revision or "main")).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):  # not fetched yet, or the revision is a commit
        return f"hf:{name}"
    return f"hf:{repo}@{commit}"


@cache
def _content(path: str, _changed: int, _size: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if path.endswith(".safetensors"):
            head = file.read(8)
            size = int.from_bytes(head, "little")
            if size < 1 << 27:
                text = file.read(size)
                try:
                    tensors = {k: v for k, v in json.loads(text).items() if k != "__metadata__"}
                    digest.update(json.dumps(tensors, sort_keys=True).encode())
                except (ValueError, AttributeError, RecursionError):
                    digest.update(head + text)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _has_content(spec: object) -> bool:
    """Whether a spec names weights or code, and not a network of the zoo."""
    return isinstance(spec, str) and (
        spec.endswith((".safetensors", ".pt", ".pth")) or spec.startswith("hf:") or bool(plugins.model_file(spec))
    )


def weights_of(config: Distill) -> dict[str, str]:
    """The content of each file of weights or code that a config names: {"teacher.weights": hash}."""
    parts = {"teacher": config.teacher, "student": config.student, "foreign": config.data.foreign}
    named = {f"{part}.{f}": getattr(model, f) for part, model in parts.items() for f in ("spec", "weights")}
    return {where: content(path) for where, path in named.items() if _has_content(path)}


def identity(tree: Mapping[str, Any], weights: Mapping[str, str] | None = None) -> Tree:
    """The part of a config that determines a result: without `RUNTIME`, with weights and code by content and data sets
    by name. `weights`: what was known of the files when it ran; else they are read now."""
    out = lasting(portable(json.loads(json.dumps(tree))))
    for name, part in (("teacher", out["teacher"]), ("student", out["student"]), ("foreign", out["data"]["foreign"])):
        for field in ("spec", "weights"):
            if _has_content(part[field]):
                part[field] = (weights or {}).get(f"{name}.{field}") or content(part[field])
    for field in IMAGES:  # without the folder
        out["data"][field] = Path(out["data"][field]).name
    return out


def cell_key(config: Distill) -> str:
    """12 hex digits of the identity."""
    return _key(identity(config.to_tree()))


def _key(its: Tree) -> str:
    return _digest(its)[:12]


def _digest(tree: Tree) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


class Records:
    """The records of finished cells, to be found by a cell's identity."""

    def __init__(self, records: Sequence[Tree], teachers: Path) -> None:
        known = [(identity(_fill(r["config"], teachers), r.get("weights")), r) for r in records]
        self._exact = {_digest(its): record for its, record in reversed(known)}
        self._alike: dict[str, list[tuple[Tree, Tree]]] = {}
        for its, record in known:
            self._alike.setdefault(_choices(its), []).append((its, record))
        #: what a cell chose -> the identity of a record, with defaults for what it lacks -> the record
        self._completed: dict[str, dict[Hashable, Tree]] = {}
        self._count = len(known)

    def __len__(self) -> int:
        return self._count

    def find(self, cell: Cell) -> Tree | None:
        """The record of a cell, if there is one.

        A record from before a setting existed also counts, if all its settings agree and the cell has the default of
        each newer setting: new settings do not invalidate old results.
        """
        mine = cell.identity
        alike = self._alike.get(_choices(mine), [])
        if not alike:
            return None
        if (record := self._exact.get(_digest(mine))) is not None:
            return record
        others = {axis: mine[axis]["name"] for axis in ("criterion", "update", "replay")}
        chosen = " ".join([_choices(mine), *others.values()])
        if chosen not in self._completed:
            default = identity(resolve(cell.config.choices()).to_tree())
            self._completed[chosen] = {
                _hashable(_complete(its, default)): record
                for its, record in reversed(alike)  # the first of equal ones stays
                if all(_may_choose(its.get(axis), name) for axis, name in others.items())
            }
        return self._completed[chosen].get(_hashable(mine))


def not_probed(chosen: Sequence[Cell], known: Records) -> list[str]:
    """A warning for each data set of `data.probe` on which finished cells were not probed: they do not run again."""
    count = Counter[str]()
    for cell in chosen:
        if (record := known.find(cell)) is not None:
            there = (record.get("summary") or {}).get("probe") or {}
            count.update(spec for spec in cell.config.data.probe if Path(spec).name not in there)
    return [
        f"{n} finished {'cell was' if n == 1 else 'cells were'} not probed on {spec}, and finished cells do not run "
        f"again: give their students to `dodistill evaluate STUDENT --probe {spec}`."
        for spec, n in count.items()
    ]


def moved_images(chosen: Sequence[Cell], known: Records) -> list[str]:
    """A warning for each path of images that finished cells were made with and that is still there, where the recipe
    now names another one of the same last name. One that is gone has only moved."""
    count = Counter[tuple[str, str, str]]()
    for cell in chosen:
        data = ((known.find(cell) or {}).get("config") or {}).get("data") or {}
        for field in IMAGES:
            count[field, data.get(field, ""), getattr(cell.config.data, field)] += 1
    said = []
    for (field, its, mine), n in count.items():
        if plugins.is_path(its) and plugins.is_path(mine) and _both_there(its, mine):
            said.append(
                f"{n} finished {'cell was' if n == 1 else 'cells were'} made with {its} as data.{field}, "
                f"and the recipe now names {mine}. A cell knows images by the last name of their path alone; if these "
                "are other images, rename them, or give them by a link of another name."
            )
    return said


def _both_there(a: str, b: str) -> bool:
    """Whether both paths are there, and are not one file or folder."""
    try:
        return not os.path.samefile(plugins.tidy(a), plugins.tidy(b))
    except (OSError, ValueError):
        return False


def _may_choose(choice: object, name: str) -> bool:
    """Whether a record's choice on an axis can be `name`; an old record may have none."""
    return choice is None or (isinstance(choice, Mapping) and choice.get("name") == name)


def _complete(its: Tree, default: Tree) -> Tree:
    """An identity with the default of each setting that it lacks, as if it were of this version."""
    out = {**default, **its}
    for key, value in its.items():
        other = default.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            out[key] = _complete(dict(value), dict(other))
    return out


def _hashable(value: Any) -> Hashable:
    """A plain tree as a value that hashes, equal where the trees are."""
    if isinstance(value, Mapping):
        return frozenset((key, _hashable(v)) for key, v in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _choices(its: Tree) -> str:
    """What every record, however old, says that it chose."""
    source = its["source"]["name"]
    return f"{source} {its.get('intervention', 'none')}"


def stored(out: Path) -> Records:
    """The records in `out`. Raises DodistillError, with the file's name, for one that is damaged."""
    fix = "delete it to run the cell again"
    records = []
    for path in sorted((out / "cells").glob("*.json")):
        record = read_object(path, fix)
        if not isinstance(record.get("config"), Mapping):
            raise DodistillError(f"{path} is no record of a cell (it has no config); {fix}.")
        records.append(record)
    try:
        return Records(records, out / "teachers")
    except (KeyError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise DodistillError(f"a record in {out / 'cells'} is damaged ({said}); {fix}.") from error
