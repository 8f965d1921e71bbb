"""Labels of folders: Tiny-ImageNet as it is published, splits that do not have the same classes, and a single class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dodistill.commands.cli import main
from dodistill.data.images import Images, load_images, refuse_one_class
from dodistill.data.pack import pack
from dodistill.engine.teach_files import read_labelled
from dodistill.errors import DodistillError
from dodistill.models import load_model, save_model

SHADE = {"n02": 40, "n01": 120, "n03": 200}  # one grey for each class, in the order of wnids.txt, which is no order
VAL = ["n03", "n01", "n01", "n02"]
SHAPE = (3, 8, 8)


def picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(path)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    root = tmp_path / "tiny-imagenet-200"
    for wnid, shade in SHADE.items():
        for k in range(2):
            picture(root / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", shade)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t7\t7\n")
    for k, wnid in enumerate(VAL):
        picture(root / "val" / "images" / f"val_{k}.JPEG", SHADE[wnid])
        picture(root / "test" / "images" / f"test_{k}.JPEG", 0)
    lines = [f"val_{k}.JPEG\t{wnid}\t0\t0\t7\t7" for k, wnid in enumerate(VAL)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(reversed(lines)) + "\n")
    (root / "wnids.txt").write_text("\n".join(SHADE) + "\n")
    (root / "words.txt").write_text("n01\tgoldfish\n")
    return root


def shades(images: Images) -> list[str]:
    """The class of each image, by its pixels."""
    return [min(SHADE, key=lambda wnid: abs(SHADE[wnid] - float(x.float().mean()))) for x in images.x]


def test_tiny_imagenet_as_it_is_published(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = load_images(tiny, image_shape=SHAPE), load_images(tiny, "test", image_shape=SHAPE)
    assert train.classes == test.classes == ("n01", "n02", "n03")
    assert train.y is not None
    assert test.y is not None
    assert train.y.tolist() == [0, 0, 1, 1, 2, 2]  # ImageFolder's numbers
    assert test.y.tolist() == [2, 0, 0, 1]
    for images in (train, test):
        assert [images.classes[k] for k in images.y] == shades(images)  # type: ignore[union-attr]
        assert (images.skipped, images.note, images.num_classes) == (0, "", 3)
    for part in ("train", "val"):  # its halves alone, whatever the split
        alone = load_images(tiny / part, "test", image_shape=SHAPE)
        assert alone.y is not None
        assert [alone.classes[k] for k in alone.y] == shades(alone)
        assert len(alone) == {"train": 6, "val": 4}[part]
    assert load_images(tiny, "test", labels=False, image_shape=SHAPE).y is None
    (tiny.parent / "tiny_imagenet").symlink_to(tiny)
    monkeypatch.setenv("DODISTILL_DATA", str(tiny.parent))
    assert torch.equal(load_images("tiny_imagenet", "test", image_shape=SHAPE).y, test.y)  # type: ignore[arg-type]


def test_a_broken_image_takes_its_label_with_it(tiny: Path) -> None:
    (tiny / "val" / "images" / "val_1.JPEG").write_bytes(b"no JPEG")
    test = load_images(tiny, "test", image_shape=SHAPE)
    assert test.y is not None
    assert test.y.tolist() == [2, 0, 1]
    assert test.skipped == 1
    assert "val_1.JPEG" in test.note


def test_a_part_of_it_keeps_the_numbers_and_val_may_be_in_class_folders(tiny: Path) -> None:
    (tiny / "train" / "n01").rename(tiny.parent / "n01")
    train = load_images(tiny, image_shape=SHAPE)
    assert train.y is not None
    assert train.y.tolist() == [1, 1, 2, 2]
    for k, wnid in enumerate(VAL):  # as scripts for ImageFolder leave it
        picture(tiny / "val" / wnid / "images" / f"val_{k}.JPEG", SHADE[wnid])
        (tiny / "val" / "images" / f"val_{k}.JPEG").unlink()
    (tiny / "val" / "images").rmdir()
    test = load_images(tiny, "test", image_shape=SHAPE)
    assert test.y is not None
    assert test.y.tolist() == [0, 0, 1, 2]
    assert [test.classes[k] for k in test.y] == shades(test)


def _append(line: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        file = root / "val" / "val_annotations.txt"
        file.write_text(file.read_text() + line)

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda root: (root / "val" / "val_annotations.txt").unlink(),
            r"no .*val_annotations\.txt, which has the labels",
        ),
        (lambda root: (root / "val" / "images" / "val_2.JPEG").unlink(), r"line 2: val_2\.JPEG is not in .*images"),
        (lambda root: picture(root / "val" / "images" / "val_9.JPEG", 0), r"no line for images/val_9\.JPEG"),
        (_append("val_0.JPEG\tn01\n"), r"line 5: val_0\.JPEG already has a line"),
        (_append("val_0.JPEG\tn77\t0\n"), r"line 5: val_0\.JPEG is of class 'n77', which wnids\.txt does not have"),
        (_append("val_0.JPEG\n"), r"line 5: 'val_0\.JPEG' names no class"),
        (lambda root: (root / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe\x00"), "cannot read"),
        (lambda root: (root / "wnids.txt").write_text("\n"), r"wnids\.txt is empty"),
        (lambda root: (root / "wnids.txt").unlink(), r"val_annotations\.txt without its wnids\.txt"),
    ],
)
def test_lists_that_do_not_fit(damage: Callable[[Path], None], said: str, tiny: Path) -> None:
    damage(tiny)
    with pytest.raises(DodistillError, match=said):
        load_images(tiny, "test", image_shape=SHAPE)
    load_images(tiny, "test", labels=False, image_shape=SHAPE)  # which reads no list


def test_a_class_folder_that_the_list_does_not_have(tiny: Path) -> None:
    picture(tiny / "train" / "n99" / "images" / "n99_0.JPEG", 0)
    with pytest.raises(DodistillError, match=r"n99_0\.JPEG is in no folder of a class of .*wnids\.txt"):
        load_images(tiny, image_shape=SHAPE)


def test_splits_number_their_classes_together(tmp_path: Path) -> None:
    """A test set without a class, or with one more, does not shift the labels of the rest."""
    for name in ("train/a", "train/b", "train/c", "val/a", "val/c", "val/d"):
        picture(tmp_path / name / "0.png", 0)
    (tmp_path / "train" / ".cache").mkdir()
    train, test = load_images(tmp_path, image_shape=SHAPE), load_images(tmp_path, "test", image_shape=SHAPE)
    assert train.classes == test.classes == ("a", "b", "c", "d")
    assert train.y is not None
    assert test.y is not None
    assert (train.y.tolist(), test.y.tolist()) == ([0, 1, 2], [0, 2, 3])
    for name in ("train/a", "train/b", "train/c"):  # a split of other things says nothing of these classes
        (tmp_path / name / "0.png").unlink()
    picture(tmp_path / "train" / "wild" / "0.png", 0)
    assert load_images(tmp_path, "test", image_shape=SHAPE).classes == ("a", "c", "d")


@pytest.mark.parametrize("parts", [("train", "val"), ("",)], ids=["splits", "one"])
def test_class_folders_that_are_links(parts: tuple[str, ...], tmp_path: Path) -> None:
    """Two links to one folder are two classes; a link to a folder that it is in ends there."""
    picture(tmp_path / "kept" / "deeper" / "0.png", 0)
    for part in parts:
        picture(tmp_path / "set" / part / "b" / "0.png", 0)
        for name, to in (("a", "kept"), ("c", "kept"), ("b/up", "set"), ("b/itself", f"set/{part}/b/itself")):
            (tmp_path / "set" / part / name).symlink_to(tmp_path / to)
    train, test = (load_images(tmp_path / "set", split, image_shape=SHAPE) for split in ("train", "test"))
    assert train.classes == test.classes == ("a", "b", "c")
    assert train.y is not None
    assert train.y.tolist() == [0, 1, 2]


def test_one_class_is_named() -> None:
    x = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(DodistillError, match=r"a.npz: all 3 images are of one class, '7', .* correct the labels"):
        refuse_one_class(Images(x, torch.full((3,), 7)), "a.npz")
    with pytest.raises(DodistillError, match=r"one class, 'images', .* give the folder whose subfolders"):
        refuse_one_class(Images(x, torch.zeros(3).long(), classes=("images",)), "f")
    refuse_one_class(Images(x), "f")
    refuse_one_class(Images(x, torch.tensor([0, 1, 0])), "f")


def test_labels_of_one_class_are_refused_wherever_labels_are_read(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unlabelled `test` of Tiny-ImageNet, and arrays; as images without labels the same are taken."""
    model = load_model("tiny4", num_classes=3, in_channels=3, image_size=8, seed=0)
    file, wild = str(save_model(model, tmp_path / "t.safetensors")), str(tiny / "test")
    x = np.zeros((8, 8, 8, 3), np.uint8)
    flat = tmp_path / "flat.npz"
    np.savez(flat, x_train=x, y_train=np.ones(8, int), x_test=x, y_test=np.ones(8, int))
    distil = ["distill", "--teacher", file, "--student", "tiny4", "--preset", "desk", "--augment.pad", "1", "--steps",
              "2", "--batch", "2", "--quiet", "--no-report"]  # fmt: skip
    teach = [
        "teach",
        "tiny4",
        "--image-shape",
        "3,8,8",
        "--epochs",
        "1",
        "--pad",
        "1",
        "--out",
        f"{tmp_path}/new.safetensors",
    ]

    def refused(*arguments: str) -> str:
        with monkeypatch.context() as patch:  # nothing is computed before
            patch.setattr("dodistill.evaluation.evaluate.predict", lambda *_, **__: pytest.fail("computed first"))
            patch.setattr("dodistill.commands.evaluate.calibrate", lambda *_, **__: pytest.fail("computed first"))
            assert main(arguments) == 2
        return capsys.readouterr().err

    for spec, name in ((wild, "images"), (str(flat), "1")):
        said = f"{spec}: all {4 if spec == wild else 8} images are of one class, {name!r}"
        assert said in refused("evaluate", file, "--test", spec, "--calibrate", wild)
        unscored = "test has no test images of its own"  # which a probe says before it decodes an image
        assert (unscored if spec == wild else said) in refused("evaluate", file, "--probe", spec)
        assert said in refused(*distil, "--source", "noise", "--test", spec, "--out", f"{tmp_path}/a")
        assert said in refused(*distil, "--source", "data", "--train", spec, "--out", f"{tmp_path}/b")
        assert said in refused(*teach, "--data", spec)
        assert said in refused(*teach, "--data", str(tiny), "--test", spec)
    assert not list(tmp_path.glob("new*")) + list(tmp_path.glob("[ab]"))

    assert main([*distil, "--source", "dfnd", "--unlabeled", wild, "--out", f"{tmp_path}/c"]) == 0
    assert main([*distil, "--source", "data", "--train", f"{wild}/images", "--out", f"{tmp_path}/d"]) == 0


def test_teaching_on_a_folder(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the folder to the accuracy on its test images; images of one folder are never their own test set."""
    teach = ["teach", "tiny8", "--epochs", "40", "--batch", "6", "--lr", "0.05", "--pad", "0", "--flip", "false",
             "--minival", "0", "--precision", "fp32", "--out", f"{tmp_path}/t.safetensors"]  # fmt: skip
    assert main([*teach, "--data", str(tiny)]) == 2
    assert "--image-shape" in capsys.readouterr().err
    assert main([*teach, "--data", str(tiny), "--image-shape", "3,8,8", "--crop-share", "1.5"]) == 2
    assert "crop_share is 1.5" in capsys.readouterr().err
    assert main([*teach, "--data", str(tiny), "--image-shape", "3,8,8"]) == 0
    assert '"test": 100.0' in capsys.readouterr().out
    assert main(["evaluate", f"{tmp_path}/t.safetensors", "--test", str(tiny)]) == 0
    assert "accuracy   100.00 % of 4 images" in capsys.readouterr().out
    plain = tmp_path / "plain"
    (tiny / "train").rename(plain)
    assert (
        main(
            [
                *teach,
                "--data",
                str(plain),
                "--image-shape",
                "3,8,8",
                "--epochs",
                "1",
                "--out",
                f"{tmp_path}/u.safetensors",
            ]
        )
        == 0
    )
    assert '"test"' not in capsys.readouterr().out


def test_data_without_a_test_split_is_not_its_own_test_set(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A packed file, and a planted context around it or around a folder."""
    folder = tiny / "train"
    pack(str(folder), tiny / "x.npy", SHAPE)
    for spec in (f"{tiny}/x.npy", f"planted:{tiny}/x.npy", f"planted:{folder}:0.9"):
        assert read_labelled(spec, shape=SHAPE).test is None
    assert read_labelled(f"planted:{tiny}", shape=SHAPE).test is not None
    save_model(load_model("tiny4", num_classes=3, in_channels=3, image_size=8, seed=0), tiny / "t.safetensors")
    assert main(["evaluate", f"{tiny}/t.safetensors", "--probe", f"{tiny}/x.npy"]) == 2
    assert "x.npy has no test images of its own" in capsys.readouterr().err


def test_test_images_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`teach` says before it begins that the data's own test images cannot be scored, and teaches all the same."""
    x = np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(8) % 2, x_test=x)
    teach = ["teach", "tiny4", "--data", f"{tmp_path}/a.npz", "--epochs", "1", "--batch", "4", "--pad", "1"]
    assert main([*teach, "--out", f"{tmp_path}/t.safetensors"]) == 0
    assert "have no labels" in capsys.readouterr().err
    assert main([*teach, "--test", f"{tmp_path}/a.npz", "--out", f"{tmp_path}/t.safetensors"]) == 2
