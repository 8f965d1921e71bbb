"""`report.html`: the inputs, the result and the curves of one run, on one offline page."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from ..engine.run_folder import names_of_run
from ..errors import DodistillError
from ..evaluation.monitor import CURVES, UNITS, courses, read_metrics
from ..evaluation.verdict import verdict
from ..files import read_object
from . import plots
from .card import BEST, LAST, compression, delivered, name_of, names_in, part, usage
from .classes import per_class
from .figures import INERT, Record, curves
from .page import render, write_figures
from .shares import advice, extremes, shares


def _json(path: Path) -> Record:
    """The object in the file; {} if there is no file, or a damaged one: the page shows what is left of a run."""
    try:
        return read_object(path, "") if path.exists() else {}
    except DodistillError:
        return {}


def _names(folder: Path) -> list[str]:
    """The names of the classes of a run that is not finished; [] if they are not known, or damaged."""
    try:
        return list(names_of_run(folder))
    except DodistillError:
        return []


def _png(path: Path) -> Markup | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or b"IEND" not in data[-16:]:
        return None
    return Markup("data:image/png;base64,{}").format(base64.b64encode(data).decode())


def _flat(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """Nested config -> rows of (dotted key, value)."""
    if isinstance(value, Mapping) and value:
        return [row for k, v in value.items() for row in _flat(v, f"{prefix}.{k}" if prefix else str(k))]
    return [(prefix, value if isinstance(value, str) and value else json.dumps(value, default=str))]


def _dictionary(found: Record) -> Record | None:
    P, Z = found.get("P"), found.get("Z")
    if not isinstance(P, list) or not P:
        return None
    sizes = shares(P)
    heat = plots.heatmap("dictionary-Z", Z, x_label="class", y_label="cluster", value="mean logit")
    bars = plots.bars(
        "dictionary-P", [("P(z)", P)], x_label="cluster", y_label="share of the pool, %", reference=("even", 1 / len(P))
    )
    return {
        "n": len(P),
        "bars": bars,
        "heat": heat if isinstance(Z, list) else None,
        "effective": sizes.effective if sizes else None,
        "empty": len(sizes.missing) if sizes else len(P),
    }


def _verdict(summary: Record, config: Record, metrics: Mapping[str, list[Record]], folder: Path) -> Record | None:
    """The finding on a student far below its teacher, from the files: the command fits what is left of the run."""
    goes_on = any((folder / name).exists() for name in ("checkpoint.pt", "previous.pt"))
    try:
        if not summary or not config:
            return None
        found = verdict(summary, config, metrics["eval"], metrics["log"], str(folder), goes_on)
    except (TypeError, AttributeError, KeyError, ValueError, DodistillError):  # a damaged summary
        return None
    return found.to_dict() if found is not None else None


def write_report(run_folder: str | Path, pdf: bool = True) -> Path:
    """Write `report.html` into a run folder, finished or not, from its files. Returns its path.

    With `pdf`, each figure is also written to `figures/` in the run folder (page.py).
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise DodistillError(f"there is no run folder {str(folder)!r}; give the folder that `dodistill distill` wrote.")
    config, summary = _json(folder / "config.json"), _json(folder / "summary.json")
    metrics = read_metrics(folder / "metrics.jsonl")
    if not config and not summary and not any(metrics.values()):
        raise DodistillError(
            f"{str(folder)!r} holds no run: neither config.json nor metrics.jsonl can be read; give a run folder."
        )
    last_eval: Record = metrics["eval"][-1] if metrics["eval"] else {}
    reached = max((r["step"] for records in metrics.values() for r in records), default=0)
    test = summary.get("student_accuracy", last_eval.get("test"))
    tests = [r["test"] for r in metrics["eval"] if isinstance(r.get("test"), int | float)]
    pool_record: Record = metrics["pool"][-1] if metrics["pool"] else {}
    pool, drawn = shares(pool_record.get("class_shares")), shares(pool_record.get("drawn_shares"))
    intervention = str(config.get("intervention") or "none")
    names = names_in(summary or {"classes": _names(folder)}, len(pool.values) if pool else 0)
    tone, sentences = advice(pool, drawn, intervention, names)
    groups = [(name, s.values) for name, s in (("pool", pool), ("as drawn", drawn)) if s is not None]
    even = ("even", 1 / len(pool.values)) if pool else None
    share_plot = plots.bars("class-shares", groups, x_label="class", reference=even, names=names) if pool else None
    dictionary = _dictionary(_json(folder / "dictionary.json"))
    agreements = [v for k in ("agreement", "agreement_ema") if isinstance(v := last_eval.get(k), int | float)]
    times = [r["seconds"] for r in metrics["log"] if isinstance(r.get("seconds"), int | float)]
    ratios = [r["kdci/F_over_S"] for r in metrics["log"] if isinstance(r.get("kdci/F_over_S"), int | float)]
    place = os.path.relpath(folder)
    place = folder.resolve().name if place.startswith("..") or place == "." else place
    python, shell = usage(place.replace(os.sep, "/"), summary, part(config, "student", "spec"))
    by_class = per_class(summary, folder / "student.safetensors")
    figures = curves(metrics, summary, dictionary["n"] if dictionary else 0)
    page = render(
        "report.html.j2",
        folder / "report.html",
        teacher=name_of(config, summary, "teacher"),
        student=name_of(config, summary, "student"),
        source=part(config, "source", "name") or "unknown source",
        intervention=intervention,
        summary=summary,
        finished=bool(summary),
        reached=reached,
        steps=part(config, "loop", "steps"),
        test=test,
        best=summary.get("best_on_test", max(tests, default=None)),
        agreement=summary.get("agreement", max(agreements, default=None)),
        seconds=summary.get("seconds", max(times, default=None)),
        compression=compression(summary),
        test_delivered=summary.get("delivered_accuracy") if summary.get("delivered") == "ema" else None,
        delivered=delivered(summary),
        verdict=_verdict(summary, config, metrics, folder),
        by_class=by_class,
        labels={"last": LAST, "best": BEST},
        python=python,
        shell=shell,
        command=str(summary.get("command") or config.get("command") or ""),
        curves=figures,
        courses=[c for c in courses(metrics["eval"]) if c["n"] > 1],
        course_names=CURVES,
        units=UNITS,
        samples=_png(folder / "samples.png"),
        pool=pool,
        drawn=drawn,
        pool_size=pool_record.get("size"),
        tone=tone,
        advice=sentences,
        share_plot=share_plot,
        extremes=extremes(pool, names) if pool and names else None,
        dictionary=dictionary,
        inert=bool(ratios) and ratios[-1] < INERT,
        last_ratio=ratios[-1] if ratios else None,
        config=_flat(config) if config else [],
        versions=summary.get("versions") if isinstance(summary.get("versions"), Mapping) else {},
        warnings=summary.get("warnings") or [],
        name=folder.resolve().name,
        pdf=pdf,
    )
    if pdf:
        of_dictionary = (dictionary["bars"], dictionary["heat"]) if dictionary else ()
        accuracies = by_class.plot if by_class is not None else None
        write_figures(page, (share_plot, accuracies, *(f.plot for f in figures), *of_dictionary))
    return page
