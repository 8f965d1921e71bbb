"""The teacher is frozen for good, and a bad one is refused in words."""

import pytest
import torch
from torch import Tensor, nn

from dodistill.errors import DodistillError
from dodistill.models import load_model
from dodistill.models.taps import batchnorm_inputs, pooled_inputs
from dodistill.models.teacher import Teacher

SHAPE = (1, 8, 8)


class Returns(nn.Module):
    """A model that returns what it is told to, made from the flat images."""

    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x.flatten(1))


def test_a_teacher_is_frozen_and_stays_in_eval() -> None:
    net = load_model("tiny8", num_classes=6, mean="mnist")
    teacher = Teacher(net, SHAPE, 6)
    assert (teacher.num_classes, teacher.image_shape, teacher.has_batchnorm) == (6, SHAPE, True)
    assert not any(p.requires_grad for p in net.parameters())
    nn.ModuleList([teacher]).train()
    assert not any(m.training for m in teacher.modules())
    before = net.model.bn1.running_mean.clone()
    x = torch.rand(4, *SHAPE, requires_grad=True)
    teacher.train()(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(before, net.model.bn1.running_mean)


def test_probing_uses_no_global_randomness() -> None:
    net = load_model("tiny8", num_classes=6)
    before = torch.get_rng_state()
    Teacher(net, SHAPE)
    assert torch.equal(before, torch.get_rng_state())


def test_a_teacher_in_another_precision_is_named() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).half()
    with pytest.raises(DodistillError, match=r"weights are float16.*teacher\.float\(\)"):
        Teacher(net, SHAPE)


def test_logits_are_fp32_under_autocast() -> None:
    teacher = Teacher(load_model("tiny8", num_classes=6), SHAPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert teacher(torch.rand(2, *SHAPE)).dtype == torch.float32


@pytest.mark.parametrize(
    ("f", "said"),
    [
        (lambda x: (x, x), "returns a tuple"),
        (lambda x: x[:, :5].unflatten(1, (5, 1)), r"shape \(2, 5, 1\)"),
        (lambda x: x[:1], "for 2 images"),
        (lambda x: x[:, :5] * float("nan"), "NaN"),
        (lambda x: x[:, :5] / 0, "infinity"),
        (lambda x: x[:, :5].long(), "int64"),
        (lambda x: x[:, :5].softmax(1), "probabilities"),
        (lambda x: x[:, :7], "7 classes, but num_classes is 5"),
        (lambda x: x @ torch.ones(3, 5), r"images of shape \(1, 8, 8\)"),
    ],
)
def test_bad_teachers(f, said: str) -> None:
    with pytest.raises(DodistillError, match=said):
        Teacher(Returns(f), SHAPE, 5)
    with pytest.raises(DodistillError, match="at least 2"):
        Teacher(Returns(lambda x: x[:, :1]), SHAPE)


def test_wrong_channels_and_shapes() -> None:
    net = load_model("wrn16_1", num_classes=5)
    with pytest.raises(DodistillError, match=r"\(1, 8, 8\).*convolution takes 3 channel"):
        Teacher(net, SHAPE)
    with pytest.raises(DodistillError, match="image_shape is"):
        Teacher(net, (32, 32))  # type: ignore[arg-type]


def test_require_lists_the_methods_that_would_work() -> None:
    plain = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), SHAPE)
    assert not plain.has_batchnorm
    plain.require(set(), "dfnd", [])
    with pytest.raises(DodistillError, match=r"'deepinv'.*Sequential.*work with it: dfnd, fast"):
        plain.require({"batchnorm"}, "deepinv", ["fast", "dfnd"])
    Teacher(load_model("tiny8", num_classes=6), SHAPE).require({"batchnorm"}, "deepinv", [])


class Auxiliary(nn.Module):
    """As of Inception: a second head that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.fc = nn.BatchNorm2d(1), nn.Linear(64, 5)
        self.extra = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.bn(x).flatten(1))
        return out + self.extra(x).mean() if self.training else out


def test_batchnorms_of_an_auxiliary_head_are_not_read() -> None:
    teacher = Teacher(Auxiliary(), SHAPE)
    assert teacher.reached_batchnorms == [teacher.model.bn]
    with batchnorm_inputs(teacher) as taps, pooled_inputs(teacher) as pooled:
        teacher(torch.rand(3, *SHAPE))
        assert len(list(taps)) == 1
        assert pooled.features.shape == (3, 1)
    assert not Teacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), SHAPE).has_batchnorm


def test_a_batchnorm_without_statistics_does_not_count() -> None:
    net = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(64, 5))
    assert not Teacher(net, SHAPE).has_batchnorm
