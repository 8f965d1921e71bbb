"""A student as files for deployment: written, compared with the student, and timed.

.safetensors   the weights, which `load_model` reads       exact
.onnx          ONNX, float                                 exact to `parity.TOLERANCE`, else refused
.pt2           torch.export, which needs no code of ours   exact to `parity.TOLERANCE`, else refused
.int8.onnx     ONNX in 8-bit integers                      agreement with the teacher, before and after
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.rows import Pixels
from ..engine.inputs import MOST, Inputs
from ..engine.run_folder import check_writable, write_atomically
from ..errors import DodistillError
from ..evaluation.evaluate import agreement, predict
from ..evaluation.latency import BATCHES, cpu_name, latency, one_thread
from ..evaluation.parity import TOLERANCE, Parity, answers, parity
from ..functional.memory_format import laid_out
from ..functional.modes import evaluating
from ..models import save_model
from ..models.int8 import int8_bytes
from ..models.onnx import Run, facts, onnx_bytes, onnx_runner, require_onnx
from ..models.program import program_bytes, program_runner
from ..sources.shared import pictures

Shape = tuple[int, int, int]
ENDINGS = {
    ".int8.onnx": "ONNX in 8-bit integers", ".onnx": "ONNX", ".pt2": "torch.export", ".safetensors": "weights",
}  # fmt: skip


def ending(path: str | Path) -> str:
    """Which of `ENDINGS` a file has. Raises DodistillError for another one."""
    name = Path(path).name.lower()
    for found in ENDINGS:
        if name.endswith(found):
            return found
    known = ", ".join(f"FILE{end} ({what})" for end, what in ENDINGS.items())
    raise DodistillError(f"cannot export to {path}; there are {known}.")


@dataclass(frozen=True)
class Material:
    """The images that calibrate an int8 file, and those that files are checked on.

    Attributes:
        x: uint8 [n, C, H, W], for calibration; empty where there are no images for it.
        held: uint8 [m, C, H, W], others, on which files are compared with the student.
        teacher: [m, K], the teacher's logits of `held`, where they are known.
        name: of `held`, for messages.
    """

    x: Tensor
    held: Tensor
    teacher: Tensor | None
    name: str


def of_run(inputs: Inputs) -> Material:
    """The sample that a run kept."""
    return Material(inputs.x, inputs.held, inputs.held_t, "inputs that the run held back")


def of_images(x: Pixels, name: str, teacher: nn.Module | None = None) -> Material:
    """Images uint8 [n, C, H, W] of the user: three quarters calibrate, the others check; at most `MOST` each."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held = min(MOST, max(1, len(x) // 4))
    chosen = x[order[held:][:MOST]] if len(x) > 1 else x[:]
    other = x[order[:held]]
    return Material(chosen, other, None if teacher is None else predict(teacher, other).cpu(), name)


def of_pictures(shape: Shape) -> Material:
    """Pictures drawn by formulas, for a student without a run."""
    x = pictures.draw(dict.fromkeys(pictures.KINDS, 12), shape, torch.Generator().manual_seed(0), stretch=False)
    return Material(x[:0], x, None, "drawn pictures (no images of a run are at hand)")


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    kilobytes: float
    milliseconds: Sequence[float | None]  #: for each size in `BATCHES`


@dataclass(frozen=True)
class Shipped:
    """What was written, and how it compares.

    Attributes:
        parity: path -> how the file compares with the student; without weights.
        notes: path -> a sentence on how it compares.
        rows: the table.
        text: all of it, for a person.
    """

    parity: dict[Path, Parity]
    notes: dict[Path, str]
    rows: list[Row]
    text: str


def ship(
    model: nn.Module, paths: Sequence[str | Path], shape: Shape, material: Material | None,
    weights: Path | None = None, **saved: Any,
) -> Shipped:  # fmt: skip
    """Write `model`, from images [B, C, H, W] in [0, 1] to logits, as each of `paths`, by their endings.

    Args:
        shape: (C, H, W).
        material: images; None: drawn pictures, and no int8.
        weights: the file of the weights, for its size.
        saved: further metadata of a .safetensors.

    Raises DodistillError for another ending, for int8 without images, without the optional libraries, for a network
    that a format cannot hold, and for an exact format whose logits differ by more than rounding: nothing is written
    then.
    """
    kinds = {Path(path): ending(path) for path in paths}
    check(kinds, material)
    net = model if _device(model).type == "cpu" else copy.deepcopy(model).cpu()
    it = _Shipping(net, shape, material or of_pictures(shape))
    made = {path: it.made(path, kind) for path, kind in kinds.items() if kind != ".safetensors"}
    for path in kinds:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path in made:
            write_atomically(path, made[path].data)
        else:
            save_model(net, path, **saved)
    notes = {path: it.said(made.get(path), path) for path in kinds}
    size = weights.stat().st_size if weights else sum(t.nbytes for t in net.state_dict().values())
    timed: list[tuple[str, int, Run]] = [("the student in torch", size, it.student)]
    if it.onnx is not None and ".onnx" not in kinds.values():
        timed.append(("the student in float ONNX", len(it.onnx[0]), it.onnx[1]))
    timed += [(str(path), len(one.data), one.run) for path, one in made.items()]
    with one_thread():
        rows = [Row(name, size / 1000, latency(run, shape)) for name, size, run in timed]
    lines = [f"{path}: {note}" for path, note in notes.items()]
    return Shipped({path: one.parity for path, one in made.items()}, notes, rows, "\n".join([*lines, "", *table(rows)]))


def check(kinds: dict[Path, str], material: Material | None) -> None:
    """Refuse what cannot succeed, before anything is computed."""
    if any(kind.endswith(".onnx") for kind in kinds.values()):
        require_onnx()
    for path, kind in kinds.items():
        check_writable(path)
        if kind == ".int8.onnx" and (material is None or not len(material.x)):
            raise DodistillError(
                f"{path} needs images that calibrate the ranges of its integers, and there are none: give a run folder "
                "that kept some, or unlabelled images (--calibrate DATA; in Python calibrate=IMAGES)."
            )


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@dataclass(frozen=True)
class _Made:
    """A file that is not written yet."""

    data: bytes
    run: Run
    logits: Tensor  #: of the images that it is checked on
    parity: Parity


class _Shipping:
    """One call of `ship`: the student's answers, and what is made of it."""

    def __init__(self, model: nn.Module, shape: Shape, material: Material) -> None:
        self.model, self.shape, self.material = model, shape, material
        self.logits = self.answers(self.student)
        self.onnx: tuple[bytes, Run] | None = None

    def student(self, images: Tensor) -> Tensor:
        """The student's logits, as in the package."""
        with evaluating(self.model):
            logits: Tensor = self.model(laid_out(images))
        return logits

    def answers(self, run: Run) -> Tensor:
        with one_thread():
            return answers(run, self.material.held)

    def made(self, path: Path, kind: str) -> _Made:
        """Raises DodistillError for an exact format that does not answer as the student does."""
        if kind == ".pt2":
            data = program_bytes(self.model, self.shape)
            return self.compared(path, data, program_runner(data), exact=True)
        if self.onnx is None:
            data = onnx_bytes(self.model, self.shape)
            self.onnx = data, onnx_runner(data)
        found = self.compared(path, *self.onnx, exact=True)
        if kind == ".onnx":
            return found
        data = int8_bytes(found.data, self.material.x, facts(self.model, self.shape))
        return self.compared(path, data, onnx_runner(data), exact=False)

    def compared(self, path: Path, data: bytes, run: Run, exact: bool) -> _Made:
        logits = self.answers(run)
        found = parity(self.logits, logits)
        if exact and not found.exact:
            raise DodistillError(
                f"{path} would not answer as the student does: {found} of {found.images} {self.material.name}; at most "
                f"{TOLERANCE:g} of the largest logit is rounding. Nothing was written. The usual cause is a network "
                "that behaves differently when it is exported; FILE.safetensors keeps it as it is."
            )
        return _Made(data, run, logits, found)

    def said(self, made: _Made | None, path: Path) -> str:
        """How a file compares, in a sentence."""
        if made is None:
            return f"the weights, for load_model({str(path)!r})"
        text = f"{made.parity} of {made.parity.images} {self.material.name}"
        if ending(path) != ".int8.onnx" or self.material.teacher is None:
            return text
        before, after = (agreement(logits, self.material.teacher) for logits in (self.logits, made.logits))
        return f"{text}; agreement with the teacher {before:.2f} % before, {after:.2f} % after"


def table(rows: Sequence[Row]) -> list[str]:
    """Lines: file, size in kB, milliseconds for each batch."""
    head = ["file", "kB", *(f"ms, batch {n}" for n in BATCHES)]
    body = [
        [row.name, f"{row.kilobytes:.1f}", *("–" if ms is None else f"{ms:.3g}" for ms in row.milliseconds)]
        for row in rows
    ]
    wide = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, wide)))
        for line in [head, *body]
    ]
    return [*lines, f"median on one thread of {cpu_name()}"]
