"""Noise with current statistics: the context managers, what is acquired, and how a student of noise is to be read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dodistill import distill
from dodistill.core.watch import Watcher
from dodistill.data.images import Images
from dodistill.errors import DodistillError
from dodistill.evaluation.evaluate import predict, top1
from dodistill.functional.augment import to_float
from dodistill.models.batchnorm import calibrate, current_statistics
from dodistill.sources.noise import Config, Noise
from dodistill.sources.procedural import evenness
from helpers import SHAPE, config, context, job, same, student


def build(teacher: nn.Module, seed: int = 0, **settings: Any) -> Noise:
    source = Config(**({"n": 64, "candidates": 64, "batch": 32} | settings)).build(context(teacher, seed, pad=0))
    assert isinstance(source, Noise)
    return source


@pytest.fixture
def pupil() -> nn.Module:
    return student().eval()


class Mixed(nn.Module):
    """All kinds of BatchNorm, one that keeps no statistics, and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 4, 3),
                nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6),
                nn.Linear(6, 3),
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


def trained_on(model: nn.Module, x: Tensor) -> Tensor:
    """The logits with every BatchNorm in train mode, of a copy."""
    model = copy.deepcopy(model).eval()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.train()
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def test_current_statistics_are_those_of_the_batch() -> None:
    model, x = Mixed().eval(), torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 3
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        own = model(x)
        with current_statistics(model):
            got = model(x)
        assert torch.equal(own, model(x))  # as it was
    assert torch.allclose(got, trained_on(model, x), atol=1e-6)
    assert not torch.allclose(got, own, atol=1e-2)
    same(before, model.state_dict())
    with pytest.raises(RuntimeError, match="broken"), current_statistics(model):
        raise RuntimeError("broken")
    same(before, model.state_dict())
    assert not any(m.training for m in model.modules())


def test_calibrate_takes_the_mean_over_batches() -> None:
    model, x = Mixed(), torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 3
    before = copy.deepcopy(model.state_dict())
    assert calibrate(model, x, batch=10) is model
    first = model.body[1]
    assert isinstance(first, nn.BatchNorm2d)
    assert first.momentum == 0.1
    h = model.body[0](x).detach()
    parts = h.split(10)
    assert torch.allclose(first.running_mean, torch.stack([p.mean((0, 2, 3)) for p in parts]).mean(0), atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(first.running_var, torch.stack([p.var((0, 2, 3)) for p in parts]).mean(0), atol=1e-5)  # type: ignore[arg-type]
    after = model.state_dict()
    for name, value in before.items():
        kept = "running" not in name and "num_batches" not in name
        assert torch.equal(value, after[name]) is kept, name
    assert not any(m.training for m in model.modules())
    levels = (x / 3 * 255).round().to(torch.uint8)
    a, b = calibrate(Mixed(), levels), calibrate(Mixed(), to_float(levels))
    same(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("statistics", ["current", "running"])
def test_the_labels_are_the_teacher_s(statistics: str, teacher: nn.Module, pupil: nn.Module) -> None:
    before = copy.deepcopy((teacher.state_dict(), pupil.state_dict()))
    got = build(teacher, statistics=statistics).acquire(pupil, 0)
    assert got.images.shape == (64, *SHAPE)
    assert got.images.dtype == torch.uint8
    for part, t in zip(got.images.split(32), got.logits.split(32)):  # type: ignore[union-attr]
        x = to_float(part)
        with torch.no_grad():
            expected = trained_on(teacher, x) if statistics == "current" else teacher(x)
        assert torch.allclose(t, expected, atol=1e-4)
    same(before, (teacher.state_dict(), pupil.state_dict()))
    assert all(p.grad is None for p in (*teacher.parameters(), *pupil.parameters()))


def test_a_last_batch_is_never_too_small(teacher: nn.Module, pupil: nn.Module) -> None:
    sizes: list[int] = []
    source = build(teacher, n=65, candidates=65)
    source.context.teacher.register_forward_hook(lambda _m, a, _o: sizes.append(len(a[0])))
    source.acquire(pupil, 0)
    assert sorted(sizes) == [21, 22, 22]
    sizes.clear()
    source = build(teacher, n=3, candidates=3, batch=2)
    source.context.teacher.register_forward_hook(lambda _m, a, _o: sizes.append(len(a[0])))
    source.acquire(pupil, 0)
    assert sizes == [3]  # 2 and 1 would be one image too few for its BatchNorm


def test_current_statistics_bring_the_classes_back(teacher: nn.Module, pupil: nn.Module) -> None:
    even = {}
    for statistics in ("current", "running"):
        got = build(teacher, n=600, candidates=600, batch=200, statistics=statistics).acquire(pupil, 0)
        assert got.logits is not None
        even[statistics] = float(evenness(got.logits))
    assert even["current"] > even["running"] + 0.2
    source = build(teacher, n=200, candidates=600, batch=200)
    source.acquire(pupil, 0)
    assert source.terms["kept_entropy"] > source.terms["drawn_entropy"]
    assert source.terms["kept_entropy"] > 0.95


def test_the_laws(teacher: nn.Module, pupil: nn.Module) -> None:
    x = {
        law: to_float(build(teacher, n=500, candidates=500, law=law).acquire(pupil, 0).images).flatten()
        for law in ("gaussian", "uniform")
    }
    # of N(0.3, 0.4^2), the teacher's normalisation, clipped to [0, 1]
    normal = torch.distributions.Normal(0.3, 0.4)
    assert (x["gaussian"] == 0).float().mean().item() == pytest.approx(
        float(normal.cdf(torch.tensor(0.5 / 255))), abs=0.02
    )
    for level in (0.2, 0.5, 0.8):
        at = torch.tensor(level)
        assert (x["gaussian"] < at).float().mean().item() == pytest.approx(float(normal.cdf(at)), abs=0.02)
        assert (x["uniform"] < at).float().mean().item() == pytest.approx(level, abs=0.02)


def test_same_seed_and_resume(teacher: nn.Module, pupil: nn.Module) -> None:
    a, b, c = build(teacher), build(teacher), build(teacher, 5)
    first, second = a.acquire(pupil, 0).images, a.acquire(pupil, 1).images
    assert not torch.equal(first, second)
    assert torch.equal(first, b.acquire(pupil, 0).images)
    assert not torch.equal(first, c.acquire(pupil, 0).images)
    c.load_state_dict(copy.deepcopy(a.state_dict()))
    x, y = a.acquire(pupil, 2), c.acquire(pupil, 2)
    assert torch.equal(x.images, y.images)
    assert torch.equal(x.logits, y.logits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"n": 1}, "source.n is 1"), ({"candidates": 63}, "source.candidates is 63, source.n 64"),
     ({"batch": 1}, "source.batch is 1")],
)  # fmt: skip
def test_bad_settings_are_named(settings: dict[str, Any], said: str, teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match=said):
        build(teacher, **settings)


@pytest.mark.parametrize("pad", [0, 1])
def test_the_student_is_matched_with_the_labels_of_the_pool(pad: int, teacher: nn.Module) -> None:
    source = {"name": "noise", "n": 64, "candidates": 64, "batch": 32, "every": 3}
    run = job(teacher, config("real", source=source, pool={"capacity": 64}, augment={"pad": pad, "flip": False}))
    run.acquire(Watcher())
    seen: list[Tensor] = []
    loss = run.matcher.criterion.forward
    run.matcher.criterion.forward = lambda s, t, *more: (seen.append(t), loss(s, t, *more))[1]  # type: ignore[method-assign]
    run.match()
    among = (seen[0][:, None] == run.acquirer.pool.logits[None]).all(2).any(1)
    assert bool(among.all()) is (pad == 0)
    assert any("With augmentation" in note for note in run.acquirer.source.notes) is (pad > 0)


def test_a_student_of_noise_must_be_calibrated(teacher: nn.Module, digits: Images, digits_test: Images) -> None:
    result = distill(
        teacher, student(width=8), {"name": "noise", "n": 640, "candidates": 1280}, preset="desk", image_shape=SHAPE,
        verbose=False, pool={"capacity": 640}, loop={"steps": 120, "batch": 64, "eval_every": 120},
    )  # fmt: skip
    assert any("calibrate" in w for w in result.summary["warnings"])

    def accuracy() -> float:
        return top1(predict(result.student, digits_test.x), digits_test.y)  # type: ignore[arg-type]

    delivered = accuracy()
    with current_statistics(result.student):
        by_batch = accuracy()
    calibrate(result.student, digits.x[:64])
    assert by_batch > 55
    assert accuracy() > 55
    assert delivered < accuracy() - 5
