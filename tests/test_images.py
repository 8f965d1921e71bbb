"""Pictures of a pool: pixels arrive where they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dodistill.errors import DodistillError
from dodistill.report.images import GAP, export_images, grid, save_grid


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grid_places_pixels(channels: int) -> None:
    x = torch.randint(0, 256, (5, channels, 4, 6), dtype=torch.uint8)
    picture = np.asarray(grid(x, columns=3, scale=2))
    assert picture.shape == (2 * 8 + GAP, 3 * 12 + 2 * GAP, 4)
    tile = picture[8 + GAP : 16 + GAP : 2, 12 + GAP : 24 + GAP : 2]  # the fifth image: row 1, column 1
    expected = x[4] if channels == 3 else x[4, :1].expand(3, -1, -1)
    assert np.array_equal(tile[..., :3], expected.permute(1, 2, 0).numpy())
    assert (tile[..., 3] == 255).all()
    assert (picture[8 + GAP :, 24 + 2 * GAP :, 3] == 0).all()  # there is no sixth


def test_grid_of_floats_of_none_and_of_the_wrong_shape() -> None:
    x = torch.tensor([0.0, 0.5, 1.0, 7.0, -1.0, float("nan")]).view(1, 1, 2, 3)
    assert np.asarray(grid(x, 1, 1))[..., 0].tolist() == [[0, 128, 255], [255, 0, 0]]
    assert grid(torch.zeros(0, 3, 4, 4, dtype=torch.uint8)).size == (1, 1)
    with pytest.raises(ValueError, match=r"\[n, C, H, W\]"):
        grid(torch.zeros(3, 4, 4))


def test_grid_chooses_a_size_to_look_at() -> None:
    assert grid(torch.rand(64, 1, 8, 8)).size == (16 * 64 + 15 * GAP, 4 * 64 + 3 * GAP)
    assert grid(torch.rand(2, 3, 28, 28), columns=2).size == (2 * 56 + GAP, 56)
    big = torch.full((2, 3, 224, 112), 200, dtype=torch.uint8)
    assert grid(big, columns=2).size == (2 * 48 + GAP, 96)
    assert np.asarray(grid(big, columns=2))[0, 0].tolist() == [200, 200, 200, 255]


def test_save_grid_leaves_one_whole_file(tmp_path: Path) -> None:
    path = save_grid(torch.rand(7, 3, 8, 8), tmp_path / "samples.png")
    with Image.open(path) as picture:
        picture.load()
    assert [p.name for p in tmp_path.iterdir()] == ["samples.png"]


def test_export_round_trips(tmp_path: Path) -> None:
    x = torch.randint(0, 256, (600, 3, 4, 4), dtype=torch.uint8)
    labels = torch.arange(600) % 3
    assert export_images(x, tmp_path / "a", labels) == 600
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["0", "1", "2"]
    with Image.open(tmp_path / "a" / "2" / "000599.png") as picture:
        assert np.array_equal(np.asarray(picture), x[599].permute(1, 2, 0).numpy())
    assert export_images(x[:2, :1], tmp_path / "grey") == 2
    with Image.open(tmp_path / "grey" / "000001.png") as picture:
        assert picture.mode == "L"
        assert np.array_equal(np.asarray(picture), x[1, 0].numpy())
    with pytest.raises(DodistillError, match=r"a holds images already \(000.*\.png\); delete them, or choose another"):
        export_images(x[:2], tmp_path / "a", [0, 1])
    assert len(list((tmp_path / "a").rglob("*.png"))) == 600
    with pytest.raises(ValueError, match="2 images but 3 labels"):
        export_images(x[:2], tmp_path / "b", [0, 1, 2])
