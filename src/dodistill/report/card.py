"""The model card beside `student.safetensors`, and the lines of code that use the student."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from ..config.tree import code_in
from ..data.classes import titles
from .format import count, duration, percent
from .front_matter import LICENCE, front_matter
from .loading import loading, normalisation, scoring

MOST = 100  #: classes that the card names
LAST = "last epoch"
BEST = "best on test (selection on the test set; as the literature reports)"


def part(config: Mapping[str, Any], *keys: str) -> Any:
    """`config[a][b]...`; None if a key is missing or a value is no mapping."""
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def name_of(config: Mapping[str, Any], summary: Mapping[str, Any], who: str) -> str:
    """The name of the "teacher" or "student" of a run; before the end of the run, its spec."""
    return str(summary.get(f"{who}_name") or part(config, who, "spec") or f"the {who}")


def names_in(summary: Mapping[str, Any], count: int | None = None) -> tuple[str, ...]:
    """The names of the classes in a summary, as a page shows them; () without them, or if they are not `count`."""
    found = summary.get("classes")
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        return ()
    return titles(found) if count in (None, len(found)) else ()


def compression(summary: Mapping[str, Any]) -> float | None:
    """Parameters of the teacher over those of the student."""
    teacher, student = summary.get("teacher_parameters"), summary.get("student_parameters")
    return teacher / student if isinstance(teacher, int) and isinstance(student, int) and student else None


def usage(folder: str, summary: Mapping[str, Any] | None = None, spec: object = "") -> tuple[str, str]:
    """(Python that loads the student, shell that scores it). `spec`: the student's, in the config of the run."""
    known = summary or {}
    shape = known.get("image_shape")
    sides = ", ".join(map(str, shape)) if isinstance(shape, list) else "C, H, W"
    file = f"{folder}/student.safetensors" if folder != "." else "student.safetensors"
    python = loading(f'"{file}"', known, spec) + f"logits = student(images)    # float in [0, 1], shape [B, {sides}]"
    if names_in(known) and "load_model" in python:
        python += '\nnames = [student.spec["classes"][k] for k in logits.argmax(1)]'
    return python, scoring(file, known, spec)


def _code(value: object) -> str:
    """A code span that no backtick or line break inside can end."""
    text = re.sub(r"\s+", " ", str(value))
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _block(text: str, language: str) -> str:
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def delivered(summary: Mapping[str, Any]) -> str:
    """Which weights were saved, in words."""
    kinds = {"ema": "the running average (EMA) of the weights", "last": "the weights after the last step"}
    return kinds.get(str(summary.get("delivered")), "the student's weights")


def hub_usage(repo: str, summary: Mapping[str, Any], files: Iterable[str] = (), spec: object = "") -> str:
    """Python that loads the student from the hub, and its ONNX file, if there is one."""
    file, top = '"student.safetensors"', "from huggingface_hub import hf_hub_download\n"
    python = usage(".", summary, spec)[0].replace(file, f'hf_hub_download("{repo}", {file})')
    own = "import dodistill\n"
    python = f"{own}{top}{python.removeprefix(own)}" if python.startswith(own) else f"{top}{python}"
    name = next((name for name in files if name.endswith(".onnx")), None)
    if name is None:
        return python
    return python + (
        "\n\n# or without dodistill and torch:\n"
        "import onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession(hf_hub_download("{repo}", "{name}"))\n'
        '(logits,) = session.run(None, {"images": images})    # numpy, float32 in [0, 1], shape [B, C, H, W]'
    )


def model_card(
    config: Mapping[str, Any], summary: Mapping[str, Any], folder: str = ".", *, repo: str = "",
    files: Mapping[str, str] = MappingProxyType({}), licence: str = LICENCE,
) -> str:  # fmt: skip
    """Markdown for `README.md`: the student, its training, scores, limits, and use.

    `repo`: OWNER/NAME, of a card for the hub; `files`: exported files beside it -> a sentence on each.
    """
    teacher, student = name_of(config, summary, "teacher"), name_of(config, summary, "student")
    source = part(config, "source", "name") or "unknown"
    intervention = config.get("intervention") or "none"
    hers, reads = part(config, "student", "spec"), normalisation(summary)
    times = compression(summary)
    ratio = f", {times:.1f} times fewer than its teacher" if times else ""
    rows = [
        ("these weights, test accuracy", percent(summary.get("delivered_accuracy"))),
        ("student, test accuracy, " + LAST, percent(summary.get("student_accuracy"))),
        ("student, test accuracy, " + BEST, percent(summary.get("best_on_test"))),
        ("teacher, test accuracy", percent(summary.get("teacher_accuracy"))),
        ("agreement with the teacher on held-back substitution data (not accuracy)", percent(summary.get("agreement"))),
        *(
            (f"linear probe on {_code(k)}, features frozen", percent(v))
            for k, v in (summary.get("probe") or {}).items()
        ),
    ]
    known = [f"| {what} | {value} |" for what, value in rows if value != "–"]
    table = ["| what | value |", "|---|---:|", *known] if known else ["No values were measured."]
    untested = (
        ""
        if summary.get("student_accuracy") is not None
        else (
            "\nNo test set was given, so **the accuracy of this model is not known**. Measure it before you use it.\n"
        )
    )
    made = [
        f"- teacher: {_code(teacher)}",
        f"- student: {_code(student)}, {count(summary.get('student_parameters'))} parameters{ratio}",
        *([f"- reads: {reads}"] if reads else []),
        f"- substitution inputs: source {_code(source)}",
        f"- intervention: {_code(intervention)}",
        *(f"- code outside dodistill: {_code(name)}, sha256 {_code(code)}" for name, code in code_in(config).values()),
        f"- steps: {count(summary.get('steps') or part(config, 'loop', 'steps'))}, "
        f"seed {part(config, 'loop', 'seed')}, took {duration(summary.get('seconds'))}",
        f"- saved: {delivered(summary)}, chosen without test data",
    ]
    names = names_in(summary)
    shown = names if len(names) <= MOST else names[:MOST]
    rest = f' and {len(names) - MOST:,} more, which `student.spec["classes"]` has' if len(names) > MOST else ""
    command = summary.get("command")
    warnings = [f"- {re.sub(r'[<>]', '', str(w))}" for w in summary.get("warnings") or []]
    return "\n".join(
        [
            front_matter(config, summary, licence, list(files)),
            "",
            f"# {_code(student)} distilled from {_code(teacher)}",
            "",
            f"A small image classifier that imitates {_code(teacher)}. It was made by data-free knowledge distillation "
            "with dodistill.",
            "",
            "## How it was made",
            "",
            *made,
            "",
            *(["Command:", "", _block(str(command), "sh"), ""] if command else []),
            "## Data",
            "",
            (
                f"The student learned from images that were given (source {_code(source)}), and from the teacher's "
                "predictions for them. They may be the teacher's training data."
                if source in ("data", "real")
                else "None of the teacher's training data was used. The student learned from substitution inputs that "
                f"the source {_code(source)} made or found, and from the teacher's predictions for them."
            ),
            "",
            "## Numbers",
            "",
            *table,
            untested,
            *(["## Classes", "", f"{', '.join(map(_code, shown))}{rest}.", ""] if names else []),
            "## Limits",
            "",
            "- It repeats the teacher's mistakes and adds its own; agreement on substitution inputs says little about "
            "inputs that look different.",
            "- Substitution data can be imbalanced over the classes"
            + ("." if repo else "; see the class proportions in `report.html`."),
            "- It was not tested for robustness, calibration or fairness.",
            *warnings,
            "",
            *(["## Files", "", *(f"- {_code(name)}: {text}" for name, text in files.items()), ""] if files else []),
            "## Usage",
            "",
            _block(hub_usage(repo, summary, files, hers) if repo else usage(folder, summary, hers)[0], "python"),
            "",
            "## Licence",
            "",
            *([f"Published under {_code(licence)}.", ""] if licence != LICENCE else []),
            "The weights derive from the teacher and inherit its terms. If the source drew on other models or images, "
            "theirs apply too. dodistill itself claims no rights in them.",
            "",
        ]
    )
