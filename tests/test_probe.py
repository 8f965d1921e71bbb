"""The linear probe: what it reads, what it leaves alone, and that it tells good features from none."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from dodistill.commands.cli import main
from dodistill.data.images import Images
from dodistill.errors import DodistillError
from dodistill.evaluation.probe import features, linear_probe
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
