"""Draw weights: the strata come at the rates of the prior, up to the cap, whatever the pool is."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dodistill.config.tree import resolve
from dodistill.core.context import Context
from dodistill.errors import DodistillError
from dodistill.interventions.shared.dictionary import ConfounderDictionary
from dodistill.interventions.stratified import Config, Stratified, stratum_weights

K = 5


@dataclass
class Pool:
    logits: Tensor

    def __len__(self) -> int:
        return len(self.logits)


def pool(counts: list[int], seed: int = 0) -> Pool:
    label = torch.tensor([k for k, n in enumerate(counts) for _ in range(n)])
    logits = torch.randn(len(label), K, generator=torch.Generator().manual_seed(seed))
    logits[torch.arange(len(label)), label] += 20
    return Pool(logits)


def build(**settings: Any) -> Stratified:
    teacher = cast(Any, SimpleNamespace(num_classes=K, image_shape=(1, 4, 4)))
    return Config(**settings).build(Context(teacher, torch.device("cpu")))


def drawn(w: Tensor, p: Pool) -> list[float]:
    """The share of each class in expectation."""
    total = torch.zeros(K).index_add_(0, p.logits.argmax(1), w)
    return cast(list[float], (total / total.sum()).tolist())


def test_classes_come_evenly() -> None:
    p = pool([100, 50, 20, 10, 20])
    part = build()
    w = part.weights(p, None)
    assert w.shape == (200,)
    assert drawn(w, p) == pytest.approx([0.2] * 5)
    assert w.mean().item() == pytest.approx(1)
    v = w.double().numpy()
    assert part.ess.item() == pytest.approx(v.sum() ** 2 / (200 * (v**2).sum()), rel=1e-5)
    assert part.largest.item() == pytest.approx(v.max() / v.mean(), rel=1e-5)
    logged = part.log(w, w, None)
    assert logged["ess"].item() == part.ess.item()


def test_an_empty_class_is_passed_over() -> None:
    p = pool([80, 0, 20, 0, 0])
    assert drawn(build().weights(p, None), p) == pytest.approx([0.5, 0, 0.5, 0, 0])
    one = pool([7, 0, 0, 0, 0])
    torch.testing.assert_close(build().weights(one, None), torch.ones(7))


def test_a_given_prior() -> None:
    p = pool([40, 40, 40, 40, 40])
    assert drawn(build(prior=(1, 2, 3, 4, 0)).weights(p, None), p) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0])


def test_power_goes_from_the_pool_to_the_prior() -> None:
    p = pool([160, 10, 10, 10, 10])
    torch.testing.assert_close(build(power=0.0).weights(p, None), torch.ones(200))
    half = drawn(build(power=0.5).weights(p, None), p)
    root = np.sqrt([0.8, 0.05, 0.05, 0.05, 0.05])
    assert half == pytest.approx(list(root / root.sum()), rel=1e-4)


def test_the_cap_holds_and_the_rest_takes_up_the_slack() -> None:
    p = pool([996, 1, 1, 1, 1])
    w = build(cap=20.0).weights(p, None)
    assert w.max().item() == pytest.approx(20)
    assert w.mean().item() == pytest.approx(1)
    assert drawn(w, p)[1] == pytest.approx(0.02, rel=1e-4)
    assert w.min().item() == pytest.approx((1000 - 80) / 996, rel=1e-4)


def clusters() -> tuple[ConfounderDictionary, Pool]:
    p = pool([120, 40, 20, 10, 10])
    dictionary = ConfounderDictionary(8, K, torch.Generator().manual_seed(0), of="pool")
    dictionary.rebuild(p.logits)
    return dictionary, p


def test_clusters_come_evenly() -> None:
    dictionary, p = clusters()
    w = build(by="cluster").weights(p, dictionary)
    share = torch.zeros(8).index_add_(0, dictionary.assign(p.logits), w) / w.sum()
    there = dictionary.valid
    torch.testing.assert_close(share, there / there.sum(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dictionary.P, share, atol=0.01)


def test_cluster_needs_a_dictionary_of_the_teachers_that_lasts() -> None:
    dictionary, p = clusters()
    part = build(by="cluster")
    assert part.config.needs_dictionary
    assert not Config().needs_dictionary
    for nothing in (None, ConfounderDictionary(8, K, torch.Generator())):
        with pytest.raises(RuntimeError, match="built before"):
            part.weights(p, nothing)
    dictionary.of = "batch"
    with pytest.raises(DodistillError, match=r"dictionary\.of=batch"):
        part.weights(p, dictionary)
    dictionary.of, dictionary.foreign = "pool", True
    with pytest.raises(DodistillError, match="foreign"):
        part.weights(p, dictionary)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 2000), min_size=2, max_size=12).filter(lambda c: sum(c) > 0),
    st.floats(0, 1),
    st.floats(1, 100),
    st.integers(0, 100),
)
def test_weights_for_any_pool(counts: list[int], power: float, cap: float, seed: int) -> None:
    count = torch.tensor(counts, dtype=torch.float64)
    share = count / count.sum()
    target = torch.rand(len(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    w = stratum_weights(share, target, power, cap)
    assert (w >= 0).all()
    assert (w[share == 0] == 0).all()
    assert (share * w).sum().item() == pytest.approx(1, rel=1e-6)
    assert w.max().item() <= cap * (1 + 1e-9)
    free = stratum_weights(share, target, power)
    expected = torch.where(share > 0, (target / share.clamp_min(1e-9)) ** power, 0.0)
    torch.testing.assert_close(free, expected / (share * expected).sum())
    below = (w < cap * (1 - 1e-6)) & (w > 0)  # what the cap spares keeps its proportions
    ratio = (w / free.clamp_min(1e-30))[below]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=0)


def test_a_prior_that_the_cap_cannot_reach_is_met_as_far_as_it_goes() -> None:
    w = stratum_weights(torch.tensor([0.9, 0.1]), torch.tensor([0.0, 1.0]), cap=4.0)
    assert w.tolist() == [0.0, 4.0]


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        ({"power": 1.5}, "power is 1.5"),
        ({"cap": 0.5}, "cap is 0.5"),
        ({"prior": (1.0, -1.0, 1.0, 1.0, 1.0)}, "numbers >= 0"),
        ({"prior": (0.0,) * 5}, "not all 0"),
        ({"prior": (1.0, 1.0)}, "2 entries for 5 strata"),
    ],
)
def test_bad_values_are_named(settings_: dict[str, Any], named: str) -> None:
    with pytest.raises(DodistillError, match=named):
        build(**settings_)


def test_an_unknown_stratum_is_refused() -> None:
    with pytest.raises(DodistillError, match=r"stratified.by: unknown value 'label'"):
        resolve({"intervention": "stratified", "stratified": Config(by="label")})  # type: ignore[arg-type]
