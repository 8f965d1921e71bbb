"""The figures of a run's report. To add one, add an entry to `curves`; the kinds of plots are in plots.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import plots
from .canvas import Plot
from .shares import shares

Record = dict[str, Any]

HIDDEN = ("kind", "step", "steps", "seconds", "rate", "lr")  # keys of a log line without a curve
INERT = 0.02  # |F| / |S| below which the page notes that KDCI hardly acts


@dataclass(frozen=True)
class Figure:
    title: str
    note: str
    plot: Plot


def _series(records: Sequence[Record], key: str, name: str | None = None) -> plots.Series | None:
    rows = [(float(r["step"]), r[key]) for r in records if key in r]
    values = [float(v) if isinstance(v, int | float) else math.nan for _, v in rows]
    if not any(map(math.isfinite, values)):
        return None
    return plots.Series(name or key.rpartition("/")[2].replace("_", " "), [x for x, _ in rows], values)


def _in_percent(records: Sequence[Record], keys: Sequence[str]) -> list[Record]:
    """The shares, logged as fractions, in percent."""
    values = [r[k] for r in records for k in keys if isinstance(r.get(k), int | float)]
    scale = 100 if values and max(values) <= 1 else 1
    return [{**r, **{k: scale * r[k] for k in keys if isinstance(r.get(k), int | float)}} for r in records]


def _figure(
    title: str,
    name: str,
    records: Sequence[Record],
    keys: Mapping[str, str | None],
    note: str = "",
    *,
    y: str,
    log: bool | None = False,
    unit: str = "",
    reference: tuple[str, float] | None = None,
    zero: bool = False,
) -> Figure | None:
    """One figure of the curves `keys`: key in the log -> name. None without values.

    `y` labels the axis. `log=None` decides the scale: logarithmic for positive values over more than 1.5 decades.
    """
    series = [s for key, what in keys.items() if (s := _series(records, key, what)) is not None]
    if not series:
        return None
    if log is None:
        values = [v for s in series for v in s.y if math.isfinite(v)]
        log = min(values) > 0 and max(values) / min(values) > 30
    note = " ".join(t for t in (note, "Logarithmic scale." if log else "") if t)
    plot = plots.lines(name, series, y_label=y, log=log, unit=unit, reference=reference, zero=zero)
    return Figure(title, note, plot)


def curves(metrics: dict[str, list[Record]], summary: Record, clusters: int) -> list[Figure]:
    """The curves of a run, in the order of the page; curves without values are omitted."""
    log, evals, pools = metrics["log"], metrics["eval"], metrics["pool"]
    keys = list(dict.fromkeys(k for r in log for k in r if k not in HIDDEN))
    terms = [k for k in keys if k.startswith("match/")]
    total: dict[str, str | None] = {"loss": "total"} if "loss" in keys and len(terms) != 1 else {}
    teacher = summary.get("teacher_accuracy")
    bar = ("teacher", float(teacher)) if isinstance(teacher, int | float) else None
    most = [v for r in log if isinstance(v := r.get("kdci/attention_entropy_max"), float)]
    most = most or ([math.log(clusters)] if clusters > 1 else [])
    uniform = ("uniform", most[-1]) if most else None
    sides: dict[str, str | None] = {
        "kdci/agreement_with_F": "with F",
        "kdci/agreement_without_F": "without F",
        "kdci/agreement": "without F",
    }
    even = [
        {"step": r["step"], "pool": p.effective, "drawn": d.effective if d else math.nan}
        for r in pools
        if (p := shares(r.get("class_shares"))) is not None
        for d in [shares(r.get("drawn_shares"))]
    ]
    classes = len(pools[-1].get("class_shares") or []) if pools else 0
    shown = ("match/", "source/", "kdci/", "update/alignment")
    rest = [k for k in keys if k != "loss" and not k.startswith(shown)]
    found = [
        _figure(
            "Test accuracy",
            "test-accuracy",
            evals,
            {"test": "student", "test_ema": "EMA"},
            "On the given test set. No choice depends on it.",
            y="accuracy, %",
            unit=" %",
            reference=bar,
        ),
        _figure(
            "Agreement with the teacher",
            "agreement",
            evals,
            {"agreement": "student", "agreement_ema": "EMA"},
            "Share of held-back substitution inputs on which both predict the same class.",
            y="agreement, %",
            unit=" %",
        ),
        _figure(
            "Matching loss",
            "matching-loss",
            log,
            {**total, **{k: k.removeprefix("match/").replace("/", " ").replace("_", " ") for k in terms}},
            "The student's loss against the teacher.",
            y="loss",
            log=None,
        ),
        _figure(
            "Source terms",
            "source-terms",
            log,
            {k: None for k in keys if k.startswith("source/")},
            "The loss terms that the source minimises to make its inputs.",
            y="loss term",
            log=None,
        ),
        _figure(
            "Effective number of classes",
            "effective-classes",
            even,
            {"pool": "pool", "drawn": "as drawn"},
            "exp(entropy) of the class shares; higher is more even.",
            y="classes",
            zero=True,
            reference=("all equal", classes) if classes else None,
        ),
        _figure(
            "KDCI: size of the prior, |F| / |S|",
            "kdci-prior",
            log,
            {"kdci/F_over_S": "|F| / |S|", "kdci/F_over_S_centred": "centred over classes"},
            "Size of the added prior F relative to the student's logits S.",
            y="|F| / |S|",
            log=None,
        ),
        _figure(
            "KDCI: entropy of the attention",
            "kdci-attention",
            log,
            {"kdci/attention_entropy": "entropy"},
            "At the dotted line, all clusters have the same weight.",
            y="entropy, nats",
            reference=uniform,
        ),
        _figure(
            "KDCI: agreement with and without F",
            "kdci-agreement",
            _in_percent(log, list(sides)),
            sides,
            "With the teacher, on the training batch.",
            y="agreement, %",
            unit=" %",
        ),
        _figure(
            "Gradient alignment",
            "gradient-alignment",
            log,
            {"update/alignment": "cosine"},
            "Between the gradients on new and on replayed inputs. Below 0, a step on one raises the loss on the other.",
            y="cosine",
        ),
        _figure("Other terms", "other-terms", log, {k: k for k in rest}, y="value", log=None),
    ]
    return [f for f in found if f is not None]
