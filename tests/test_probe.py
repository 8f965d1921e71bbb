"""The linear probe: what it reads, what it leaves alone, and that it tells good features from none."""

from __future__ import annotations

import copy
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dodistill import api, distill
from dodistill.commands.cli import main
from dodistill.config.grid import Cell, Records, cell_key, cells, not_probed
from dodistill.config.tree import resolve
from dodistill.core.ranks import Ranks
from dodistill.data.images import Images
from dodistill.errors import DodistillError
from dodistill.evaluation.probe import features, halves, linear_probe
from dodistill.functional.resize import resized
from dodistill.models import heads, load_model, save_model
from dodistill.models.zoo import build
from helpers import same


def test_features_are_what_the_classifier_reads(teacher: nn.Module, digits: Images) -> None:
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    f = features(teacher, digits.x[:30], batch=7)
    assert f.shape == (30, 32)
    teacher.eval()
    with torch.no_grad():
        logits = teacher(digits.x[:30].float() / 255)
        torch.testing.assert_close(teacher.get_submodule("model.fc")(f), logits, rtol=1e-4, atol=1e-4)
    same(before, teacher.state_dict())
    assert not any(m._forward_pre_hooks for m in teacher.modules())


def test_features_of_a_context_head_and_of_a_convolution(teacher: nn.Module, digits: Images) -> None:
    plain = features(teacher, digits.x[:10])
    heads.attach(teacher)
    assert torch.equal(features(teacher, digits.x[:10]), plain)
    conv = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    f = features(conv, digits.x[:5])
    assert f.shape == (5, 6)
    x = digits.x[:5].float() / 255
    torch.testing.assert_close(f, conv[0](x).mean((2, 3)).detach())


def test_it_moves_nothing_and_repeats_itself(teacher: nn.Module, digits: Images, digits_test: Images) -> None:
    before, state = copy.deepcopy(teacher.state_dict()), torch.get_rng_state()
    first = linear_probe(teacher, digits, digits_test, epochs=3)
    assert first == linear_probe(teacher, digits, digits_test, epochs=3)
    assert first != linear_probe(teacher, digits, digits_test, epochs=3, seed=1)
    same(before, teacher.state_dict())
    assert torch.equal(state, torch.get_rng_state())
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())


def test_it_tells_features_from_noise(teacher: nn.Module, digits: Images, digits_test: Images) -> None:
    assert digits.y is not None
    good = linear_probe(teacher, digits, digits_test)
    assert good["test"] > 93
    blind = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(blind[1].weight)
    raw = linear_probe(blind, digits, digits_test)  # its features are the pixels
    assert 90 < raw["test"] <= good["test"] + 1
    shuffled = Images(digits.x, digits.y[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))])
    assert linear_probe(teacher, shuffled, digits_test, epochs=3)["test"] < 25


def test_other_classes_than_the_model_has(digits: Images, digits_test: Images) -> None:
    net = build("tiny4", 3, 1)
    halves = [Images(d.x, d.y % 5) for d in (digits, digits_test) if d.y is not None]
    assert linear_probe(net, halves[0], halves[1], epochs=5)["test"] > 25
    with pytest.raises(DodistillError, match="labels"):
        linear_probe(net, Images(digits.x), digits_test)


def test_evaluate_probes(tmp_path: Path, capsys: pytest.CaptureFixture[str], teacher: nn.Module) -> None:
    file = save_model(teacher, tmp_path / "t.safetensors")
    assert load_model(str(file)).spec["spec"] == "tiny8"
    assert main(["evaluate", str(file), "--probe", "digits"]) == 0
    said = capsys.readouterr().out
    assert "probe" in said
    assert "% on digits" in said
    assert "accuracy" not in said
    assert main(["evaluate", str(file), "--probe", "digits", "--test", "digits"]) == 0
    said = capsys.readouterr().out
    assert "probe" in said
    assert "accuracy" in said
    assert main(["evaluate", str(file)]) == 2
    assert "--test DATA, --probe DATA or --calibrate DATA" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "shape"), [((28, 28), (3, 32, 32)), ((28, 28), (1, 14, 10)), ((9, 9), (1, 9, 9))])
def test_arrays_are_resized_as_folders_are(size: tuple[int, int], shape: tuple[int, int, int]) -> None:
    """The oracle is Pillow, which reads folders."""
    x = torch.randint(0, 256, (5, 1, *size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = resized(x, shape, at_once=2)
    assert found.dtype == torch.uint8
    assert found.shape == (5, *shape)
    for image, small in zip(x, found):
        _, h, w = shape
        want = np.asarray(Image.fromarray(image[0].numpy()).resize((w, h), Image.Resampling.BILINEAR)).astype(int)
        for channel in small:
            assert np.abs(channel.numpy().astype(int) - want).max() <= 1


def test_colour_becomes_grey_as_in_pillow() -> None:
    x = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for image, grey in zip(x, resized(x, (1, 8, 8))):
        want = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")).astype(int)
        assert np.abs(grey[0].numpy().astype(int) - want).max() <= 1
    with pytest.raises(ValueError, match="2 channels cannot become images of 3; give 1 or 3"):
        resized(x[:, :2], (3, 8, 8))


def test_halves_of_data_without_labels_or_test(tmp_path: Path) -> None:
    x, y = np.zeros((6, 4, 4), np.uint8), np.arange(6) % 2
    np.savez(tmp_path / "good.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    np.savez(tmp_path / "plain.npz", x_train=x, x_test=x)
    np.savez(tmp_path / "one.npz", x_train=x, y_train=y, x_test=x, y_test=0 * y)
    np.save(tmp_path / "packed.npy", x)
    np.savez(tmp_path / "four.npz", x_train=np.zeros((6, 9, 9, 4), np.uint8), y_train=y, x_test=x, y_test=y)
    train, test = halves(str(tmp_path / "good.npz"), (3, 8, 8))
    assert train.image_shape == test.image_shape == (3, 8, 8)
    assert (len(train), len(test)) == (6, 2)
    assert halves(f"planted:{tmp_path / 'good.npz'}", (3, 8, 8))[0].image_shape == (3, 8, 8)
    for name, said in (("plain.npz", "no labels"), ("one.npz", "one class"), ("packed.npy", "no test images"),
                       ("four.npz", r"holds images of shape \(4, 9, 9\)")):  # fmt: skip
        with pytest.raises(DodistillError, match=said):
            halves(str(tmp_path / name), (3, 8, 8))
    for label in "ab":  # a folder with classes and without a test split, whose images cannot be decoded
        (tmp_path / "folder" / label).mkdir(parents=True)
        (tmp_path / "folder" / label / "0.png").write_bytes(b"no picture")
    with pytest.raises(DodistillError, match="folder has no test images of its own"):
        halves(str(tmp_path / "folder"), (3, 8, 8))


def run(out: Path, teacher: Path, *more: str) -> int:
    return main(["distill", "--teacher", str(teacher), "--student", "tiny4", "--source", "noise", "--steps", "2",
                 "--batch", "8", "--source.n", "64", "--out", str(out), *more])  # fmt: skip


def test_a_run_probes_its_student(tmp_path: Path, capsys: pytest.CaptureFixture[str], teacher: nn.Module) -> None:
    file, out = save_model(teacher, tmp_path / "t.safetensors"), tmp_path / "run"
    assert run(out, file, "--probe", "digits") == 0
    assert "% on digits, by a linear classifier on the frozen features" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    student = load_model(str(out / "student.safetensors"))
    shape = summary["image_shape"]
    want = linear_probe(student, *halves("digits", tuple(shape)))["test"]
    assert summary["probe"] == {"digits": pytest.approx(want, abs=0.5)}
    assert summary["log"]["probe/digits"] == summary["probe"]["digits"]
    assert "on digits." in (out / "report.html").read_text()
    assert "linear probe on" in (out / "README.md").read_text()


def test_a_finished_run_is_probed_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, teacher: nn.Module
) -> None:
    """The student stays, and so does all that was measured before."""
    file, out = save_model(teacher, tmp_path / "t.safetensors"), tmp_path / "run"
    assert run(out, file) == 0
    before = json.loads((out / "summary.json").read_text())
    weights = (out / "student.safetensors").read_bytes()
    assert "probe" not in before
    monkeypatch.setattr("dodistill.engine.match.Matcher.step", lambda *_, **__: pytest.fail("trained again"))
    assert run(out, file, "--probe", "digits") == 0
    after = json.loads((out / "summary.json").read_text())
    assert after["probe"]["digits"] == after["log"].pop("probe/digits")
    assert after == before | {name: after[name] for name in ("probe", "probe_images")}
    assert "on digits." in (out / "report.html").read_text()
    assert "linear probe on" in (out / "README.md").read_text()
    assert (out / "student.safetensors").read_bytes() == weights
    monkeypatch.setattr("dodistill.report.delivery.linear_probe", lambda *_, **__: pytest.fail("probed again"))
    assert run(out, file, "--probe", "digits") == 0
    assert run(out, file) == 0
    assert json.loads((out / "summary.json").read_text())["probe"] == after["probe"]


def test_a_wrong_probe_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], teacher: nn.Module) -> None:
    file, out = save_model(teacher, tmp_path / "t.safetensors"), tmp_path / "run"
    for spec, said in (("photos", "no labels"), ("dgits", "did you mean 'digits'"), ("a/digits,digits", "twice")):
        assert run(out, file, "--probe", spec) == 2
        assert said in capsys.readouterr().err
        assert not out.exists()


def test_a_probe_makes_no_other_cell() -> None:
    assert cell_key(resolve({"data.probe": ["digits"]})) == cell_key(resolve({}))
    assert resolve({"data.probe": ["digits"]}).key() == resolve({}).key()


def test_a_probe_in_python(teacher: nn.Module) -> None:
    net = build("tiny4", 10, 1)
    found = distill(teacher, net, "noise", image_shape=(1, 8, 8), steps=2, batch=8, data={"probe": ["digits"]},
                    verbose=False)  # fmt: skip
    assert found.summary["probe"]["digits"] == pytest.approx(
        linear_probe(found.student, *halves("digits", (1, 8, 8)))["test"], abs=0.5
    )


def test_both_splits_of_a_large_folder_are_cropped_as_test_images_are(tmp_path: Path) -> None:
    for split, label in itertools.product(("train", "test"), "ab"):
        (tmp_path / split / label).mkdir(parents=True)
        pixels = np.random.default_rng(ord(label)).integers(0, 255, (200, 200), np.uint8)
        Image.fromarray(pixels).save(tmp_path / split / label / "0.png")
    train, test = halves(str(tmp_path), (1, 160, 160))
    assert torch.equal(train.x, test.x)


def test_other_images_of_the_same_name_are_probed_anew(tmp_path: Path, teacher: nn.Module) -> None:
    x, y = np.random.default_rng(0).integers(0, 255, (40, 8, 8), np.uint8), np.arange(40) % 2
    found = []
    for folder, there in (("a", y), ("b", 1 - y)):
        file = tmp_path / folder / "set.npz"
        file.parent.mkdir()
        np.savez(file, x_train=x, y_train=y, x_test=x, y_test=there)
        net = build("tiny4", 10, 1)
        it = distill(teacher, net, "noise", image_shape=(1, 8, 8), steps=2, batch=8, data={"probe": [str(file)]},
                     out=tmp_path / "run", verbose=False)  # fmt: skip
        found.append(it.summary["probe"]["set.npz"])
    assert found[0] == pytest.approx(100 - found[1])


class Flat(nn.Module):
    """A student without a layer that reads features."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.w


def test_a_student_without_features_is_refused_before_the_first_step(tmp_path: Path, teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match=r"data\.probe reads the student's features.*Remove data\.probe"):
        distill(teacher, Flat(), "noise", image_shape=(1, 8, 8), steps=2, batch=8, data={"probe": ["digits"]},
                out=tmp_path / "run", verbose=False)  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_every_rank_has_a_probe_that_was_added(tmp_path: Path, teacher: nn.Module) -> None:
    sent: list[Any] = []

    class First(Ranks):
        def share(self, work: Any, held: Any = ()) -> Any:
            sent.append(copy.deepcopy(work()))
            return sent[-1]

    class Second(Ranks):
        rank = 1

        def share(self, work: Any, held: Any = ()) -> Any:
            return sent.pop(0)

    def found(probe: list[str], ranks: Ranks) -> Any:
        config = resolve({"source": "noise", "loop": {"steps": 2, "batch": 8}, "data": {"probe": probe}})
        job = api._job(config, teacher, build("tiny4", 10, 1), (1, 8, 8), None, None, None, None, None, None)
        torch.manual_seed(0)
        return api.run(job, tmp_path / "run", verbose=False, ranks=ranks).summary.get("probe")

    torch.manual_seed(0)
    found([], Ranks())
    assert found(["digits"], First()) == found(["digits"], Second())
    assert not sent


def test_probes_come_after_a_time_limit(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they change no student, they have no part in it."""

    def slow(*_: Any, **__: Any) -> dict[str, float]:
        time.sleep(3)
        return {"test": 50.0}

    monkeypatch.setattr("dodistill.report.delivery.linear_probe", slow)
    began = time.monotonic()
    found = distill(teacher, build("tiny4", 10, 1), "noise", image_shape=(1, 8, 8), batch=8, time="5s",
                    data={"probe": ["digits"]}, verbose=False)  # fmt: skip
    assert found.summary["time"]["used"] < time.monotonic() - began - 2.9


def test_a_grid_says_which_finished_cells_were_not_probed() -> None:
    cell = Cell({"seed": "0"}, resolve({"data.probe": ["digits", "a/mnist"]}), "", None)
    record = {"config": resolve({}).to_tree(), "summary": {"probe": {"digits": 50.0}}}
    (said,) = not_probed([cell], Records([record], Path()))
    assert said.startswith("1 finished cell was not probed on a/mnist")
    assert not not_probed([cell], Records([], Path()))


def test_cells_that_differ_in_their_probes_alone_are_refused() -> None:
    recipe = {"grid": {"probe": {"a": {"data.probe": ["digits"]}, "b": {"data.probe": ["mnist"]}}}}
    with pytest.raises(DodistillError, match=r"differ in data\.probe alone"):
        list(cells(recipe, Path()))
