"""The method cards name only settings that exist, their commands can be run, and their tables are those of the code."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dodistill.commands.cli import main, read
from dodistill.config import card_tables, registry
from dodistill.config import tree as config
from dodistill.config.card_tables import blocks, described_in, filled, presets, settings, shown
from dodistill.config.methods import pages
from dodistill.errors import DodistillError

DOCS = Path(__file__).parents[1] / "docs" / "methods"
CARDS = sorted(path for path in DOCS.glob("*.md") if path.name != "README.md")
CHOICES = [(axis, name) for axis in registry.AXES for name in registry.names(axis)]


def fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()


#: part of the config -> the settings that it has, whatever is chosen
SETTINGS: dict[str, set[str]] = {axis: set() for axis in registry.AXES}
for _axis, _name in CHOICES:
    SETTINGS[_axis] |= fields(registry.config(_axis, _name))
SETTINGS |= {name: fields(registry.config("intervention", name)) for name in registry.names("intervention")}
SETTINGS |= {part: fields(type(getattr(config.resolve({}), part))) for part in (*card_tables.PARTS, "data", "teacher")}


# -------------------------------------------------------------------------------------------------- the tables


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """Page -> its text as the code has it now."""
    return {path.name: text for path, text in pages(DOCS)}


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_the_pages_are_up_to_date(page: str, made: dict[str, str]) -> None:
    assert (DOCS / page).read_text() == made[page], "run: dodistill methods --cards docs/methods"


@pytest.mark.parametrize(("axis", "name"), CHOICES)
def test_what_can_be_set_stands_in_a_card(axis: str, name: str) -> None:
    cls: Any = registry.config(axis, name)
    if axis == "source":
        if (DOCS / f"{name}.md").exists():
            assert ("presets", name) in blocks((DOCS / f"{name}.md").read_text()), f"no <!-- presets: {name} -->"
    elif fields(cls):
        card = DOCS / described_in(DOCS).get((axis, name), "")
        assert card.is_file(), f"no card has <!-- settings: {axis} {name} -->"
        shows = [what.split(" in ")[0].split() for kind, what in blocks(card.read_text()) if kind == "settings"]
        assert any(axis == words[0] and name in words[1:] for words in shows), f"{card.name}: no settings of {name}"


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line[:1] == "|"]


def flat(part: Any) -> Any:
    """{"of": {"fast": {"K": 5}}} -> {"of.fast.K": 5}"""
    if not isinstance(part, dict):
        return part
    inner = {k: flat(v) if isinstance(v, dict) else {"": v} for k, v in part.items()}
    return {f"{k}.{name}".rstrip("."): v for k, found in inner.items() for name, v in found.items()}


@pytest.mark.parametrize("source", registry.names("source"))
def test_the_table_of_presets_says_what_they_resolve_to(source: str) -> None:
    cls: Any = registry.config("source", source)
    text = presets(source)
    head, _, *rows = cells(text)
    assert head == ["setting", "default", *(f"`{name}`" for name in cls.presets)]
    keys = [row[0].strip("`") for row in rows]
    for column, preset in enumerate(cls.presets, 2):
        tree = config.resolve({"source": source, "preset": preset}).to_tree()
        for key, row in zip(keys, rows):
            part, _, field = key.partition(".")
            here = flat(tree.get(part, {}))
            value = here.get(field or "name", card_tables.NONE) if isinstance(here, dict) else here
            given = flat(cls.presets[preset].get(part))
            if isinstance(given, dict) and field in given:  # of an intervention that is perhaps not chosen
                value = given[field]
            assert row[column] == shown(value), (preset, key)
        assert {f"{part}.{k}" for part, given in cls.presets[preset].items() if isinstance(given, dict)
                for k in flat(given) if k != "name"} <= set(keys)  # fmt: skip
        assert f"* `{preset}`: {cls.origin[preset]}." in text


def test_defaults_that_depend_on_a_choice() -> None:
    rows = {row[0]: row[1] for row in cells(presets("data"))}
    assert rows["`criterion.ce`"] == "1 (cid), 0.1 (hinton)"
    assert rows["`optim.lr`"] == "0.1"
    assert rows["`cid.refresh`"] == "4.167e-3"


def test_settings_in_the_presets_that_choose_them() -> None:
    head, _, *rows = cells(settings("replay bank in pre"))
    assert head == ["setting", "default", "`mb`", "`lra-bank`", "`desk`", "meaning"]
    assert rows[0] == ["`replay.capacity`", "10", "10", "10", "10", "batches that are kept"]
    assert [row[3] for row in rows if row[0] == "`replay.size`"] == ["64"]
    head, _, *rows = cells(settings("update replay retain in pre"))
    assert head[:5] == ["update", "setting", "default", "`mb`", "`pre`"]
    assert ["`retain`", "`update.alpha`", "0.9", "–", "–", "0.9", "0.9", "0.1"] in [row[:8] for row in rows]


def test_settings_that_several_share_stand_once() -> None:
    _, _, *rows = cells(settings("criterion sp at"))
    assert ["all", "`criterion.temperature`", "4", "T of that KL"] in rows
    assert ["`at`", "`criterion.weight`", "1000", "weight of L_AT"] in rows


@pytest.mark.parametrize(
    ("value", "text"),
    [(2e-3, "2e-3"), (2.5e-5, "2.5e-5"), (0.01, "0.01"), (20 / 240, "0.08333"), (1 / 240, "4.167e-3"), (1.0, "1"),
     (80_000, "80 000"), (1280, "1280"), (True, "true"), (None, "none"), ((0.5, 0.999), "0.5, 0.999"), ([], "none"),
     ("", "none"), ("kl", "kl"), (1e-10, "1e-10"), (-0.002, "-2e-3")],
)  # fmt: skip
def test_values(value: Any, text: str) -> None:
    assert shown(value) == text


def test_a_block_is_filled_again_and_nothing_else_changes() -> None:
    text = (
        "# a\n\n<!-- settings: update retain -->\n<!-- end -->\nb\n<!-- presets: real -->\nold | one\n<!-- end -->\nc\n"
    )
    once = filled(text, "x.md")
    assert "`update.alpha` | 0.9" in once
    assert "old | one" not in once
    assert once.startswith("# a\n\n<!-- settings: update retain -->\n\n| setting ")
    assert "\n<!-- end -->\nb\n<!-- presets: real -->\n" in once
    assert once.endswith("<!-- end -->\nc\n")
    assert filled(once, "x.md") == once


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- presets: fats -->\n<!-- end -->\n", "x.md: <!-- presets: fats -->: unknown source 'fats'; did you mean"),
        ("<!-- settings: replai bank -->\n<!-- end -->\n", "did you mean 'replay'"),
        ("<!-- settings: replay -->\n<!-- end -->\n", "After an axis, give the name of a choice"),
        ("<!-- settings: replay bank in per -->\n<!-- end -->\n", "unknown source 'per'; did you mean 'pre'"),
        ("<!-- presets: fast -->\n| a |\n", "needs a line <!-- end -->"),
        ("<!-- presets: fast -->\n<!-- presets: real -->\n<!-- end -->\n", "presets: fast --> needs a line"),
    ],
)
def test_wrong_marks_are_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(DodistillError, match=re.escape(says)):
        filled(text, "x.md")


def test_the_command_writes_what_is_out_of_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for card in CARDS:
        (tmp_path / card.name).write_text(card.read_text())
    (tmp_path / "bank.md").write_text("<!-- settings: replay bank -->\n<!-- end -->\n")
    assert main(["methods", "--cards", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in ("README.md", "bank.md")]
    assert "batches that are kept" in (tmp_path / "bank.md").read_text()
    assert (tmp_path / "README.md").read_text() == (DOCS / "README.md").read_text()
    assert main(["methods", "--cards", str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""
    assert main(["methods", "--cards", str(tmp_path / "nowhere")]) == 2


# ---------------------------------------------------------------------------------------------------- the text


def commands(text: str) -> Iterator[str]:
    """Each `dodistill ...` command of the code blocks, without line ends and comments."""
    for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().startswith("dodistill "):
                yield re.sub(r"\s#.*$", "", line).strip()


@pytest.mark.parametrize("card", CARDS, ids=lambda p: p.stem)
def test_the_commands_of_a_card_can_be_resolved(card: Path) -> None:
    for command in commands(card.read_text()):
        words = [word for word in shlex.split(command)[1:] if word not in ("...", "--help")]
        if words[0] != "distill" or "--help" in command:
            continue
        config.resolve(read("distill", words[1:])[1], allow_code=True)  # paths in a command were typed


def backticked(text: str) -> list[str]:
    """What stands in single backticks outside of code blocks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    return [" ".join(quoted.split()) for quoted in re.findall(r"`([^`]+)`", text)]


@pytest.mark.parametrize("card", CARDS, ids=lambda p: p.stem)
def test_a_card_names_settings_that_exist(card: Path) -> None:
    text = card.read_text()
    wrong = []
    for quoted in [*backticked(text), *commands(text)]:
        for part, key in re.findall(r"(?<![\w./])(?:--)?([a-z]+)\.([A-Za-z]\w*)(?![\w(/.])", quoted):
            if part in SETTINGS and key not in SETTINGS[part] | {"py", "md", "yaml"}:
                wrong.append(f"{part}.{key}")
    assert not wrong


#: first words in backticks with another behind them that are no setting: of commands and formulas
NO_SETTING = {"dodistill", "W_m", "sum_k", "lam", "lam_i"}


def own_settings(text: str) -> set[str]:
    """What the choices have that a card is about, by its blocks; the parts of the config, and the axes."""
    out = {*registry.AXES}.union(*(SETTINGS[part] for part in card_tables.PARTS))
    for kind, what in blocks(text):
        axis, *names = ["source", what] if kind == "presets" else what.split(" in ")[0].split()
        out = out.union(*(fields(registry.config(axis, name)) for name in names))
    return out


@pytest.mark.parametrize("card", CARDS, ids=lambda p: p.stem)
def test_a_setting_with_its_value_exists(card: Path) -> None:
    """`reset_at 0`, `select balanced`: the first word is a setting of what the card is about."""
    text = card.read_text()
    known = own_settings(text) | NO_SETTING
    pairs = [re.fullmatch(r"([A-Za-z_]\w*)[ =](-?[\w.+][\w.+-]*)", quoted) for quoted in backticked(text)]
    assert not [pair[0] for pair in pairs if pair and pair[1] not in known]


@pytest.mark.parametrize("card", CARDS, ids=lambda p: p.stem)
def test_a_table_written_by_hand_names_settings_that_exist(card: Path) -> None:
    """Tables whose head says `setting` or `switch` anywhere but in a generated block."""
    text = re.sub(r"^<!-- (?:presets|settings): .*?^<!-- end -->", "", card.read_text(), flags=re.M | re.S)
    known = set().union(*SETTINGS.values())
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = cells(table)
        for column in (i for i, title in enumerate(head) if title in ("setting", "switch")):
            for row in rows:
                for name in re.findall(r"`(\w+)`", row[column]):
                    assert name in known, (head[column], row)
