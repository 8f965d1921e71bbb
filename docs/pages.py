"""Pages of the site that are made from other files: no text exists twice. They lie in docs/made, which git ignores.

Links of Markdown files point to files of the repository; `linked` turns them into links between pages.
"""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import dodistill
from dodistill.commands.cli import COMMANDS
from dodistill.config import flags, outline, registry
from dodistill.config.tree import PLAIN

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
MADE = DOCS / "made"

#: Files outside docs/ that are whole pages: file -> page.
FILES = {
    "CHANGELOG.md": "changelog", "CONTRIBUTING.md": "contributing", "SECURITY.md": "security",
    "benchmarks/README.md": "benchmarks",
}  # fmt: skip
#: Sections of the README that are pages: heading -> (page, title). A section that is not there makes no page.
SECTIONS = {
    "Your own model": ("own_model", "Your own model"),
    "Ship it": ("deploy", "Deploy"),
    "For researchers": ("researchers", "The methods"),
    "What we found": ("found", "What we found"),
    "What is not there yet": ("missing", "What is not there yet"),
}
#: The sidebar. Names without a file are left out.
SIDEBAR = {
    "Begin": ["install", "quickstart", "made/own_model", "vit", "made/deploy", "track", "scale"],
    "Notebooks": ["notebooks/*"],
    "Methods": ["made/researchers", "tutorial", "methods/README"],
    "Method cards": ["methods/*"],
    "Results": ["made/found", "results", "short", "speed", "made/benchmarks", "trust", "made/missing"],
    "Reference": ["made/commands", "made/settings", "made/recipes", "made/api", "view"],
    "Project": ["architecture", "made/contributing", "made/security", "made/changelog"],
}


def write(docs: Path) -> None:
    """Write all made pages."""
    shutil.rmtree(MADE, ignore_errors=True)
    MADE.mkdir()
    made = {"settings": settings(), "commands": commands(), "recipes": recipes(), "api": api(), "extras": extras()}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    intro, *sections = re.split(r"^## ", readme, flags=re.M)
    for section in sections:
        heading, _, body = section.partition("\n")
        if heading in SECTIONS:
            page, title = SECTIONS[heading]
            made[page] = f"# {title}\n\n" + linked(body.replace("\n### ", "\n## "), ROOT, MADE)
    for file, page in FILES.items():
        if (ROOT / file).exists():
            path = ROOT / file
            made[page] = linked(path.read_text(encoding="utf-8"), path.parent, MADE)
    for page, text in made.items():
        (MADE / f"{page}.md").write_text(text, encoding="utf-8")
    (docs / "index.md").write_text(linked(intro, ROOT, DOCS) + "\n" + sidebar(docs), encoding="utf-8")


def sidebar(docs: Path) -> str:
    """The table of contents."""
    out, listed = [], set()
    for caption, names in SIDEBAR.items():
        found = []
        for name in names:
            for path in sorted(docs.glob(f"{name}.md")) + sorted(docs.glob(f"{name}.ipynb")):
                page = path.relative_to(docs).with_suffix("").as_posix()
                found += [page] if page not in listed else []
                listed.add(page)
        if found:
            out.append("\n".join(["```{toctree}", f":caption: {caption}", ":hidden:", "", *found, "```"]))
    return "\n\n".join(out) + "\n"


# ------------------------------------------------------------------------------------------------------- links


def page_of(file: Path) -> Path | None:
    """Where the page of a file of the repository lies; None if the site has no page of it."""
    name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else ""
    if name == "README.md":
        return DOCS / "index.md"
    if name.rstrip("/") == "recipes" or name.startswith("recipes/"):
        return MADE / "recipes.md"
    if name.rstrip("/") == "benchmarks":
        return MADE / "benchmarks.md"
    if name in FILES:
        return MADE / f"{FILES[name]}.md"
    return file if file.is_relative_to(DOCS) and file.is_file() else None


def linked(text: str, folder: Path, target: Path) -> str:
    """Text whose links start at `folder`, for a page in `target`. A link to a file without a page becomes its text."""

    def change(found: re.Match[str]) -> str:
        bang, label, link = found.groups()
        path, mark, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            return found[0]
        if not path:  # a section of the same file, which may be a page of its own
            pages = {heading.lower().replace(" ", "-"): page for heading, (page, _) in SECTIONS.items()}
            if folder != ROOT or anchor not in pages:
                return found[0]
            return f"[{label}]({_relative(MADE / f'{pages[anchor]}.md', target)})"
        page = page_of((folder / path).resolve())
        return f"{bang}[{label}]({_relative(page, target)}{mark}{anchor})" if page else label

    return re.sub(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", change, text)


def _relative(page: Path, folder: Path) -> str:
    return Path(os.path.relpath(page, folder)).as_posix()


def on_source(app: Any, name: str, source: list[str]) -> None:
    """Sphinx: the text of a page, before it is parsed."""
    path = DOCS / f"{name}.md"
    if path.exists() and MADE not in path.parents and name != "index":
        source[0] = linked(source[0], path.parent, path.parent)


def on_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx: a docstring, before it is parsed. Outside code, marks that reStructuredText would read are escaped."""
    parts = re.split(r"(`+[^`]*`+)", "\n".join(lines))
    parts[::2] = [re.sub(r"(?<=\w)_(?!\w)|(?<!\\)[*|](?=\w)", lambda m: "\\" + m[0], text) for text in parts[::2]]
    parts[2::2] = [re.sub(r"^(?=\w)", r"\\ ", text) for text in parts[2::2]]  # `Watcher`s
    lines[:] = "".join(parts).split("\n")


# -------------------------------------------------------------------------------------------------- references


def _rows(part: flags.Part) -> Iterator[str]:
    for flag in part.flags:
        name = flag.name if not part.prefix or flag.name.startswith(f"{part.prefix}.") else f"{part.prefix}.{flag.name}"
        values = " or ".join(flag.choices) if flag.type is not bool else ""
        meaning = ". ".join(text for text in (flag.help, f"One of {values}" if values else "") if text)
        default = "required" if flag.default is flags.REQUIRED else flags.shown(flag.default)
        if not part.prefix and not flag.word:
            name = "--" + name.replace("_", "-")
        cells = (f"`{name}`", f"`{default}`" if default else "", meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _table(part: flags.Part) -> str:
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *_rows(part)])


def settings() -> str:
    """Every setting of a run, with its default and its comment."""
    out = [
        "# Settings", "A setting `part.name` is the flag `--part.name`, the key `name` of `part` in a recipe, and "
        "`distill(..., part={\"name\": value})` in Python. A preset changes defaults; `dodistill methods` lists them.",
        "## Of every run",
    ]  # fmt: skip
    for name, cls in {
        **PLAIN,
        "dictionary": outline.read("interventions.shared.dictionary", "DictionaryConfig"),
    }.items():
        out += [f"### `{name}`", _about(cls), _table(flags.part(cls, name))]
    for axis in registry.AXES:
        out.append(f"## {axis}")
        for name in registry.names(axis):
            cls = outline.choice(axis, name)
            part = flags.part(cls, name if axis == "intervention" else axis)
            out += [f"### {axis} `{name}`", _table(part) if part.flags else "No settings."]
    return "\n\n".join(out) + "\n"


def _about(cls: type) -> str:
    text = (cls.__doc__ or "").strip()
    return "" if text.startswith(f"{cls.__name__}(") else text.partition("\n\n")[0].replace("\n", " ")


def commands() -> str:
    """Every command with its own flags."""
    out = ["# Commands", "`dodistill COMMAND --help` shows the same in the terminal. `distill` also takes every "
           "[setting](settings.md) as a flag."]  # fmt: skip
    for name in COMMANDS:
        cls = outline.read(f"commands.{name}", "Arguments")
        part = flags.part(cls)
        about = re.sub(r"^    ", "", cls.__doc__.strip(), flags=re.M)
        out += [f"## `dodistill {name}`", re.sub(r"^examples:\n((?:  .*\n?)+)", _example, about, flags=re.M)]
        out += [_table(part).replace("| setting |", "| flag |")] if part.flags else []
    return "\n\n".join(out) + "\n"


def _example(found: re.Match[str]) -> str:
    return "```console\n" + re.sub(r"^  (?=dodistill)", "$ ", found[1], flags=re.M) + "```\n"


def recipes() -> str:
    """Every recipe with its description, its command and its text."""
    out = ["# Recipes", "`dodistill compare RECIPE.yaml` runs a grid with equal teacher, steps and seeds in every arm."]
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        out += [f"## {path.stem}", str(tree["about"]).strip()]
        out.append(f"```console\n$ dodistill compare recipes/{path.name} --out results/{path.stem}\n```")
        out.append(f"```{{literalinclude}} ../../recipes/{path.name}\n:language: yaml\n```")
    return "\n\n".join(out) + "\n"


def extras() -> str:
    """The optional dependencies, with their comments in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    known = tomllib.loads(text)["project"]["optional-dependencies"]
    rows = ["| extra | packages | for |", "|---|---|---|"]
    for name, packages in known.items():
        comment = re.search(rf"^{name} = .*?#\s*(.*)$", text, re.M)
        if comment:
            rows.append(f"| `{name}` | {', '.join(packages)} | {comment[1]} |")
    return "\n".join(rows) + "\n"


def api() -> str:
    """The public names, from their docstrings."""
    out = ["# Python", "All public names are in `dodistill`. Each is imported on its first use."]
    groups = {
        "The main job": ["distill", "evaluate", "Result", "load_model", "save_model", "load_images", "teach",
                         "write_report", "resolve", "Normalized", "Teacher", "DodistillError"],
        "For methods of your own": [],
    }  # fmt: skip
    named = [n for names in groups.values() for n in names]
    groups["For methods of your own"] = [n for n in dodistill.__all__ if n not in named and n != "__version__"]
    for title, names in groups.items():
        out.append(f"## {title}")
        for name in names:
            kind = "autoclass" if isinstance(getattr(dodistill, name), type) else "autofunction"
            out.append(f"```{{eval-rst}}\n.. {kind}:: dodistill.{name}\n```")
    out.append("## Watchers\n\n```{eval-rst}\n.. autoclass:: dodistill.core.watch.Watcher\n```")
    return "\n\n".join(out) + "\n"
