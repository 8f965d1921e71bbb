"""Fast's and DeepInversion's ImageNet code beside ours, by numbers.

tests/golden/{fast,deepinv}_imagenet.json hold what the released code computes on the inputs and weights of
tests/formula.py. Where ours deviates on purpose, the test says so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dodistill.config.tree import resolve
from dodistill.core.context import Context
from dodistill.errors import DodistillError
from dodistill.functional import losses
from dodistill.functional.augment import View
from dodistill.models import Normalized
from dodistill.models.normalized import NORMALISATION
from dodistill.models.teacher import Teacher
from dodistill.sources.deepinv import Config, DeepInv
from dodistill.sources.fast_imagenet import Config as FastConfig
from dodistill.sources.fast_imagenet import FastImagenet
from dodistill.sources.shared.generators import DeepGenerator
from formula import alike, close, digest, fill, gauss, labels, net
from helpers import context, student

GOLDEN = Path(__file__).parent / "golden"


def released(method: str) -> dict[str, Any]:
    values = json.loads((GOLDEN / f"{method}.json").read_text())["values"]
    return {name: entry["value"] for name, entry in values.items()}


class Still(View):
    """Shows the images as they are."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x


def imagenet(phase: float) -> Normalized:
    return Normalized(net(phase), *NORMALISATION["imagenet"])


def given(side: int) -> tuple[Context, nn.Module]:
    """The teacher in its context, and the student."""
    return Context(Teacher(imagenet(1), (3, side, side)), torch.device("cpu"), view=Still()), imagenet(5).eval()


# ---------------------------------------------------------------------------------------------------------- fast


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All numbers in double precision: in single precision Adam turns rounding into steps."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
def test_fast_imagenet_equals_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = released("fast_imagenet")
    full = DeepGenerator(256, (3, 224, 224), 64)
    assert sum(p.numel() for p in full.parameters()) == theirs["parameters of conv_blocks, nz 256, ngf 64"]

    ctx, pupil = given(32)
    rates = {"lr_g": 2e-3, "lr_z": 0.1, "lr_g_meta": 0.01, "lr_z_meta": 5e-3}
    source = FastImagenet(FastConfig(batch=8, K=3, reinit=3, latent=6, width=4, **rates), ctx)
    fill(source.meta, phase=3)
    source.z = first = gauss(8, 6, 2, 2)
    monkeypatch.setattr(source, "_latents", lambda: gauss(8, 6, 2, 2, phase=3))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: labels(8))
    start = [p.detach().clone() for p in source.meta.parameters()]
    for r in range(4):
        x = source.acquire(pupil, r).images
        moved = [p - q for p, q in zip(source.meta.parameters(), start)]
        z = source.z - (first if r < 2 else gauss(8, 6, 2, 2, phase=3))
        said = f"call {r + 1}: "
        assert close([10 * source.terms["bn"].item(), 10 * source.terms["ce"].item()], theirs[said + "bn, oh"], 1e-5)
        assert alike(digest(x), theirs[said + "images"], 1e-5)
        assert alike(digest(moved), theirs[said + "generator moved"], 1e-5)
        assert alike(digest(z), theirs[said + "z moved"], 1e-5)


# ------------------------------------------------------------------------------------------------------- deepinv

RUNS: dict[str, dict[str, Any]] = {
    "setting 0": {"preset": "imagenet", "low": 5, "iterations": 6},
    "setting 0, adi": {"preset": "imagenet-adaptive", "low": 5, "iterations": 6},
    "setting 1": {"preset": "imagenet-single", "iterations": 8},
    "setting 2": {"preset": "imagenet-long", "iterations": 7},
}


class Rolls:
    """In place of `torch.randint`: labels, rolls and flips as the released code was given them."""

    def __init__(self) -> None:
        self.rolls = self.flips = 0

    def __call__(self, *bounds: Any, **_: Any) -> Tensor:
        (n,) = bounds[-1]
        if n > 2:
            return labels(n, bounds[0])
        if n == 2:
            self.rolls += 2
            roll = [(-1) ** k * (k % 3) for k in range(self.rolls - 2, self.rolls)]
            return torch.tensor([max(bounds[0], min(bounds[1] - 1, r)) for r in roll])
        self.flips += 1
        return torch.tensor([(self.flips - 1) % 2])


@pytest.mark.parametrize("run", sorted(RUNS))
def test_deepinv_on_imagenet_equals_the_release(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {k: v for k, v in RUNS[run].items() if k != "preset"}
    preset = resolve({"source": "deepinv", "preset": RUNS[run]["preset"]}).source
    c = dataclasses.replace(preset, **settings, batch=8, jitter=4, lr_warmup=2)
    theirs = {k.partition(": ")[2]: v for k, v in released("deepinv_imagenet").items() if k.startswith(f"{run}: ")}
    ctx, pupil = given(16)
    source = DeepInv(c, ctx)
    seen: list[dict[str, float]] = []
    iterates: list[Tensor] = []
    rates: list[float] = []
    inner, at = source._terms, source._rate

    def terms(u: Tensor, *rest: Any) -> dict[str, Tensor]:
        out = dict(inner(u, *rest))
        seen.append({k: v.item() for k, v in out.items()})
        iterates.append(u.detach().clone())
        return out

    def rate(i: int, steps: int) -> float:
        rates.append(at(i, steps))
        return rates[-1]

    monkeypatch.setattr(source, "_terms", terms)
    monkeypatch.setattr(source, "_rate", rate)
    monkeypatch.setattr(torch, "randint", Rolls())
    monkeypatch.setattr(torch, "randn", lambda shape, **_: gauss(*shape))
    x = source.acquire(pupil, 0).images

    assert close(rates, theirs["rate of each iteration"])
    losses_ = [sum(s.values()) for s in seen]
    assert close(losses_, theirs["loss of each iteration"])
    for name in ("tv", "bn", "l2", *(["js"] if c.adv else [])):
        assert close([s[name] for s in seen], theirs[f"{name} of each iteration"]), name
    assert alike(digest(iterates[-1]), theirs["iterate before the last step"])
    # Deviation 2: ours is the iterate with the lowest loss at full resolution, theirs one step on and of any.
    full = losses_[c.low :]
    best = iterates[c.low + full.index(min(full))]
    assert torch.allclose(x, (source.mean + source.std * best).clamp(0, 1), atol=1e-6)
    assert not alike(digest(x), theirs["best, after its step, in pixels"], 1e-4)


def test_the_low_resolution_is_the_mean_of_four_pixels(teacher: nn.Module) -> None:
    source = DeepInv(Config(batch=8, low=2, iterations=1, jitter=3), context(teacher))
    shown: list[tuple[Any, ...]] = []
    inner = source._terms

    def terms(u: Tensor, *rest: Any) -> dict[str, Tensor]:
        shown.append((tuple(u.shape), rest[2]))
        return inner(u, *rest)

    source._terms = terms  # type: ignore[method-assign]
    source.acquire(student().eval(), 0)
    assert shown == [((8, 1, 4, 4), 1), ((8, 1, 4, 4), 1), ((8, 1, 8, 8), 3)]


class Rigid(nn.Module):
    """Reads 8x8 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.fc = nn.BatchNorm2d(1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.bn(x).flatten(1))
        return out


def test_a_teacher_that_cannot_read_half_the_size_is_refused() -> None:
    ctx = context(Rigid())
    DeepInv(Config(batch=8), ctx)
    with pytest.raises(DodistillError, match=r"low is 5, but the teacher cannot read images of 4x4, half of its 8x8"):
        DeepInv(Config(batch=8, low=5), ctx)


def test_the_published_divergence_is_clamped(teacher: nn.Module) -> None:
    """With many classes the unnormalised probabilities leave [0, ln 2]; beyond 1 the term is 0, and has no gradient."""
    s, t = torch.full((2, 400), -30.0), torch.full((2, 400), -30.0)
    s[:, 0] = t[:, 1] = 30
    assert losses.js_published(s, t) > 1

    class Says(nn.Module):
        def __init__(self, logits: Tensor) -> None:
            super().__init__()
            self.bn, self.logits = nn.BatchNorm2d(1), logits

        def forward(self, x: Tensor) -> Tensor:
            return self.logits.expand(len(x), -1) + 0 * self.bn(x).mean((1, 2, 3))[:, None]

    source = DeepInv(Config(batch=2, iterations=1, js="published", adv=3.0), context(Says(t[:1])))
    source.acquire(Says(s[:1]).eval(), 0)
    assert source.terms["js"].item() == 0


def test_few_labels_of_many_classes_are_spread(teacher: nn.Module) -> None:
    """Of 1000 classes a batch of 84 would always have been of the first 84."""
    from dodistill.sources.shared.base import balanced_labels

    g = torch.Generator().manual_seed(0)
    drawn = [balanced_labels(84, 1000, g) for _ in range(60)]
    assert all(len(y.unique()) == 84 for y in drawn)
    assert len(torch.cat(drawn).unique()) > 950

    many = torch.cat([balanced_labels(128, 100, g) for _ in range(200)])  # 28 of 100 twice: not always the same 28
    counts = torch.bincount(many, minlength=100)
    assert counts.max() < 1.25 * counts.min()
    state = g.get_state()
    assert balanced_labels(6, 3, g).tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(g.get_state(), state)  # nothing is drawn where nothing is left over


def test_the_imagenet_presets_are_the_release() -> None:
    s = {name: resolve({"source": "deepinv", "preset": name}).source for name in
         ("imagenet", "imagenet-adaptive", "imagenet-single", "imagenet-long")}  # fmt: skip
    for c in s.values():
        assert (c.bn, c.first_bn, c.oh, c.tv, c.tv_norm, c.l2, c.l2_per_image) == (0.01, 10, 1, 1e-4, "l2", 1e-5, True)
        assert (c.schedule, c.lr_warmup, c.jitter, c.flip, c.js, c.temperature) == (
            "cosine",
            100,
            30,
            True,
            "published",
            3,
        )
    assert [(c.batch, c.low, c.iterations, c.lr, c.betas, c.clip, c.adv) for c in s.values()] == [
        (84, 2000, 1000, 0.25, (0.5, 0.9), True, 0.0),
        (84, 2000, 1000, 0.2, (0.5, 0.9), True, 0.2),
        (84, 0, 2000, 0.2, (0.5, 0.9), True, 0.0),
        (152, 0, 20_000, 0.2, (0.9, 0.999), False, 0.0),
    ]
