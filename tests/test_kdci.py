"""KDCI against a slow reading of Eq. 4-5, its switches, its gradients, and several interventions together."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dodistill.config import registry
from dodistill.config.tree import resolve
from dodistill.core.context import Context
from dodistill.errors import DodistillError
from dodistill.functional import losses
from dodistill.interventions import kdci
from dodistill.interventions.kdci import KDCI, Config
from dodistill.interventions.shared.base import Intervention, Interventions
from dodistill.interventions.shared.dictionary import ConfounderDictionary

K, N, B = 6, 8, 5


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def context(**extra: Any) -> Context:
    teacher = cast(Any, SimpleNamespace(num_classes=K, image_shape=(1, 4, 4)))
    return Context(teacher, torch.device("cpu"), extra=extra)


def filled(distinct: int = 100, d: int = K, seed: int = 0) -> ConfounderDictionary:
    """With empty slots (P = 0) where there are fewer distinct predictions than N."""
    dictionary = ConfounderDictionary(N, d, stream(seed))
    M = 4 * torch.randn(distinct, d, generator=stream(seed))
    dictionary.rebuild(M[torch.randint(distinct, (200,), generator=stream(seed + 1))])
    return dictionary


def student(seed: int = 0) -> Tensor:
    return 3 * torch.randn(B, K, generator=stream(seed))


def slow_F(model: KDCI, s: Tensor, dictionary: ConfounderDictionary) -> np.ndarray:
    """Eq. 4 and 5 in loops, over the slots with members only."""
    assert model.attention is not None
    W_q, W_k = (w.detach().double().numpy() for w in (model.attention.W_q, model.attention.W_k))
    w_t = model.attention.W_t.detach().double().numpy()[0]
    Z, P = dictionary.Z.double().numpy(), dictionary.P.double().numpy()
    out = np.zeros((len(s), Z.shape[1]))
    for b, row in enumerate(s.detach().double().numpy()):
        slots = [i for i in range(len(P)) if P[i] > 0]
        score = {}
        for i in slots:
            hidden = [math.tanh(W_q[n] @ row + W_k[n] @ Z[i]) for n in range(len(w_t))]
            score[i] = sum(w * h for w, h in zip(w_t, hidden))
        total = sum(math.exp(v) for v in score.values())
        for i in slots:
            out[b] += math.exp(score[i]) / total * Z[i] * P[i]
    return out


@pytest.mark.parametrize("distinct", [100, 3])
@pytest.mark.parametrize("width", [None, 17])
def test_F_is_equation_4_with_the_weights_of_equation_5(distinct: int, width: int | None) -> None:
    model, dictionary, s = Config(width=width).build(context()), filled(distinct), student()
    assert int(dictionary.valid.sum()) == min(distinct, N)
    assert model.attention is not None
    assert model.attention.W_q.shape == (width or K, K)
    F = model.compensate(s, dictionary) - s
    np.testing.assert_allclose(F.detach().numpy(), slow_F(model, s, dictionary), rtol=1e-4, atol=1e-5)
    scaled = Config(width=width, scale=2.5).build(context()).compensate(s, dictionary) - s
    torch.testing.assert_close(scaled, 2.5 * F, rtol=1e-4, atol=1e-5)


def test_no_proportions_and_renormalised_weights() -> None:
    dictionary, s = filled(3), student()
    literal = Config().build(context())
    lam = literal.lam(s, dictionary)
    torch.testing.assert_close(lam.sum(1), torch.ones(B))
    assert (lam[:, ~dictionary.valid] == 0).all()
    without = Config(proportions=False).build(context())
    torch.testing.assert_close(without.F(lam, dictionary), lam @ dictionary.Z)
    both = Config(renormalize=True).build(context()).F(lam, dictionary)
    weight = lam * dictionary.P
    torch.testing.assert_close(both, (weight @ dictionary.Z) / weight.sum(1, keepdim=True))
    # an average of prototypes lies within their range; the literal sum is about N times smaller
    assert (both <= dictionary.Z.amax(0) + 1e-5).all()
    assert (both >= dictionary.Z.amin(0) - 1e-5).all()


def test_constant_and_random_weights_do_not_read_the_input() -> None:
    dictionary, s = filled(), student()
    constant = Config(weights="constant").build(context())
    assert not list(constant.parameters())
    mean = (dictionary.P[:, None] * dictionary.Z).sum(0)
    torch.testing.assert_close(constant.compensate(s, dictionary) - s, mean.expand(B, K), rtol=1e-4, atol=1e-5)
    plain = Config(weights="constant", proportions=False).build(context())
    torch.testing.assert_close(plain.F(plain.lam(s, dictionary), dictionary)[0], dictionary.Z.mean(0))

    random = Config(weights="random").build(context())
    assert not list(random.parameters())
    lam = random.lam(s, dictionary)
    torch.testing.assert_close(lam[0], torch.softmax(dictionary.xi, 0))
    assert torch.equal(lam, random.lam(student(1), dictionary))
    dictionary.rebuild(4 * torch.randn(50, K, generator=stream(9)))
    assert not torch.allclose(lam, random.lam(s, dictionary))


def gradients(config: Config, d: int = K) -> tuple[Tensor, KDCI, Tensor]:
    """The gradient at s, the module with its own, and what the gradient at s would be with F held constant."""
    extra = {"foreign": SimpleNamespace(num_classes=d)} if d != K else {}
    model, dictionary = config.build(context(**extra)), filled(d=d)
    s, t = student().requires_grad_(), student(1)
    losses.kl(model.compensate(s, dictionary), t, 2.0).backward()
    F = (model.compensate(s, dictionary) - s).detach()
    frozen = s.detach().clone().requires_grad_()
    losses.kl(frozen + F, t, 2.0).backward()
    assert s.grad is not None
    assert frozen.grad is not None
    assert not dictionary.Z.requires_grad
    assert not dictionary.P.requires_grad
    return s.grad, model, frozen.grad


@pytest.mark.parametrize("d", [K, 9])
def test_every_matrix_learns_and_the_query_reaches_the_student(d: int) -> None:
    grad, model, frozen = gradients(Config(), d)
    names = {name for name, _ in model.named_parameters()}
    assert names == {"attention.W_q", "attention.W_k", "attention.W_t"} | ({"W_m"} if d != K else set())
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    assert not torch.allclose(grad, frozen, rtol=1e-4, atol=1e-7)


def test_a_detached_query_leaves_only_the_direct_path() -> None:
    grad, model, frozen = gradients(Config(detach_query=True))
    torch.testing.assert_close(grad, frozen)
    assert model.attention is not None
    assert model.attention.W_q.grad is not None
    assert model.attention.W_q.grad.abs().sum() > 0


def test_a_foreign_dictionary_is_mapped_to_the_students_classes() -> None:
    model, dictionary, s = Config().build(context(foreign=SimpleNamespace(num_classes=9))), filled(d=9), student()
    assert model.W_m is not None
    assert model.W_m.shape == (K, 9)
    F = model.compensate(s, dictionary) - s
    np.testing.assert_allclose(
        F.detach().numpy(), slow_F(model, s, dictionary) @ model.W_m.detach().double().numpy().T, rtol=1e-4, atol=1e-5
    )
    assert Config(mapping=True).build(context()).W_m is not None


def test_autocast_does_not_lower_it() -> None:
    model, dictionary, s = Config().build(context()), filled(), student()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model.compensate(s, dictionary)
    assert low.dtype == torch.float32
    assert torch.equal(low, model.compensate(s, dictionary))


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(N)), st.integers(1, 20))
def test_the_order_of_the_prototypes_means_nothing(order: list[int], distinct: int) -> None:
    model, dictionary, s = Config().build(context()), filled(distinct), student()
    before = model.compensate(s, dictionary)
    dictionary.Z.copy_(dictionary.Z[order].clone())
    dictionary.P.copy_(dictionary.P[order].clone())
    torch.testing.assert_close(model.compensate(s, dictionary), before, rtol=1e-5, atol=1e-5)


def test_an_empty_slot_has_no_influence_whatever_it_holds() -> None:
    model, dictionary, s = Config().build(context()), filled(3), student()
    before = model.compensate(s, dictionary)
    dictionary.Z[~dictionary.valid] = 1000.0
    assert torch.equal(model.compensate(s, dictionary), before)


def test_the_global_stream_is_untouched_and_the_seed_decides() -> None:
    state = torch.get_rng_state()
    first, again = Config().build(context()), Config().build(context())
    assert torch.equal(state, torch.get_rng_state())
    assert first.attention is not None
    assert again.attention is not None
    assert torch.equal(first.attention.W_q, again.attention.W_q)
    bound = 1 / math.sqrt(K)
    assert first.attention.W_q.abs().max() <= bound
    assert first.attention.W_q.abs().max() > 0.8 * bound


def test_the_log_is_what_it_says() -> None:
    model, dictionary, s, t = Config(scale=5.0).build(context()), filled(), student(), student(1)
    logged = model.log(s, t, dictionary)
    F = 5 * slow_F(model, s, dictionary)
    S = s.double().numpy()
    length = np.linalg.norm
    assert logged["F_over_S"].item() == pytest.approx(length(F, axis=1).mean() / length(S, axis=1).mean(), rel=1e-4)
    centred = [length(v - v.mean(1, keepdims=True), axis=1).mean() for v in (F, S)]
    assert logged["F_over_S_centred"].item() == pytest.approx(centred[0] / centred[1], rel=1e-4)
    label = t.numpy().argmax(1)
    assert logged["agreement"].item() == pytest.approx(100 * (S.argmax(1) == label).mean())
    assert logged["agreement_with_F"].item() == pytest.approx(100 * ((S + F).argmax(1) == label).mean())
    assert 0 < logged["attention_entropy"] < logged["attention_entropy_max"]
    assert logged["attention_entropy_max"].item() == pytest.approx(math.log(N))
    assert logged["clusters"] == N
    assert all(v.shape == () and torch.isfinite(v) and not v.requires_grad for v in logged.values())
    for weights in ("random", "constant"):
        other = Config(weights=cast(Any, weights)).build(context()).log(s, t, filled(3))
        assert other["attention_entropy"] <= other["attention_entropy_max"] + 1e-6
        assert other["clusters"] == 3


def test_without_a_dictionary_it_stops() -> None:
    model, s = Config().build(context()), student()
    for dictionary in (None, ConfounderDictionary(N, K, stream())):
        with pytest.raises(RuntimeError, match="built before the first"):
            model.compensate(s, dictionary)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Config(width=0), "width is 0"),
        (Config(own_lr=0.0), "own_lr is 0"),
    ],
)
def test_bad_values_are_named(config: Config, named: str) -> None:
    with pytest.raises(DodistillError, match=named):
        config.build(context())


def test_an_unknown_choice_in_an_instance_is_refused() -> None:
    tree_ = {"source": "fast", "intervention": "kdci", "kdci": Config(weights=cast(Any, "uniform"))}
    with pytest.raises(DodistillError, match=r"kdci.weights: unknown value 'uniform'.* Known: attention, constant"):
        resolve(tree_)


class Shift(Intervention):
    def __init__(self, name: str, by: float, weight: float | None, at_test: bool = False, own_lr: float | None = None):
        super().__init__()
        self.name, self.by, self.weight, self.at_test, self.own_lr = name, by, weight, at_test, own_lr
        self.p = torch.nn.Parameter(torch.zeros(()))

    def weights(self, pool: Any, dictionary: Any) -> Tensor | None:
        return None if self.weight is None else torch.tensor([self.weight, 1.0, 2.0])

    def compensate(self, s: Tensor, dictionary: Any, batch: Any = None) -> Tensor:
        return 2 * s + self.by

    def log(self, s: Tensor, t: Tensor, dictionary: Any, batch: Any = None) -> dict[str, Tensor]:
        return {"seen": s.mean()}


def test_interventions_compose() -> None:
    a, b, c = Shift("a", 1.0, 3.0, own_lr=0.5), Shift("b", 5.0, None, at_test=True), Shift("c", 0.0, 5.0)
    both = Interventions([a, b, c])
    weights = both.weights(cast(Any, range(3)), None)
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([15.0, 1.0, 4.0]) / (20 / 3))
    s = torch.ones(2, 3)
    torch.testing.assert_close(both.compensate(s, None), torch.full((2, 3), 22.0))
    torch.testing.assert_close(both.deliver(torch.nn.Flatten(), None)(s), torch.full((2, 3), 7.0))
    assert {k: v.item() for k, v in both.log(s, s, None).items()} == {"a/seen": 1, "b/seen": 3, "c/seen": 11}
    none = Interventions()
    assert none.weights(cast(Any, None), None) is None
    assert none.compensate(s, None) is s
    net = torch.nn.Flatten()
    assert none.deliver(net, None) is net
    assert not none.state_dict()


def test_names_of_choices() -> None:
    for name in registry.names("intervention"):
        assert registry.config("intervention", name)().name == name
    assert Config().needs_dictionary


def test_attention_done_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = kdci.PriorAttention(5, 5, 5, torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    s, Z, valid = torch.randn(7, 5, generator=g), torch.randn(3, 5, generator=g), torch.tensor([True, True, False])
    weigh = torch.randn(7, 3, generator=g)
    found = []
    for room in (2**19, 30):  # all at once; two rows at a time
        monkeypatch.setattr(kdci, "ROOM", room)
        query = s.clone().requires_grad_()
        lam = attention(query, Z, valid)
        grads = torch.autograd.grad((lam * weigh).sum(), [query, *attention.parameters()])
        found.append((lam.detach(), *grads))
    for whole, parts in zip(*found):
        torch.testing.assert_close(parts, whole)
