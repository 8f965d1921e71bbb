"""Images from every source, and what is said of bad ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dodistill.data.images import load_images, minival
from dodistill.errors import DodistillError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 8, 10, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (4, 8, 8), dtype=np.uint8)
Y = np.array([0, 1, 2, 0, 1, 2], np.uint8)


def test_npz_splits_layouts_and_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x_train=RGB, y_train=Y, x_test=GREY)
    train = load_images(path)
    assert train.x.dtype == torch.uint8
    assert train.x.is_contiguous()
    assert train.image_shape == (3, 8, 10)
    assert np.array_equal(train.x[2, :, 5, 7].numpy(), RGB[2, 5, 7])
    assert train.y.dtype == torch.int64
    assert (train.y.tolist(), train.num_classes, len(train)) == ([0, 1, 2, 0, 1, 2], 3, 6)
    test = load_images(path, "test")
    assert test.y is None
    assert np.array_equal(test.x[:, 0].numpy(), GREY)
    assert load_images(path, labels=False).y is None
    part = train.select(torch.tensor([4, 0]))
    assert part.y.tolist() == [1, 0]
    assert torch.equal(part.x[0], train.x[4])
    with pytest.raises(DodistillError, match="no labels"):
        _ = test.num_classes


def test_npy_in_both_layouts(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", RGB)
    np.save(tmp_path / "b.npy", RGB.transpose(0, 3, 1, 2))
    a, b = load_images(tmp_path / "a.npy"), load_images(tmp_path / "b.npy")
    assert torch.equal(a.x, b.x)
    assert a.y is None


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x_train": RGB.astype(np.float32)}, "float32; images must be uint8"),
        ({"x_train": RGB[0, 0]}, r"shape \(10, 3\)"),
        ({"x_train": RGB[:0]}, "not empty"),
        ({"images": RGB}, r"no 'x_train' \(it has images\)"),
        ({"x_train": RGB, "y_train": Y[:5]}, "must be 6 class numbers"),
        ({"x_train": RGB, "y_train": Y.astype(float)}, "class numbers"),
        ({"x_train": RGB, "y_train": Y.astype(int) - 1}, "class numbers from 0"),
        ({"x_train": np.array([{}], object)}, "is not a readable numpy file"),
    ],
)
def test_bad_arrays(tmp_path: Path, arrays, said: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DodistillError, match=said):
        load_images(tmp_path / "a.npz")


@pytest.mark.parametrize("kind", ["npz", "npy"])
@pytest.mark.parametrize("keep", [0, 20, 0.5, 0.95])
def test_truncated_arrays(tmp_path: Path, kind: str, keep: float) -> None:
    path = tmp_path / f"a.{kind}"
    np.savez(path, x_train=RGB) if kind == "npz" else np.save(path, RGB)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(DodistillError, match="truncated"):
        load_images(path)


def test_arrays_of_another_shape_name_both(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", RGB)
    with pytest.raises(DodistillError, match=r"shape \(3, 8, 10\).*takes \(1, 28, 28\)"):
        load_images(tmp_path / "a.npy", image_shape=(1, 28, 28))


def test_folder_with_bad_files(tmp_path: Path) -> None:
    for k, name in enumerate(["b/1.png", "a/2.png", "a/deep/3.jpg"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (100 * k, 50, 50)).save(tmp_path / name)
    whole = (tmp_path / "b/1.png").read_bytes()
    (tmp_path / "a/broken.png").write_bytes(whole[: len(whole) - 30])
    (tmp_path / "a/notes.txt").write_text("no image")
    (tmp_path / "b/empty.png").write_bytes(b"")
    images = load_images(tmp_path, image_shape=(3, 8, 8))
    assert images.x.shape == (3, 3, 8, 8)
    assert images.y.tolist() == [0, 0, 1]
    assert [round(v, -2) for v in images.x[:, 0].float().mean((1, 2)).tolist()] == [100, 200, 0]
    assert images.skipped == 3
    assert "skipped 3 of 6" in images.note
    assert "broken.png" in images.note
    assert load_images(tmp_path, image_shape=(1, 8, 8), labels=False).y is None
    Image.new("L", (9, 9)).save(tmp_path / "top.png")
    assert load_images(tmp_path, image_shape=(3, 8, 8)).y is None  # not every image has a class


def test_folder_pixels_are_the_centre_resized(tmp_path: Path) -> None:
    """A left-to-right ramp 40x20: the centre square spans the middle half of it."""
    ramp = np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (20, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    row = load_images(tmp_path, image_shape=(1, 10, 10)).x[0, 0, 5].float()
    assert (row[1:] > row[:-1]).all()
    assert row[0].item() == pytest.approx(255 * 10.5 / 39, abs=4)
    assert row[-1].item() == pytest.approx(255 * 28.5 / 39, abs=4)


def busy(w: int, h: int) -> Image.Image:
    """A picture by formula, in which a shift by one pixel shows everywhere."""
    y, x, c = np.indices((h, w, 3))
    return Image.fromarray(((x * x // (40 + 20 * c) + y * (3 - c) + x * y // 300 * 7) % 256).astype(np.uint8))


def test_test_images_at_224_are_those_of_torchvision(tmp_path: Path) -> None:
    """Numbers of torchvision 0.29.1, [Resize(a), CenterCrop(b)]: the first pixel, one inside, the last, and the sum."""
    golden = [
        (413, 300, 256, 224, [225, 160, 118], [136, 23, 20], [241, 39, 55], 19_182_852),
        (300, 500, 256, 224, [158, 36, 172], [104, 18, 233], [211, 200, 120], 19_171_667),
        (227, 227, 256, 224, [46, 31, 16], [196, 29, 146], [240, 167, 23], 19_223_373),
        (413, 300, 232, 224, [120, 83, 60], [91, 231, 233], [216, 175, 137], 19_210_011),
        (200, 333, 182, 160, [6, 181, 101], [126, 174, 243], [178, 144, 81], 9_774_792),
    ]
    for k, (w, h, _, _, *_) in enumerate(golden):
        busy(w, h).save(tmp_path / f"{k}.png")
    for k, (_, _, whole, side, *pixels, total) in enumerate(golden):
        crop = 0.0 if whole != 232 else 224 / 232
        x = load_images(tmp_path, "test", image_shape=(3, side, side), crop=crop).x[k].int()
        for pixel, (i, j) in zip(pixels, ((0, 0), (side // 2, side // 3), (side - 1, side - 1))):
            assert (x[:, i, j] - torch.tensor(pixel)).abs().max() <= 1, (k, i, j)
        assert x.sum().item() == pytest.approx(total, rel=1e-3)


def test_test_images_at_224_are_pillows_by_the_rule(tmp_path: Path) -> None:
    busy(413, 300).save(tmp_path / "a.png")
    grey = busy(413, 300).convert("L").resize((int(256 * 413 / 300), 256), Image.Resampling.BILINEAR)
    left, top = round((352 - 224) / 2.0), round((256 - 224) / 2.0)
    want = np.asarray(grey.crop((left, top, left + 224, top + 224)))
    assert np.array_equal(load_images(tmp_path, "test", image_shape=(1, 224, 224)).x[0, 0].numpy(), want)


@pytest.mark.parametrize(
    ("split", "side", "crop", "share"),
    [("test", 224, 0.0, 0.875), ("test", 160, 0.0, 0.875), ("test", 159, 0.0, 1.0), ("test", 32, 0.0, 1.0),
     ("train", 224, 0.0, 1.0), ("train", 224, 0.875, 0.875), ("test", 224, 1.0, 1.0), ("test", 32, 0.5, 0.5)],
)  # fmt: skip
def test_how_much_of_the_short_side_is_seen(split: str, side: int, crop: float, share: float, tmp_path: Path) -> None:
    """A ramp from left to right over a 320x320 picture: its range is the share. Training sees the whole short side."""
    Image.fromarray(np.tile(np.linspace(0, 255, 320), (320, 1)).astype(np.uint8)).save(tmp_path / "a.png")
    x = load_images(tmp_path, split, image_shape=(1, side, side), crop=crop).x[0, 0].float()
    assert (x[0, -1] - x[0, 0]).item() == pytest.approx(255 * share * (1 - 1 / side), abs=3)


def test_strips_and_shares_that_are_none(tmp_path: Path) -> None:
    """A picture 3 pixels wide would be 21 000 high, resized: the part that is kept is made alone, and is the same."""
    strip = busy(3, 300)
    strip.save(tmp_path / "a.png")
    x = load_images(tmp_path, "test", image_shape=(3, 224, 224)).x[0].permute(1, 2, 0).int()
    whole = strip.resize((256, 25_600), Image.Resampling.BILINEAR).crop((16, 12_688, 240, 12_912))
    assert np.abs(x.numpy() - np.asarray(whole).astype(int)).max() <= 1
    for crop in (-0.1, 1.5, float("nan")):
        with pytest.raises(DodistillError, match=r"crop_share is .* as in 0\.875"):
            load_images(tmp_path, "test", image_shape=(3, 8, 8), crop=crop)


def test_folder_of_splits(tmp_path: Path) -> None:
    for split, count in (("train", 2), ("test", 1)):
        (tmp_path / split / "cat").mkdir(parents=True)
        for k in range(count):
            Image.new("L", (8, 8)).save(tmp_path / split / "cat" / f"{k}.png")
    assert len(load_images(tmp_path, image_shape=(1, 8, 8))) == 2
    assert len(load_images(tmp_path, "test", image_shape=(1, 8, 8))) == 1


def test_named_data_may_be_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ImageNet comes: `imagenet/val/CLASS/*.JPEG`. An .npz of that name goes first; CIFAR is no folder."""
    monkeypatch.setenv("DODISTILL_DATA", str(tmp_path))
    for name, shade in (("imagenet/val/n01", 50), ("imagenet/val/n02", 200), ("cifar10/test/cat", 9)):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (20, 12), shade).save(tmp_path / name / "0.png")
    images = load_images("imagenet", "test", image_shape=(3, 8, 8))
    assert images.x.shape == (2, 3, 8, 8)
    assert images.x.is_contiguous()
    assert images.x[:, 0, 0, 0].tolist() == [50, 200]
    assert images.y is not None
    assert images.y.tolist() == [0, 1]
    with pytest.raises(DodistillError, match="give image_shape"):
        load_images("imagenet", "test")
    with pytest.raises(DodistillError, match=r"neither flickr\.npz nor a folder flickr"):
        load_images("flickr", image_shape=(3, 8, 8))
    with pytest.raises(DodistillError, match="nor a copy by torchvision"):
        load_images("cifar10", "test", image_shape=(3, 8, 8))
    np.savez(tmp_path / "imagenet.npz", x_test=GREY[:1])
    assert len(load_images("imagenet", "test")) == 1
    with pytest.raises(DodistillError, match=r"no imagenet32: .* neither imagenet32\.npz nor a folder imagenet32"):
        load_images("imagenet32", image_shape=(3, 8, 8))
    np.savez(tmp_path / "imagenet32.npz", x_train=GREY[:2])
    assert len(load_images("imagenet32")) == 2


def test_bad_folders_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DodistillError, match="is empty"):
        load_images(tmp_path, image_shape=(3, 8, 8))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DodistillError, match="none of the 1 files"):
        load_images(tmp_path, image_shape=(3, 8, 8))
    with pytest.raises(DodistillError, match="give image_shape"):
        load_images(tmp_path)
    with pytest.raises(DodistillError, match="did you mean 'cifar10'"):
        load_images("cifar1O")
    with pytest.raises(DodistillError, match="give an existing"):
        load_images(tmp_path / "gone.npz")
    with pytest.raises(DodistillError, match="train or test"):
        load_images("digits", "val")
    monkeypatch.delenv("DODISTILL_DATA", raising=False)
    with pytest.raises(DodistillError, match=r"set it to the folder of mnist\.npz"):
        load_images("mnist")
    monkeypatch.setenv("DODISTILL_DATA", str(tmp_path))
    with pytest.raises(DodistillError, match=r"no .*mnist.npz(.|\n)*numpy.savez"):
        load_images("mnist")
    np.savez(tmp_path / "mnist.npz", x_train=GREY, y_train=Y[:4], x_test=GREY[:1], y_test=Y[:1])
    assert len(load_images("mnist", "test")) == 1


def test_digits() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    train, test = load_images("digits"), load_images("digits", "test")
    assert train.x.shape == (1297, 1, 8, 8)
    assert test.x.shape == (500, 1, 8, 8)
    assert (int(train.x.min()), int(train.x.max())) == (0, 255)
    every = torch.cat([train.x, test.x]).flatten(1).long().sum(1).sort()[0]
    source = torch.from_numpy(datasets.load_digits().images * 255 / 16).round().flatten(1).long().sum(1).sort()[0]
    assert torch.equal(every, source)  # all of them, each once
    assert torch.equal(train.x, load_images("digits").x)
    assert torch.bincount(test.y, minlength=10).min() > 30
    assert load_images("digits", image_shape=(3, 16, 16)).x.shape == (1297, 3, 16, 16)


def test_photos() -> None:
    pytest.importorskip("sklearn")
    a = load_images("photos", image_shape=(1, 8, 8), n=500)
    assert a.x.shape == (500, 1, 8, 8)
    assert a.y is None
    assert torch.equal(a.x, load_images("photos", image_shape=(1, 8, 8), n=500).x)
    assert not torch.equal(a.x, load_images("photos", image_shape=(1, 8, 8), n=500, seed=1).x)
    assert not torch.equal(a.x, load_images("photos", "test", image_shape=(1, 8, 8), n=500).x)
    assert len(a.x.flatten(1).unique(dim=0)) > 450
    colour = load_images("photos", image_shape=(3, 32, 32), n=100)
    assert colour.x.shape == (100, 3, 32, 32)
    assert (colour.x[:, 0] != colour.x[:, 2]).any()


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(DodistillError, match=r"pip install 'dodistill\[demo\]'"):
        load_images("digits")


def test_minival_parts_the_indices() -> None:
    train, held = minival(100, 0.1, 0)
    assert len(held) == 10
    assert sorted(torch.cat([train, held]).tolist()) == list(range(100))
    assert torch.equal(held, minival(100, 0.1, 0)[1])
    assert not torch.equal(held, minival(100, 0.1, 1)[1])
    assert len(minival(100, 0, 0)[1]) == 0
    with pytest.raises(DodistillError, match="fraction"):
        minival(10, 1.0, 0)
