"""Students as files for deployment: each answers as the student does, is timed, and needs no data."""

from __future__ import annotations

import copy
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import dodistill
from dodistill import DodistillError, distill, load_model
from dodistill.commands.cli import main
from dodistill.data.images import Images
from dodistill.engine.inputs import FILE, Inputs, read_inputs, sample
from dodistill.engine.run_folder import drop_checkpoints
from dodistill.evaluation.evaluate import agreement, predict
from dodistill.evaluation.latency import LEAST, latency
from dodistill.evaluation.parity import Parity, answers, parity
from dodistill.functional.draws import even
from dodistill.models import Normalized
from dodistill.report.ship import of_images, ship
from helpers import SHAPE, student, tree

ONNX = ("onnx", "onnxscript", "onnxruntime")


@pytest.fixture(scope="module")
def made(taught: Normalized, tmp_path_factory: pytest.TempPathFactory) -> dodistill.Result:
    """A run of a few steps, in a folder."""
    settings = {k: v for k, v in tree("procedural", steps=12).items() if k not in ("source", "intervention")}
    settings["pool"] = {"holdout": 0.3}
    net = load_model("tiny4", num_classes=10, in_channels=1, image_size=8, mean=[0.3], std=[0.4], seed=1)
    source = tree("procedural")["source"]
    out = tmp_path_factory.mktemp("ship") / "run"
    return distill(copy.deepcopy(taught), net, source, image_shape=SHAPE, out=out, verbose=False, **settings)


@pytest.fixture
def run(made: dodistill.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its folder, in the working directory."""
    assert made.folder is not None
    shutil.copytree(made.folder, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def pictures(n: int) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(3))


# ----------------------------------------------------------------------------------------------- the sample


def test_even_shares() -> None:
    classes = torch.tensor([0] * 50 + [1] * 3 + [3] * 20)
    drawn = even(classes, 21, torch.Generator().manual_seed(0))
    assert len(set(drawn.tolist())) == 21
    assert torch.bincount(classes[drawn], minlength=4).tolist() == [9, 3, 0, 9]
    assert not torch.equal(drawn, even(classes, 21, torch.Generator().manual_seed(1)))
    assert len(even(classes, 500, torch.Generator().manual_seed(0))) == 73


def test_the_sample_is_bounded() -> None:
    t = torch.eye(4).repeat(300, 1)
    small = sample(torch.zeros(1200, 1, 2, 2, dtype=torch.uint8), t, torch.zeros(9, 1, 2, 2, dtype=torch.uint8), t[:9])
    assert (len(small.x), len(small.t), len(small.held), len(small.held_t)) == (512, 512, 9, 9)
    assert torch.bincount(small.t.argmax(1)).tolist() == [128] * 4
    large = torch.zeros(1, 3, 2048, 2048, dtype=torch.uint8).expand(9, -1, -1, -1)
    assert len(sample(large, t[:9], large, t[:9]).x) == 2


def test_a_run_keeps_a_sample(made: dodistill.Result, run: Path, taught: Normalized) -> None:
    kept = read_inputs(run)
    assert kept is not None
    assert made.kept is not None
    for name, value in vars(kept).items():
        assert torch.equal(value, getattr(made.kept, name)), name
    assert agreement(predict(taught, kept.held), kept.held_t) == 100
    assert agreement(predict(taught, kept.x), kept.t) == 100
    (run / FILE).unlink()  # a run of an older version
    from_checkpoint = read_inputs(run)
    assert from_checkpoint is not None
    assert torch.equal(from_checkpoint.x, kept.x)
    assert torch.equal(from_checkpoint.held_t, kept.held_t)
    drop_checkpoints(run)
    assert read_inputs(run) is None


@pytest.mark.parametrize("how", ["cut", "missing", "more", "shape", "type"])
def test_a_damaged_sample(how: str, run: Path) -> None:
    path, kept = run / FILE, read_inputs(run)
    assert kept is not None
    parts = dict(vars(kept))
    changed = {
        "missing": {"x": parts["x"]}, "more": parts | {"z": parts["x"]}, "shape": parts | {"t": parts["t"][:2]},
        "type": parts | {"held": parts["held"].float()},
    }  # fmt: skip
    if how == "cut":
        path.write_bytes(path.read_bytes()[:300])
    else:
        save_file({k: v.clone() for k, v in changed[how].items()}, path)
    with pytest.raises(DodistillError, match=r"inputs\.safetensors is damaged .* --calibrate DATA"):
        read_inputs(run)


# ------------------------------------------------------------------------------------------------- parity


def test_parity() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, -400.0]])
    assert parity(a, a + 0.01) == Parity(pytest.approx(0.01, rel=1e-2), 400.0, 100.0, 2)
    assert parity(a, a + 0.3).exact
    assert not parity(a, a + 0.5).exact
    assert parity(a, a.flip(1)).same == 0
    assert not parity(a, a * torch.nan).exact
    assert not parity(a, a[:, :1]).exact


@pytest.mark.parametrize("n", [1, 2, 5, 33])
def test_answers_asks_for_one_image_alone(n: int) -> None:
    sizes: list[int] = []

    def run(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return images.flatten(1)

    x = torch.arange(n * 4, dtype=torch.uint8).view(n, 1, 2, 2)
    assert torch.allclose(answers(run, x, batch=4) * 255, x.flatten(1).float())
    assert sizes[-1] == 1
    assert max(sizes) <= 4


def test_latency() -> None:
    batches: list[int] = []

    def run(images: Tensor) -> None:
        batches.append(len(images))

    one, many = latency(run, SHAPE)
    assert one is not None
    assert many is not None
    assert batches.count(1) > LEAST
    assert batches.count(32) > LEAST

    def slow(images: Tensor) -> None:
        time.sleep(0.12)

    assert latency(slow, SHAPE)[1] is None  # 32 of them would take seconds


class Changed(nn.Module):
    """Answers differently once it is exported, as some models of libraries do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits.flip(1) if torch.compiler.is_compiling() else logits


class Branches(Changed):
    """Python decides by the values of the images."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits if float(logits.sum()) > 0 else logits * 2


def test_a_file_that_would_answer_differently_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.pt2"
    with pytest.raises(DodistillError, match=r"would not answer as the student does: max .difference.*Nothing was wri"):
        ship(Changed(student()), [path], SHAPE, None)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"the one before")
    with pytest.raises(DodistillError, match=r"drawn pictures \(no images of a run are at hand\)"):
        ship(Changed(student()), [path], SHAPE, None)
    assert path.read_bytes() == b"the one before"


def test_a_network_that_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(DodistillError, match=r"cannot be exported by torch\.export: .*FILE\.onnx.*FILE\.safetensors"):
        ship(Branches(student()), [tmp_path / "s.pt2"], SHAPE, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run"], "export what? Give files that end in .int8.onnx, .onnx, .pt2, .safetensors, or a folder"),
        (["nowhere", "s.pt2"], "there is no run folder nowhere (looked for from /"),
        (["run/config.json", "s.pt2"], "run/config.json is neither a run folder nor a .safetensors"),
        (["run", "s.tflite"], "cannot export to s.tflite; there are FILE.int8.onnx"),
        (["run", "s.pt2", "images"], "cannot export to images; there are"),
        (["run", "nowhere/run/s.pt2", "--calibrate", "none.npz"], "none.npz"),
        (["run", "run/student.safetensors"], "run/student.safetensors is there already"),
        (["run/student.safetensors", "s.int8.onnx"], "unlabelled images (--calibrate DATA"),
    ],
)
def test_refused(words: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str],
                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("dodistill.report.ship.require_onnx", lambda: None)  # the refusals come before
    before = sorted(Path().iterdir())
    assert main(["export", *words]) == 2
    assert said in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before


# ------------------------------------------------------------------------------------------------- formats


def test_pt2(made: dodistill.Result, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run", "s.pt2"]) == 0
    said = capsys.readouterr().out
    kept = read_inputs(run)
    assert kept is not None
    assert re.search(
        rf"s\.pt2: max .*, same class on 100\.00 % of {len(kept.held)} inputs that the run held back", said
    )
    more = {"dodistill.json": ""}
    module = torch.export.load("s.pt2", extra_files=more).module()
    for n in (1, 2, 33):
        assert torch.allclose(module(pictures(n)), made.student(pictures(n)), rtol=1e-4, atol=1e-5)
    told = json.loads(more["dodistill.json"])
    assert told["mean"] == pytest.approx([0.3])
    assert told["image_shape"] == [1, 8, 8]
    assert told["dodistill"] == dodistill.__version__
    rows = re.findall(r"^(.*?) {2,}([\d.]+) +([\d.]+) +([\d.]+)$", said, re.M)
    assert [name for name, *_ in rows] == ["the student in torch", "s.pt2"]
    assert [float(kb) for _, kb, *_ in rows] == [
        round(f.stat().st_size / 1000, 1) for f in (run / "student.safetensors", Path("s.pt2"))
    ]
    assert all(float(ms) > 0 for _, _, *both in rows for ms in both)
    assert re.search(r"^median on one thread of .+\(.+\)$", said, re.M)


def test_what_a_file_tells_of_classes_and_shape(tmp_path: Path) -> None:
    net = load_model("tiny4", num_classes=3, in_channels=1, image_size=(8, 6), classes=["a", "b", "c"], seed=0)
    ship(net, [tmp_path / "s.pt2"], (1, 8, 6), None)
    more = {"dodistill.json": ""}
    module = torch.export.load(str(tmp_path / "s.pt2"), extra_files=more).module()
    assert module(torch.rand(5, 1, 8, 6)).shape == (5, 3)
    told = json.loads(more["dodistill.json"])
    assert told["classes"] == ["a", "b", "c"]
    assert told["image_shape"] == [1, 8, 6]


def test_safetensors(made: dodistill.Result, run: Path) -> None:
    assert main(["export", "run", "new/folder/weights.safetensors"]) == 0
    assert torch.equal(load_model("new/folder/weights.safetensors").eval()(pictures(3)), made.student(pictures(3)))


@pytest.fixture(scope="module")
def files(made: dodistill.Result, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with s.onnx and s.int8.onnx, and what the command said."""
    for name in ONNX:
        pytest.importorskip(name)
    assert made.folder is not None
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        assert main(["export", str(made.folder), str(folder / "s.onnx"), str(folder / "s.int8.onnx")]) == 0
    return folder, "\n".join(said)


def session(path: Path) -> Any:
    return pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_onnx(made: dodistill.Result, files: tuple[Path, str]) -> None:
    folder, said = files
    net = session(folder / "s.onnx")
    for n in (1, 2, 33):
        (logits,) = net.run(None, {"images": pictures(n).numpy()})
        np.testing.assert_allclose(logits, made.student(pictures(n)).detach().numpy(), rtol=1e-3, atol=1e-4)
    told = net.get_modelmeta().custom_metadata_map
    assert json.loads(told["mean"]) == pytest.approx([0.3])
    assert json.loads(told["std"]) == pytest.approx([0.4])
    assert json.loads(told["image_shape"]) == [1, 8, 8]
    assert told["dodistill"] == dodistill.__version__
    assert told["spec"] == "tiny4"
    assert re.search(r"s\.onnx: max \|difference\| of logits [\d.e-]+ \(logits to .*, same class on 100\.00 %", said)


def test_an_exported_file_is_scored(
    files: tuple[Path, str], run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As the student is, and only by what applies to it."""
    said = []
    for model in (run / "student.safetensors", files[0] / "s.onnx"):
        assert main(["evaluate", str(model), "--test", "digits", "--teacher", str(run / "student.safetensors")]) == 0
        said.append(capsys.readouterr().out.splitlines()[1:])
    assert said[0][0] == said[1][0]
    assert "agreement 100.00 %" in said[1][-1]
    (tmp_path / "other.onnx").write_bytes(b"no network")
    for words, fix in (
        (["evaluate", str(files[0] / "s.int8.onnx"), "--probe", "digits"], "--probe is not for"),
        (["evaluate", "other.onnx", "--test", "digits"], "onnxruntime does not read other.onnx"),
        (["evaluate", "nowhere.onnx", "--test", "digits"], "there is no file nowhere.onnx"),
        (["evaluate", "s.pt2", "--test", "digits"], "s.pt2 is an exported file, not a model; give the student"),
    ):
        assert main(words) == 2
        assert fix in capsys.readouterr().err


def test_the_code_in_the_readme(
    files: tuple[Path, str], run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a PNG that the command writes. The student of the readme reads 16 x 16 pixels, this one 8 x 8."""
    folder, _ = files
    text = (Path(__file__).parent.parent / "README.md").read_text().partition("## Ship it")[2]
    code = text.partition("```python\n")[2].partition("```")[0]
    assert main(["export", "run", "pictures"]) == 0
    picture = next(Path("pictures").rglob("*.png"))
    code, found = re.subn(r"pictures/\d+/\d+\.png", picture.as_posix(), code.replace("(16, 16)", "(8, 8)"))
    assert found == 1
    shutil.copy(folder / "s.onnx", "student.onnx")
    capsys.readouterr()
    exec(code, {})
    image = torch.from_numpy(np.asarray(Image.open(picture)).copy())[None, None]
    assert capsys.readouterr().out == f"[{predict(load_model('run/student.safetensors'), image).argmax()}]\n"


def test_int8(made: dodistill.Result, files: tuple[Path, str]) -> None:
    onnx = pytest.importorskip("onnx")
    folder, said = files
    kept = made.kept
    assert kept is not None
    graph = onnx.load(folder / "s.int8.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    whole = [w for w in weights.values() if w.dtype == np.int8 and w.ndim == 4]
    assert whole
    assert max(np.abs(w).max() for w in whole) <= 64  # 7 bits: no product overflows on processors without VNNI
    read = [n.input for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in weights]
    scales = [scale for w, scale, *_ in read if weights[w].ndim == 4]
    assert scales
    assert all(weights[scale].ndim == 1 and len(weights[scale]) > 1 for scale in scales)  # one for each channel
    net = session(folder / "s.int8.onnx")
    told = net.get_modelmeta().custom_metadata_map
    assert told["quantised"] == f"int8, calibrated on {len(kept.x)} images"
    (logits,) = net.run(None, {"images": (kept.held.float() / 255).numpy()})
    before = agreement(predict(made.student, kept.held), kept.held_t)
    after = agreement(torch.from_numpy(logits), kept.held_t)
    assert f"of {len(kept.held)} inputs that the run held back; agreement with the teacher {before:.2f} %" in said
    assert f" before, {after:.2f} % after" in said
    rows = re.findall(r"^(.*?) {2,}[\d.]+ +[\d.]+ +[\d.]+$", said, re.M)
    assert [Path(row).name for row in rows] == ["the student in torch", "s.onnx", "s.int8.onnx"]


def test_result_export_int8(made: dodistill.Result, digits: Images, tmp_path: Path,
                            capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    for name in ONNX:
        pytest.importorskip(name)
    path = made.export(tmp_path / "s.int8.onnx", verbose=False)
    assert path == tmp_path / "s.int8.onnx"
    assert capsys.readouterr().out == ""
    assert session(path).run(None, {"images": pictures(2).numpy()})[0].shape == (2, 10)
    made.export(path, calibrate=digits.x[:40].numpy())
    said = capsys.readouterr().out
    assert "same class on" in said
    assert "of 10 images given\n" in said
    assert "the student in float ONNX" in said
    bare = dodistill.Result(made.student, made.summary, None, image_shape=SHAPE)
    with pytest.raises(DodistillError, match="calibrate=IMAGES"):
        bare.export(tmp_path / "t.int8.onnx")


def test_images_of_the_user_replace_a_dropped_pool(
    run: Path, teacher_file: Path, digits: Images, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ONNX:
        pytest.importorskip(name)
    (run / FILE).unlink()
    drop_checkpoints(run)
    assert main(["export", "run", "s.int8.onnx"]) == 2
    said = capsys.readouterr().err
    assert "--calibrate DATA" in said
    config = json.loads((run / "config.json").read_text())
    config["teacher"]["spec"] = str(teacher_file)
    (run / "config.json").write_text(json.dumps(config))
    assert main(["export", "run", "s.int8.onnx", "--calibrate", "digits"]) == 0
    said = capsys.readouterr().out
    assert "of 324 images of digits; agreement with the teacher " in said
    assert main(["export", "run/student.safetensors", "s.pt2", "--calibrate", "digits"]) == 0
    assert "same class on 100.00 % of 324 images of digits" in capsys.readouterr().out


def test_onnx_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ONNX:
        pytest.importorskip(name)
    images = of_images(torch.zeros(8, *SHAPE, dtype=torch.uint8), "images given")
    with pytest.raises(DodistillError, match=r"cannot be exported to ONNX: .*FILE\.pt2 .* FILE\.safetensors"):
        ship(Branches(student()), [tmp_path / "s.onnx"], SHAPE, None)
    with pytest.raises(DodistillError, match=r"s\.int8\.onnx would not answer as the student does"):
        ship(Changed(student()), [tmp_path / "s.int8.onnx"], SHAPE, images)
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(DodistillError, match=r"onnxruntime: pip install 'dodistill\[onnx\]'"):
        ship(student(), [tmp_path / "s.onnx"], SHAPE, None)


def test_the_sample_is_what_was_given() -> None:
    x = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1)
    material = of_images(x, "images given")
    assert (len(material.x), len(material.held)) == (15, 5)
    assert sorted(torch.cat([material.x, material.held]).flatten().tolist()) == list(range(20))
    assert len(of_images(x[:1], "images given").x) == 1
    assert Inputs.__dataclass_fields__.keys() == {"x", "t", "held", "held_t"}


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_model_for_images_that_are_not_square(ending: str, tmp_path: Path) -> None:
    if ending == "onnx":
        for name in ONNX:
            pytest.importorskip(name, reason="needs the extra `onnx`")
    net = load_model("tiny4", num_classes=3, in_channels=1, image_size=(8, 12), seed=0)
    kept = tmp_path / "net.safetensors"
    dodistill.save_model(net, kept)
    path = tmp_path / f"net.{ending}"
    assert main(["export", str(kept), str(path)]) == 0
    x = torch.rand(5, 1, 8, 12)
    with torch.no_grad():
        wanted = load_model(str(kept)).eval()(x)
    if ending == "onnx":
        found = session(path)
        assert [d for d in found.get_inputs()[0].shape if isinstance(d, int)] == [1, 8, 12]
        logits = torch.from_numpy(found.run(None, {found.get_inputs()[0].name: x.numpy()})[0])
    else:
        logits = torch.export.load(path).module()(x)
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_weights_without_an_image_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the flag, and the flag helps."""
    kept = tmp_path / "net.safetensors"
    net = load_model("tiny4", num_classes=3, in_channels=1, image_size=8, seed=0)
    del net.spec["image_size"]
    dodistill.save_model(net, kept)
    words = ["export", str(kept), str(tmp_path / "net.pt2")]
    assert main(words) == 2
    assert "do not contain its image shape; give --image-shape" in capsys.readouterr().err
    assert main([*words, "--image-shape", "1,8,8"]) == 0
    assert torch.export.load(tmp_path / "net.pt2").module()(torch.rand(2, 1, 8, 8)).shape == (2, 3)


def test_another_image_shape_than_that_of_the_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = dodistill.save_model(load_model("tiny4", num_classes=3, in_channels=1, image_size=8, seed=0),
                                tmp_path / "net.safetensors")  # fmt: skip
    assert main(["export", str(kept), str(tmp_path / "net.pt2"), "--image-shape", "3,8,8"]) == 2
    assert "--image-shape is 3,8,8, but the weights are for images of 1,8,8; remove it" in capsys.readouterr().err
