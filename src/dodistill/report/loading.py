"""The lines of code that load a student: from its file alone, with the user's file of code, or with her class."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any, TypeGuard

from torch import nn

from ..config.plugins import model_file
from ..models import Normalized
from ..models.heads import find

FACTORY = "path/to/file.py:factory"  #: in place of code that is not known


def described(student: nn.Module) -> dict[str, Any]:
    """What the code that loads a student needs to know: its spec, its class, its normalisation, and its head."""
    wrapped = isinstance(student, Normalized)
    net = student.model if isinstance(student, Normalized) else student
    out: dict[str, Any] = {
        "spec": str(student.spec.get("spec", "")) if isinstance(student, Normalized) else "",
        "module": type(net).__module__, "class": type(net).__qualname__, "wrapped": wrapped, "head": bool(find(net)),
    }  # fmt: skip
    if isinstance(student, Normalized):
        out |= {"mean": student.mean.flatten().tolist(), "std": student.std.flatten().tolist()}
    return out


def loading(file: str, summary: Mapping[str, Any], student: object = "") -> str:
    """Python that makes `student` from the weights in `file`, an expression. `student`: the spec in a run's config."""
    known, spec = _known(summary, student)
    if known.get("class") and not spec:
        return _by_class(file, known)
    top = "import dodistill\n\n"
    if model_file(spec):
        code = f"{json.dumps(spec)}, weights={file}"
        return f"{top}# {model_file(spec)} is your code: give its path from the folder where this runs\n" + (
            f"student = dodistill.load_model({code}).eval()\n"
        )
    return f"{top}student = dodistill.load_model({file}).eval()\n"


def _by_class(file: str, known: Mapping[str, Any]) -> str:
    module, name = str(known.get("module", "")), str(known["class"]).rpartition(".")[2]
    importable = module not in ("", "__main__", "builtins") and "<locals>" not in str(known["class"])
    lines = ["import dodistill"] if known.get("wrapped") else []
    lines += ["from dodistill.models.weights import load_saved" if known.get("head") else
              "from safetensors.torch import load_file"]  # fmt: skip
    lines += [f"from {module} import {name}    # your class"] if importable else []
    lines += ["", f"student = {name}(...)    # {'' if importable else 'your class, '}with the arguments of the run"]
    load = f"load_saved(student, {file})" if known.get("head") else f"student.load_state_dict(load_file({file}))"
    lines.append(load)
    mean, std = known.get("mean"), known.get("std")
    if known.get("wrapped"):
        space = "" if mean == [0.0] and std == [1.0] else f", mean={_rounded(mean)}, std={_rounded(std)}"
        lines.append(f"student = dodistill.Normalized(student{space}).eval()")
    else:
        lines.append("student.eval()")
    return "\n".join([*lines, ""])


def scoring(file: str, summary: Mapping[str, Any], student: object = "") -> str:
    """The command that scores a student on labelled images."""
    known, spec = _known(summary, student)
    if model_file(spec) or (known.get("class") and not spec):
        words = ["dodistill", "evaluate", spec or FACTORY, "--weights", file, "--test", "path/to/test"]
        return shlex.join(words)
    return f"dodistill evaluate {shlex.quote(file)} --test path/to/test"


def normalisation(summary: Mapping[str, Any]) -> str:
    """What the network in the file does to images in [0, 1], in words; empty if it is not known."""
    known = _known(summary)[0]
    mean, std = known.get("mean"), known.get("std")
    if not _numbers(mean) or not _numbers(std):
        return ""
    if not any(mean) and all(s == 1 for s in std):
        return "images in [0, 1], as they are"
    if not any(mean) and all(abs(255 * s - 1) < 1e-4 for s in std):
        return "images in [0, 1], which the model multiplies by 255"
    return f"images in [0, 1]; the model subtracts {_listed(mean)} and divides by {_listed(std)}"


def _known(summary: Mapping[str, Any], student: object = "") -> tuple[Mapping[str, Any], str]:
    """(what `described` said of the student, its spec)."""
    found = summary.get("student")
    known = found if isinstance(found, Mapping) else {}
    return known, str(known.get("spec") or ("" if known else student or ""))


def _numbers(values: object) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(isinstance(v, int | float) for v in values)


def _rounded(values: Any) -> list[float]:
    return [float(f"{v:.6g}") for v in values] if _numbers(values) else []


def _listed(values: list[float]) -> str:
    return ", ".join(f"{v:.4g}" for v in values)
