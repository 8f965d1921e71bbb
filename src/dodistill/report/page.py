"""Templates of the package, filled and put in place: every page that dodistill writes is one offline file."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..errors import DodistillError
from ..files import replacing
from . import format as fmt


def render(template: str, path: Path, **values: object) -> Path:
    """Fill a template of the package (autoescaped) and put it in place in one move."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.globals.update(count=fmt.count, duration=fmt.duration, number=fmt.number, percent=fmt.percent)
    page = env.get_template(template).render(**values)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DodistillError(f"cannot write {path}: {error.strerror}; choose another place.") from error
    with replacing(path) as file:
        file.write(page.encode())
    return path
