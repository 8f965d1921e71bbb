"""What a run delivers: its result, its summary and the files in its folder, at its end and when it is opened again."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..config import methods
from ..config.tree import Distill, Model
from ..core.runtime import peak_memory_mb
from ..data.images import Images
from ..engine import Distiller
from ..engine.inputs import Inputs, read_inputs, sample, write_inputs
from ..engine.job import require_same
from ..engine.loop import FORMAT
from ..engine.run_folder import NoFolder, RunFolder, fingerprint, write_atomically
from ..errors import DodistillError
from ..evaluation.latency import cpu_name
from ..evaluation.monitor import courses, flat, read_metrics
from ..evaluation.probe import context_gap, linear_probe
from ..evaluation.verdict import verdict
from ..interventions.shared.base import Compensated
from ..models import Normalized, save_model
from ..models.weights import load_saved
from .card import model_card
from .images import save_grid
from .loading import described
from .more_time import more_time
from .report import write_report
from .result import History, Recorder, Result, read_history


def parameters(model: nn.Module) -> int:
    """The number of parameters of a model, trainable and frozen."""
    return sum(p.numel() for p in model.parameters())


def result_of(
    it: Distiller, student: nn.Module, summary: dict[str, Any], folder: RunFolder | NoFolder, recorded: History
) -> Result:
    pool = it.acquirer.pool
    some = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:64].to(pool.device)
    history = recorded if folder.path is None else read_history(folder.path)
    kept = _kept(it) if len(pool) else None if folder.path is None else read_inputs(folder.path)
    return Result(student, summary, folder.path, history, pool.x[some].cpu(), it.context.image_shape, kept)


def _kept(it: Distiller) -> Inputs:
    pool, held = it.acquirer.pool, it.acquirer.holdout
    return sample(pool.x, pool.logits, held.x, held.logits)


def time_used(it: Distiller, history: History) -> dict[str, Any]:
    """The time limit of a run, the time that it used, and what more time would change."""
    c = it.config
    longer = None
    if it.job.choice is not None:
        shape, given = it.context.image_shape, it.job.unlabeled is not None
        rate = it.job.choice.rate
        longer = methods.longer(it.context.teacher.has_batchnorm, given, it.plan.seconds, shape, rate)
    held = len(it.acquirer.holdout)
    more = more_time(history.curve("agreement"), it.step, c.source, c.loop.batch, it.acquirer.pool.seen, held, longer)
    return {"limit": it.plan.seconds, "used": round(it.plan.used(), 1), "more": more}


def model_name(part: Model, model: nn.Module) -> str:
    """The name of a model: its spec if known (a saved file contains it), else its class."""
    while True:
        known = getattr(model, "spec", None) or {}
        if known.get("spec"):
            return str(known["spec"])
        inner = getattr(model, "model", None)
        if not isinstance(inner, nn.Module):
            return part.spec or type(model).__name__
        model = inner


def summary_of(it: Distiller, which: str, notes: list[str]) -> dict[str, Any]:
    job, config, acquirer = it.job, it.config, it.acquirer
    device, score, shares = it.context.device, it.scorer.last, acquirer.pool.class_shares()
    summary: dict[str, Any] = {
        "agreement": score["agreement_ema" if which == "ema" else "agreement"],
        "agreement_last": score["agreement"],
        "delivered": which,
        "view": str(it.context.view),
        "views": acquirer.views.reason,
        "precision": it.context.autocast.reason,
        "compiled": it.compiled.reason,
        "teacher_name": model_name(config.teacher, job.teacher),
        "student_name": model_name(config.student, it.matcher.student),
        "student_parameters": parameters(it.matcher.student),
        "teacher_parameters": parameters(job.teacher),
        "teacher_batchnorm": it.context.teacher.has_batchnorm,
        "image_shape": list(it.context.image_shape),
        **({"classes": list(job.classes)} if job.classes else {}),
        "steps": it.step,
        "images": acquirer.pool.seen,
        "class_shares": [round(v, 5) for v in shares.tolist()],
        "drawn_shares": [round(v, 5) for v in acquirer.sampler.shares(acquirer.pool).tolist()],
        "seconds": round(it.clock.seconds, 2),
        "acquire_seconds": round(acquirer.seconds, 2),
        "match_seconds": round(it.clock.seconds - acquirer.seconds, 2),
        "peak_memory_mb": peak_memory_mb(device),
        **({} if config.replay.name == "none" else {"replay_memory_mb": round(acquirer.replay.memory / 2**20, 3)}),
        "log": {k: float(f"{v:.6g}") for k, v in it.meter.last.items()},
        "command": job.command,
        "key": config.key(),
        "made_of": it.made_of,
        "versions": {"dodistill": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": _machine(device),
        "warnings": notes,
        "finished": True,
    }
    summary |= it.scorer.explained(which)
    if it.scorer.test is not None:
        summary["student_accuracy"] = score["test"]
        summary["delivered_accuracy"] = score["test_ema" if which == "ema" else "test"]
        summary["best_on_test"] = it.scorer.best_on_test
    if config.loop.restarts:
        summary["restarts"] = list(config.loop.restarts)
    if job.choice is not None:
        summary["choice"] = str(job.choice)
    return summary


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} thread(s)"


def save_student(best: nn.Module, path: Path, summary: Mapping[str, Any]) -> None:
    bare = best.student if isinstance(best, Compensated) else best
    known: dict[str, Any] = {"classes": summary["classes"]} if "classes" in summary else {}
    if not (isinstance(bare, Normalized) and bare.spec.get("spec")) and "image_shape" in summary:
        channels, height, width = summary["image_shape"]  # for whoever builds the network again
        known |= {"class": described(bare)["class"], "num_classes": len(summary["class_shares"])}
        known |= {"in_channels": channels, "image_size": height if height == width else [height, width]}
        if not isinstance(bare, Normalized):
            known |= {"mean": [0.0], "std": [1.0]}
    save_model(bare, path, agreement=summary["agreement"], key=summary["key"], **known)


def deliver(it: Distiller, best: nn.Module, folder: RunFolder, summary: dict[str, Any], report: bool) -> None:
    path = folder.path
    pool, dictionary = it.acquirer.pool, it.acquirer.dictionary
    save_student(best, path / "student.safetensors", summary)
    n = min(64, len(pool))
    index = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:n]
    save_grid(pool.x[index.to(pool.device)].cpu(), path / "samples.png")
    write_inputs(path, _kept(it))
    if dictionary is not None:
        folder.write_json("dictionary.json", {"P": dictionary.P.tolist(), "Z": dictionary.Z.tolist()})
    write_outcome(folder, it.config, summary, report)


def write_outcome(folder: RunFolder, config: Distill, summary: Mapping[str, Any], report: bool) -> None:
    """Write the summary, and what is made of it: the model card, and with `report` the report."""
    write_atomically(folder.path / "README.md", model_card(config.to_tree(), summary).encode())
    folder.write_json("summary.json", summary)
    if report:
        write_report(folder.path, pdf=False)


def outcome(
    it: Distiller, which: str, best: nn.Module, said: list[str], code: dict[str, str], recorder: Recorder,
    folder: RunFolder | NoFolder, report: bool,
) -> dict[str, Any]:  # fmt: skip
    """The summary of a run that has ended, written to its folder with the student and the report."""
    job, config = it.job, it.config
    if isinstance(best, Compensated):
        said.append(
            "at_test: the accuracies are those of the student with F(z), which is result.student in Python; "
            "student.safetensors contains the network without F(z)."
        )
    said += [f"{symptom}: {text}" for symptom, text in it.meter.warnings.items()]
    summary = summary_of(it, which, said) | {"code": code}
    summary["student"] = described(best.student if isinstance(best, Compensated) else best)
    if not isinstance(best, Compensated):
        summary["student_parameters"] = parameters(best)  # including a head that an intervention added
    if job.contexts:
        for name, model in (("test", best), ("teacher", it.context.teacher)):
            gap = context_gap(model, job.contexts, it.context.autocast)
            summary["log"] |= {f"{name}/{k}": round(v, 4) for k, v in gap.items()}
    history = recorder.history if folder.path is None else read_history(folder.path)
    if it.plan.limited:
        summary["time"] = time_used(it, history)  # probes come after the time limit, as they change no student
    summary |= _probed(it, best, summary)
    if isinstance(folder, RunFolder):
        summary["course"] = courses(read_metrics(folder.path / "metrics.jsonl")["eval"])
        summary["log"] |= flat(summary["course"])
    found = verdict(summary, config.to_tree(), history.of("eval"), history.of("log"), str(folder.path or ""))
    if found is not None:
        summary["verdict"] = found.to_dict()
    if isinstance(folder, RunFolder):
        deliver(it, best, folder, summary, report)
    return summary


def _probed(it: Distiller, best: nn.Module, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the linear probes that a summary lacks add to it: `probe`, data set -> accuracy in %, `probe_images`, data
    set -> fingerprint of its images, and `log`. Empty if it lacks none."""
    bare = best.student if isinstance(best, Compensated) else best
    known, read = dict(summary.get("probe") or {}), dict(summary.get("probe_images") or {})
    images = {name: _fingerprint(pair) for name, pair in it.job.probes.items()}
    new = [name for name in images if name not in known or read.get(name) != images[name]]
    if not new:
        return {}
    for name in new:
        found = linear_probe(bare, *it.job.probes[name], autocast=it.context.autocast)
        known[name], read[name] = round(found["test"], 4), images[name]
    log = {**(summary.get("log") or {}), **{f"probe/{name}": value for name, value in known.items()}}
    return {"probe": known, "probe_images": read, "log": log}


def _fingerprint(pair: tuple[Images, Images]) -> str:
    """Of the images and labels of both splits."""
    return fingerprint([v for part in pair for v in (part.x, part.y) if v is not None])


def result_again(it: Distiller, folder: RunFolder | NoFolder, done: dict[str, Any], report: bool) -> Result:
    """The result in a finished run folder, without recomputation; only probes that are new are computed."""
    require_same(done.get("made_of"), it.made_of)
    saved = it.ranks.share(folder.newest)
    complete = saved is not None and saved[0].get("format") == FORMAT
    if saved is not None and complete:
        it.load_state_dict(*saved)
        best = it.scorer.shipped(done["delivered"])
    else:
        it.ranks.share(lambda: _kept_student(it, folder))
        it.ranks.alike(it.matcher.student)
        best = it.matcher.student.eval()
    if new := it.ranks.share(lambda: _probed(it, best, done)):
        done |= new
        if isinstance(folder, RunFolder):
            write_outcome(folder, it.config, done, report)
    if isinstance(folder, RunFolder) and complete:
        kept = folder.path / "student.safetensors"
        if not kept.exists():
            save_student(best, kept, done)
        if report and not (folder.path / "report.html").exists():  # stopped while it was written
            write_report(folder.path, pdf=False)
    return result_of(it, best, done, folder, History())


def _kept_student(it: Distiller, folder: RunFolder | NoFolder) -> None:
    """Load the delivered weights of a run whose checkpoints were deleted, or written by an older version."""
    kept = (folder.path or Path()) / "student.safetensors"
    if kept.exists():
        load_saved(it.matcher.student, kept)
        return
    raise DodistillError(f"the run in {folder.path} is finished, but has no student.safetensors; choose another --out.")
