"""A record knows the code of its methods: a reworded file is the same code, a changed one is marked, and runs again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dodistill.commands.compare import compare
from dodistill.config import code
from dodistill.config.code import changed, code_of, hash_of
from dodistill.config.tree import resolve
from dodistill.report.tables import markdown_table
from test_compare import recipe as recipe

TEXT = '''"""Doc."""
from math import pi

def area(r: float) -> float:
    """Of a disc."""
    return pi * r**2  # a comment
'''


def test_a_rewording_is_the_same_code() -> None:
    same = TEXT.replace("Of a disc.", "The area.").replace("  # a comment", "").replace("\n\n", "\n\n\n# more\n")
    assert hash_of(same) == hash_of(TEXT.replace("(r: float)", "(\n    r: float,\n)")) == hash_of(TEXT)
    for old, new in (("r**2", "r**3"), ("pi *", "3 *"), ("area", "disc"), ('"""Of a disc."""', "r += 0")):
        assert hash_of(TEXT.replace(old, new)) != hash_of(TEXT)
    assert hash_of("x = None") != hash_of("x = 0") != hash_of("x = False")
    assert hash_of("x = 'a'") != hash_of("x = 'b'")
    assert hash_of(TEXT) == "ea2436438729c2c6"  # of any version of Python


def test_each_choice_of_a_config_has_a_hash(here: Path) -> None:
    found = code_of(resolve({"source": "real", "intervention": "kdci+stratified"}))
    assert list(found) == [
        "source real", "criterion kl", "update plain", "replay none", "intervention kdci", "intervention stratified",
    ]  # fmt: skip
    assert all(len(value) == 16 for value in found.values())
    outside = resolve({"source": "grey.py"}, allow_code=True)
    assert code_of(outside)["source grey"] == outside.methods[0].code[:16]


def test_changed() -> None:
    now = {"source fast": "a", "criterion kl": "b"}
    assert changed({"code": {"source fast": "a", "criterion kl": "b"}}, now) == []
    assert changed({"code": {"source fast": "x", "criterion kl": "b"}}, now) == ["source fast"]
    assert changed({}, now) is changed({"code": {}}, now) is None


def test_the_table_marks_older_code() -> None:
    cells = [
        {"label": {"arm": arm, "seed": seed}, "last": 80.0, "changed": what}
        for arm, what in (("a", ["source fast"]), ("b", []), ("c", None))
        for seed in range(2)
    ]
    table = markdown_table(cells)
    assert [line.rpartition("|")[0].rpartition("|")[2].strip() for line in table.splitlines()[2:5]] == ["2 †", "2", "2"]
    assert "† 2 cells were run with older code of source fast; --rerun changed runs them again." in table
    assert "Code unknown: 2 cells" in table
    assert "†" not in markdown_table(cells[2:])
    assert "Code unknown" not in markdown_table(cells[:4])


def test_cells_of_older_code_are_done_marked_and_run_again_on_demand(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, tree = tmp_path / "out", yaml.safe_load(recipe.read_text())
    tree["grid"], tree["when"], tree["skip"], tree["published"] = {"seed": [0], "arm": {"plain": {}}}, [], [], []
    recipe.write_text(yaml.safe_dump(tree))
    assert compare(recipe, out) == 0
    (file,) = (out / "cells").glob("*.json")
    record = json.loads(file.read_text())
    assert set(record["code"]) == {"source real", "criterion kl", "update plain", "replay none"}
    assert (out / record["folder"] / "report.html").exists()
    assert "older code" not in capsys.readouterr().out

    record["code"]["source real"] = "0" * 16
    file.write_text(json.dumps(record))
    assert compare(recipe, out) == 0  # done
    said = capsys.readouterr().out
    assert "1 of 1 cells" in said
    assert "1 †" in said
    assert "older code of source real" in said
    assert "older code of source real" in (out / "compare.html").read_text()
    assert json.loads(file.read_text()) == record
    assert compare(recipe, out, dry_run=True, rerun="changed") == 0
    assert "changed  " in capsys.readouterr().out

    assert compare(recipe, out, rerun="changed") == 0
    said = capsys.readouterr().out
    assert "†" not in said
    new = json.loads(file.read_text())
    assert new["code"]["source real"] != "0" * 16
    assert new["folder"] != record["folder"]  # the old run is not overwritten
    assert (out / record["folder"] / "summary.json").exists()
    stamp = file.stat().st_mtime_ns
    assert compare(recipe, out, rerun="changed") == 0  # nothing is changed any more
    assert file.stat().st_mtime_ns == stamp

    del new["code"]  # a record from before
    file.write_text(json.dumps(new))
    assert compare(recipe, out, rerun="changed") == 0
    assert file.stat().st_mtime_ns != stamp
    assert "code" not in json.loads(file.read_text())
    assert "Code unknown: 1 cell" in capsys.readouterr().out
    assert code.ROOT.name == "dodistill"
