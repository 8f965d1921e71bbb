"""`dodistill methods`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..config.methods import pages, table
from ..errors import DodistillError


@dataclass(frozen=True)
class Arguments:
    """List the sources: what they need, train, keep and cost; and the other axes."""

    files: Annotated[tuple[str, ...], "[FILE.py ...]"] = ()  #: also the methods in these files, which are executed
    cards: Annotated[str, "FOLDER"] = ""  #: update the generated tables in this folder of cards (docs/methods)


def run(arguments: Arguments) -> int:
    if not arguments.cards:
        print(table(arguments.files))
        return 0
    cards = Path(arguments.cards)
    if not cards.is_dir():
        raise DodistillError(f"--cards {cards}: no such folder; give the folder of the method cards, docs/methods.")
    for path, text in list(pages(cards)):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path)
    return 0
