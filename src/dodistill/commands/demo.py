"""Distillation in minutes, on data that comes with scikit-learn: real scans of digits, and two photographs.

A teacher is trained on the digits. Students are distilled from it without the digits, by three methods, each without
intervention, with KDCI, and with stratified draws. The students are then scored on held-out digits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn

from ..api import distill
from ..data.images import load_images
from ..engine.run_folder import check_writable
from ..engine.teach import Teach, teach
from ..errors import at_least
from ..evaluation.evaluate import predict, top1
from ..models import load_model, save_model
from ..report.compare_page import write_compare
from ..report.delivery import parameters
from ..report.progress import Progress
from .compare import record_of_summary


@dataclass(frozen=True)
class Arguments:
    """Distil on bundled data, in minutes: three methods, with and without de-confounding."""

    out: Annotated[str, "FOLDER"] = "runs/demo"  #: folder for the runs and the report
    seed: int = 0


def run(arguments: Arguments) -> int:
    at_least(0, "demo", seed=arguments.seed)
    check_writable(Path(arguments.out) / "compare.html")
    demo(Path(arguments.out), arguments.seed)
    return 0


SHAPE = (1, 16, 16)
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "fast": ("a generator", {"source": {"name": "fast", "width": 24}}),
    "deepinv": ("inverted pixels", {"source": "deepinv"}),
    "dfnd": ("bits of 2 photos", {"source": {"name": "dfnd", "n": 4000, "select": "balanced"}}),
}
ARMS = {"plain": "none", "+KDCI": "kdci", "+strat.": "stratified"}


def demo(out: Path, seed: int = 0, steps: int = 450) -> list[dict[str, Any]]:
    """Run it, print the table, write `out/compare.html` and a report for each student. Returns the cells."""
    start = time.monotonic()
    console = Console()
    digits, held_out = load_images("digits", image_shape=SHAPE), load_images("digits", "test", image_shape=SHAPE)
    assert held_out.y is not None
    strokes = load_images("strokes:20000", image_shape=SHAPE)

    console.print(f"1. A teacher is trained on {len(digits):,} scans of handwritten digits.")
    teacher = load_model("tiny16", num_classes=10, in_channels=1, image_size=16, seed=seed)
    schedule = Teach(epochs=20, batch=64, pad=1, flip=False, seed=seed)
    with Progress(schedule.epochs, "teach tiny16") as progress:
        teach(teacher, digits, None, schedule, lambda log: progress.update(int(log["epoch"]), loss=float(log["loss"])))
    save_model(teacher, _inside(out) / "teacher.safetensors")
    accuracy = top1(predict(teacher, held_out.x), held_out.y)
    del digits  # no training data from here on

    console.print("2. Students are distilled without the scans, from the inputs that each method makes or finds.")
    cells: list[dict[str, Any]] = []
    students: list[nn.Module] = []
    for name, (_, settings) in SOURCES.items():
        for arm, intervention in ARMS.items():
            student = load_model("tiny8", num_classes=10, in_channels=1, image_size=16, seed=seed + 1)
            result = distill(
                teacher, student, intervention=intervention, preset="desk",
                unlabeled=strokes.x if name == "dfnd" else None, augment={"pad": 1, "flip": False},
                loop={"steps": steps, "seed": seed, "eval_every": steps // 3, "log_every": 20},
                image_shape=SHAPE, out=out / f"{name}-{intervention}", **settings,
            )  # fmt: skip
            cells.append(record_of_summary({"source": name, "intervention": arm, "seed": str(seed)}, result.summary))
            students.append(result.student)

    console.print("3. The students are scored on held-out digits.\n")
    for cell, net in zip(cells, students):
        cell["last"] = top1(predict(net, held_out.x), held_out.y)
    console.print(_table(cells, accuracy, parameters(teacher), cells[0]["summary"]["student_parameters"]))
    _picture(out)
    page = write_compare(cells, out / "compare.html", "dodistill demo")
    console.print(f"\nReports: {page} (all), {out / 'fast-none' / 'report.html'} (one student, with pictures)")
    console.print(
        f"The student: {out / 'fast-none' / 'student.safetensors'}    {time.monotonic() - start:.0f} s in all"
    )
    console.print("Next: dodistill distill --help, or README.md for your own model.")
    return cells


def _inside(out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    return out


def _picture(out: Path) -> None:
    """`out/samples.png`: inputs of each method, one under the other."""
    rows = []
    for name in SOURCES:
        image = Image.open(out / f"{name}-none" / "samples.png").convert("RGB")
        rows.append(image.crop((0, 0, image.width, image.height // 2)))  # two of its four rows
    gap = 14
    sheet = Image.new("RGB", (rows[0].width, sum(r.height + gap for r in rows) - gap), "white")
    y = 0
    for row in rows:
        sheet.paste(row, (0, y))
        y += row.height + gap
    sheet.save(out / "samples.png")


def _table(cells: list[dict[str, Any]], teacher: float, large: int, small: int) -> Table:
    table = Table(
        title=f"teacher {teacher:.1f} % ({large:,} parameters) -> student ({small:,} parameters)",
        caption="Accuracy in % on held-out digits, without and with an intervention.\n"
        "agree: % agreement with the teacher on substitution data (needs no label).\n"
        "skew: the ratio of the most frequent class of the substitution data to the rarest.\n"
        "One seed: differences of a few points are noise; docs/results.md has standard deviations.",
        caption_justify="left",
    )
    for column in ("method", "learns from", *ARMS, "agree", "skew", "sec"):
        table.add_column(column, justify="left" if column in ("method", "learns from") else "right")
    for name, (what, _) in SOURCES.items():
        mine = [c for c in cells if c["label"]["source"] == name]
        table.add_row(
            name, what, *(f"{c['last']:.1f}" for c in mine), f"{mine[0]['agreement']:.1f}",
            f"{mine[0]['share_ratio']:.0f}:1", f"{sum(c['seconds'] for c in mine) / len(mine):.0f}",
        )  # fmt: skip
    return table
