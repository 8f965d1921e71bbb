"""The command line. Torch is imported by the commands that need it, so that help answers at once."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import STOPPED, Busy, DodistillError

_DISTILL = """examples:
  dodistill distill --teacher teacher.safetensors --student wrn16_1 --source fast --preset wrn --out runs/a
  dodistill distill --teacher wrn40_2 --teacher.weights t.pth --teacher.normalise cifar10 --image-shape 3,32,32 \\
      --student wrn16_1 --source dfnd --unlabeled folder/ --intervention kdci+stratified --out runs/b
every setting is a flag, --part.field VALUE; `dodistill distill --source NAME --intervention NAMES --help` lists them.
The same command started again goes on where it was stopped."""


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="dodistill",
        description="Distil a trained image classifier into a small one without its training data, under P(S | do(X)).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="start with: dodistill demo",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"dodistill {__version__}")
    sub = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, help: str, **more: Any) -> argparse.ArgumentParser:
        return sub.add_parser(
            name, help=help, description=help, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter, **more,
        )  # fmt: skip

    demo = add("demo", "the main job on bundled data, in minutes: three methods, with and without de-confounding")
    demo.add_argument("--out", default="runs/demo", help="folder for the runs and the report")
    demo.add_argument("--seed", type=int, default=0)

    add("distill", "distil a teacher into a student")  # its flags, and teach's, come from the config tree
    add("teach", "train a teacher (or a student on real data, the upper bound)")

    evaluate = add("evaluate", "score a model on labelled images, against a teacher, or by a probe on other data")
    evaluate.add_argument("model", help="a .safetensors that dodistill wrote, or a model spec with --weights")
    evaluate.add_argument("--weights")
    evaluate.add_argument("--image-shape", metavar="C,H,W", help="what the model reads, where its weights do not say")
    evaluate.add_argument("--normalise", metavar="NAME", help="its normalisation, where its weights do not say")
    evaluate.add_argument("--test", help="labelled images: .npz, folder, or a data set's name")
    evaluate.add_argument(
        "--crop-share", type=float, default=0.0, metavar="S", help="of images in folders, crop : short side "
        "(default: 0.875 from 160 pixels on, else 1)"
    )  # fmt: skip
    evaluate.add_argument("--probe", metavar="DATA", help="transfer: train a linear classifier on its frozen features")
    evaluate.add_argument("--teacher", help="another model, to report agreement with")
    evaluate.add_argument(
        "--calibrate", metavar="DATA", help="first take BatchNorm's statistics from unlabelled images"
    )
    evaluate.add_argument("--n", type=int, default=1000, help="so many of those images (default: 1000)")
    evaluate.add_argument("--out", metavar="FILE", help="write the calibrated model, .safetensors")

    compare = add("compare", "run a grid of methods with equal steps, seeds and teacher")
    compare.add_argument("recipe", help="YAML grid; see recipes/")
    compare.add_argument("--out", help="folder of the results (default: runs/NAME)")
    compare.add_argument("--jobs", type=int, default=1, help="cells side by side")
    compare.add_argument("--budget", help="stop cleanly after so long, as in 25m, 2h or 90s")
    compare.add_argument("--only", action="append", default=[], metavar="AXIS=LABEL", help="only these cells")
    compare.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    compare.add_argument(
        "--against", default="", metavar="AXIS=LABEL,...", help="also the change against this arm, paired by seed"
    )
    compare.add_argument(
        "--show", action="append", default=[], metavar="NAME", help="also a value logged at the end: kdci/F_over_S"
    )
    compare.add_argument("--dry-run", action="store_true", help="list the cells and what is done")
    compare.add_argument("--allow-code", action="store_true", help="let files of code that the recipe names run")

    report = add("report", "write report.html of a run folder again")
    report.add_argument("run")

    look = add("look", "runs beside real images: how far their data lie, what the students see, where they differ")
    look.add_argument("runs", nargs="+", metavar="RUN", help="run folders of one teacher")
    look.add_argument(
        "--test", required=True, metavar="DATA", help="labelled images: .npz, folder, or a data set's name"
    )
    look.add_argument("--teacher", default="", help="the teacher, where a run was given it in memory")
    look.add_argument("--n", type=int, default=1000, help="points in each map (default: 1000)")
    look.add_argument("--out", default="look.html", metavar="FILE", help="the page (default: look.html)")

    export = add("export", "write the pool of a run as images, or its student as ONNX")
    export.add_argument("run", help="a run folder, or for ONNX a .safetensors too")
    export.add_argument("target", help="a folder for the images, or FILE.onnx")

    methods = add("methods", "the sources: what they need, train, keep and cost; and the other axes")
    methods.add_argument("files", nargs="*", metavar="FILE.py", help="also the methods in these files, which are run")
    methods.add_argument("--cards", metavar="FOLDER", help="bring the cards in this folder up to date (docs/methods)")
    add("doctor", "what this machine has, and what is wrong with it")
    return top


def keep_memory() -> bool:
    """Ask glibc to keep what tensors have freed; False where there is no glibc, or the environment has settings for it.

    By default it goes back to the kernel after nearly every layer, and is mapped and zeroed anew, page by page, for the
    next one (benchmarks/allocator.py). Results do not depend on it.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    trim, pad, largest = -1, -2, -3  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD: malloc.h
    return all(mallopt(name, size) for name, size in ((largest, 32 << 20), (trim, (1 << 31) - 1), (pad, 64 << 20)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (0 done, 2 a mistake in what was asked, 75 try again)."""
    if arguments is None:  # a process of our own
        keep_memory()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] in (["distill"], ["teach"]):
            given = Given(arguments[1:])
            return (_distill if arguments[0] == "distill" else _teach)(given, arguments)
        known = _parser().parse_args(arguments)
        return int(globals()[f"_{known.command}"](known))
    except DodistillError as error:
        print(f"dodistill: {error}", file=sys.stderr)
        return STOPPED if isinstance(error, Busy) else 2
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130


class Given:
    """What follows `distill` or `teach`: perhaps one word, then flags of the config tree and the command's own."""

    def __init__(self, tokens: Sequence[str]) -> None:
        from ..config import flags

        tokens = ["--help" if t == "-h" else t for t in tokens]
        self.word = tokens[0] if tokens and not tokens[0].startswith("-") else None
        self.help = "--help" in tokens
        rest = [t for t in tokens[self.word is not None :] if t != "--help"]
        self._flags = flags.raw(rest)

    def own(self, name: str, default: Any) -> Any:
        """Take one of the command's own flags."""
        return self._flags.pop(name, default)

    def tree(self, short: bool = True) -> dict[str, Any]:
        """What is left, as a config tree."""
        from ..config import flags

        return flags.tree(self._flags, flags.SHORT if short else {})


# ------------------------------------------------------------------------------------------------ commands


def _demo(known: argparse.Namespace) -> int:
    from .demo import demo

    demo(Path(known.out), known.seed)
    return 0


def _recipe(path: str | None) -> dict[str, Any]:
    import yaml

    if path is None:
        return {}
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise DodistillError(f"cannot read recipe {path}: {error}") from error
    if not isinstance(tree, dict):
        raise DodistillError(f"recipe {path} must be a mapping of settings.")
    return tree


def _distill(given: Given, every: list[str]) -> int:
    from ..config.methods import asks
    from ..config.plugins import paths
    from ..config.tree import expand, merge, resolve

    if given.help:
        _distill_help(given.tree())
        return 0
    start = time.monotonic()
    out, quiet = given.own("out", None), given.own("quiet", False)
    report, seconds = not given.own("no_report", False), float(given.own("max_seconds", math.inf))
    anything, typed = bool(given.own("allow_code", False)), expand(given.tree())
    allowed = anything or paths(typed)  # code runs from a path that was typed, not from one that a recipe names
    tree, choice = merge(expand(_recipe(given.word)), typed), None
    if asks(tree):
        from ..api import choose_source

        tree, choice = choose_source(tree, seconds, out, allowed)
    config = resolve(tree, allow_code=allowed)
    from ..api import distill_config, shell_command

    out = str(out or f"runs/{config.source.name}-{config.intervention}-{config.key()}")
    result = distill_config(
        config, out, verbose=not quiet, deadline=start + seconds, command=shell_command(every), report=report,
        choice=choice,
    )  # fmt: skip
    if not result.summary.get("finished"):
        print(
            f"stopped at step {result.summary['step']} of {config.loop.steps}; the same command goes on.",
            file=sys.stderr,
        )
        return STOPPED
    _say(result.summary, Path(out))
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
    if "replay_memory_mb" in summary:
        print(f"replay     {summary['replay_memory_mb']:.2f} MB in memory and in each checkpoint")
    print(f"weights    {out / 'student.safetensors'}")
    if (out / "report.html").exists():
        print(f"report     {out / 'report.html'}")


def _distill_help(given: dict[str, Any]) -> None:
    from ..config import flags, registry
    from ..config import tree as c
    from ..config.methods import asks, choosing

    print(
        "usage: dodistill distill [RECIPE.yaml] [--out DIR] [--quiet] [--no-report] "
        "[--max-seconds S] [--allow-code] [--PART.FIELD VALUE ...]"
    )
    print(f"\n{_DISTILL}\n")
    print("short   " + "  ".join(f"--{k}" for k in flags.SHORT))
    print(f"--source        auto, {', '.join(registry.known('source'))}        --preset NAME")
    print(f"--intervention  none, {', '.join(registry.known('intervention'))}, or several joined by +")
    print(f"--criterion     {', '.join(registry.known('criterion'))}")
    print(f"--update        {', '.join(registry.known('update'))}")
    print(f"--replay        {', '.join(registry.known('replay'))}")
    print("or on each of these, the path of your own file: --source my_method.py (docs/tutorial.md)\n")
    if asks(given):
        print(choosing())
        return
    source, _ = c.chosen(c.expand(given), "source", "fast", allow_code=True)
    for part, cls in c.parts(given, allow_code=True).items():  # what was typed may run
        text = flags.help_of(cls, f"{part}.")
        if text:
            print(f"{part}{f' {source.name}' if part == 'source' else ''}\n{text}\n")
    presets, origin = c.config_of(source).presets, c.config_of(source).origin
    print(f"presets of source {source.name}\n" + "\n".join(f"  {p}: {origin.get(p, '')}" for p in presets))


def _teach(given: Given, _every: list[str]) -> int:
    from ..config import flags
    from ..config.tree import build
    from ..data.folder import crop_share
    from ..data.images import has_test, load_images, refuse_one_class
    from ..engine.run_folder import check_writable, load_tensors, save_tensors
    from ..engine.teach import Teach, teach
    from ..models import load_model, save_model
    from ..report.progress import Progress

    if given.help or not given.word:
        print(
            "usage: dodistill teach MODEL --data SPEC [--test SPEC] [--image-shape C,H,W] [--crop-share S] "
            "[--normalise NAME] [--out FILE] [--max-seconds S] [--FIELD VALUE]\n\n"
            "--image-shape is what images in folders are resized to. --crop-share is of test images in folders, crop : "
            "short side\n(default: 0.875 from 160 pixels on, else 1).\n"
        )
        print(flags.help_of(Teach, ""))
        return 0
    spec, tests, normalise = given.own("data", ""), given.own("test", ""), given.own("normalise", None)
    shape, share = _square(given.own("image_shape", None)), given.own("crop_share", 0.0)
    crop_share(share, 0)
    target = Path(str(given.own("out", "teacher.safetensors")))
    deadline = time.monotonic() + float(given.own("max_seconds", math.inf))
    if not spec:
        raise DodistillError("teach needs labelled images; give --data cifar10, a .npz, or a folder of class folders.")
    config = build(Teach, {**given.tree(short=False), "model": given.word}, "teach")
    check_writable(target)
    begun = target.with_suffix(".teaching.pt")
    resume = load_tensors(begun) if begun.exists() else None
    train, test, note = load_images(spec, image_shape=shape), None, ""
    refuse_one_class(train, spec)
    if tests or has_test(spec):
        try:
            test = load_images(tests or spec, split="test", image_shape=shape, crop=share)
            if test.y is None:
                raise DodistillError(f"the test images of {tests or spec} have no labels; accuracy needs them.")
            refuse_one_class(test, f"test images of {tests or spec}")
        except DodistillError as error:
            if tests:
                raise
            test, note = None, f"no accuracy on test images at the end: {error}"
    classes = config.num_classes or train.num_classes
    channels, size, _ = train.image_shape
    model = load_model(
        config.model, num_classes=classes, in_channels=channels, image_size=size, mean=normalise, seed=config.seed
    )
    from ..core.runtime import emulated, pick_device

    steps = config.epochs * max(1, int(len(train) * (1 - config.minival)) // config.batch)
    with Progress(steps, f"teach {config.model} on {spec}") as progress:

        def on_log(log: dict[str, Any]) -> None:
            progress.update(int(log["step"]), loss=float(log["loss"]), accuracy=float(log["minival"] or 0.0))

        if emulated(pick_device(), config.precision):
            progress.note("bf16 is emulated on this CPU, some ten times slower than fp32; use --precision fp32.")
        if note:
            progress.note(note)
        result = teach(
            model,
            train,
            test,
            config,
            on_log,
            pick_device(),
            resume,
            lambda state: save_tensors(begun, state),
            deadline,
            progress.update,
        )
    if not result.get("finished", True):
        print(f"stopped after epoch {result['epoch']} of {config.epochs}; the same command goes on.", file=sys.stderr)
        return STOPPED
    numbers = {k: v for k, v in result.items() if isinstance(v, int | float)}
    save_model(model, target, **numbers)
    begun.unlink(missing_ok=True)
    print(json.dumps(numbers))
    print(f"weights    {target}")
    return 0


def _square(given: Any) -> tuple[int, int, int] | None:
    """(C, H, W) from "3,32,32", or from a list of these; models here read square images."""
    if given is None:
        return None
    parts = given if isinstance(given, list) else str(given).split(",")
    if len(parts) != 3 or not all(str(p).strip().isdigit() for p in parts) or int(parts[1]) != int(parts[2]):
        raise DodistillError(f"--image-shape is {given!r}; it must be channels, height, width, as in 3,32,32 (square).")
    return int(parts[0]), int(parts[1]), int(parts[1])


def _evaluate(known: argparse.Namespace) -> int:
    import torch

    from ..api import parameters, shape_of
    from ..core.runtime import pick_device
    from ..data.folder import crop_share
    from ..data.images import Images, contexts_of, load_images, refuse_one_class
    from ..evaluation.evaluate import agreement, class_shares, expected_calibration_error, predict, top1
    from ..evaluation.probe import context_gap, linear_probe
    from ..models import load_model, save_model
    from ..models.batchnorm import calibrate

    if not (known.test or known.probe or known.calibrate):
        raise DodistillError("evaluate needs images: give --test DATA, --probe DATA or --calibrate DATA, or several.")
    if known.out and not known.calibrate:
        raise DodistillError(f"--out {known.out}: nothing would be changed; it belongs to --calibrate DATA.")
    if known.n < 2:
        raise DodistillError(f"--n is {known.n}; statistics need at least 2 images.")
    c, h, _ = _square(known.image_shape) or (None, None, None)
    model = load_model(known.model, weights=known.weights, mean=known.normalise, in_channels=c, image_size=h)
    shape, device = shape_of(model), pick_device()
    share = crop_share(known.crop_share, shape[1])
    model.to(device)

    def read(spec: str, split: str, labels: bool = True) -> Images:
        """All of them as test images are seen."""
        return load_images(spec, split, labels, shape, crop=share)

    images = read(known.calibrate, "train", labels=False) if known.calibrate else None
    probed = (read(known.probe, "train"), read(known.probe, "test")) if known.probe else ()
    test = read(known.test, "test") if known.test else None
    for some, spec in [(test, known.test), *((part, known.probe) for part in probed)]:
        if some is not None and some.y is None:
            raise DodistillError(f"{spec} has no labels; accuracy needs them.")
        if some is not None:
            refuse_one_class(some, spec)
    pair = [read(spec, "test") for spec in contexts_of(known.test or "")]
    teacher = load_model(known.teacher).to(device) if known.teacher and test is not None else None
    if images is not None:
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: known.n]
        calibrate(model, images.x[chosen])
        print(f"calibrated with {len(chosen):,} images of {known.calibrate}, labels unread")
        if known.out:
            print(f"weights    {save_model(model, known.out)}")
    if probed:
        found = linear_probe(model, *probed)
        print(f"probe      {found['test']:.2f} % on {known.probe} (train {found['train']:.2f} %), features frozen")
    if test is None or test.y is None:
        return 0
    logits = predict(model, test.x)
    print(f"model      {known.model}, {parameters(model):,} parameters")
    print(f"accuracy   {top1(logits, test.y):.2f} % of {len(test.x):,} images")
    print(f"ECE        {expected_calibration_error(logits, test.y):.4f}")
    shares = ", ".join(f"{100 * v:.1f}" for v in class_shares(logits).tolist()[:20])
    print(f"predicted class shares (%)  {shares}")
    if teacher is not None:
        other = predict(teacher, test.x)
        print(f"teacher    {top1(other, test.y):.2f} %, agreement {agreement(logits, other):.2f} %")
    if pair:
        said = ", ".join(f"{name} {score:.2f}" for name, score in context_gap(model, pair).items())
        print(f"context    accuracy in %: {said}")
    return 0


def _compare(known: argparse.Namespace) -> int:
    from .compare import compare

    return compare(
        Path(known.recipe), Path(known.out) if known.out else None, known.jobs, known.budget, known.only, known.table,
        known.dry_run, known.against, known.show, known.allow_code,
    )  # fmt: skip


def _report(known: argparse.Namespace) -> int:
    from ..report.report import write_report

    print(write_report(known.run))
    return 0


def _look(known: argparse.Namespace) -> int:
    from ..report.format import number
    from .look import look

    found = look(known.runs, known.test, known.out, known.teacher, known.n)
    wide = max(len(s.name) for s in found)
    print(f"{'':{wide}}  accuracy  silhouette  distance of its data (real from real)")
    for s in found:
        far = "" if s.distance is None or s.floor is None else f"{number(s.distance, 3)} ({number(s.floor, 3)})"
        print(f"{s.name:{wide}}  {s.accuracy:7.2f}%  {s.silhouette:10.3f}  {far}".rstrip())
    print(known.out)
    return 0


def _export(known: argparse.Namespace) -> int:
    from ..engine.run_folder import newest_pool
    from ..report.images import export_images

    if known.target.endswith(".onnx"):
        return _onnx(Path(known.run), Path(known.target))
    pool = newest_pool(Path(known.run))
    n = export_images(pool["x"], known.target, pool["logits"].argmax(1))
    print(f"{n} images in {known.target}, one folder for each class of the teacher's prediction")
    return 0


def _onnx(source: Path, target: Path) -> int:
    from ..api import shape_of
    from ..models import load_model
    from ..models.onnx import export_onnx

    weights = source / "student.safetensors" if source.is_dir() else source
    model = load_model(str(weights))
    print(export_onnx(model, target, shape_of(model)))
    return 0


def _methods(known: argparse.Namespace) -> int:
    from ..config.methods import pages, table

    if known.cards is None:
        print(table(known.files))
        return 0
    if not Path(known.cards).is_dir():
        raise DodistillError(f"--cards {known.cards}: no such folder; give that of the method cards, docs/methods.")
    for path, text in list(pages(Path(known.cards))):
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(path)
    return 0


def _doctor(_known: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor()


if __name__ == "__main__":
    sys.exit(main())
