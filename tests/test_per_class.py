"""The accuracy of each class on the page: the worst first, the distribution, and whether rare classes explain it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dodistill.evaluation.evaluate import class_accuracy
from dodistill.models import load_model, save_model
from dodistill.report.classes import per_class, rank_correlation
from dodistill.report.distribution import histogram
from helpers import Page

NOWHERE = Path("nowhere.safetensors")


def summary(mine: list[Any], **more: Any) -> dict[str, Any]:
    n = len(mine)
    known: dict[str, Any] = {"class_accuracy": mine, "teacher_class_accuracy": [90.0] * n, "class_images": [10] * n}
    return {**known, "drawn_shares": [(k + 1) / (n * (n + 1) / 2) for k in range(n)], **more}


def test_accuracy_of_each_class() -> None:
    logits = torch.eye(4)[[0, 0, 1, 2]]
    assert class_accuracy(logits, torch.tensor([0, 1, 1, 2])) == [100.0, 50.0, 100.0, None]


def test_the_worst_first_with_names_and_shares() -> None:
    found = per_class(summary([80.0, 20.0, None, 50.0], classes=["cat", "dog", "owl", "fox"]), NOWHERE)
    assert found is not None
    assert [(r.index, r.name, r.student) for r in found.worst] == [(1, "dog", 20.0), (3, "fox", 50.0), (0, "cat", 80.0)]
    assert found.worst[0].share == pytest.approx(0.2)
    assert found.known == 3
    assert str(found.plot).count('class="bar"') == 8
    assert per_class({}, NOWHERE) is per_class({"class_accuracy": "damaged"}, NOWHERE) is None


def test_names_from_the_metadata_of_the_student(tmp_path: Path) -> None:
    model = load_model("tiny4", num_classes=2, in_channels=1, image_size=8)
    file = save_model(model, tmp_path / "student.safetensors", classes=["cat", "dog"])
    found = per_class(summary([80.0, 20.0]), file)
    assert found is not None
    assert [r.name for r in found.worst] == ["dog", "cat"]
    wrong = per_class(summary([80.0, 20.0, 30.0]), file)  # two names for three classes are none
    assert wrong is not None
    assert not wrong.named


def test_a_thousand_classes_stay_readable() -> None:
    found = per_class(summary([k / 10 for k in range(1000)]), NOWHERE)
    assert found is not None
    assert [r.index for r in found.worst] == list(range(10))
    text = str(found.plot)
    Page(text)
    assert len(text) < 20_000
    assert "100, 100, 100" in found.plot.label
    assert "worse on the classes that it saw less often" in found.sentence


@pytest.mark.parametrize(
    ("mine", "said"),
    [
        ([10.0, 20.0, 30.0, 40.0, 50.0], r"is \+1.00 over 5 classes: the student is worse"),
        ([50.0, 40.0, 30.0, 20.0, 10.0], r"is -1.00 over 5 classes: rare classes do not explain"),
        ([30.0, 10.0, 50.0, 20.0, 40.0], r"is \+0.30 over 5 classes: rare classes explain a part"),
        ([30.0] * 5, "^$"),
        ([30.0, 40.0], "^$"),
    ],
)
def test_whether_rare_classes_explain_it(mine: list[float], said: str) -> None:
    found = per_class(summary(mine), NOWHERE)
    assert found is not None
    assert re.search(said, found.sentence)
    even = per_class(summary(mine, drawn_shares=[1 / len(mine)] * len(mine)), NOWHERE)
    assert even is not None
    assert ("same share" in even.sentence) == (len(mine) >= 5)


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 2, 4], [1, 3, 3, 9]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_histogram() -> None:
    plot = histogram("h", [("student", [0.0, 5.0, 99.0, 100.0])], x_label="accuracy", y_label="classes")
    assert "student 2, 0, 0, 0, 0, 0, 0, 0, 0, 2" in plot.label
    assert "Nothing was logged" in str(histogram("h", [("student", [])], x_label="a", y_label="b"))
