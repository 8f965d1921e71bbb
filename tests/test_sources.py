"""Sources: their gradients against slow references, what they return, and that they leave others alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dodistill.config import registry
from dodistill.config.tree import resolve
from dodistill.criteria.adaptation import Adaptation
from dodistill.data.images import Images
from dodistill.errors import DodistillError
from dodistill.functional import losses
from dodistill.functional.augment import to_float, to_uint8
from dodistill.models.batchnorm import batchnorms
from dodistill.sources.dfnd import select
from dodistill.sources.fast import Fast
from dodistill.sources.shared.base import Source, drawn_labels
from dodistill.sources.shared.generators import ConvGenerator
from helpers import SHAPE, calm, context, same, student

SMALL: dict[str, dict[str, Any]] = {
    "fast": {"K": 3, "batch": 16, "warmup": 1, "latent": 8, "width": 4, "reset_at": 0},
    "deepinv": {"iterations": 4, "batch": 16},
    "dfnd": {"n": 50},
    "real": {"n": 50},
}


def build(name: str, teacher: nn.Module, seed: int = 0, unlabeled: Tensor | None = None, **settings: Any) -> Any:
    config = registry.config("source", name)(**(SMALL[name] | settings))
    return config.build(context(teacher, seed, unlabeled))  # type: ignore[attr-defined]


@pytest.fixture
def pupil() -> nn.Module:
    return student().eval()


# ------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", ["fast", "deepinv", "dfnd", "real"])
def test_same_seed_same_images(name: str, teacher: nn.Module, pupil: nn.Module, digits: Images) -> None:
    def images(seed: int) -> list[Tensor]:
        settings = {"dfnd": {"select": "random"}}.get(name, {})
        source = build(name, teacher, seed, digits.x, **settings)
        return [source.acquire(pupil, r).images[:] for r in range(3)]

    first = images(0)
    torch.rand(3)  # the global stream must not matter
    same(first, images(0))
    assert not torch.equal(first[0], images(1)[0])
    assert first[0].shape[1:] == SHAPE
    if name in ("fast", "deepinv"):
        assert not torch.equal(first[0], first[1])
        assert first[0].is_floating_point()
        for x in first:
            assert x.min() >= 0
            assert x.max() <= 1
            assert x.std() > 0.01


@pytest.mark.parametrize("name", ["fast", "deepinv", "dfnd", "real"])
def test_its_state_is_all_of_it(name: str, teacher: nn.Module, pupil: nn.Module, digits: Images) -> None:
    settings = {"fast": {"reset_at": 2, "extra": 1}, "dfnd": {"select": "random"}}.get(name, {})
    a = build(name, teacher, 0, digits.x, **settings)
    b = build(name, teacher, 5, digits.x, **settings)
    for r in range(2):
        a.acquire(pupil, r)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for r in range(2, 5):
        assert torch.equal(a.acquire(pupil, r).images[:], b.acquire(pupil, r).images[:])


@pytest.mark.parametrize("name", ["fast", "deepinv", "dfnd", "real"])
def test_teacher_and_student_are_left_alone(name: str, teacher: nn.Module, pupil: nn.Module, digits: Images) -> None:
    source = build(name, teacher, 0, digits.x)
    before = copy.deepcopy((teacher.state_dict(), pupil.state_dict()))
    for r in range(3):
        source.acquire(pupil, r)
    same(before, (teacher.state_dict(), pupil.state_dict()))
    for p in (*teacher.parameters(), *pupil.parameters()):
        assert p.grad is None
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in pupil.parameters())


@pytest.mark.parametrize("name", ["fast", "deepinv"])
def test_no_hook_stays_even_after_an_error(name: str, teacher: nn.Module, pupil: nn.Module) -> None:
    source = build(name, teacher, warmup=0)
    source.acquire(pupil, 1)

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        source.acquire(Broken(), 1)
    assert batchnorms(teacher)
    for m in teacher.modules():
        assert not m._forward_pre_hooks
        assert not m._forward_hooks


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("fast", {"K": 0}, "source.K is 0"),
        ("fast", {"batch": 1}, "source.batch is 1; it must be at least 2"),
        ("deepinv", {"iterations": 0}, "source.iterations is 0"),
        ("dfnd", {"n": 0}, "source.n is 0"),
        ("dfnd", {"chunk": 0}, "source.chunk is 0"),
        ("real", {"skew": 0.5}, "skew is 0.5"),
    ],
)
def test_bad_settings_are_named(
    name: str, settings: dict[str, Any], said: str, teacher: nn.Module, digits: Images
) -> None:
    with pytest.raises(DodistillError, match=said):
        build(name, teacher, 0, digits.x, **settings)


def test_dfnd_without_images(teacher: nn.Module, digits: Images) -> None:
    for x, n in ((None, 0), (digits.x[:0], 0), (digits.x[:1], 1)):
        with pytest.raises(DodistillError, match=f"has {n} unlabelled image"):
            build("dfnd", teacher, 0, x)


# ------------------------------------------------------------------------------------------------------ fast


def slow_fast(source: Fast, pupil: nn.Module, round: int) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """Sum of the inner gradients, the generator after K steps, and the images of each step: by the book."""
    c, ctx, g = source.config, source.context, torch.Generator()
    g.set_state(source.generator.get_state())
    net = copy.deepcopy(source.meta)
    z = torch.randn(c.batch, c.latent, generator=g).requires_grad_()
    y = torch.randint(10, (c.batch,), generator=g)
    opt = torch.optim.Adam(
        [{"params": net.parameters(), "lr": c.lr_g}, {"params": [z], "lr": c.lr_z}], betas=(0.5, 0.999)
    )
    total = [torch.zeros_like(p) for p in net.parameters()]
    images = []
    layers = batchnorms(ctx.teacher)
    for _ in range(c.K):
        inputs: list[Tensor] = []
        handles = [m.register_forward_pre_hook(lambda _m, a, to=inputs: to.append(a[0])) for m in layers]
        x = net(z)
        xa = ctx.view(x, g)
        t = ctx.teacher(xa)
        for h in handles:
            h.remove()
        loss = c.oh * F.cross_entropy(t, y)
        for i, (m, a) in enumerate(zip(layers, inputs)):
            mean, var = a.mean((0, 2, 3)), a.var((0, 2, 3), correction=0)
            if source.ema:
                mean = (1 - c.bn_momentum) * mean + c.bn_momentum * source.ema[i][0]
                var = (1 - c.bn_momentum) * var + c.bn_momentum * source.ema[i][1]
            assert m.running_mean is not None
            assert m.running_var is not None
            loss = loss + c.bn * ((mean - m.running_mean).norm() + (var - m.running_var).norm())
        if round > c.warmup:
            s = pupil(xa)
            kl = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
            loss = loss - c.adv * (kl * (s.argmax(1) == t.argmax(1))).mean()
        images.append(x.detach())
        opt.zero_grad()
        loss.backward()
        for sum_, p in zip(total, net.parameters()):
            assert p.grad is not None
            sum_ += p.grad
        opt.step()
    pupil.zero_grad()
    return total, net.state_dict(), images


def comparable(teacher: nn.Module, pupil: nn.Module, round: int = 0, **settings: Any) -> Any:
    """A source before acquisition `round` whose descent is the same however it is rounded."""
    for seed in range(20):
        source = build("fast", teacher, seed, **settings)
        if round:
            source.acquire(pupil, 0)  # so that there are averages to be smoothed with
            source.opt_meta.state.clear()
        if calm(source.meta, lambda source=source: slow_fast(source, pupil, round)[0]):
            return source
    raise AssertionError("no seed is calm")


@pytest.mark.parametrize("round", [0, 3])
def test_fomaml_is_the_sum_of_the_inner_gradients(round: int, teacher: nn.Module, pupil: nn.Module) -> None:
    source = comparable(teacher, pupil, round)
    start = [p.detach().clone() for p in source.meta.parameters()]
    expected, _, _ = slow_fast(source, pupil, round)
    source.acquire(pupil, round)
    for p, before, g in zip(source.meta.parameters(), start, expected):
        assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-4 * float(g.abs().max()) + 1e-7)
        # the first step of Adam, at lr_g * K
        step = source.config.lr_g * source.config.K * p.grad / (p.grad.abs() + 1e-8)
        assert torch.allclose(p.detach(), before - step, atol=1e-6)
    assert sum(float(g.abs().sum()) for g in expected) > 0


def test_reptile_goes_to_the_copy(teacher: nn.Module, pupil: nn.Module) -> None:
    source = comparable(teacher, pupil, meta="reptile")
    start = [p.detach().clone() for p in source.meta.parameters()]
    _, end, _ = slow_fast(source, pupil, 0)
    source.acquire(pupil, 0)
    lr = source.config.lr_g * source.config.K
    for (name, p), before in zip(source.meta.named_parameters(), start):
        assert torch.allclose(end[name], dict(source.fast.named_parameters())[name], atol=1e-4)
        way = before - source.fast.state_dict()[name]
        assert torch.allclose(p.grad, source.config.reptile_factor * way, atol=1e-6)
        moved = p.detach() - before
        far = way.abs() > 1e-5
        assert torch.equal(moved.sign()[far], -way.sign()[far])
        assert moved.abs().max() <= lr * 1.001


def test_without_meta_learning_the_generator_goes_on(teacher: nn.Module, pupil: nn.Module) -> None:
    source = comparable(teacher, pupil, meta="none")
    start = copy.deepcopy(source.meta.state_dict())
    _, end, _ = slow_fast(source, pupil, 0)
    source.acquire(pupil, 0)
    same(source.meta.state_dict(), source.fast.state_dict())
    assert not source.opt_meta.state
    assert all(torch.allclose(end[k], v, atol=1e-4) for k, v in source.meta.state_dict().items())
    assert not torch.equal(start["l1.weight"], source.meta.state_dict()["l1.weight"])


@pytest.mark.parametrize("values", [[5.0, 1.0, 3.0], [1.0, 2.0, 3.0], [4.0, 3.0, 2.0]])
def test_the_best_batch_has_the_lowest_loss(
    values: list[float], teacher: nn.Module, pupil: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build("fast", teacher, bn=1.0, oh=1e-3)
    left, made = iter(values), []
    monkeypatch.setattr(losses, "bn_statistics", lambda *_, **__: torch.tensor(next(left)))
    source.fast.register_forward_hook(lambda _m, _a, out: made.append(out.detach().clone()))
    x = source.acquire(pupil, 0).images
    assert not torch.equal(made[0], made[1])
    assert torch.equal(x, made[values.index(min(values))])


def test_the_adversarial_term_waits_for_the_warm_up(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build("fast", teacher, warmup=2)
    there = []
    for r in range(5):
        source.acquire(pupil, r)
        there.append("adv" in source.terms)
    assert there == [False, False, False, True, True]
    assert set(source.terms) == {"bn", "ce", "adv"}
    off = build("fast", teacher, warmup=0, adv=0.0)
    off.acquire(pupil, 3)
    assert "adv" not in off.terms


def test_the_first_layers_are_redrawn_once(
    teacher: nn.Module, pupil: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, now = [], [0]
    monkeypatch.setattr(ConvGenerator, "reset_first_layers", lambda *_: at.append(now[0]))
    for settings, expected in (({"reset_at": 2}, [2]), ({"reset_at": 0}, [])):
        at.clear()
        source = build("fast", teacher, K=1, **settings)
        for now[0] in range(6):
            source.acquire(pupil, now[0])
        assert at == expected
    monkeypatch.undo()
    net, g = ConvGenerator(32, SHAPE, 8), torch.Generator().manual_seed(0)
    later = copy.deepcopy(net.conv_blocks[1].state_dict())
    net.reset_first_layers(g)
    assert net.l1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not net.l1.bias.any()
    assert net.conv_blocks[0].weight.abs().max() < 0.1
    same(later, net.conv_blocks[1].state_dict())


def test_extra_images_come_from_the_optimised_generator(teacher: nn.Module, pupil: nn.Module) -> None:
    plain, source = build("fast", teacher), build("fast", teacher, extra=4)
    one, got = plain.acquire(pupil, 0), source.acquire(pupil, 0)
    assert len(got.images) == 5 * 16
    assert torch.equal(got.images[:16], to_uint8(one.images))  # the batch itself is the published one
    same(plain.meta.state_dict(), source.meta.state_dict())
    torch.testing.assert_close(got.logits, source.context.label(got.images))
    g = plain.generator
    with torch.no_grad():
        made = torch.cat([to_uint8(plain.fast(torch.randn(16, 8, generator=g))) for _ in range(8)])
    among = (got.images[16:, None] == made[None]).flatten(2).all(2)
    assert bool(among.any(1).all())
    offered = torch.bincount(source.context.label(made).argmax(1), minlength=10)
    kept = torch.bincount(got.logits[16:].argmax(1), minlength=10)
    most = next(m for m in range(65) if int(offered.clamp(max=m).sum()) >= 64)
    assert bool((kept >= offered.clamp(max=most - 1)).all())
    assert bool((kept <= offered.clamp(max=most)).all())


def test_extra_images_are_no_fewer_than_none(teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match=r"extra is -1"):
        build("fast", teacher, extra=-1)


def test_batchnorm_statistics_are_smoothed_over_acquisitions(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build("fast", teacher, bn_momentum=0.9)
    layer = batchnorms(teacher)[1]
    inputs: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _m, a: inputs.append(a[0].detach()))
    expected = None
    for r in range(3):
        source.acquire(pupil, r)
        x = inputs[-1]
        now = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
        expected = now if expected is None else tuple(0.9 * e + 0.1 * n for e, n in zip(expected, now))
        for mine, e in zip(source.ema[1], expected):
            assert torch.allclose(mine, e, atol=1e-5)
    assert not any(t.requires_grad for pair in source.ema for t in pair)
    none = build("fast", teacher, bn_momentum=0.0)
    none.acquire(pupil, 0)
    assert none.ema == []


def test_drawn_labels() -> None:
    def drawn_by(n: int, balanced: bool) -> Tensor:
        return drawn_labels(n, 10, torch.Generator().manual_seed(0), balanced)

    assert torch.bincount(drawn_by(20, True)).tolist() == [2] * 10
    assert len(drawn_by(4, True).unique()) == 4
    drawn = drawn_by(2000, False)
    assert drawn.min() == 0
    assert drawn.max() == 9


def test_fast_learns_to_please_the_teacher(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build("fast", teacher, K=5, batch=64, width=8, latent=16, warmup=100)
    losses_ = []
    for r in range(12):
        source.acquire(pupil, r)
        losses_.append(sum(v.item() for v in source.terms.values()))
    assert sum(losses_[-3:]) < 0.8 * sum(losses_[:3])


def test_a_size_the_generator_cannot_make(teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match="multiples of 4, but the teacher takes 10x10"):
        ConvGenerator(8, (1, 10, 10), 4)


# --------------------------------------------------------------------------------------------------- deepinv


def watched(source: Any) -> tuple[list[Tensor], list[float]]:
    """The iterates and their losses, as the descent goes on."""
    iterates: list[Tensor] = []
    values: list[float] = []
    inner = source._terms

    def terms(u: Tensor, *rest: Any) -> dict[str, Tensor]:
        out = inner(u, *rest)
        iterates.append(u.detach().clone())
        values.append(float(sum(v.item() for v in out.values())))
        return dict(out)

    source._terms = terms
    return iterates, values


def pixels(source: Any, u: Tensor) -> Tensor:
    return (source.mean + source.std * u).clamp(0, 1)


def test_deepinv_descends_and_stays_valid(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build("deepinv", teacher, iterations=40, batch=32)
    iterates, values = watched(source)
    x = source.acquire(pupil, 0).images
    assert sum(values[-5:]) < 0.7 * sum(values[:5])
    for u in iterates[1:]:
        raw = source.mean + source.std * u
        assert raw.min() >= -1e-5
        assert raw.max() <= 1 + 1e-5
    assert torch.allclose(x, pixels(source, iterates[values.index(min(values))]))
    assert set(source.terms) == {"ce", "bn", "tv", "js"}
    free = build("deepinv", teacher, iterations=3, clip=False)
    outside, _ = watched(free)
    assert free.acquire(pupil, 0).images.min() >= 0
    assert (free.mean + free.std * outside[-1]).min() < 0


def test_deepinv_can_return_the_last_iterate(teacher: nn.Module, pupil: nn.Module) -> None:
    longer = build("deepinv", teacher, iterations=5, best=False)
    iterates, _ = watched(longer)
    longer.acquire(pupil, 0)
    last = build("deepinv", teacher, iterations=4, best=False).acquire(pupil, 0).images
    assert torch.allclose(last, pixels(longer, iterates[4]), atol=1e-6)
    assert not torch.allclose(last, pixels(longer, iterates[3]), atol=1e-3)


@pytest.mark.parametrize("term", ["ce", "bn", "tv", "l2", "js"])
def test_every_term_reaches_the_pixels(term: str, teacher: nn.Module, pupil: nn.Module) -> None:
    from dodistill.models.taps import batchnorm_inputs

    source = build("deepinv", teacher, l2=1e-3)
    u = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with batchnorm_inputs(source.context.teacher) as taps:
        terms = source._terms(u, torch.arange(16) % 10, pupil, 1, taps)
        assert set(terms) == {"ce", "bn", "tv", "l2", "js"}
        (g,) = torch.autograd.grad(terms[term], u)
    assert torch.isfinite(g).all()
    assert (g.flatten(1).norm(dim=1) > 0).all()


def test_terms_with_no_weight_are_not_computed(teacher: nn.Module) -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    source = build("deepinv", teacher, adv=0.0, tv=0.0)
    source.acquire(Never(), 0)
    assert set(source.terms) == {"ce", "bn"}


def test_true_and_published_js_differ(teacher: nn.Module, pupil: nn.Module) -> None:
    seen = {}
    for js, formula in (("true", losses.js), ("published", losses.js_published)):
        source = build("deepinv", teacher, iterations=1, js=js, adv=2.0, jitter=1, flip=False)
        inputs: list[Tensor] = []
        handle = source.context.teacher.register_forward_pre_hook(lambda _m, a, inputs=inputs: inputs.append(a[0]))
        source.acquire(pupil, 0)
        handle.remove()
        with torch.no_grad():
            expected = 2 * (1 - formula(pupil(inputs[0]), source.context.teacher(inputs[0]), 3.0))
        assert source.terms["js"].item() == pytest.approx(expected.item(), rel=1e-4)
        seen[js] = source.terms["js"].item()
    assert abs(seen["true"] - seen["published"]) > 1e-3


# ------------------------------------------------------------------------------------------------ dfnd, real


def slow_select(t: Tensor, n: int, rule: str) -> list[int]:
    p = t.softmax(1)
    surest = sorted(range(len(t)), key=lambda i: -float(p[i].max().log()))
    if rule == "confident":
        return surest[:n]
    queues: dict[int, list[int]] = {k: [i for i in surest if int(t[i].argmax()) == k] for k in range(t.shape[1])}
    out: list[int] = []
    while len(out) < n and any(queues.values()):  # one of each class in turn, the surest of the turn first
        turn = [q.pop(0) for q in queues.values() if q]
        out += sorted(turn, key=surest.index)
    return out[:n]


@pytest.mark.parametrize("rule", ["confident", "balanced"])
@pytest.mark.parametrize("n", [1, 7, 30, 60])
def test_select_against_a_slow_reference(rule: str, n: int) -> None:
    t = torch.randn(60, 4, generator=torch.Generator().manual_seed(n)) * 3
    t[:, 0] += 2  # a class that the teacher prefers
    kept = select(t, n, rule, torch.Generator())
    assert kept.tolist() == slow_select(t, n, rule)
    counts = torch.bincount(t[kept].argmax(1), minlength=4)
    have = torch.bincount(t.argmax(1), minlength=4)
    if rule == "balanced":
        full = counts < have
        assert not full.any() or counts[full].max() - counts[full].min() <= 1


def test_select_at_random() -> None:
    t = torch.randn(60, 4)
    kept = select(t, 20, "random", torch.Generator().manual_seed(0))
    assert len(set(kept.tolist())) == 20
    assert kept.tolist() != select(t, 20, "random", torch.Generator().manual_seed(1)).tolist()


def test_dfnd_takes_what_there_is_and_asks_the_teacher_once(
    teacher: nn.Module, pupil: nn.Module, digits: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build("dfnd", teacher, 0, digits.x[:40], n=600, chunk=7)
    asked: list[int] = []
    answers = source.context.teacher.answers
    monkeypatch.setattr(source.context.teacher, "answers", lambda x: (asked.append(len(x)), answers(x))[1])
    got = source.acquire(pupil, 0)
    assert asked == [7, 7, 7, 7, 7, 5]
    assert got.images.dtype == torch.uint8
    assert sorted(map(bytes, got.images[:].flatten(1).numpy())) == sorted(map(bytes, digits.x[:40].flatten(1).numpy()))
    with torch.no_grad():
        assert torch.allclose(got.logits, source.context.teacher(to_float(got.images[:])), atol=1e-4)
    sure = got.logits.softmax(1).amax(1)
    assert (sure.diff() <= 1e-6).all()  # the surest first
    assert source.terms["selected"] == 40


@pytest.mark.parametrize("preset", ["paper", "desk"])
def test_the_noisy_adaptation_comes_through_the_criterion(preset: str, teacher: nn.Module) -> None:
    config = resolve({"source": "dfnd", "preset": preset})
    criterion = config.criterion.build(context(teacher))
    assert isinstance(criterion, Adaptation)
    s = torch.randn(8, 10, requires_grad=True)
    terms = criterion(s, torch.randn(8, 10))
    assert set(terms) == {"kd", "noisy"}
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert criterion.a.grad is not None
    assert criterion.a.grad.abs().sum() > 0


@pytest.mark.parametrize("skew", [1.0, 10.0])
def test_real_has_the_skew_that_was_dialled(skew: float, teacher: nn.Module, pupil: nn.Module, digits: Images) -> None:
    source: Source = build("real", teacher, 0, digits.x, n=400, skew=skew)
    got = source.acquire(pupil, 0)
    assert got.logits is not None
    with torch.no_grad():
        assert torch.allclose(got.logits, source.context.teacher(to_float(got.images[:])), atol=1e-4)
    counts = torch.bincount(got.logits.argmax(1), minlength=10).float().sort(descending=True).values
    expected = skew ** (-torch.arange(10) / 9)
    assert torch.allclose(counts / counts[0], expected, atol=0.03)
    assert 200 < len(got.images) <= 405
