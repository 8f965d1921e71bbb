"""Methods from a file or an object have what our own have: runs, identity, comparisons."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import plugged
from dodistill.commands.cli import main
from dodistill.commands.compare import teach_missing
from dodistill.commands.look import look
from dodistill.config import choices, grid, plugins, registry
from dodistill.config.methods import table
from dodistill.config.tree import code_in, merge, portable, resolve
from dodistill.core.deadline import Deadline
from dodistill.engine.run_folder import RunFolder
from dodistill.errors import DodistillError
from dodistill.models import load_model, save_model
from dodistill.sources import fast, procedural
from helpers import metrics
from plugged import ACT, ALL, BASE, FILES, SOURCE, MyCriterion, Weighted, of_file, run, spy

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
        "name": "MyCriterion", "code": plugins.fingerprint(Path(plugged.__file__).read_bytes()), "weight": 2.0,
    }  # fmt: skip
    with pytest.raises(DodistillError, match="weight is 'x'; it must be of type float"):
        resolve({"criterion": MyCriterion("x")})  # type: ignore[arg-type]
    with pytest.raises(DodistillError, match="MyCriterion is a choice on axis criterion, not update"):
        resolve({"update": MyCriterion()})
    with pytest.raises(DodistillError, match=r"a mapping of name and settings, or a config"):
        resolve({"criterion": Weighted(1.0)})
    act = of_file("shift.py")
    assert resolve({"intervention": act(by=2.0), "shift.by": 3.0}).interventions == (act(by=3.0),)
    with pytest.raises(DodistillError, match="has a name twice"):
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
    with pytest.raises(DodistillError, match="has a name twice"):
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
    save_model(load_model("tiny4", num_classes=10, in_channels=1), "run/student.safetensors")
    Path("run/config.json").write_text(json.dumps(resolve({"teacher": "net.py:make"}, allow_code=True).to_tree()))
    trace = spy("net.py", "def make(): ...")
    with pytest.raises(DodistillError, match=r"runs name code, net\.py:make; code runs only if you name it"):
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
    assert "names the code in grey.py" in capsys.readouterr().err
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
    assert [known.find(c) is not None for c in found] == [False, False, False, True]

    shutil.move("deep/grey.py", "grey.py")  # a cell by content: where the file lies does not matter
    shutil.rmtree("deep")
    tree["grid"]["source"] = ["grey.py"]
    Path("g.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    (moved,) = [c for c in grid.cells(tree, Path("out/teachers"), True) if c.label["arm"] == "shift"]
    assert known.find(moved) == record
    del record["config"]["source"]["n"]  # a setting that came later, at its default
    cell.write_text(json.dumps(record))
    assert grid.stored(Path("out")).find(moved) == record
    Path("grey.py").write_text(SOURCE)
    (edited,) = [c for c in grid.cells(tree, Path("out/teachers"), True) if c.label["arm"] == "shift"]
    assert known.find(edited) is None


def test_a_teacher_of_a_recipe_is_code_too(here: Path) -> None:
    trace = spy("net.py", "def make(): ...")
    recipe = {"teachers": {"t": {"model": "net.py:make", "data": "digits"}}}
    with pytest.raises(DodistillError, match=r"names the code in net\.py"):
        teach_missing(recipe, here / "teachers", Deadline())
    assert not trace.exists()
