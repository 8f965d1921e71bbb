"""`look`: runs beside real images. What the page says is what is so."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from dodistill.commands.cli import main
from dodistill.commands.look import look
from dodistill.data.images import Images
from dodistill.engine.inputs import POOL_FILE, keep_pool
from dodistill.engine.run_folder import drop_checkpoints
from dodistill.errors import DodistillError
from dodistill.evaluation.evaluate import predict
from dodistill.models import Normalized, load_model, save_model
from helpers import assert_offline, two_runs

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def runs(teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return two_runs(tmp_path_factory.mktemp("runs"), teacher_file)


def test_the_page_says_what_is_so(
    runs: list[Path], teacher_file: Path, digits_test: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "look.html"
    assert main(["look", *map(str, runs), "--test", "digits", "--out", str(out), "--n", "120"]) == 0
    said = capsys.readouterr().out
    text = html.unescape(out.read_text())
    assert_offline(text)
    right = {}
    for path in (teacher_file, *(r / "student.safetensors" for r in runs)):
        right[path] = predict(load_model(str(path)), digits_test.x).argmax(1) == digits_test.y
        score = 100 * right[path].float().mean().item()
        assert f"{score:.2f} %" in text
        assert f"{score:.2f}%" in said
    short, long = (right[r / "student.safetensors"] for r in runs)
    assert f"Right only in long: {int((long & ~short).sum())} of 500" in text
    assert f"Right only in short: {int((short & ~long).sum())} of 500" in text
    shown = re.findall(r'alt="(\d), not (\d)"', text)
    assert len(shown) == sum(min(12, int(v.sum())) for v in (long & ~short, short & ~long))
    assert all(a != b for a, b in shown)
    assert sum(part.count("<use ") for part in re.findall(r'<g class="points">.*?</g></g>', text)) == 3 * 120
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        "look-map-teacher.pdf", "look-map-short.pdf", "look-map-long.pdf", "look-class-shares-short.pdf",
        "look-class-shares-long.pdf",
    }  # fmt: skip

    teacher, *students = look(runs, "digits", out, n=60)
    assert teacher.distance is None
    assert teacher.silhouette > students[1].silhouette  # the students saw scraps of photographs
    for s in students:
        assert s.distance is not None
        assert s.floor is not None
        assert s.distance > 2 * s.floor > 0  # scraps are not digits
        assert s.images == min(250, 194)  # half of the real ones, or the pool
        assert -1 <= s.silhouette <= 1


def test_a_run_without_its_pool_and_a_teacher_that_changed(
    runs: list[Path], taught: Normalized, teacher_file: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "look.html"
    shutil.copytree(runs[1], run)
    whole = look([run], "digits", out, n=60)[1]
    keep_pool(run)
    drop_checkpoints(run)
    keep_pool(run)  # changes nothing once the pool is gone
    kept = look([run], "digits", out, n=60)[1]
    assert kept.images == whole.images == 194
    assert kept.distance == pytest.approx(whole.distance, rel=1e-3)
    (run / POOL_FILE).write_bytes(b"torn")
    with pytest.raises(DodistillError, match=f"{POOL_FILE} is damaged"):
        look([run], "digits", out, n=60)
    (run / POOL_FILE).unlink()
    assert look([run], "digits", out, n=60)[1].distance is None
    assert "There is no pool of run" in out.read_text()
    assert "other weights" not in out.read_text()

    with torch.no_grad():
        other = load_model(str(teacher_file))
        next(other.parameters()).mul_(1.01)
    save_model(other, tmp_path / "other.safetensors")
    look([run], "digits", out, str(tmp_path / "other.safetensors"), n=60)
    assert "run was distilled from a teacher with other weights" in out.read_text()


def test_mistakes(runs: list[Path], teacher_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "look.html"
    with pytest.raises(DodistillError, match=r"holds no student\.safetensors"):
        look([tmp_path], "digits", out)
    with pytest.raises(DodistillError, match="--n is 10"):
        look(runs, "digits", out, n=10)
    with pytest.raises(DodistillError, match="needs labels"):
        look(runs, "strokes:60", out)
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    config = json.loads((run / "config.json").read_text())
    for spec, message in (("", "in memory; name that teacher"), ("other.safetensors", "different teachers")):
        config["teacher"]["spec"] = spec
        (run / "config.json").write_text(json.dumps(config))
        with pytest.raises(DodistillError, match=message):
            look([runs[1], run], "digits", out)
    assert not out.exists()
    assert look([run], "digits", out, str(teacher_file), n=60)[1].name == "run"
