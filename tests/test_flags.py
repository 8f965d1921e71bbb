"""Flags are the config tree, spelled on a command line; the help is made of the settings and their comments."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import pytest

from dodistill.commands.cli import COMMANDS, main
from dodistill.config import choices, flags, outline, registry
from dodistill.config.tree import Augment, Data, Distill, Loop, Model, Optim, PoolConfig, ViewConfig, resolve
from dodistill.engine.teach import Teach
from dodistill.errors import DodistillError

CHOICES = [(axis, name) for axis in registry.AXES for name in registry.names(axis)]
PRESETS = [(name, preset) for name in registry.names("source") for preset in registry.config("source", name).presets]


def read(line: str) -> dict[str, object]:
    words = shlex.split(line)
    return flags.parse(choices.parts(words), words, "dodistill distill")


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The help behind these words, without its boxes and line ends."""
    monkeypatch.setenv("COLUMNS", "100")

    def say(*words: str) -> str:
        assert main([*words, "--help"]) == 0
        return " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())

    return say


# -------------------------------------------------------------------------------------------------- reading


def test_values_are_read_as_yaml_reads_them() -> None:
    assert read("--loop.steps 60 --optim.lr 1e-3 --data.image_shape 3,32,32 --source.reset-at=0") == {
        "loop.steps": 60,
        "optim.lr": 1e-3,
        "data.image_shape": [3, 32, 32],
        "source.reset_at": 0,
    }
    assert read("--augment.flip false --kdci.renormalize") == {"augment.flip": False, "kdci.renormalize": True}
    assert read("--kdci.renormalize --augment.flip=no --optim.milestones [0.2,0.5]") == {
        "kdci.renormalize": True, "augment.flip": False, "optim.milestones": [0.2, 0.5]}  # fmt: skip


def test_values_are_read_as_their_type_has_them() -> None:
    """YAML reads these words as a boolean, a number and a string."""
    assert read("--source procedural --source.stretch on")["source.stretch"] == "on"
    assert read("--teacher 007 --test 1e3") == {"teacher.spec": "007", "data.test": "1e3"}
    assert read("--source cmi --source.layers a.b,c")["source.layers"] == ["a.b", "c"]
    for word in ("none", "None", "null"):
        assert read(f"--kdci.width {word} --view.flip {word}") == {"kdci.width": None, "view.flip": None}
    resolve(read("--source procedural --source.stretch on --source.mix 1,1,0,0,2 --stratified.prior 1,2"))


def test_a_negative_number_is_a_value_and_not_a_flag() -> None:
    assert read("--optim.lr -0.5 --seed -1 --optim.floor=-1e-3") == {
        "optim.lr": -0.5, "loop.seed": -1, "optim.floor": -1e-3}  # fmt: skip


def test_short_names() -> None:
    assert read("--teacher t.safetensors --steps 3") == {"teacher.spec": "t.safetensors", "loop.steps": 3}
    assert read("--source.name dfnd --source.preset desk --data.foreign vgg8 --train x") == {
        "source": "dfnd", "preset": "desk", "data.foreign.spec": "vgg8", "data.unlabeled": "x"}  # fmt: skip
    for line in ("--steps 3 --loop.steps 4", "--loop.steps=4 --steps 3", "--train a --unlabeled b"):
        with pytest.raises(DodistillError, match="are the same setting"):
            read(line)
    assert read("--lr 0.01 --foreign vgg8") == {"optim.lr": 0.01, "data.foreign.spec": "vgg8"}  # as in Python
    assert read("--steps 3 --steps 4") == {"loop.steps": 4}


@pytest.mark.parametrize("short", flags.SHORT)
def test_every_short_name_is_a_flag(short: str) -> None:
    value = {"image_shape": "3,8,8", "precision": "fp32"}.get(short, "7")
    for name in (short, short.replace("_", "-")):
        assert list(read(f"--{name} {value}")) == [flags.SHORT[short]]


def test_a_stray_word_is_refused_by_name() -> None:
    with pytest.raises(DodistillError, match="'stray'"):
        read("--steps 3 stray")
    with pytest.raises(DodistillError, match="'stray'"):
        read("--augment.flip false stray")


def test_only_what_was_typed_is_handed_on() -> None:
    """Neither a preset nor a default becomes a flag, by which it would win over a recipe."""
    assert read("--source fast --preset wrn --intervention kdci") == {
        "source": "fast", "preset": "wrn", "intervention": "kdci"}  # fmt: skip
    assert read("--loop.steps 2000 --optim.nesterov false") == {"loop.steps": 2000, "optim.nesterov": False}


def test_the_settings_of_a_source_that_is_chosen_later_are_read_as_they_stand() -> None:
    given = read("--source auto --source.n 40 --source.seconds 60 --source.balanced --seed 1")
    assert given == {
        "source": "auto", "source.n": 40, "source.seconds": 60, "source.balanced": True, "loop.seed": 1}  # fmt: skip


@pytest.mark.parametrize(("axis", "name"), CHOICES)
def test_every_setting_of_a_choice_is_a_flag_that_resolves_to_it(axis: str, name: str) -> None:
    """Each field is given as its default is shown; the tree that comes of it is that of the defaults."""
    chosen: Mapping[str, str] = {"replay": "bank"} if name in ("replay", "retain") and axis == "update" else {}
    chosen = {"update": "replay"} if axis == "replay" and name != "none" else chosen
    words = [f"--{axis}", name, *(word for other, choice in chosen.items() for word in (f"--{other}", choice))]
    known = [flag for part in choices.parts(words) for flag in part.flags if "." in flag.name]
    for flag in known:
        text = ", ".join(map(str, flag.default)) if isinstance(flag.default, tuple) else str(flag.default)
        words += [f"--{flag.name}", "[]" if flag.default == () else text]
    given = flags.parse(choices.parts(words), words, "dodistill distill")
    assert {flag.name for flag in known} <= set(given)
    assert resolve(given) == resolve({axis: name, **chosen})


# ------------------------------------------------------------------------------------------- outline and help


@pytest.mark.parametrize(("axis", "name"), CHOICES)
def test_an_outline_has_the_settings_of_the_class(axis: str, name: str) -> None:
    cls, real = outline.choice(axis, name), registry.config(axis, name)
    assert cls is not real
    assert [f.name for f in dataclasses.fields(cls)] == [f.name for f in dataclasses.fields(real)]
    assert [f.default for f in dataclasses.fields(cls)] == [f.default for f in dataclasses.fields(real)]
    assert get_type_hints(cls).keys() == get_type_hints(real).keys()
    for key, hint in get_type_hints(real).items():
        assert get_type_hints(cls)[key] == hint or "ClassVar" in str(hint), key
    if not str(real.__doc__).startswith("Config("):  # else the fields, as dataclasses writes them
        assert cls.__doc__ == real.__doc__
    for shared in ("name", "presets", "origin", "kind", "needs", "replays"):
        assert getattr(cls, shared, None) == getattr(real, shared, None), shared


def test_an_outline_gives_way_to_an_import_where_a_file_needs_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(outline, "ROOT", tmp_path)
    (tmp_path / "sources").mkdir()
    text = "import torch\nfrom dataclasses import dataclass\nN = {}\n@dataclass\nclass Config:\n    n: int = N\n"
    (tmp_path / "sources" / "fast.py").write_text(text.format("torch.pi"))
    with pytest.raises(outline.Unreadable, match="torch"):
        outline.Outline("sources.fast").get("Config")
    assert outline.choice("source", "fast").__module__ == "dodistill.sources.fast"
    (tmp_path / "sources" / "dfnd.py").write_text(text.format("(lambda n: n + 1)(2)"))
    assert outline.Outline("sources.dfnd").get("Config")().n == 3


def comments(cls: type) -> list[str]:
    """Each `#:` line of a class of settings, by another way than the help goes."""
    source = inspect.getsource(cls).splitlines()
    return [" ".join(line.partition("#:")[2].split()) for line in source if "#:" in line]


def classes(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]


def missing(said: str, cls: type, prefix: str) -> list[str]:
    """What of a class of settings the help does not say: flags, its own comments, those of fields of its bases."""
    flags_ = [f"--{prefix}{f.name}".replace("_", "-") for f in dataclasses.fields(cls)]
    flags_ = [name for name in flags_ if name != "--data.foreign"]
    texts = comments(cls)
    for base in classes(cls)[1:]:
        own = {name for c in classes(cls)[: classes(cls).index(base)] for name in vars(c).get("__annotations__", {})}
        lines = inspect.getsource(base).splitlines()
        for line in lines:
            name = line.strip().partition(":")[0]
            if "#:" in line and name in {f.name for f in dataclasses.fields(base)} - own:
                texts.append(" ".join(line.partition("#:")[2].split()))
    return [text for text in (*flags_, *texts) if text and text not in said]


@pytest.mark.parametrize(("axis", "name"), CHOICES)
def test_help_has_every_setting_of_a_choice_with_its_whole_comment(axis: str, name: str, told: Any) -> None:
    prefix = name if axis == "intervention" else axis
    assert not missing(told("distill", f"--{axis}", name), registry.config(axis, name), f"{prefix}.")


def test_help_has_every_setting_of_the_other_parts(told: Any) -> None:
    said = told("distill")
    for prefix, cls in {"teacher": Model, "student": Model, "data": Data, "data.foreign": Model, "optim": Optim,
                        "pool": PoolConfig, "augment": Augment, "view": ViewConfig, "loop": Loop,
                        "dictionary": registry.dictionary()}.items():  # fmt: skip
        assert not missing(said, cls, f"{prefix}."), prefix
    plain = {name for name, hint in get_type_hints(Distill).items() if dataclasses.is_dataclass(hint)}
    assert plain - {"teacher", "student", "data", "optim", "pool", "augment", "view", "loop"} <= set(registry.AXES) | {
        "dictionary"
    }


def test_what_the_old_help_lost(told: Any) -> None:
    said = told("distill", "--intervention", "kdci+cid+stratified", "--criterion", "cid")
    for text in (
        "--kdci.weights {attention, random, constant} attention (Eq. 5) | random (Table 4 (2), fixed between builds)",
        "--cid.weights {softened, prior, uniform} of each prototype: the input's own softened prediction (released)",
        "--dictionary.of {auto, latest, pool, batch} latest (newest acquisition) | pool (all of it) | batch",
        "--criterion.supervise {auto, labels, teacher} target of z': labels where the data have them, else the teacher",
        "hardly affects class shares of up to 100:1 (default: 20)",
    ):
        assert text in said, text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_flag_of_a_command(command: str, told: Any) -> None:
    cls = outline.read(f"commands.{command}", "Arguments")
    said, words = told(command), {flag.name for flag in flags.part(cls).flags if flag.word}
    assert cls.__doc__.split("\n")[0] in said
    for field in dataclasses.fields(cls):
        assert outline.comment(cls, field.name) in said
        assert f"--{field.name}".replace("_", "-") in said or field.name in words
    if command == "teach":
        teach = [f for f in dataclasses.fields(Teach) if f.name != "model"]
        for field in teach:
            assert f"--{field.name.replace('_', '-')} " in said
            assert outline.comment(Teach, field.name) in said


@pytest.mark.parametrize(("source", "preset"), PRESETS)
def test_help_shows_what_a_preset_sets(source: str, preset: str) -> None:
    """The default of every flag is what a run with this preset has."""
    words = ["--source", source, "--preset", preset]
    run = json.loads(json.dumps(resolve({"source": source, "preset": preset}).to_tree()))
    for part in choices.parts(words):
        for flag in part.flags:
            here: Any = run
            for key in flag.name.split("."):
                here = here[key]
            here = here.get("name", dict.fromkeys(here)) if isinstance(here, dict) else here
            if flag.name in ("source.warmup", "source.every") and flag.default == -1:
                continue  # follows from other settings
            assert json.loads(json.dumps(flag.default)) == here, flag.name


def test_help_shows_a_preset_and_a_recipe_as_defaults(told: Any, tmp_path: Path) -> None:
    said = told("distill", "--source", "fast", "--preset", "wrn")
    assert "--steps INT, --loop.steps INT matching steps of the student (default: 80000)" in said
    assert "inner steps per acquisition (default: 10)" in said
    assert "wrn: release script, WRN-40-2 pairs on CIFAR, Fast-10" in said
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "source: {name: fast, K: 7}\npreset: wrn\nloop.seed: 5\nteacher: t.safetensors\nkdci: {scale: 9}\n"
    )
    said = told("distill", str(recipe), "--intervention", "kdci")
    assert "inner steps per acquisition (default: 7)" in said
    assert "(default: 80000)" in said
    assert "--loop.seed INT (default: 5)" in said
    assert "dodistill wrote (default: t.safetensors)" in said
    assert "factor on F (default: 9)" in said


def test_a_recipe_s_choices_have_flags(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("source: dfnd\ncriterion: {name: cid}\n")
    words = [str(recipe), "--source.n", "5", "--criterion.b", "3"]
    file = flags.Flag("recipe", str, word=True, default="")
    given = flags.parse([flags.Part([file]), *choices.parts(words)], words, "dodistill distill")
    assert given == {"recipe": str(recipe), "source.n": 5, "criterion.b": 3}


def test_comments_of_fields() -> None:
    kdci, stratified, noise = (registry.config(*c) for c in (
        ("intervention", "kdci"), ("intervention", "stratified"), ("source", "noise")))  # fmt: skip
    assert outline.comment(kdci, "weights").startswith("attention (Eq. 5) | random")  # below a bracket
    assert outline.comment(stratified, "cap").endswith("100:1")  # two lines
    assert outline.comment(noise, "law") == "gaussian, uniform"  # none, but only two values
    assert outline.comment(noise, "every").startswith("matching steps per acquisition")  # its base's
    assert outline.comment(noise, "n") == "images kept per acquisition"


@dataclasses.dataclass
class Mine:
    """A user's own settings, in a file outside of the package."""

    name: ClassVar[str] = "mine"
    rate: float = 0.5  #: how fast it "goes" #1
    #: and how far
    kind: str = "a # b"


def test_a_class_of_ones_own_has_flags_too() -> None:
    found = flags.part(Mine, "source")
    assert found.about == "A user's own settings, in a file outside of the package."
    assert [(f.name, f.help, f.default) for f in found.flags] == [
        ("source.rate", 'how fast it "goes" #1 and how far', 0.5), ("source.kind", "", "a # b")]  # fmt: skip
    assert flags.parse([found], ["--source.rate", "2"], "dodistill distill") == {"source.rate": 2}
