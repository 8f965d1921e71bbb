"""Runs on images that stay in their file: the same bits as from memory, checkpoints without pixels, clear errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dodistill import DodistillError, distill, engine
from dodistill.api import distill_config
from dodistill.commands.cli import main
from dodistill.config.tree import resolve
from dodistill.core.pool import Pool
from dodistill.core.watch import Watcher
from dodistill.data.accept import accept
from dodistill.data.images import Images
from dodistill.data.packed import Packed, open_images
from dodistill.data.reading import ReadAhead, parts
from dodistill.data.rows import FileRows, TensorRows
from dodistill.engine.run_folder import RunFolder, fingerprint, load_tensors, newest_pool
from dodistill.evaluation.evaluate import predict
from helpers import SHAPE, config, job, same, student, tree, untimed

CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path, digits: Images) -> Path:
    path = tmp_path / "digits.npy"
    np.save(path, digits.x[:150].numpy())
    return path


def ended(teacher: nn.Module, images: Any, source: str, **more: Any) -> dict[str, Any]:
    it = job(teacher, config(source, "kdci+stratified", **more), images)
    assert it.run()
    return untimed(it.state_dict())


@pytest.mark.parametrize(
    ("source", "more"),
    [
        ("dfnd", {}),
        ("dfnd", {"augment": {"views": 2}}),
        ("dfnd", {"update": "replay", "replay": {"name": "bank", "size": 8, "first": 1, "every": 1}}),
        ("dfnd", {"dictionary": {"of": "batch"}}),
        ("data", {}),
        ("real", {}),
        ("mosaic", {}),
    ],
)
def test_a_file_gives_the_bits_of_a_tensor(source: str, more: Any, teacher: nn.Module, file: Path) -> None:
    rows = FileRows(file)
    same(ended(teacher, rows[:], source, **more), ended(teacher, rows, source, **more))


def test_images_are_read_one_batch_ahead(teacher: nn.Module, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = job(teacher, config("dfnd", steps=6), FileRows(file))
    announced: list[int] = []
    read: list[int] = []
    announce, take = ReadAhead.announce, FileRows.take

    def announcing(self: ReadAhead, index: torch.Tensor) -> None:
        announced.append(len(index))
        announce(self, index)

    def taking(self: FileRows, index: torch.Tensor) -> torch.Tensor:
        if it.step:
            read.append(len(index))
        return take(self, index)

    monkeypatch.setattr(ReadAhead, "announce", announcing)
    monkeypatch.setattr(FileRows, "take", taking)
    it.settle()
    while it.step < 6:
        it.acquire(Watcher()) if it.acquirer.due(it.step) else it.match()
    assert announced == [16] * 6
    assert read == [16] * 5, "no batch is read twice, and none but by the thread"


def test_a_run_from_a_file_goes_on_in_the_same_bits(teacher: nn.Module, file: Path, tmp_path: Path) -> None:
    cfg = config("dfnd", "kdci", steps=6)
    whole = job(teacher, cfg, FileRows(file))
    assert whole.run()
    first, folder = job(teacher, cfg, FileRows(file)), RunFolder(tmp_path / "run", cfg)
    first.settle()
    while first.step < 3:
        first.acquire(folder) if first.acquirer.due(first.step) else first.match()
    first.save(folder)
    folder.close()
    state = load_tensors(next((tmp_path / "run").glob("pool-*.pt")))
    assert "x" not in state
    assert state["rows"].dtype == torch.long
    second, again = job(teacher, cfg, FileRows(file)), RunFolder(tmp_path / "run", cfg)
    assert second.run(again)
    again.close()
    same(untimed(whole.state_dict())["matcher"], untimed(second.state_dict())["matcher"])
    same(whole.acquirer.pool_state(), second.acquirer.pool_state())

    np.save(file, FileRows(file)[:].numpy() // 2)
    other = job(teacher, cfg, FileRows(file))
    third = RunFolder(tmp_path / "run", cfg)
    with pytest.raises(DodistillError, match="began with other unlabelled images"):
        other.run(third)
    third.close()


def test_checkpoints_with_pixels_are_still_read(teacher: nn.Module, file: Path) -> None:
    it = job(teacher, config("dfnd"), FileRows(file))
    it.acquirer.acquire(it.matcher.student)
    pool = it.acquirer.pool
    old = pool.state_dict()
    del old["image_shape"]
    old["x"] = pool.x[old.pop("rows") * 0 + torch.arange(len(pool))]
    again = Pool(pool.capacity, SHAPE, 10, CPU, rows=FileRows(file))
    again.load_state_dict(old)
    assert torch.equal(again.x[:], pool.x[:])
    with pytest.raises(DodistillError, match="the run has none"):
        Pool(4, SHAPE, 10, CPU).load_state_dict(pool.state_dict())


def test_images_that_were_made_join_those_of_a_file(file: Path) -> None:
    rows, g = FileRows(file), torch.Generator()
    pool = Pool(20, SHAPE, 10, CPU, rows=rows)
    pool.add(rows.select(torch.tensor([3, 9])), torch.zeros(2, 10), g)
    assert "rows" in pool.state_dict()
    made = torch.rand(2, *SHAPE)
    pool.add(made, torch.zeros(2, 10), g)
    assert torch.equal(pool.x[:2], rows[torch.tensor([3, 9])])
    assert torch.equal(pool.x[2:].float(), (made * 255).round())
    pool.add(rows.select(slice(4, 5)), torch.zeros(1, 10), g)
    assert torch.equal(pool.x[4], rows[4])
    assert "x" in pool.state_dict()
    other = Pool(20, SHAPE, 10, CPU, rows=rows)
    other.add(TensorRows(rows[:3]), torch.zeros(3, 10), g)
    assert "x" in other.state_dict(), "rows of other images are no numbers of these"


def test_the_fingerprint_is_that_of_the_pixels(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = FileRows(file)
    assert rows.fingerprint() == TensorRows(rows[:]).fingerprint() == fingerprint([rows[:]])
    monkeypatch.setattr("dodistill.data.rows.SAMPLED", 1000)
    assert rows.fingerprint() == fingerprint([rows[:]], most=1000) != fingerprint([rows[:]])
    changed = rows[:]
    changed[0] += 1
    assert TensorRows(changed).fingerprint() != rows.fingerprint()


def test_parts_come_in_order_and_errors_arrive(file: Path, teacher: nn.Module) -> None:
    rows = FileRows(file)
    some = rows.select(torch.tensor([9, 2, 7, 7, 0]))
    assert torch.equal(torch.cat(list(parts(some, 2, CPU))), rows[torch.tensor([9, 2, 7, 7, 0])])
    assert torch.equal(predict(teacher, some), predict(teacher, some[:]))
    assert torch.equal(some.select(torch.tensor([1, 4]))[:], some[torch.tensor([1, 4])])
    assert torch.equal(rows[5], rows[:][5])
    with pytest.raises(IndexError):
        rows.take(torch.tensor([150]))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DodistillError, match="became shorter while it was read"):
        list(parts(rows, 50, CPU))


def test_large_files_stay_on_the_disk(file: Path, digits: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    assert digits.y is not None
    np.save(file.with_suffix(".labels.npy"), digits.y[:150].numpy())
    file.with_suffix(".json").write_text('{"classes": ["0","1","2","3","4","5","6","7","8","9"]}')
    assert isinstance(open_images(file), Images)
    monkeypatch.setenv("DODISTILL_MEMORY_GB", "0")
    kept = open_images(file)
    assert isinstance(kept, Packed)
    assert kept.y is not None
    assert torch.equal(kept.y, digits.y[:150])
    assert len(kept.classes) == 10
    assert len(kept.select(torch.arange(7))) == 7
    assert open_images(file, labels=False).y is None
    with pytest.raises(DodistillError, match=r"pack them again with --image-shape 3,4,4"):
        open_images(file, image_shape=(3, 4, 4))
    with pytest.raises(DodistillError, match=r"the model reads \(3, 4, 4\)"):
        accept(FileRows(file), (3, 4, 4), "unlabelled")
    monkeypatch.setenv("DODISTILL_DATA", str(file.parent))
    file.rename(file.with_name("flickr.npy"))
    assert isinstance(open_images("flickr", labels=False), Packed)
    with pytest.raises(DodistillError, match="no flickr"):
        open_images("flickr", "test")
    file.with_name("flickr.npy").rename(file)
    monkeypatch.setenv("DODISTILL_MEMORY_GB", "much")
    with pytest.raises(DodistillError, match="DODISTILL_MEMORY_GB is 'much'"):
        open_images(file)


def test_the_command_reads_rows(
    file: Path, teacher_file: Path, digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert digits.y is not None
    np.save(file.with_suffix(".labels.npy"), digits.y[:150].numpy())
    file.with_suffix(".json").write_text('{"classes": []}')
    given = tree("dfnd", teacher={"spec": str(teacher_file)}, student="tiny4",
                 data={"unlabeled": str(file), "test": str(file)})  # fmt: skip
    whole = distill_config(resolve(given), tmp_path / "a", verbose=False, report=False)
    monkeypatch.setenv("DODISTILL_MEMORY_GB", "0")
    rows = distill_config(resolve(given), tmp_path / "b", verbose=False, report=False)
    same(whole.student.state_dict(), rows.student.state_dict())
    assert whole.summary["delivered_accuracy"] == rows.summary["delivered_accuracy"]
    assert (tmp_path / "b" / "samples.png").read_bytes() == (tmp_path / "a" / "samples.png").read_bytes()

    pool = newest_pool(tmp_path / "b")
    assert torch.equal(pool["x"][:], newest_pool(tmp_path / "a")["x"][:])
    capsys.readouterr()
    assert main(["export", str(tmp_path / "b"), str(tmp_path / "images")]) == 0
    assert len(list((tmp_path / "images").rglob("*.png"))) == len(pool["x"])
    assert main(["evaluate", str(tmp_path / "b" / "student.safetensors"), "--test", str(file)]) == 0
    assert f"{whole.summary['delivered_accuracy']:.2f} % of 150 images" in capsys.readouterr().out
    np.save(file, FileRows(file)[:].numpy() // 2)
    with pytest.raises(DodistillError, match=r"are not those that .* was distilled with; restore them"):
        newest_pool(tmp_path / "b")


def test_rows_from_python(teacher: nn.Module, file: Path, digits: Images, tmp_path: Path) -> None:
    assert digits.y is not None
    rows = FileRows(file)
    given = {k: v for k, v in tree("dfnd").items() if k not in ("source", "intervention")}
    got = distill(
        teacher, student(), tree("dfnd")["source"], image_shape=SHAPE, unlabeled=rows, test=(digits.x, digits.y),
        out=tmp_path / "run", verbose=False, **given,
    )  # fmt: skip
    assert got.summary["delivered_accuracy"] > 0
    with pytest.raises(DodistillError, match="given in Python, not their pixels"):
        newest_pool(tmp_path / "run")


def test_a_test_set_stays_where_it_is(teacher: nn.Module, file: Path, digits: Images) -> None:
    assert digits.y is not None
    rows = FileRows(file)
    it = job(teacher, config("procedural"), test=engine.Test(rows, digits.y[:150]))
    assert it.scorer.test is not None
    assert it.scorer.test.x is rows
    assert it.run()
    other = job(teacher, config("procedural"), test=engine.Test(rows[:], digits.y[:150]))
    assert other.run()
    assert it.scorer.last == other.scorer.last
