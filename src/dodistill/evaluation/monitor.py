"""Statistics over the curve of a run, not only of its last point.

Without validation data the best epoch is unknown, so the whole curve matters. LRA (Patel et al., CVPR 2023) reports, of
the test accuracy Acc_e after each epoch e = 1..E,

    mu = mean_e Acc_e  [%]        sigma^2 = var_e Acc_e  [% squared]        Acc_max = max_e Acc_e  [%]

Here each evaluation (`loop.eval_every`) counts as an epoch. The same statistics are computed for the agreement with the
teacher on the held-back reservoir. It is a uniform sample of everything ever acquired, so its curve falls where the
student forgets, and this needs no test images. Some papers print sigma where they write sigma^2; here both are given by
name.

The early ramp dominates sigma^2 of a short run, so each curve is also measured without its first half. Acc_max is
selected on the curve itself, so on test accuracy it is optimistic; `last`, `last_ten` and `drop` involve no selection.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

#: curves of an `eval` line, and their names on a page
CURVES = {
    "test": "test accuracy",
    "test_ema": "test accuracy, EMA",
    "agreement": "agreement with the teacher",
    "agreement_ema": "agreement, EMA",
}
#: shares of the run, from its start, that are omitted
AFTER = (0.0, 0.5)
#: quantity of `course` -> its unit
UNITS = {
    "mean": "%", "variance": "%²", "deviation": "%", "maximum": "%", "last": "%", "last_ten": "%", "drop": "points",
}  # fmt: skip


def course(values: Sequence[float]) -> dict[str, float]:
    """Of a curve in percent, n >= 1 values in order: mean, maximum, last, `last_ten` (the mean of the last ten, or of
    as many as there are) in %; `variance` (divided by n) in % squared, `deviation` its root in %; `drop`, the maximum
    minus the last, in percentage points, >= 0. A value that is not finite makes its statistics not finite."""
    if not values:
        raise ValueError("a course needs at least one value")
    spread = statistics.pvariance(values) if all(map(math.isfinite, values)) else math.nan
    return {
        "mean": statistics.fmean(values),
        "variance": spread,
        "deviation": math.sqrt(spread),
        "maximum": max(values),
        "last": values[-1],
        "last_ten": statistics.fmean(values[-10:]),
        "drop": max(values) - values[-1],
    }


def courses(evals: Iterable[Mapping[str, Any]], after: Sequence[float] = AFTER) -> list[Record]:
    """One record per curve and share in `after`: `of` (a key of CURVES), `after`, `n`, and the values of `course`.

    `evals` are the eval lines of metrics.jsonl in order of step; with `after` = a, those up to the share a of the last
    step are omitted.
    """
    lines = [line for line in evals if isinstance(line.get("step"), int)]
    found: list[Record] = []
    for name in CURVES:
        curve = [(line["step"], float(line[name])) for line in lines if isinstance(line.get(name), int | float)]
        for share in after:
            values = [value for step, value in curve if step > share * lines[-1]["step"]]
            if values:
                found.append({"of": name, "after": share, "n": len(values), **course(values)})
    return found


def flat(found: Iterable[Record]) -> dict[str, float]:
    """The records of `courses` by name: course/test/mean of all evaluations, late/test/mean of the second half."""
    prefix = {0.0: "course", 0.5: "late"}
    return {f"{prefix[c['after']]}/{c['of']}/{k}": round(c[k], 4) for c in found for k in UNITS if c["after"] in prefix}


def read_metrics(path: Path) -> dict[str, list[Record]]:
    """The lines of a metrics.jsonl by kind (log, eval, pool), in order of step; {} of empty lists where there is none.

    The last line of a repeated step counts; incomplete lines are skipped.
    """
    found: dict[str, dict[float, Record]] = {"log": {}, "eval": {}, "pool": {}}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("kind") in found and isinstance(record.get("step"), int):
            found[record["kind"]][record["step"]] = record
    return {kind: [records[s] for s in sorted(records)] for kind, records in found.items()}
