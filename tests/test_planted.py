"""The planted context: what is in the images, how often, and what it does to a network that learns from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dodistill.commands.cli import main
from dodistill.data.images import contexts_of, load_images
from dodistill.data.planted import contexts, palette, plant
from dodistill.engine.teach import Teach, teach
from dodistill.errors import DodistillError
from dodistill.evaluation.probe import context_gap
from dodistill.models import load_model, save_model


@settings(max_examples=20, deadline=None)
@given(rho=st.floats(0, 1), classes=st.integers(2, 12), seed=st.integers(0, 99))
def test_the_context_is_the_class_s_own_with_probability_rho(rho: float, classes: int, seed: int) -> None:
    y = torch.arange(classes).repeat(3000)
    shown = contexts(y, classes, rho, torch.Generator().manual_seed(seed))
    assert 0 <= int(shown.min()) <= int(shown.max()) < classes
    assert abs((shown == y).float().mean().item() - rho) < 0.03
    if rho in (0.0, 1.0):
        assert (shown == y).float().mean() == rho
    others = torch.bincount((shown - y) % classes, minlength=classes)[1:].float() / len(y)
    assert torch.allclose(others, torch.full_like(others, (1 - rho) / (classes - 1)), atol=0.03)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_colours_can_be_told_apart(classes: int) -> None:
    colours = palette(classes).float()
    assert colours.shape == (classes, 3)
    gap = torch.cdist(colours, colours).fill_diagonal_(torch.inf)
    assert gap.min() > (40 if classes <= 10 else 2)


def test_grey_images_get_a_background_and_coloured_ones_a_frame() -> None:
    x = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    x[:, :, 4:8] = 255
    colours = palette(3)
    out = plant(x, torch.tensor([0, 2]), colours)
    assert (out[:, :, 4:8] == 255).all()
    for i, k in enumerate((0, 2)):
        assert (out[i, :, 9:] == colours[k][:, None, None]).all()
    rgb = torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    framed = plant(rgb, torch.tensor([1]), colours)
    assert torch.equal(framed[:, :, 2:14, 2:14], rgb[:, :, 2:14, 2:14])
    for edge in (framed[0, :, :2], framed[0, :, 14:], framed[0, :, :, :2], framed[0, :, :, 14:]):
        assert (edge == colours[1][:, None, None]).all()


def background(x: Tensor) -> Tensor:
    """Which colour an image of planted digits has in its upper left corner, which no digit reaches."""
    return torch.cdist(x[:, :, 0, 0].float(), palette(10).float()).argmin(1)


@pytest.mark.parametrize(
    ("spec", "split", "share"),
    [
        ("planted:digits", "train", 0.95), ("planted:digits:0.6", "train", 0.6), ("planted:digits", "test", 0.1),
        ("planted:digits:0.6", "test", 0.1), ("planted:digits:aligned", "test", 1.0),
        ("planted:digits:conflicting", "test", 0.0), ("planted:digits:aligned", "train", 1.0),
    ],
)  # fmt: skip
def test_the_splits_of_the_benchmark(spec: str, split: str, share: float) -> None:
    images = load_images(spec, split)
    assert images.y is not None
    assert images.image_shape == (3, 8, 8)
    plain = load_images("digits", split)
    assert torch.equal(images.y, plain.y)  # type: ignore[arg-type]
    assert abs((background(images.x) == images.y).float().mean().item() - share) < 0.04
    assert torch.equal(images.x, load_images(spec, split).x)
    assert load_images(spec, split, labels=False).y is None


def test_shapes_seeds_and_arrays(tmp_path: Path) -> None:
    assert load_images("planted:digits", image_shape=(3, 16, 16)).image_shape == (3, 16, 16)
    assert not torch.equal(load_images("planted:digits", seed=1).x, load_images("planted:digits").x)
    x = np.full((6, 10, 10, 3), 7, np.uint8)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(6) % 2)
    framed = load_images(f"planted:{tmp_path / 'a.npz'}:aligned")
    assert framed.image_shape == (3, 10, 10)
    assert (framed.x[0, :, 5, 5] == 7).all()
    assert contexts_of("planted:digits:0.7") == ["planted:digits:aligned", "planted:digits:conflicting"]
    assert contexts_of("digits") == []


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("planted:digits:1.5", "1.5 is not a share"),
        ("planted:photos:0.5", "no labels"),
        ("planted:digits:sometimes", "digits:sometimes"),
    ],
)
def test_mistakes(spec: str, said: str) -> None:
    with pytest.raises(DodistillError, match=said):
        load_images(spec, image_shape=(3, 8, 8))


def test_a_network_that_learns_from_them_inherits_the_bias(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Taught on planted digits it relies on the colour; taught on chance colours it does not; `distill` and `evaluate`
    measure it."""
    pair = [load_images(s, "test") for s in contexts_of("planted:digits")]
    files, gaps, schedule = {}, {}, Teach(epochs=5, batch=64, pad=1, flip=False, minival=0)
    for name, rho in (("biased", "0.95"), ("fair", "0.1")):
        model = load_model("tiny8", num_classes=10, in_channels=3, image_size=8, seed=0)
        teach(model, load_images(f"planted:digits:{rho}"), None, schedule)
        files[name] = save_model(model, tmp_path / f"{name}.safetensors")
        found = context_gap(model, pair)
        assert found["gap"] == pytest.approx(found["aligned"] - found["conflicting"])
        gaps[name] = found["gap"]
    assert gaps["biased"] > 50
    assert abs(gaps["fair"]) < 15

    out = tmp_path / "run"
    command = ["distill", "--teacher", str(files["biased"]), "--student", "tiny4", "--source", "data", "--train",
               "planted:digits", "--test", "planted:digits", "--criterion", "hinton", "--augment.pad", "1",
               "--augment.flip", "false", "--steps", "60", "--batch", "32", "--out", str(out), "--quiet",
               "--no-report"]  # fmt: skip
    assert main(command) == 0
    log = json.loads((out / "summary.json").read_text())["log"]
    assert log["teacher/gap"] == pytest.approx(gaps["biased"], abs=0.01)
    assert log["test/gap"] == pytest.approx(log["test/aligned"] - log["test/conflicting"], abs=0.01)
    assert log["test/gap"] > 20
    capsys.readouterr()
    assert main(["evaluate", str(out / "student.safetensors"), "--test", "planted:digits"]) == 0
    said = capsys.readouterr().out
    assert f"gap {log['test/gap']:.2f}" in said
