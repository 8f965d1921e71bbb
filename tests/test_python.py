"""Python as people expect it: forms of data, shortcuts, and what a result can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dodistill
from dodistill import DodistillError, distill, load_model
from dodistill.data.accept import accept
from dodistill.data.images import Images
from dodistill.report.result import History
from helpers import SHAPE, same, student, tree

RGB = (3, 4, 5)


class Pictures(Dataset[tuple[Image.Image, int]]):
    """As torchvision's data sets without a transform."""

    def __init__(self, x: np.ndarray[Any, Any]) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.x[index]), index % 10


HWC = np.random.default_rng(0).integers(0, 256, (12, 4, 5, 3), dtype=np.uint8)
CHW = torch.from_numpy(HWC.transpose(0, 3, 1, 2).copy())
Y = torch.arange(12) % 10
FORMS: dict[str, Any] = {
    "numpy-nhwc": (HWC, Y.numpy()),
    "numpy-nchw": (CHW.numpy(), Y.tolist()),
    "tensor": (CHW, Y),
    "list-of-two": [CHW, Y],
    "floats": (CHW.double() / 255, Y),
    "images": Images(CHW, Y),
    "dataset-of-tensors": TensorDataset(CHW.float() / 255, Y),
    "dataset-of-pictures": Pictures(HWC),
    "loader": DataLoader(TensorDataset(CHW.float() / 255, Y), batch_size=5),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_of_images(form: Any) -> None:
    found = accept(form, RGB, "test", labels=True)
    assert found.y is not None
    assert torch.equal(found.x, CHW)
    assert found.x.dtype == torch.uint8
    assert torch.equal(found.y, Y)
    assert accept(form, RGB, "test").y is None


@pytest.mark.parametrize(("mode", "shape"), [("P", RGB), ("PA", RGB), ("P", (1, 4, 5)), ("1", (1, 4, 5))])
def test_pictures_with_a_palette(mode: str, shape: tuple[int, int, int]) -> None:
    """Their values are colours, not numbers of colours."""
    white = Image.new("1", (5, 4), 1)
    if mode != "1":
        white = Image.new("P", (5, 4), 3)
        white.putpalette([0] * 9 + [255] * 3 + [0] * 756)
        white = white.convert(mode)
    assert accept(iter([white]), shape, "test").x.unique().tolist() == [255]


def test_grey_images_need_no_channel(tmp_path: Path) -> None:
    x = HWC[..., 0]
    assert accept(x, (1, 4, 5), "unlabelled").x.shape == (12, 1, 4, 5)
    np.savez(tmp_path / "d.npz", x_train=x)
    assert torch.equal(accept(tmp_path / "d.npz", (1, 4, 5), "unlabelled").x[:, 0], torch.from_numpy(x))


def test_an_image_shape_of_both_readings_is_channels_first() -> None:
    x = torch.randint(256, (2, 3, 3, 3), dtype=torch.uint8)
    assert torch.equal(accept(x, (3, 3, 3), "test").x, x)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (CHW[:, :, :3], r"shape \(3, 3, 5\), but the model reads \(3, 4, 5\)"),
        (CHW.float(), "range from 0 to 255; give uint8, or floats in .0, 1., without normalisation"),
        (CHW.long(), "are int64"),
        ((CHW, Y, Y), "a tuple of 3"),
        ((CHW, Y[:3]), r"labels have shape \(3,\); give 12"),
        (5, "are a int; give a tensor or array"),
        ({"x": 1}, "are a dict"),
        (TensorDataset(CHW[:0]), "has no items"),
        ([CHW[0], CHW[1], CHW[2]], r"must be \[n, C, H, W\]|are a list"),
    ],
)
def test_forms_that_are_refused(given: Any, said: str) -> None:
    with pytest.raises(DodistillError, match=said):
        accept(given, RGB, "test", labels=True)


def test_distill_takes_them(teacher: nn.Module, digits: Images) -> None:
    assert digits.y is not None
    x, y = digits.x[:120], digits.y[:120]
    nhwc = x.permute(0, 2, 3, 1).numpy()
    results = [
        distill(teacher, student(), **tree("dfnd", steps=3), image_shape=SHAPE, verbose=False, unlabeled=u, test=t)
        for u, t in ((x, (x, y)), (nhwc, TensorDataset(x, y)), (TensorDataset(x, y), Images(x, y)))
    ]
    for other in results[1:]:
        same(other.student.state_dict(), results[0].student.state_dict())
        assert other.summary["student_accuracy"] == results[0].summary["student_accuracy"]
    learned = distill(
        teacher, student(), **tree("data", steps=3), image_shape=SHAPE, verbose=False, unlabeled=TensorDataset(x, y)
    )
    given = distill(
        teacher, student(), **tree("data", steps=3), image_shape=SHAPE, verbose=False, unlabeled=x, labels=y
    )
    same(learned.student.state_dict(), given.student.state_dict())


def test_short_names_of_settings(teacher: nn.Module) -> None:
    settings = tree("fast")
    long = distill(
        teacher, student(), image_shape=SHAPE, verbose=False,
        **{**settings, "loop": {**settings["loop"], "steps": 4, "seed": 3, "batch": 8}, "optim": {"lr": 0.02}},
    )  # fmt: skip
    loop = {k: v for k, v in settings["loop"].items() if k not in ("steps", "batch", "seed")}
    parts = {**settings, "loop": loop, "optim": {}}
    short = distill(teacher, student(), image_shape=SHAPE, verbose=False, steps=4, batch=8, lr=0.02, seed=3, **parts)
    same(short.student.state_dict(), long.student.state_dict())
    with pytest.raises(DodistillError, match=r"steps=4 and loop=\{'steps': 6\} are both given"):
        distill(teacher, student(), image_shape=SHAPE, steps=4, **settings)


@pytest.fixture
def result(teacher: nn.Module, digits: Images, tmp_path: Path) -> dodistill.Result:
    settings = tree("fast")
    return distill(
        teacher, student(), image_shape=SHAPE, verbose=False, out=tmp_path / "run",
        test=(digits.x[:100], digits.y[:100]), **settings,  # type: ignore[index]
    )  # fmt: skip


def test_history(result: dodistill.Result, teacher: nn.Module) -> None:
    assert {r["kind"] for r in result.history} == {"log", "eval", "pool"}
    assert [r["step"] for r in result.history] == sorted(r["step"] for r in result.history)
    steps, values = zip(*result.history.curve("agreement"))
    assert steps[-1] == 6
    assert values[-1] == result.summary["agreement_last"]
    with pytest.raises(DodistillError, match=r"nothing is logged as 'agrement'; there are .*agreement"):
        result.history.curve("agrement")
    lone = distill(teacher, student(), image_shape=SHAPE, verbose=False, **tree("fast"))
    assert lone.history.curve("match/kd") == result.history.curve("match/kd")


def test_a_data_frame(result: dodistill.Result) -> None:
    pandas = pytest.importorskip("pandas")
    frame = result.history.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == len(result.history)


def test_no_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DodistillError, match=r"pip install 'dodistill\[pandas\]'"):
        History().to_pandas()


def test_evaluate(result: dodistill.Result, teacher: nn.Module, digits: Images) -> None:
    assert digits.y is not None
    test = (digits.x[:100].numpy(), digits.y[:100].numpy())
    found = result.evaluate(test, teacher)
    assert set(found) == {"accuracy", "ECE", "class_shares", "images", "teacher", "agreement"}
    assert found == dodistill.evaluate(result.student, test, teacher=teacher, image_shape=SHAPE)
    assert found["images"] == 100
    assert dodistill.evaluate(teacher, digits)["accuracy"] > 90  # its shape is known
    with pytest.raises(DodistillError, match="have no labels"):
        result.evaluate(digits.x)
    with pytest.raises(DodistillError, match="a label is 19, but the model has 10 classes"):
        dodistill.evaluate(teacher, (digits.x[:20], torch.arange(20)))
    with pytest.raises(DodistillError, match="a label is 10, but the model has 10 classes"):
        result.evaluate((digits.x[:10], torch.arange(1, 11)))


def test_export(result: dodistill.Result, tmp_path: Path) -> None:
    path = result.export(tmp_path / "s.safetensors")
    x = torch.rand(3, *SHAPE)
    assert torch.equal(load_model(str(path)).eval()(x), result.student(x))
    with pytest.raises(DodistillError, match=r"s\.tflite; there are .*FILE\.onnx \(ONNX\), FILE\.pt2"):
        result.export(tmp_path / "s.tflite")


def test_how_it_is_shown(result: dodistill.Result, teacher: nn.Module) -> None:
    said = repr(result)
    assert said.startswith("Result(")
    assert f"agreement {result.summary['agreement']:.2f} %" in said
    assert len(said) < 300
    page = result._repr_html_()
    assert page.count("<svg") == 3
    assert "data:image/png;base64," in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_stopped_run(teacher: nn.Module) -> None:
    stopped = dodistill.Result(teacher, {"finished": False, "step": 3}, None)
    assert repr(stopped) == "Result(stopped at step 3, folder=None)"
    assert "stopped at step 3" in stopped._repr_html_()
