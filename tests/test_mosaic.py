"""MosaicKD against the book: its players, what each step moves, what the student is given, and that it learns."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dodistill import engine
from dodistill.config.tree import resolve
from dodistill.core.watch import Watcher
from dodistill.data.images import Images, load_images
from dodistill.engine import Distiller
from dodistill.errors import DodistillError
from dodistill.functional.augment import to_float
from dodistill.functional.losses import balance, entropy
from dodistill.models import Normalized
from dodistill.sources.mosaic import Config, Mosaic
from dodistill.sources.shared.discriminator import PatchDiscriminator, patch_loss
from dodistill.sources.shared.generators import ConvGenerator
from helpers import SHAPE, context, job, same, student, tree, untimed

SMALL: dict[str, Any] = {"batch": 8, "every": 3, "latent": 8, "width": 4, "base": 8, "patches": 4, "pad": 1}


@pytest.fixture(scope="session")
def strokes() -> Tensor:
    """Out-of-domain images: bits of two photographs."""
    return load_images("strokes:300", image_shape=SHAPE).x


def build(teacher: nn.Module, unlabeled: Tensor | None, seed: int = 0, **settings: Any) -> Mosaic:
    source = Config(**(SMALL | settings)).build(context(teacher, seed, unlabeled))
    assert isinstance(source, Mosaic)
    return source


@pytest.fixture
def pupil() -> nn.Module:
    return student().eval()


# ---------------------------------------------------------------------------------------------------- pure parts


def test_published_sizes() -> None:
    d = PatchDiscriminator(3)
    assert sum(p.numel() for p in d.parameters()) == 531_328
    assert d(torch.rand(2, 3, 32, 32)).shape == (2, 1, 8, 8)
    g = ConvGenerator(100, (3, 32, 32), Config.width, Config.base)
    assert sum(p.numel() for p in g.parameters()) == 2_026_051


def test_a_patch_is_ten_pixels_wide() -> None:
    d = PatchDiscriminator(1, 4).eval()
    x = torch.rand(1, 1, 32, 32).requires_grad_()
    (grad,) = torch.autograd.grad(d(x)[0, 0, 3, 4], x)
    rows, columns = (grad[0, 0].abs().sum(i).nonzero() for i in (1, 0))
    assert len(rows) == len(columns) == 10


def test_the_players_against_the_equations() -> None:
    g = torch.Generator().manual_seed(0)
    d = torch.randn(3, 1, 2, 2, generator=g, dtype=torch.double) * 3
    t = torch.randn(6, 5, generator=g, dtype=torch.double) * 2
    for real in (True, False):
        total = 0.0
        for v in d.flatten().tolist():
            p = 1 / (1 + math.exp(-v))
            total -= math.log(p if real else 1 - p)
        assert patch_loss(d, real).item() == pytest.approx(total / 3, rel=1e-10)
    shares = [0.0] * 5
    for i, row in enumerate(t.tolist()):
        p = [math.exp(v) for v in row]
        p = [v / sum(p) for v in p]
        assert entropy(t)[i].item() == pytest.approx(-sum(v * math.log(v) for v in p), rel=1e-10)
        shares = [a + b / 6 for a, b in zip(shares, p)]
    assert balance(t).item() == pytest.approx(sum(v * math.log2(v) for v in shares), rel=1e-10)


def test_ends_of_the_scales() -> None:
    even, sure = torch.zeros(4, 8), 1e4 * torch.eye(8)
    assert torch.allclose(entropy(even), torch.full((4,), math.log(8)))
    assert torch.allclose(entropy(sure), torch.zeros(8))
    assert balance(sure).item() == pytest.approx(-3)  # of all classes together, of one each
    assert balance(sure[:1]).item() == pytest.approx(0, abs=1e-6)
    assert patch_loss(torch.full((2, 1, 2, 2), 50.0), True) < 1e-6
    assert patch_loss(torch.full((2, 1, 2, 2), 50.0), False) == pytest.approx(200)


# ----------------------------------------------------------------------------------------------------- the steps


def slow_steps(source: Mosaic, pupil: nn.Module) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Terms, and the gradients of D and of G (against the D that has moved), written out as the release has them."""
    c, ctx, g = source.config, source.context, torch.Generator()
    g.set_state(source.generator.get_state())
    G, D = copy.deepcopy(source.G), copy.deepcopy(source.D)
    opt = torch.optim.Adam(D.parameters(), lr=c.lr_g, betas=(0.5, 0.999))
    opt.load_state_dict(copy.deepcopy(source.opt_D.state_dict()))
    mean, std, n = 0.3, 0.4, c.batch  # the teacher's

    def bce(d: Tensor, target: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(d, torch.full_like(d, target), reduction="sum")

    x = G(torch.randn(n, c.latent, generator=g))
    u = to_float(source.ood.rows[torch.randint(len(source.ood.rows), (n,), generator=g)])
    fake, real = D((x.detach() - mean) / std), D((u - mean) / std)
    loss_d = (bce(fake, 0.0) + bce(real, 1.0)) / (2 * n) * c.local
    opt.zero_grad()
    loss_d.backward()
    of_d = [p.grad.clone() for p in D.parameters() if p.grad is not None]
    opt.step()
    own = copy.deepcopy(pupil).train(c.student_bn == "batch")
    t, s = ctx.teacher(x), own(x)
    p = t.softmax(1)
    terms = {
        "local": c.local * bce(D((x - mean) / std), 1.0) / n,
        "align": -c.align * (p * t.log_softmax(1)).sum(1).mean(),
        "adv": -c.adv * F.kl_div(s.log_softmax(1), p, reduction="batchmean"),
        "balance": c.balance * (p.mean(0) * torch.log2(p.mean(0))).sum(),
    }
    of_g = torch.autograd.grad(sum(terms.values()), list(G.parameters()))
    return {"d": loss_d} | terms, of_d, list(of_g)


@pytest.mark.parametrize(("rounds", "student_bn"), [(0, "batch"), (2, "batch"), (0, "running")])
def test_both_steps_are_those_of_the_release(
    rounds: int, student_bn: str, teacher: nn.Module, pupil: nn.Module, strokes: Tensor
) -> None:
    source = build(teacher, strokes, local=0.7, align=0.5, adv=1.5, balance=3.0, student_bn=student_bn)
    source._look()
    for r in range(rounds):
        source.acquire(pupil, r)
    terms, of_d, of_g = slow_steps(source, pupil)
    before = copy.deepcopy(source.G.state_dict())
    source.acquire(pupil, rounds)
    assert set(source.terms) == set(terms)
    for name, value in terms.items():
        assert source.terms[name].item() == pytest.approx(value.item(), rel=1e-4), name
    for net, grads in ((source.D, of_d), (source.G, of_g)):
        for p, g in zip(net.parameters(), grads):
            assert p.grad is not None
            assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-4 * float(g.abs().max()) + 1e-7)
    if not rounds:  # the first step of Adam
        for (name, p), g in zip(source.G.named_parameters(), of_g):
            step = source.config.lr_g * g / (g.abs() + 1e-8)
            clear = g.abs() > 1e-4
            assert torch.allclose((before[name] - p.detach())[clear], step[clear], rtol=1e-2)


@pytest.mark.parametrize("term", ["local", "align", "adv", "balance"])
def test_every_player_reaches_the_generator(term: str, teacher: nn.Module, pupil: nn.Module, strokes: Tensor) -> None:
    weights = {k: float(k == term) for k in ("local", "align", "adv", "balance")}
    source = build(teacher, strokes, **weights)
    source.acquire(pupil, 0)
    total = sum(float(p.grad.abs().sum()) for p in source.G.parameters() if p.grad is not None)
    assert total > 1e-4
    assert (source.terms[term] != 0).item()
    assert (sum(float(p.grad.abs().sum()) for p in source.D.parameters()) > 0) == (term == "local")  # type: ignore[union-attr]


def test_others_are_left_alone(teacher: nn.Module, pupil: nn.Module, strokes: Tensor) -> None:
    before = copy.deepcopy((teacher.state_dict(), pupil.state_dict(), strokes))
    source = build(teacher, strokes)
    for r in range(3):
        source.acquire(pupil, r)
    same(before, (teacher.state_dict(), pupil.state_dict(), strokes))
    for p in (*teacher.parameters(), *pupil.parameters()):
        assert p.grad is None
    assert all(p.requires_grad for p in pupil.parameters())
    assert not pupil.training


def test_the_rate_falls_by_a_cosine(teacher: nn.Module, pupil: nn.Module, strokes: Tensor) -> None:
    source = build(teacher, strokes, anneal=4, lr_g=2e-3)
    rates = []
    for r in range(6):
        source.acquire(pupil, r)
        assert source.opt_D.param_groups[0]["lr"] == source.opt_G.param_groups[0]["lr"]
        rates.append(source.opt_G.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * min(r, 4) / 4)) for r in range(6)])
    last = copy.deepcopy(source.G.l1.state_dict())
    source.acquire(pupil, 6)
    same(last, source.G.l1.state_dict())
    constant = build(teacher, strokes, lr_g=2e-3)
    constant.acquire(pupil, 10**6)
    assert constant.opt_G.param_groups[0]["lr"] == 2e-3


# ----------------------------------------------------------------------------------------- what the student gets


def test_the_material(teacher: nn.Module, pupil: nn.Module, strokes: Tensor) -> None:
    source = build(teacher, strokes, pad=0, flip=False)
    got = source.acquire(pupil, 0)
    assert got.images.dtype == torch.uint8
    assert got.images.shape == (3 * 16, *SHAPE)
    assert got.logits is not None
    with torch.no_grad():
        assert torch.allclose(got.logits, source.context.teacher(to_float(got.images)), atol=1e-4)
    known = {tuple(u.flatten().tolist()) for u in strokes}
    real = [tuple(x.flatten().tolist()) in known for x in got.images]
    assert real == ([False] * 8 + [True] * 8) * 3
    made = got.images[~torch.tensor(real)]
    assert len({tuple(x.flatten().tolist()) for x in made}) == 24  # fresh ones, and no two alike
    again = source.acquire(pupil, 1)
    assert again.reference is None
    assert not torch.equal(again.images, got.images)
    moved = build(teacher, strokes, pad=2, flip=True).acquire(pupil, 0).images
    assert sum(tuple(x.flatten().tolist()) in known for x in moved) < 12


def test_the_dictionary_is_to_be_made_of_the_out_of_domain_images(
    teacher: nn.Module, pupil: nn.Module, strokes: Tensor
) -> None:
    reference = build(teacher, strokes).acquire(pupil, 0).reference
    assert reference is not None
    assert torch.equal(reference.images[:], strokes)
    assert reference.logits is not None
    with torch.no_grad():
        t = teacher(to_float(strokes))
    assert torch.allclose(reference.logits, t, atol=1e-4)
    source = build(teacher, strokes, n=40)
    some = source.acquire(pupil, 0).reference
    assert some is not None
    assert some.logits is not None
    p = t.softmax(1)
    doubt = -(p * p.log()).sum(1)
    expected = sorted(range(300), key=lambda i: -float(doubt[i]))[:40]
    assert torch.equal(some.images[:], strokes[expected])
    assert torch.allclose(some.logits, t[expected], atol=1e-4)
    assert torch.equal(source.ood.rows[:], strokes[expected])
    assert Config.kind == "sampler"


def test_the_published_normalisation_of_them(teacher: nn.Module, pupil: nn.Module, strokes: Tensor) -> None:
    """What the teacher's network gets under `half` is (u - 0.5) / 0.5, up to a level, where that is a valid image."""
    assert isinstance(teacher, Normalized)
    source = build(teacher, strokes, ood_normalise="half", pad=0, flip=False)
    plain = build(teacher, strokes, pad=0, flip=False)
    got, u = (s.acquire(pupil, 0).images.view(3, 2, 8, *SHAPE) for s in (source, plain))
    assert torch.equal(got[:, 0], u[:, 0])  # made ones are as ever
    wanted = (to_float(u[:, 1]) - 0.5) / 0.5
    seen = (to_float(got[:, 1]) - 0.3) / 0.4
    valid = (wanted * 0.4 + 0.3 >= 0) & (wanted * 0.4 + 0.3 <= 1)
    assert valid.float().mean() > 0.1
    assert torch.allclose(seen[valid], wanted[valid], atol=1 / 255 / 0.4)
    assert not torch.equal(got[:, 1], u[:, 1])


# ------------------------------------------------------------------------------------- randomness, state, errors


def test_same_seed_same_images(teacher: nn.Module, pupil: nn.Module, strokes: Tensor) -> None:
    def images(seed: int) -> list[Tensor]:
        source = build(teacher, strokes, seed)
        return [source.acquire(pupil, r).images for r in range(3)]

    first = images(0)
    torch.rand(3)  # the global stream must not matter
    same(first, images(0))
    assert not torch.equal(first[0], images(1)[0])


@pytest.mark.parametrize("n", [0, 50])
def test_its_state_is_all_of_it(n: int, teacher: nn.Module, pupil: nn.Module, strokes: Tensor) -> None:
    a, b = build(teacher, strokes, n=n, anneal=9), build(teacher, strokes, 5, n=n, anneal=9)
    for r in range(2):
        a.acquire(pupil, r)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for r in range(2, 5):
        mine, its = a.acquire(pupil, r), b.acquire(pupil, r)
        assert torch.equal(mine.images, its.images)
        assert mine.logits is not None
        assert its.logits is not None
        assert torch.equal(mine.logits, its.logits)
    same(a.state_dict(), b.state_dict())


def test_a_run_stopped_in_between_ends_in_the_same_bits(teacher: nn.Module, strokes: Tensor) -> None:
    cfg = resolve(tree(source={"name": "mosaic", **SMALL, "n": 100}, augment={"pad": 0}, pool={"capacity": 48}), {
        "intervention": "kdci", "loop.steps": 8,
    })  # fmt: skip

    def run(it: Distiller, steps: int) -> Distiller:
        while it.step < steps:
            it.acquire(Watcher()) if it.acquirer.due(it.step) else it.match()
        return it

    whole = run(job(teacher, cfg, strokes), 8)
    first = run(job(teacher, cfg, strokes), 4)
    second = job(teacher, cfg, strokes, seed=9)
    second.load_state_dict(copy.deepcopy(first.state_dict()), copy.deepcopy(first.acquirer.pool_state()))
    run(second, 8)
    same(untimed(whole.state_dict()), untimed(second.state_dict()))
    same(whole.acquirer.pool_state(), second.acquirer.pool_state())
    assert whole.acquirer.round == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"every": 0}, "source.every is 0"),
        ({"batch": 1}, "source.batch is 1; it must be at least 2"),
        ({"n": -1}, "source.n is -1"),
        ({"n": 1}, "has 1 out-of-domain image"),
        ({"pad": 8}, "source.pad is 8; for images of 8x8 it must be below 8"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], said: str, teacher: nn.Module, strokes: Tensor) -> None:
    with pytest.raises(DodistillError, match=said):
        build(teacher, strokes, **settings)


def test_without_images_or_normalisation(teacher: nn.Module, strokes: Tensor) -> None:
    for x, n in ((None, 0), (strokes[:1], 1)):
        with pytest.raises(DodistillError, match=f"has {n} out-of-domain image"):
            build(teacher, x)
    assert isinstance(teacher, Normalized)
    with pytest.raises(DodistillError, match="no known normalisation"):
        build(teacher.model, strokes, ood_normalise="half")


def test_the_presets_resolve() -> None:
    for name in Config.presets:
        cfg = resolve({"source": "mosaic", "preset": name})
        c = cfg.source
        assert cfg.pool.capacity == c.every * 2 * c.batch  # one acquisition
        assert cfg.loop.batch == 2 * c.batch
        assert (c.anneal - c.warmup) * c.every == cfg.loop.steps
        assert cfg.criterion.temperature == 1
        assert Config.origin[name]
    c = resolve({"source": "mosaic", "preset": "paper"}).source
    assert (c.local, c.align, c.adv, c.balance, c.lr_g, c.latent) == (1, 1, 1, 10, 1e-3, 100)


# ----------------------------------------------------------------------------------------------------- it learns


def test_the_images_become_of_one_class_each_and_of_all(teacher: nn.Module, pupil: nn.Module, strokes: Tensor) -> None:
    """H(mean answer) - mean H(answer), in nats: what the teacher's class says of an image; ln 10 = 2.3 at most."""
    source = build(teacher, strokes, batch=32, width=8, base=16, patches=8, every=1, lr_g=3e-3)
    told = []
    for r in range(60):
        source.acquire(pupil, r)
        told.append(-source.terms["balance"].item() / 10 * math.log(2) - source.terms["align"].item())
    assert told[0] < 0.4  # at first the teacher sees the same in all of them
    assert told[-1] > 1.0


@pytest.mark.slow
def test_a_student_learns(teacher: nn.Module, strokes: Tensor, digits_test: Images) -> None:
    """About 62 % when it works (other seeds: 48, 60); 39 % with a generator that stands still (35, 42)."""
    source = {"name": "mosaic", "every": 2, "batch": 48, "width": 24, "base": 48, "patches": 24, "pad": 1, "lr_g": 5e-3}
    cfg = resolve({
        "source": source, "criterion": {"name": "kl", "temperature": 1.0}, "augment": {"pad": 0, "flip": False},
        "pool": {"capacity": 192}, "optim": {"lr": 0.1},
        "loop": {"steps": 600, "batch": 96, "device": "cpu", "threads": 1, "eval_every": 600},
    })  # fmt: skip
    assert digits_test.y is not None
    it = job(teacher, cfg, strokes, test=engine.Test(digits_test.x, digits_test.y))
    it.run()
    assert it.scorer.last["test"] > 48
