"""The tutorial's blocks, run as they stand: docs/tutorial.md."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dodistill.commands.cli import main
from helpers import metrics

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"


def blocks(text: str) -> list[tuple[str, str, str]]:
    """(mark, language, text) of each fenced block; the mark is the comment above it."""
    return re.findall(r"(?:^<!-- (.*?) -->\n)?^```(\w+)\n(.*?)^```$", text, re.M | re.S)


def commands(block: str) -> list[tuple[list[str], str]]:
    """(arguments after `dodistill`, the output that the page shows) of each command in a console block."""
    out = []
    for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
        line, _, shown = part.replace("\\\n", " ").partition("\n")
        program, *arguments = shlex.split(line)
        assert program == "dodistill"
        out.append((arguments, " ".join(shown.split())))
    return out


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files, the package of its entry point, and what its commands leave."""
    folder = tmp_path_factory.mktemp("tutorial")
    every = blocks(PAGE.read_text())
    for mark, _, text in every:
        if mark.startswith("file: "):
            (folder / mark.removeprefix("file: ")).write_text(text)
    site = folder / "site"
    (site / "my_methods").mkdir(parents=True)
    (site / "my_methods" / "__init__.py").touch()
    (site / "my_methods" / "dream.py").write_text((folder / "dream.py").read_text())
    (project,) = [tomllib.loads(text)["project"] for _, language, text in every if language == "toml"]
    info = site / "my_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"[{g}]\n" + "\n".join(f"{k} = {v}" for k, v in e.items()) for g, e in project["entry-points"].items()]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def here(page: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(page)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.syspath_prepend(str(page))
    monkeypatch.syspath_prepend(str(page / "site"))
    return page


def test_the_source_is_short(page: Path) -> None:
    assert len((page / "dream.py").read_text().splitlines()) < 60


def test_every_block_runs(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ran = 0
    for mark, language, text in blocks(PAGE.read_text()):
        if language == "console":
            for arguments, shown in commands(text):
                refused = shown.startswith("dodistill: ")
                status = main(arguments)
                captured = capfd.readouterr()
                said = " ".join((captured.out + captured.err).split())
                assert status == (2 if refused else 0), f"{arguments}: {said}"
                assert shown in said
                assert ran == 0 or "Error" not in said
                ran += 1
        elif mark == "run":
            exec(compile(text, "tutorial", "exec"), {})
            ran += 1
        else:
            assert mark.startswith("file: ") or language == "toml", f"this block is not run: {text}"
    assert ran == 10
    runs = here / "runs"
    named = {p.name: json.loads((p / "config.json").read_text())["source"] for p in runs.iterdir() if p.name != "grid"}
    assert {k: v["name"] for k, v in named.items()} == {
        "dream": "dream.py", "recipe": "dream.py", "typed": "dream.py", "python": "dream", "package": "dream",
    }  # fmt: skip
    assert len({v["code"] for v in named.values()}) == 1  # one text in all places
    assert {k: v["K"] for k, v in named.items()} == {"dream": 5, "recipe": 5, "typed": 5, "python": 5, "package": 20}
    weights = [load_file(runs / name / "student.safetensors") for name in ("dream", "recipe", "typed")]
    for other in weights[1:]:
        assert all(torch.equal(v, other[k]) for k, v in weights[0].items())
    for name in named:
        assert "code outside dodistill" in (runs / name / "README.md").read_text()
        assert "source.code" in (runs / name / "report.html").read_text()
    (cell,) = (runs / "grid" / "cells").glob("*.json")
    record: dict[str, Any] = json.loads(cell.read_text())
    assert record["label"] == {"seed": "0", "source": "dream"}
    assert record["config"]["source"] == named["dream"]


def test_a_stopped_run_of_it_ends_in_the_same_bits(here: Path, teacher_file: Path) -> None:
    command = [
        "distill", "--teacher", str(teacher_file), "--student", "tiny4", "--source", "dream.py", "--preset", "digits",
        "--source.K", "3", "--source.every", "3", "--steps", "10", "--batch", "16", "--threads", "1", "--quiet",
        "--loop.log_every", "2", "--no-report", "--out",
    ]  # fmt: skip
    assert main([*command, "runs/whole"]) == 0
    for _ in range(30):
        status = main([*command, "runs/parts", "--max-seconds", "0"])
        if status == 0:
            break
        assert status == 75
    assert status == 0
    whole, parts = Path("runs/whole"), Path("runs/parts")
    a, b = (torch.load(f / "checkpoint.pt", weights_only=True)["acquirer"]["source"]["seen"] for f in (whole, parts))
    assert a.sum() > 0
    assert torch.equal(a, b)
    a, b = (load_file(f / "student.safetensors") for f in (whole, parts))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert metrics(whole) == metrics(parts)
