"""The inputs of a run, checked before any computation, and its result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..config import registry
from ..config.contracts import Settings, SourceSettings
from ..config.methods import Choice
from ..config.tree import Distill
from ..core.context import Context
from ..core.precision import Precision
from ..core.ranks import Ranks
from ..core.runtime import pick_device
from ..data.images import Images, require_fit
from ..data.packed import Packed
from ..data.rows import Pixels, Rows, rows_of
from ..errors import DodistillError, reworded
from ..functional.memory_format import place
from ..interventions.shared.dictionary import FOREIGN
from ..models.normalized import answering
from ..models.teacher import Teacher
from .run_folder import fingerprint
from .view import choose_view


@dataclass
class Test:
    """Labelled images that are only reported on: x uint8 [n, C, H, W], a tensor or rows, y long [n].

    They stay where they are, as on the host; parts of them go to the device.
    """

    x: Pixels
    y: Tensor
    note: str = ""  #: a sentence for the user, as on classes without images


@dataclass(frozen=True)
class Job:
    """All inputs of a run. `distill`, the command line and `compare` all make one.

    Attributes:
        config: the resolved config.
        teacher: any module from [0, 1] images to logits. Frozen in place.
        student: likewise; trained in place.
        image_shape: (C, H, W).
        unlabeled: uint8 [n, C, H, W] for a sampler, a tensor or rows.
        labels: true classes of `unlabeled`, long [n], for a source that distils with data.
        test: optional; reported on, never used to choose.
        contexts: test sets by which a planted context is measured.
        probes: data set -> its training and test images, for linear probes of the delivered student.
        foreign: another model that predicts M for the dictionary (KDCI Table 5).
        notes: sentences for the summary.
        choice: the choice of `--source auto`, if there was one.
        command: the command line that repeats this run.
        classes: the names of the classes, in the order of the logits, if they are known.
    """

    config: Distill
    teacher: nn.Module
    student: nn.Module
    image_shape: tuple[int, int, int]
    unlabeled: Pixels | None = None
    labels: Tensor | None = None
    test: Test | None = None
    contexts: tuple[Images, ...] = ()
    probes: Mapping[str, tuple[Images, Images]] = field(default_factory=dict)
    foreign: nn.Module | None = None
    notes: tuple[str, ...] = ()
    choice: Choice | None = None
    command: str = ""
    classes: tuple[str, ...] = ()

    def context(self, ranks: Ranks | None = None) -> Context:
        """The context for the run's parts: models on their device, streams, settings; `ranks`: the processes.

        Raises DodistillError for a teacher that the source cannot use, a student whose outputs do not fit the
        teacher's, and pads that do not fit the images.
        """
        config, loop = self.config, self.config.loop
        device = pick_device(loop.device)
        (ranks or Ranks()).require_device(device)
        teacher = self.teacher if isinstance(self.teacher, Teacher) else Teacher(self.teacher, self.image_shape)
        place(teacher, device)
        _check_source(config.source, teacher, self.unlabeled is not None)
        shift = 0 if config.augment.resizes else config.augment.pad
        for part, pad in (("augment", shift), ("view", config.view.pad)):
            if not 0 <= pad < min(teacher.image_shape[1:]):
                raise DodistillError(
                    f"{part}.pad is {pad} pixels; for images of {teacher.image_shape} it must lie between 0 and "
                    f"{min(teacher.image_shape[1:]) - 1}."
                )
        if self.unlabeled is not None and tuple(self.unlabeled.shape[1:]) != teacher.image_shape:
            raise DodistillError(
                f"the unlabelled images have shape {tuple(self.unlabeled.shape[1:])}, but the teacher reads "
                f"{teacher.image_shape}; resize them."
            )
        if self.test is not None:
            tested = Packed(rows_of(self.test.x), self.test.y)
            require_fit(tested, teacher.image_shape, teacher.num_classes, "the test set")
        student = _checked(place(self.student, device), teacher, device)
        extra = {FOREIGN: place(Teacher(self.foreign, self.image_shape), device)} if self.foreign is not None else {}
        return Context(
            teacher=teacher, device=device, seed=loop.seed, autocast=Precision(device, loop.precision),
            augment=config.augment, view=choose_view(config.view, teacher), unlabeled=_rows(self.unlabeled, device),
            labels=self.labels, student=student, capacity=config.pool.capacity, eviction=config.pool.eviction,
            extra=extra, ranks=ranks or Ranks(),
        )  # fmt: skip


def made_of(context: Context) -> dict[str, str]:
    """Fingerprints of the inputs that must not change between two starts. Student weights may differ; the architecture
    may not."""
    assert context.student is not None
    models = {"teacher": context.teacher, **context.extra}
    out = {k: fingerprint([*m.parameters(), *m.buffers()]) for k, m in models.items()}
    shapes = [(k, tuple(v.shape)) for k, v in context.student.state_dict().items()]
    out["student"] = hashlib.sha256(str(shapes).encode()).hexdigest()[:16]
    if context.unlabeled is not None:
        out["unlabelled images"] = context.unlabeled.fingerprint()
    if context.labels is not None:
        out["labels"] = fingerprint([context.labels])
    return out


def _rows(images: Pixels | None, device: torch.device) -> Rows | None:
    """The images as rows. A tensor moves to a GPU where it takes at most a quarter of its free memory."""
    if isinstance(images, Tensor) and device.type == "cuda" and 4 * images.nbytes <= torch.cuda.mem_get_info(device)[0]:
        images = images.to(device)
    return None if images is None else rows_of(images)


def require_same(began: Mapping[str, str] | None, mine: Mapping[str, str]) -> None:
    """Refuse to resume with another teacher, student or data than the run began with. `None`: the checkpoint predates
    fingerprints."""
    began = mine if began is None else began
    if other := sorted(k for k in began.keys() | mine.keys() if began.get(k) != mine.get(k)):
        raise DodistillError(
            f"this run began with other {' and other '.join(other)}; give the original, or choose another --out."
        )


def _check_source(source: SourceSettings, teacher: Teacher, has_unlabeled: bool) -> None:
    """Refuse a teacher that this source cannot use, and name the sources that can."""
    able = [n for n in registry.names("source") if teacher.has(registry.config("source", n).needs - {"unlabeled"})]
    for one in (*source.members.values(), source):
        teacher.require(one.needs - {"unlabeled"}, one.name, able)
    if "unlabeled" in source.needs and not has_unlabeled:
        raise DodistillError(
            f"source {source.name} needs unlabelled images; give --data.unlabeled FOLDER (or .npz, .npy), or in Python "
            "distill(..., unlabeled=images)."
        )


def require_kind(made: object, kind: type, settings: Settings) -> None:
    """Refuse an object of another kind returned by a choice's `Config.build`."""
    if not isinstance(made, kind):
        raise DodistillError(f"{settings.name}: Config.build must return {kind.__name__}, not {type(made).__name__}.")


def _checked(student: nn.Module, teacher: Teacher, device: torch.device) -> nn.Module:
    """The student, as a module that returns logits alone. Raises DodistillError for one that cannot be trained."""
    _check_parameters(student, teacher)
    return _answering(student, teacher, device)


def _check_parameters(student: nn.Module, teacher: Teacher) -> None:
    """The student must have parameters of its own that can be trained, and finite ones."""
    mine = dict(student.named_parameters())
    theirs = {p.data_ptr() for p in teacher.parameters()} - {0}  # 0: an empty tensor
    if shared := [n for n, p in mine.items() if p.data_ptr() in theirs]:
        raise DodistillError(f"student and teacher share parameters ({shared[0]}); give the student a copy of its own.")
    if not any(p.requires_grad for p in mine.values()):
        raise DodistillError("no parameter of the student requires a gradient; call student.requires_grad_(True).")
    if bad := [n for n, p in mine.items() if not bool(torch.isfinite(p).all())]:
        raise DodistillError(f"the student's parameter {bad[0]} contains NaN or infinity; give fresh weights.")


def _answering(student: nn.Module, teacher: Teacher, device: torch.device) -> nn.Module:
    """The student, wrapped in a module that returns its logits alone where it returns more. Refuses a student that does
    not take the teacher's images, or whose logits do not have the teacher's shape or have no gradient."""
    student.eval()
    shape = teacher.image_shape
    refused = f"the student cannot read images of shape {shape} (C, H, W)"
    with reworded(lambda e: f"{refused}: {e}; give a network for them."):
        out = student(torch.full((2, *shape), 0.5, device=device))
    student, out = answering(student, out, "the student")
    if out.shape != (2, teacher.num_classes):
        raise DodistillError(
            f"the student returns shape {tuple(out.shape)} for 2 images, but the teacher has {teacher.num_classes} "
            f"classes; build the student with num_classes={teacher.num_classes}."
        )
    if not out.requires_grad:
        raise DodistillError(
            "the student's logits have no gradient; remove torch.no_grad() or detach() from its forward."
        )
    return student
