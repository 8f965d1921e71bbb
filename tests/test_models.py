"""The zoo: parameter counts and key names of the literature, sizes, channels."""

import pytest
import torch
from torch import nn

from dodistill.errors import DodistillError
from dodistill.models import load_model, zoo_names
from dodistill.models.zoo import build

COUNTS = {  # at 10 and at 100 classes
    "resnet18": (11_173_962, 11_220_132),
    "resnet34": (21_282_122, 21_328_292),
    "resnet50": (23_520_842, 23_705_252),
    "vgg8": (3_918_858, 3_965_028),
    "vgg11": (9_231_114, 9_277_284),
    "vgg13": (9_416_010, 9_462_180),
    "wrn16_1": (175_066, 180_916),
    "wrn16_2": (691_674, 703_284),
    "wrn40_1": (563_930, 569_780),
    "wrn40_2": (2_243_546, 2_255_156),
    "wrn40_4": (8_949_210, 8_972_340),
    "resnet8": (75_290, 81_140),
    "resnet14": (172_506, 178_356),
    "resnet20": (269_722, 275_572),
    "resnet32": (464_154, 470_004),
    "resnet56": (853_018, 858_868),
    "resnet110": (1_727_962, 1_733_812),
    "mobilenetv2": (2_236_682, 2_351_972),
    "tinyvit48": (116_026, 120_436),
}
BATCHNORMS = {  # layers, channels in all
    "resnet18": (20, 4800),
    "resnet34": (36, 8512),
    "resnet50": (53, 26560),
    "vgg8": (5, 1472),
    "vgg11": (8, 2752),
    "wrn16_1": (13, 464),
    "wrn16_2": (13, 912),
    "wrn40_1": (37, 1360),
    "wrn40_2": (37, 2704),
}
KEYS = {
    "resnet34": ["conv1.weight", "bn1.running_var", "layer2.0.shortcut.0.weight", "layer2.0.shortcut.1.bias"],
    "resnet50": ["layer1.0.conv3.weight", "layer1.0.shortcut.1.running_mean", "linear.bias"],
    "resnet20": ["conv1.weight", "layer3.2.bn2.weight", "layer2.0.conv1.weight", "linear.weight"],
    "vgg11": ["block0.0.bias", "block2.3.weight", "block4.4.running_mean", "classifier.weight"],
    "wrn40_2": [
        "conv1.weight",
        "block1.layer.0.convShortcut.weight",
        "block3.layer.5.bn2.weight",
        "bn1.bias",
        "fc.bias",
    ],
    "mobilenetv2": [
        "features.0.0.weight",
        "features.18.1.running_var",
        "features.2.conv.1.0.weight",
        "classifier.1.bias",
    ],
    "tiny8": ["conv1.weight", "bn3.bias", "fc.weight"],
    "tinyvit48": ["patch_embed.proj.weight", "blocks.3.attn.qkv.bias", "blocks.0.mlp.fc2.weight", "norm.bias"],
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        counts = tuple(sum(p.numel() for p in build(name, k, 3).parameters()) for k in (10, 100))
    assert counts == COUNTS[name]


@pytest.mark.parametrize("name", BATCHNORMS)
def test_batchnorm_counts(name: str) -> None:
    with torch.device("meta"):
        widths = [m.num_features for m in build(name, 10, 3).modules() if isinstance(m, nn.BatchNorm2d)]
    assert (len(widths), sum(widths)) == BATCHNORMS[name]


@pytest.mark.parametrize("name", KEYS)
def test_keys(name: str) -> None:
    with torch.device("meta"):
        keys = build(name, 10, 3).state_dict().keys()
    assert set(KEYS[name]) <= set(keys)


def test_first_unit_of_a_narrow_wrn_has_no_projection() -> None:
    assert "block1.layer.0.convShortcut.weight" not in build("wrn16_1", 10, 3).state_dict()


@pytest.mark.parametrize("name", zoo_names())
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (3, 64), (1, 28), (1, 16), (1, 8)])
def test_every_network_runs_at_every_size(name: str, channels: int, size: int) -> None:
    with torch.device("meta"):
        out = build(name, 7, channels)(torch.empty(2, channels, size, size))
    assert out.shape == (2, 7)


@pytest.mark.parametrize("name", ["wrn16_1", "resnet20", "tiny8"])
def test_gradients_reach_every_parameter(name: str) -> None:
    net = build(name, 5, 3)
    net(torch.rand(4, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())


def test_vgg_pools_once_more_at_64() -> None:
    """At 64 pixels block 4 sees 4x4, the same as at 32."""
    seen = []
    net = build("vgg8", 10, 3)
    net.block4.register_forward_pre_hook(lambda _m, args: seen.append(tuple(args[0].shape[2:])))
    for size in (32, 64):
        net(torch.rand(1, 3, size, size))
    assert seen == [(4, 4), (4, 4)]


def test_option_a_shortcut_is_a_subsampled_zero_padded_copy() -> None:
    """With dead convolutions the unit gives relu(x), every second pixel, 8 zero channels at either side."""
    unit = build("resnet20", 10, 3).layer2[0].eval()
    nn.init.zeros_(unit.bn2.weight)
    x = torch.rand(2, 16, 8, 8)
    want = torch.zeros(2, 32, 4, 4)
    want[:, 8:24] = x[:, :, ::2, ::2]
    assert torch.equal(unit(x), want)


def test_mobilenetv2_has_torchvisions_weights() -> None:
    tv = pytest.importorskip("torchvision.models")
    theirs = {k: v.shape for k, v in tv.mobilenet_v2(num_classes=10).state_dict().items()}
    assert theirs == {k: v.shape for k, v in build("mobilenetv2", 10, 3).state_dict().items()}


def test_unknown_name_is_refused_with_its_neighbour() -> None:
    with pytest.raises(DodistillError, match="did you mean 'wrn40_4' or 'wrn40_2'"):
        load_model("wrn40_3", num_classes=10)
    with pytest.raises(DodistillError, match="tiny16"):
        load_model("tinyx", num_classes=10)
    with pytest.raises(DodistillError, match="num_classes"):
        load_model("wrn40_2")
