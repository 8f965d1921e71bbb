"""Bad input, end to end: one message that names the value and the fix, exit code 2, within 5 s, and nothing lost."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from dodistill.api import distill, distill_config, evaluate
from dodistill.commands.cli import main
from dodistill.config.tree import resolve
from dodistill.data.images import Images
from dodistill.engine import Distiller, Diverged
from dodistill.engine.run_folder import RunFolder
from dodistill.errors import DodistillError
from dodistill.models import load_model, save_model
from helpers import SHAPE, config, job, same, student, tree


@pytest.fixture(autouse=True)
def _within_five_seconds(taught: nn.Module) -> Any:
    start = time.process_time()
    yield
    assert time.process_time() - start < 5


Refused = Callable[..., str]


@pytest.fixture
def refused(teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run the command with these flags over a good command's; the message. No folder must be left behind."""

    def run(
        *flags: str, teacher: Path | str = teacher_file, out: Path = tmp_path / "runs" / "new", recipe: str = ""
    ) -> str:
        fresh = not out.exists()
        command = [
            "distill",
            *([recipe] if recipe else []),
            "--teacher",
            str(teacher),
            "--student",
            "tiny4",
            "--quiet",
            "--out",
            str(out),
        ]
        good = ["--steps", "2", "--batch", "8", "--source.K", "1", "--source.batch", "8", "--device", "cpu"]
        if "--source" in flags:
            good = good[:4]
        assert main([*command, *good, "--threads", "1", *flags]) == 2
        text = capsys.readouterr().err
        assert text.startswith("dodistill: ")
        assert "Traceback" not in text
        assert not fresh or not out.exists()
        return text

    return run


# --------------------------------------------------------------------------------------------- class counts


def test_a_factory_that_takes_no_number_of_classes(refused: Refused, taught: nn.Module, tmp_path: Path) -> None:
    file, weights = tmp_path / "net.py", str(tmp_path / "t.pth")
    file.write_text("import dodistill\ndef make(): return dodistill.load_model('tiny8', num_classes=10)")
    torch.save(taught.model.state_dict(), weights)  # type: ignore[union-attr,operator]
    its = ["--teacher.weights", weights, "--teacher.normalise", "none", "--image_shape", "1,8,8"]
    text = refused(*its, "--teacher.num-classes", "7", teacher=f"{file}:make")
    assert f"--teacher.num-classes is 7, but {file}:make has 10 outputs" in text


def test_weights_without_a_shape_are_those_of_the_model_that_is_scored(taught: nn.Module, digits_test: Images) -> None:
    bare = taught.model
    for call, who in ((lambda: evaluate(bare, digits_test), "model"), (lambda: distill(bare, bare), "teacher")):
        with pytest.raises(DodistillError, match=f"the {who}'s weights do not contain its image shape"):
            call()


def test_student_with_other_classes(refused: Refused, teacher_file: Path, tmp_path: Path) -> None:
    text = refused("--student.num_classes", "7")
    assert "student.num_classes is 7, but the teacher has 10 classes" in text
    other = tmp_path / "seven.safetensors"
    save_model(student(classes=7), other)
    text = refused("--student.weights", str(other))
    assert "7 classes" in text
    assert "10" in text
    with pytest.raises(DodistillError, match=r"student returns shape \(2, 7\).*teacher has 10.*num_classes=10"):
        distill(load_model(str(teacher_file)), student(classes=7), image_shape=SHAPE, verbose=False)


def test_teacher_with_other_classes_than_its_weights(refused: Refused, teacher_file: Path) -> None:
    text = refused("--teacher.weights", str(teacher_file), "--teacher.num_classes", "12", teacher="tiny8")
    assert "10 classes" in text
    assert "num_classes is 12" in text


def test_weights_of_another_network(refused: Refused, teacher_file: Path) -> None:
    text = refused("--teacher.weights", str(teacher_file), "--image_shape", "1,8,8", teacher="tiny4")
    assert "teacher.safetensors" in text
    text = refused("--image_shape", "3,32,32", teacher="wrn16_1")
    assert "wrn16_1 has no weights" in text
    text = refused("--image_shape", "3,32,32", "--teacher.weights", "random", teacher="wrn16_1")
    assert "num_classes" in text


# ------------------------------------------------------------------------------------------------- weights


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("evil-was-here",))


def test_a_pickle_that_runs_code(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, write in (("new.pth", torch.save), ("old.pt", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        write({"state_dict": Evil()}, tmp_path / name)
        text = refused("--teacher.weights", str(tmp_path / name), "--image_shape", "1,8,8", teacher="tiny8")
        assert name in text
        assert "code" in text
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_weights(keep: float, refused: Refused, teacher_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    data = teacher_file.read_bytes()
    cut.write_bytes(data[: int(keep * len(data))])
    text = refused(teacher=cut)
    assert "cut.safetensors" in text
    assert "damaged or truncated" in text


def test_missing_weights_and_unknown_models(refused: Refused, tmp_path: Path) -> None:
    assert "gone.safetensors" in refused(teacher=tmp_path / "gone.safetensors")
    assert "did you mean" in refused("--student", "wrn16_l")
    assert "no student given" in refused("--student", "")
    assert "no teacher given" in refused(teacher="")


# ------------------------------------------------------------------------------------------------- teachers

_TEACHERS = """
import torch
from torch import nn
class Bad(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.bn, self.f = nn.BatchNorm2d(1), f
    def forward(self, x):
        return self.f(self.bn(x).flatten(1))
def nan(): return Bad(lambda x: x[:, :10] * float("nan"))
def pair(): return Bad(lambda x: (x[:, :10], x))
def wide(): return Bad(lambda x: x[:, :10, None])
def probabilities(): return Bad(lambda x: x[:, :10].softmax(1))
def plain(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
def broken(): return Bad(lambda x: x @ torch.ones(3, 3))
"""


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("nan", "returns NaN or infinity"),
        ("pair", "returns a tuple, not a tensor of logits"),
        ("wide", "shape (2, 10, 1) for 2 images"),
        ("probabilities", "remove its final softmax"),
        ("plain", "has none. Methods that work with it: "),
        ("broken", "does not take images of shape (1, 8, 8)"),
        ("nam", "did you mean 'nan'"),
    ],
)
def test_bad_teachers(factory: str, said: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(_TEACHERS)
    more = ["--teacher.weights", "random"] if factory == "plain" else []
    assert said in refused("--image_shape", "1,8,8", *more, teacher=f"{tmp_path / 'nets.py'}:{factory}")


def test_a_teacher_of_other_images(refused: Refused, teacher_file: Path) -> None:
    text = refused("--image_shape", "3,8,8")
    assert "does not take images of shape (3, 8, 8)" in text
    assert "takes 1 channel" in text
    text = refused("--teacher.weights", str(teacher_file), "--image_shape", "1,10,10", teacher="tiny8")
    assert "multiples of 4, but the teacher takes 10x10" in text


# -------------------------------------------------------------------------------------------------- images


def picture(path: Path, size: int = 8) -> None:
    noise = np.random.default_rng(len(path.name)).integers(0, 255, (size, size), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path)


def test_unlabelled_images_that_are_not_there(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    assert "needs unlabelled images; give --data.unlabeled FOLDER" in refused("--source", "dfnd")
    assert f"no images at {folder}/none.npz" in refused("--source", "dfnd", "--unlabeled", f"{folder}/none.npz")
    folder.mkdir()
    assert f"{folder} is empty" in refused("--source", "dfnd", "--unlabeled", str(folder))
    (folder / "a.txt").write_text("no image")
    (folder / "b.png").write_bytes(b"\x89PNG broken")
    text = refused("--source", "dfnd", "--unlabeled", str(folder))
    assert "none of the 2 files" in text


def test_broken_files_are_counted_skipped_and_said(teacher_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for k in range(12):
        picture(folder / f"{'x' * (k + 1)}.png")
    (folder / "broken.png").write_bytes((folder / "x.png").read_bytes()[:40])
    (folder / "notes.txt").write_text("no image")
    given = tree("dfnd", steps=2, teacher={"spec": str(teacher_file)}, student={"spec": "tiny4"})
    result = distill_config(resolve(given, {"data.unlabeled": str(folder)}), tmp_path / "run", verbose=False)
    assert result.summary["images"] + 1 == 12  # one is held back
    assert sum("skipped 2 of 14" in note for note in result.summary["warnings"]) == 1


def test_images_of_another_size(refused: Refused, tmp_path: Path) -> None:
    np.save(tmp_path / "large.npy", np.zeros((5, 16, 16), np.uint8))
    text = refused("--source", "dfnd", "--unlabeled", str(tmp_path / "large.npy"))
    assert "(1, 16, 16)" in text
    assert "(1, 8, 8)" in text
    np.save(tmp_path / "colour.npy", np.zeros((5, 8, 8, 3), np.uint8))
    assert "(3, 8, 8)" in refused("--test", str(tmp_path / "colour.npy"))
    np.save(tmp_path / "float.npy", np.zeros((5, 8, 8), np.float32))
    assert "float32" in refused("--source", "dfnd", "--unlabeled", str(tmp_path / "float.npy"))
    np.savez(tmp_path / "bare.npz", x_test=np.zeros((5, 8, 8), np.uint8))
    assert "no labels" in refused("--test", str(tmp_path / "bare.npz"))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(5, 8), r"unlabelled images have shape \(5, 8\)"),
        (torch.full((5, 1, 8, 8), 200.0), "range from 200 to 200; give uint8, or floats in"),
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), "and not empty"),
    ],
)
def test_bad_tensors(images: Tensor, said: str, teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match=said):
        distill(teacher, student(), "dfnd", image_shape=SHAPE, unlabeled=images, verbose=False)


def test_in_python_the_shape_must_be_known(teacher: nn.Module) -> None:
    bare = teacher.model
    assert isinstance(bare, nn.Module)
    with pytest.raises(DodistillError, match=r"image_shape=\(3, 32, 32\)"):
        distill(bare, student(), verbose=False)


# ------------------------------------------------------------------------------------------ names and keys


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--source", "deepinw"], "unknown source 'deepinw'; did you mean 'deepinv'? Known: "),
        (["--intervention", "kdc"], "unknown intervention 'kdc'; did you mean 'kdci'"),
        (["--criterion", "k1"], "unknown criterion 'k1'; did you mean 'l1' or 'kl'"),
        (["--preset", "dsk"], "unknown preset 'dsk'; did you mean 'desk'"),
        (["--loop.sedd", "1"], "loop: unknown key 'sedd'; did you mean 'seed'"),
        (["--lop.seed", "1"], "unknown key 'lop'; did you mean 'loop'"),
        (["--device", "cudda"], "unknown device 'cudda'; use auto, cpu, cuda"),
        (["--steps", "lots"], "loop.steps is 'lots'; it must be of type int"),
        (["--augment.pad", "9"], "augment.pad is 9 pixels"),
        (["stray"], "'stray'"),
    ],
)
def test_unknown_names(flags: list[str], said: str, refused: Refused) -> None:
    assert said in refused(*flags)


def test_a_recipe_with_an_unknown_key(refused: Refused, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("source: fast\noptim:\n  learning_rate: 0.1\n")
    assert "optim: unknown key 'learning_rate'" in refused(recipe=str(recipe))
    assert "cannot read recipe" in refused(recipe=str(tmp_path / "gone.yaml"))
    recipe.write_text("source: [fast\n")
    assert "cannot read recipe" in refused(recipe=str(recipe))
    recipe.write_text("- a list\n")
    assert "must be a mapping" in refused(recipe=str(recipe))


# ---------------------------------------------------------------------------------------------- run folders


def test_the_folder_of_another_config(refused: Refused, teacher_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = tree(steps=2, teacher={"spec": str(teacher_file)}, student={"spec": "tiny4"})
    distill_config(resolve(given), out, verbose=False, report=False)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    text = refused("--loop.seed", "8", out=out)
    assert "belongs to another config" in text
    assert "loop.seed: 0 -> 8" in text
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_mistake_leaves_no_folder_in_the_way(refused: Refused, teacher_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    refused("--student.num_classes", "7", out=out)
    given = tree(steps=2, teacher={"spec": str(teacher_file)}, student={"spec": "tiny4"})
    assert distill_config(resolve(given), out, verbose=False, report=False).summary["finished"]


def test_no_write_permission(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, to whom all is permitted."""
    with monkeypatch.context() as m:
        m.setattr(os, "access", lambda path, mode: False)
        assert f"cannot write to {tmp_path}: no permission; choose another --out" in refused(out=tmp_path / "run")

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as m:
        m.setattr(Path, "mkdir", denied)
        assert "Permission denied; choose another --out" in refused(out=tmp_path / "run")
    (tmp_path / "there").mkdir()
    with monkeypatch.context() as m:
        m.setattr(os, "replace", denied)
        assert "Permission denied" in refused(out=tmp_path / "there")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(out=tmp_path / "file")


# -------------------------------------------------------------------------------------------------- NaN


class Sours(nn.Module):
    """A sound teacher until it, or the copy of it that labels images, has been asked `calls` times."""

    def __init__(self, model: nn.Module, calls: int, value: float = float("nan")) -> None:
        super().__init__()
        self.model, self.left, self.value = model, calls, value

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        out: Tensor = self.model(x)
        return out if self.left >= 0 else out * self.value


def ended(it: Distiller, folder: Path) -> bool:
    with contextlib.closing(RunFolder(folder / "run", it.config)) as opened:
        return it.run(opened)


@pytest.mark.parametrize("intervention", ["none", "kdci+stratified"])
def test_a_teacher_that_sours_is_named_and_the_last_checkpoint_is_good(
    intervention: str, teacher: nn.Module, digits: Images, tmp_path: Path
) -> None:
    cfg = config("dfnd", intervention, steps=40, loop={"checkpoint_seconds": 0.0, "log_every": 5, "eval_every": 40})
    it = job(Sours(teacher, 14), cfg, digits.x[:300])
    with pytest.raises(
        Diverged, match=r"not finite: .*(match/kd|kd).* in step \d+.*optim.lr is 0.05.*checkpoint is kept"
    ):
        ended(it, tmp_path)
    saved = RunFolder(tmp_path / "run", cfg).load()
    assert saved is not None
    state = saved[0]
    assert 4 <= state["step"] <= 13
    assert all(torch.isfinite(v).all() for v in state["matcher"]["student"].values())
    again, whole = job(teacher, cfg, digits.x[:300]), job(teacher, cfg, digits.x[:300])
    assert ended(again, tmp_path)
    assert whole.run()
    same(whole.matcher.student.state_dict(), again.matcher.student.state_dict())


@pytest.mark.parametrize(
    ("source", "term"), [("fast", "source/bn, source/ce"), ("deepinv", "source/ce"), ("dfnd", "source/ce")]
)
def test_a_teacher_that_sours_while_inputs_are_made(
    source: str, term: str, teacher: nn.Module, digits: Images, tmp_path: Path
) -> None:
    cfg = config(source, "kdci+stratified", steps=40)
    with pytest.raises(Diverged, match=f"acquisition 1.*not finite: .*{term}"):
        ended(job(Sours(teacher, 1), cfg, digits.x[:300]), tmp_path)


@pytest.mark.parametrize("log_every", [1, 7, 1000])
@pytest.mark.parametrize("steps", [1, 30])
def test_a_rate_that_is_far_too_high(steps: int, log_every: int, teacher: nn.Module, tmp_path: Path) -> None:
    """Whenever it looks, it never saves broken weights, nor delivers them."""
    cfg = config(steps=steps, optim={"lr": 1e38}, loop={"log_every": log_every, "checkpoint_seconds": 0.0})
    with pytest.raises(Diverged, match=r"optim.lr is 1e\+38"):
        ended(job(teacher, cfg), tmp_path)
    saved = RunFolder(tmp_path / "run", cfg).load()
    if saved is not None:
        assert all(torch.isfinite(v).all() for v in saved[0]["matcher"]["student"].values())


def test_divergence_promises_only_what_is_there(teacher: nn.Module) -> None:
    """No checkpoint without a folder, and no term's weight where all terms are finite."""
    cfg = config(steps=1, optim={"lr": 1e38})
    with pytest.raises(Diverged) as told:
        job(teacher, cfg).run()
    said = str(told.value)
    assert said.endswith("in step 1. Lower the rate (optim.lr is 1e+38).")


def test_divergence_on_the_command_line(refused: Refused, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    text = refused("--optim.lr", "1e38", "--steps", "20", out=out)
    assert "optim.lr is 1e+38" in text
    assert "not finite" in text
    assert not (out / "student.safetensors").exists()
    assert not (out / "summary.json").exists()


def test_weights_with_nan(refused: Refused, taught: nn.Module, tmp_path: Path) -> None:
    state = {k: v.clone().contiguous() for k, v in taught.model.state_dict().items()}  # type: ignore[union-attr,operator]
    state["fc.bias"][3] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    text = refused("--teacher.weights", str(tmp_path / "nan.safetensors"), "--image_shape", "1,8,8", teacher="tiny8")
    assert "fc.bias contains NaN" in text
