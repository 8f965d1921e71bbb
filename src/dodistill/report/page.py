"""Fills the templates of the package. Every page that dodistill writes is one file and loads nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..errors import DodistillError
from ..files import replacing
from . import format as fmt
from .canvas import DARK, LIGHT, Plot


def render(template: str, path: Path, **values: object) -> Path:
    """Fill a template of the package (autoescaped) and write it atomically."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.globals.update(count=fmt.count, duration=fmt.duration, number=fmt.number, percent=fmt.percent)
    env.globals.update(sentence=fmt.sentence, row_id=id)
    env.globals.update(light=LIGHT, dark=DARK)
    page = env.get_template(template).render(**values)
    _make_folder(path)
    with replacing(path, several=True) as file:
        file.write(page.encode())
    return path


def write_figures(page: Path, plots: Iterable[Plot | None]) -> list[Path]:
    """Each plot of a page as `figures/PAGE-NAME.pdf` beside the page, for papers. Returns the paths."""
    written: dict[Path, Plot] = {}
    for plot in plots:
        if plot is None or plot.figure is None:
            continue
        name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", f"{page.stem}-{plot.name}").strip("-")
        path = page.parent / "figures" / f"{name}.pdf"
        for n in range(2, len(written) + 3):
            if path not in written:
                break
            path = path.with_name(f"{name}-{n}.pdf")
        _make_folder(path)
        with replacing(path, several=True) as file:
            file.write(plot.pdf())
        written[path] = plot
    return list(written)


def _make_folder(path: Path) -> None:
    """Make the folder for a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DodistillError(f"cannot write {path}: {error.strerror}; choose another path.") from error
