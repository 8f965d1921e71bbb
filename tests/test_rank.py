"""`rank`: students in order without labels, on one set of images for all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dodistill.api import distill_config
from dodistill.commands.cli import main
from dodistill.commands.look import look
from dodistill.commands.rank import Ranked, _such, rank
from dodistill.config.tree import resolve
from dodistill.data.images import Images, load_images
from dodistill.engine.inputs import read_inputs
from dodistill.errors import DodistillError
from dodistill.evaluation import ranking
from dodistill.evaluation.evaluate import predict
from dodistill.models import Normalized, load_model, save_model
from helpers import tree, two_runs

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def runs(teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One source: a student of few steps, one of more, and the teacher itself in the place of a student."""
    folder = tmp_path_factory.mktemp("runs")
    two = two_runs(folder, teacher_file, pool={"holdout": 0.3})
    shutil.copytree(folder / "long", folder / "perfect")
    shutil.copy(teacher_file, folder / "perfect" / "student.safetensors")
    return [*two, folder / "perfect"]


def student(run: Path) -> Normalized:
    return load_model(str(run / "student.safetensors"))


def as_if_from(run: Path, source: str, to: Path) -> Path:
    """A copy of a run, whose config names another source."""
    shutil.copytree(run, to)
    path = to / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["source"]["name"] = source
    path.write_text(json.dumps(config), encoding="utf-8")
    return to


def test_the_order_is_that_of_the_agreement_on_patches_of_photographs(
    runs: list[Path], taught: Normalized, digits_test: Images, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rank(runs, n=90, test="digits")
    assert [s.run.name for s in found.students] == ["perfect", "long", "short"]
    assert found.on == "patches of two photographs"
    patches = load_images("photos:270", "train", False, (1, 8, 8)).x
    drawn = patches[torch.randperm(270, generator=torch.Generator().manual_seed(0))]
    x, want = ranking.evenly(drawn, taught, 90)
    assert found.images == len(x) == 90
    assert torch.equal(want, predict(taught, x).argmax(1))
    perfect = found.students[0]
    assert (perfect.agreement, perfect.behind, perfect.error, perfect.apart) == (100.0, 0.0, 0.0, False)
    for s in found.students:
        model = student(s.run)
        right = predict(model, x).argmax(1) == want
        assert s.agreement == pytest.approx(100 * right.float().mean().item())
        gap = 1 - right.double()
        assert s.behind == pytest.approx(100 * gap.mean().item())
        assert s.error == pytest.approx(100 * gap.std(correction=0).item() / len(x) ** 0.5)
        top = predict(model, digits_test.x).argmax(1) == digits_test.y
        assert s.accuracy == pytest.approx(100 * top.float().mean().item())
    again = rank(runs[::-1], n=90)  # the same images, whatever the order
    assert {s.run: s.agreement for s in found.students} == {s.run: s.agreement for s in again.students}

    assert main(["rank", *map(str, runs), "--n", "90", "--test", "digits"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["perfect", "long", "short"]
    assert "100.00 %" in lines[1]
    assert f"{found.students[2].behind:.2f} ± {found.students[2].error:.2f}" in lines[3]
    assert any("rank correlation of agreement and accuracy" in line for line in lines)


def test_any_images_and_the_images_of_a_run(runs: list[Path], taught: Normalized, tmp_path: Path) -> None:
    found = rank(runs[:2], on="digits", n=200)
    x = load_images("digits", "train", False).x
    drawn = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:600]]
    x, classes = ranking.evenly(drawn, taught, 200)
    assert found.images == len(x) == 200
    assert torch.equal(classes, predict(taught, x).argmax(1))
    counts = torch.bincount(classes, minlength=10)
    assert counts.max() - counts.min() <= 1  # there are enough of each class
    for s in found.students:
        right = predict(student(s.run), x).argmax(1) == classes
        assert s.agreement == pytest.approx(100 * right.float().mean().item())
    other = as_if_from(runs[1], "fast", tmp_path / "other")
    found = rank(runs[:2], on=str(other), n=60)
    assert found.on == f"held-back images of {other}, a run of fast"
    inputs = read_inputs(other)
    assert inputs is not None
    assert found.images == min(60, len(inputs.held))


def test_who_learned_from_such_images_is_named(runs: list[Path], tmp_path: Path) -> None:
    """A source's own images favour its students."""
    other = as_if_from(runs[1], "fast", tmp_path / "other")
    (note,) = rank([runs[0], other], on=str(runs[1]), n=60).notes
    assert note == "images of the source dfnd favour the students that learned from it: short."
    assert not rank([runs[0], runs[1]], on=str(runs[1]), n=60).notes  # all of them
    assert not rank([runs[0], runs[1]], on=str(other), n=60).notes  # none
    (note,) = rank(runs[:2], n=60).notes  # their unlabelled images are `strokes`
    assert note == "these images favour the students that learned from such: short, long; give others, by --on."
    assert not rank(runs[:2], n=60, on="digits").notes
    (note,) = rank([runs[0], other], n=60, on="strokes:300").notes  # `fast` does not read unlabelled images
    assert "such: short; give" in note


@pytest.mark.parametrize(
    ("unlabeled", "on", "such"),
    [("cifar100", "cifar10", False), ("cifar10", "cifar10", True), ("data/cats/train", "data/cats/", True),
     ("data/cats2", "data/cats", False), ("strokes:300", "strokes", True), ("strokes", "strokes:300", True)],
)  # fmt: skip
def test_such_images(unlabeled: str, on: str, such: bool) -> None:
    assert _such(unlabeled, (on,)) is such


def test_two_students_that_are_not_told_apart(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs[1], tmp_path / "twin")
    assert main(["rank", str(runs[1]), str(tmp_path / "twin"), "--n", "60"]) == 0
    said = capsys.readouterr().out
    assert "not told apart from the best" in said
    shutil.copytree(runs[1], tmp_path / "elsewhere" / "long")  # two runs of one name are told by their paths
    assert main(["rank", str(runs[1]), str(tmp_path / "elsewhere" / "long"), "--n", "60"]) == 0
    assert str(tmp_path / "elsewhere" / "long") in capsys.readouterr().out
    run = runs[0]
    assert [Ranked(run, 50, *gap).apart for gap in ((7.9, 0.1), (8.1, 0.1), (8.1, 4.2), (0, 0))] == [
        False, True, False, False,
    ]  # fmt: skip


def test_one_teacher_in_two_places_is_one(runs: list[Path], teacher_file: Path, tmp_path: Path) -> None:
    """The runs of two grids; other weights are refused, and so are runs that do not say."""
    copies = []
    for name, change in (("same", 0.0), ("other", 0.01)):
        weights = load_model(str(teacher_file))
        with torch.no_grad():
            next(weights.parameters()).mul_(1 + change)
        save_model(weights, tmp_path / f"{name}.safetensors")
        shutil.copytree(runs[1], tmp_path / name)
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["teacher"]["spec"] = str(tmp_path / f"{name}.safetensors")
        path.write_text(json.dumps(config), encoding="utf-8")
        copies.append(tmp_path / name)
    assert len(rank([runs[0], copies[0]], n=60).students) == 2
    with pytest.raises(DodistillError, match="different teachers"):
        rank([runs[0], copies[1]], n=60)


def test_a_large_packed_file_stays_on_the_disk(
    runs: list[Path], digits_test: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For `rank` and for `look`, which say what they say of the same file in memory."""
    np.save(tmp_path / "x.npy", digits_test.x)
    np.save(tmp_path / "x.labels.npy", digits_test.y)
    (tmp_path / "x.json").write_text("{}")
    file = str(tmp_path / "x.npy")

    def said() -> list[float | None]:
        ranked = rank(runs[:2], on=file, test=file, n=60).students
        seen = look(runs[:1], file, tmp_path / "look.html", n=60)
        return [*(s.agreement for s in ranked), *(s.accuracy for s in ranked), *(s.accuracy for s in seen)]

    whole = said()
    monkeypatch.setenv("DODISTILL_MEMORY_GB", "0")
    monkeypatch.setattr("dodistill.data.images._npy", lambda _: pytest.fail("read whole"))
    assert said() == whole


def test_mistakes(runs: list[Path], teacher_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DodistillError, match="two run folders or more"):
        rank(runs[:1])
    with pytest.raises(DodistillError, match="--n is 10"):
        rank(runs, n=10)
    with pytest.raises(DodistillError, match=r"holds no student\.safetensors"):
        rank([runs[0], tmp_path])
    with pytest.raises(DodistillError, match="has no labels; accuracy needs them"):
        rank(runs, test="strokes:100")
    bare = tmp_path / "bare"
    shutil.copytree(runs[0], bare)
    for name in ("inputs.safetensors", "checkpoint.pt", *(p.name for p in bare.glob("pool-*.pt"))):
        (bare / name).unlink(missing_ok=True)
    with pytest.raises(DodistillError, match="keeps no held-back images; give others to compare on"):
        rank(runs, on=str(bare))
    few = {"data": {"unlabeled": "strokes:300", "image_shape": [1, 8, 8]}, "student": {"spec": "tiny4"}}
    cfg = resolve(tree("dfnd", steps=4, teacher={"spec": str(teacher_file)}, **few))
    distill_config(cfg, tmp_path / "few", verbose=False, report=False)
    with pytest.raises(DodistillError, match="there are 6 images to compare on; give at least 50"):
        rank(runs, on=str(tmp_path / "few"))


def test_rank_correlation() -> None:
    assert ranking.correlation([1, 2, 3, 4], [10, 20, 30, 45]) == pytest.approx(1)
    assert ranking.correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # by hand: ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4
    assert ranking.correlation([1, 2, 2, 9], [5, 8, 6, 9]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert ranking.correlation([1, 1, 1], [1, 2, 3]) != ranking.correlation([1, 1, 1], [1, 2, 3])  # NaN


def test_what_is_behind_counts_only_where_one_is_right() -> None:
    best, mine = torch.tensor([1, 1, 1, 0], dtype=torch.bool), torch.tensor([1, 0, 0, 0], dtype=torch.bool)
    gap, error = ranking.behind(mine, best)
    assert gap == pytest.approx(50)
    assert error == pytest.approx(25)  # the gaps are 0, 1, 1, 0: half a point of spread, four images
    assert ranking.behind(best, best) == (0.0, 0.0)
