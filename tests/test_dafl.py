"""DAFL: its three terms against the equations, the generators of the literature, and fresh batches."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dodistill import engine
from dodistill.config import registry
from dodistill.config.tree import resolve
from dodistill.data.images import Images
from dodistill.errors import DodistillError
from dodistill.functional.augment import to_float, to_uint8
from dodistill.functional.losses import coverage
from dodistill.models import Normalized
from dodistill.models.normalized import normalised_space
from dodistill.models.taps import penultimate
from dodistill.sources.dafl import activation, information_entropy, one_hot
from dodistill.sources.shared.base import Acquired
from dodistill.sources.shared.fresh import pooled
from dodistill.sources.shared.generators import ConvGenerator
from helpers import SHAPE, context, job, same, student

SMALL: dict[str, Any] = {"batch": 16, "latent": 8, "width": 4, "every": 2, "fresh": 2}


def build(teacher: nn.Module, seed: int = 0, **more: Any) -> Any:
    config = registry.config("source", "dafl")(**(SMALL | more))
    return config.build(context(teacher, seed))  # type: ignore[attr-defined]


@pytest.fixture
def pupil() -> nn.Module:
    return student().eval()


# -------------------------------------------------------------------------------------------------- the losses


def slow_softmax(row: list[float]) -> list[float]:
    exps = [math.exp(v) for v in row]
    return [e / sum(exps) for e in exps]


def slow_one_hot(t: list[list[float]]) -> float:
    return -sum(math.log(max(slow_softmax(row))) for row in t) / len(t)


def slow_entropy(t: list[list[float]], base: float) -> float:
    rows = [slow_softmax(row) for row in t]
    p = [sum(row[c] for row in rows) / len(t) for c in range(len(t[0]))]
    return sum(v * math.log(v) / math.log(base) for v in p)


def slow_coverage(t: list[list[float]]) -> float:
    rows = [slow_softmax(row) for row in t]
    p = [sum(row[c] for row in rows) / len(t) for c in range(len(t[0]))]
    return sum(max(0.0, math.log(1 / (4 * len(p)) / v)) / len(p) for v in p)


@pytest.mark.parametrize("seed", range(3))
def test_terms_against_the_equations(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    t = 3 * torch.randn(9, 5, generator=g, dtype=torch.float64)
    f = torch.randn(9, 7, generator=g, dtype=torch.float64)
    assert one_hot(t).item() == pytest.approx(slow_one_hot(t.tolist()), rel=1e-12)
    assert information_entropy(t).item() == pytest.approx(slow_entropy(t.tolist(), math.e), rel=1e-12)
    assert information_entropy(t, "log10").item() == pytest.approx(slow_entropy(t.tolist(), 10), rel=1e-12)
    t[:, seed] -= 6
    assert coverage(t).item() == pytest.approx(slow_coverage(t.tolist()), rel=1e-12)
    assert coverage(t) > 0.1
    mean = sum(abs(v) for row in f.tolist() for v in row) / 63
    assert activation(f).item() == pytest.approx(-mean, rel=1e-12)


@given(st.integers(2, 8), st.integers(1, 12), st.floats(0.1, 300), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_ranges(classes: int, n: int, scale: float, seed: int) -> None:
    t = scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))
    assert -math.log(classes) - 1e-5 <= information_entropy(t) <= 1e-5
    assert -1e-6 <= one_hot(t) <= math.log(classes) + 1e-5
    assert torch.allclose(information_entropy(t + 7), information_entropy(t), atol=1e-4)  # logits have no origin
    assert torch.allclose(information_entropy(t.flip(0)), information_entropy(t), atol=1e-5)
    assert coverage(t) >= 0
    assert coverage(t, 1.0) >= coverage(t)  # the more is asked for, the more is missing
    assert torch.allclose(coverage(t + 7), coverage(t), atol=1e-4)
    assert torch.allclose(coverage(t.flip(1)), coverage(t), atol=1e-4)  # classes have no order
    assert coverage(t.roll(1, 1).repeat(2, 1)).isfinite()


def test_the_entropy_at_its_ends_and_its_gradient() -> None:
    even = 200 * torch.eye(4).repeat(3, 1)
    assert coverage(even) == 0
    assert information_entropy(even).item() == pytest.approx(-math.log(4), rel=1e-6)
    one = (200 * torch.eye(4)[:1]).repeat(12, 1).requires_grad_()
    assert information_entropy(one).item() == pytest.approx(0, abs=1e-6)
    information_entropy(one).backward()  # p_c underflows for three classes
    assert one.grad is not None
    assert torch.isfinite(one.grad).all()
    skewed = torch.zeros(12, 4)
    skewed[:, 0] = 1
    skewed.requires_grad_()
    information_entropy(skewed).backward()
    assert skewed.grad is not None
    assert (skewed.grad[:, 0] > 0).all()  # descent takes from the frequent class
    assert (skewed.grad[:, 1:] < 0).all()


# ----------------------------------------------------------------------------------------------- the generators


@pytest.mark.parametrize(
    ("args", "standardised", "count"),
    [
        ((1000, (3, 32, 32), 64, 0, 0.8), True, 8_423_939),  # Huawei's DAFL
        ((256, (3, 32, 32), 64), False, 2_328_899),  # toolbox, small
        ((512, (3, 32, 32), 64), False, 4_426_051),
        ((100, (3, 32, 32), 64, 256), False, 2_026_051),  # toolbox, large
        ((256, (3, 32, 32), 64, 256), False, 4_581_955),
    ],
)
def test_parameter_counts_as_published(args: tuple[Any, ...], standardised: bool, count: int) -> None:
    rest = {"space": (torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1))} if standardised else {}
    net = ConvGenerator(*args, **rest)
    assert sum(p.numel() for p in net.parameters()) == count
    eps = [m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert eps == ([1e-5, 0.8, 0.8, 1e-5] if standardised else [1e-5] * 3)


def test_standardised_images_speak_the_teachers_coordinates() -> None:
    mean, std = torch.tensor([0.1, 0.5, 0.5]).view(1, 3, 1, 1), torch.tensor([0.2, 0.2, 0.1]).view(1, 3, 1, 1)
    net = ConvGenerator(8, (3, 8, 8), 4, space=(mean, std))
    x = net(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    assert x.min() == 0  # of the first channel, much lies below valid pixels
    assert x.max() <= 1
    assert torch.allclose(x.mean((0, 2, 3))[1:], mean.flatten()[1:], atol=0.01)
    assert torch.allclose(x.std((0, 2, 3), correction=0)[1:], std.flatten()[1:], atol=0.01)
    assert not [k for k in net.state_dict() if "mean" in k and "running" not in k]  # constants are no state


def test_the_space_is_the_teachers_own(teacher: nn.Module) -> None:
    assert isinstance(teacher, Normalized)
    assert [v.item() for v in normalised_space(teacher)] == pytest.approx([0.3, 0.4])
    assert [v.item() for v in normalised_space(nn.Linear(2, 2))] == [0.5, 0.25]


@pytest.mark.parametrize(("mean", "std"), [((0.0,), (1.0,)), ((0.0,), (1 / 255,)), ((0.45,), (1 / 255,))])
def test_a_teacher_of_pixels_gets_the_space_of_an_unknown_one(mean: Any, std: Any) -> None:
    """Pixels of mean 0 and deviation 1 / 255 are black: no class would be asked for by them."""
    assert [v.item() for v in normalised_space(Normalized(nn.Linear(2, 2), mean, std))] == [0.5, 0.25]


# --------------------------------------------------------------------------------------------------- the source


def test_terms_are_those_of_the_teacher(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build(teacher, oh=0.5, ie=2.0, act=0.25, log="log10")
    x = torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    terms, t = source._losses(x, pupil)
    with torch.no_grad(), penultimate(teacher) as f:
        expected = teacher(x)
        features = f.value
    assert torch.allclose(t, expected, atol=1e-5)
    assert terms["oh"].item() == pytest.approx(0.5 * slow_one_hot(t.tolist()), rel=1e-4)
    assert terms["ie"].item() == pytest.approx(2 * slow_entropy(t.tolist(), 10), rel=1e-4)
    assert terms["act"].item() == pytest.approx(-0.25 * features.abs().mean().item(), rel=1e-4)
    for term in terms.values():
        (grad,) = torch.autograd.grad(term, x, retain_graph=True)
        assert torch.isfinite(grad).all()
        assert grad.abs().sum() > 0


def test_without_its_weight_no_feature_is_read(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build(teacher, act=0.0)
    source.acquire(pupil, 0)
    assert set(source.terms) == {"oh", "ie"}


def test_a_step_moves_the_generator_alone_and_downhill(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build(teacher, lr_g=1e-3)
    before = copy.deepcopy((teacher.state_dict(), pupil.state_dict()))
    z = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    source._z = lambda: z

    def loss() -> float:
        return sum(v.item() for v in source._losses(source.net(z), pupil)[0].values())

    first = loss()
    weights = copy.deepcopy(dict(source.net.named_parameters()))
    for r in range(4):
        source.acquire(pupil, r)
    assert loss() < first
    moved = [not torch.equal(weights[k], p) for k, p in source.net.named_parameters()]
    assert sum(moved) >= len(moved) - 2  # a bias before a BatchNorm has no gradient but rounding
    same(before, (teacher.state_dict(), pupil.state_dict()))
    assert all(p.grad is None for p in (*teacher.parameters(), *pupil.parameters()))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in teacher.modules())


@pytest.mark.parametrize("output", ["sigmoid", "standardised"])
@pytest.mark.parametrize("fresh", [0, 1, 3])
def test_what_is_handed_over(fresh: int, output: str, teacher: nn.Module, pupil: nn.Module) -> None:
    source = build(teacher, fresh=fresh, output=output, g_steps=2)
    made: list[Tensor] = []
    source.net.register_forward_hook(lambda _m, _a, out: made.append(out.detach().clone()))
    asked: list[Tensor] = []
    source.context.teacher.register_forward_pre_hook(lambda _m, a: asked.append(a[0].detach()))
    got = source.acquire(pupil, 0)
    assert len(made) == 2 + fresh
    assert torch.equal(torch.cat(asked), torch.cat(made[:2]))  # what is judged is what is handed over
    assert source.config.teacher_passes() == (2 / max(fresh, 1) + (fresh > 0), 2 / max(fresh, 1))
    assert got.images.dtype == torch.uint8
    assert got.images.shape == (16 * max(fresh, 1), *SHAPE)
    assert torch.equal(got.images, to_uint8(torch.cat(made[2:]) if fresh else made[1]))
    assert (got.logits is None) == (fresh > 0)
    if got.logits is not None:
        with torch.no_grad():
            assert torch.allclose(got.logits, teacher(made[1]), atol=1e-4)
            off = (got.logits - teacher(to_float(got.images))).abs().max()
        assert off < 0.2  # rounding to 8 bits


def test_seeds_and_state(teacher: nn.Module, pupil: nn.Module) -> None:
    a, again, other = build(teacher), build(teacher), build(teacher, seed=5)
    torch.rand(3)  # the global stream must not matter
    first = a.acquire(pupil, 0).images
    assert torch.equal(first, again.acquire(pupil, 0).images)
    assert not torch.equal(first, other.acquire(pupil, 0).images)
    a.acquire(pupil, 1)
    other.load_state_dict(copy.deepcopy(a.state_dict()))
    for r in range(2, 4):
        same(a.acquire(pupil, r).images, other.acquire(pupil, r).images)
    same(a.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"batch": 1}, "source.batch is 1; it must be at least 2"),
        ({"fresh": -1}, "source.fresh is -1"),
        ({"g_steps": 0}, "source.g_steps is 0"),
        ({"ie": -1.0}, "source.ie is -1"),
        ({"lr_g": 0.0}, "source.lr_g is 0"),
        ({"oh": 0.0, "ie": 0.0, "act": 0.0}, "source dafl has no loss"),
        ({"coverage": -0.5}, "source.coverage is -0.5"),
    ],
)
def test_bad_settings_are_named(settings_: dict[str, Any], said: str, teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match=said):
        build(teacher, **settings_)


def test_presets() -> None:
    presets = registry.config("source", "dafl").presets
    for name in presets:
        config = resolve({"source": "dafl", "preset": name})
        c = config.source
        handed = c.batch * max(c.fresh, 1)
        held = max(1, round(handed * config.pool.holdout))
        assert config.pool.capacity == handed - held  # last acquisition's images leave
        assert config.loop.batch == c.batch
        assert (config.augment.pad, config.augment.flip) == (0, False)
        assert config.criterion.temperature == 1.0
        assert set(presets) == set(type(c).origin)
    huawei = [resolve({"source": "dafl", "preset": f"huawei{v}"}).source for v in ("", "-cifar100", "-mnist")]
    assert [(c.oh, c.ie, c.act) for c in huawei] == [(0.05, 5, 0.01), (0.5, 20, 0.1), (1, 5, 0.1)]
    assert all((c.every, c.fresh, c.eps, c.log) == (1, 0, 0.8, "log10") for c in huawei)


@pytest.mark.parametrize(("fresh", "handed"), [(2, 64), (0, 32)])
def test_the_pool_holds_the_newest_acquisition_and_nothing_else(fresh: int, handed: int, teacher: nn.Module) -> None:
    """With the capacity that presets give, after three acquisitions."""
    made: list[Tensor] = []
    source = {"name": "dafl", "batch": 32, "latent": 8, "width": 4, "every": 2, "fresh": fresh}
    loop = {"steps": 6, "batch": 16, "device": "cpu", "threads": 1}
    run = job(teacher, resolve({"source": source, "pool": {"capacity": pooled(handed)}, "loop": loop}))
    inner = run.acquirer.source.acquire

    def acquire(student: nn.Module, round: int) -> Acquired:
        got = inner(student, round)
        made.append(got.images)
        return got

    run.acquirer.source.acquire = acquire  # type: ignore[method-assign]
    run.run()
    assert [len(x) for x in made] == [handed] * 3
    newest = set(map(bytes, made[-1].flatten(1).numpy()))
    assert len(run.acquirer.pool) == handed - round(0.03 * handed)
    assert all(bytes(x) in newest for x in run.acquirer.pool.x.flatten(1).numpy())


def test_a_class_that_is_lacking_is_pulled_at() -> None:
    """Four images, all surely of class 0: the entropy pulls at class 2 in proportion to e^-12, coverage with 1/K."""
    pull = {}
    for loss in (information_entropy, coverage):
        t = torch.zeros(4, 3)
        t[:, 0] = 12.0
        t.requires_grad_()
        loss(t).backward()
        assert t.grad is not None
        pull[loss] = -t.grad[:, 2].sum().item()
    assert 0 <= pull[information_entropy] < 1e-3
    assert pull[coverage] == pytest.approx(1 / 3, rel=1e-3)
    t = torch.zeros(8, 3)
    t[:, 1] = -0.9  # 0.17 of the answers where a fair share is 0.33: the class is there
    t.requires_grad_()
    coverage(t).backward()
    assert t.grad is not None
    assert not t.grad.any()


@pytest.mark.parametrize("source", ["dafl", "adversarial", "pre"])
def test_coverage_is_a_term_of_its_own_and_off_unless_asked_for(source: str, teacher: nn.Module) -> None:
    """Its term, and the generator's gradient of that term alone, against the function of the teacher's answers."""
    assert registry.config("source", source)().coverage == 0  # type: ignore[attr-defined]
    made = registry.config("source", source)(**SMALL, coverage=3.0).build(context(teacher))  # type: ignore[attr-defined]
    terms, t = made._losses(made.net(made._z()), student())
    expected = 3.0 * coverage(t)
    assert torch.equal(terms["coverage"], expected)
    weights = list(made.net.parameters())
    found = torch.autograd.grad(terms["coverage"], weights, retain_graph=True)
    same(list(found), list(torch.autograd.grad(expected, weights)))
    assert all(bool(g.any()) for g in found[-2:])


def test_the_student_learns_from_it(teacher: nn.Module, digits_test: Images) -> None:
    """An untrained generator leads the same student to about 17 %; single seeds are from 28 to 51."""
    assert digits_test.y is not None
    reached = []
    for seed in (0, 1):
        config = resolve(
            {
                "source": {"name": "dafl", "batch": 64, "latent": 32, "width": 16, "warmup": 10}, "preset": "desk",
                "pool": {"capacity": 320},
                "loop": {"steps": 120, "batch": 64, "device": "cpu", "threads": 1, "eval_every": 120, "seed": seed},
            }
        )  # fmt: skip
        run = job(teacher, config, test=engine.Test(digits_test.x, digits_test.y), seed=1)
        run.run()
        shares = run.acquirer.pool.class_shares()
        assert shares.max() < 0.4, shares  # information entropy: no class has it all
        reached.append(run.scorer.last["test_ema"])
    assert sum(reached) / 2 > 24, reached
