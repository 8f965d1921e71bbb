"""YAML files as data: no tags that run code, no key twice, no references that grow without end."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ..errors import DodistillError

#: Values that one file may hold, references counted each time they are used, and how deep they may nest.
MOST, DEEPEST = 100_000, 50
#: Bytes that one file may have.
LARGEST = 4 << 20


class _Strict(yaml.SafeLoader):
    """SafeLoader that refuses a key that a mapping has already."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name != "<<" and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


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
