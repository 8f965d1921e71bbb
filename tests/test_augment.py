"""Batched augmentation against one image at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dodistill.functional.augment import crop_flip, mix_weights, shift_flip, to_float, to_uint8


def slowly(x, dy, dx, mirrored, mode, limit):
    """Pad, cut and flip each image by itself."""
    p, out = limit, []
    for image, a, b, m in zip(x, dy.tolist(), dx.tolist(), mirrored.tolist()):
        padded = F.pad(image[None].double(), (p,) * 4, "reflect" if mode == "reflect" else "constant")[0]
        cut = padded[:, p + a : p + a + x.shape[2], p + b : p + b + x.shape[3]]
        out.append(cut.flip(2) if m else cut)
    return torch.stack(out).to(x.dtype)


@given(
    seed=st.integers(0, 999),
    pad=st.integers(0, 4),
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    c=st.sampled_from([1, 3]),
    mode=st.sampled_from(["reflect", "zeros"]),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
)
@settings(max_examples=60, deadline=None)
def test_shift_flip_is_pad_cut_flip(seed, pad, size, c, mode, dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (5, c, *size), generator=g).to(dtype)
    dy, dx = torch.randint(-pad, pad + 1, (2, 5), generator=g)
    mirrored = torch.rand(5, generator=g) < 0.5
    got = shift_flip(x, dy, dx, mirrored, mode, pad)
    assert got.dtype == dtype
    assert torch.equal(got, slowly(x, dy, dx, mirrored, mode, pad))


def test_draws_are_per_image_of_full_range_and_even() -> None:
    """The position of one bright pixel reveals each image's draw."""
    n, pad = 4000, 2
    x = torch.zeros(n, 1, 9, 9, dtype=torch.uint8)
    x[:, :, 4, 4] = 1
    out = crop_flip(x, pad, torch.Generator().manual_seed(0), flip=False, mode="zeros")
    where = out.flatten(1).argmax(1)
    counts = torch.bincount(where, minlength=81).view(9, 9)
    assert counts.sum() == n
    assert counts[2:7, 2:7].sum() == n
    assert counts[2:7, 2:7].min() > n / 25 * 0.7
    x = torch.zeros(n, 1, 4, 4)
    x[..., 0] = 1
    flipped = crop_flip(x, 0, torch.Generator().manual_seed(0))[:, 0, 0, 3].mean().item()
    assert flipped == pytest.approx(0.5, abs=0.04)
    assert torch.equal(crop_flip(x, 0, torch.Generator().manual_seed(0), flip=False), x)


def test_the_generator_decides_alone() -> None:
    x = torch.rand(8, 3, 8, 8)
    before = torch.get_rng_state()
    a, b, c = (crop_flip(x, 2, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mode", ["reflect", "zeros"])
def test_gradients(mode: str) -> None:
    x = torch.rand(3, 2, 5, 6, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: crop_flip(x, 2, torch.Generator().manual_seed(0), mode=mode), (x,))


def test_what_cannot_be_padded_is_refused() -> None:
    x = torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match="cannot reflect 4 pixels"):
        crop_flip(x, 4, torch.Generator(), mode="reflect")
    with pytest.raises(ValueError, match="unknown padding"):
        crop_flip(x, 1, torch.Generator(), mode="wrap")


def test_levels() -> None:
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(x)), x)
    assert to_float(x).max() == 1
    assert to_uint8(torch.tensor([-0.3, 0.999, 1.7])).tolist() == [0, 255, 255]
    assert to_uint8(torch.tensor([0.999, 0.5]), truncate=True).tolist() == [254, 127]
    assert to_uint8(torch.tensor([0.5])).tolist() == [128]


def draws(n: int) -> torch.Tensor:
    return torch.rand(4, n, generator=torch.Generator().manual_seed(0))


def test_mixup_weights_are_uniform_and_those_of_whole_images() -> None:
    w = mix_weights(draws(8000), 3, 4, "mixup", 0.25)
    assert w.shape == (8000, 1, 3, 4)
    assert bool((w == w[:, :, :1, :1]).all())
    mixed = w[w[:, 0, 0, 0] < 1, 0, 0, 0]
    assert len(mixed) / 8000 == pytest.approx(0.25, abs=0.02)
    assert mixed.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.03)


def test_cutmix_weights_are_boxes() -> None:
    w = mix_weights(draws(3000), 16, 16, "cutmix", 1.0)[:, 0]
    assert set(w.unique().tolist()) == {0.0, 1.0}
    hole = 1 - w
    rows, columns = hole.amax(2), hole.amax(1)
    assert torch.equal(hole, rows[:, :, None] * columns[:, None, :])  # the box of its rows and columns
    # a box with sides sqrt(1 - lam), cut at the border: each side keeps s - s^2 / 4 of itself on average
    s = torch.linspace(0, 1, 10_001).sqrt()
    assert hole.mean().item() == pytest.approx(float((s - s**2 / 4).square().mean()), abs=0.01)


def test_no_share_mixes_nothing() -> None:
    for how in ("mixup", "cutmix"):
        assert bool((mix_weights(draws(9), 4, 4, how, 0.0) == 1).all())
