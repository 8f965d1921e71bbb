"""The names of classes: read from what people have, and matched with the folders of labelled images.

Names are in the order of a model's logits. One may begin with a WordNet id and list synonyms, as the lines of
ImageNet's synset_words.txt do: `n01440764 tench, Tinca tinca`. A folder of that class may have the id as its name, the
words, or one of the synonyms. Otherwise a folder has the name itself, or the name but for case, spaces, - and _, the
encoding of accents, and characters that a file's name cannot have. A name that is a number is compared by its value: 3
and 03 are one.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DodistillError

#: What `read_names` takes.
Given = str | Path | Sequence[str] | Mapping[Any, Any]

_WNID = re.compile(r"(n\d{8})[\s:]+(?=\S)")
_LOOSE = re.compile(r'[\s_\-/\\:*?"<>|]+')
_PLACEHOLDER = re.compile(r"LABEL_\d+")
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""
_DIGITS = tuple("0123456789")
#: data set -> the names of its classes, in the order of its labels
KNOWN: dict[str, tuple[str, ...]] = {
    "mnist": _DIGITS,
    "digits": _DIGITS,
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": tuple(_CIFAR100.split()),
}


# ------------------------------------------------------------------------------------------------- reading


def read_names(given: Given | None, what: str = "classes") -> tuple[str, ...]:
    """The names in `given`: a file (one name a line; .json with a list, or with {"0": name, ...} as id2label of Hugging
    Face, alone or in a config.json), "cat,dog,...", a list, or a mapping as in the .json. () of nothing.

    `what` names them in messages. Raises DodistillError for a missing file, and for what is no list of names.
    """
    if given is None or (isinstance(given, str) and not given.strip()):
        return ()
    if isinstance(given, str | Path):
        return _cleaned(_from_text(given, what), what)
    return _cleaned(_from_value(given, what), what)


def hub_names(id2label: object) -> tuple[str, ...]:
    """The names in the `id2label` of a Hugging Face config; () where they are its placeholders, LABEL_0, ..., or are no
    names of outputs 0 to K - 1."""
    try:
        names = read_names(id2label, "id2label") if isinstance(id2label, Mapping) else ()
    except DodistillError:
        return ()
    return () if all(map(_PLACEHOLDER.fullmatch, names)) else names


def require_count(names: Sequence[str], outputs: int | None, what: str) -> None:
    """Refuse names that are not one for each of `outputs` (None: not known)."""
    if names and outputs is not None and len(names) != outputs:
        raise DodistillError(
            f"{what}: {len(names)} names of classes ({listed(names)}), but the model has {outputs} outputs; give one "
            "name for each, in their order."
        )


def _from_text(given: str | Path, what: str) -> Any:
    path = Path(given).expanduser()
    try:
        there = path.is_file()
    except (OSError, ValueError):  # no name of a file
        there = False
    text = str(given)
    if not there:
        if isinstance(given, Path) or path.suffix in (".txt", ".json") or ("," not in text and "/" in text):
            raise DodistillError(f"{what}: there is no file {given}; give a file with one name a line, or cat,dog,...")
        return text.split(",")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return _from_value(json.loads(text), f"{what} in {path}")
    except (OSError, ValueError, RecursionError) as error:
        raise DodistillError(f"{what}: cannot read {path} ({error}); give text with one name a line.") from error
    return text.strip().splitlines()


def _from_value(value: Any, what: str) -> list[Any]:
    if isinstance(value, Mapping) and isinstance(value.get("id2label"), Mapping):
        value = value["id2label"]
    if isinstance(value, Mapping):
        by_number = {str(k): v for k, v in value.items()}
        wanted = [str(k) for k in range(len(by_number))]
        if lost := [k for k in wanted if k not in by_number]:
            raise DodistillError(f"{what}: no name of class {lost[0]}; give one for each output: {{0: NAME, 1: ...}}.")
        return [by_number[k] for k in wanted]
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise DodistillError(f"{what} is {value!r}; give a list of names, in the order of the outputs.")
    return list(value)


def _cleaned(names: Iterable[Any], what: str) -> tuple[str, ...]:
    out = []
    for k, name in enumerate(names):
        text = " ".join(str(name).split()) if isinstance(name, str | int) and not isinstance(name, bool) else ""
        if not text or not text.isprintable():
            raise DodistillError(f"{what}: the name of class {k} is {name!r}; give text, in the order of the outputs.")
        out.append(text)
    return tuple(out)


# ------------------------------------------------------------------------------------------------- showing


def titles(names: Sequence[str], most: int = 28) -> tuple[str, ...]:
    """The names for a page or a plot: without WordNet ids and further synonyms, and of at most `most` characters; those
    that would be alike then, in full."""
    short = [_WNID.sub("", name, count=1).partition(",")[0].strip() or name for name in names]
    short = [text if len(text) <= most else text[: most - 1] + "…" for text in short]
    count: dict[str, int] = {}
    for text in short:
        count[text] = count.get(text, 0) + 1
    return tuple(text if count[text] == 1 else name for text, name in zip(short, names))


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many there are in all."""
    said = ", ".join(titles(names)[:most] if len(names) <= most else titles(names)[: most - 1])
    return said if len(names) <= most else f"{said}, ... {len(names)} in all"


def folder_names(names: Sequence[str], count: int) -> tuple[str, ...]:
    """A folder's name for each of `count` classes, which `match` reads as this class again: the WordNet id, else the
    name; `class 3` in place of a name that no folder can have, or that another one's is too like. Without names:
    numbers of one length."""
    if len(names) != count:
        return tuple(str(k).zfill(len(str(count - 1))) for k in range(count))
    made = [m[1] if (m := _WNID.match(name)) else re.sub(r'[/\\:*?"<>|]', "_", name) for name in names]
    keys = [_key(name) for name in made]
    times = Counter(keys)
    sound = [
        bool(key) and times[key] == 1 and name.strip(". ") == name and len(name.encode()) < 200
        for name, key in zip(made, keys)
    ]
    return tuple(name if ok else f"class {k}" for k, (name, ok) in enumerate(zip(made, sound)))


# ------------------------------------------------------------------------------------------------- matching


def in_order(classes: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in the order in which they are numbered: by value if all are numbers (2 before 10), else by
    name."""
    names = set(classes)
    return tuple(sorted(names, key=(lambda n: (int(n), n)) if all(map(_is_number, names)) else str))


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def match(folders: Sequence[str], names: Sequence[str], outputs: int | None, what: str, fix: str) -> list[int] | None:
    """The class of each of `folders` in a model of these `names`, or of `outputs` unnamed classes; None if neither is
    known.

    Without names: K folders of a model of K classes are its classes, `in_order`; fewer folders must be numbers below K.
    With names that are not numbers, the folders may still be 0 to K - 1. Raises DodistillError, which lists both sides
    and ends in `fix`, for anything else.
    """
    values = [int(f) for f in folders] if all(map(_is_number, folders)) else []
    if not names and outputs is None:
        return None
    if names:
        return _by_name(folders, names, values, what, fix)
    assert outputs is not None
    if len(folders) == outputs:
        place = {name: k for k, name in enumerate(in_order(folders))}
        return [place[name] for name in folders]
    if values and max(values) < outputs:
        return values
    raise DodistillError(
        f"{what} has {len(folders)} class folders ({listed(folders)}), but the model has {outputs} classes, and their "
        f"names are not known; {fix}"
    )


def _by_name(folders: Sequence[str], names: Sequence[str], values: Sequence[int], what: str, fix: str) -> list[int]:
    tables = _tables(names)
    found = [_lookup(folder, tables) for folder in folders]
    if values and not all(found) and sorted(values) == list(range(len(names))):
        return list(values)
    if all(len(hits) == 1 for hits in found):
        return [next(iter(hits)) for hits in found]
    unknown = [f for f, hits in zip(folders, found) if not hits]
    twice = [f"{f} ({' or '.join(names[k] for k in sorted(h))})" for f, h in zip(folders, found) if len(h) > 1]
    left = [name for k, name in enumerate(names) if not any(k in hits for hits in found)]
    said = [
        f"the model has no class {listed(unknown)}" if unknown else "",
        f"ambiguous: {', '.join(twice[:3])}" if twice else "",
    ]
    raise DodistillError(
        f"{what}: {len(unknown) + len(twice)} of its {len(folders)} class folders do not fit the model's "
        f"{len(names)} classes: {'; '.join(s for s in said if s)}. Classes without a folder: {listed(left) or 'none'}. "
        f"{fix[0].upper()}{fix[1:]}"
    )


def _key(name: str) -> str:
    """What two spellings of one name have in common."""
    bare = _LOOSE.sub("", unicodedata.normalize("NFC", name)).casefold()  # macOS writes an accent as its own character
    return str(int(bare)) if _is_number(bare) else bare


Table = dict[str, set[int]]


def _tables(names: Sequence[str]) -> list[Table]:
    """Ever looser spellings -> the classes that have them: the name, its key, the id and the words, the synonyms, the
    word class and the number."""
    tables: list[Table] = [{}, {}, {}, {}, {}]
    for k, name in enumerate(names):
        wnid = _WNID.match(name)
        words = name[wnid.end() :] if wnid else name
        spelled = [[name], [_key(name)], [_key(words)], [_key(part) for part in words.split(",")], [f"class{k}"]]
        if wnid:
            spelled[2].append(wnid[1])
        for table, texts in zip(tables, spelled):
            for text in filter(None, texts):
                table.setdefault(text, set()).add(k)
    return tables


def _lookup(folder: str, tables: Sequence[Table]) -> set[int]:
    """The classes that a folder's name may mean, by the strictest spelling that any class has."""
    for level, table in enumerate(tables):
        if hits := table.get(folder if level == 0 else _key(folder)):
            return hits
    return set()
