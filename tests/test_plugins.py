"""Methods from a file, a package or an object: they have what our own have, and run only where they were allowed to."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from dodistill import (
    Criterion,
    CriterionConfig,
    Intervention,
    InterventionConfig,
    Replay,
    ReplayConfig,
    Update,
    UpdateConfig,
)
from dodistill.api import distill
from dodistill.commands import compare as grid
from dodistill.commands.cli import main
from dodistill.commands.look import look
from dodistill.config import choices, plugins, registry
from dodistill.config.methods import table
from dodistill.config.tree import code_in, merge, portable, resolve
from dodistill.engine.run_folder import RunFolder
from dodistill.errors import DodistillError
from dodistill.functional import losses
from dodistill.sources import fast, procedural
from helpers import SHAPE, metrics, student

SOURCE = '''"""Grey: images of one grey each. A second sentence."""
from dataclasses import dataclass
import torch
from dodistill import Acquired, Source, SourceConfig


@dataclass(frozen=True)
class Config(SourceConfig):
    every: int = 2
    n: int = 20  #: images per acquisition
    kind = "generator"
    presets = {"few": {"source": {"n": 12}, "optim": {"lr": 0.02}, "loop.ema": 0.5}}
    origin = {"few": "ours"}

    def build(self, context):
        return Grey(self, context)


class Grey(Source):
    def __init__(self, config, context):
        super().__init__(context)
        self.n, self.level = config.n, torch.zeros(())

    def acquire(self, student, round):
        self.level += 0.05
        self.terms = {"level": self.level.clone()}
        noise = torch.rand(self.n, *self.context.image_shape, generator=self.generator)
        return Acquired((noise * 0.9 + self.level).clamp(0, 1))

    def parts(self):
        return {"level": self.level}
'''
ACT = '''"""Shift: adds a constant."""
from dataclasses import dataclass
from dodistill import Intervention, InterventionConfig


class Shift(Intervention):
    def __init__(self, by):
        super().__init__()
        self.name, self.by = "shift", by

    def compensate(self, s, dictionary, batch=None):
        return s + self.by * s.detach().roll(1, 1)

    def log(self, s, t, dictionary, batch=None):
        return {"by": s.new_tensor(self.by)}


@dataclass(frozen=True)
class Config(InterventionConfig):
    by: float = 0.5  #: how far

    def build(self, context):
        return Shift(self.by)
'''
CRITERION = '''"""Cubed: the cubic distance."""
from dataclasses import dataclass
from dodistill import Criterion, CriterionConfig


class Cubed(Criterion):
    def __init__(self, power):
        super().__init__()
        self.power = power

    def forward(self, s, t, batch=None):
        return {"cubed": ((s - t).abs() ** self.power).mean() / 100}


@dataclass(frozen=True)
class Config(CriterionConfig):
    power: float = 3.0

    def build(self, context):
        return Cubed(self.power)
'''
UPDATE = '''"""Clipped: the plain gradient, clipped."""
from dataclasses import dataclass
import torch
from dodistill import Update, UpdateConfig


@dataclass(frozen=True)
class Config(UpdateConfig):
    most: float = 0.1
    replays = True

    def build(self):
        return Clipped(self.most)


class Clipped(Update):
    def __init__(self, most):
        super().__init__()
        self.most = most

    def backward(self, student, acquire, retain=None):
        terms = acquire(student)
        if retain is not None:
            terms |= {f"retain_{k}": v for k, v in retain(student).items()}
        torch.stack(list(terms.values())).sum().backward()
        self.terms = {"norm": torch.nn.utils.clip_grad_norm_(student.parameters(), self.most)}
        return {k: v.detach() for k, v in terms.items()}
'''
REPLAY = '''"""Last: the newest images again."""
from dataclasses import dataclass
from dodistill import Replay, ReplayConfig


@dataclass(frozen=True)
class Config(ReplayConfig):
    size: int = 8

    def build(self, context):
        return Last(self, context)


class Last(Replay):
    def __init__(self, config, context):
        super().__init__(context)
        self.size, self.x, self.t = config.size, None, None

    @property
    def ready(self):
        return self.x is not None

    def remember(self, images, logits, round):
        self.x, self.t = images[: self.size], logits[: self.size]

    def draw(self, student, step):
        return self.x / 255, self.t

    def state_dict(self):
        return super().state_dict() | {"x": self.x, "t": self.t}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.x, self.t = state["x"], state["t"]
'''
FILES = {"grey.py": SOURCE, "shift.py": ACT, "cubed.py": CRITERION, "clipped.py": UPDATE, "last.py": REPLAY}
ALL = {"source": "grey.py", "intervention": "shift.py", "criterion": "cubed.py", "update": "clipped.py",
       "replay": "last.py"}  # fmt: skip
BASE: dict[str, Any] = {
    "augment": {"pad": 1, "flip": False}, "optim": {"lr": 0.05},
    "loop": {"steps": 6, "batch": 8, "device": "cpu", "threads": 1, "log_every": 1, "eval_every": 3, "ema": 0.9},
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a file for each axis."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    return tmp_path


def run(teacher: nn.Module, out: str | None = None, **more: Any) -> Any:
    return distill(teacher, student(), image_shape=SHAPE, verbose=False, out=out, **merge(BASE, more))


def of_file(name: str) -> Any:
    """The config class in a file, as `import` would have it."""
    return registry.load(name).config


# --------------------------------------------------------------------------------------------- on every axis


def test_five_files_run_are_recorded_and_resume_to_the_same_bits(here: Path, teacher_file: Path) -> None:
    command = [
        "distill", "--teacher", str(teacher_file), "--student", "tiny4", "--steps", "6", "--batch", "8",
        *(word for axis, name in ALL.items() for word in (f"--{axis}", name)), "--source.n", "16", "--shift.by", "0.25",
        "--criterion.power", "2", "--update.most", "0.5", "--replay.size", "4", "--augment.pad", "1", "--threads", "1",
        "--loop.log_every", "1", "--optim.lr", "0.05", "--quiet", "--out",
    ]  # fmt: skip
    assert main([*command, "whole"]) == 0
    tree = json.loads(Path("whole/config.json").read_text())
    settings = {"source": {"n": 16}, "criterion": {"power": 2.0}, "update": {"most": 0.5}, "replay": {"size": 4},
                "shift": {"by": 0.25}}  # fmt: skip
    for part, given in settings.items():
        assert given.items() <= tree[part].items(), part
    assert tree["intervention"] == "shift.py"
    mine = {axis if axis != "intervention" else "shift": name for axis, name in ALL.items()}
    assert code_in(tree) == {p: (n, plugins.fingerprint(Path(n).read_bytes())) for p, n in mine.items()}
    last = [line for line in metrics(Path("whole")) if line["kind"] == "log"][-1]
    assert last["shift/by"] == 0.25
    assert {"source/level", "match/cubed", "match/retain_cubed", "update/norm"} <= last.keys()
    assert last["source/level"] == pytest.approx(0.15, abs=1e-6)
    for page in ("report.html", "README.md"):
        text = Path("whole", page).read_text()
        assert all(name in text and code in text for name, code in code_in(tree).values()), page

    statuses = [main([*command, "parts", "--max-seconds", "0"]) for _ in range(12)]
    assert statuses[0] == 75
    assert statuses[-1] == 0
    assert metrics(Path("whole")) == metrics(Path("parts"))
    a, b = (load_file(f"{name}/student.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_an_object_a_class_and_a_path_are_one_method(here: Path, teacher: nn.Module) -> None:
    g, act, criterion, update, replay = (of_file(name) for name in FILES)
    paths: dict[str, Any] = {
        "source": {"name": "grey.py", "n": 16}, "intervention": "kdci+shift.py", "shift": {"by": 0.25},
        "criterion": "cubed.py", "update": "clipped.py", "replay": {"name": "last.py", "size": 4},
    }  # fmt: skip
    objects = {
        "source": g(n=16), "intervention": ("kdci", act(by=0.25)), "criterion": criterion, "update": update(),
        "replay": replay(size=4),
    }  # fmt: skip
    by_path = run(teacher, "a", allow_code=True, **paths)
    by_object = run(teacher, "b", **objects)
    a, b = (r.student.state_dict() for r in (by_path, by_object))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    trees = [json.loads(Path(f, "config.json").read_text()) for f in "ab"]
    assert portable(trees[0]) == portable(trees[1])
    assert trees[1]["source"]["name"] == "grey"
    assert trees[1]["intervention"] == "kdci+shift"
    assert by_path.summary["key"] == by_object.summary["key"]
    assert run(teacher, "a", **objects).summary == by_path.summary  # the folder of one is a folder of the other


@dataclass(frozen=True)
class MyCriterion(CriterionConfig):
    """Nothing of it is in a file of its own."""

    weight: float = 1.0

    def build(self, context: Any) -> Criterion:
        return Weighted(self.weight)


class Weighted(Criterion):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, s: Tensor, t: Tensor, batch: Any = None) -> dict[str, Tensor]:
        return {"kl": self.weight * losses.kl(s, t, 2.0)}


def test_objects_mix_with_names_settings_and_presets(here: Path) -> None:
    g = of_file("grey.py")
    assert resolve({"source": g(), "preset": "few"}).source == g()  # an object has all of its settings
    d = resolve({"source": g, "preset": "few"})
    assert (d.source, d.optim.lr) == (g(n=12), 0.02)
    assert d.loop.ema == 0.5  # a preset's dotted key
    assert resolve({"source": g(n=5)}, {"source.every": 7}).source == g(n=5, every=7)
    assert resolve({"source": {"name": g(n=5), "every": 7}}).source == g(n=5, every=7)
    assert resolve({"source": g(n=5)}, {"source": "fast"}).source == fast.Config()
    assert resolve({"source": "fast", "source.K": 9}, {"source": g(n=5)}).source == g(n=5)
    assert resolve({"source": fast.Config(K=9)}) == resolve({"source": {"name": "fast", "K": 9}})
    assert resolve({"source": procedural.Config}).key() == resolve({"source": "procedural"}).key()
    d = resolve({"criterion": MyCriterion(2.0)})
    assert d.to_tree()["criterion"] == {
        "name": "MyCriterion", "code": plugins.fingerprint(Path(__file__).read_bytes()), "weight": 2.0,
    }  # fmt: skip
    with pytest.raises(DodistillError, match="weight is 'x'; it must be of type float"):
        resolve({"criterion": MyCriterion("x")})  # type: ignore[arg-type]
    with pytest.raises(DodistillError, match="MyCriterion is a choice on axis criterion, not update"):
        resolve({"update": MyCriterion()})
    with pytest.raises(DodistillError, match=r"a mapping of name and settings, or a config"):
        resolve({"criterion": Weighted(1.0)})
    act = of_file("shift.py")
    assert resolve({"intervention": act(by=2.0), "shift.by": 3.0}).interventions == (act(by=3.0),)
    with pytest.raises(DodistillError, match="names one twice"):
        resolve({"intervention": (act(by=2.0), act(by=3.0))})


def test_a_method_of_a_run_can_be_pickled(here: Path) -> None:
    d = resolve({**ALL, "source.n": 9}, allow_code=True)
    for part in (d.source, *d.interventions, d.criterion, d.update, d.replay):
        assert pickle.loads(pickle.dumps(part)) == part


def test_help_and_methods_show_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--source", "grey.py", "--intervention", "kdci+shift.py", "--help"]) == 0
    said = capsys.readouterr().out
    said = " ".join(said.replace("│", " ").split())
    assert "--source.n INT images per acquisition (default: 20)" in said
    assert "--shift.by FLOAT how far (default: 0.5)" in said
    assert "few: ours" in said
    assert main(["methods", *FILES]) == 0
    said = capsys.readouterr().out
    (row,) = [line for line in said.splitlines() if line.startswith("grey.py")]
    assert row.split() == ["grey.py", "generator", "-", "-", "nothing", "nothing", "1", "+", "0", "65", "536", "few"]
    for name in list(FILES)[1:]:
        assert f"\n  {name:<14}" in said
    assert "Clipped: the plain gradient, clipped." in said
    assert "grey" not in table()
    made = choices.parts(["--source", "grey.py", "--intervention", "shift.py"])
    assert [flag.name for part in made for flag in part.flags if part.prefix == "shift"] == [
        f"shift.{field.name}" for field in dataclasses.fields(of_file("shift.py"))
    ]


# ------------------------------------------------------------------------------------------------ permission


def spy(name: str = "spy.py", text: str = SOURCE) -> Path:
    """A file that leaves a trace when it runs."""
    leave = f"with open({name + '.ran'!r}, 'a') as file:\n    file.write('x')\n"
    Path(name).write_text(f"{text}\n{leave}")
    return Path(name + ".ran")


@pytest.mark.parametrize(
    ("tree", "flag"),
    [
        ({"source": "spy.py"}, "--source spy.py"),
        ({"source": {"name": "./spy.py", "n": 3}}, "--source ./spy.py"),
        ({"intervention": "kdci+spy.py"}, "--intervention spy.py"),
        ({"criterion.name": "spy.py"}, "--criterion spy.py"),
        ({"update": "spy.py"}, "--update spy.py"),
        ({"replay": "spy.py", "update": "replay"}, "--replay spy.py"),
        ({"teacher": "spy.py:make"}, "--teacher spy.py:make"),
        ({"student.spec": "spy.py:make"}, "--student spy.py:make"),
        ({"data": {"foreign": "spy.py:make"}}, "--data.foreign spy.py:make"),
    ],
)
def test_a_path_in_a_config_does_not_run(here: Path, tree: dict[str, Any], flag: str) -> None:
    trace = spy()
    with pytest.raises(DodistillError) as error:
        resolve(tree)
    assert "run the code in " in str(error.value)
    assert "--allow-code" in str(error.value)
    assert f"({flag})" in str(error.value)
    with pytest.raises(DodistillError, match="allow it"):
        resolve(tree, allow_code=["grey.py"])
    assert not trace.exists()


def test_what_was_typed_runs_and_nothing_else(
    here: Path, teacher_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = spy()
    recipe = {**BASE, "teacher": str(teacher_file), "student": "tiny4", "source": {"name": "spy.py", "n": 12}}
    recipe["loop"] = {**BASE["loop"], "steps": 1}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    quiet = ["--quiet", "--no-report", "--out"]
    assert main(["distill", "recipe.yaml", *quiet, "a"]) == 2
    assert "run the code in spy.py" in capsys.readouterr().err
    assert main(["distill", "recipe.yaml", "--criterion", "cubed.py", *quiet, "a"]) == 2  # another path was typed
    assert not trace.exists()
    assert not Path("a").exists()
    assert main(["distill", "recipe.yaml", "--source", "fast", "--help"]) == 0
    assert not trace.exists()
    assert main(["distill", "recipe.yaml", "--source", f"{here}/spy.py", *quiet, "a"]) == 0
    assert trace.read_text() == "x"  # a file runs once for each text
    tree = json.loads(Path("a/config.json").read_text())
    assert tree["source"]["n"] == 12  # the recipe's settings: it is the same method
    Path("again.yaml").write_text(json.dumps(tree))  # a run's config is a recipe, and no more trusted than one
    assert main(["distill", "again.yaml", *quiet, "b"]) == 2
    assert main(["distill", "again.yaml", "--allow_code", *quiet, "b"]) == 0
    assert load_file("a/student.safetensors").keys() == load_file("b/student.safetensors").keys()


def test_a_recipe_may_not_bring_another_file_in(here: Path) -> None:
    """Neither by a preset of a method that was typed."""
    trace = spy("other.py", CRITERION)
    Path("grey.py").write_text(SOURCE.replace('"loop.ema": 0.5', '"criterion": "other.py"'))
    with pytest.raises(DodistillError, match=r"run the code in other\.py"):
        resolve({"source": "grey.py", "preset": "few"}, allow_code={"grey.py"})
    assert not trace.exists()
    assert resolve({"source": "grey.py", "preset": "few"}, allow_code=True).criterion.name == "other"


def test_a_config_with_a_fingerprint_runs_no_other_text(here: Path) -> None:
    tree = resolve({"source": "grey.py"}, allow_code=True).to_tree()
    assert resolve(tree, allow_code=True).to_tree() == tree
    trace = spy("grey.py", SOURCE)
    with pytest.raises(DodistillError) as error:
        resolve(tree, allow_code=True)
    new = plugins.fingerprint(Path("grey.py").read_bytes())
    for word in ("grey.py has changed", tree["source"]["code"][:12], new[:12]):
        assert word in str(error.value)
    assert not trace.exists()


# --------------------------------------------------------------------------------------------------- identity


def test_our_own_methods_are_recorded_as_ever() -> None:
    for source in registry.names("source"):
        tree = resolve({"source": source, "intervention": "kdci+stratified", "preset": "desk"}).to_tree()
        assert not code_in(tree)
        assert portable(tree) == tree
        assert "code" not in json.dumps(list(tree.values())).replace("coder", "")


def test_the_key_follows_the_text_and_not_the_path(here: Path) -> None:
    def key(name: str) -> str:
        return resolve({"source": name, "intervention": "shift.py"}, allow_code=True).key()

    first = key("grey.py")
    Path("deep").mkdir()
    shutil.copy("grey.py", "deep/grey.py")
    assert key("./grey.py") == key("deep/grey.py") == key(f"{here}/grey.py") == first
    Path("deep/grey.py").write_text(SOURCE + "\n")
    assert key("deep/grey.py") != first
    Path("shift.py").write_text(ACT.replace("roll(1, 1)", "roll(2, 1)"))
    assert key("grey.py") != first


def test_two_files_of_one_name_do_not_meet(here: Path) -> None:
    for folder, n in (("a", 3), ("b", 4)):
        Path(folder).mkdir()
        Path(folder, "grey.py").write_text(SOURCE.replace("n: int = 20", f"n: int = {n}"))
        Path(folder, "shift.py").write_text(ACT)
    one, two = (resolve({"source": f"{f}/grey.py"}, allow_code=True) for f in "ab")
    assert (one.source.n, two.source.n) == (3, 4)
    assert type(one.source) is type(resolve({"source": "a/grey.py"}, allow_code=True).source)
    assert one == resolve({"source": "a/grey.py"}, allow_code=True)
    merged = resolve({"source": {"name": "a/grey.py", "n": 9}}, {"source": "b/grey.py"}, allow_code=True)
    assert merged.source.n == 4  # another file is another choice
    with pytest.raises(DodistillError, match="names one twice"):
        resolve({"intervention": "a/shift.py+b/shift.py"}, allow_code=True)


def test_a_folder_goes_on_with_the_method_it_began_with(here: Path, teacher: nn.Module) -> None:
    out = "run"
    began = run(teacher, out, source="grey.py", allow_code=True)
    code = json.loads(Path(out, "config.json").read_text())["source"]["code"]
    Path("moved").mkdir()
    shutil.move("grey.py", "moved/grey.py")
    assert run(teacher, out, source="moved/grey.py", allow_code=True).summary == began.summary
    Path("moved/grey.py").write_text(SOURCE.replace("0.05", "0.06"))
    new = plugins.fingerprint(Path("moved/grey.py").read_bytes())
    with pytest.raises(DodistillError) as error:
        run(teacher, out, source="moved/grey.py", allow_code=True)
    for word in ("run folder run", "moved/grey.py", "has changed", code[:12], new[:12], "choose another --out"):
        assert word in str(error.value)
    with pytest.raises(DodistillError, match="belongs to another config"):
        run(teacher, out, source="fast")
    RunFolder("free", resolve({"source": "moved/grey.py"}, allow_code=True)).close()


def test_a_finished_folder_opens_without_its_code(here: Path, teacher_file: Path) -> None:
    trace = spy("grey.py", SOURCE)
    flags = ["--teacher", str(teacher_file), "--student", "tiny4", "--source", "grey.py", "--augment.pad", "1",
             "--intervention", "shift.py", "--steps", "2", "--batch", "8", "--quiet"]  # fmt: skip
    assert main(["distill", *flags, "--out", "run"]) == 0
    assert main(["distill", *flags, "--seed", "1", "--out", "other"]) == 0
    for file in (*FILES, "grey.py.ran"):
        os.unlink(file)
    page = Path("run/report.html")
    page.unlink()
    assert main(["report", "run"]) == 0
    assert page.exists()
    assert main(["evaluate", "run/student.safetensors", "--test", "digits"]) == 0
    assert main(["export", "run", "images"]) == 0
    assert main(["look", "run", "other", "--test", "digits", "--n", "60"]) == 0
    assert Path("look.html").exists()
    assert not trace.exists()


def test_look_runs_a_teachers_file_only_if_it_was_typed(here: Path) -> None:
    Path("run").mkdir()
    Path("run/student.safetensors").touch()
    Path("run/config.json").write_text(json.dumps(resolve({"teacher": "net.py:make"}, allow_code=True).to_tree()))
    trace = spy("net.py", "def make(): ...")
    with pytest.raises(DodistillError, match=r"run asks to run net\.py:make; code is run only when you name it"):
        look(["run"], "digits", "look.html")
    assert not trace.exists()


# ------------------------------------------------------------------------------------------------ comparison


def test_rows_in_a_comparison(here: Path, teacher_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {**BASE, "teacher": str(teacher_file), "student": "tiny4", "data": {"test": "digits"}}
    tree = {
        "name": "g", "base": merge(base, {"loop": {"steps": 2}}),
        "grid": {"source": ["grey.py", "deep/grey.py"], "arm": {"plain": {}, "shift": {"intervention": "shift.py"}}},
    }  # fmt: skip
    Path("deep").mkdir()
    Path("deep/grey.py").write_text(SOURCE.replace("0.05", "0.2"))
    Path("g.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    assert main(["compare", "g.yaml", "--out", "out"]) == 2
    assert "run the code in grey.py" in capsys.readouterr().err
    only = ["--only", "source=deep/grey.py", "--only", "arm=shift", "--out", "out"]
    assert main(["compare", "g.yaml", "--allow-code", *only]) == 0
    said = capsys.readouterr()
    assert "1 of 1 cells" in said.out
    assert "FAILED" not in said.err
    found = list(grid.cells(grid.read_recipe(Path("g.yaml")), Path("out/teachers"), allow_code=True))
    assert [c.label["source"] for c in found] == ["grey.py"] * 2 + ["deep/grey.py"] * 2
    assert len({c.key for c in found}) == 4
    (cell,) = Path("out/cells").glob("*.json")
    assert cell.stem == found[3].key
    record = json.loads(cell.read_text())
    assert record["summary"]["log"]["shift/by"] == 0.5
    assert record["summary"]["log"]["source/level"] == pytest.approx(0.2)
    assert "grey" in Path("out/compare.html").read_text()
    known = grid.stored(Path("out"))
    assert [grid.find(c, known) is not None for c in found] == [False, False, False, True]

    shutil.move("deep/grey.py", "grey.py")  # a cell by content: where the file lies does not matter
    shutil.rmtree("deep")
    tree["grid"]["source"] = ["grey.py"]
    Path("g.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    (moved,) = [c for c in grid.cells(tree, Path("out/teachers"), True) if c.label["arm"] == "shift"]
    assert grid.find(moved, known) == record
    del record["config"]["source"]["n"]  # a setting that came later, at its default
    cell.write_text(json.dumps(record))
    assert grid.find(moved, grid.stored(Path("out"))) == record
    Path("grey.py").write_text(SOURCE)
    (edited,) = [c for c in grid.cells(tree, Path("out/teachers"), True) if c.label["arm"] == "shift"]
    assert grid.find(edited, known) is None


def test_a_teacher_of_a_recipe_is_code_too(here: Path) -> None:
    trace = spy("net.py", "def make(): ...")
    recipe = {"teachers": {"t": {"model": "net.py:make", "data": "digits"}}}
    with pytest.raises(DodistillError, match=r"run the code in net\.py"):
        grid.teach_missing(recipe, here / "teachers", float("inf"))
    assert not trace.exists()


# --------------------------------------------------------------------------------------------- entry points


def package(site: Path, name: str, points: dict[str, str], modules: dict[str, str]) -> None:
    """An installed package, as `pip` leaves it: its modules beside its dist-info."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("".join(f"[{group}]\n{lines}\n" for group, lines in points.items()))
    for path, text in modules.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)


@pytest.fixture
def site(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = here / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_a_package_offers_methods_on_every_axis(site: Path, teacher: nn.Module) -> None:
    groups = dict(zip(registry.AXES, ("grey", "shift", "cubed", "clipped", "last")))
    points = {f"dodistill.{registry.AXES[axis]}": f"{name} = five_axes.{name}" for axis, name in groups.items()}
    package(site, "five-axes", points, {f"five_axes/{name}": text for name, text in FILES.items()})
    for axis, name in groups.items():
        assert registry.known(axis)[-1] == name
        assert name not in registry.names(axis)
    assert "five_axes" not in sys.modules  # found, and not imported
    with pytest.raises(DodistillError, match="did you mean 'grey'"):
        resolve({"source": "gray"})
    assert "five_axes" not in sys.modules
    out = run(teacher, "run", **groups, shift={"by": 0.25}, preset="few")
    tree = json.loads(Path("run/config.json").read_text())
    assert (tree["source"]["name"], tree["source"]["n"], tree["intervention"]) == ("grey", 12, "shift")
    assert tree["shift"] == {"code": plugins.fingerprint(ACT.encode()), "by": 0.25}
    assert out.summary["log"]["shift/by"] == 0.25
    assert resolve(tree).key() == out.summary["key"]  # an installed package needs no leave
    same = {axis: f"{name}.py" for axis, name in groups.items()}
    assert resolve(tree, same, allow_code=True).key() == out.summary["key"]  # the same text
    said = table()
    assert "\ngrey " in said
    assert all(f"\n  {name:<14}" in said for name in list(groups.values())[1:])
    assert resolve({"intervention": "kdci", "shift": {"by": 2}}).intervention == "kdci"  # a setting not in use


def test_what_is_wrong_with_an_entry_point(site: Path, teacher: nn.Module) -> None:
    group = "dodistill.criteria"
    package(
        site, "bad-one",
        {group: "kl = bad_one.cubed\nbroken = bad_one.broken\nempty = bad_one.empty\nother = bad_one.cubed\n"
                "direct = bad_one.cubed:Config\ntwice = bad_one.twice"},
        {"bad_one/cubed.py": CRITERION, "bad_one/broken.py": "1 / 0", "bad_one/empty.py": "", "bad_one/twice.py": ""},
    )  # fmt: skip
    package(site, "bad-two", {group: "twice = bad_two"}, {"bad_two.py": CRITERION})
    said = {
        "broken": "bad_one.broken does not import: ZeroDivisionError: division by zero",
        "empty": "it must name a module that has a class Config; see docs/tutorial.md",
        "other": "the entry point is called 'other', and its Config.name is 'cubed'",
        "direct": "its entry point is bad_one.cubed:Config; it must name a module",
        "twice": "criterion twice of bad-one 1.0 and bad-two 1.0: several packages offer this name",
    }
    for name, text in said.items():
        with pytest.raises(DodistillError) as error:
            resolve({"criterion": name})
        assert text in str(error.value), name
    said["kl"] = "criterion kl is dodistill's own. bad-one 1.0 offers another kl, which cannot be chosen: rename"
    listing = " ".join(table().split())
    assert all(text in listing for text in said.values())
    out = run(teacher, None, source="procedural", **{"source.n": 20, "source.candidates": 30})
    assert said["kl"] in out.summary["warnings"][0]
    assert not resolve({"criterion": "l1"}).clashes


# ----------------------------------------------------------------------------------------------------- errors


def change(old: str, new: str, text: str = SOURCE) -> str:
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("mine.py", None, "there is no file mine.py (looked for from "),
        ("mine", None, "unknown source 'mine'"),
        ("no/mine", None, "there is no file no/mine"),
        (".", None, "unknown source '.'"),
        ("./", None, "./ cannot be read: Is a directory"),
        ("mine.py", "x = (\n", "mine.py, line 1: '(' was never closed"),
        ("mine.py", "x = 1\ny == = 2", "mine.py, line 2: invalid syntax"),
        ("mine.py", "x = 1\n\nimport nothing_of_this_name", "mine.py, line 3: ModuleNotFoundError: No module named"),
        ("mine.py", "from .shared.base import Source", "mine.py, line 1: a file of its own has no neighbours"),
        ("mine.py", "def f():\n    1 / 0\nf()", "mine.py, line 2: ZeroDivisionError: division by zero"),
        ("mine.py", "x = 1\n\0", "mine.py, line "),
        ("mine.py", "x = 1", "mine.py has no class Config; see docs/tutorial.md."),
        ("mine.py", "Config = 3", "mine.py has no class Config"),
        ("mine.py", "class Config: ...", "mine.py: Config does not derive from SourceConfig; write `class Config("),
        ("mine.py", CRITERION, "mine.py: Config is a choice on axis criterion, not source; give it by --criterion."),
        ("mine.py", change("@dataclass(frozen=True)", ""), "mine.py: Config is not a dataclass; put @dataclass("),
        ("mine.py", change("(frozen=True)", ""), "mine.py, line 7: TypeError: cannot inherit non-frozen"),
        ("mine.py", change("def build(", "def built("), "Config has no method `build(self, context) -> Source`"),
        ("mine.py", change('kind = "generator"', ""), "mine.py: Config.kind is None; it must be one of generator, inv"),
        ("mine.py", change('kind = "generator"', 'kind = "gan"'), "mine.py: Config.kind is 'gan'"),
        ("mine.py", change("n: int = 20", "n: int"), "non-default argument 'n' follows default argument"),
        ("mine.py", change("n: int = 20", "n: Int = 20"),
         "mine.py, line 10: NameError: name 'Int' is not defined"),
        ("mine.py", change("n: int = 20", "code: int = 20"), "mine.py: Config.code is a key of the config itself"),
        ("mine.py", change("n: int = 20", "n: object = torch.float32"), "mine.py: settings are numbers, text"),
        ("mine.py", change('"optim": {"lr": 0.02}', '"optim": {"rl": 0.02}'),
         "mine.py: preset 'few' does not resolve: optim: unknown key 'rl'"),
        ("mine.py", change('"source": {"n": 12}', '"source": {"m": 12}'),
         "mine.py: preset 'few' does not resolve: source: unknown key 'm'"),
        ("mine.py", change('"source": {"n": 12}', '"source": {"name": "mine", "n": 12}'),
         "mine.py: preset 'few' does not resolve: its source has a name; leave it out"),
        ("mine.py", change('{"few":', '{"few": 3, "many":'), "mine.py: Config.presets must be a mapping"),
        ("mine.py", change('kind = "generator"', 'kind = "generator"\n    needs = frozenset({"gpu"})'),
         "mine.py: Config.needs is {'gpu'}"),
        ("mine.py", change('kind = "generator"', 'kind = "generator"\n    name = "grey"'),
         "mine.py: Config.name is 'grey', and the file is called 'mine'; leave `name` out."),
        ("fast.py", SOURCE, "fast.py: fast is a choice of dodistill on axis source; choose another name."),
        ("my-own.py", SOURCE, "my-own.py: a method's name is part of flags and folders, and 'my-own' cannot be"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file(here: Path, teacher_file: Path, name: str, text: str | None, said: str,
                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    if text is not None:
        Path(name).write_text(text)
    before = set(sys.modules)
    command = ["distill", "--teacher", str(teacher_file), "--student", "tiny4", "--source", name, "--out", "run"]
    status = main(command)
    error = capsys.readouterr().err
    assert said in error
    assert status == 2
    assert not Path("run").exists()
    if text is not None and ", line " in said:  # what does not import leaves nothing
        assert not [m for m in set(sys.modules) - before if m.startswith("dodistill_file")]


@pytest.mark.parametrize(
    ("axis", "text", "said"),
    [
        ("intervention", ACT, "Config has no method `build(self, context) -> Intervention`"),
        ("criterion", CRITERION, "Config has no method `build(self, context) -> Criterion`"),
        ("update", UPDATE, "Config has no method `build(self) -> Update`"),
        ("replay", REPLAY, "Config has no method `build(self, context) -> Replay`"),
    ],
)
def test_every_axis_wants_a_build(here: Path, axis: str, text: str, said: str) -> None:
    Path("mine.py").write_text(change("def build(", "def built(", text))
    with pytest.raises(DodistillError) as error:
        resolve({axis: "mine.py"}, allow_code=True)
    assert f"mine.py: {said}" in str(error.value)


@pytest.mark.parametrize(
    ("axis", "text", "old", "new", "said"),
    [
        ("source", SOURCE, "return Grey(self, context)", "...", "Config.build must return Source, not NoneType"),
        ("source", SOURCE, "return Acquired((", "return ((", "mine: acquire returned Tensor; it must return Acquired"),
        ("source", SOURCE, "*self.context.image_shape", "3, 4, 4", "shape (20, 3, 4, 4); they must be [n, 1, 8, 8]"),
        ("intervention", ACT, "return Shift(self.by)", "return 1", "Config.build must return Intervention, not int"),
        ("criterion", CRITERION, "return Cubed(self.power)", "...", "Config.build must return Criterion, not NoneType"),
        ("update", UPDATE, "return Clipped(self.most)", "...", "Config.build must return Update, not NoneType"),
        ("replay", REPLAY, "return Last(self, context)", "...", "Config.build must return Replay, not NoneType"),
    ],
)  # fmt: skip
def test_what_is_built_is_checked(
    here: Path, teacher: nn.Module, axis: str, text: str, old: str, new: str, said: str
) -> None:
    Path("mine.py").write_text(change(old, new, text))
    more = {
        "update": {"update": "mine.py", "replay": "last.py"},
        "replay": {"update": "clipped.py", "replay": "mine.py"},
    }
    with pytest.raises(DodistillError) as error:
        run(teacher, "run", allow_code=True, **{"source": "grey.py", axis: "mine.py", **more.get(axis, {})})
    assert "mine: " in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["loop", "source", "preset", "kdci"])
def test_an_intervention_is_not_called_like_a_part_of_the_config(here: Path, name: str) -> None:
    Path(f"{name}.py").write_text(ACT)
    with pytest.raises(DodistillError, match=f"{name}.py: {name} is a "):
        resolve({"intervention": f"{name}.py"}, allow_code=True)


def test_types_that_cannot_be_read(here: Path) -> None:
    Path("mine.py").write_text("from __future__ import annotations\n" + change("n: int = 20", "n: Int = 20"))
    with pytest.raises(DodistillError, match=r"mine\.py: the types of Config's fields cannot be read \(name 'Int'"):
        resolve({"source": "mine.py"}, allow_code=True)


def test_an_object_of_another_session_is_named(here: Path) -> None:
    tree = resolve({"criterion": MyCriterion()}).to_tree()
    with pytest.raises(DodistillError, match="criterion MyCriterion is not part of dodistill: install the package"):
        resolve(tree)
    assert resolve(tree, {"criterion": MyCriterion(3.0)}).criterion == MyCriterion(3.0)
    with pytest.raises(DodistillError, match="criterion kl is part of dodistill and has no file of its own"):
        resolve({"criterion": {"name": "kl", "code": "0" * 64}})


def test_a_class_without_a_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(CRITERION, space)  # as at an interactive prompt, where nothing is a file
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "nowhere.py", raising=False)
    d = resolve({"criterion": space["Config"]})
    assert d.to_tree()["criterion"] == {"name": "Config", "code": plugins.UNKNOWN, "power": 3.0}


def test_names() -> None:
    class Plain(UpdateConfig):
        def build(self) -> Update: ...

    class Named(ReplayConfig):
        name: ClassVar[str] = "other"

        def build(self, context: Any) -> Replay: ...

    class Config(InterventionConfig):
        def build(self, context: Any) -> Intervention: ...

    assert (Plain.name, Named.name, Config.name) == ("Plain", "other", __name__)
    assert fast.Config.name == "fast"
    assert [plugins.label(n) for n in ("fast", "a/b.py", "./c.py")] == ["fast", "b", "c"]
    assert plugins.tidy("./x/../m.py") == "m.py"


def test_config_is_as_light_as_before() -> None:
    code = "import sys; from dodistill.config import registry, plugins, tree; registry.known('source'); " \
           "print([m for m in ('torch', 'numpy') if m in sys.modules])"  # fmt: skip
    from test_packaging import python

    assert python(textwrap.dedent(code)) == "[]"
