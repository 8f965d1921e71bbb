"""A student far below its teacher: each cause from what a run recorded, and a next command that parses and resolves."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dodistill.api import distill
from dodistill.commands import cli
from dodistill.commands.distill import _say
from dodistill.config.choices import read_recipe
from dodistill.config.retype import retyped
from dodistill.config.tree import Distill, expand, merge, resolve
from dodistill.data.images import Images
from dodistill.evaluation.verdict import Verdict, verdict
from dodistill.report.report import write_report
from helpers import SHAPE, assert_offline, student

COMMAND = (
    "dodistill distill --teacher t.safetensors --student tiny4 --source dafl --preset desk --loop.steps 300 "
    "--source.lr_g=0.002 --test digits --quiet --max-seconds 60 --out runs/a"
)
#: figures of a run of which there is nothing to say but that it is far below
SUMMARY: dict[str, Any] = {
    "teacher_accuracy": 90.0, "student_accuracy": 60.0, "delivered_accuracy": 61.0, "delivered": "ema",
    "agreement": 88.0, "train_agreement": 89.0, "images": 5000, "class_shares": [0.1] * 10, "drawn_shares": [0.1] * 10,
    "log": {"inputs/effective_classes": 9.5, "inputs/diversity": 0.2}, "teacher_batchnorm": True, "command": COMMAND,
}  # fmt: skip
FLAT = [{"step": s, "agreement_ema": 88.0, "test_ema": 61.0} for s in (100, 200, 300)]
RISING = [{"step": s, "agreement_ema": 50 + s / 10, "test_ema": 31 + s / 10} for s in (100, 200, 300)]


def settings(command: str) -> Distill:
    """What the command line resolves to: it parses, every flag is known, and all values are in range."""
    words = shlex.split(command)
    assert words[:2] == ["dodistill", "distill"]
    own, given = cli.read("distill", words[2:])
    return resolve(merge(expand(read_recipe(own.get("recipe", ""))), expand(given)))


def found(evals: Any = FLAT, logs: Any = (), folder: str = "runs/a", **more: Any) -> Verdict | None:
    """The finding for `SUMMARY` with other figures."""
    summary = {**SUMMARY, **more}
    config = settings(summary["command"]).to_tree() if summary["command"] else settings(COMMAND).to_tree()
    return verdict(summary, config, evals, logs, folder)


def named(cause: str, evidence: str, **more: Any) -> tuple[Verdict, Distill]:
    it = found(**more)
    assert it is not None
    assert it.cause.name == cause, it
    assert evidence in it.cause.evidence, it
    return it, settings(it.command)


def test_nothing_to_say() -> None:
    assert found(delivered_accuracy=81.0) is None  # 90 % of the teacher's
    none = {"teacher_accuracy": None, "delivered_accuracy": None, "student_accuracy": None}
    assert found(agreement=85.0, **none) is None
    assert verdict({}, {}, []) is None


def test_too_few_steps() -> None:
    it, next_ = named("too few steps", "from 51.00 % at step 200 to 61.00 % at step 300", evals=RISING)
    assert it.distance == "The student is far below its teacher: 61.00 % of the test images, teacher 90.00 %."
    assert next_.loop.steps == 900
    assert it.command.endswith("--steps 900 --out runs/a")  # the run itself goes on
    assert "--loop.steps" not in it.command
    assert "--max-seconds" not in it.command
    assert "--quiet" not in it.command
    onecycle, _ = named("too few steps", "still rose", evals=RISING, command=COMMAND + " --optim.schedule onecycle")
    assert onecycle.command.endswith("--out runs/a-too-few-steps")  # its schedule cannot begin anew


def test_a_run_without_checkpoints_begins_again() -> None:
    it = verdict(SUMMARY, settings(COMMAND).to_tree(), RISING, (), "runs/a", goes_on=False)
    assert it is not None
    assert it.command.endswith("--steps 900 --out runs/a-too-few-steps")


def test_too_few_steps_by_the_loss_of_a_run_with_one_evaluation() -> None:
    logs = [{"step": s, "loss": 10 / s} for s in range(50, 301, 50)]
    named("too few steps", "the loss still fell at the end: from 0.05 at step 200 to 0.0333 at step 300",
          evals=FLAT[-1:], logs=logs)  # fmt: skip
    named("unclear", "nothing", evals=FLAT[-1:], logs=[{**line, "loss": 1.0} for line in logs])


def test_without_a_test_set_it_speaks_of_agreement() -> None:
    none = {"teacher_accuracy": None, "delivered_accuracy": None, "student_accuracy": None}
    it, _ = named(
        "too few steps", "the agreement still rose at the end: from 70.00", evals=RISING, agreement=80.0, **none
    )
    assert "may be far" in it.distance
    assert "not known" in it.distance
    assert "held-back inputs (80.00 %)" in it.distance


def test_a_collapsed_source_is_named_however_well_the_networks_agree() -> None:
    none = {"teacher_accuracy": None, "delivered_accuracy": None, "student_accuracy": None}
    one_class = {"log": {"inputs/effective_classes": 1.0, "inputs/diversity": 0.2}}
    named("collapsed source", "1.0 effective classes of 10", agreement=100.0, **none, **one_class)
    assert found(agreement=100.0, **none) is None
    assert found(agreement=100.0, delivered_accuracy=88.0, **one_class) is None  # the test set speaks for it


@pytest.mark.parametrize(("teacher", "classes", "says"), [(12.9, 10, True), (13.1, 10, False), (59.0, 2, True),
                                                          (61.0, 2, False), (17.0, 5, True)])  # fmt: skip
def test_a_teacher_at_chance_is_named_first(teacher: float, classes: int, says: bool) -> None:
    shares = {"class_shares": [1 / classes] * classes, "teacher_class_accuracy": [teacher] * classes}
    it = found(teacher_accuracy=teacher, delivered_accuracy=teacher, student_accuracy=teacher, agreement=99.0, **shares)
    assert (it is not None) == says
    if it is not None:
        assert it.cause.name == "the teacher"
        assert f"names {teacher:.2f} % of the test images rightly; chance is {100 / classes:.1f} %" in it.cause.evidence
        assert "normalisation" in it.cause.remedy
        assert it.command == it.settings == ""


@pytest.mark.parametrize(("agreement", "says"), [(44.6, False), (20.0, False), (19.9, True)])
def test_without_a_test_set_a_low_agreement_is_no_fault(agreement: float, says: bool) -> None:
    """A student of `fast` with an agreement of 45 % had 94 % of its teacher's accuracy (results/hour)."""
    none = {"teacher_accuracy": None, "delivered_accuracy": None, "student_accuracy": None}
    it = found(agreement=agreement, train_agreement=25.0, **none)  # ten classes: chance is 10 %
    assert (it is not None) == says
    if it is not None:
        assert it.cause.name == "small or unstable"
    collapsed = {"log": {"inputs/effective_classes": 1.2, "inputs/diversity": 0.2}}
    named("collapsed source", "1.2 effective classes", agreement=agreement, **none, **collapsed)


def test_collapsed_source() -> None:
    few = {"log": {"inputs/effective_classes": 1.2, "inputs/diversity": 0.2}}
    command = COMMAND.replace("--preset desk ", "")
    it, next_ = named("collapsed source", "1.2 effective classes of 10", evals=RISING, command=command, **few)
    assert next_.source.coverage == 5.0  # type: ignore[attr-defined]
    assert it.command.endswith("--out runs/a-collapsed-source")
    same = {"log": {"inputs/effective_classes": 9.5, "inputs/diversity": 0.001}}
    _, next_ = named("collapsed source", "nearly equal", **same)
    assert next_.source.lr_g == 0.0005  # type: ignore[attr-defined]
    _, next_ = named("collapsed source", "1.2 effective", **few)  # the preset has a coverage already
    assert next_.source.name == "deepinv"


def test_rare_classes() -> None:
    skewed = {"class_shares": [0.1245] * 8 + [0.002] * 2, "drawn_shares": [0.1245] * 8 + [0.002] * 2}
    it, next_ = named("rare classes", "2 of 10 classes make up 0.4 % of the inputs", evals=RISING, **skewed)
    assert next_.intervention == "stratified"
    _, next_ = named("rare classes", "2 of 10", command=COMMAND + " --intervention kdci", **skewed)
    assert next_.intervention == "kdci+stratified"
    scores = {"class_accuracy": [70.0] * 8 + [20.0, None]}
    it, _ = named("rare classes", "its accuracy on them is 20.0 %, on the other classes 70.0 %", **skewed, **scores)
    no_worse = {"class_accuracy": [61.0] * 10}
    named("unclear", "nothing", **skewed, **no_worse)
    absent = {"class_shares": [1 / 9] * 9 + [0.0], "drawn_shares": [1 / 9] * 9 + [0.0]}
    it, next_ = named("rare classes", "1 of 10", **absent)  # no draw brings back what is not there
    assert next_.source.name == "deepinv"
    assert "--intervention" not in it.command
    named("unclear", "nothing", images=150, **absent)  # 15 images a class: absence is chance


def test_too_few_images() -> None:
    figures = {"train_agreement": 99.0, "agreement": 70.0, "images": 400}
    it, next_ = named("too few images", "99.0 % of the inputs that it trained on, but on 70.0 %", **figures)
    assert "each of the 400 images was drawn 96 times" in it.cause.evidence
    assert next_.source.every == 1
    drawn = COMMAND.replace("--source dafl", "--source procedural").replace(" --source.lr_g=0.002", "")
    for n, capacity in ((400, None), (20_000, 300)):
        command = f"{drawn} --source.n {n} --source.candidates 60000"
        command += f" --pool.capacity {capacity}" if capacity else ""
        _, next_ = named("too few images", "99.0 %", command=command, **figures)
        if capacity:
            assert next_.pool.capacity == 1200
        else:
            assert (next_.source.n, next_.source.candidates) == (1600, 240_000)  # type: ignore[attr-defined]
    named("unclear", "nothing", **{**figures, "images": 400_000})  # no image was seen twice


def test_foreign_inputs() -> None:
    it, next_ = named("foreign inputs", "97.0 % of held-back inputs", agreement=97.0, train_agreement=98.0)
    assert (next_.source.name, next_.preset) == ("deepinv", "desk")
    assert "--source.lr_g" not in it.command  # settings of the other source
    assert next_.loop.steps == 300  # what was typed stays
    figures = {"agreement": 97.0, "train_agreement": 98.0, "teacher_batchnorm": False}
    _, next_ = named("foreign inputs", "97.0 %", **figures)
    assert (next_.source.name, next_.preset) == ("procedural", "desk")


def test_small_or_unstable() -> None:
    it, next_ = named("small or unstable", "only 40.0 % of the inputs that it trained on", train_agreement=40.0)
    assert "too small, or the rate" in it.cause.evidence
    assert next_.optim.lr == pytest.approx(settings(COMMAND).optim.lr / 4)


def test_a_run_in_python_has_settings_in_place_of_a_command() -> None:
    it = found(evals=RISING, command="")
    assert it is not None
    assert (it.command, it.settings) == ("", "loop.steps = 900")


def test_retyped(tmp_path: Path) -> None:
    recipe = tmp_path / "a b.yaml"
    recipe.write_text("source: {name: fast, K: 3}\npreset: desk\n")
    command = shlex.join(["dodistill", "distill", str(recipe), "--batch", "32", "--seed", "3", "--allow-code"])
    new = retyped(command, {"loop.steps": 7, "loop.batch": 16, "optim.lr": 1e-5}, "runs/x y")
    assert shlex.split(new)[2:] == [
        str(recipe), "--seed", "3", "--allow-code", "--steps", "7", "--batch", "16", "--optim.lr", "1e-05",
        "--out", "runs/x y",
    ]  # fmt: skip
    other = retyped(command, {"source.name": "procedural", "source.preset": "desk"}, "", ("source", "preset"))
    assert settings(other).source.name == "procedural"
    assert retyped("python train.py", {"loop.steps": 7}) == retyped("", {}) == ""


def test_a_run_says_it_at_its_end_and_in_its_report(
    teacher: nn.Module, digits: Images, digits_test: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more: dict[str, Any] = {"image_shape": SHAPE, "unlabeled": digits.x[:100], "test": digits_test, "verbose": False}
    result = distill(
        copy.deepcopy(teacher), student(), "dfnd", out=tmp_path / "run", steps=3, batch=16,
        loop={"eval_every": 1}, **more,
    )  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["verdict"] == result.summary["verdict"]
    assert 0 <= summary["train_agreement"] <= 100
    assert len(summary["class_accuracy"]) == len(summary["teacher_class_accuracy"]) == 10
    counts = torch.tensor(summary["class_images"])
    assert counts.tolist() == torch.bincount(digits_test.y, minlength=10).tolist()  # type: ignore[arg-type]
    mean = float((torch.tensor(summary["class_accuracy"]) * counts).sum() / counts.sum())
    assert mean == pytest.approx(summary["delivered_accuracy"], abs=0.01)
    _say({**summary, "verdict": {**summary["verdict"], "command": COMMAND}}, tmp_path / "run")
    said = capsys.readouterr().out
    assert summary["verdict"]["distance"] in said
    assert f"Likely cause: {summary['verdict']['cause']}." in said
    assert f"\n  {COMMAND}\n" in said
    _say({**summary, "verdict": {**summary["verdict"], "command": "", "settings": ""}}, tmp_path / "run")
    assert "In Python" not in capsys.readouterr().out  # nothing to set, as where the teacher is the cause
    text = (tmp_path / "run" / "report.html").read_text()
    assert_offline(text)
    assert text.index(summary["verdict"]["distance"]) < text.index('<dl class="tiles">')
    del summary["verdict"]  # an older run
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert "The student is far below its teacher" in write_report(tmp_path / "run", pdf=False).read_text()
    (tmp_path / "run" / "summary.json").write_text(json.dumps({**summary, "delivered_accuracy": 99.0}))
    assert "far below" not in write_report(tmp_path / "run", pdf=False).read_text()


def test_a_brief_run_has_too_few_steps_whatever_its_curve() -> None:
    brief = {
        "steps": 54,
        "teacher_accuracy": 90.0,
        "student_accuracy": 12.0,
        "agreement": 24.0,
        "train_agreement": 26.0,
    }
    cfg = {"loop": {"steps": 54, "batch": 128}, "optim": {"lr": 0.1}}
    flat = [{"step": 20, "test": 12.0}, {"step": 54, "test": 12.0}]
    found = verdict(brief, cfg, flat)
    assert found is not None
    assert found.cause.name == "too few steps"
    assert found.cause.evidence == "54 steps of 128 images are hardly any"
    assert found.cause.changes == {"loop.steps": 162}
    limited = verdict(brief, {**cfg, "loop": {**cfg["loop"], "time": "3m"}}, flat)
    assert limited is not None
    assert limited.cause.changes == {"loop.time": "540s"}
    assert not limited.cause.same_folder


def test_a_run_with_a_time_limit_gets_more_time() -> None:
    command = COMMAND.replace("--loop.steps 300 ", "--time 90s ")
    it, next_ = named("too few steps", "still rose", evals=RISING, command=command)
    assert (next_.loop.time, it.command.count("--time")) == ("270s", 1)
    assert it.command.endswith("--out runs/a-too-few-steps")
    by_heart = {"train_agreement": 99.0, "agreement": 70.0, "images": 300, "steps": 2000}
    it, next_ = named("too few images", "99.0 %", command=command, **by_heart)  # the limit would cut more images again
    assert next_.loop.time == "270s"
