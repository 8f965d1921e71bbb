"""The dial of skew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dodistill import distill
from dodistill.data.images import Images
from dodistill.errors import DodistillError
from dodistill.sources.real import thin


@settings(max_examples=20, deadline=None)
@given(skew=st.sampled_from([1.0, 3.0, 10.0, 100.0]), classes=st.integers(2, 10), seed=st.integers(0, 99))
def test_shares_fall_off_geometrically(skew: float, classes: int, seed: int) -> None:
    y = torch.arange(classes).repeat(1000)
    keep = thin(y, classes, 500 * classes, skew, torch.Generator().manual_seed(seed))
    assert len(keep.unique()) == len(keep)
    counts = torch.bincount(y[keep], minlength=classes).sort(descending=True).values.double()
    expected = skew ** (-torch.arange(classes).double() / (classes - 1))
    expected = expected / expected.sum() * counts.sum()
    assert torch.allclose(counts, expected, atol=2.0)  # each count is rounded
    if skew == 1:
        assert counts.max() - counts.min() <= 1


def test_a_class_with_few_members_shrinks_all_and_keeps_the_shape() -> None:
    y = torch.cat([torch.zeros(1000), torch.ones(100)]).long()
    keep = thin(y, 2, 1000, 1.0, torch.Generator().manual_seed(0))
    assert torch.bincount(y[keep]).tolist() == [100, 100]


def test_a_class_that_the_teacher_never_predicts_shrinks_no_other() -> None:
    y = torch.arange(600) % 3  # of four classes
    keep = thin(y, 4, 400, 1.0, torch.Generator().manual_seed(0))
    assert torch.bincount(y[keep], minlength=4).tolist() == [100, 100, 100, 0]


def test_zero_keeps_the_data_s_own_shares() -> None:
    y = torch.cat([torch.zeros(900), torch.ones(100)]).long()
    keep = thin(y, 2, 1000, 0.0, torch.Generator().manual_seed(0))
    assert sorted(keep.tolist()) == list(range(1000))


def test_the_pool_has_the_skew_that_was_asked_for(teacher: nn.Module, digits: Images) -> None:
    result = distill(
        teacher, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), source={"name": "real", "n": 600, "skew": 10},
        image_shape=(1, 8, 8), unlabeled=digits.x, augment={"pad": 1, "flip": False}, loop={"steps": 2}, verbose=False,
        pool={"holdout": 0.01},
    )  # fmt: skip
    shares = result.summary["class_shares"]
    assert 6 < max(shares) / min(shares) < 16


def test_a_skew_below_one_is_refused(teacher: nn.Module, digits: Images) -> None:
    with pytest.raises(DodistillError, match=r"skew is 0\.5"):
        distill(teacher, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), source={"name": "real", "skew": 0.5},
                image_shape=(1, 8, 8), unlabeled=digits.x, augment={"pad": 1}, verbose=False)  # fmt: skip
