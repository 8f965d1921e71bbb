"""Code runs only where the user allowed it, and what is wrong with a method is said."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from safetensors.torch import load_file
from torch import nn

from dodistill import (
    Intervention,
    InterventionConfig,
    Replay,
    ReplayConfig,
    Update,
    UpdateConfig,
)
from dodistill.commands.cli import main
from dodistill.config import plugins
from dodistill.config.tree import resolve
from dodistill.errors import DodistillError
from dodistill.sources import fast
from plugged import ACT, BASE, CRITERION, REPLAY, SOURCE, UPDATE, MyCriterion, change, run, spy

# ------------------------------------------------------------------------------------------------ permission


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
    assert "names the code in " in str(error.value)
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
    assert "names the code in spy.py" in capsys.readouterr().err
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
    with pytest.raises(DodistillError, match=r"names the code in other\.py"):
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


# ----------------------------------------------------------------------------------------------------- errors


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
        ("mine.py", "from .shared.base import Source", "mine.py, line 1: a single file has no relative imports"),
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
        ("mine.py", change("n: int = 20", "code: int = 20"), "mine.py: Config.code is a reserved key of the config"),
        ("mine.py", change("n: int = 20", "n: object = torch.float32"), "mine.py: settings must be numbers, text"),
        ("mine.py", change('"optim": {"lr": 0.02}', '"optim": {"rl": 0.02}'),
         "mine.py: preset 'few' does not resolve: optim: unknown key 'rl'"),
        ("mine.py", change('"source": {"n": 12}', '"source": {"m": 12}'),
         "mine.py: preset 'few' does not resolve: source: unknown key 'm'"),
        ("mine.py", change('"source": {"n": 12}', '"source": {"name": "mine", "n": 12}'),
         "mine.py: preset 'few' does not resolve: it sets source.name; remove that key"),
        ("mine.py", change('{"few":', '{"few": 3, "many":'), "mine.py: Config.presets must be a mapping"),
        ("mine.py", change('kind = "generator"', 'kind = "generator"\n    needs = frozenset({"gpu"})'),
         "mine.py: Config.needs is {'gpu'}"),
        ("mine.py", change('kind = "generator"', 'kind = "generator"\n    name = "grey"'),
         "mine.py: Config.name is 'grey', but the file is called 'mine'; remove `name`."),
        ("fast.py", SOURCE, "fast.py: fast is a choice of dodistill on axis source; choose another name."),
        ("my-own.py", SOURCE, "my-own.py: the name 'my-own' cannot be part of flags and folders; use letters"),
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


GREY = "return Acquired((noise * 0.9 + self.level).clamp(0, 1))"


@pytest.mark.parametrize(
    ("axis", "text", "old", "new", "said"),
    [
        ("source", SOURCE, GREY, "return Acquired(2 * noise - 1)", "made images from -0.99"),
        ("source", SOURCE, GREY, "return Acquired(255 * noise)", "; they must lie in [0, 1]"),
        ("source", SOURCE, GREY, "return Acquired((255 * noise).long())", "made images of type int64; give uint8, or"),
        ("source", SOURCE, GREY, "return Acquired(noise.numpy())", "made images in a ndarray; give a torch.Tensor"),
        ("source", SOURCE, GREY, "return Acquired(noise[:1])", "an acquisition has 1 image(s); it needs at least 2"),
        ("source", SOURCE, GREY, "return Acquired(noise, torch.zeros(19, 10))",
         "logits that are a float32 tensor of shape (19, 10); they must be floats of shape (20, 10)"),
        ("source", SOURCE, GREY, "return Acquired(noise, None, torch.zeros(20))", "they must be int64 of shape (20,)"),
        ("source", SOURCE, GREY, "return Acquired(noise, None, torch.full((20,), 99))",
         "labels from 99 to 99; the teacher has classes 0 to 9"),
        ("source", SOURCE, "self.level.clone()", "0.5", "source mine, terms: the term 'level' is a float; it must be"),
        ("criterion", CRITERION, '{"cubed": ((s - t).abs() ** self.power).mean() / 100}', "(s - t).abs().mean()",
         "returned a float32 tensor of shape ()"),
        ("criterion", CRITERION, ".mean() / 100", ".mean(1)", "the term 'cubed' is a float32 tensor of shape (8,)"),
        ("criterion", CRITERION, ".mean() / 100", ".mean().item()", "the term 'cubed' is a float; it must be"),
        ("criterion", CRITERION, ".mean() / 100", ".mean().detach()", "returned terms without a gradient"),
        ("criterion", CRITERION, '{"cubed": ((s - t).abs() ** self.power).mean() / 100}', "{}", "returned no terms"),
        ("intervention", ACT, "return s + self.by * s.detach().roll(1, 1)", "...", "compensate returned a NoneType"),
        ("intervention", ACT, "s + self.by", "s[:, :5] + self.by * s[:, :5] #", "compensate returned a float32 tensor"),
        ("intervention", ACT, "s.new_tensor(self.by)", "self.by", "mine, log: the term 'shift/by' is a float"),
        ("intervention", ACT, "def log(", "def weights(self, pool, d): return -s_(len(pool))\n\n    def log(",
         "intervention shift: weights go down to -1; they must be at least 0"),
        ("intervention", ACT, "def log(", "def weights(self, pool, d): return s_(len(pool) - 1)\n\n    def log(",
         "intervention shift: weights have shape ("),
        ("update", UPDATE, "return {k: v.detach() for k, v in terms.items()}", "...", "backward returned a NoneType"),
        ("update", UPDATE, "torch.stack(list(terms.values())).sum().backward()", "return terms",
         "update mine: backward gave the student no gradient"),
    ],
)  # fmt: skip
def test_what_methods_return_is_checked(
    here: Path, teacher: nn.Module, axis: str, text: str, old: str, new: str, said: str
) -> None:
    text = change(old, new, text).replace("from dataclasses", "from torch import ones as s_\nfrom dataclasses", 1)
    Path("mine.py").write_text(text)
    more = {"replay": "last.py"} if axis == "update" else {}
    with pytest.raises(DodistillError) as error:
        run(teacher, "run", allow_code=True, **{"source": "grey.py", axis: "mine.py", **more})
    assert said in str(error.value)


def test_an_error_in_the_users_own_code_names_its_line(
    here: Path, teacher_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text(change("self.level += 0.05", "self.levle += 0.05"))
    line = Path("mine.py").read_text().splitlines().index("        self.levle += 0.05") + 1
    words = ["distill", "--teacher", str(teacher_file), "--student", "tiny4", "--source", "mine.py", "--out", "run"]
    assert main([*words, "--steps", "2", "--batch", "8", "--quiet", "--augment.pad", "1"]) == 1
    said = capsys.readouterr().err
    assert f"mine.py, line {line}: AttributeError: 'Grey' object has no attribute 'levle'" in said
    assert "please report" not in said


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
