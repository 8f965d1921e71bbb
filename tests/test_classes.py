"""Names of classes: where they come from, how folders of labelled images are matched with them, where they appear."""

from __future__ import annotations

import html
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import dodistill
from dodistill.commands.cli import main
from dodistill.data.accept import accept
from dodistill.data.classes import KNOWN, folder_names, hub_names, listed, match, read_names, titles
from dodistill.data.images import Images, load_images
from dodistill.data.labels import fitted
from dodistill.errors import DodistillError
from dodistill.models import Normalized, load_model, save_model
from dodistill.models.configured import shape_of
from dodistill.models.normalized import class_names
from dodistill.models.weights import read_metadata
from dodistill.report.images import export_images
from dodistill.report.plots import bars
from dodistill.report.report import write_report
from dodistill.report.shares import extremes, shares

ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse", "lynx", "mole", "newt", "owl")
SHAPE = (1, 8, 8)


class Shade(nn.Module):
    """Class k for images whose mean is nearest to k / K: a model that is right on the pictures below."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.arange(num_classes) / num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = -100 * (x.mean((1, 2, 3))[:, None] - self.levels).square()
        return out


def model(classes: Sequence[str] = (), outputs: int = 10) -> Normalized:
    spec = {"num_classes": outputs, "in_channels": 1, "image_size": 8}
    return Normalized(Shade(outputs), spec=spec | ({"classes": tuple(classes)} if classes else {}))


def pictures(root: Path, folders: dict[str, int], outputs: int = 10, each: int = 2) -> Path:
    """Folder's name -> the class that its pictures are of."""
    for name, k in folders.items():
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.new("L", (8, 8), round(255 * k / outputs)).save(root / name / f"{i}.png")
    return root


# ------------------------------------------------------------------------------------------------- reading


def test_names_are_read_from_what_people_have(tmp_path: Path) -> None:
    wanted = ("cat", "red panda", "dog")
    (tmp_path / "names.txt").write_text("cat\n red  panda\r\ndog\n\n")
    (tmp_path / "list.json").write_text(json.dumps(wanted))
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"2": "dog", "0": "cat", "1": "red panda"}}))
    for given in (
        "cat, red panda ,dog", list(wanted), {0: "cat", 1: "red panda", 2: "dog"}, tmp_path / "names.txt",
        str(tmp_path / "list.json"), str(tmp_path / "config.json"),
    ):  # fmt: skip
        assert read_names(given) == wanted, given
    assert read_names(None) == read_names("") == read_names([]) == ()
    assert read_names([3, 4]) == ("3", "4")
    assert hub_names({0: "LABEL_0", 1: "LABEL_1"}) == hub_names(None) == hub_names({1: "a"}) == ()
    assert hub_names({"1": "dog", "0": "cat"}) == ("cat", "dog")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gone.txt", r"there is no file gone\.txt"),
        (Path("gone"), "there is no file gone"),
        (["cat", ""], "the name of class 1 is ''"),
        (["cat", "a\x07b"], "the name of class 1"),
        ({0: "cat", 2: "dog"}, "no name of class 1"),
        (7, "give a list of names"),
    ],
)
def test_what_is_no_list_of_names(given: Any, said: str) -> None:
    with pytest.raises(DodistillError, match=said):
        read_names(given, "teacher.classes")


def test_names_for_a_page() -> None:
    names = ["n02012849 crane", "n03126707 crane", "n01440764 tench, Tinca tinca", "cat", "x" * 40]
    assert titles(names) == (names[0], names[1], "tench", "cat", "x" * 27 + "…")
    assert listed(list("abc")) == "a, b, c"
    assert listed([f"c{k}" for k in range(1000)]) == "c0, c1, c2, c3, c4, c5, c6, ... 1000 in all"


# ------------------------------------------------------------------------------------------------- matching


def test_spellings_of_a_name() -> None:
    names = ["n01440764 tench, Tinca tinca", "Red Panda", "great_white-shark", "c", "C", "a/b"]
    for folder, k in (
        ("n01440764", 0), ("tench", 0), ("Tinca_tinca", 0), ("tench, Tinca tinca", 0), ("red_panda", 1),
        ("REDPANDA", 1), ("great white shark", 2), ("c", 3), ("C", 4), ("a_b", 5),
    ):  # fmt: skip
        assert match([folder], names, None, "f", "fix.") == [k], folder
    with pytest.raises(DodistillError, match=r"ambiguous: crane \(n02012849 crane or n03126707 crane\)"):
        match(["crane"], ["n02012849 crane", "n03126707 crane"], 2, "f", "fix.")
    assert match(["n03126707"], ["n02012849 crane", "n03126707 crane"], 2, "f", "fix.") == [1]


def test_an_accent_may_be_a_character_of_its_own() -> None:
    """As in the folders of a Mac."""
    names = ["caf\u00e9", "cafe"]
    assert match(["cafe\u0301", "cafe"], names, 2, "data", "fix") == [0, 1]


def test_numbers() -> None:
    ten = [str(k) for k in range(10)]
    assert match(["1", "2"], (), 10, "f", "fix.") == [1, 2]  # by value
    assert match(["01", "02"], ten, 10, "f", "fix.") == [1, 2]
    assert match(["10", "2", "0", *ten[3:10], "1"], (), 11, "f", "fix.") == [10, 2, 0, *range(3, 10), 1]
    assert match([str(k + 1) for k in range(10)], (), 10, "f", "fix.") == list(range(10))  # 1 to 10, in order
    assert match(ten[::-1], ANIMALS, 10, "f", "fix.") == list(range(10))[::-1]  # all of them, so it is clear
    for folders, names in ((["1", "2"], ANIMALS), (["7", "12"], ()), (["1", "cat"], ())):
        with pytest.raises(DodistillError):
            match(folders, names, 10, "f", "fix.")


def test_a_mismatch_lists_both_sides() -> None:
    with pytest.raises(DodistillError) as told:
        match(["cat", "dog", "yak", "gnu"], ANIMALS, 10, "animals/", "give the names.")
    said = str(told.value)
    assert "animals/: 2 of its 4 class folders do not fit the model's 10 classes" in said
    assert "no class yak, gnu" in said
    assert "Classes without a folder: bird, deer, frog, horse, lynx, mole, newt, owl." in said
    assert said.endswith("Give the names.")
    with pytest.raises(DodistillError, match=r"f has 2 class folders \(cat, dog\), but the model has 10 classes"):
        match(["cat", "dog"], (), 10, "f", "fix.")
    assert len(str(told.value)) < 400
    with pytest.raises(DodistillError) as told:
        match([f"a{k}" for k in range(1000)], [f"b{k}" for k in range(1000)], 1000, "f", "fix.")
    assert len(str(told.value)) < 400


def test_two_folders_of_ten(tmp_path: Path) -> None:
    """The case of the issue: it scored 0.5 % without a word."""
    root = pictures(tmp_path / "f", {"cat": 1, "dog": 3})
    found = dodistill.evaluate(model(ANIMALS), root)
    assert found["accuracy"] == 100
    assert "no images of 8 of the model's 10 classes: bird, deer, frog" in found["note"]
    assert dodistill.evaluate(model(), root, classes=ANIMALS) == found
    with pytest.raises(DodistillError, match=r"2 class folders \(cat, dog\), but the model has 10 .*--classes FILE"):
        dodistill.evaluate(model(), root)
    with pytest.raises(DodistillError, match=r"3 names of classes .*10 outputs"):
        dodistill.evaluate(model(), root, classes="a,b,c")
    assert "note" not in dodistill.evaluate(model(ANIMALS), load_images("digits", "test"))
    root = pictures(tmp_path / "ten", {name: k for k, name in enumerate(sorted(ANIMALS))})
    note = dodistill.evaluate(model(), root)["note"]  # by order, which may be wrong: the run says so
    assert f"taken for the model's classes in this order: {', '.join(sorted(ANIMALS)[:7])}, ... 10 in all" in note
    assert "note" not in dodistill.evaluate(model(sorted(ANIMALS)), root)


def test_folders_that_are_numbers(tmp_path: Path) -> None:
    root = pictures(tmp_path / "eleven", {str(k): k for k in range(11)}, 11)
    assert dodistill.evaluate(model(outputs=11), root)["accuracy"] == 100
    found = dodistill.evaluate(model(), pictures(tmp_path / "two", {"1": 1, "2": 2}))
    assert found["accuracy"] == 100
    assert "no images of 8 of the model's 10 classes: 0, 3, 4" in found["note"]
    found = dodistill.evaluate(model(), pictures(tmp_path / "from1", {str(k + 1): k for k in range(10)}))
    assert found["accuracy"] == 100
    assert "folders are numbers: 1 is class 0, 2 is class 1, 3 is class 2, ... 10 in all" in found["note"]
    found = dodistill.evaluate(model(ANIMALS), pictures(tmp_path / "ten", {str(k): k for k in range(10)}))
    assert found["accuracy"] == 100
    assert "0 is bird" in found["note"]


class ImageFolder:
    """What torchvision's has: its classes are sorted as text."""

    def __init__(self, root: Path) -> None:
        self.classes = sorted(p.name for p in root.iterdir())
        self.class_to_idx = {name: k for k, name in enumerate(self.classes)}
        self.samples = [(p, self.class_to_idx[p.parent.name]) for p in sorted(root.rglob("*.png"))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        path, y = self.samples[i]
        return Image.open(path), y


def test_an_image_folder_of_torchvision(tmp_path: Path) -> None:
    data = ImageFolder(pictures(tmp_path / "eleven", {str(k): k for k in range(11)}, 11))
    assert data.classes[:3] == ["0", "1", "10"]
    assert dodistill.evaluate(model(outputs=11), data)["accuracy"] == 100
    part = torch.utils.data.Subset(data, range(22))  # type: ignore[arg-type]
    assert accept(part, SHAPE, "test", labels=True).classes == tuple(data.classes)


def test_arrays_keep_their_numbers() -> None:
    x = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    images = Images(x, torch.tensor([3, 3, 1, 0]))
    assert fitted(images, ANIMALS, 10, "a") is images
    known = Images(x, torch.arange(4), classes=KNOWN["cifar10"], by_number=True)
    assert fitted(known, ("plane", "car", *KNOWN["cifar10"][2:]), 10, "a") is known
    with pytest.raises(DodistillError, match="labels go from 0 to 3, but it has 2 classes"):
        fitted(Images(x, torch.arange(4), classes=("cat", "dog")), ANIMALS, 10, "a")


# ------------------------------------------------------------------------------------------------- models


def test_names_belong_to_the_model(tmp_path: Path) -> None:
    net = load_model("tiny4", image_size=8, classes=ANIMALS, seed=0)
    assert net.spec["num_classes"] == 10
    file = save_model(net, tmp_path / "a.safetensors")
    assert read_metadata(file)["classes"] == list(ANIMALS)
    assert class_names(load_model(str(file))) == ANIMALS
    assert class_names(load_model("tiny4", weights=file)) == ANIMALS
    assert class_names(dodistill.Teacher(load_model(str(file)), SHAPE)) == ANIMALS
    assert class_names(load_model(str(file), classes=[*ANIMALS[:9], "ox"]))[9] == "ox"
    assert class_names(load_model(str(file), classes=())) == class_names(nn.Linear(1, 1)) == ()
    with pytest.raises(DodistillError, match=r"3 names of classes \(a, b, c\), but the model has 10 outputs"):
        load_model(str(file), classes="a,b,c")
    net.spec["classes"] = ("a", "b")
    save_model(net, file)
    with pytest.raises(DodistillError, match=r"a\.safetensors: 2 names of classes"):
        load_model(str(file))
    save_model(net, file, classes=[1, 2])
    with pytest.raises(DodistillError, match="metadata say classes"):
        load_model(str(file))


def test_names_of_timm_and_torchvision(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    net = load_model("timm:test_resnet", image_size=32)
    names = class_names(net)
    assert len(names) == 1000
    assert names[0] == "n01440764 tench, Tinca tinca"
    assert match(["n01443537", "tench", "goldfish"], names, 1000, "f", "fix.") == [1, 0, 1]
    assert class_names(load_model("timm:test_resnet", num_classes=10)) == ()
    pytest.importorskip("torchvision")
    assert class_names(load_model("torchvision:shufflenet_v2_x0_5"))[:2] == ("tench", "goldfish")
    assert class_names(load_model("torchvision:shufflenet_v2_x0_5", num_classes=10)) == ()


def test_names_of_hugging_face_and_of_the_users_code(tmp_path: Path) -> None:
    code = (
        "from torch import nn\nclass Net(nn.Sequential):\n    class config:\n        id2label = {0: 'cat', 1: 'dog'}\n"
    )
    code += "def make():\n    return Net(nn.Flatten(), nn.Linear(64, 2))\n"
    code += "import dodistill\ndef named():\n    return dodistill.load_model('tiny4', classes='a,b,c')\n"
    (tmp_path / "m.py").write_text(code)
    assert class_names(load_model(f"{tmp_path}/m.py:make")) == ("cat", "dog")
    assert class_names(load_model(f"{tmp_path}/m.py:named")) == ("a", "b", "c")


def test_a_non_square_model(tmp_path: Path) -> None:
    net = load_model("tiny4", num_classes=3, in_channels=3, image_size=(8, 12), seed=0)
    file = save_model(net, tmp_path / "a.safetensors")
    assert read_metadata(file)["image_size"] == [8, 12]
    back = load_model(str(file))
    assert shape_of(back) == (3, 8, 12)
    with pytest.raises(DodistillError, match=r"reads \(3, 8, 12\)"):
        dodistill.evaluate(back, (torch.rand(4, 3, 12, 8), torch.arange(4) % 3))
    square = save_model(load_model("tiny4", num_classes=3, image_size=(8, 8)), tmp_path / "b.safetensors")
    assert read_metadata(square)["image_size"] == 8
    for wrong in ((8, 8, 3), (8, 0), "8", ()):
        with pytest.raises(DodistillError, match="image_size is"):
            load_model("tiny4", num_classes=3, image_size=wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- folders of our own


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        ((), [f"{k:02d}" for k in range(12)]),
        ([f"animal {k}/x" for k in range(12)], [f"animal {k}_x" for k in range(12)]),
        ([f"n{k:08d} tench, a" for k in range(12)], [f"n{k:08d}" for k in range(12)]),
        (["C", "c", *map(str, range(10))], ["class 0", "class 1", *map(str, range(10))]),  # alike on some file systems
        (["..", *map(str, range(11))], ["class 0", *map(str, range(11))]),
    ],
)
def test_exported_folders_are_read_again(names: Sequence[str], folders: list[str], tmp_path: Path) -> None:
    assert list(folder_names(names, 12)) == folders
    x = torch.arange(24, dtype=torch.uint8).view(24, 1, 1, 1).expand(24, 1, 8, 8)
    y = torch.arange(24).flip(0) % 12
    export_images(x, tmp_path / "f", y, folder_names(names, 12))
    found = fitted(load_images(tmp_path / "f", image_shape=SHAPE), names, 12, "f")
    assert found.y is not None
    order = found.x[:, 0, 0, 0].long().argsort()
    assert torch.equal(found.y[order], y)
    assert not found.note or names


def test_folders_of_many_classes_take_no_time() -> None:
    began = time.process_time()
    assert folder_names([f"animal {k}" for k in range(50_000)], 50_000)[-1] == "animal 49999"
    assert time.process_time() - began < 5  # 26 s, if each name is compared with each


def test_taught_on_a_folder_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`teach` keeps the names; the student inherits them; report, card, evaluate, look and export show them; a test
    folder with two of the three classes is scored right."""
    data = pictures(tmp_path / "data", {"train/Red Panda": 0, "train/cat": 1, "train/dog": 2}, 3, each=20)
    test = pictures(tmp_path / "test", {"red_panda": 0, "dog": 2}, 3, each=30)
    teacher, run = str(tmp_path / "t.safetensors"), tmp_path / "run"
    teach = ["teach", "tiny8", "--data", str(data), "--image-shape", "1,8,12", "--epochs", "12", "--batch", "12",
             "--pad", "0", "--flip", "false", "--minival", "0", "--precision", "fp32", "--out", teacher]  # fmt: skip
    assert main([*teach, "--test", str(test)]) == 0
    assert "no images of one of the 3 classes: cat" in capsys.readouterr().err
    assert read_metadata(teacher)["classes"] == ["Red Panda", "cat", "dog"]
    assert read_metadata(teacher)["image_size"] == [8, 12]
    distil = ["distill", "--teacher", teacher, "--student", "tiny8", "--source", "data", "--train", str(data),
              "--test", str(test), "--augment.pad", "0", "--augment.flip", "false", "--steps", "40", "--batch", "16",
              "--loop.precision", "fp32", "--out", str(run), "--quiet"]  # fmt: skip
    assert main([*distil, "--classes", "a,b"]) == 2
    assert "2 names of classes (a, b), but the model has 3 outputs" in capsys.readouterr().err
    assert not run.exists()
    assert main(distil) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["classes"] == ["Red Panda", "cat", "dog"]
    assert summary["image_shape"] == [1, 8, 12]
    assert any("no images of one of the 3 classes: cat" in w for w in summary["warnings"])
    shutil.copytree(run, tmp_path / "stopped", ignore=shutil.ignore_patterns("summary.json"))
    assert ">Red Panda<" in write_report(tmp_path / "stopped").read_text()
    assert summary["student_accuracy"] > 90
    student = str(run / "student.safetensors")
    assert read_metadata(student)["classes"] == ["Red Panda", "cat", "dog"]
    report, card = html.unescape((run / "report.html").read_text()), (run / "README.md").read_text()
    assert report.count(">Red Panda<") == 2  # class shares, and accuracy of each class
    assert "`Red Panda`, `cat`, `dog`." in card
    for page in (report, card):
        assert "shape [B, 1, 8, 12]" in page
        assert 'student.spec["classes"]' in page
    capsys.readouterr()
    assert main(["evaluate", student, "--test", str(test)]) == 0
    said = capsys.readouterr().out
    assert "Red Panda 5" in said
    assert "note       " in said
    assert main(["evaluate", student, "--test", str(test), "--classes", "x,y,z"]) == 2
    assert "the model has no class dog, red_panda. Classes without a folder: x, y, z" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "pool")]) == 0
    assert {p.name for p in (tmp_path / "pool").iterdir()} == {"Red Panda", "cat", "dog"}
    capsys.readouterr()
    assert main(["evaluate", student, "--test", str(tmp_path / "pool")]) == 0
    assert float(capsys.readouterr().out.split("accuracy   ")[1].split()[0]) > 90
    pytest.importorskip("sklearn")
    assert main(["look", str(run), "--test", str(test), "--n", "50", "--out", str(tmp_path / "look.html")]) == 0
    page = html.unescape((tmp_path / "look.html").read_text())
    assert ">Red Panda<" in page
    assert "no images of one of the 3 classes: cat" in page


def test_names_given_in_python(teacher: nn.Module, tmp_path: Path) -> None:
    x, words = load_images("digits").x[:200], ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
    assert class_names(teacher) == KNOWN["digits"]  # it was taught on them
    student = load_model("tiny4", num_classes=10, in_channels=1, image_size=8, seed=1)
    short: dict[str, Any] = {"steps": 2, "batch": 8, "augment": {"pad": 1, "flip": False}, "verbose": False}
    with pytest.raises(DodistillError, match="9 names of classes"):
        dodistill.distill(teacher, student, "data", unlabeled=x, classes=words, **short)
    test = pictures(tmp_path / "f", {"nine": 9, "Two": 2})
    result = dodistill.distill(teacher, student, "data", unlabeled=x, test=test, classes=[*words, "nine"], **short)
    assert result.summary["classes"] == [*words, "nine"]
    assert class_names(result.student) == (*words, "nine")
    assert any("no images of 8 of the model's 10 classes: zero, one, three" in w for w in result.summary["warnings"])
    assert "no images of 8" in result.evaluate(test)["note"]


# ------------------------------------------------------------------------------------------------- long lists


def test_long_lists_stay_readable(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"name{k}" for k in range(1000)]
    found = shares([k + 1.0 for k in range(1000)])
    assert found is not None
    most, least = extremes(found, names)
    assert most.startswith("name999 0.2 %, name998")
    assert least.endswith("name0 0.0002 %")
    assert len(most) + len(least) < 200
    card = dodistill.report.card.model_card({}, {"classes": names})
    assert "`name99` and 900 more" in card
    assert "name100" not in card
    plot = str(
        bars("b", [("pool", [0.5, 0.25, 0.25])], x_label="class", names=["a long name of a class", "cat", "dog"])
    )
    assert ">a long name of …<" in plot
    assert "cat 25" in plot
    for names_of_ten, turned in ((list("0123456789"), 1), (list(KNOWN["cifar10"]), 11)):  # one is the label of y
        short = str(bars("b", [("pool", [0.1] * 10)], x_label="class", names=names_of_ten))
        assert short.count("rotate(-90") == turned
    assert "name" not in str(bars("b", [("pool", [1 / 60] * 60)], x_label="class", names=names[:60]))
    from dodistill.commands.evaluate import _shares

    said = _shares([0.001] * 998 + [0.0015, 0.0005], tuple(names))
    assert said.startswith("name998 0.1")
    assert said.endswith("... of 1000 classes")
