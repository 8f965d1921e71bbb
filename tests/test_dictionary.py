"""The confounder dictionary: its defining equations, its edges, its state."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dodistill.config.tree import resolve
from dodistill.core.context import Context
from dodistill.errors import DodistillError
from dodistill.interventions.shared.dictionary import ConfounderDictionary, DictionaryConfig, feature_dim


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def predictions(n: int = 300, d: int = 10, seed: int = 0) -> Tensor:
    g = stream(seed)
    x = torch.randn(n, d, generator=g) + 5.0
    x[torch.arange(n), torch.randint(d, (n,), generator=g) % 7] += 9
    return x


def context(classes: int = 10, **extra: Any) -> Context:
    teacher = cast(Any, SimpleNamespace(num_classes=classes, image_shape=(1, 4, 4)))
    return Context(teacher, torch.device("cpu"), extra=extra)


@pytest.mark.parametrize("pca_dim", [None, 0, 4])
def test_prototypes_are_means_and_shares_are_counts(pca_dim: int | None) -> None:
    M = predictions()
    dictionary = ConfounderDictionary(8, 10, stream(), pca_dim=pca_dim)
    dictionary.rebuild(M)
    label = dictionary.assign(M)
    assert label.dtype == torch.long
    for i in range(8):
        members = [m for m, j in zip(M, label) if j == i]
        assert dictionary.P[i].item() == pytest.approx(len(members) / len(M))
        if members:
            torch.testing.assert_close(dictionary.Z[i], torch.stack(members).double().mean(0).float())
    assert dictionary.P.sum().item() == pytest.approx(1)
    torch.testing.assert_close(dictionary.P @ dictionary.Z, M.mean(0), rtol=1e-4, atol=1e-4)


def test_pca_by_default_only_where_it_cuts_something() -> None:
    assert ConfounderDictionary(8, 32, stream()).basis is None
    basis = ConfounderDictionary(8, 100, stream()).basis
    assert basis is not None
    assert basis.shape == (100, 32)


def test_fewer_distinct_predictions_than_slots() -> None:
    dictionary = ConfounderDictionary(8, 4, stream())
    dictionary.rebuild(torch.eye(4)[[0, 1, 1, 2, 2, 2]] * 9)
    assert int(dictionary.valid.sum()) == 3
    assert sorted(dictionary.P[dictionary.valid].tolist()) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert (dictionary.Z[~dictionary.valid] == 0).all()


def test_a_rebuild_leaves_nothing_of_the_old_one() -> None:
    dictionary = ConfounderDictionary(8, 10, stream())
    dictionary.rebuild(predictions())
    dictionary.rebuild(torch.full((5, 10), 3.0))
    assert int(dictionary.valid.sum()) == 1
    torch.testing.assert_close(dictionary.Z[dictionary.valid], torch.full((1, 10), 3.0))
    assert (dictionary.Z[~dictionary.valid] == 0).all()


def test_random_prototypes_keep_the_shares_but_not_the_means() -> None:
    M = 3 * predictions(2000)
    plain, random = ConfounderDictionary(8, 10, stream()), ConfounderDictionary(8, 10, stream(), random=True)
    plain.rebuild(M)
    random.rebuild(M)
    first = random.Z.clone()
    assert random.P.sum().item() == pytest.approx(1)
    assert torch.equal(random.assign(M).bincount(minlength=8) / len(M), random.P)
    assert random.noise is not None
    torch.testing.assert_close(first, random.noise * M.std(0, correction=0))
    random.rebuild(M)
    torch.testing.assert_close(random.Z[random.valid], first[random.valid])  # drawn once
    assert not torch.allclose(first.mean(0), plain.Z.mean(0), atol=1.0)


def test_state_resumes_bit_for_bit() -> None:
    straight = ConfounderDictionary(8, 40, stream(), random=True)
    M = [predictions(d=40, seed=s) for s in range(3)]
    straight.rebuild(M[0])
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = ConfounderDictionary(8, 40, stream(99), random=True)
    assert not resumed.built
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.built
    assert torch.equal(resumed.assign(M[1]), straight.assign(M[1]))
    for dictionary in (straight, resumed):
        dictionary.rebuild(M[1])
        dictionary.rebuild(M[2])
    for name, value in straight.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, resumed.state_dict()[name]), name


def test_built_in_fp32_under_autocast_and_without_graph() -> None:
    M = predictions().requires_grad_()
    plain, low = ConfounderDictionary(8, 10, stream()), ConfounderDictionary(8, 10, stream())
    plain.rebuild(M)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low.rebuild(M)
        label = low.assign(M)
    assert torch.equal(plain.Z, low.Z)
    assert torch.equal(plain.assign(M), label)
    assert not plain.Z.requires_grad


@pytest.mark.parametrize(
    ("kind", "clusters", "of"),
    [("generator", 8, "latest"), ("inversion", 32, "latest"), ("sampler", 128, "pool"), ("data", 128, "pool")],
)
def test_size_and_matter_by_kind_of_source(kind: str, clusters: int, of: str) -> None:
    dictionary = DictionaryConfig().build(context(), kind)
    assert dictionary.Z.shape == (clusters, 10)
    assert dictionary.of == of
    assert DictionaryConfig(clusters=5, of="batch").resolve(kind) == DictionaryConfig(clusters=5, of="batch")


def test_a_foreign_model_decides_the_width() -> None:
    ctx = context(foreign=SimpleNamespace(num_classes=100))
    assert feature_dim(ctx) == 100
    dictionary = DictionaryConfig().build(ctx, "generator")
    assert dictionary.foreign
    assert dictionary.Z.shape == (8, 100)
    assert feature_dim(context(foreign=lambda x: x.flatten(1))) == 16
    assert not DictionaryConfig().build(context(), "generator").foreign


def test_bad_values_are_named() -> None:
    with pytest.raises(DodistillError, match="clusters is 0"):
        DictionaryConfig(clusters=0).resolve("generator")
    with pytest.raises(DodistillError, match=r"dictionary.of: unknown value 'epoch'"):
        resolve({"dictionary": DictionaryConfig(of=cast(Any, "epoch"))})
    with pytest.raises(DodistillError, match="pca_dim is -3"):
        DictionaryConfig(pca_dim=-3).resolve("data")
    with pytest.raises(ValueError, match="kind of source"):
        DictionaryConfig().resolve("wishes")
