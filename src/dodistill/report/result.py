"""What a run gives back in Python: the student, the numbers, and their view in a notebook."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.watch import Watcher
from ..data.accept import accept
from ..data.images import Images, require_fit
from ..data.labels import fitted
from ..data.packed import Packed
from ..engine.inputs import Inputs
from ..errors import DodistillError
from ..evaluation.evaluate import predict, scores
from ..evaluation.monitor import read_metrics
from ..models.normalized import class_names
from .canvas import LIGHT
from .figures import curves
from .format import number
from .images import grid
from .ship import of_images, of_run, ship

Record = dict[str, Any]


class History(list[Record]):
    """The records of a run in order of step: {"kind": "log" | "eval" | "pool", "step": ..., name: value, ...}."""

    def of(self, kind: str) -> list[Record]:
        """The records of one kind."""
        return [record for record in self if record.get("kind") == kind]

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a logged name, as in "agreement", "test", "match/kd". Raises DodistillError for a name that
        was not logged."""
        found = [(int(r["step"]), float(r[name])) for r in self if isinstance(r.get(name), int | float)]
        if not found:
            names = sorted({k for r in self for k, v in r.items() if isinstance(v, int | float) and k != "step"})
            raise DodistillError(f"nothing is logged as {name!r}; there are {', '.join(names) or 'no values'}.")
        return found

    def to_pandas(self) -> Any:
        """A pandas.DataFrame, one row per record. Raises DodistillError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise DodistillError("a data frame needs pandas: pip install 'dodistill[pandas]'") from error
        return pandas.DataFrame(list(self))


class Recorder(Watcher):
    """Keeps the records of a run in memory."""

    def __init__(self) -> None:
        self.history = History()

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        self.history.append({"kind": "log", "step": step, **values})

    def on_eval(self, step: int, values: Mapping[str, float]) -> None:
        self.history.append({"kind": "eval", "step": step, **values})

    def on_pool(self, step: int, values: Mapping[str, Any]) -> None:
        self.history.append({"kind": "pool", "step": step, **values})


def read_history(folder: Path) -> History:
    """The history of a run folder, earlier starts included."""
    found = read_metrics(folder / "metrics.jsonl")
    return History(sorted((r for records in found.values() for r in records), key=lambda r: r["step"]))


@dataclass
class Result:
    """The result of a run.

    Attributes:
        student: the student to deploy, in eval mode.
        summary: the numbers, settings that were chosen, versions and warnings.
        folder: the run folder, if there is one.
        history: what was logged, evaluated and said of the pool.
        inputs: some of the images that the student learned from, uint8 [n, C, H, W].
        image_shape: (C, H, W).
        kept: a sample of the inputs with the teacher's logits, on which `export` calibrates and checks.
    """

    student: nn.Module
    summary: dict[str, Any]
    folder: Path | None
    history: History = field(default_factory=History, repr=False)
    inputs: Tensor | None = field(default=None, repr=False)
    image_shape: tuple[int, int, int] = (0, 0, 0)
    kept: Inputs | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return bool(self.summary.get("finished"))

    def evaluate(self, test: Any, teacher: nn.Module | None = None) -> dict[str, Any]:
        """Measures of the student on labelled images (`data.accept` has the forms): see `dodistill.evaluate`."""
        images = labelled(test, self.image_shape)
        outputs = predict(self.student, images.x[:1]).shape[1]
        images = fitted(images, class_names(self.student), outputs, "the test set")
        require_fit(images, self.image_shape, outputs, "the test set")
        return scores(self.student, images, teacher) | ({"note": images.note} if images.note else {})

    def export(self, path: str | Path, calibrate: Any = None, verbose: bool = True) -> Path:
        """Write the student, from images in [0, 1] to logits, normalisation included, by the ending of the file.

        .onnx; .pt2 (torch.export); .int8.onnx (8-bit integers, calibrated on inputs of the run, or on `calibrate`,
        unlabelled images in any form); .safetensors, which `load_model` reads. The file is compared with the student
        (`report.ship`); `verbose` prints the comparison, sizes and latencies. Raises DodistillError for another
        ending, and for a file that would not answer as the student does.
        """
        material = None if self.kept is None else of_run(self.kept)
        if calibrate is not None:
            material = of_images(accept(calibrate, self.image_shape, "calibration").x, "images given")
        said = ship(self.student, [path], self.image_shape, material, agreement=self.summary.get("agreement"))
        if verbose:
            print(said.text)
        return Path(path)

    def __repr__(self) -> str:
        s = self.summary
        if not self.finished:
            return f"Result(stopped at step {s.get('step')}, folder={str(self.folder) if self.folder else None!r})"
        said = [s["student_name"], f"{s['student_parameters']:,} parameters", f"agreement {s['agreement']:.2f} %"]
        if "student_accuracy" in s:
            said.append(f"accuracy {s['student_accuracy']:.2f} % (teacher {s['teacher_accuracy']:.2f} %)")
        return f"Result({', '.join([*said, *([str(self.folder)] if self.folder else [])])})"

    def _repr_html_(self) -> str:
        """For notebooks: the numbers, the curves, and pictures of the inputs."""
        from markupsafe import escape

        if not self.finished:
            return f"<p>{escape(repr(self))}</p>"
        s = self.summary
        rows = [
            ("student", f"{s['student_name']}, {s['student_parameters']:,} parameters"),
            ("teacher", f"{s['teacher_name']}, {s['teacher_parameters']:,} parameters"),
            ("agreement", f"{s['agreement']:.2f} % with the teacher, on held-back inputs"),
        ]
        if "student_accuracy" in s:
            rows.append(
                ("accuracy", f"{s['student_accuracy']:.2f} %, last step; teacher {s['teacher_accuracy']:.2f} %")
            )
        rows.append(("learned from", f"{s['images']:,} images in {number(s['seconds'], 3)} s"))
        if found := s.get("verdict"):
            rows.append(("likely cause", f"{found['distance']} {found['cause']}: {found['evidence']}."))
        rows += [("warning", text) for text in s.get("warnings", [])]
        head = "text-align:left;vertical-align:top;white-space:nowrap"
        table = "".join(f"<tr><th style='{head}'>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows)
        kinds = {kind: self.history.of(kind) for kind in ("log", "eval", "pool")}
        figures = [f for f in curves(kinds, s, 0) if f is not None][:3]
        plots = "".join(
            f"<figure style='display:inline-block;width:340px;margin:0 1em 0 0'><figcaption>{escape(f.title)}"
            f"</figcaption>{f.plot}</figure>"
            for f in figures
        )
        colours = ";".join(f"--{name}:{value}" for name, value in LIGHT.items())
        picture = ""
        if self.inputs is not None:
            data = io.BytesIO()
            grid(self.inputs[:32], 16).save(data, format="PNG")
            source = base64.b64encode(data.getvalue()).decode()
            picture = f"<p>Inputs:<br><img src='data:image/png;base64,{source}' alt='inputs of the student'></p>"
        style = f"{colours};color:var(--ink);background:var(--page)"
        return f"<div style='{style}'><table>{table}</table>{plots}{picture}</div>"


def labelled(test: Any, shape: tuple[int, int, int]) -> Images | Packed:
    """Labelled images in any form, for a model of `shape`."""
    images = accept(test, shape, "test", split="test", labels=True)
    if images.y is None:
        raise DodistillError("the test images have no labels; accuracy needs them: give (images, labels).")
    return images
