"""What the report says of a run's numbers: its curves, and how evenly the classes appear."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import svg
from .format import number

Record = dict[str, Any]

HIDDEN = ("kind", "step", "seconds", "rate", "lr")  # of a log line: not a curve of its own
SKEWED = 5.0  # max:min above which a reader is warned
INERT = 0.02  # |F| / |S| below which a reader is told that KDCI hardly acts


@dataclass(frozen=True)
class Shares:
    """How evenly classes appear. `effective` is exp(entropy): K where all are equal, 1 where there is but one."""

    values: list[float]
    ratio: float
    effective: float
    missing: list[int]

    @property
    def skewed(self) -> bool:
        return bool(self.missing) or self.ratio > SKEWED

    @property
    def ratio_text(self) -> str:
        return "∞" if math.isinf(self.ratio) else f"{number(self.ratio, 3)}:1"


def shares(values: object) -> Shares | None:
    """None where there are no proportions to speak of."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        return None
    kept = [float(v) if isinstance(v, int | float) and math.isfinite(v) and v > 0 else 0.0 for v in values]
    total = sum(kept)
    if total <= 0:
        return None
    kept = [v / total for v in kept]
    entropy = -sum(v * math.log(v) for v in kept if v > 0)
    ratio = max(kept) / min(kept) if min(kept) > 0 else math.inf
    return Shares(kept, ratio, math.exp(entropy), [k for k, v in enumerate(kept) if v == 0])


def _series(records: Sequence[Record], key: str, name: str | None = None) -> svg.Series | None:
    rows = [(float(r["step"]), r[key]) for r in records if key in r]
    values = [float(v) if isinstance(v, int | float) else math.nan for _, v in rows]
    if not any(map(math.isfinite, values)):
        return None
    return svg.Series(name or key.rpartition("/")[2].replace("_", " "), [x for x, _ in rows], values)


def _in_percent(records: Sequence[Record], keys: Sequence[str]) -> list[Record]:
    """The same shares in percent where they were logged as fractions."""
    values = [r[k] for r in records for k in keys if isinstance(r.get(k), int | float)]
    scale = 100 if values and max(values) <= 1 else 1
    return [{**r, **{k: scale * r[k] for k in keys if isinstance(r.get(k), int | float)}} for r in records]


def _plot(
    title: str,
    records: Sequence[Record],
    keys: Mapping[str, str | None],
    note: str = "",
    *,
    log: bool | None = False,
    unit: str = "",
    reference: tuple[str, float] | None = None,
    zero: bool = False,
) -> Record | None:
    """One figure; `log=None` decides: positive values over more than a decade and a half."""
    series = [s for key, name in keys.items() if (s := _series(records, key, name)) is not None]
    if not series:
        return None
    if log is None:
        values = [v for s in series for v in s.y if math.isfinite(v)]
        log = min(values) > 0 and max(values) / min(values) > 30
    note = " ".join(t for t in (note, "Logarithmic scale." if log else "") if t)
    return {
        "title": title,
        "note": note,
        "plot": svg.line_plot(series, log=log, unit=unit, reference=reference, zero=zero),
    }


def curves(metrics: dict[str, list[Record]], summary: Record, clusters: int) -> list[Record]:
    """The figures of a run, in the order of the page; one without values is left out."""
    log, evals, pools = metrics["log"], metrics["eval"], metrics["pool"]
    keys = list(dict.fromkeys(k for r in log for k in r if k not in HIDDEN))
    terms = [k for k in keys if k.startswith("match/")]
    total: dict[str, str | None] = {"loss": "total"} if "loss" in keys and len(terms) != 1 else {}
    teacher = summary.get("teacher_accuracy")
    bar = ("teacher", float(teacher)) if isinstance(teacher, int | float) else None
    most = [v for r in log if isinstance(v := r.get("kdci/attention_entropy_max"), float)]
    most = most or ([math.log(clusters)] if clusters > 1 else [])
    uniform = ("even attention", most[-1]) if most else None
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
        _plot(
            "Test accuracy",
            evals,
            {"test": "student", "test_ema": "EMA"},
            "On the test set that was handed over; it chose nothing.",
            unit=" %",
            reference=bar,
        ),
        _plot(
            "Agreement with the teacher",
            evals,
            {"agreement": "student", "agreement_ema": "EMA"},
            "How often both name the same class, on held-back inputs.",
            unit=" %",
        ),
        _plot(
            "Matching loss",
            log,
            {**total, **{k: k.removeprefix("match/").replace("/", " ").replace("_", " ") for k in terms}},
            "Student against teacher.",
            log=None,
        ),
        _plot(
            "Source terms",
            log,
            {k: None for k in keys if k.startswith("source/")},
            "What the source minimises while it makes its inputs.",
            log=None,
        ),
        _plot(
            "Effective number of classes",
            even,
            {"pool": "pool", "drawn": "as drawn"},
            "exp(entropy) of the class shares; higher is more even.",
            zero=True,
            reference=("all alike", classes) if classes else None,
        ),
        _plot(
            "KDCI: size of the prior, |F| / |S|",
            log,
            {"kdci/F_over_S": "|F| / |S|", "kdci/F_over_S_centred": "centred, as softmax sees it"},
            "The added prior beside the student's logits.",
            log=None,
        ),
        _plot(
            "KDCI: entropy of the attention",
            log,
            {"kdci/attention_entropy": "entropy"},
            "Near the line, all clusters count alike.",
            reference=uniform,
        ),
        _plot(
            "KDCI: agreement with and without F",
            _in_percent(log, list(sides)),
            sides,
            "With the teacher, on the training batch.",
            unit=" %",
        ),
        _plot(
            "Gradient alignment",
            log,
            {"update/alignment": "cosine"},
            "Of the gradients on new and on replayed inputs. Below 0, a step along one undoes the other.",
        ),
        _plot("Other terms", log, {k: k for k in rest}, log=None),
    ]
    return [f for f in found if f is not None]


def advice(pool: Shares | None, drawn: Shares | None, intervention: str) -> tuple[str, list[str]]:
    """(tone, sentences) on the class proportions."""
    if pool is None:
        return "quiet", []
    seen = drawn or pool
    says: list[str] = []
    if pool.missing:
        some = ", ".join(map(str, pool.missing[:8])) + (", …" if len(pool.missing) > 8 else "")
        which = f"{len(pool.missing)} of {len(pool.values)} classes never appear ({some})"
        which = f"Class {some} never appears" if len(pool.missing) == 1 else which
        says.append(
            f"{which} in the substitution data. No draw can make up for that: the student hears of what is missing "
            "only through the teacher's soft answers. Run longer, or try another source."
        )
    present = [v for v in seen.values if v > 0]
    ratio = max(present) / min(present)
    if ratio > SKEWED:
        most, least = seen.values.index(max(present)), seen.values.index(min(present))
        says.append(
            f"What the student saw is skewed: class {most} came up {number(ratio, 3)} times as often as class {least}."
        )
        if "stratified" not in intervention:
            also = "" if intervention in ("", "none", "plain") else intervention + "+"
            says.append(
                f"Try `--intervention {also}stratified`: it draws batches evenly, so that rare classes are seen."
            )
        else:
            says.append(
                "The stratified draw is on already; its cap on rare strata leaves this much. A larger or more "
                "varied pool helps."
            )
    if says:
        return "warn", says
    if pool.skewed and drawn is not None:
        return "good", [f"The pool is skewed ({pool.ratio_text}), but the draw evened it out ({drawn.ratio_text})."]
    return "good", ["The classes are represented evenly enough; nothing to do."]
