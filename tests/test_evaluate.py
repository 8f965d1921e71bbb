"""Measures against their definitions, and the images that they are taken on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dodistill.commands.cli import main
from dodistill.data.images import Images
from dodistill.errors import DodistillError
from dodistill.evaluation import evaluate
from dodistill.evaluation.evaluate import frechet_distance


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 4))


X = torch.randint(0, 256, (37, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_predict_is_the_eval_forward_and_restores_each_mode() -> None:
    model = net()
    model[0].eval()
    want = net().eval()(X.float() / 255)
    got = evaluate.predict(model, X, batch=10)
    assert torch.allclose(got, want, atol=1e-6)
    assert not got.requires_grad
    assert [m.training for m in model] == [False, True, True, True]
    assert model[0].num_batches_tracked == 0
    low = evaluate.predict(model, X, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert low.dtype == torch.float32
    assert torch.allclose(low, want, atol=0.05)
    assert not torch.equal(low, got)
    with pytest.raises(DodistillError, match="no images"):
        evaluate.predict(model, X[:0])


def test_mode_is_restored_after_an_exception() -> None:
    model = net()
    with pytest.raises(RuntimeError):
        evaluate.predict(model, X[:, :, :2])
    assert model.training


def test_accuracy_agreement_shares() -> None:
    logits = torch.tensor([[3.0, 1, 0], [0, 1, 0], [0, 1, 2], [5, 0, 0]])
    other = torch.tensor([[1.0, 2, 0], [0, 9, 0], [0, 1, 2], [5, 0, 0]])
    assert evaluate.top1(logits, torch.tensor([0, 1, 0, 2])) == 50
    assert evaluate.agreement(logits, other) == 75
    assert evaluate.class_shares(logits).tolist() == [0.5, 0.25, 0.25]
    assert evaluate.class_shares(logits[:1]).tolist() == [1, 0, 0]
    model = net().eval()
    y = model(X.float() / 255).argmax(1)
    assert evaluate.accuracy(model, Images(X, y)) == 100
    y[:10] = (y[:10] + 1) % 4
    assert evaluate.accuracy(model, Images(X, y), batch=7) == pytest.approx(100 * 27 / 37)
    with pytest.raises(DodistillError, match="labels"):
        evaluate.accuracy(model, Images(X))


def test_calibration_error_by_its_definition() -> None:
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(500, 5, generator=g) * 2, torch.randint(0, 5, (500,), generator=g)
    p = logits.softmax(1).numpy()
    confidence, right, want = p.max(1), p.argmax(1) == y.numpy(), 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            want += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert evaluate.expected_calibration_error(logits, y) == pytest.approx(want, abs=1e-5)
    sure = 50 * torch.eye(4)
    assert evaluate.expected_calibration_error(sure, torch.arange(4)) == pytest.approx(0, abs=1e-6)
    assert evaluate.expected_calibration_error(sure, torch.tensor([1, 2, 3, 0])) == pytest.approx(1)


def test_calibration_error_of_probabilities() -> None:
    """A model may end in a softmax: it is not applied twice."""
    logits = 4 * torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    y = torch.arange(50) % 3
    want = evaluate.expected_calibration_error(logits, y)
    assert evaluate.expected_calibration_error(logits.softmax(1), y) == pytest.approx(want, abs=1e-6)


NETS = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 3, padding=1)
    def forward(self, x):
        return self.conv(x).mean((2, 3))
class Map(Net):
    def forward(self, x):
        return super().forward(x)[:, :, None, None]
class Counts(Net):
    def forward(self, x):
        return super().forward(x).long()
"""


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("Net", "8,8,1", ["m.py:Net does not take images of shape (8, 8, 1)", "--image-shape"]),
        ("Map", "1,8,8", ["m.py:Map returns float32 of shape (2, 10, 1, 1)", "(2, classes)"]),
        ("Counts", "1,8,8", ["m.py:Counts returns int64"]),
    ],
)
def test_a_model_whose_answers_cannot_be_scored(
    name: str, shape: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(NETS)
    torch.save({"conv.weight": torch.rand(10, 1, 3, 3), "conv.bias": torch.rand(10)}, "w.pt")
    words = ["evaluate", f"m.py:{name}", "--weights", "w.pt", "--normalise", "none", "--image-shape", shape]
    assert main([*words, "--test", "digits"]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in said), error


def test_frechet_distance_is_its_equation() -> None:
    """Against scipy's matrix square root of C_a C_b itself, which is not symmetric."""
    linalg = pytest.importorskip("scipy.linalg")
    g = torch.Generator().manual_seed(0)
    a = torch.randn(60, 5, generator=g, dtype=torch.float64) @ torch.randn(5, 5, generator=g, dtype=torch.float64)
    b = torch.randn(80, 5, generator=g, dtype=torch.float64).cumsum(1) + 0.7
    C_a, C_b = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    root = linalg.sqrtm(C_a @ C_b).real
    apart = (a.mean(0) - b.mean(0)).square().sum().item()
    expected = apart + C_a.trace() + C_b.trace() - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_behaves_like_one() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(40, 6, generator=g), 2 * torch.randn(30, 6, generator=g) + 1
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(6 * 9, rel=1e-5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 1
    turn = torch.linalg.qr(torch.randn(6, 6, generator=g))[0]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b), rel=1e-4)
    few = a[:3]  # fewer rows than features: the covariance has no inverse, the distance is there
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    one = torch.tensor([[0.0], [2.0]])  # a single feature, by hand: deviations sqrt(2) and sqrt(8), means 1 and 4
    assert frechet_distance(one, torch.tensor([[2.0], [6.0]])) == pytest.approx(9 + 2 + 8 - 2 * 4)
    for bad in ((a, b[:, :5]), (a[:1], b), (a[0], b)):
        with pytest.raises(DodistillError, match="two sets"):
            frechet_distance(*bad)


@pytest.mark.parametrize(("more", "share"), [([], 0.875), (["--crop-share", "1"], 1.0)])
def test_every_command_reads_large_test_images_as_the_field_does(
    more: list[str], share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ramp across each picture: its range is the share of it that the model is shown. Training images are whole."""
    for part in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / part).mkdir(parents=True)
        for k in range(2):
            ramp = np.tile(np.linspace(0, 255, 320), (320, 1)).astype(np.uint8)
            Image.fromarray(ramp).save(tmp_path / part / f"{k}.png")
    shown: list[float] = []
    predict = evaluate.predict

    def watched(model: nn.Module, x: Tensor, *rest: object, **named: object) -> Tensor:
        shown.append(float(x[:1][0, 0, 0, -1].float() - x[:1][0, 0, 0, 0].float()) / 255)
        return predict(model, x, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate, "predict", watched)
    monkeypatch.setattr("dodistill.engine.score.predict", watched)
    monkeypatch.setattr("dodistill.engine.teach.predict", watched)
    file, data = f"{tmp_path}/t.safetensors", str(tmp_path)
    teach = [
        "teach",
        "tiny4",
        "--data",
        data,
        "--image-shape",
        "1,160,160",
        "--epochs",
        "1",
        "--batch",
        "2",
        "--out",
        file,
    ]
    assert main([*teach, "--minival", "0", *more]) == 0
    assert shown[0] == pytest.approx(1, abs=0.02)  # the pass before training
    assert shown[1:] == pytest.approx([share], abs=0.02)
    shown.clear()
    assert main(["evaluate", file, "--test", data, *more]) == 0
    assert shown == pytest.approx([share], abs=0.02)
    shown.clear()
    more = [flag.replace("--crop-share", "--data.crop_share") for flag in more]
    distil = ["distill", "--teacher", file, "--student", "tiny4", "--source", "real", "--unlabeled", data,
              "--test", data, "--steps", "1", "--batch", "2", "--quiet", "--no-report",
              "--out", f"{tmp_path}/run"]  # fmt: skip
    assert main([*distil, *more]) == 0
    assert {round(v, 1) for v in shown} == {round(share, 1), 1.0}  # 1.0: the images held back, which are not the test's
    capsys.readouterr()
