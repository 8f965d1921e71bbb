"""`dodistill pack`: folders, tar files and data sets as one file of rows; and rows read by position."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dodistill import DodistillError
from dodistill.commands.cli import main
from dodistill.data import pack as module
from dodistill.data.images import load_images
from dodistill.data.pack import pack
from dodistill.data.records import expand, read_records
from dodistill.data.rows import FileRows, TensorRows

SHAPE = (3, 6, 4)


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((9, 6, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight pictures of two classes, of shades 0, 10, ..., a broken one and a text."""
    for i in range(8):
        path = tmp_path / "images" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(10 * i))
    (tmp_path / "images" / "cat" / "broken.png").write_bytes(picture(0)[:30])
    (tmp_path / "images" / "dog" / "notes.txt").write_text("none")
    return tmp_path / "images"


def shards(folder: Path, **more: bytes) -> str:
    """Two WebDataset shards of four samples each, with classes as text; `more`: further members of the second."""
    for shard in range(2):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as archive:
            members: dict[str, bytes] = {}
            for i in range(4 * shard, 4 * shard + 4):
                members |= {f"{i:04}.png": picture(10 * i), f"{i:04}.cls": str(i % 3).encode()}
            for name, content in (members | (more if shard else {})).items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return str(folder / "{000..001}.tar")


def shades(x: torch.Tensor) -> list[int]:
    return x[:, 0, 0, 0].tolist()


# -------------------------------------------------------------------------------------------------------- pack


def test_a_folder_is_packed_as_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    done = pack(str(folder), tmp_path / "out" / "x.npy", SHAPE)
    loaded = load_images(folder, image_shape=SHAPE)
    assert (done.rows, done.skipped, done.labelled) == (8, 2, True)
    assert done.first == ("cat/broken.png", "dog/notes.txt")
    again = load_images(done.path, image_shape=SHAPE)
    assert torch.equal(again.x, loaded.x)
    assert loaded.y is not None
    assert again.y is not None
    assert torch.equal(again.y, loaded.y)
    assert again.classes == loaded.classes == ("cat", "dog")
    assert sorted(p.name for p in done.path.parent.iterdir() if not p.name.endswith(".lock")) == [
        "x.json", "x.labels.npy", "x.npy",
    ]  # fmt: skip
    assert np.load(done.path).shape == (8, *SHAPE), "numpy reads it"


def test_tar_files_are_packed_in_order(tmp_path: Path) -> None:
    spec = shards(tmp_path, **{"0008.png": b"no picture", "0008.cls": b"1"})
    done = pack(spec, tmp_path / "x.npy", SHAPE)
    assert (done.rows, done.skipped) == (8, 1)
    assert done.first == (f"{tmp_path}/001.tar:/0008",)
    images = load_images(done.path)
    assert shades(images.x) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert images.y is not None
    assert images.y.tolist() == [i % 3 for i in range(8)]
    done.path.unlink()
    assert pack(str(tmp_path / "*.tar"), tmp_path / "x.npy", SHAPE, labels=False).labelled is False
    assert load_images(tmp_path / "x.npy").y is None


def test_a_folder_may_be_called_as_a_tar_file(folder: Path, tmp_path: Path) -> None:
    assert pack(str(folder.rename(tmp_path / "full.tar.out")), tmp_path / "x.npy", SHAPE).rows == 8


def test_a_cut_tar_file_loses_its_last_samples_only(tmp_path: Path) -> None:
    spec = shards(tmp_path)
    path = tmp_path / "000.tar"
    path.write_bytes(path.read_bytes()[: 5 * 512])
    done = pack(spec, tmp_path / "x.npy", SHAPE)
    assert 5 <= done.rows < 8
    assert done.skipped >= 1
    assert "000.tar" in done.first[0]


def test_braces_name_shards() -> None:
    assert expand("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand("{x,y}-{0..1}.tar") == ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_second_start_goes_on(kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 2)
    monkeypatch.setattr(module, "SAVED", 1)
    spec = str(folder) if kind == "folder" else shards(tmp_path)
    whole = pack(spec, tmp_path / "whole.npy", SHAPE)
    seen: list[int] = []

    def killed(done: int, _total: int) -> None:
        seen.append(done)
        if done == 4 and len(seen) < 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(spec, tmp_path / "part.npy", SHAPE, progress=killed)
    with open(tmp_path / "part.npy.part", "ab") as file:
        file.write(b"half a row")  # written after the last state
    assert not (tmp_path / "part.npy").exists()
    done = pack(spec, tmp_path / "part.npy", SHAPE, progress=killed)
    assert seen[2] == 6, "the first records were not decoded again"
    assert (done.rows, done.skipped, done.first) == (whole.rows, whole.skipped, whole.first)
    assert done.path.read_bytes() == whole.path.read_bytes()
    for ending in (".labels.npy", ".json"):
        assert done.path.with_suffix(ending).read_bytes() == whole.path.with_suffix(ending).read_bytes()
    assert not list(tmp_path.glob("part.npy.*"))


def test_a_start_that_is_killed_leaves_what_the_state_counts_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 2)
    monkeypatch.setattr(module, "SAVED", 2)
    listed, on_disk = tmp_path / "x.npy.part.labels", [0]

    def killed(done: int, _total: int) -> None:
        if done == 6:
            on_disk.append(len(listed.read_text().split()))
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pack(str(folder), tmp_path / "x.npy", SHAPE, progress=killed)
    assert on_disk[-1] >= json.loads((tmp_path / "x.npy.part.json").read_text())["rows"] == 4
    whole = listed.read_bytes()
    listed.write_bytes(whole[:14])  # three of "cat", and a part of the fourth
    with pytest.raises(DodistillError, match=r"has the classes of 3 of the 4 images .*delete .*x.npy.part.json and"):
        pack(str(folder), tmp_path / "x.npy", SHAPE)
    listed.write_bytes(whole)
    assert pack(str(folder), tmp_path / "x.npy", SHAPE).labelled


def test_another_start_is_not_gone_on_with(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVED", 1)

    def killed(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(str(folder), tmp_path / "x.npy", SHAPE, progress=killed)
    with pytest.raises(DodistillError, match=r"x.npy.part.json is of another start .*delete it"):
        pack(str(folder), tmp_path / "x.npy", (3, 8, 8))


@pytest.mark.parametrize(
    ("spec", "out", "shape", "said"),
    [
        ("nowhere", "x.npy", SHAPE, "nowhere is no folder, no .tar and no hf:OWNER/NAME"),
        ("nowhere.tar", "x.npy", SHAPE, "cannot read nowhere.tar: No such file"),
        ("none-*.tar", "x.npy", SHAPE, "no file matches none-"),
        ("images", "x.npz", SHAPE, "x.npz must end in .npy"),
        ("images", "there.npy", SHAPE, "there.npy is there already; delete it"),
        ("images", "x.npy", (2, 4, 4), r"image_shape is \(2, 4, 4\); give channels \(1 or 3\)"),
        ("texts", "x.npy", SHAPE, "none of the 1 records of texts is a readable image"),
    ],
)
def test_bad_input(spec: str, out: str, shape: Any, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    Path("there.npy").write_bytes(b"")
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("none")
    with pytest.raises(DodistillError, match=said):
        pack(spec, out, shape)


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(folder), str(tmp_path / "x.npy")]) == 2
    assert "give --image-shape C,H,W, as in 3,224,224" in capsys.readouterr().err
    assert main(["pack", str(folder), str(tmp_path / "x.npy"), "--image-shape", "3,6,4", "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"8 images in {tmp_path / 'x.npy'}")
    assert "skipped 2 that are broken or no images: cat/broken.png, dog/notes.txt" in said


def test_a_hugging_face_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra `datasets`")
    names = datasets.ClassLabel(names=["dog", "cat"])
    features = datasets.Features({"img": datasets.Image(), "label": names})
    rows = {"img": [Image.open(io.BytesIO(picture(10 * i))) for i in range(4)], "label": [0, 1, 1, 0]}
    datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "set" / "train-0.parquet"))
    found = read_records(f"hf:{tmp_path / 'set'}", "train", True)
    assert found.classes == ("dog", "cat")
    done = pack(f"hf:{tmp_path / 'set'}", tmp_path / "x.npy", SHAPE)
    images = load_images(done.path)
    assert shades(images.x) == [0, 10, 20, 30]
    assert images.y is not None
    assert images.y.tolist() == [0, 1, 1, 0]


# -------------------------------------------------------------------------------------------------------- rows


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    x = torch.randint(0, 256, (300, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    path = tmp_path_factory.mktemp("rows") / "x.npy"
    np.save(path, x.numpy())
    return path, x


@pytest.mark.parametrize("index", [[0], [299, 0, 7, 7, 150], list(range(300)), []], ids=["one", "mixed", "all", "none"])
def test_rows_of_a_file_are_those_of_the_tensor(index: list[int], packed: tuple[Path, torch.Tensor]) -> None:
    path, x = packed
    which = torch.tensor(index, dtype=torch.long)
    rows = FileRows(path)
    assert torch.equal(rows.take(which), x[which])
    assert torch.equal(TensorRows(x).take(which), x[which])
    assert (len(rows), rows.image_shape) == (300, SHAPE)
    rows.close()


def test_the_fingerprint_is_of_the_content(packed: tuple[Path, torch.Tensor]) -> None:
    path, x = packed
    other = x.clone()
    other[5, 0, 0, 0] ^= 1
    assert FileRows(path).fingerprint() == TensorRows(x).fingerprint() != TensorRows(other).fingerprint()


def test_systems_without_positioned_reads(packed: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    path, x = packed
    monkeypatch.delattr("os.preadv", raising=False)
    which = torch.arange(299, -1, -1)
    assert torch.equal(FileRows(path).take(which), x[which])


def test_a_file_that_is_cut_or_another_array_is_refused(packed: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    path, x = packed
    cut = tmp_path / "cut.npy"
    cut.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DodistillError, match=r"cut.npy is truncated: [\d,]+ bytes for 300 images"):
        FileRows(cut)
    for name, array in (("floats", x.numpy() / 255), ("last", x.numpy().transpose(0, 2, 3, 1)), ("flat", np.zeros(3))):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(DodistillError, match=r"rows are read from uint8 \[n, C, H, W\]"):
            FileRows(tmp_path / f"{name}.npy")
    (tmp_path / "text.npy").write_text("none")
    with pytest.raises(DodistillError, match=r"is no \.npy file"):
        FileRows(tmp_path / "text.npy")
    with pytest.raises(DodistillError, match="cannot read"):
        FileRows(tmp_path / "nothing.npy")
    with pytest.raises(IndexError, match="300 of 300"):
        FileRows(path).take(torch.tensor([300]))


def test_a_file_that_becomes_shorter_is_noticed(packed: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    copy = tmp_path / "x.npy"
    copy.write_bytes(packed[0].read_bytes())
    rows = FileRows(copy)
    with open(copy, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(DodistillError, match="became shorter while it was read"):
        rows.take(torch.arange(300))


def test_a_sparse_file_larger_than_the_memory(tmp_path: Path) -> None:
    """600 000 rows of 224 x 224 pixels, 90 GB, of which the disk holds nothing."""
    path, shape = tmp_path / "sparse.npy", (600_000, 3, 224, 224)
    header = module._header(shape[0], shape[1:])
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + int(np.prod(shape)))
        file.seek(len(header) + 599_999 * 3 * 224 * 224)
        file.write(bytes([7]) * (3 * 224 * 224))
    rows = FileRows(path)
    found = rows.take(torch.tensor([599_999, 0, 300_000]))
    assert shades(found) == [7, 0, 0]
    assert json.loads(json.dumps(rows.shape)) == list(shape)
