"""The table of all sources, generated from the code, and the choice of `--source auto`.

This module imports torch only through the sources that the table describes.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DodistillError
from . import card_tables, plugins, registry
from .plugins import Method
from .tree import Tree, build, config_of, expand, merge

AUTO = "auto"
MINUTE, HOUR = 60.0, 3600.0
SHORT = 3 * MINUTE  #: a shorter run cannot warm a generator up
PASSES = 400_000  #: images that the teacher must be able to answer in the time: 500 steps of `fast`, preset desk
#: For the table's readers.
SLOW = "A time also counts as below 3 minutes if the teacher can answer fewer than 400 000 images in it (measured)."
MEDIUM = 15 * MINUTE  #: from here on the preset `hour` of `fast` is ahead of `desk` on average (recipes/minutes.yaml)
LONG = 6 * HOUR  #: suffices for a published schedule of 80 000 steps on a GPU of its kind


# -------------------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Choice:
    """A source, its preset, and the reason in one sentence."""

    source: str
    preset: str
    reason: str
    rate: float = math.inf  #: images that the teacher answers in a second; infinity: not measured

    def __str__(self) -> str:
        return f"source auto: {self.source}, preset {self.preset}, since {self.reason}."


def choose(
    has_batchnorm: bool,
    unlabeled: bool,
    seconds: float = math.inf,
    image_shape: tuple[int, int, int] = (3, 32, 32),
    passes: float = math.inf,
) -> Choice:
    """The source for a teacher, by images, teacher and time limit: the first line that applies.

        unlabelled images?  BatchNorm?  H, W multiples of 4?  time        source      preset
        yes                 any         any                   >= 6 h      dfnd        paper
        yes                 any         any                   less, none  dfnd        desk
        no                  no          any                   >= 6 h      procedural  study
        no                  no          any                   less, none  procedural  desk
        no                  yes         no                    as the two lines above
        no                  yes         yes                   < 3 min     procedural  desk
        no                  yes         yes                   >= 6 h      fast        wrn
        no                  yes         yes                   >= 15 min   fast        hour
        no                  yes         yes                   else, none  fast        desk

    A time also counts as below 3 minutes if the teacher can answer fewer than 400 000 images in it.
    `none`: no limit was given (infinity); the run should then end within minutes. For a published schedule, give its
    preset, or a limit of hours.

    Args:
        has_batchnorm: whether the teacher has BatchNorm layers with running statistics.
        unlabeled: whether unlabelled images were given.
        seconds: the time limit; infinity for no limit.
        image_shape: (C, H, W) of what the teacher reads.
        passes: images that the teacher can answer in the time; infinity where that was not measured.
    """
    hours = math.isfinite(seconds) and seconds >= LONG
    time = _spoken(seconds)
    if unlabeled:
        return Choice(
            "dfnd", "paper" if hours else "desk",
            f"unlabelled images were given, and they cost only a pass through the teacher; {time}",
        )  # fmt: skip
    drawn = "study" if hours else "desk"
    if not has_batchnorm:
        return Choice(
            "procedural", drawn,
            f"the teacher has no BatchNorm statistics to match and no unlabelled images were given; {time}",
        )  # fmt: skip
    if image_shape[1] % 4 or image_shape[2] % 4:
        return Choice(
            "procedural", drawn,
            f"the generators make images whose sides are multiples of 4, not {image_shape[1]}x{image_shape[2]}; {time}",
        )  # fmt: skip
    if seconds < SHORT:
        return Choice(
            "procedural", "desk", f"{time} are too short to warm a generator up, and drawn pictures need no training"
        )
    if passes < PASSES:
        return Choice(
            "procedural", "desk",
            f"the teacher can answer about {passes:,.0f} images in the time, too few to warm a generator up, and drawn "
            "pictures need no training",
        )  # fmt: skip
    return Choice(
        "fast", "wrn" if hours else "hour" if MEDIUM <= seconds < LONG else "desk",
        f"no unlabelled images were given, and the teacher's BatchNorm statistics can guide a generator; {time}",
    )  # fmt: skip


def longer(
    has_batchnorm: bool,
    unlabeled: bool,
    seconds: float,
    image_shape: tuple[int, int, int],
    rate: float = math.inf,
) -> tuple[float, Choice] | None:
    """The next time limit above `seconds` from which `choose` takes another source or preset, and that choice."""
    now = choose(has_batchnorm, unlabeled, seconds, image_shape, seconds * rate)
    for limit in (max(SHORT, math.ceil(PASSES / rate / MINUTE) * MINUTE), MEDIUM, LONG):
        then = choose(has_batchnorm, unlabeled, limit, image_shape, limit * rate)
        if limit > seconds and (then.source, then.preset) != (now.source, now.preset):
            return limit, then
    return None


def _spoken(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "no time limit was given, which selects the short schedule"
    number, unit = (seconds / HOUR, "h") if seconds >= HOUR else (seconds / MINUTE, "min")
    allowed = f"{number:.3g} {unit}"
    if seconds < SHORT:
        return allowed
    return f"{allowed} allow " + ("the published schedule" if seconds >= LONG else "a short schedule")


def asks(tree: Mapping[str, Any]) -> bool:
    """Whether the source of a config tree is `auto`."""
    source = expand(tree).get("source")
    return bool((source.get("name") if isinstance(source, Mapping) else source) == AUTO)


def settle(
    tree: Mapping[str, Any],
    has_batchnorm: bool,
    unlabeled: bool,
    seconds: float,
    image_shape: tuple[int, int, int],
    begun: Mapping[str, Any] | None = None,
    rate: float = math.inf,
) -> tuple[Tree, Choice]:
    """The tree with `auto` replaced by the result of `choose`, and the choice. A preset that the tree names stays.

    `source.seconds`, if given, is the time limit, and overrides `seconds`. `begun`, the config of a run folder to
    resume, overrides both. `rate`: images that the teacher answers in a second.
    """
    full = expand(tree)
    given = full["source"]
    given = dict(given) if isinstance(given, Mapping) else {}
    allowed = given.pop("seconds", None)
    if allowed is not None and (isinstance(allowed, bool) or not isinstance(allowed, int | float) or not allowed > 0):
        raise DodistillError(f"source.seconds is {allowed!r}; it must be a number above 0, the time limit.")
    limit = float(allowed or seconds)
    choice = choose(has_batchnorm, unlabeled, limit, image_shape, limit * rate)
    preset = str(full.get("preset") or given.pop("preset", "") or choice.preset)
    choice = dataclasses.replace(choice, preset=preset, rate=rate)
    if begun is not None:
        source = begun.get("source")
        name = source.get("name") if isinstance(source, Mapping) else None
        if not isinstance(name, str):
            raise DodistillError("the config.json of this run folder names no source; choose another --out.")
        if (name, begun.get("preset", "")) != (choice.source, choice.preset):
            choice = Choice(name, str(begun.get("preset", "")), "this run folder was begun with it")
    return {**full, "source": {**given, "name": choice.source}, "preset": choice.preset}, choice


# ------------------------------------------------------------------------------------------------- describing


def first_words(method: Method, most: int = 160) -> str:
    """The first sentences of a choice's docstring: as many of its first paragraph as fit, at least one."""
    said = sys.modules[method.config.__module__].__doc__ or ""
    text = " ".join(said.strip().split("\n\n")[0].split())
    sentences = re.split(r"(?<=\.)(?<!et al\.)(?<!\b[A-Z]\.) (?=[A-Z`])", text)
    out = sentences[0]
    for sentence in sentences[1:]:
        if len(out) + len(sentence) > most:
            break
        out += " " + sentence
    return out.removesuffix(":").strip()


@dataclass(frozen=True)
class SourceRow:
    """One source in the table."""

    name: str
    kind: str
    layers: tuple[str, ...]
    unlabeled: bool
    trains: str
    keeps: str
    cost: str
    slots: int
    presets: tuple[str, ...]
    about: str


def rows(others: Iterable[Method] = ()) -> Iterator[SourceRow]:
    """Every source of this package, and `others`, described by its own code. Costs and slots are those of its `desk`
    preset, where it has one."""
    for method in [*(registry.own("source", name) for name in registry.names("source")), *others]:
        config = config_of(method)
        preset: Tree = expand(config.presets.get("desk") or next(iter(config.presets.values()), {}))
        settings = build(config, {k: v for k, v in preset.get("source", {}).items() if k != "name"}, "source")
        forwards, backwards = settings.teacher_passes()
        yield SourceRow(
            method.name, config.kind, tuple(sorted(config.needs - {"unlabeled"})), "unlabeled" in config.needs,
            config.trains, config.keeps, f"{forwards:.3g} + {backwards:.3g}", _slots(preset), tuple(config.presets),
            first_words(method),
        )  # fmt: skip


def _slots(preset: Mapping[str, Any]) -> int:
    """Slots of the pool under a preset."""
    from .tree import PoolConfig

    return int(merge({"pool": {"capacity": PoolConfig().capacity}}, preset)["pool"]["capacity"])


HEAD = ("source", "kind", "layers", "images", "trains", "keeps", "teacher", "pool", "presets")
NOTES = (
    "layers: the teacher must have BatchNorm layers with running statistics, or attention layers (a ViT); images: "
    "unlabelled images must be given.",
    "trains: the networks trained besides the student; keeps: the objects in memory besides the pool.",
    "teacher: its forward + backward passes per image that joins the pool, labelling included, under preset desk; "
    "for a sampler, per candidate image. Matching adds one forward pass per image, unless augmentation is off.",
    "pool: the largest number of images, preset desk; C*H*W + 4*classes + 8 bytes each, allocated on demand.",
)


def _cells(row: SourceRow) -> tuple[str, ...]:
    return (
        row.name, row.kind, ", ".join(row.layers) or "-", "yes" if row.unlabeled else "-", row.trains, row.keeps,
        row.cost, f"{row.slots:,}".replace(",", " "), ", ".join(row.presets),
    )  # fmt: skip


OTHERS = ("intervention", "criterion", "update", "replay")


def _choices(axis: str, others: Iterable[Method] = ()) -> Iterator[tuple[str, str]]:
    """(name, first sentences of its docstring) of each choice on an axis; the sentences do not repeat the name."""
    for method in [*(registry.own(axis, name) for name in registry.names(axis)), *others]:
        yield method.name, re.sub(rf"^`{re.escape(method.name)}`:? ?", "", first_words(method))


def _installed() -> tuple[list[Method], list[str]]:
    """The methods that installed packages offer, and the errors of those that do not load."""
    found, wrong = [], []
    for axis in registry.AXES:
        for name in plugins.offered(axis):
            if said := registry.clash(axis, name):
                wrong.append(said)
                continue
            try:
                found.append(registry.find(axis, name))
            except DodistillError as error:
                wrong.append(str(error))
    return found, wrong


def table(files: Sequence[str] = ()) -> str:
    """The table of sources as plain text, and the choices on the other axes, with the methods of installed packages
    and those in `files`.

    Runs the files.
    """
    found, wrong = _installed()
    found += [registry.load(file) for file in files]
    of = {axis: [m for m in found if m.axis == axis] for axis in registry.AXES}
    every = [HEAD, *(_cells(row) for row in rows(of["source"]))]
    widths = [max(len(line[i]) for line in every) for i in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in every]
    lines += [
        "",
        *NOTES,
        "",
        "auto chooses one of them by teacher, images and time: dodistill distill --source auto --help",
    ]
    for axis in OTHERS:
        lines += ["", axis, *(f"  {name:<14}{about}" for name, about in _choices(axis, of[axis]))]
    return "\n".join([*lines, *(["", "not loaded", *(f"  {text}" for text in wrong)] if wrong else [])])


def pages(cards: Path) -> Iterator[tuple[Path, str]]:
    """Each page in the folder of method cards, and its text with the generated blocks up to date."""
    yield cards / "README.md", _overview(cards)
    for path in sorted(cards.glob("*.md")):
        if path.name != "README.md":
            yield path, card_tables.filled(path.read_text(encoding="utf-8"), path.name)


def _overview(cards: Path) -> str:
    """README.md of the folder of method cards, with links to the cards."""
    described = card_tables.described_in(cards)

    def link(axis: str, name: str) -> str:
        card = described.get((axis, name))
        return f"[`{name}`]({card})" if card else f"`{name}`"

    lines = [
        "# Methods",
        "",
        "<!-- Generated: dodistill methods --cards docs/methods. A test keeps it up to date. -->",
        "",
        "Each choice on an axis is one file in `src/dodistill/`. Some choices also have a card here.",
        "",
        "## Sources: where the substitution inputs come from",
        "",
        "| " + " | ".join(HEAD) + " | what it is |",
        "|---" * (len(HEAD) + 1) + "|",
    ]
    for row in rows():
        name, *rest = _cells(row)
        lines.append("| " + " | ".join([link("source", name), *rest, row.about]) + " |")
    lines += ["", *(f"* {note}" for note in NOTES), "", "## `--source auto`", ""]
    lines += ["The first line that applies:", "", "```", *_choose_table(), "```", "", SLOW]
    titles = {
        "intervention": "Interventions: how to cut the confounder's path to the student",
        "criterion": "Criteria: the distance between student and teacher",
        "update": "Updates: how the student's gradients are computed",
        "replay": "Replays: the memory of the student's past inputs",
    }
    for axis in OTHERS:
        lines += ["", f"## {titles[axis]}", ""]
        lines += [f"* {link(axis, name)}{' ' if about[:1] == '(' else ': '}{about}" for name, about in _choices(axis)]
    return "\n".join(lines) + "\n"


def _choose_table() -> list[str]:
    """The table in the docstring of `choose`."""
    lines = (choose.__doc__ or "").split("\n")
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("unlabelled images?"))
    end = next(i for i in range(start, len(lines)) if not lines[i].strip())
    return [line.strip() for line in lines[start:end]]


def choosing() -> str:
    """How `--source auto` chooses, for the help."""
    table = "\n".join(f"  {line}" for line in _choose_table())
    return f"source auto takes the first line that applies:\n\n{table}\n\n{SLOW}"
