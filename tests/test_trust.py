"""What a user may rely on: no wrong result in silence, nothing lost by a signal, no code from files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from dodistill import DodistillError, distill, load_model
from dodistill.commands.cli import main
from dodistill.commands.compare import compare
from dodistill.config.grid import content
from dodistill.core.deadline import Deadline, stopping
from dodistill.data.images import Images
from dodistill.models import save_model
from helpers import SHAPE, same, student, tree
from test_bad_inputs import finished as finished  # a fixture
from test_bad_inputs import place as place  # a fixture
from test_bad_inputs import state_of, within
from test_cli import QUICK

# ------------------------------------------------------------------------------------------------- wrong results


@pytest.fixture
def grid(tmp_path: Path, teacher_file: Path) -> Path:
    """A recipe of one cell, and its teacher."""
    (tmp_path / "out/teachers").mkdir(parents=True)
    shutil.copy(teacher_file, tmp_path / "out/teachers/t.safetensors")
    base = tree("real", loop={"steps": 2}, data={"unlabeled": "digits", "test": "digits"})
    base |= {"teacher": "{teachers}/t.safetensors", "student": "tiny4"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base": base, "grid": {"seed": [0]}}))
    return recipe


def test_a_replaced_teacher_is_noticed(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = grid.parent / "out"
    assert compare(grid, out) == 0
    assert compare(grid, out, table=True) == 0
    other = load_model("tiny8", num_classes=10, in_channels=1, image_size=8, seed=7)
    save_model(other, out / "teachers/t.safetensors")
    assert compare(grid, out, table=True) == 75
    assert "0 of 1 cells" in capsys.readouterr().out


def test_the_clock_is_not_in_the_key(teacher_file: Path, taught: nn.Module, tmp_path: Path) -> None:
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        save_model(taught, tmp_path / f"{name}.safetensors", seconds=seconds)
    assert (tmp_path / "a.safetensors").read_bytes() != (tmp_path / "b.safetensors").read_bytes()
    assert content(str(tmp_path / "a.safetensors")) == content(str(tmp_path / "b.safetensors"))
    changed = load_model(str(teacher_file))
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0].add_(1e-3)
    save_model(changed, tmp_path / "c.safetensors")
    assert content(str(tmp_path / "c.safetensors")) != content(str(tmp_path / "a.safetensors"))


def run(teacher: nn.Module, out: Path, seed: int = 1) -> Any:
    return distill(teacher, student(seed), **tree(steps=6), image_shape=SHAPE, out=out, verbose=False)


@pytest.mark.parametrize("damage", ["cut", "gone", "another"])
def test_a_finished_run_with_a_damaged_checkpoint_delivers_its_own_student(
    damage: str, teacher: nn.Module, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first = run(teacher, out)
    metrics, path = (out / "metrics.jsonl").read_bytes(), out / "checkpoint.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "gone":
        path.unlink()
    else:
        torch.save([1, 2], path)
    again = run(teacher, out, seed=5)
    same(again.student.state_dict(), first.student.state_dict())
    assert (out / "metrics.jsonl").read_bytes() == metrics


def test_a_finished_run_writes_its_student_again(teacher: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = run(teacher, out)
    kept = load_file(out / "student.safetensors")
    (out / "student.safetensors").unlink()
    run(teacher, out)
    same(load_file(out / "student.safetensors"), kept)
    assert first.folder == out


# ------------------------------------------------------------------------------------------------------- Python


class Constant(nn.Module):
    """Logits without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1)).detach()


def frozen() -> nn.Module:
    return student().requires_grad_(False)


def sick() -> nn.Module:
    net = student()
    with torch.no_grad():
        next(net.parameters()).fill_(float("nan"))
    return net


X, Y = torch.zeros(20, *SHAPE, dtype=torch.uint8), torch.arange(20) % 10


#: id -> (arguments that differ from a good call, what the message says)
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "teacher-a-name": ({"teacher": "wrn40_2"}, "teacher is 'wrn40_2'; it must be a torch.nn.Module"),
    "student-a-name": ({"student": "wrn16_1"}, "student is 'wrn16_1'"),
    "student-a-class": ({"student": nn.Linear}, "student is <class"),
    "frozen-student": ({"student": frozen}, "requires a gradient"),
    "sick-student": ({"student": sick}, "contains NaN"),
    "detached-student": ({"student": Constant}, "have no gradient"),
    "shape-a-number": ({"image_shape": 32}, "image_shape is 32"),
    "shape-of-floats": ({"image_shape": (1.0, 8.0, 8.0)}, "image_shape is"),
    "shape-of-two": ({"image_shape": (8, 8)}, "image_shape is"),
    "images-of-another-size": ({"source": "dfnd", "unlabeled": torch.zeros(20, 1, 9, 9)}, r"\(1, 9, 9\)"),
    "images-with-nan": ({"source": "dfnd", "unlabeled": torch.full((20, 1, 8, 8), float("nan"))}, "NaN"),
    "images-of-int64": ({"source": "dfnd", "unlabeled": X.long()}, "int64"),
    "images-a-path": ({"source": "dfnd", "unlabeled": "folder/"}, "unknown data set .folder/"),
    "test-of-another-size": ({"test": (torch.zeros(20, 1, 9, 9), Y)}, r"\(1, 9, 9\)"),
    "test-beyond-the-classes": ({"test": (X, Y + 5)}, "a label is 14, but the model has 10 classes"),
    "test-negative": ({"test": (X, Y - 1)}, "a label is -1"),
    "test-of-another-number": ({"test": (X, Y[:10])}, r"labels have shape \(10,\); give 20"),
    "test-labels-floats": ({"test": (X, Y.float())}, "labels are float32"),
    "test-one-thing": ({"test": X}, "give .images, labels."),
    "labels-too-few": ({"source": "data", "unlabeled": X, "labels": Y[:3]}, r"labels have shape \(3,\)"),
    "labels-floats": ({"source": "data", "unlabeled": X, "labels": Y.float()}, "labels are float32"),
    "a-setting-nan": ({"optim": {"lr": float("nan")}}, "optim.lr is nan"),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "said"), CALLS.values(), ids=CALLS)
def test_calls_from_python(changed: dict[str, Any], said: str, teacher: nn.Module, tmp_path: Path) -> None:
    call: dict[str, Any] = {"teacher": teacher, "student": student(), "image_shape": SHAPE, "verbose": False}
    call |= {"loop": {"steps": 2, "batch": 8}, "augment": {"pad": 1}, "view": {"pad": 1}, "out": tmp_path / "new"}
    call |= {k: v() if k == "student" and callable(v) and v is not nn.Linear else v for k, v in changed.items()}
    with pytest.raises(DodistillError, match=said):
        distill(**call)
    assert not (tmp_path / "new").exists()


def test_the_student_must_not_be_the_teacher(teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match="share parameters"):
        distill(teacher, teacher, image_shape=SHAPE, verbose=False)


@pytest.mark.parametrize("spec", [None, 5, "", b"wrn40_2"])
def test_load_model_wants_a_name(spec: Any) -> None:
    with pytest.raises(DodistillError, match="a model is named by a text"):
        load_model(spec)


def test_numpy_is_taken_as_it_is(teacher: nn.Module, digits: Images) -> None:
    assert digits.y is not None
    settings = tree("dfnd", steps=2)
    x, y = digits.x[:200].numpy(), np.asarray(digits.y[:200])
    result = distill(teacher, student(), **settings, image_shape=SHAPE, unlabeled=x, test=(x, y), verbose=False)
    assert 0 <= result.summary["student_accuracy"] <= 100


# ------------------------------------------------------------------------------------------------------ signals


def test_a_deadline_can_be_brought_forward() -> None:
    deadline = Deadline(time.monotonic() + 100)
    assert not deadline.passed
    assert not time.monotonic() > deadline
    assert time.monotonic() < deadline
    deadline.stop()
    assert deadline.passed
    assert time.monotonic() > deadline
    assert not time.monotonic() < deadline
    assert Deadline(0.0).passed


def test_signals_stop_it_and_the_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    deadline = Deadline()
    with stopping(deadline):
        os.kill(os.getpid(), signal.SIGTERM)
        assert deadline.stopped
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat it
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def command(out: Path, teacher_file: Path, *more: str) -> list[str]:
    words = ["distill", "--teacher", str(teacher_file), "--student", "tiny4", *QUICK, "--out", str(out), "--no-report"]
    return [sys.executable, "-P", "-m", "dodistill", *words, "--steps", "4000", *more]


def wait_for(path: Path, process: subprocess.Popen[Any], what: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not (path.exists() and what()):
        assert process.poll() is None, "it ended before the signal"
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_75(number: signal.Signals, teacher_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with subprocess.Popen(command(out, teacher_file), stderr=subprocess.PIPE) as process:
        wait_for(out / "metrics.jsonl", process, lambda: b'"log"' in (out / "metrics.jsonl").read_bytes())
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert b"Traceback" not in said
    assert (out / "checkpoint.pt").exists()
    assert not (out / "summary.json").exists()


def test_compare_ends_its_children(grid: Path) -> None:
    out = grid.parent / "out"
    recipe = yaml.safe_load(grid.read_text())
    recipe["base"]["loop"] |= {"steps": 100_000, "eval_every": 100_000}
    grid.write_text(yaml.safe_dump(recipe))
    words = [sys.executable, "-P", "-m", "dodistill", "compare", str(grid), "--out", str(out)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        end = time.monotonic() + 120
        while not list(out.glob("runs/*/metrics.jsonl")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 75
    (run_folder,) = [p for p in (out / "runs").iterdir() if p.is_dir()]
    assert (run_folder / "checkpoint.pt").exists()
    listed = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert str(run_folder) not in listed


# ----------------------------------------------------------------------------------------------------- security


def test_a_yaml_py_in_the_current_folder_is_not_imported(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(grid.parent)
    Path("yaml.py").write_text("open('pwned', 'w').close()\nraise SystemExit(3)\n")
    assert compare(grid, grid.parent / "out") == 0
    assert not Path("pwned").exists()


def test_a_link_in_the_place_of_a_file_is_not_followed(place: Path) -> None:
    from dodistill.files import replacing

    precious = place / "precious"
    precious.write_text("keep")
    for name in ("report.html", ".report.html.tmp"):
        (place / name).symlink_to(precious)
    with replacing(place / "report.html") as file:
        file.write(b"page")
    assert precious.read_text() == "keep"
    assert (place / "report.html").read_bytes() == b"page"
    assert not (place / "report.html").is_symlink()


def test_metrics_do_not_follow_a_link(teacher: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("keep")
    (tmp_path / "run/.lock").touch()
    first = run(teacher, tmp_path / "other")
    shutil.copy(first.folder / "config.json", tmp_path / "run/config.json")
    (tmp_path / "run/metrics.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(DodistillError, match=r"metrics\.jsonl"):
        run(teacher, tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "keep"


def test_no_program_of_the_system_reads_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dodistill.data.images import load_images

    def started(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(subprocess, "check_call", started)
    monkeypatch.setattr(os, "system", started)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    (tmp_path / "a.png").write_bytes(eps)
    with pytest.raises(DodistillError, match="none of the 1 files"):
        load_images(tmp_path, image_shape=(3, 8, 8))


def test_an_archive_that_unpacks_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dodistill.data.images import load_images

    np.savez_compressed(tmp_path / "d.npz", x_train=np.zeros((1000, 32, 32), np.uint8))
    assert len(load_images(tmp_path / "d.npz", image_shape=(1, 32, 32))) == 1000
    monkeypatch.setenv("DODISTILL_MAX_GB", "0.001")
    with pytest.raises(DodistillError, match="DODISTILL_MAX_GB"):
        load_images(tmp_path / "d.npz", image_shape=(1, 32, 32))


def test_the_advice_for_a_pickle_quotes_its_name(tmp_path: Path) -> None:
    import pickle

    path = tmp_path / "a$(touch pwned).pt"
    path.write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(DodistillError, match="would run code") as told:
        load_model("tiny8", num_classes=10, weights=path)
    assert f"'{path}'" in str(told.value)


def test_a_damaged_checkpoint_gives_no_advice_to_allow_code(teacher: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(teacher, out)
    (out / "summary.json").unlink()
    for name in ("checkpoint.pt", "previous.pt"):
        (out / name).write_bytes(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(DodistillError) as told:
        run(teacher, out)
    assert "weights_only" not in str(told.value)


# ------------------------------------------------------------------------------------------------ the last word


def test_an_unexpected_error_is_one_message(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dodistill.commands import report

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of a bug\nsecond line")

    monkeypatch.setattr(report, "write_report", broken)
    before = state_of(place)
    with within(10):
        assert main(["report", "run"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "ZeroDivisionError: of a bug" in said
    log = Path(said.split("Traceback: ")[1].split(" ")[0])
    assert "in broken" in log.read_text()
    log.unlink()
    assert state_of(place) == before
    with pytest.raises(ZeroDivisionError):
        main(["report", "run", "--debug"])


def test_a_refused_run_leaves_no_folder(teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dodistill.engine.acquire import Acquirer

    def broken(*_: object, **__: object) -> None:
        raise DodistillError("no images")

    monkeypatch.setattr(Acquirer, "acquire", broken)
    with pytest.raises(DodistillError, match="no images"):
        run(teacher, tmp_path / "a/b/run")
    assert not (tmp_path / "a").exists()


def test_class_folders_that_are_numbers_are_in_order_of_value(tmp_path: Path) -> None:
    from dodistill.data.classes import in_order
    from dodistill.data.images import load_images

    for k in range(11):
        (tmp_path / str(k)).mkdir()
        Image.fromarray(np.full((8, 8), 20 * k, np.uint8)).save(tmp_path / str(k) / "a.png")
    found = load_images(tmp_path, image_shape=(1, 8, 8))
    assert found.y is not None
    assert found.classes == tuple(map(str, range(11)))
    assert found.x[:, 0, 0, 0].tolist() == [20 * k for k in found.y.tolist()]
    assert in_order({"cat", "10", "2"}) == ("10", "2", "cat")


def test_images_are_not_written_through_a_link(place: Path) -> None:
    (place / "precious").mkdir()
    (place / "images").mkdir()
    for k in range(10):
        (place / f"images/{k}").symlink_to(place / "precious")
    assert main(["export", "run", "images"]) == 2
    assert not list((place / "precious").iterdir())


def test_a_calibrated_model_replaces_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state_of(place)
    assert main(["evaluate", "t.safetensors", "--calibrate", "digits", "--out", "t.safetensors"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert state_of(place) == before


def test_nothing_of_the_environment_is_written(
    teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_user")
    run(teacher, tmp_path / "run")
    for path in (tmp_path / "run").iterdir():
        assert b"hf_secret_of_the_user" not in path.read_bytes(), path


@pytest.mark.parametrize("command", [["report"], ["export"], ["look", "--test", "digits"]])
def test_an_empty_folder_is_no_run(command: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "empty").mkdir()
    before = state_of(place)
    assert main([command[0], "empty", *(["images"] if command == ["export"] else []), *command[1:]]) == 2
    said = capsys.readouterr().err
    assert "empty" in said
    assert "Traceback" not in said
    assert state_of(place) == before


def test_a_disk_that_is_full_while_metrics_are_written(
    teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dodistill.engine import run_folder

    class Full:
        def write(self, _: str) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    def full(handle: int, *_: Any, **__: Any) -> Full:
        os.close(handle)
        return Full()

    monkeypatch.setattr(run_folder.os, "fdopen", full)
    with pytest.raises(DodistillError, match=r"cannot write .*metrics\.jsonl"):
        run(teacher, tmp_path / "run")
