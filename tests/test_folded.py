"""The teacher's label passes: BatchNorm folded into the layers before it, equal to rounding, or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dodistill.functional.memory_format import laid_out, place
from dodistill.models import Normalized, load_model
from dodistill.models.folded import folded
from dodistill.models.teacher import Teacher


def images(n: int = 4, channels: int = 3, size: int = 32) -> Tensor:
    return laid_out(torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0)))


def lived_in(model: nn.Module) -> nn.Module:
    """`model` with BatchNorms whose weights and statistics are not those of a fresh one."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.running_mean is not None:
                for v, low, high in ((m.weight, 0.5, 1.5), (m.bias, -0.5, 0.5), (m.running_mean, -0.5, 0.5)):
                    v.copy_(low + (high - low) * torch.rand(v.shape, generator=g))
                assert m.running_var is not None
                m.running_var.copy_(0.5 + torch.rand(m.running_var.shape, generator=g))
    return place(model.eval())


def batchnorms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())


ALL_FOLD = ("resnet20", "resnet8", "vgg8", "vgg11", "tiny16", "mobilenetv2", "resnet18")


@pytest.mark.parametrize("spec", [*ALL_FOLD, "wrn16_1", "wrn40_1"])
def test_the_zoo_folds_and_answers_alike(spec: str) -> None:
    model = lived_in(load_model(spec, num_classes=10, in_channels=3, image_size=32, mean="cifar10", seed=0))
    copy = folded(model, images(2))
    assert copy is not None
    left = batchnorms(copy)
    if spec in ALL_FOLD:
        assert left == 0
    else:  # a pre-activation network has half of its BatchNorms after a sum
        assert 0 < left < batchnorms(model)
    x = images(5)
    with torch.no_grad():
        torch.testing.assert_close(copy(x), model(x), rtol=1e-3, atol=1e-3)
        assert not torch.equal(copy(x), torch.zeros_like(copy(x)))


class Shared(nn.Module):
    """One convolution in two places, each with a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.a, self.b, self.fc = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.conv(self.a(self.conv(x))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class Batches(Shared):
    """BatchNorms that always normalise by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.BatchNorm2d(3, track_running_stats=False)
        self.b = nn.BatchNorm2d(3, track_running_stats=False)


class Both(nn.Module):
    """What a convolution says is read twice, once without its BatchNorm; a linear layer folds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.fc, self.norm = nn.Linear(3, 10), nn.BatchNorm1d(10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        out: Tensor = self.norm(self.fc((self.bn(h) + h).mean((2, 3))))
        return out


class Branching(Both):
    """Control flow on values: another image may take another path."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if bool(x.mean() > 0.2) else -x)


class Activated(nn.BatchNorm2d):
    """A BatchNorm with an activation, as some libraries have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Subclassed(Both):
    """Only the linear layer's BatchNorm is a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = Activated(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.fc(self.bn(self.conv(x)).mean((2, 3))))
        return out


@pytest.mark.parametrize("kind", [Shared, Branching, Batches])
def test_what_cannot_be_folded_is_left_alone(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = lived_in(kind())
    assert folded(model, images(2)) is None
    teacher = Teacher(model, (3, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(teacher.answers(images()), teacher(images()))


@pytest.mark.parametrize("kind", [Both, Subclassed])
def test_only_what_nobody_else_reads_is_folded(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = lived_in(kind())
    copy = folded(model, images(2))
    assert copy is not None
    assert isinstance(copy.get_submodule("bn"), nn.BatchNorm2d)
    assert isinstance(copy.get_submodule("norm"), nn.Identity)
    with torch.no_grad():
        torch.testing.assert_close(copy(images()), model(images()), rtol=1e-3, atol=1e-3)


class Uncopied(Both):
    """A model that refuses to be copied."""

    def __deepcopy__(self, _memo: object) -> Uncopied:
        raise RuntimeError("only one of me")


class Narrow(nn.Module):
    """A BatchNorm over the positions of a linear layer's output, not over its features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.norm, self.head = (
            nn.Conv2d(3, 5, 3), nn.Linear(30, 7), nn.BatchNorm1d(5), nn.Linear(7, 10)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.fc(self.conv(x).mean(2))).mean(1))
        return out


@pytest.mark.parametrize("kind", [Uncopied, Narrow])
def test_what_does_not_fit_is_no_error(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = lived_in(kind())
    assert folded(model, images(2)) is None


def test_a_copy_that_answers_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from dodistill.models import folded as module

    model = lived_in(load_model("tiny16", num_classes=10, in_channels=3, image_size=32, seed=0))
    monkeypatch.setattr(module, "fuse_conv_bn_eval", lambda conv, bn: conv)
    assert folded(model, images(2)) is None


def test_the_teacher_answers_without_gradients_hooks_or_a_second_set_of_weights() -> None:
    model = lived_in(load_model("resnet8", num_classes=10, in_channels=3, image_size=32, seed=0))
    teacher = Teacher(model, (3, 32, 32))
    names = set(teacher.state_dict())
    seen: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda m, *_: seen.append(m)) for m in model.modules()]
    x = images().requires_grad_()
    t = teacher.answers(x)
    for hook in hooks:
        hook.remove()
    assert not t.requires_grad
    assert t.dtype == torch.float32
    torch.testing.assert_close(t, teacher(x).detach(), rtol=1e-3, atol=1e-3)
    assert set(teacher.state_dict()) == names
    assert isinstance(model, Normalized)
    assert batchnorms(model) > 0  # the model itself is untouched


def test_under_autocast_the_copy_is_still_made_in_fp32() -> None:
    model = lived_in(load_model("tiny16", num_classes=10, in_channels=3, image_size=32, seed=0))
    teacher = Teacher(model, (3, 32, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        teacher.answers(images())
    with torch.no_grad():
        torch.testing.assert_close(teacher.answers(images()), teacher(images()), rtol=1e-3, atol=1e-3)
