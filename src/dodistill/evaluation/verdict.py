"""Why a student is far below its teacher, as far as the run recorded it, and what to run next.

Pure functions of summary, config and curves. The causes are tried in this order, and the first that holds is named:

    the teacher        it is at chance on the test images itself
    collapsed source   the newest inputs have few classes, or are nearly equal (`collapse.symptoms`)
    rare classes       classes with a tiny share of the student's inputs
    too few images     the student agrees with the teacher where it trained, and less on held-back inputs
    too few steps      there were hardly any, or the curve still rises at the end (with one evaluation: the loss falls)
    foreign inputs     it agrees with the teacher on held-back inputs, but not on the test images
    small or unstable  the curve is flat, and the student does not even fit its own inputs
    unclear            none of them

A source that has collapsed is named whatever the agreement: two networks agree on one picture. Without a test set the
distance is unknown, and agreement does not stand in for accuracy: on our cells it lies from 50
points below to 82 above (`benchmarks/agreement.py`). Then only a cause that shows by itself is named: one of the first
four, or a student that hardly agrees beyond chance.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config.checks import seconds_in
from ..config.retype import retyped
from .collapse import ENOUGH, symptoms

Record = Mapping[str, Any]

FAR = 0.9  #: a student below this share of its teacher's test accuracy is far below it
AGREES = 85.0  #: without a test set: a student that agrees on this many held-back inputs (%) gets no verdict
GUESSES = 1.3  #: a teacher below this multiple of chance on the test images, by 10 points at most, guesses
FITS = 90.0  #: agreement (%) from which the student has learned its inputs
TINY = 0.2  #: a class is rare below this share of an even share
GAP = 10.0  #: points between agreement on training inputs and on held-back inputs
DRAWS = 5.0  #: draws per image from which a pool can be learned by heart
RISE = 1.0, 0.1  #: points, and share of what is missing, that a curve gains in its last third if it still rises
BRIEF = 300  #: steps after which no student is near its teacher
FALL = 0.1  #: share of the loss that is lost in the last third if it still falls


@dataclass(frozen=True)
class Cause:
    """A cause, the sentence with the figures that it rests on, and the settings that act against it.

    `changes`: dotted names of the config tree; `remedy` says what they do; `same_folder`: the run itself goes on.
    """

    name: str
    evidence: str
    remedy: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    without: Collection[str] = ()
    same_folder: bool = False


@dataclass(frozen=True)
class Verdict:
    """The finding on one run: how far below, why, and the next command (empty for a run that was made in Python)."""

    distance: str
    cause: Cause
    command: str

    @property
    def settings(self) -> str:
        """The changes in words, for a run without a command."""
        return ", ".join(f"{name} = {value!r}" for name, value in self.cause.changes.items())

    def to_dict(self) -> dict[str, str]:
        """For summary.json."""
        return {
            "distance": self.distance, "cause": self.cause.name, "evidence": self.cause.evidence,
            "remedy": self.cause.remedy, "command": self.command, "settings": self.settings,
        }  # fmt: skip


def verdict(
    summary: Record, config: Record, evals: Sequence[Record], logs: Sequence[Record] = (), folder: str = "",
    goes_on: bool = True,
) -> Verdict | None:  # fmt: skip
    """The finding on a finished run; None if the student is not far below its teacher.

    Args:
        summary, config: the contents of summary.json and config.json.
        evals, logs: the lines of these kinds in metrics.jsonl, in order of step.
        folder: the run folder; empty: none was written.
        goes_on: whether the run can be trained longer: `compare` deletes the checkpoints.
    """
    if (chance := _teacher_by_chance(summary)) is not None:
        return chance
    found = _distance(summary)
    if found is None:
        return None
    distance, missing = found
    tested = number(summary, "teacher_accuracy") is not None
    if not tested and missing <= 100 - AGREES:  # the one fault that makes two networks agree
        causes = [_collapsed(summary, config)]
    else:
        causes = _causes(summary, config, evals, logs, missing, goes_on)
    cause = next((c for c in causes if c is not None), None)
    if cause is None:
        return None
    out = folder if cause.same_folder or not folder else f"{folder.rstrip('/')}-{cause.name.replace(' ', '-')}"
    command = retyped(str(summary.get("command") or ""), cause.changes, out, cause.without)
    return Verdict(distance, cause, command)


def _causes(
    summary: Record, config: Record, evals: Sequence[Record], logs: Sequence[Record], missing: float, goes_on: bool
) -> list[Cause | None]:
    """Each cause that holds, in the order in which they are tried."""
    causes = [
        _collapsed(summary, config),
        _rare(summary, config),
        _few_images(summary, config),
        _few_steps(summary, config, evals, logs, missing, goes_on),
    ]
    if number(summary, "teacher_accuracy") is None:
        causes += [_small(summary, config) if _by_chance(summary) else None]
    else:
        causes += [_foreign(summary, config), _small(summary, config), _unclear(summary, config, goes_on)]
    return causes


def number(record: Record, *keys: str) -> float | None:
    """`record[a][b]...` if it is a finite number."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _distance(summary: Record) -> tuple[str, float] | None:
    """(how far below its teacher the student is, the points that are missing); None if it is not far below."""
    mine = number(summary, "delivered_accuracy")
    mine = number(summary, "student_accuracy") if mine is None else mine
    teacher, agreement = number(summary, "teacher_accuracy"), number(summary, "agreement")
    if mine is not None and teacher is not None:
        if mine >= FAR * teacher:
            return None
        return f"The student is far below its teacher: {mine:.2f} % of the test images, teacher {teacher:.2f} %.", (
            teacher - mine
        )
    if agreement is None:
        return None
    said = (
        "The student may be far from its teacher. Its accuracy is not known, since there was no test set; agreement on "
        f"held-back inputs ({agreement:.2f} %) does not tell."
    )
    return said, 100 - agreement


def _teacher_by_chance(summary: Record) -> Verdict | None:
    """The finding where the teacher itself hardly knows the test images; the student then tells nothing."""
    teacher, scores = number(summary, "teacher_accuracy"), summary.get("teacher_class_accuracy") or []
    seen = sum(score is not None for score in scores) or _classes(summary)
    if teacher is None or seen < 2 or teacher >= min(GUESSES * 100 / seen, 100 / seen + 10):
        return None
    said = f"the teacher names {teacher:.2f} % of the test images rightly; chance is {100 / seen:.1f} %"
    what = (
        "Check the teacher's weights, its normalisation (teacher.normalise, or mean and std), and that the test set's "
        "classes are the teacher's, in its order (teacher.classes)."
    )
    return Verdict("The teacher itself is at chance on the test images.", Cause("the teacher", said, what), "")


def _by_chance(summary: Record) -> bool:
    """Whether the student agrees with the teacher hardly more often than by chance."""
    agreement, classes = number(summary, "agreement"), _classes(summary)
    return classes > 0 and "no agreement" in symptoms({}, classes, agreement, done=1.0)


# ------------------------------------------------------------------------------------------------- the causes


def _classes(summary: Record) -> int:
    return len(summary.get("class_shares") or [])


def _other_source(summary: Record, config: Record) -> tuple[str, dict[str, Any], Collection[str]]:
    """(what it does, the settings of another source that this teacher can use, the parts that they replace)."""
    name = (config.get("source") or {}).get("name")
    if summary.get("teacher_batchnorm") and name != "deepinv":
        source, preset = "deepinv", "desk"
    else:
        source, preset = "procedural", "study" if name == "procedural" else "desk"
    return f"Take another source, {source}.", {"source.name": source, "source.preset": preset}, ("source", "preset")


def _collapsed(summary: Record, config: Record) -> Cause | None:
    log = summary.get("log") or {}
    signs = {k.removeprefix("inputs/"): v for k, v in log.items() if k.startswith("inputs/")}
    found = symptoms({k: v for k, v in signs.items() if k != "absent_classes"}, _classes(summary))
    if not found:
        return None
    if "few classes" in found:
        said = f"the newest inputs have {signs['effective_classes']:.1f} effective classes of {_classes(summary)}"
    else:
        said = f"the newest inputs are nearly equal: a pixel's standard deviation is {signs['diversity']:.3f} of [0, 1]"
    source = config.get("source") or {}
    if "few classes" in found and source.get("coverage") == 0:
        return Cause("collapsed source", said, "Give classes that are missing a weight.", {"source.coverage": 5.0})
    if (rate := number(source, "lr_g")) and "same picture" in found:
        return Cause("collapsed source", said, "Lower the generator's rate.", {"source.lr_g": rate / 4})
    return Cause("collapsed source", said, *_other_source(summary, config))


def _rare(summary: Record, config: Record) -> Cause | None:
    seen, classes = summary.get("drawn_shares") or summary.get("class_shares") or [], _classes(summary)
    images = number(summary, "images") or 0
    if classes < 2 or len(seen) != classes or images < ENOUGH * classes:
        return None
    rare = [k for k, share in enumerate(seen) if share < TINY / classes]
    if not rare or len(rare) < 0.05 * classes:
        return None
    said = (
        f"{len(rare)} of {classes} classes make up {100 * sum(seen[k] for k in rare):.2g} % of the inputs that the "
        f"student saw; an even share would be {100 * len(rare) / classes:.3g} %"
    )
    scores = summary.get("class_accuracy") or []
    here = [scores[k] for k in rare if k < len(scores) and scores[k] is not None]
    there = [v for k, v in enumerate(scores) if k not in set(rare) and v is not None]
    if here and there:
        low, high = sum(here) / len(here), sum(there) / len(there)
        if high - low < GAP:  # the rare classes are no worse than the others
            return None
        said += f"; its accuracy on them is {low:.1f} %, on the other classes {high:.1f} %"
    acts = [name for name in str(config.get("intervention") or "none").split("+") if name not in ("none", "plain", "")]
    present = summary.get("class_shares") or []
    if "stratified" not in acts and any(present[k] > 0 for k in rare):
        joined = "+".join([*acts, "stratified"])
        return Cause("rare classes", said, "Draw all classes equally often.", {"intervention": joined})
    if (config.get("source") or {}).get("coverage") == 0:
        return Cause("rare classes", said, "Give classes that are missing a weight.", {"source.coverage": 5.0})
    return Cause("rare classes", said, *_other_source(summary, config))


def _few_images(summary: Record, config: Record) -> Cause | None:
    fitted, held = number(summary, "train_agreement"), number(summary, "agreement")
    images, loop, source = number(summary, "images"), config.get("loop") or {}, config.get("source") or {}
    steps, batch = number(summary, "steps") or number(loop, "steps"), number(loop, "batch")
    if fitted is None or held is None or not images or not steps or not batch:
        return None
    draws = steps * batch / images
    if fitted - held < GAP or draws < DRAWS:
        return None
    said = (
        f"the student agrees with the teacher on {fitted:.1f} % of the inputs that it trained on, but on {held:.1f} % "
        f"of held-back inputs; each of the {images:,.0f} images was drawn {draws:.3g} times"
    )
    n, every, capacity = number(source, "n"), number(source, "every"), number(config, "pool", "capacity")
    if capacity and images > capacity and (not n or n >= capacity):
        return Cause("too few images", said, "Keep more images.", {"pool.capacity": int(4 * capacity)})
    if loop.get("time"):  # the limit decides how many images there are
        return Cause("too few images", said, *_longer(summary, config, goes_on=False))
    if n and n <= 1.1 * images:
        changes = {"source.n": int(4 * n)}
        if candidates := number(source, "candidates"):
            changes["source.candidates"] = int(4 * candidates)
        return Cause("too few images", said, "Take four times as many images.", changes)
    if every and every > 1:
        return Cause("too few images", said, "Make images more often.", {"source.every": max(1, int(every) // 4)})
    return Cause("too few images", said, *_other_source(summary, config))


def _longer(summary: Record, config: Record, goes_on: bool) -> tuple[str, dict[str, Any], Collection[str], bool]:
    """(what it does, the settings of a longer training, the parts that they replace, whether the run goes on)."""
    if limit := (config.get("loop") or {}).get("time"):
        return "Give more time.", {"loop.time": f"{3 * seconds_in(str(limit), 'loop.time'):g}s"}, (), False
    steps = int(number(summary, "steps") or number(config, "loop", "steps") or 1)
    schedule = (config.get("optim") or {}).get("schedule", "cosine")
    if goes_on and schedule in ("cosine", "constant"):
        return "Train longer, from where the student stands.", {"loop.steps": 3 * steps}, (), True
    return "Train three times as long, from the start.", {"loop.steps": 3 * steps}, (), False


def _few_steps(
    summary: Record,
    config: Record,
    evals: Sequence[Record],
    logs: Sequence[Record],
    missing: float,
    goes_on: bool,
) -> Cause | None:
    steps, batch = number(summary, "steps"), number(config, "loop", "batch") or 0
    if steps and steps < BRIEF:
        said = f"{steps:.0f} steps of {batch:.0f} images are hardly any"
        return Cause("too few steps", said, *_longer(summary, config, goes_on))
    tested = number(summary, "teacher_accuracy") is not None
    key = ("test" if tested else "agreement") + ("_ema" if summary.get("delivered") == "ema" else "")
    what = "test accuracy" if tested else "agreement"
    if (ends := _last_third(evals, key)) is not None:
        (a, before), (b, last) = ends
        if last - before < max(RISE[0], RISE[1] * missing):
            return None
        said = f"the {what} still rose at the end: from {before:.2f} % at step {a:,} to {last:.2f} % at step {b:,}"
    elif (ends := _last_third(logs, "loss")) is not None and len(logs) >= 6:
        (a, before), (b, last) = ends
        if not 0 < last < (1 - FALL) * before:
            return None
        said = f"the loss still fell at the end: from {before:.3g} at step {a:,} to {last:.3g} at step {b:,}"
    else:
        return None
    return Cause("too few steps", said, *_longer(summary, config, goes_on))


def _last_third(records: Sequence[Record], key: str) -> tuple[tuple[int, float], tuple[int, float]] | None:
    """((step, value) at two thirds of the run, (step, value) at its end); None if the curve has no such points."""
    curve = [(int(r["step"]), v) for r in records if (v := number(r, key)) is not None]
    if len(curve) < 2:
        return None
    early = [point for point in curve if point[0] <= 2 / 3 * curve[-1][0]]
    return (early[-1], curve[-1]) if early else None


def _foreign(summary: Record, config: Record) -> Cause | None:
    agreement = number(summary, "agreement")
    if number(summary, "teacher_accuracy") is None or agreement is None or agreement < FITS:
        return None
    said = (
        f"the student agrees with the teacher on {agreement:.1f} % of held-back inputs, so it has learned its inputs, "
        "but the test images look different"
    )
    remedy, changes, without = _other_source(summary, config)
    return Cause("foreign inputs", said, f"{remedy} Unlabelled images of a similar kind serve better still.", changes,
                 without)  # fmt: skip


def _small(summary: Record, config: Record) -> Cause | None:
    fitted = number(summary, "train_agreement")
    where = "the inputs that it trained on"
    if fitted is None:
        fitted, where = number(summary, "agreement"), "held-back inputs"
    rate = number(config, "optim", "lr")
    if fitted is None or fitted >= AGREES or not rate:
        return None
    said = (
        f"the curve is flat at the end, and the student agrees with the teacher on only {fitted:.1f} % of {where}; "
        f"the student is too small, or the rate {rate:g} is wrong"
    )
    floor = min(number(config, "optim", "floor") or 0.0, rate / 4)
    changes = {"optim.lr": rate / 4} | ({"optim.floor": floor} if floor else {})
    return Cause("small or unstable", said, "Lower the rate first. If nothing changes, take a larger student.", changes)


def _unclear(summary: Record, config: Record, goes_on: bool) -> Cause:
    return Cause("unclear", "nothing that the run recorded names one cause", *_longer(summary, config, goes_on))
