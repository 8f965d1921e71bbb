"""A wrong normalisation is noticed on drawn pictures, and the right one never is."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from dodistill.api import distill
from dodistill.commands.cli import main
from dodistill.data.images import Images
from dodistill.engine.normalisation import KNOWN, doubt
from dodistill.engine.teach import Teach, teach
from dodistill.models import NORMALISATION, Normalized, load_model, save_model
from dodistill.sources.shared.pictures import KINDS, draw
from helpers import SHAPE, student, tree

TEACHERS = Path(__file__).parents[2] / "shared" / "teachers"
WIDE = ((0.0,), (1 / 255,))


def told(net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], shape: tuple[int, int, int]) -> str:
    return doubt(Normalized(net, mean, std), shape)


@pytest.mark.parametrize("depth", [20, 32])
def test_the_public_resnets(depth: int) -> None:
    """Trained with ImageNet's; CIFAR's hardly differs from it."""
    file = TEACHERS / f"cifar10-resnet{depth}.safetensors"
    if not file.is_file():
        pytest.skip("the public checkpoints are not here")
    net = load_model(f"resnet{depth}", weights=file, mean="imagenet").model
    for silent in ("imagenet", "cifar10", "cifar100"):
        assert told(net, *NORMALISATION[silent], (3, 32, 32)) == ""
    for wrong in (NORMALISATION["none"], WIDE):
        said = told(net, *wrong, (3, 32, 32))
        assert "normalise imagenet" in said
        assert "distance" in said
    assert "normalise imagenet" in doubt(net, (3, 32, 32))  # a plain module reads [0, 1]


@pytest.mark.parametrize("name", ["tiny8", "wrn16_1"])
@pytest.mark.parametrize("trained", ["none", "imagenet", "half", "255"])
def test_freshly_taught_networks(name: str, trained: str) -> None:
    """Taught on other pictures than those of the check: two of the five kinds, from another stream."""
    spaces = {**NORMALISATION, "half": ((0.5,), (0.5,)), "255": WIDE}
    g = torch.Generator().manual_seed(7)
    x = torch.cat([draw({kind: 96}, (3, 16, 16), g, False) for kind in ("shapes", "textures")])
    images = Images(x, torch.arange(192) // 96)
    net = load_model(name, num_classes=2, in_channels=3, mean=spaces[trained][0], std=spaces[trained][1], seed=0)
    teach(net, images, None, Teach(epochs=3, batch=16, pad=1, minival=0.0, precision="fp32"))
    assert list(KINDS)[:1] == ["shapes"]
    for given, space in spaces.items():
        said = told(net.model, *space, (3, 16, 16)) if len(space[0]) in (1, 3) else ""
        if given == trained:
            assert said == ""
        if "255" in (given, trained) and given != trained:
            assert said
        if {given, trained} == {"none", "imagenet"}:
            assert f"normalise {trained}" in said


def test_digits_and_a_normalisation_of_ones_own(taught: Normalized) -> None:
    assert doubt(taught, SHAPE) == ""
    assert told(taught.model, *WIDE, SHAPE)


def test_a_deviation_that_the_data_have_is_no_error() -> None:
    """Images of low contrast with their own mean and deviation: the network reads unit variance, as from ImageNet's."""
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.LazyLinear(4)).eval()
    net(torch.zeros(2, 3, 16, 16))
    assert told(net, (0.5,) * 3, (0.03,) * 3, (3, 16, 16)) == ""
    assert "normalise imagenet" in told(net, *WIDE, (3, 16, 16))


def test_mean_and_deviation_of_pixels_to_1_for_a_network_of_pixels_to_255() -> None:
    """mean 0.5, std 0.5, input_range 255: nearly black images are no data that could have this mean."""
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.LazyLinear(4)).eval()
    net(torch.zeros(2, 3, 16, 16))
    assert "mean 0.5 and std 0.5" in told(net, (0.5 / 255,) * 3, (0.5 / 255,) * 3, (3, 16, 16))


def test_it_is_cheap_and_leaves_all_as_it_was(taught: Normalized) -> None:
    torch.manual_seed(0)
    net = load_model("resnet18", num_classes=10, in_channels=3, image_size=224).train()
    state, before = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    start = time.process_time()
    doubt(net, (3, 224, 224))
    assert time.process_time() - start < 2
    assert torch.equal(before, torch.get_rng_state())
    assert net.training
    assert not any(m._forward_pre_hooks for m in net.modules())
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key])


def test_where_it_cannot_tell_it_is_silent() -> None:
    assert doubt(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), SHAPE) == ""
    assert doubt(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm2d(1)), SHAPE) == ""  # it raises
    assert doubt(nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3)), SHAPE) == ""
    assert all(len(mean) == len(std) for mean, std in KNOWN.values())


def test_the_warning_reaches_the_user(
    taught: Normalized, digits: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Normalized(copy.deepcopy(taught.model), *WIDE)
    settings = {k: v for k, v in tree("dfnd", steps=2).items() if k not in ("source", "intervention")}
    result = distill(
        wrong, student(), tree("dfnd")["source"], image_shape=SHAPE, unlabeled=digits.x[:300], verbose=False, **settings
    )
    assert any("the normalisation may be wrong" in text for text in result.summary["warnings"])
    torch.save(taught.model.state_dict(), tmp_path / "w.pth")
    words = ["evaluate", "tiny8", "--weights", f"{tmp_path}/w.pth", "--test", "digits", "--image-shape", "1,8,8"]
    assert main([*words, "--input-range", "255"]) == 0
    assert "the normalisation may be wrong" in capsys.readouterr().err
    save_model(taught, tmp_path / "t.safetensors")
    assert main(["evaluate", f"{tmp_path}/t.safetensors", "--test", "digits"]) == 0
    assert capsys.readouterr().err == ""
