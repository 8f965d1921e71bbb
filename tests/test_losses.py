"""Each loss against a slow reading of its equation; where its gradient arrives; what must hold for any logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dodistill.functional import losses

B, K = 6, 5


def logits(seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(B, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: np.ndarray) -> np.ndarray:
    e = [math.exp(v) for v in row]
    return np.array([v / sum(e) for v in e])


def slow_kl(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))


def rows(s: Tensor, t: Tensor, T: float = 1.0) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(softmax(a / T), softmax(b / T)) for a, b in zip(s.numpy(), t.numpy())]


def test_kl_is_the_equation() -> None:
    s, t, T = logits(0), logits(1), 3.0
    expected = T * T * np.mean([slow_kl(q, p) for p, q in rows(s, t, T)])
    assert losses.kl(s, t, T).item() == pytest.approx(expected, rel=1e-10)
    assert losses.kl(s, t, T).item() != pytest.approx(losses.kl(t, s, T).item(), rel=1e-3)


def test_l1_is_the_equation() -> None:
    s, t = logits(0), logits(1)
    assert losses.l1(s, t).item() == pytest.approx(np.abs(s.numpy() - t.numpy()).sum() / (B * K))


def test_js_is_the_equation() -> None:
    s, t, T = logits(0), logits(1), 3.0
    expected = np.mean([0.5 * slow_kl(p, (p + q) / 2) + 0.5 * slow_kl(q, (p + q) / 2) for p, q in rows(s, t, T)])
    assert losses.js(s, t, T).item() == pytest.approx(expected, rel=1e-10)


def test_js_published_is_the_released_arithmetic() -> None:
    s, t, T = logits(0, 6.0), logits(1, 6.0), 3.0
    each = []
    for p, q in rows(s, t, T):
        m, p, q = (np.clip(v, 0.01, 0.99) for v in ((p + q) / 2, p, q))
        each.append(0.5 * slow_kl(m, p) + 0.5 * slow_kl(m, q))
    assert losses.js_published(s, t, T).item() == pytest.approx(np.mean(each), rel=1e-10)
    assert losses.js_published(s, t, T).item() != pytest.approx(losses.js(s, t, T).item(), rel=1e-2)


def test_adversarial_counts_only_where_both_name_one_class() -> None:
    s, t = logits(0), logits(1)
    s[0], t[0] = torch.arange(K).double(), 2.0 * torch.arange(K).double()
    same = [a.argmax() == b.argmax() for a, b in zip(s, t)]
    assert any(same)
    assert not all(same)
    expected = -np.mean([slow_kl(q, p) * bool(m) for (p, q), m in zip(rows(s, t), same)])
    assert losses.adversarial(s, t).item() == pytest.approx(expected, rel=1e-10)


def test_total_variation_and_norm() -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    two = one = 0.0
    for dy, dx in ((0, 1), (1, 0), (1, -1), (1, 1)):
        differences = [
            (x[b, c, i, j] - x[b, c, i + dy, j + dx]).item()
            for b in range(2) for c in range(3) for i in range(5) for j in range(4)
            if 0 <= i + dy < 5 and 0 <= j + dx < 4
        ]  # fmt: skip
        two += math.sqrt(sum(d * d for d in differences))
        one += sum(abs(d) for d in differences) / len(differences)
    assert losses.total_variation(x).item() == pytest.approx(two)
    assert losses.total_variation(x, order=1).item() == pytest.approx(one)
    assert losses.total_variation(torch.full_like(x, 0.3)).item() == 0
    assert losses.l2_norm(x).item() == pytest.approx(math.sqrt((x * x).sum().item()))
    per_image = np.mean([math.sqrt((v * v).sum().item()) for v in x])
    assert losses.l2_norm(x, per_image=True).item() == pytest.approx(per_image)


def bn_layers() -> tuple[list[nn.BatchNorm2d], list[tuple[Tensor, Tensor]]]:
    g = torch.Generator().manual_seed(0)
    modules, stats = [], []
    for c in (2, 3):
        module = nn.BatchNorm2d(c)
        module.running_mean = torch.randn(c, generator=g)
        module.running_var = torch.rand(c, generator=g) + 0.5
        modules.append(module)
        stats.append((torch.randn(c, generator=g, requires_grad=True), torch.rand(c, generator=g, requires_grad=True)))
    return modules, stats


def test_bn_statistics_is_the_equation() -> None:
    modules, stats = bn_layers()
    each = [
        math.dist(m.running_var.tolist(), v.tolist()) + math.dist(m.running_mean.tolist(), u.tolist())  # type: ignore[union-attr]
        for m, (u, v) in zip(modules, stats)
    ]
    assert losses.bn_statistics(stats, modules).item() == pytest.approx(sum(each), rel=1e-5)
    assert losses.bn_statistics(stats, modules, first=10).item() == pytest.approx(10 * each[0] + each[1], rel=1e-5)


def test_bn_statistics_smoothed_scales_the_gradient() -> None:
    modules, stats = bn_layers()
    assert losses.bn_statistics(stats, modules, [], 0.9).item() == losses.bn_statistics(stats, modules).item()
    here = losses.bn_average(None, stats, 0.9)
    assert not here[0][0].requires_grad
    # the average equals the current statistics, so the value is the plain one and the gradient is (1-m) of it
    plain = torch.autograd.grad(losses.bn_statistics(stats, modules), stats[1][0])[0]
    smooth = torch.autograd.grad(losses.bn_statistics(stats, modules, here, 0.9), stats[1][0])[0]
    torch.testing.assert_close(smooth, 0.1 * plain)
    there = losses.bn_average(here, [(u + 1, v) for u, v in stats], 0.9)
    torch.testing.assert_close(there[0][0], here[0][0] + 0.1)
    torch.testing.assert_close(there[0][1], here[0][1])


def test_bn_statistics_refuses_what_does_not_fit() -> None:
    modules, stats = bn_layers()
    with pytest.raises(ValueError, match="1 statistics for 2 layers"):
        losses.bn_statistics(stats[:1], modules)
    with pytest.raises(ValueError, match="no BatchNorm"):
        losses.bn_statistics([], [])
    with pytest.raises(ValueError, match="running statistics"):
        losses.bn_statistics(stats[:1], [nn.BatchNorm2d(2, track_running_stats=False)])


def test_noisy_adaptation_is_the_equation() -> None:
    s, t, accuracy = logits(0), logits(1), 0.8
    a = torch.randn(K, K - 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    Q = np.zeros((K, K))
    for k in range(K):
        others = [j for j in range(K) if j != k]
        Q[k, k] = accuracy
        Q[k, others] = (1 - accuracy) * softmax(a[k].numpy())
    np.testing.assert_allclose(losses.noisy_transition(a, accuracy).numpy(), Q, atol=1e-12)
    each = [-math.log((softmax(p) @ Q)[int(np.argmax(q))]) for p, q in zip(s.numpy(), t.numpy())]
    assert losses.noisy_adaptation(s, t, a, accuracy).item() == pytest.approx(np.mean(each))


@pytest.mark.parametrize("name", ["kl", "l1", "js", "js_published", "adversarial"])
def test_gradients_arrive_at_both_sides_when_asked_and_match_finite_differences(name: str) -> None:
    s, t = logits(0), logits(1)
    s[:3].copy_(t[:3] + 0.1 * s[:3])
    s.requires_grad_()
    t.requires_grad_()
    loss = getattr(losses, name)
    assert torch.autograd.gradcheck(loss, (s, t), eps=1e-7, atol=1e-5)
    gs, gt = torch.autograd.grad(loss(s, t), (s, t))
    assert gs.abs().sum() > 0
    assert gt.abs().sum() > 0


def test_adaptation_gradient_stops_at_the_hard_label() -> None:
    s, t = logits(0).requires_grad_(), logits(1).requires_grad_()
    a = torch.zeros(K, K - 1, dtype=torch.float64, requires_grad=True)
    losses.noisy_adaptation(s, t, a, 0.9).backward()
    assert s.grad is not None
    assert a.grad is not None
    assert s.grad.abs().sum() > 0
    assert a.grad.abs().sum() > 0
    assert t.grad is None


numbers = st.lists(st.floats(-30, 30), min_size=K, max_size=K)


@settings(max_examples=60, deadline=None)
@given(numbers, numbers, st.floats(0.5, 20))
def test_divergences_for_any_logits(p: list[float], q: list[float], T: float) -> None:
    s, t = torch.tensor([p], dtype=torch.float64), torch.tensor([q], dtype=torch.float64)
    assert losses.kl(s, t, T).item() >= -1e-9
    assert losses.kl(s, s, T).item() == pytest.approx(0, abs=1e-9)
    assert losses.kl(s + 7, t - 3, T).item() == pytest.approx(losses.kl(s, t, T).item(), abs=1e-7)
    js = losses.js(s, t, T).item()
    assert -1e-12 <= js <= math.log(2) + 1e-12
    assert js == pytest.approx(losses.js(t, s, T).item(), abs=1e-12)
    assert losses.adversarial(s, t).item() <= 1e-12
    assert math.isfinite(losses.js_published(s, t, T).item())


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.floats(0.01, 0.99), st.integers(0, 1000))
def test_transition_rows_are_distributions(classes: int, accuracy: float, seed: int) -> None:
    a = 5 * torch.randn(classes, classes - 1, generator=torch.Generator().manual_seed(seed))
    Q = losses.noisy_transition(a, accuracy)
    assert (Q >= 0).all()
    torch.testing.assert_close(Q.sum(1), torch.ones(classes))
    torch.testing.assert_close(Q.diagonal(), torch.full((classes,), accuracy))
