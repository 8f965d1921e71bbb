"""k-means against scikit-learn and against its own definition; PCA against an SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import Tensor

from dodistill.functional import kmeans


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(n: int, d: int, seed: int = 0) -> Tensor:
    """Like logits: one large entry, the rest noise; uneven classes."""
    g = stream(seed)
    share = torch.arange(1, d + 1).double()
    label = torch.multinomial(share, n, replacement=True, generator=g)
    x = torch.randn(n, d, generator=g) * 1.5
    x[torch.arange(n), label] += 10
    return x - x.mean(0)


def inertia(x: Tensor, centres: Tensor, labels: Tensor) -> float:
    return (x.double() - centres[labels].double()).square().sum().item()


@pytest.mark.parametrize(("n", "d", "k"), [(256, 10, 8), (256, 10, 32), (3000, 20, 64)])
def test_inertia_is_that_of_scikit_learn(n: int, d: int, k: int) -> None:
    ours, theirs = [], []
    for seed in range(6):
        x = blobs(n, d, seed)
        centres, alive, labels = kmeans.kmeans(x, k, stream(seed), iterations=10)
        assert alive.all()
        ours.append(inertia(x, centres, labels))
        theirs.append(KMeans(k, n_init=1, max_iter=10, random_state=seed).fit(x.numpy()).inertia_)
    assert np.mean(ours) <= 1.03 * np.mean(theirs)
    assert max(ours) <= 1.15 * max(theirs)


def test_seeding_beats_random_rows() -> None:
    seeded, drawn = [], []
    for seed in range(8):
        x = blobs(1000, 10, seed)
        centres, _, labels = kmeans.kmeans(x, 10, stream(seed), iterations=0)
        rows = x[torch.randperm(1000, generator=stream(seed))[:10]]
        seeded.append(inertia(x, centres, labels))
        drawn.append(inertia(x, rows, kmeans.assign(x, rows)))
    assert np.mean(seeded) < 0.85 * np.mean(drawn)


def test_distances_and_labels_against_the_definition() -> None:
    x, centres = blobs(50, 7), blobs(9, 7, seed=1)
    slow = torch.tensor([[((a - b) ** 2).sum() for b in centres] for a in x])
    torch.testing.assert_close(kmeans.squared_distances(x, centres), slow, rtol=1e-4, atol=1e-3)
    assert torch.equal(kmeans.assign(x, centres), slow.argmin(1))
    alive = torch.ones(9, dtype=torch.bool)
    alive[slow.argmin(1)[0]] = False
    assert torch.equal(kmeans.assign(x, centres, alive), slow.masked_fill(~alive, torch.inf).argmin(1))


def test_labels_are_what_assign_says_of_the_centres() -> None:
    x = blobs(500, 10)
    centres, alive, labels = kmeans.kmeans(x, 16, stream(), iterations=3)
    assert torch.equal(labels, kmeans.assign(x, centres, alive))


def test_chunking_changes_nothing() -> None:
    x = blobs(1000, 10)
    whole = kmeans.kmeans(x, 16, stream(), chunk=10_000)
    parts = kmeans.kmeans(x, 16, stream(), chunk=37)
    assert torch.equal(whole[2], parts[2])
    torch.testing.assert_close(whole[0], parts[0], rtol=1e-4, atol=1e-4)


def test_the_generator_decides_every_bit() -> None:
    x = blobs(400, 10)
    first, again, other = (kmeans.kmeans(x, 8, stream(s)) for s in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    state = torch.get_rng_state()
    kmeans.kmeans(x, 8, stream())
    assert torch.equal(state, torch.get_rng_state())


def test_an_empty_cluster_keeps_its_centre_and_gets_no_label(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.cat([torch.zeros(10, 2), torch.ones(10, 2)])
    far = torch.tensor([[0.1, 0.1], [0.9, 0.9], [50.0, 50.0]])
    monkeypatch.setattr(kmeans, "seed", lambda *_: (far, torch.ones(3, dtype=torch.bool)))
    centres, _, labels = kmeans.kmeans(x, 3, stream())
    assert torch.equal(centres, torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 50.0]]))
    assert set(labels.tolist()) == {0, 1}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 8), st.integers(0, 99))
def test_fewer_distinct_rows_than_clusters(distinct: int, k: int, copies: int, seed: int) -> None:
    g = stream(seed)
    values = 20 * torch.randn(distinct, 3, generator=g)
    x = values.repeat(copies, 1)
    x = x[torch.randperm(len(x), generator=g)]
    x = x - x.mean(0)
    _, alive, labels = kmeans.kmeans(x, k, g)
    assert int(alive.sum()) == min(k, distinct)
    used = labels.unique()
    assert alive[used].all()
    if k >= distinct:  # one cluster for each value, exactly
        assert len(used) == distinct
        for i in used:
            assert len(x[labels == i].unique(dim=0)) == 1


def test_rounding_noise_makes_no_new_clusters() -> None:
    x = (100 * torch.randn(5, 64, generator=stream())).repeat(40, 1)
    x = x - x.mean(0)
    for seed in range(10):
        _, alive, labels = kmeans.kmeans(x, 12, stream(seed))
        assert int(alive.sum()) == 5
        assert torch.equal(labels.bincount(minlength=12).sort().values[-5:], torch.full((5,), 40))


def test_one_row_and_no_row() -> None:
    centres, alive, labels = kmeans.kmeans(torch.zeros(1, 3), 4, stream())
    assert centres.shape == (4, 3)
    assert alive.tolist() == [True, False, False, False]
    assert labels.tolist() == [0]
    with pytest.raises(ValueError, match="at least one row"):
        kmeans.kmeans(torch.zeros(0, 3), 4, stream())


@pytest.mark.parametrize(("n", "d"), [(200, 12), (8, 30)])
def test_pca_is_the_svd(n: int, d: int) -> None:
    x = torch.randn(n, d, generator=stream()) * torch.linspace(3, 0.5, d)
    mean, basis = kmeans.pca(x, 5)
    centred = (x - x.mean(0)).double()
    _, _, Vh = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close((basis.double().T @ Vh[:5].T).abs(), torch.eye(5).double(), atol=1e-3, rtol=0)
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


def test_pca_beyond_the_rank_is_zero() -> None:
    x = torch.randn(50, 2, generator=stream()) @ torch.randn(2, 6, generator=stream(1))
    _, basis = kmeans.pca(x, 8)
    assert basis.shape == (6, 8)
    assert (basis[:, 2:] == 0).all()
    torch.testing.assert_close(basis[:, :2].T @ basis[:, :2], torch.eye(2), atol=1e-5, rtol=0)


def test_pca_stays_in_fp32_under_autocast() -> None:
    x = torch.randn(64, 12, generator=stream())
    plain = kmeans.pca(x, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = kmeans.pca(x, 4)
    assert low[1].dtype == torch.float32
    assert torch.equal(plain[1], low[1])
