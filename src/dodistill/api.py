"""The main job: distils a teacher into a student, and writes the student's weights and a report."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from time import monotonic
from typing import Any

from torch import Tensor, nn

from .config import methods
from .config.checks import seconds_in
from .config.code import code_of
from .config.contracts import InterventionSettings, SourceSettings
from .config.plugins import Allow
from .config.tree import Distill, Tree, expand, merge, portable, resolve
from .core.launch import joined
from .core.precision import emulated
from .core.ranks import Ranks
from .core.runtime import limited_threads, pick_device
from .core.watch import Watcher, require_watchers
from .data.accept import accept, as_labels
from .data.classes import Given
from .data.images import Images, contexts_of, load_images, refuse_one_class, require_fit
from .data.labels import fitted
from .data.packed import Packed, open_images
from .engine import Distiller, Job, Test, budget
from .engine.longer import longer, restart_note
from .engine.normalisation import doubt
from .engine.run_folder import NoFolder, RunFolder
from .errors import DodistillError
from .evaluation.evaluate import predict, scores
from .evaluation.probe import feature_layer, halves
from .files import read_object
from .models import Normalized
from .models.configured import Shape, load_student, load_teacher, load_trained, names_for, shape_of
from .models.teacher import Teacher
from .report.delivery import model_name, outcome, result_again, result_of
from .report.progress import Progress
from .report.result import Recorder, Result, labelled
from .report.trackers import open_trackers, track_names


def _test(test: Any, teacher: Teacher, names: Sequence[str], what: str = "the test set") -> Test | None:
    """Labelled images in any form (`data.accept`), for a teacher of classes with these `names`. `what` names the images
    in errors."""
    if test is None or isinstance(test, Test):
        return test
    found = labelled(test, teacher.image_shape)
    refuse_one_class(test if isinstance(test, Images | Packed) else found, what)
    found = fitted(found, names, teacher.num_classes, what)
    assert found.y is not None
    return Test(found.x, found.y, found.note)


def evaluate(
    model: nn.Module,
    test: Any,
    *,
    teacher: nn.Module | None = None,
    image_shape: Shape | None = None,
    classes: Given | None = None,
) -> dict[str, Any]:
    """Measures of a classifier on labelled images.

    Args:
        model: from images [B, C, H, W] in [0, 1] to logits [B, K].
        test: (images, labels), a Dataset or DataLoader, what `load_images` returns, or a path or name of a data set.
        teacher: another model, for `agreement`.
        image_shape: (C, H, W); needed unless the model came from `load_model`.
        classes: names of the model's classes, in order, by which class folders are matched (see `load_model`); needed
            only if the model does not have them.

    Returns `{accuracy, ECE, class_shares, images}`, with a teacher also `{teacher, agreement}`; in percent, but for ECE
    and shares; and `note`, a sentence, for class folders without some of the classes. Raises DodistillError for images
    or labels that do not fit the model.
    """
    shape = image_shape or shape_of(model)
    images = labelled(test, shape)
    outputs = predict(model, images.x[:1]).shape[1]
    what = str(test) if isinstance(test, str | Path) else "the test set"
    images = fitted(images, names_for(model, outputs, classes), outputs, what)
    require_fit(images, shape, outputs, "the test set")
    return scores(model, images, teacher) | ({"note": images.note} if images.note else {})


def distill(
    teacher: nn.Module,
    student: nn.Module,
    source: str | Mapping[str, Any] | SourceSettings | type[SourceSettings] = "fast",
    intervention: str | InterventionSettings | tuple[str | InterventionSettings, ...] | None = None,
    *,
    image_shape: Shape | None = None,
    unlabeled: Any = None,
    labels: Tensor | None = None,
    test: Any = None,
    foreign: nn.Module | None = None,
    classes: Given | None = None,
    out: str | Path | None = None,
    verbose: bool = True,
    watchers: Sequence[Watcher] = (),
    track: str | Sequence[str] = "",
    allow_code: Allow = False,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    time: str | float | None = None,
    **settings: Any,
) -> Result:
    """Distil `teacher` into `student` without the teacher's training data.

    Args:
        teacher: any module from images [B, C, H, W] in [0, 1] to logits [B, K]. Frozen in place.
        student: likewise; trained in place. `models.Normalized(net, mean, std)` gives a network its normalisation.
        source: a source's name, or {"name": ..., setting: value}; `preset="desk"` in `settings` picks its preset.
            A config of your own, as in MySource(K=3), or its class; or the path of a file, with allow_code=True.
            "auto" or {"name": "auto", "seconds": 600}: chosen by teacher, images and time; the summary has the reason.
        intervention: none, kdci, stratified, cid, or several joined by +; None: that of the preset, else none. Or a
            config of your own, or a tuple of configs and names.
        image_shape: (C, H, W); needed unless the teacher came from `load_model`.
        unlabeled: images for a sampler, or the data set itself for source `data`: a tensor or array [n, C, H, W] or
            [n, H, W, C], uint8 or floats in [0, 1]; a torch Dataset or DataLoader; what `load_images` returns; a path
            or the name of a data set; `data.rows.FileRows` of a packed file.
        labels: [n] their true classes, for source `data`; without labels, the teacher's predictions replace them. Those
            that come with `unlabeled` are used if the source reads labels.
        test: labelled images in the same forms, or (images, labels); only reported on, never used to choose.
        foreign: another model that predicts the dictionary (KDCI Table 5).
        classes: the names of the teacher's classes, in order, if the teacher does not have them (see `load_model`).
            Class folders are matched by name, and the student inherits the names.
        out: the run folder; without one nothing is written, and nothing can be resumed.
        verbose: show progress on stderr.
        watchers: your own `Watcher`s; they receive every log, evaluation, pool description and warning.
        track: `tensorboard`, `wandb`, `trackio`, several joined by commas or as a list; needs `out`, which keeps the
            trackers' run ids. A tracker that fails ends with a warning, and the run goes on.
        allow_code: which code files named by `source` and `settings` may run: all (True), or those at these paths.
        steps, batch, lr, seed: short for loop={"steps": ..., "batch": ..., "seed": ...} and optim={"lr": ...}.
        time: limit for the whole run, as in "10m" or 600 (seconds): acquisitions and steps are fitted to it. Not with
            `steps`.
        settings: the rest of the config tree, as in loop={"steps": 500}, kdci={"scale": 2.0}, preset="desk",
            criterion=MyCriterion(), update="retain".

    Returns:
        Result with the student to ship (in eval mode), the summary, the folder and the history.

    Raises:
        DodistillError: for errors that can be detected before the first step, and for diverging losses.

    In a program that torchrun starts several times, all of these processes share the run (docs/scale.md). Each calls
    `distill` with the same arguments, and gets the result; the first one writes the folder and tells the watchers.
    """
    for name, model in (("teacher", teacher), ("student", student), ("foreign", foreign)):
        if not isinstance(model, nn.Module) and not (name == "foreign" and model is None):
            raise DodistillError(f"{name} is {model!r}; it must be a torch.nn.Module, as load_model(NAME) returns.")
    require_watchers(watchers)
    began = monotonic()
    track = track_names(track)
    chosen = {} if intervention is None else {"intervention": intervention}
    short = {"loop.steps": steps, "loop.batch": batch, "optim.lr": lr, "loop.seed": seed,
             "loop.time": time if time is None else str(time)}  # fmt: skip
    given = expand(settings)
    for name, value in short.items():
        part, _, key = name.partition(".")
        if value is not None and isinstance(given.get(part), Mapping) and key in given[part]:
            raise DodistillError(f"{key}={value} and {part}={{{key!r}: {given[part][key]}}} are both given; give one.")
    given = merge(given, expand({k: v for k, v in short.items() if v is not None}))
    require_one_length(given)
    tree, choice = {**given, "source": source, **chosen}, None
    with joined() as ranks:
        if methods.asks(tree):
            wrapped = Teacher(teacher, image_shape or shape_of(teacher, "the teacher"))
            auto = tree
            tree, choice = ranks.share(lambda: settle(auto, wrapped, unlabeled is not None, time_in(auto)))
            teacher, image_shape = wrapped, wrapped.image_shape
        config = resolve(tree, allow_code=allow_code)
        ranks.require_same(lambda: _settings(config))
        job = _job(config, teacher, student, image_shape, unlabeled, labels, test, foreign, classes, choice)
        return run(job, out, verbose, watchers=watchers, began=began, track=track, ranks=ranks)


def _job(
    config: Distill, teacher: nn.Module, student: nn.Module, image_shape: Shape | None, unlabeled: Any, labels: Any,
    test: Any, foreign: nn.Module | None, classes: Given | None, choice: methods.Choice | None,
) -> Job:  # fmt: skip
    """The job of `distill`, whose arguments these are."""
    shape = image_shape or shape_of(teacher, "the teacher")
    if labels is not None and not config.source.reads_labels:
        raise DodistillError(f"source {config.source.name} reads no labels; remove `labels`, or use source data.")
    if labels is not None and unlabeled is None:
        raise DodistillError("labels are given without images; give unlabeled=images, too.")
    teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher, shape)
    names = names_for(teacher, teacher.num_classes, classes)
    pixels = y = None
    notes = []
    if unlabeled is not None:
        found = accept(unlabeled, shape, "unlabelled", labels=config.source.reads_labels and labels is None)
        found = fitted(found, names, teacher.num_classes, "the unlabelled images")
        pixels, y = found.x, found.y if labels is None else as_labels(labels, len(found))
        notes += [found.note] if found.note else []
    tested = _test(test, teacher, names)
    return Job(
        config, teacher, student, shape, unlabeled=pixels, labels=y, test=tested, probes=_probes(config, shape),
        foreign=foreign, notes=tuple(notes), choice=choice, classes=names,
    )  # fmt: skip


def _probes(config: Distill, shape: Shape) -> dict[str, tuple[Images, Images]]:
    """The images of `data.probe`, by the last name of their path."""
    return {Path(spec).name: halves(spec, shape, config.data.crop_share) for spec in config.data.probe}


def time_in(tree: Mapping[str, Any]) -> float:
    """The time limit in a config tree, `loop.time`, in seconds; infinity without one."""
    loop = expand(tree).get("loop")
    return seconds_in(str(loop.get("time") or "") if isinstance(loop, Mapping) else "", "loop.time")


def require_one_length(given: Mapping[str, Any]) -> None:
    """Refuse settings that give both the steps and the time of a run."""
    loop = expand(given).get("loop")
    if isinstance(loop, Mapping) and loop.get("time") and loop.get("steps") is not None:
        raise DodistillError(
            f"steps {loop['steps']} and time {loop['time']} are both given; give one: with a time, the steps are "
            "fitted to it."
        )


def settle(
    tree: Mapping[str, Any],
    teacher: Teacher,
    unlabeled: bool,
    seconds: float = float("inf"),
    out: Any = None,
    device: str = "auto",
) -> tuple[Tree, methods.Choice]:
    """The tree with source `auto` replaced by the choice for this teacher. An existing run folder keeps its source."""
    rate = budget.answer_rate(teacher, pick_device(device)) if math.isfinite(seconds) else math.inf
    path = None if out is None else Path(out) / "config.json"
    begun = read_object(path, "choose another --out") if path is not None and path.exists() else None
    return methods.settle(tree, teacher.has_batchnorm, unlabeled, seconds, teacher.image_shape, begun, rate)


def choose_source(
    tree: Mapping[str, Any], seconds: float, out: str | None, allow_code: Allow = False
) -> tuple[Tree, methods.Choice]:
    """`settle` for a tree alone, as on the command line: loads the teacher to inspect it."""
    others = {k: v for k, v in expand(tree).items() if k not in ("source", "preset")}
    config = resolve(others, allow_code=allow_code)
    teacher = Teacher(*load_teacher(config.teacher, config.data.image_shape, allow_code=allow_code))
    return settle(tree, teacher, bool(config.data.unlabeled), seconds, out, config.loop.device)


def distill_config(config: Distill, out: str | Path | None, verbose: bool = True, deadline: float = float("inf"),
                   command: str = "", report: bool = True, choice: methods.Choice | None = None,
                   began: float | None = None, track: str | Sequence[str] = "",
                   allow_code: Allow = False, ranks: Ranks | None = None) -> Result:  # fmt: skip
    """`distill` from a config alone, which names the models and data. The command line calls this function.

    `began`: the start of the command in time.monotonic(), from which `loop.time` counts; None: now. `allow_code`: which
    code may run that files of weights name as their network; see `load_model`. `ranks`: the processes that share the
    run; the first one alone has the folder.
    """
    track = track_names(track)
    began = monotonic() if began is None else began
    ranks = ranks or Ranks()
    ranks.require_same(lambda: _settings(config))
    config = _continued(config, out, ranks)
    if out is not None:  # refuse a foreign folder before anything heavy is loaded
        ranks.share(lambda: RunFolder(out, budget.begun(config, out), create=False) and None)
    teacher, shape = load_teacher(config.teacher, config.data.image_shape, allow_code=allow_code)
    wrapped = Teacher(teacher, shape)
    names = names_for(teacher, wrapped.num_classes)
    student = load_student(config.student, teacher, wrapped.num_classes, shape, config.loop.seed, allow_code)
    unlabeled = labels = None
    notes = []
    source = config.source
    if config.data.unlabeled and (source.kind in ("sampler", "data") or "unlabeled" in source.needs):
        found = open_images(config.data.unlabeled, labels=config.source.reads_labels, image_shape=shape)
        refuse_one_class(found, config.data.unlabeled)
        found = fitted(found, names, wrapped.num_classes, config.data.unlabeled)
        unlabeled, labels = found.x, found.y
        notes += [found.note] if found.note else []
    test = None
    if config.data.test:
        images = open_images(config.data.test, split="test", image_shape=shape, crop=config.data.crop_share)
        test = _test(images, wrapped, names, config.data.test)
    contexts = [
        fitted(
            load_images(spec, split="test", image_shape=shape, crop=config.data.crop_share),
            names, wrapped.num_classes, spec,
        )
        for spec in contexts_of(config.data.test)
    ]  # fmt: skip
    foreign = None
    if config.data.foreign.spec:
        foreign = load_trained(config.data.foreign, shape, "--data.foreign.", allow_code)
    job = Job(
        config, wrapped, student, shape, unlabeled=unlabeled, labels=labels, test=test, contexts=tuple(contexts),
        probes=_probes(config, shape), foreign=foreign, notes=tuple(notes), choice=choice, command=command,
        classes=names,
    )  # fmt: skip
    return run(job, out, verbose, deadline, report, began=began, track=track, ranks=ranks)


def _settings(config: Distill) -> Tree:
    """The settings that the processes of a run must have in common."""
    tree = portable(config.to_tree())
    return tree | {"loop": {k: v for k, v in tree["loop"].items() if k not in ("device", "threads")}}


def _continued(config: Distill, out: str | Path | None, ranks: Ranks) -> Distill:
    """The config as it continues the run in `out`, which may be trained longer."""
    if config.loop.time:
        return config
    restarts = ranks.share(lambda: longer(out, config).loop.restarts)
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, restarts=restarts))


def run(
    job: Job,
    out: str | Path | None = None,
    verbose: bool = True,
    deadline: float = float("inf"),
    report: bool = True,
    watchers: Sequence[Watcher] = (),
    began: float | None = None,
    track: str | Sequence[str] = "",
    ranks: Ranks | None = None,
) -> Result:
    """Build, run (or resume), and write the results to the folder. A finished run is not repeated.

    `began`: the time.monotonic() from which `loop.time` counts; None: now. `ranks`: the processes that share the run;
    on all but the first one `out`, `watchers` and the like mean nothing.
    """
    with limited_threads(job.config.loop.threads):
        plan, record, ranks = None, None, ranks or Ranks()
        if not ranks.first:
            out, verbose, report, watchers, track = None, False, False, (), ()
        if job.config.loop.time:
            fit = budget.fit(job, out, monotonic() if began is None else began, ranks)
            job, plan, record = fit.job, fit.plan, fit.record
        else:
            job = dataclasses.replace(job, config=_continued(job.config, out, ranks))
        config = job.config
        if job.classes and isinstance(job.student, Normalized):
            job.student.spec["classes"] = job.classes
        names = f"{model_name(config.teacher, job.teacher)} -> {model_name(config.student, job.student)}"
        title = f"{config.source.name} + {config.intervention}: {names}"
        it = Distiller(job, plan, ranks)
        if job.probes:
            try:
                feature_layer(it.matcher.student)
            except DodistillError as error:  # now, not after the last step
                raise DodistillError(f"data.probe reads the student's features: {error} Remove data.probe.") from error
        folder: RunFolder | NoFolder = NoFolder()

        def opened() -> None:
            nonlocal folder
            folder = NoFolder() if out is None else RunFolder(out, config, plan=record, classes=job.classes)

        ranks.share(opened)  # after all checks, so that an error leaves no folder behind
        try:
            if (done := ranks.share(folder.summary)) is not None:
                if verbose:
                    Progress(it.plan.steps, title).rest(done.get("warnings") or [])
                return result_again(it, folder, done, report)
            return _run(it, folder, title if verbose else "", deadline, report, watchers, track)
        except BaseException:
            if not it.acquirer.round:  # nothing was computed
                folder.abandon()
            raise
        finally:
            folder.close()


def _run(
    it: Distiller, folder: RunFolder | NoFolder, title: str, deadline: float, report: bool, watchers: Sequence[Watcher],
    track: str | Sequence[str],
) -> Result:  # fmt: skip
    """Run to the end or to the deadline, and deliver. An empty title: no progress is shown."""
    job, config = it.job, it.config
    tested = [job.test.note] if job.test is not None and job.test.note else []
    said = [*job.notes, *tested, *config.clashes, *it.acquirer.source.notes]
    said += [text] if (text := doubt(it.context.teacher.model, it.context.image_shape)) else []
    if emulated(it.context.device, config.loop.precision):
        said.append("bf16 is emulated on this CPU, about ten times slower than fp32; use --loop.precision fp32.")
    said += [text] if (text := restart_note(config)) else []
    code = code_of(config)  # now, not at the end: a file may be edited meanwhile
    recorder = Recorder()
    with Progress(it.plan.steps, title) if title else nullcontext(Watcher()) as progress:
        trackers = open_trackers(track, folder.path, config, progress.on_note)
        for note in [*([str(job.choice)] if job.choice is not None else []), *said]:
            for part in (progress, *trackers):
                part.on_note(note)
        finished = it.run(folder, [progress, recorder, *trackers, *watchers], deadline)
    if len(it.devices) > 1:
        said.append(f"this run has moved ({' -> '.join(it.devices)}): its streams of random numbers began anew there.")
    said += [*folder.notes, *(part.failure for part in trackers if part.failure)]
    if not finished:
        reached = {"finished": False, "step": it.step, "steps": it.plan.steps, "stopped": it.stopped}
        return result_of(it, it.matcher.student.eval(), reached, folder, recorder.history)
    which = it.ranks.share(lambda: it.scorer.delivered()[0])
    best = it.scorer.shipped(which)
    summary = it.ranks.share(lambda: outcome(it, which, best, said, code, recorder, folder, report))
    if isinstance(progress, Progress):
        progress.rest(summary["warnings"])
    return result_of(it, best, summary, folder, recorder.history)


def shell_command(arguments: list[str]) -> str:
    """The command line that repeats this run."""
    return shlex.join(["dodistill", *arguments])
