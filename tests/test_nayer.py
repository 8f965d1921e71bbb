"""NAYER: noisy layers, label embeddings, and one batch against a slow reference."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dodistill import distill
from dodistill.data.images import Images
from dodistill.errors import DodistillError
from dodistill.evaluation.evaluate import predict, top1
from dodistill.functional import losses
from dodistill.models.batchnorm import batchnorms
from dodistill.sources.nayer import Config, Nayer, NoisyGenerator
from dodistill.sources.shared.embeddings import classifier_rows, orthogonal_rows, read_embedding
from helpers import SHAPE, calm, context, same, student

SMALL: dict[str, Any] = {
    "batch": 24, "loops": 1, "warmup_loops": 1, "warmup": 0, "iterations": 3, "noise": 8, "width": 4, "life": 0,
}  # fmt: skip


def build(teacher: nn.Module, seed: int = 0, **settings: Any) -> Nayer:
    source = Config(**(SMALL | settings)).build(context(teacher, seed))
    assert isinstance(source, Nayer)
    return source


@pytest.fixture
def pupil() -> nn.Module:
    return student().eval()


# --------------------------------------------------------------------------------------------- embeddings


def test_classifier_rows_are_the_last_layer(teacher: nn.Module) -> None:
    rows = classifier_rows(teacher, 10)
    assert torch.equal(rows, teacher.model.fc.weight)  # type: ignore[union-attr, operator]
    rows.zero_()
    assert teacher.model.fc.weight.abs().sum() > 0  # type: ignore[union-attr, operator]
    assert torch.equal(build(teacher).net.E, classifier_rows(teacher, 10))


def test_a_teacher_whose_last_layer_is_no_classifier_is_told_what_works() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 20))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x).view(-1, 10, 2).sum(2)
            return out

    with pytest.raises(DodistillError, match=r"20 rows for 10 classes.*--source.embedding orthogonal"):
        build(Odd())
    assert build(Odd(), embedding="orthogonal").net.E.shape == (10, 10)


def test_orthogonal_rows() -> None:
    a, b = (orthogonal_rows(7, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.allclose(a @ a.T, torch.eye(7), atol=1e-5)
    assert not torch.allclose(a, b, atol=0.1)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_an_embedding_from_a_file(suffix: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((10, 5))  # float64, as text encoders' arrays often are
    path = tmp_path / f"labels{suffix}"
    if suffix == ".npy":
        np.save(path, rows)
    elif suffix == ".npz":
        np.savez(path, rows=rows)
    else:
        save_file({"rows": torch.tensor(rows, dtype=torch.float16)}, path)
    got = read_embedding(str(path), 10)
    assert got.dtype == torch.float32
    assert torch.allclose(got, torch.tensor(rows, dtype=torch.float32), atol=2e-3)


def test_files_that_hold_no_embedding(tmp_path: Path) -> None:
    def said(path: Path | str, match: str) -> None:
        with pytest.raises(DodistillError, match=match):
            read_embedding(str(path), 10)

    said("clip", "must be classifier, orthogonal, or a file")
    said(tmp_path / "labels.pickle", "must be classifier, orthogonal, or a file")
    said(tmp_path / "none.npy", "there is no file")
    np.save(tmp_path / "a.npy", np.zeros((9, 4)))
    said(tmp_path / "a.npy", r"shape \(9, 4\); it must be \(10, d\)")
    np.save(tmp_path / "b.npy", np.full((10, 4), np.nan))
    said(tmp_path / "b.npy", "NaN")
    np.save(tmp_path / "c.npy", np.array([{"a": 1}] * 10, dtype=object))  # would run code
    said(tmp_path / "c.npy", "no readable numbers")
    for suffix in (".npy", ".npz", ".safetensors"):
        (tmp_path / f"d{suffix}").write_bytes(b"not an array at all")
        said(tmp_path / f"d{suffix}", "no readable numbers")
    np.save(tmp_path / "e.npy", np.array(["one"] * 10))
    said(tmp_path / "e.npy", "no readable numbers")


def test_outside_knowledge_is_named_in_the_summary(teacher: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "text.npy"
    np.save(path, np.random.default_rng(0).standard_normal((10, 6)))
    for embedding, prior in (("classifier", False), ("orthogonal", False), (str(path), True)):
        result = distill(
            teacher, student(), {"name": "nayer", **SMALL, "embedding": embedding}, image_shape=SHAPE, verbose=False,
            augment={"pad": 1, "flip": False}, loop={"steps": 1, "batch": 8},
        )  # fmt: skip
        assert any("Prior-assisted" in w and str(path) in w for w in result.summary["warnings"]) is prior


# --------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(("n", "group"), [(6, 3), (7, 3), (4, 8), (5, 1)])
def test_each_group_has_a_noisy_layer_of_its_own(n: int, group: int) -> None:
    g = torch.Generator().manual_seed(0)
    group = min(group, n)
    net = NoisyGenerator(torch.randn(3, 5, generator=g), -(-n // group), group, 4, SHAPE, 2)
    net.redraw_noise(g)
    with torch.no_grad():
        net.b.copy_(torch.randn(net.b.shape, generator=g))
    y = torch.arange(n) % 3
    seen: list[Tensor] = []
    net.net.register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    net(y)
    e = net.E[y].double()
    e = (e - e.mean(0)) / (e.var(0, correction=0) + 1e-5).sqrt()
    for i in range(n):
        expected = e[i] @ net.W[i // group].double() + net.b[i // group, 0].double()
        assert torch.allclose(seen[0][i].double(), expected, atol=1e-5)


def test_the_noise_is_standard_normal_and_new_each_time() -> None:
    g = torch.Generator().manual_seed(0)
    net = NoisyGenerator(torch.randn(10, 20, generator=g), 4, 10, 50, SHAPE, 2)
    net.redraw_noise(g)
    first = net.W.detach().clone()
    assert first.mean().abs() < 0.05
    assert abs(first.std() - 1) < 0.05
    assert not net.b.any()
    net.redraw_noise(g)
    assert (net.W - first).abs().mean() > 0.5


@pytest.mark.parametrize(("batch", "runs"), [(30, 3), (24, 2), (7, 0)])
def test_every_class_equally_often(batch: int, runs: int, teacher: nn.Module) -> None:
    y = build(teacher, batch=batch)._labels()
    assert len(y) == batch
    assert y[: 10 * runs].tolist() == list(range(10)) * runs
    counts = torch.bincount(y, minlength=10)
    assert counts.min() >= runs
    others = build(teacher, seed=1, batch=batch)._labels()
    assert (batch % 10 == 0) == torch.equal(y, others)  # only what is left over is drawn


# ------------------------------------------------------------------------------------- one batch, by the book


def slow_batch(source: Nayer, pupil: nn.Module, adversarial: bool) -> tuple[dict[str, Tensor], Tensor]:
    """The generator after the descent, and the images of lowest loss: each equation as it stands in the file's head."""
    c, ctx, g = source.config, source.context, torch.Generator()
    g.set_state(source.generator.get_state())
    net = copy.deepcopy(source.net)
    with torch.no_grad():
        net.W.copy_(torch.randn(net.W.shape, generator=g))
        net.b.zero_()
    y = torch.cat([torch.arange(c.batch - c.batch % 10) % 10, torch.randint(10, (c.batch % 10,), generator=g)])
    opt = torch.optim.Adam(net.parameters(), lr=c.lr, betas=(0.5, 0.999))
    layers, found = batchnorms(ctx.teacher), []
    for _ in range(c.iterations):
        inputs: list[Tensor] = []
        handles = [m.register_forward_pre_hook(lambda _m, a, to=inputs: to.append(a[0])) for m in layers]
        x = net(y)
        xa = ctx.view(x, g)
        t = ctx.teacher(xa)
        for h in handles:
            h.remove()
        loss = -c.oh * t.log_softmax(1)[torch.arange(c.batch), y].mean()
        for i, (m, a) in enumerate(zip(layers, inputs)):
            mean, var = a.mean((0, 2, 3)), a.var((0, 2, 3), correction=0)
            if source.ema:
                mean = (1 - c.bn_momentum) * mean + c.bn_momentum * source.ema[i][0]
                var = (1 - c.bn_momentum) * var + c.bn_momentum * source.ema[i][1]
            assert m.running_mean is not None
            assert m.running_var is not None
            loss = loss + c.bn * ((mean - m.running_mean).norm() + (var - m.running_var).norm())
        if adversarial:
            s = pupil(xa)
            kl = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
            loss = loss - c.adv * (kl * (s.argmax(1) == t.argmax(1))).mean()
        found.append((float(loss.detach()), x.detach()))
        opt.zero_grad()
        loss.backward()
        opt.step()
    pupil.zero_grad()
    return net.state_dict(), min(found, key=lambda pair: pair[0])[1]


@pytest.mark.parametrize("round", [0, 3])
def test_a_batch_against_a_slow_reference(round: int, teacher: nn.Module, pupil: nn.Module) -> None:
    for seed in range(20):
        source = build(teacher, seed)
        if round:
            source.acquire(pupil, 0)  # so that there are averages to be smoothed with
        if calm(source.net.net, lambda source=source: [slow_batch(source, pupil, round > 0)[1]]):
            break
    else:
        raise AssertionError("no seed is calm")
    expected, images = slow_batch(source, pupil, round > 0)
    got = source.acquire(pupil, round).images
    assert ("adv" in source.terms) == (round > 0)
    assert torch.allclose(got, images, atol=1e-4)
    for name, value in source.net.state_dict().items():
        # where a gradient is a rounding error, Adam's step is its sign: such entries may differ by all their steps
        far = (value.double() - expected[name].double()).abs() > 1e-4
        assert far.double().mean() < 0.02, name


@pytest.mark.parametrize("values", [[5.0, 1.0, 3.0], [1.0, 2.0, 3.0], [4.0, 3.0, 2.0]])
def test_each_batch_keeps_its_own_best(
    values: list[float], teacher: nn.Module, pupil: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(teacher, bn=1.0, oh=1e-3, loops=2)
    every = [*values, *(v + 100 for v in reversed(values))]  # the second batch is worse throughout
    left, made = iter(every), []
    monkeypatch.setattr(losses, "bn_statistics", lambda *_, **__: torch.tensor(next(left), requires_grad=True))
    source.net.register_forward_hook(lambda _m, _a, out: made.append(out.detach().clone()))
    first, second = source.acquire(pupil, 0).images.split(24)
    assert torch.equal(first, made[:3][values.index(min(values))])
    assert torch.equal(second, made[3:][values[::-1].index(min(values))])


# ---------------------------------------------------------------------------------------- over acquisitions


def test_the_generator_is_kept_the_noise_is_not(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build(teacher, lr=1e-12, life=3)
    weights, noise = [], []
    for r in range(5):
        source.acquire(pupil, r)
        weights.append(source.net.net.l1.weight.detach().clone())
        noise.append(source.net.W.detach().clone())
    changed = [not torch.equal(a, b) for a, b in pairwise(weights)]
    assert changed == [False, False, True, False]  # acquisition 3 starts anew
    assert all((a - b).abs().mean() > 0.5 for a, b in pairwise(noise))


def test_batches_per_acquisition(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build(teacher, warmup=2, loops=1, warmup_loops=3, iterations=1)
    made = [len(source.acquire(pupil, r).images) for r in range(4)]
    assert made == [72, 72, 24, 24]
    assert [source.expected(72, rounds) for rounds in range(1, 5)] == [sum(made[:n]) for n in range(1, 5)]
    assert build(teacher, warmup=0, loops=2, warmup_loops=9).expected(48, 5) == 5 * 48


def test_the_adversarial_term_waits_for_the_student(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build(teacher, warmup=2)
    there = []
    for r in range(4):
        source.acquire(pupil, r)
        there.append("adv" in source.terms)
    assert there == [False, False, False, True]


def test_gradients_stay_in_the_generator(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build(teacher)
    before = copy.deepcopy((teacher.state_dict(), pupil.state_dict()))
    for r in range(3):
        source.acquire(pupil, r)
    same(before, (teacher.state_dict(), pupil.state_dict()))
    assert all(p.grad is None for p in (*teacher.parameters(), *pupil.parameters()))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (source.net.W, *source.net.net.parameters()))


@pytest.mark.parametrize("embedding", ["classifier", "orthogonal"])
def test_its_state_is_all_of_it(embedding: str, teacher: nn.Module, pupil: nn.Module) -> None:
    a = build(teacher, 0, embedding=embedding, life=3)
    b = build(teacher, 5, embedding=embedding, life=3)
    for r in range(2):
        first = a.acquire(pupil, r).images
    assert not torch.equal(first, b.acquire(pupil, 1).images)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for r in range(2, 5):
        assert torch.equal(a.acquire(pupil, r).images, b.acquire(pupil, r).images)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"iterations": 0}, "source.iterations is 0"), ({"batch": 1}, "source.batch is 1"), ({"noise": 0}, "source.noise"),
     ({"group": -1}, "source.group is -1")],
)  # fmt: skip
def test_bad_settings_are_named(settings: dict[str, Any], said: str, teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match=said):
        build(teacher, **settings)


def test_a_student_learns_digits(teacher: nn.Module, digits_test: Images) -> None:
    pupil = student(width=8)
    result = distill(
        teacher, pupil, {"name": "nayer", "warmup": 5, "every": 10, "noise": 32, "width": 12, "batch": 60},
        preset="desk", image_shape=SHAPE, verbose=False, augment={"pad": 1, "flip": False},
        loop={"steps": 80, "batch": 64, "eval_every": 80},
    )  # fmt: skip
    shares = torch.tensor(result.summary["class_shares"])
    assert shares.min() > 0.015  # labels are balanced, and the teacher sees most of them
    assert top1(predict(result.student, digits_test.x), digits_test.y) > 30  # type: ignore[arg-type]
