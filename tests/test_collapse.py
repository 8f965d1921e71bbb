"""Collapse is seen, named once, and a healthy run is left in peace."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from dodistill.data.images import Images
from dodistill.engine.run_folder import RunFolder
from dodistill.evaluation.collapse import symptoms, vital_signs
from helpers import config, job


def test_vital_signs_against_slow_counts() -> None:
    g = torch.Generator().manual_seed(0)
    logits, x = torch.randn(40, 5, generator=g), torch.rand(40, 2, 3, 3, generator=g)
    signs = vital_signs(x, logits)
    counts = [sum(int(row.argmax()) == k for row in logits) / 40 for k in range(5)]
    assert signs["effective_classes"].item() == pytest.approx(math.exp(-sum(p * math.log(p) for p in counts if p)))
    deviations = [x[:, c, i, j].double().std(correction=0).item() for c in range(2) for i in range(3) for j in range(3)]
    assert signs["diversity"].item() == pytest.approx(sum(deviations) / len(deviations))
    assert signs["confidence"].item() == pytest.approx(sum(float(r.softmax(0).max()) for r in logits) / 40)
    as_bytes = vital_signs((x * 255).round().to(torch.uint8), logits)
    assert as_bytes["diversity"].item() == pytest.approx(signs["diversity"].item(), abs=2e-3)


def test_the_ends_of_the_scales() -> None:
    one = vital_signs(torch.full((8, 1, 4, 4), 0.3), torch.eye(10)[:1].expand(8, 10))
    assert one["effective_classes"].item() == pytest.approx(1)
    assert one["diversity"].item() == pytest.approx(0, abs=1e-6)
    even = vital_signs(torch.rand(10, 1, 4, 4), torch.eye(10))
    assert even["effective_classes"].item() == pytest.approx(10)


def test_each_symptom_names_its_value_and_a_knob() -> None:
    well = {"effective_classes": 9.0, "diversity": 0.2}
    assert symptoms(well, 10, 60.0, 0.9) == {}
    assert symptoms(well, 10, 12.0, 0.1) == {}  # too early to judge
    few = symptoms({"effective_classes": 1.4, "diversity": 0.2}, 10)
    assert "1.4 effective classes of 10" in few["few classes"]
    assert "--intervention stratified" in few["few classes"]
    same = symptoms({"effective_classes": 9.0, "diversity": 0.004}, 10)
    assert "standard deviation of a pixel 0.004" in same["same picture"]
    lost = symptoms(well, 10, 12.0, 0.5)
    assert "agrees with the teacher on 12.0 %" in lost["no agreement"]
    assert "chance is 10.0 %" in lost["no agreement"]
    assert symptoms({"effective_classes": 1.6}, 2) == {}  # of two classes, one may be rare


def test_a_run_on_one_class_says_so_once_and_for_good(teacher: nn.Module, digits: Images, tmp_path: Path) -> None:
    assert digits.y is not None
    ones = digits.x[digits.y == 1]
    cfg = config("dfnd", steps=8, loop={"log_every": 1})
    folder = RunFolder(tmp_path / "run", cfg)
    it = job(teacher, cfg, ones)
    assert it.run(folder)
    folder.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["kind"] == "warning" and line["symptom"] == "few classes"]
    assert len(told) == 1
    assert it.meter.warnings["few classes"] == told[0]["text"]
    assert all("inputs/effective_classes" in line for line in lines if line["kind"] == "log")
    again = job(teacher, cfg, ones)
    saved = RunFolder(tmp_path / "run", cfg).load()
    assert saved is not None
    again.load_state_dict(*saved)
    assert again.meter.warnings == it.meter.warnings


def test_a_healthy_run_is_left_in_peace(teacher: nn.Module, digits: Images) -> None:
    it = job(teacher, config("real", steps=120, loop={"batch": 64}), digits.x)
    it.run()
    assert it.meter.warnings == {}


def test_classes_that_never_come_are_named_where_there_is_enough_to_tell() -> None:
    logits = torch.eye(4).repeat_interleave(torch.tensor([40, 30, 10, 0]), 0)
    x = torch.rand(80, 1, 4, 4)
    signs = {k: float(v) for k, v in vital_signs(x, logits).items()}
    assert signs["absent_classes"] == 1
    assert not symptoms(signs, 4, done=0.1)  # a generator needs time
    said = symptoms(signs, 4, done=0.2)
    assert list(said) == ["absent classes"]
    assert "1 of 4 classes are absent" in said["absent classes"]
    assert "--source.coverage 5" in said["absent classes"]
    assert "absent_classes" not in vital_signs(x[1:], logits[1:])  # 79 of 4 classes: too few
    logits[0, 3] = 2.0
    assert not symptoms({k: float(v) for k, v in vital_signs(x, logits).items()}, 4, done=1.0)
