"""`dodistill report`."""

from __future__ import annotations

from dataclasses import dataclass

from ..report.report import write_report


@dataclass(frozen=True)
class Arguments:
    """Write report.html of a run folder again."""

    run: str  #: a run folder


def run(arguments: Arguments) -> int:
    print(write_report(arguments.run))
    return 0
