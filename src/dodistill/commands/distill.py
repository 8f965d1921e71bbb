"""`dodistill distill`: one run from the command line. The flags for its settings are in config/choices.py."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..api import choose_source, distill_config, require_one_length, shell_command, time_in
from ..config.choices import read_recipe
from ..config.methods import asks
from ..config.plugins import paths
from ..config.tree import expand, merge, resolve
from ..core.deadline import Deadline, stopping
from ..core.launch import joined
from ..core.ranks import Ranks
from ..errors import STOPPED, DodistillError, at_least
from ..report.format import duration, sentence


@dataclass(frozen=True)
class Arguments:
    """Distil a teacher into a student.

    examples:
      dodistill distill --teacher teacher.safetensors --student wrn16_1 --source fast --preset wrn --out runs/a
      dodistill distill --teacher wrn40_2 --teacher.weights t.pth --teacher.normalise cifar10 --image-shape 3,32,32 \\
          --student wrn16_1 --source dfnd --unlabeled folder/ --intervention kdci+stratified --out runs/b

    Every setting is a flag, --part.field VALUE, and - and _ are the same in its name. With --source, --preset,
    --intervention or a recipe before --help, the help lists the settings of these choices, with their values.

    Rerun the command to resume a run that was stopped.
    """

    recipe: Annotated[str, "[RECIPE.yaml]"] = ""  #: a file of settings, as the first argument; flags override it
    out: Annotated[str, "FOLDER"] = ""  #: the run folder; empty: a folder in runs/ named after the settings
    quiet: bool = False  #: show no progress; the notes and warnings follow at the end
    no_report: bool = False  #: write no report.html
    track: Annotated[str, "NAMES"] = ""  #: log to tensorboard, wandb, trackio, or several, joined by commas
    max_seconds: float = math.inf  #: stop cleanly after this many seconds; rerun the command to resume. See --time
    allow_code: bool = False  #: allow code files that the recipe, or a file of weights, names to run; those named by a
    #: flag always may


def run(arguments: Arguments, settings: Mapping[str, Any], words: Sequence[str], start: float) -> int:
    """`settings` are those that the command line gives, `words` the command line itself, `start` when it began."""
    if arguments.recipe and arguments.recipe != words[0]:
        raise DodistillError(
            f"unexpected argument {arguments.recipe!r}; give a recipe first, and settings as --part.field VALUE."
        )
    at_least(0, "distill", ", as in 600", max_seconds=arguments.max_seconds)
    deadline = Deadline(start + arguments.max_seconds)
    with stopping(deadline), joined(leave=True) as ranks:
        return _run(arguments, settings, words, start, deadline, ranks)


def _run(
    arguments: Arguments, settings: Mapping[str, Any], words: Sequence[str], start: float, deadline: Deadline,
    ranks: Ranks,
) -> int:  # fmt: skip
    out = arguments.out
    typed = expand(settings)
    require_one_length(typed)
    allowed = arguments.allow_code or paths(typed)
    tree, choice = merge(expand(read_recipe(arguments.recipe)), typed), None
    if asks(tree):
        auto, seconds = tree, min(arguments.max_seconds, time_in(tree))
        tree, choice = ranks.share(lambda: choose_source(auto, seconds, arguments.out or None, allowed))
    config = resolve(tree, allow_code=allowed)
    out = out or f"runs/{config.source.name}-{config.intervention}-{config.key()}"
    result = distill_config(
        config, out, verbose=not arguments.quiet, deadline=deadline, command=shell_command(["distill", *words]),
        report=not arguments.no_report, choice=choice, allow_code=allowed, began=start, track=arguments.track,
        ranks=ranks,
    )  # fmt: skip
    reached = result.summary
    if not ranks.first:
        return 0 if reached.get("finished") else STOPPED
    if not reached.get("finished"):
        where = f"stopped at step {reached['step']} of {reached['steps']}"
        if reached["stopped"]:
            where += (
                f", {reached['stopped']}, which begins anew at the next start. If it stops there again, give a longer"
            )
            where += " --max-seconds, or --time for a student within that time"
        print(f"{where}; rerun the command to resume.", file=sys.stderr)
        return STOPPED
    _say(result.summary, Path(out))
    if arguments.quiet:  # no progress display has shown them
        for text in result.summary.get("warnings") or []:
            print(f"note: {text}", file=sys.stderr)
    return 0


def _say(summary: dict[str, Any], out: Path) -> None:
    if "choice" in summary:
        print(summary["choice"])
    print(f"student    {summary['student_parameters']:,} parameters (teacher {summary['teacher_parameters']:,})")
    print(
        f"agreement  {summary['agreement']:.2f} % with the teacher on held-back inputs ({summary['delivered']} weights)"
    )
    if "student_accuracy" in summary:
        print(f"accuracy   {summary['student_accuracy']:.2f} % last step, teacher {summary['teacher_accuracy']:.2f} %")
    else:
        print(f"accuracy   not known without labelled images; to compare students: dodistill rank {out} OTHER")
    for spec, accuracy in (summary.get("probe") or {}).items():
        print(f"probe      {accuracy:.2f} % on {spec}, by a linear classifier on the frozen features")
    if "replay_memory_mb" in summary:
        print(f"replay     {summary['replay_memory_mb']:.2f} MB in memory and in each checkpoint")
    if "time" in summary:
        print(f"time       {duration(summary['time']['used'])} of {duration(summary['time']['limit'])}")
        print(summary["time"]["more"])
    print(f"weights    {out / 'student.safetensors'}")
    if (out / "report.html").exists():
        print(f"report     {out / 'report.html'}")
    if "verdict" in summary:
        found = summary["verdict"]
        print(
            f"\n{found['distance']}\nLikely cause: {found['cause']}. {sentence(found['evidence'])}\n{found['remedy']}"
        )
        if found["command"] or found["settings"]:
            print(f"  {found['command']}" if found["command"] else f"  In Python: {found['settings']}.")
