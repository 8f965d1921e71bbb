"""The documentation site: it builds without a warning, shows every choice and asks nobody else; its first page runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dodistill
from browser import Browser, installed
from dodistill.commands.cli import COMMANDS, main
from dodistill.config import registry
from test_tutorial import blocks, commands

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import pages  # noqa: E402


def test_links_lead_to_pages() -> None:
    for text, wanted in (
        ("[a](docs/speed.md)", "[a](../speed.md)"), ("[b](recipes/mnist.yaml)", "[b](recipes.md)"),
        ("![c](docs/images/demo.png)", "![c](../images/demo.png)"), ("[d](src/x.py)", "d"),
        ("[e](#what-we-found)", "[e](found.md)"), ("[f](http://x.y)", "[f](http://x.y)"),
    ):  # fmt: skip
        assert pages.linked(text, ROOT, pages.MADE) == wanted
    assert pages.linked("[x](../README.md#a) [y](view.md)", DOCS, DOCS) == "[x](index.md#a) [y](view.md)"


def test_the_references_are_complete() -> None:
    recipes = pages.recipes()
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"## {path.stem}\n" in recipes
    settings = pages.settings()
    for axis in registry.AXES:
        for name in registry.names(axis):
            assert f"### {axis} `{name}`" in settings
    assert "| `loop.steps` | `2000` | matching steps of the student |" in settings
    assert "| `source.K` | `10` |" in settings
    shown = pages.commands()
    assert all(f"## `dodistill {name}`" in shown for name in COMMANDS)
    assert "`--track`" in shown
    api = pages.api()
    for name in dodistill.__all__:
        assert name == "__version__" or f":: dodistill.{name}\n" in api
    assert {"demo", "docs", "wandb"} <= set(re.findall(r"^\| `([a-z]+)` \|", pages.extras(), re.M))


def test_every_page_of_docs_is_in_the_sidebar() -> None:
    names = [name for group in pages.SIDEBAR.values() for name in group]
    for path in [*DOCS.glob("*.md"), *(DOCS / "methods").glob("*.md"), *(DOCS / "notebooks").glob("*.ipynb")]:
        page = path.relative_to(DOCS).with_suffix("")
        assert page.name == "index" or any(page.match(name) for name in names), page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("sphinx", "myst_nb", "furo", "sklearn"):
        pytest.importorskip(name, reason=f"{name} is not installed: the site was not built (pip install -e '.[docs]')")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-d", str(out / "trees"), "-b", "html"]
    done = subprocess.run([*command, str(DOCS), str(out / "html")], capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.mark.slow
def test_the_site_builds_without_warnings(site: Path) -> None:
    found = {p.relative_to(site).with_suffix("").as_posix() for p in site.rglob("*.html")}
    wanted = (
        "index install quickstart made/own_model track scale tutorial methods/fast results made/found speed trust "
        "made/settings made/recipes made/api architecture made/contributing made/changelog "
        "notebooks/student_without_data notebooks/own_method"
    )
    for name in wanted.split():
        assert name in found
    api = (site / "made/api.html").read_text(encoding="utf-8")
    assert "without the teacher" in api
    assert 'id="dodistill.distill"' in api
    for page in site.rglob("*.html"):  # offline: nothing is loaded from elsewhere
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//', text), page.name
        assert not re.search(r'<link[^>]*rel="(?:stylesheet|preload)"[^>]*href="(?:https?:)?//', text), page.name


@pytest.mark.slow
@pytest.mark.skipif(installed() is None, reason="no chromium or google-chrome on the PATH: the site was not opened")
def test_the_pages_fit_a_phone(site: Path, tmp_path: Path) -> None:
    program = installed()
    assert program is not None
    with Browser(program, tmp_path) as browser:
        for name in ("index", "methods/fast", "made/settings", "made/api", "notebooks/student_without_data"):
            for width in (1280, 400):
                browser.open(site / f"{name}.html", width)
                assert browser.complaints == []
                wide, window = browser.evaluate(
                    "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
                )
                assert wide <= window, f"{name} is {wide} pixels wide in a window of {width}"


@pytest.mark.slow
def test_the_ten_minutes_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    ran = []
    for _, language, text in blocks((DOCS / "quickstart.md").read_text(encoding="utf-8")):
        assert language == "console"
        for arguments, shown in commands(text):
            quick = ["--steps", "20"] if arguments[0] == "distill" else []
            arguments = (
                arguments[: arguments.index("--steps")] + arguments[arguments.index("--steps") + 2 :]
                if quick
                else arguments
            )
            assert main([*arguments, *quick]) == 0, capfd.readouterr().err
            assert shown in capfd.readouterr().out
            ran.append(arguments[0])
    assert ran == ["teach", "distill", "distill", "look", "rank", "evaluate", "export"]
    assert (tmp_path / "look.html").exists()
