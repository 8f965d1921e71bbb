"""Grids: cells by content, nothing twice, budgets, tables."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from dodistill.commands.cli import main
from dodistill.commands.compare import compare, seconds_of, teach_missing
from dodistill.config import grid
from dodistill.config.grid import Cell, Records, cells, read_recipe, stored, weights_of
from dodistill.core.deadline import Deadline
from dodistill.engine.run_folder import RunFolder, check_writable
from dodistill.errors import DodistillError
from dodistill.files import replacing
from dodistill.report.compare_page import write_compare


@pytest.fixture
def recipe(tmp_path: Path, teacher_file: Path) -> Path:
    out = tmp_path / "out"
    (out / "teachers").mkdir(parents=True)
    shutil.copy(teacher_file, out / "teachers" / "t.safetensors")
    tree = {
        "name": "small",
        "base": {
            "teacher": "{teachers}/t.safetensors", "student": "tiny4", "source": {"name": "real", "n": 120},
            "data": {"unlabeled": "digits", "test": "digits"}, "augment": {"pad": 1, "flip": False},
            "dictionary.clusters": 4, "loop": {"steps": 4, "batch": 16},
        },
        "grid": {"seed": [0, 1], "arm": {"plain": {}, "kdci": {"intervention": "kdci"}}},
        "when": [{"where": {"arm": "kdci", "seed": 1}, "then": {"kdci.scale": 2.0}}],
        "skip": [{"arm": "plain", "seed": 1}],
        "published": [{"where": {"arm": "kdci"}, "value": 89.62}],
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_cells_in_order_with_rules(recipe: Path, tmp_path: Path) -> None:
    found = list(cells(read_recipe(recipe), tmp_path / "out" / "teachers"))
    assert [c.label for c in found] == [
        {"seed": "0", "arm": "plain"},
        {"seed": "0", "arm": "kdci"},
        {"seed": "1", "arm": "kdci"},
    ]
    assert [c.config.loop.seed for c in found] == [0, 0, 1]
    assert [c.published for c in found] == [None, 89.62, 89.62]
    assert [c.config.interventions[0].scale for c in found[1:]] == [1.0, 2.0]
    assert len({c.key for c in found}) == 3


def test_a_key_follows_the_content_of_the_weights(recipe: Path, tmp_path: Path) -> None:
    teachers = tmp_path / "out" / "teachers"
    before = [c.key for c in cells(read_recipe(recipe), teachers)]
    moved = tmp_path / "elsewhere"
    shutil.copytree(teachers, moved)
    assert [c.key for c in cells(read_recipe(recipe), moved)] == before
    data = bytearray((moved / "t.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "t.safetensors").write_bytes(bytes(data))
    assert not set(before) & {c.key for c in cells(read_recipe(recipe), moved)}


def test_a_key_follows_the_text_of_a_models_file(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not its path: a file that moved is the same student, an edited one another, also to a finished cell."""
    tree, out = yaml.safe_load(recipe.read_text()), tmp_path / "out"
    monkeypatch.chdir(tmp_path)

    def first(student: str) -> Cell:
        tree["base"]["student"] = student
        return next(cells(tree, out / "teachers", allow_code=True))

    Path("net.py").write_text("def make(): ...")
    cell = first("net.py:make")
    made = {"key": cell.key, "config": cell.config.to_tree(), "weights": weights_of(cell.config)}
    Path("deep").mkdir()
    shutil.copy("net.py", "deep/net.py")
    assert first("deep/net.py:make").key == first("./net.py:make").key == cell.key != first("net.py:other").key
    assert Records([made], out / "teachers").find(first("deep/net.py:make")) == made
    Path("net.py").write_text("def make(): return 'another'")
    assert first("net.py:make").key != cell.key
    assert Records([made], out / "teachers").find(first("net.py:make")) is None
    assert first("none.py:make").key != first("nothing.py:make").key


def test_a_run_folders_name_has_room_for_its_key(recipe: Path, tmp_path: Path) -> None:
    """Also where labels are paths; two that begin alike have two folders. Shorter names are as ever."""
    tree = yaml.safe_load(recipe.read_text())
    del tree["when"], tree["skip"], tree["published"]
    tree["grid"] = {"seed": [0], "arm": {"a" * 300: {}, "a" * 301: {"intervention": "kdci"}, "plain, short": {}}}
    *long, short = cells(tree, tmp_path / "out" / "teachers")
    assert len({cell.slug for cell in long}) == 2
    for cell in long:
        assert len(cell.slug) < 170
        assert cell.slug.endswith(cell.key)
    assert short.slug == f"0-plain_short-{short.key}"


def test_images_of_one_name_are_not_one_cell(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key has the last name of their path alone: a recipe that reads both is refused, a record of the other named."""
    out, (cats, xrays) = tmp_path / "out", (tmp_path / name / "train" for name in ("cats", "xrays"))
    tree = yaml.safe_load(recipe.read_text())
    tree["grid"] = {}
    for part in ("when", "skip", "published"):
        del tree[part]
    for field in ("unlabeled", "test"):
        tree["grid"]["images"] = {p.parent.name: {f"data.{field}": str(p)} for p in (cats, xrays)}
        with pytest.raises(DodistillError, match=rf"read {cats} and {xrays} as data.{field}.*rename one of the two"):
            list(cells(tree, out / "teachers"))
    tree["grid"]["images"]["xrays"]["data.test"] = f"{cats}/../train"  # another spelling of one path
    assert len({c.key for c in cells(tree, out / "teachers")}) == 1

    tree["grid"]["images"] = {"cats": {"data.unlabeled": str(cats)}}
    (cell,) = cells(tree, out / "teachers")
    (out / "cells").mkdir()
    (out / "cells" / "x.json").write_text(json.dumps({"key": "x", "config": cell.config.to_tree(), "last": 90.0}))
    tree["grid"]["images"]["cats"]["data.unlabeled"] = str(xrays)
    recipe.write_text(yaml.safe_dump(tree))
    xrays.mkdir(parents=True)
    assert compare(recipe, out, dry_run=True) == 0
    assert capsys.readouterr().err == ""  # they may have moved
    cats.mkdir(parents=True)
    assert compare(recipe, out, dry_run=True) == 0
    said = capsys.readouterr()
    assert said.out.startswith("done")
    assert f"1 finished cell was made with {cats} as data.unlabeled, and the recipe now names {xrays}" in said.err


def test_runs_once_resumes_and_prints_the_table(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert compare(recipe, out, budget="0s") == 75  # nothing fits; nothing breaks
    assert not list((out / "cells").glob("*.json"))
    first = next(cells(read_recipe(recipe), out / "teachers"))
    other = RunFolder(out / "runs" / first.slug, first.config)  # as if a second `compare` were at this cell
    assert compare(recipe, out, jobs=2) == 75
    captured = capsys.readouterr()
    assert "used by another process" in captured.err
    assert "FAILED" not in captured.err
    assert "2 of 3 cells" in captured.out
    other.close()
    assert compare(recipe, out, jobs=2) == 0
    captured = capsys.readouterr()
    assert "3 of 3 cells" in captured.out
    assert "89.62" in captured.out
    files = sorted((out / "cells").glob("*.json"))
    assert len(files) == 3
    record = json.loads(files[0].read_text())
    assert record["config"]["teacher"]["spec"] == "{teachers}/t.safetensors"
    assert 0 <= record["last"] <= record["best"] <= 100
    assert not list(out.rglob("checkpoint.pt"))
    assert not list(out.rglob("pool-*.pt"))
    assert len(list(out.rglob("sample.safetensors"))) == 3

    stamps = [f.stat().st_mtime_ns for f in files]
    assert compare(recipe, out) == 0
    assert [f.stat().st_mtime_ns for f in files] == stamps
    files[0].unlink()
    capsys.readouterr()
    assert compare(recipe, out, table=True) == 75
    assert "2 of 3 cells" in capsys.readouterr().out


def test_a_teacher_is_taught_by_one_process(
    tmp_path: Path, teacher_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where another process teaches it, the grid waits for what comes of that, or for the end of its budget."""
    recipe = {"teachers": {"t": {"model": "tiny4", "data": "digits", "epochs": 1, "flip": "false", "pad": 1}}}
    target = tmp_path / "t.safetensors"
    code = (
        "import shutil, sys, time\nfrom pathlib import Path\nfrom dodistill.files import claimed\n"
        "with claimed(Path(sys.argv[1]), 't'):\n"
        "    print('mine', flush=True); time.sleep(3); shutil.copy(sys.argv[2], sys.argv[3])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / ".t.lock"), str(teacher_file), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mine\n"
        assert not teach_missing(recipe, tmp_path, Deadline(time.monotonic() + 0.5))
        assert f"{target} is in use by another process" in capfd.readouterr().err
        assert teach_missing(recipe, tmp_path, Deadline())
    assert target.read_bytes() == teacher_file.read_bytes()


def test_two_grids_that_end_together_both_write_their_page(tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    with replacing(page, several=True) as file:
        other = threading.Thread(target=write_compare, args=([], page), kwargs={"pdf": False})
        other.start()
        other.join()
        assert "<html" in page.read_text()
        file.write(b"last")
    assert page.read_text() == "last"
    assert [p.name for p in tmp_path.iterdir()] == ["compare.html"]


def test_two_grids_that_begin_together_do_not_refuse_their_folder(tmp_path: Path) -> None:
    """Each tries to write its page and removes what it wrote; none is in the way of another."""

    def ask(_: int) -> None:
        for _ in range(200):
            check_writable(tmp_path / "compare.html")

    with ThreadPoolExecutor(4) as several:
        list(several.map(ask, range(4)))
    assert not list(tmp_path.iterdir())


def test_only_the_teachers_of_the_cells_to_run_are_taught(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of an arm that --only leaves out, nor one that no cell names, nor one that is there."""
    tree = yaml.safe_load(recipe.read_text())
    how = {"model": "tiny4", "data": "digits", "epochs": 1, "flip": False, "pad": 1}
    tree["teachers"] = dict.fromkeys(("t", "other", "unused"), how)
    tree["grid"]["arm"]["other"] = {"teacher": "{teachers}/other.safetensors"}
    recipe.write_text(yaml.safe_dump(tree, sort_keys=False))
    taught: list[list[str]] = []

    def teach(recipe: dict[str, Any], folder: Path, *_: Any) -> bool:
        taught.append(list(recipe["teachers"]))
        return False

    monkeypatch.setattr("dodistill.commands.compare.teach_missing", teach)
    assert compare(recipe, tmp_path / "out", only=["arm=other"]) == 75
    assert compare(recipe, tmp_path / "out", only=["arm=plain"], dry_run=True) == 0
    assert compare(recipe, tmp_path / "out", only=["arm=plain"]) == 75
    assert taught == [["other"], []]


def test_a_teacher_that_was_taught_otherwise_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cells would be those of the old weights, beside the new recipe. Where nothing runs, it is said."""
    out, tree = tmp_path / "out", yaml.safe_load(recipe.read_text())
    words = ["--data", "digits", "--epochs", "1", "--flip", "false", "--pad", "1"]
    (out / "teachers" / "t.safetensors").unlink()
    assert main(["teach", "tiny4", *words, "--out", str(out / "teachers" / "t.safetensors")]) == 0
    how = {"model": "tiny4", "data": "digits", "epochs": 1, "flip": False, "pad": 1, "test": "digits"}

    def asked(**other: Any) -> None:
        recipe.write_text(yaml.safe_dump(tree | {"teachers": {"t": how | other, "untaught": how}}, sort_keys=False))
        assert compare(recipe, out, budget="0s") == 75

    asked(lr=1e-1, data="./digits")  # as it was
    capsys.readouterr()
    with pytest.raises(
        DodistillError, match=r"taught with epochs 1, and the recipe's teachers\.t now says epochs 200\."
    ):
        asked(epochs=200)
    assert compare(recipe, out, table=True) == 75
    assert "now says epochs 200. Restore the recipe, delete the file to teach it again" in capsys.readouterr().err


def test_a_label_may_have_commas(recipe: Path, tmp_path: Path) -> None:
    """As in --against "arm=plain, at length,seed=7": a comma begins the next axis only where one follows."""
    tree = yaml.safe_load(recipe.read_text())
    tree["grid"]["arm"] = {"plain, at length": {}, "kdci": {"intervention": "kdci"}}
    recipe.write_text(yaml.safe_dump(tree, sort_keys=False))
    said = {}
    for against in ("arm=plain, at length", "arm=plain, at length,seed=7", "arm=plain, at last"):
        try:
            compare(recipe, tmp_path / "out", table=True, against=against)
            said[against] = "fine"
        except DodistillError as error:
            said[against] = str(error)
    assert said["arm=plain, at length"] == "fine"
    assert "no cell has seed=7" in said["arm=plain, at length,seed=7"]
    assert "no cell has arm=plain, at last" in said["arm=plain, at last"]


def test_a_setting_that_came_later_does_not_throw_results_away(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (cell,) = [c for c in cells(read_recipe(recipe), out / "teachers") if c.label == {"seed": "0", "arm": "kdci"}]
    config = cell.config.to_tree()
    old = json.loads(json.dumps(config).replace(str(out / "teachers"), "{teachers}"))
    del old["kdci"]["detach_query"], old["pool"]["holdout"]

    def remember(tree: dict[str, object]) -> Records:
        (out / "cells").mkdir(exist_ok=True)
        (out / "cells" / "x.json").write_text(json.dumps({"key": "x", "config": tree, "seconds": 1.0}))
        return stored(out)

    assert remember(old).find(cell) is not None
    changed = dataclasses.replace(cell.config, pool=dataclasses.replace(cell.config.pool, holdout=0.1))
    assert (
        remember(old).find(dataclasses.replace(cell, config=changed)) is None
    )  # the newer setting is not at its default
    old["loop"]["batch"] = 17
    assert remember(old).find(cell) is None
    gone = json.loads(json.dumps(config).replace(str(out / "teachers"), "{teachers}"))
    gone["kdci"]["a_setting_since_removed"] = 1
    assert remember(gone).find(cell) is None


def test_planning_resolves_and_hashes_once_for_each_cell(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each pair of a cell and a record; also where all records are of an older version."""
    tree = yaml.safe_load(recipe.read_text())
    tree["grid"]["seed"] = list(range(20))
    recipe.write_text(yaml.safe_dump(tree, sort_keys=False))
    out = tmp_path / "out"
    (out / "cells").mkdir()
    for cell in cells(read_recipe(recipe), out / "teachers"):
        config = cell.config.to_tree()
        del config["pool"]["holdout"]
        record = {"key": cell.key, "config": config, "seconds": 1.0}  # without a hash of its weights
        (out / "cells" / f"{cell.key}.json").write_text(json.dumps(record))
    calls = dict.fromkeys(("resolve", "identity", "_digest"), 0)
    read = []

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(grid, name)

        def call(*given: Any, **named: Any) -> Any:
            calls[name] += 1
            return function(*given, **named)

        return call

    for name in calls:
        monkeypatch.setattr(grid, name, counted(name))
    whole = grid._content.__wrapped__
    monkeypatch.setattr(grid, "_content", cache(lambda *given: read.append(given) or whole(*given)))
    chosen = list(cells(read_recipe(recipe), out / "teachers"))
    known = stored(out)
    assert [known.find(cell)["key"] for cell in chosen] == [cell.key for cell in chosen]
    assert len(chosen) == len(known) == 39
    assert calls["resolve"] <= 39 + 2  # and the defaults of the two arms
    assert calls["identity"] <= 39 + 39 + 2
    assert calls["_digest"] <= 3 * 39
    assert len(read) == 1  # one file of weights


@pytest.mark.parametrize(
    "name",
    [
        "mnist",
        "skew",
        "methods",
        "cifar10_sources",
        "cid",
        "lra",
        "planted",
        "skew_cifar10",
        "table1_small",
        "vit",
        "view",
        "views",
        "half_million",
        "hour_search",
    ],
)
def test_the_committed_results_are_those_of_the_committed_recipes(name: str) -> None:
    """docs/results.md says that `--table` prints its tables from results/, without data."""
    root = Path(__file__).parents[1]
    known = stored(root / "results" / name)
    found = [
        known.find(c)
        for c in cells(read_recipe(root / "recipes" / f"{name}.yaml"), root / "results" / name / "teachers")
    ]
    assert sum(record is not None for record in found) == len(known) > 10


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"only": ["arm=plian"]}, "no cell has arm=plian; the values are plain, kdci"),
        ({"only": ["seed=1", "arm=plain"]}, "--only seed=1 --only arm=plain leaves no cell"),
        ({"against": "bogus=plain"}, "no cell has bogus=plain; write AXIS=LABEL, with one of the axes seed, arm"),
        ({"against": "arm=kdci", "only": ["arm=plain"]}, "no cell has arm=kdci; the values are plain"),
    ],
)
def test_a_label_of_no_cell_is_refused_before_anything_runs_or_is_written(
    recipe: Path, tmp_path: Path, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(DodistillError, match=re.escape(said)):
        compare(recipe, tmp_path / "out", csv=str(tmp_path / "t.csv"), **asked)
    assert not (tmp_path / "t.csv").exists()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["teachers"]


def test_a_logged_value_of_no_finished_cell_is_named(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that some arms alone log has a column."""
    out = tmp_path / "out"
    (out / "cells").mkdir()
    for cell, log in zip(cells(read_recipe(recipe), out / "teachers"), ({"match/kl": 0.5}, {"kdci/F": 2.0})):
        record = {"key": cell.key, "config": cell.config.to_tree(), "agreement": 50.0, "summary": {"log": log}}
        (out / "cells" / f"{cell.key}.json").write_text(json.dumps(record))
    compare(recipe, out, table=True, show=["match/kll", "kdci/F"], csv=str(tmp_path / "t.csv"))
    printed, said = capsys.readouterr()
    assert "--show match/kll has no column" in said
    assert "did you mean 'match/kl'?" in said
    assert "kdci/F" in printed
    assert "match/kll" not in printed + (tmp_path / "t.csv").read_text()


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("25m", 1500), ("1.5h", 5400), ("7", 7)])
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


def test_mistakes_are_named(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(DodistillError, match="budget is 'soon'; it must be a duration"):
        compare(recipe, tmp_path / "out", budget="soon")
    with pytest.raises(DodistillError, match="AXIS=LABEL"):
        compare(recipe, tmp_path / "out", only=["sead=0"])
    tree = yaml.safe_load(recipe.read_text())
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(tree | {"gird": {}}))
    with pytest.raises(DodistillError, match="did you mean 'grid'"):
        read_recipe(bad)
    tree["grid"]["arm"]["kdci"] = {"kdci.sclae": 1}
    bad.write_text(yaml.safe_dump(tree))
    with pytest.raises(DodistillError, match="did you mean 'scale'"):
        list(cells(read_recipe(bad), tmp_path))
    for seeds in ([0, 1, 1], [1, "1"]):
        bad.write_text(yaml.safe_dump(tree | {"grid": {"seed": seeds}}))
        with pytest.raises(DodistillError, match=r"grid\.seed has the label '1' twice, and would count its runs twice"):
            read_recipe(bad)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_that_ships_resolves(path: Path, tmp_path: Path) -> None:
    found = list(cells(read_recipe(path), tmp_path))
    assert len({c.key for c in found}) == len(found) > 5
