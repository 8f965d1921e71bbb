"""Procedural pictures: what is drawn, what is chosen of it, and that a student learns from it."""

from __future__ import annotations

import copy
import math
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from torch import Tensor, nn

from dodistill import distill
from dodistill.data.images import Images
from dodistill.errors import DodistillError
from dodistill.evaluation.evaluate import predict, top1
from dodistill.functional.augment import to_float
from dodistill.sources.procedural import Config, Procedural, choose, evenness, parents
from dodistill.sources.shared import pictures
from dodistill.sources.shared.pictures import KINDS, draw, shares, stretched
from helpers import SHAPE, context, same, student


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(teacher: nn.Module, seed: int = 0, **settings: Any) -> Procedural:
    source = Config(**({"n": 60, "candidates": 200} | settings)).build(context(teacher, seed))
    assert isinstance(source, Procedural)
    return source


@pytest.fixture
def pupil() -> nn.Module:
    return student().eval()


# ------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (4, 12, 20)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_pictures_are_pictures(kind: str, shape: tuple[int, int, int]) -> None:
    before = torch.get_rng_state()
    x = KINDS[kind](40, shape, stream())
    assert x.shape == (40, *shape)
    assert x.dtype == torch.float32
    assert bool(torch.isfinite(x).all())
    assert x.min() >= 0
    assert x.max() <= 1
    within, between = x.flatten(1).std(1), x.flatten(1).std(0)
    assert (within > 0.02).float().mean() > 0.8  # few of them are blank
    assert within.median() > 0.08
    assert between.min() > 0.1  # no two alike
    assert torch.equal(x, KINDS[kind](40, shape, stream()))
    assert not torch.equal(x, KINDS[kind](40, shape, stream(1)))
    assert torch.equal(before, torch.get_rng_state())


def test_leaves_hide_those_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a painter who lays the leaves down one by one."""
    shape, layers = (3, 9, 11), 6
    drawn: list[Tensor] = []
    powers: list[Tensor] = []

    def spy_u(g: torch.Generator, *size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        drawn.append(low + (high - low) * torch.rand(size, generator=g))
        return drawn[-1].clone()

    def spy_randint(*args: Any, **more: Any) -> Tensor:
        powers.append(randint(*args, **more))
        return powers[-1]

    randint = torch.randint
    monkeypatch.setattr(pictures, "uniform", spy_u)
    monkeypatch.setattr(torch, "randint", spy_randint)
    got = pictures.leaves(5, shape, stream(), layers)
    radius, cx, cy, base, spread, grain = drawn
    for i in range(5):
        for row in range(9):
            for column in range(11):
                x, y, top = (2 * column - 10) / 11, (2 * row - 8) / 11, 0
                for leaf in range(layers):
                    r, p = min(0.08 / math.sqrt(radius[i, leaf]), 1.0), 2.0 ** int(powers[0][i, leaf])
                    if abs(x - cx[i, leaf, 0]) ** p + abs(y - cy[i, leaf, 0]) ** p < r**p:
                        top = leaf + 1
                for channel in range(3):
                    colour = min(max(float(base[i, channel, 0] + spread[i, channel, top]), 0.0), 1.0)
                    expected = colour * float(grain[i, 0, row, column])
                    assert got[i, channel, row, column].item() == pytest.approx(expected, abs=1e-5)


def test_textures_fall_off_with_frequency() -> None:
    x = pictures.textures(400, (1, 32, 32), stream())
    x = (x - x.mean((2, 3), keepdim=True))[:, 0]
    power = torch.fft.fft2(x).abs().square()
    f = torch.fft.fftfreq(32, 1 / 32)
    radius = (f[:, None].square() + f[None].square()).sqrt()
    low, high = power[:, (radius > 0) & (radius < 4)].mean(1), power[:, radius > 10].mean(1)
    assert (low > 3 * high).float().mean() > 0.9
    assert (low < 10 * high).any()  # rough ones are among them
    assert (low > 100 * high).any()  # and smooth ones


def test_julia_sets_against_a_slow_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    true = pictures.uniform

    def spy(g: torch.Generator, *size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        drawn.append(true(g, *size, low=low, high=high))
        return drawn[-1]

    monkeypatch.setattr(pictures, "uniform", spy)
    fields: list[Tensor] = []
    monkeypatch.setattr(pictures, "waves", lambda v, c, g: fields.append(v))
    pictures.fractals(4, (1, 6, 6), stream(), 5)
    turn, zoom, dx, dy, theta, near = (d.flatten().double() for d in drawn)
    for i in range(4):
        c = complex(
            math.cos(theta[i]) / 2 - math.cos(2 * theta[i]) / 4, math.sin(theta[i]) / 2 - math.sin(2 * theta[i]) / 4
        )
        for row in range(6):
            for column in range(6):
                at = complex((2 * column - 5) / 6, (2 * row - 5) / 6)
                z = at * complex(math.cos(turn[i]), math.sin(turn[i])) * 0.3 * 5 ** float(zoom[i])
                z += complex(dx[i], dy[i])
                count = 0.0
                for _ in range(5):
                    z = z * z + c * float(near[i])
                    z = complex(min(max(z.real, -4), 4), min(max(z.imag, -4), 4))
                    count += math.exp(-(abs(z) ** 2))
                assert fields[0][i, row, column].item() == pytest.approx(count * 4 / 5, abs=1e-3)


def test_stretched_pictures_are_strokes_on_black() -> None:
    x = KINDS["shapes"](200, (1, 16, 16), stream())
    out = stretched(x, stream(3))
    assert out.min() >= 0
    assert out.max() <= 1
    assert (out.flatten(1).amax(1) > 0.999).all()  # its brightest pixel is white
    assert (out == 0).float().mean() > 0.3
    monotone = 0
    for a, b in zip(x.flatten(1), out.flatten(1)):
        order = a.argsort()
        up, down = b[order].diff(), b[order.flip(0)].diff()
        monotone += int(bool((up >= -1e-6).all()) or bool((down >= -1e-6).all()))  # a change of contrast, no more
    assert monotone == 200


@hypothesis(max_examples=50, deadline=None)
@given(
    weights=st.tuples(*[st.floats(0, 10) for _ in KINDS]).filter(lambda w: sum(w) > 0.01),
    n=st.integers(2, 1000),
)  # fmt: skip
def test_the_mix_adds_up(weights: tuple[float, ...], n: int) -> None:
    counts = shares(weights, n)
    assert list(counts) == list(KINDS)
    assert sum(counts.values()) == n
    for count, weight in zip(counts.values(), weights):
        assert abs(count - n * weight / sum(weights)) <= 1 + 1e-6
        assert count == 0 or weight > 0


def test_drawing_in_chunks_gives_what_was_asked_for() -> None:
    x = draw({"stripes": 300, "leaves": 0, "shapes": 41}, (3, 32, 32), stream(), False)
    assert x.shape == (341, 3, 32, 32)
    assert x.dtype == torch.uint8
    assert len(x.flatten(1).unique(dim=0)) == 341


# ------------------------------------------------------------------------------------------------- choosing


def lopsided(n: int = 400) -> Tensor:
    """Logits [n, 4] of a teacher that prefers class 0, with various confidence."""
    g = stream(2)
    t = torch.randn(n, 4, generator=g) * 3 * torch.rand(n, 1, generator=g)
    t[:, 0] += 1.5
    return t


@pytest.mark.parametrize("rule", ["balanced", "surest"])
@pytest.mark.parametrize("n", [4, 50, 200, 400])
def test_classes_are_as_balanced_as_there_are_any(rule: str, n: int) -> None:
    t = lopsided()
    keep = choose(t, n, rule, stream())
    assert len(keep.unique()) == n
    have, got = (torch.bincount(v.argmax(1), minlength=4) for v in (t, t[keep]))
    level = next(k for k in range(n + 1) if int(have.clamp(max=k).sum()) >= n)  # water fills the classes to one level
    assert (got <= have.clamp(max=level)).all()
    assert (got >= have.clamp(max=level - 1)).all()


def test_the_rules_differ_in_confidence() -> None:
    t = lopsided(2000)
    sure = t.softmax(1).amax(1)
    mean = {rule: float(sure[choose(t, 200, rule, stream())].mean()) for rule in ("balanced", "surest", "random")}
    assert mean["surest"] > mean["balanced"] + 0.1
    assert abs(mean["balanced"] - mean["random"]) < 0.12  # any of a class, not its surest
    confident = choose(t, 200, "confident", stream())
    assert sure[confident].min() >= sure.sort(descending=True).values[199] - 1e-6
    assert not torch.equal(choose(t, 200, "balanced", stream(1)), choose(t, 200, "balanced", stream(2)))


def test_every_class_is_a_parent_equally_often() -> None:
    t = torch.eye(5)[torch.tensor([0] * 900 + [1] * 90 + [3] * 9 + [4])]
    a, b = parents(t, 4000, stream())
    y = t.argmax(1)
    for side in (a, b):
        counts = torch.bincount(y[side], minlength=5)
        assert counts[2] == 0
        assert (counts[[0, 1, 3, 4]] - 1000).abs().max() < 120  # four deviations of the binomial
    assert len(a.unique()) > 500
    assert not torch.equal(a, b)


def test_evenness() -> None:
    eye = torch.eye(4)
    assert evenness(eye).item() == pytest.approx(1)
    assert evenness(eye[:1].repeat(9, 1)).item() == 0
    p = [0.5, 0.25, 0.25]
    t = torch.eye(4)[torch.tensor([0, 0, 1, 2])]
    assert evenness(t).item() == pytest.approx(-sum(v * math.log(v) for v in p) / math.log(4), rel=1e-5)


# --------------------------------------------------------------------------------------------------- source


def test_what_is_acquired(teacher: nn.Module, pupil: nn.Module) -> None:
    asked: list[int] = []
    source = build(teacher, chunk=64)
    answers = source.context.teacher.answers
    source.context.teacher.answers = lambda x: (asked.append(len(x)), answers(x))[1]
    got = source.acquire(pupil, 0)
    assert asked == [64, 64, 64, 8, 30]  # the candidates, then the mixed ones
    assert got.images.shape == (60, *SHAPE)
    assert got.images.dtype == torch.uint8
    assert got.logits is not None
    with torch.no_grad():
        assert torch.allclose(got.logits, source.context.teacher(to_float(got.images)), atol=1e-4)
    assert source.terms["kept_entropy"] >= source.terms["drawn_entropy"]
    assert source.terms["kept_entropy"].item() == pytest.approx(evenness(got.logits[:30]).item())


def test_mixed_images_lie_between_two_kept_ones(teacher: nn.Module, pupil: nn.Module) -> None:
    x = to_float(build(teacher, n=12, candidates=40, mixup=0.5).acquire(pupil, 0).images).flatten(1)
    kept, mixed = x[:6], x[6:]
    lams = []
    for m in mixed:
        fits = [(0.0, 1.0)] if (kept - m).abs().amax(1).min() < 1 / 255 else []  # a picture mixed with itself
        for a, b in combinations(kept, 2):
            lam = float(((m - b) @ (a - b)) / ((a - b) @ (a - b)).clamp_min(1e-9))
            if float((lam * a + (1 - lam) * b - m).abs().max()) < 1 / 255 and -0.01 < lam < 1.01:
                fits.append((lam, 1 - lam))
        assert fits
        lams.append(fits[-1][0])
    assert len({round(v, 2) for v in lams}) > 2
    assert build(teacher, mixup=0.0).acquire(pupil, 0).images.shape[0] == 60


def test_one_channel_is_stretched(teacher: nn.Module, pupil: nn.Module) -> None:
    black = {}
    for stretch in ("auto", "on", "off"):
        x = build(teacher, mixup=0.0, stretch=stretch).acquire(pupil, 0).images
        black[stretch] = (x == 0).float().mean().item()
    assert black["auto"] == black["on"] > 0.3
    assert black["off"] < 0.2


def test_same_seed_and_resume(teacher: nn.Module, pupil: nn.Module) -> None:
    a, b, c = build(teacher, 0, every=5), build(teacher, 0, every=5), build(teacher, 5, every=5)
    first, second = a.acquire(pupil, 0).images, a.acquire(pupil, 1).images
    assert not torch.equal(first, second)
    assert torch.equal(first, b.acquire(pupil, 0).images)
    assert not torch.equal(first, c.acquire(pupil, 0).images)
    c.load_state_dict(copy.deepcopy(a.state_dict()))
    assert torch.equal(a.acquire(pupil, 2).images, c.acquire(pupil, 2).images)


def test_nobody_is_trained(teacher: nn.Module, pupil: nn.Module) -> None:
    before = copy.deepcopy((teacher.state_dict(), pupil.state_dict()))
    assert not build(teacher).acquire(pupil, 0).images.requires_grad
    same(before, (teacher.state_dict(), pupil.state_dict()))
    assert all(p.grad is None for p in (*teacher.parameters(), *pupil.parameters()))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"n": 1}, "source.n is 1"), ({"candidates": 59}, "source.candidates is 59, source.n 60"),
     ({"mixup": 1.0}, "source.mixup is 1.0"), ({"chunk": 0}, "source.chunk is 0"),
     ({"mix": (0.0,) * 5}, "source.mix"), ({"mix": (1.0, -1.0, 1.0, 1.0, 1.0)}, "shapes, leaves")],
)  # fmt: skip
def test_bad_settings_are_named(settings: dict[str, Any], said: str, teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match=said):
        build(teacher, **settings)


class Transformer(nn.Module):
    """A little vision transformer: patches, attention, LayerNorm, and no BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(self.patch(x).flatten(2).transpose(1, 2)).mean(1))
        return out


def test_a_teacher_without_batchnorm() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher, pupil = Transformer(), nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 5))
    with torch.no_grad():  # an untrained network names one class for everything, unless its answers are centred
        teacher.head.bias -= teacher(to_float(draw(shares((1.0,) * 5, 200), (3, 8, 8), stream(), False))).mean(0)
    result = distill(
        teacher, pupil, {"name": "procedural", "n": 600, "candidates": 1000}, preset="desk", image_shape=(3, 8, 8),
        verbose=False, augment={"pad": 0, "flip": False}, optim={"lr": 0.05}, pool={"holdout": 0.3},
        loop={"steps": 80, "batch": 32, "eval_every": 80},
    )  # fmt: skip
    assert max(result.summary["class_shares"]) < 0.35
    assert result.summary["agreement"] > 100 * max(result.summary["class_shares"]) + 5  # more than one class's share


def test_a_student_learns_digits(teacher: nn.Module, digits_test: Images) -> None:
    pupil = student(width=8)
    result = distill(
        teacher, pupil, {"name": "procedural", "n": 2000, "candidates": 6000,}, preset="desk",
        image_shape=SHAPE, verbose=False, augment={"pad": 1, "flip": False},
        loop={"steps": 150, "batch": 64, "eval_every": 150},
    )  # fmt: skip
    assert top1(predict(result.student, digits_test.x), digits_test.y) > 50  # type: ignore[arg-type]


def test_a_share_for_each_kind() -> None:
    assert len(KINDS) == len(Config().mix)
