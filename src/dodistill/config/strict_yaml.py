"""YAML files as data: no tags that run code, no key twice, no references that grow without end."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import yaml

from ..errors import DodistillError

#: Values that one file may hold, references counted each time they are used, and how deep they may nest.
MOST, DEEPEST = 100_000, 50
#: Bytes that one file may have.
LARGEST = 4 << 20

_MERGE = "tag:yaml.org,2002:merge"  #: the tag of the key <<
_Pairs = dict[str | int, tuple[yaml.Node, yaml.Node]]


class _Strict(yaml.SafeLoader):
    """SafeLoader that refuses a key that a mapping gives twice, and merges (`<<`) that grow without end."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._flat: set[int] = set()  # the mappings that have been flattened, by id
        self._merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put the keys of merged mappings into `node`, once. Its own keys win, then those of the first in a list.

        PyYAML's own method keeps each key as often as it is merged (6.0.2), or lets the last in a list win (6.0.4).
        """
        if id(node) in self._flat:
            return
        self._flat.add(id(node))
        own: _Pairs = {}
        merges: list[list[yaml.Node]] = []
        for key, value in node.value:
            if key.tag == _MERGE:
                merges.append(value.value if isinstance(value, yaml.SequenceNode) else [value])
                continue
            if _name(key) in own:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            own[_name(key)] = key, value
        node.value = list(own.values())  # all that a mapping which merges itself can see
        merged: _Pairs = {}
        for part in itertools.chain.from_iterable(reversed(merges)):
            if not isinstance(part, yaml.MappingNode):
                raise yaml.constructor.ConstructorError(None, None, "<< merges mappings only", part.start_mark)
            self.flatten_mapping(part)
            self._merged += len(part.value)
            if self._merged > MOST:
                said = f"it grows by more than {MOST:,} values by its merges (<<); write them out"
                raise yaml.constructor.ConstructorError(None, None, said, part.start_mark)
            for key, value in part.value:
                merged.setdefault(_name(key), (key, value))
        node.value = list((merged | own).values())
        super().flatten_mapping(node)


def _name(key: yaml.Node) -> str | int:
    """By what a key is the same as another."""
    return str(key.value) if isinstance(key, yaml.ScalarNode) else id(key)


def read_yaml(path: str | Path, what: str = "recipe") -> Any:
    """What the file holds; `what` names its kind in messages.

    Raises DodistillError, with the file's name, where it cannot be read, is not UTF-8 or no YAML, gives a key twice,
    nests too deep, refers to itself, or grows beyond `MOST` values by its references.
    """
    where = f"{what} {path}"
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise DodistillError(f"cannot read {where}: {getattr(error, 'strerror', None) or error}.") from error
    if len(data) > LARGEST:
        raise DodistillError(f"{where} has {len(data):,} bytes, more than the {LARGEST:,} allowed; split it.")
    try:
        found = yaml.load(data.decode("utf-8"), _Strict)
        _measure(found, where)
    except UnicodeDecodeError as error:
        raise DodistillError(f"{where} is not UTF-8 ({error}); save it as UTF-8.") from error
    except RecursionError as error:
        raise DodistillError(f"{where} nests too deep; at most {DEEPEST} levels are allowed.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise DodistillError(f"cannot read {where}: {error}") from error
    return found


def _measure(found: Any, where: str) -> None:
    """Refuse what is too deep or too large, counting a shared value as often as it is used."""
    count, todo = 0, [(found, 1)]
    while todo:
        value, depth = todo.pop()
        count += 1
        if depth > DEEPEST:
            raise DodistillError(f"{where} nests too deep (or refers to itself); at most {DEEPEST} levels are allowed.")
        if count > MOST:
            raise DodistillError(f"{where} grows to more than {MOST:,} values by its references; write it out.")
        if isinstance(value, dict):
            todo += [(v, depth + 1) for v in value.values()]
        elif isinstance(value, list | tuple | set):
            todo += [(v, depth + 1) for v in value]
