"""What a release consists of: the wheel, CI's commands, the changelog and the citation."""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import dodistill

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CI: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------ the wheel


def test_the_wheel_has_what_the_package_needs_and_runs(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling is not installed: no wheel was built")
    build = (
        f"import os; os.chdir({str(ROOT)!r}); from hatchling import build; print(build.build_wheel({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", build], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "site")
    source = ROOT / "src"
    wanted = {
        p.relative_to(source).as_posix()
        for p in (source / "dodistill").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert wanted <= names
    assert {"dodistill/py.typed", "dodistill/report/templates/report.html.j2"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith("dodistill") for name in names)  # no tests, no results
    code = "import sys; from dodistill.commands.cli import main; sys.exit(main(['methods']))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "procedural" in ran.stdout


def test_the_readme_says_how_to_install_without_cuda() -> None:
    line = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
    assert line in (ROOT / "README.md").read_text(encoding="utf-8")
    assert line in (ROOT / "docs/install.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ CI


def steps() -> list[dict[str, Any]]:
    return [step for job in CI["jobs"].values() for step in job["steps"]]


def test_every_command_of_ci_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    packages = {re.split(r"[>=<\[ ]", p)[0] for extra in PROJECT["optional-dependencies"].values() for p in extra}
    programs = set(PROJECT["scripts"])
    found = 0
    for step in steps():
        for command in step.get("run", "").splitlines():
            words = command.split()
            found += 1
            if words[0] == "make":
                assert words[1] in targets, command
            elif words[:2] == ["python", "-m"]:
                assert words[2] in {"pip", *packages}, command
            else:
                assert words[0] in programs, command
            for word in words:
                for name in re.findall(r"\.\[([a-z,]+)\]", word):
                    assert set(name.split(",")) <= set(PROJECT["optional-dependencies"]), command
                if word.startswith("tests/"):
                    assert (ROOT / word).is_file(), command
            if words[0] == "dodistill":
                assert (ROOT / f"src/dodistill/commands/{words[1]}.py").is_file()
    assert found >= 10
    used = re.findall(r"\$\(BIN\)/([a-z-]+)", makefile)
    assert {"sphinx-build", "python", "ruff", "mypy", "dodistill"} == set(used)
    modules = {m for m in re.findall(r"-m ([a-z]+)", makefile) if m not in ("pip", "venv")}
    assert modules <= packages


def test_ci_covers_what_pyproject_promises() -> None:
    assert CI["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == ">=3.11"
    (oldest,) = [p.removeprefix("torch>=") for p in PROJECT["dependencies"] if p.startswith("torch>=")]
    pinned = [m for step in steps() for m in re.findall(r"torch==([\d.]+)", step.get("run", ""))]
    assert [p.rpartition(".")[0] for p in pinned] == [oldest]
    assert set(CI["jobs"]["other-systems"]["strategy"]["matrix"]["system"]) == {"windows-latest", "macos-latest"}
    runs = [step.get("run", "") for step in steps()]
    for wanted in ("make test", "make docs", "make notebooks", "make wheel"):
        assert any(run.startswith(wanted) for run in runs)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"sphinx-build -W .*docs build/docs", makefile)


def test_what_is_checked_out_has_versions() -> None:
    uses = [step["uses"] for step in steps() if "uses" in step]
    assert uses
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", use) for use in uses)


# --------------------------------------------------------------------------------------- changelog, citation, versions


def test_the_changelog_keeps_the_format() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## (.*)$", text, re.M)
    assert heads[0] == "[Unreleased]"
    for head in heads[1:]:
        found = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", head)
        assert found, head
        datetime.date.fromisoformat(found[2])
    assert f"[{dodistill.__version__}]" in heads[1]
    kinds = set(re.findall(r"^### (.*)$", text, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


#: The keys of schema 1.2.0 at the top, and those that it requires.
_KEYS = {
    "abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords",
    "license", "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact",
    "repository-code", "title", "type", "url", "version",
}  # fmt: skip
_REQUIRED = {"authors", "cff-version", "message", "title"}


def test_the_citation_is_valid() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert set(found) <= _KEYS
    assert set(found) >= _REQUIRED
    assert found["cff-version"] == "1.2.0"
    assert found["type"] in ("software", "dataset")
    assert all("name" in a or {"family-names", "given-names"} & set(a) for a in found["authors"])
    assert all(isinstance(found[key], str) and found[key] for key in ("message", "title", "abstract", "date-released"))
    assert len(set(found["keywords"])) == len(found["keywords"])
    datetime.date.fromisoformat(found["date-released"])
    assert found["license"] == PROJECT["license"]


def test_one_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    assert dodistill.__version__ == PROJECT["version"] == cited
