"""`dodistill rank`: which of several students of one teacher is the best, without labels and without its data.

Each student is asked about one common set of images, at even shares of the teacher's classes, and its agreement with
the teacher there is its score. The set is patches of the two photographs that scikit-learn brings, or what `--on`
names: images of any kind without labels, or a run, whose held-back images are taken. No student should have learned
from such images: a source's own images favour its students.

The score orders students; it is no accuracy. `behind` is the difference to the best on the same images, with its
standard error over the images. A student is told apart from the best if it is more than two standard errors behind, and
more than `SCATTER` points: other images would order students within this distance otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from ..config import registry
from ..config.tree import Distill, Model
from ..data.images import Images, refuse_one_class, require_fit
from ..data.labels import fitted
from ..data.packed import Packed, open_images
from ..engine.inputs import read_inputs
from ..engine.run_folder import names_of_run
from ..errors import DodistillError
from ..evaluation import ranking
from ..evaluation.evaluate import predict, top1
from ..models.configured import Shape
from ..models.normalized import Normalized, class_names
from ..report.progress import Progress
from .finished import opened, source_of

#: the data set of `data.images` that is taken without --on
PHOTOS = "photos"
#: images that the teacher sees for each that is kept, so that there are some of rare classes
CANDIDATES = 3
#: points of agreement within which students of our runs were in the wrong order (docs/results.md)
SCATTER = 8.0
#: fewest images on which a student is scored
LEAST = 50


@dataclass(frozen=True)
class Arguments:
    """Order the students of one teacher, best first, without labels: by agreement with it on one set of images."""

    runs: Annotated[tuple[str, ...], "[RUN ...]"] = ()  #: run folders of one teacher
    on: Annotated[str, "DATA|RUN"] = ""  #: images without labels, or a run; empty: patches of two photographs
    test: Annotated[str, "DATA"] = ""  #: labelled images: print the accuracy too, and how well the order agrees
    n: int = 4000  #: at most so many images, at even shares of the teacher's classes
    teacher: Model = field(default_factory=Model)  #: the teacher, if a run received it in memory
    model: Annotated[str, "FILE.py:FACTORY"] = ""  #: the students' network, if their weights name code, or nothing
    allow_code: bool = False  #: allow the code that the runs name as their networks to run


@dataclass(frozen=True)
class Ranked:
    """One student.

    Attributes:
        run: its folder.
        agreement: % of the images on which it predicts the teacher's class.
        behind: points of agreement behind the best student.
        error: the standard error of `behind`, over the images.
        accuracy: % of the labelled images, if there are any.
    """

    run: Path
    agreement: float
    behind: float
    error: float
    accuracy: float | None = None

    @property
    def apart(self) -> bool:
        """Whether it is told apart from the best."""
        return self.behind > max(2 * self.error, SCATTER)


@dataclass(frozen=True)
class Ranking:
    """Students, the best first. `on` says what they were compared on, `notes` what weakens the comparison."""

    students: list[Ranked]
    on: str
    images: int
    notes: list[str]


def run(arguments: Arguments) -> int:
    a = arguments
    found = rank(a.runs, a.on, a.test, a.n, a.teacher, a.model, a.allow_code)
    alone = len({s.run.name for s in found.students}) == len(found.students)
    called = [s.run.name if alone else str(s.run) for s in found.students]
    wide = max(3, *map(len, called))
    print(f"{'run':{wide}}  agreement  behind the best{'  accuracy' if a.test else ''}")
    for i, (name, s) in enumerate(zip(called, found.students)):
        gap = "" if i == 0 else f"{s.behind:.2f} ± {s.error:.2f}" + ("" if s.apart else "  =")
        seen = "" if s.accuracy is None else f"{s.accuracy:8.2f} %"
        print(f"{name:{wide}}  {s.agreement:7.2f} %  {gap:17}{seen}".rstrip())
    print(f"\non {found.images:,} images: {found.on}")
    if any(not s.apart for s in found.students[1:]):
        print(f"= : not told apart from the best; within {SCATTER:g} points the order says nothing")
    if a.test and len(found.students) > 2:
        pairs = [(s.agreement, s.accuracy or 0.0) for s in found.students]
        print(f"rank correlation of agreement and accuracy: {ranking.correlation(*zip(*pairs)):.2f}")
    for note in found.notes:
        print(f"note: {note}")
    return 0


def rank(
    runs: Sequence[str | Path], on: str = "", test: str = "", n: int = 4000, teacher: str | Model = "",
    network: str = "", allow_code: bool = False,
) -> Ranking:  # fmt: skip
    """Order the students of these run folders, which have one teacher, by their agreement with it on one set of images.

    Args:
        runs: at least two run folders.
        on: images without labels (a folder, a file, a data set's name), or a run folder, whose held-back images are
            taken; empty: patches of the two photographs that scikit-learn brings.
        test: labelled images, for the accuracy beside it; they choose nothing.
        n: at most so many images.
        teacher: needed for runs that were given their teacher in memory.
        network: the students' network, where their weights name code or nothing.
        allow_code: let the code that the runs name run.

    Raises DodistillError for fewer than two runs, runs of several teachers, missing files, and too few images.
    """
    folders = [Path(r) for r in runs]
    if len(folders) < 2:
        raise DodistillError("rank compares students: give two run folders or more: dodistill rank RUN RUN [RUN ...].")
    if n < LEAST:
        raise DodistillError(f"--n is {n}; a student is scored on at least {LEAST} images.")
    have = opened(folders, teacher, network, allow_code)
    model, shape, students = have.teacher, have.shape, have.students
    x, what, notes = _images(folders, have.configs, on, n, shape)
    labelled = _labelled(test, shape, model, folders[0], have.configs[0].data.crop_share) if test else None
    with Progress(1 + len(students), f"rank {len(students)} students") as progress:
        x, classes = ranking.evenly(x.to(have.device), model, n)
        if len(x) < LEAST:
            raise DodistillError(f"there are {len(x)} images to compare on; give at least {LEAST}, by --on DATA.")
        progress.update(1)
        rows, scores = [], []
        for i, student in enumerate(students, 2):
            rows.append(ranking.agrees(student, x, classes))
            scores.append(None if labelled is None else _accuracy(student, labelled))
            progress.update(i)
    order = sorted(range(len(rows)), key=lambda i: -int(rows[i].sum()))
    best = rows[order[0]]
    ranked = [
        Ranked(folders[i], 100 * float(rows[i].float().mean()), *ranking.behind(rows[i], best), scores[i])
        for i in order
    ]
    return Ranking(ranked, what, len(x), notes + have.notes)


def _images(
    folders: Sequence[Path], configs: Sequence[Distill], on: str, n: int, shape: Shape
) -> tuple[Tensor, str, list[str]]:
    """The images to compare on, what they are, and what to beware of."""
    if on and (Path(on) / "config.json").is_file():
        source = source_of(Path(on))
        own = [f.name for f in folders if source_of(f) == source]
        favoured = [f"images of the source {source} favour the students that learned from it: {_listed(own)}."]
        notes = favoured if 0 < len(own) < len(folders) else []
        inputs = read_inputs(Path(on))
        if inputs is None:
            raise DodistillError(f"{on} keeps no held-back images; give others to compare on.")
        return inputs.held, f"held-back images of {on}, a run of {source}", notes
    given = open_images(on or f"{PHOTOS}:{CANDIDATES * n}", "train", False, shape, configs[0].data.crop_share)
    some = torch.randperm(len(given), generator=torch.Generator().manual_seed(0))[: CANDIDATES * n]
    same = (on,) if on else (PHOTOS, "strokes")
    alike = [f.name for f, c in zip(folders, configs) if _such(c.data.unlabeled, same) and _reads(f)]
    favoured = [f"these images favour the students that learned from such: {_listed(alike)}; give others, by --on."]
    notes = favoured if alike else []
    return given.x[some], f"{on}, without labels" if on else "patches of two photographs", notes


def _such(unlabeled: str, same: Sequence[str]) -> bool:
    """Whether the images are one of these data sets, a number of its images (`strokes:300`), or a folder below it."""
    mine = unlabeled.rstrip("/\\")
    for name in same:
        kind, _, number = name.rstrip("/\\").rpartition(":")
        one = kind if kind and number.isdigit() else name.rstrip("/\\")
        if mine == one or mine.startswith((f"{one}:", f"{one}/", f"{one}\\")):
            return True
    return False


def _reads(folder: Path) -> bool:
    """Whether a run's source may have used its unlabelled images. The code of a user's own source does not run."""
    name = source_of(folder)
    return name not in registry.names("source") or "unlabeled" in registry.config("source", name).needs


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} of the runs"


def _labelled(test: str, shape: Shape, model: Normalized, first: Path, crop: float) -> Images | Packed:
    images = open_images(test, "test", True, shape, crop)
    if images.y is None:
        raise DodistillError(f"{test} has no labels; accuracy needs them. Without --test none are needed.")
    refuse_one_class(images, test)
    outputs = model.spec["num_classes"]
    images = fitted(images, class_names(model) or names_of_run(first), outputs, test)
    require_fit(images, shape, outputs or 1 << 31, test)
    return images


def _accuracy(student: Normalized, images: Images | Packed) -> float:
    assert images.y is not None
    return top1(predict(student, images.x), images.y)
