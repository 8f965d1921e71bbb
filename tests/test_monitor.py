"""The whole curve: its arithmetic, what is left out, and that it reaches summary, table and report."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dodistill.api import distill
from dodistill.data.images import Images
from dodistill.evaluation.monitor import CURVES, UNITS, course, courses, flat, read_metrics
from dodistill.report.report import write_report
from helpers import SHAPE, student, tree

CURVE = [20.0, 50.0, 90.0, 80.0, 85.0]


def test_course_by_hand() -> None:
    found = course(CURVE)
    mean = (20 + 50 + 90 + 80 + 85) / 5
    variance = sum((v - mean) ** 2 for v in CURVE) / 5
    assert found == pytest.approx(
        {"mean": mean, "variance": variance, "deviation": variance**0.5, "maximum": 90.0, "last": 85.0,
         "last_ten": mean, "drop": 5.0}
    )  # fmt: skip
    assert list(found) == list(UNITS)
    assert {k for k, unit in UNITS.items() if unit == "%²"} == {"variance"}


def test_the_last_ten() -> None:
    assert course([float(v) for v in range(25)])["last_ten"] == statistics.fmean(range(15, 25))
    assert course([7.0]) == pytest.approx(
        {"mean": 7, "variance": 0, "deviation": 0, "maximum": 7, "last": 7, "last_ten": 7, "drop": 0}
    )
    assert math.isnan(course([1.0, math.nan])["variance"])
    with pytest.raises(ValueError, match="at least one"):
        course([])


def lines(values: list[float], key: str = "test") -> list[dict[str, Any]]:
    return [{"kind": "eval", "step": 10 * (i + 1), key: v} for i, v in enumerate(values)]


def test_the_ramp_can_be_left_out() -> None:
    whole, late = courses(lines(CURVE))
    assert (whole["of"], whole["after"], whole["n"]) == ("test", 0.0, 5)
    assert (late["after"], late["n"]) == (0.5, 3)  # steps 30, 40, 50 of 50
    assert late["mean"] == pytest.approx(85)
    assert late["variance"] < whole["variance"] / 10
    assert courses(lines(CURVE), after=[0.8])[0]["mean"] == 85
    assert courses([]) == []
    assert courses([{"step": 1, "loss": 2.0}]) == []
    both = courses([a | b for a, b in zip(lines(CURVE), lines(CURVE[::-1], "agreement"))])
    assert [c["of"] for c in both] == ["test", "test", "agreement", "agreement"]
    assert [c["drop"] for c in both] == [5.0, 5.0, 70.0, 70.0]
    assert flat(both)["late/agreement/drop"] == 70.0
    assert flat(both)["course/test/mean"] == 65.0
    assert len(flat(both)) == 4 * len(UNITS)


def test_reading_a_torn_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == {"log": [], "eval": [], "pool": []}
    rows = [*lines([1.0, 2.0]), {"kind": "eval", "step": 10, "test": 5.0}, {"kind": "other", "step": 1}]
    file.write_text("\n".join(map(json.dumps, rows)) + '\n{"kind": "eval", "ste')
    assert [r["test"] for r in read_metrics(file)["eval"]] == [5.0, 2.0]  # the later line holds, in order of step


def test_a_run_is_measured_whole(teacher: nn.Module, digits: Images, digits_test: Images, tmp_path: Path) -> None:
    settings = {k: v for k, v in tree("fast", steps=8).items() if k not in ("source", "intervention")}
    settings["loop"] |= {"eval_every": 2}
    more: dict[str, Any] = {
        "update": {"name": "retain", "alpha": 0.1}, "replay": {"name": "bank", "size": 8, "every": 1, "first": 1},
    }  # fmt: skip
    done = distill(
        teacher, student(), tree("fast")["source"], "none", image_shape=SHAPE, test=digits_test, out=tmp_path / "run",
        verbose=False, **settings, **more,
    )  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert done.summary["course"] == summary["course"]
    evals = read_metrics(tmp_path / "run" / "metrics.jsonl")["eval"]
    assert len(evals) == 4
    by = {(c["of"], c["after"]): c for c in summary["course"]}
    assert set(by) == {(of, after) for of in CURVES for after in (0.0, 0.5)}
    for of in CURVES:
        values = [e[of] for e in evals]
        assert by[of, 0.0]["mean"] == pytest.approx(statistics.fmean(values))
        assert by[of, 0.0]["variance"] == pytest.approx(statistics.pvariance(values))
        assert by[of, 0.0]["last"] == values[-1]
        assert by[of, 0.5]["n"] == 2
        assert summary["log"][f"course/{of}/mean"] == pytest.approx(by[of, 0.0]["mean"], abs=1e-3)
    assert by["test", 0.0]["maximum"] == summary["best_on_test"]
    assert summary["replay_memory_mb"] > 0
    page = write_report(tmp_path / "run", pdf=False).read_text()
    assert "Over all evaluations" in page
    for name in CURVES.values():
        assert name in page
    assert "variance, %²" in page
    assert "The replay holds" in page
    assert "Gradient alignment" in page
    assert "retain kd" in page
    # without a replay nothing is said of one, and without a folder nothing can be read
    alone = distill(teacher, student(), tree("fast")["source"], image_shape=SHAPE, verbose=False, **settings)
    assert "replay_memory_mb" not in alone.summary
    assert "course" not in alone.summary
