"""Models of timm, torchvision and Hugging Face with their published weights, and normalisations given, known or asked
for. Nothing here needs a network."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dodistill.commands.cli import main
from dodistill.config.grid import content
from dodistill.config.tree import Model, resolve
from dodistill.errors import DodistillError
from dodistill.models import NORMALISATION, Normalized, load_model, read_metadata, save_model
from dodistill.models.configured import load_student, load_trained
from dodistill.models.onnx import onnx_bytes
from helpers import tree

SHAPE = (3, 16, 16)


def images(n: int = 2, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


# ----------------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer and a ResNet, as save_pretrained writes them."""
    transformers = pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    vit = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        num_labels=5,
    )  # fmt: skip
    transformers.ViTForImageClassification(vit).save_pretrained(out / "vit")
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    transformers.ResNetForImageClassification(resnet).save_pretrained(out / "resnet")
    headless = transformers.ViTModel(vit)
    headless.save_pretrained(out / "headless")
    for name in ("vit", "resnet", "headless"):
        processor(out / name)
    return out


def processor(folder: Path, **changes: Any) -> None:
    values = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
              "image_std": [0.25, 0.2, 0.1], "size": {"height": 16, "width": 16}} | changes  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def test_a_hugging_face_model_brings_its_weights_and_its_normalisation(folder: Path) -> None:
    transformers = importlib.import_module("transformers")
    for name in ("vit", "resnet"):
        model = load_model(f"hf:{folder / name}").eval()
        theirs = transformers.AutoModelForImageClassification.from_pretrained(folder / name).eval()
        x = images()
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.25, 0.2, 0.1]))
        assert torch.allclose(model(x), theirs((x - mean) / std).logits, atol=1e-5)
        assert model.model.state_dict().keys() == theirs.state_dict().keys()
        known = {k: v for k, v in model.spec.items() if k in ("num_classes", "in_channels", "image_size")}
        assert known == {"num_classes": 5, "in_channels": 3, "image_size": 16}


@pytest.mark.parametrize(
    ("changes", "mean", "std"),
    [
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, 0.5, 0.2),
        ({"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False}, 0.5, 0.5),
        ({"do_normalize": False}, 0.0, 1.0),
        ({"do_normalize": False, "do_rescale": False}, 0.0, 1 / 255),
    ],
)  # fmt: skip
def test_every_way_of_an_image_processor(
    changes: dict[str, Any], mean: float, std: float, folder: Path, tmp_path: Path
) -> None:
    for file in (folder / "resnet").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    processor(tmp_path, **changes)
    model = load_model(f"hf:{tmp_path}")
    assert model.mean.flatten().tolist() == pytest.approx([mean] * len(model.mean.flatten()))
    assert model.std.flatten().tolist() == pytest.approx([std] * len(model.std.flatten()))
    processor(tmp_path, do_flip_channel_order=True)
    with pytest.raises(DodistillError, match="blue, green, red"):
        load_model(f"hf:{tmp_path}")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(DodistillError, match=r"give --teacher\.normalise NAME"):
        load_trained(Model(f"hf:{tmp_path}"), SHAPE)


def test_it_is_a_teacher_and_a_student_from_the_command_line_to_the_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    spec = f"hf:{folder / 'resnet'}"
    words = ["distill", "--teacher", spec, "--student", spec, "--source", "noise", "--source.n", "60", "--steps", "3",
             "--source.candidates", "80", "--source.batch", "20", "--augment.pad", "1", "--loop.batch", "8", "--quiet",
             "--device", "cpu", "--no-report"]  # fmt: skip
    assert main([*words, "--out", str(out)]) == 0
    file = out / "student.safetensors"
    student = load_model(str(file)).eval()
    assert not torch.allclose(student(images()), load_model(spec).eval()(images()))  # a student starts afresh
    moved = folder / "moved"
    (folder / "resnet").rename(moved)  # the file holds what builds the network again
    try:
        assert torch.equal(load_model(str(file)).eval()(images()), student(images()))
    finally:
        moved.rename(folder / "resnet")
    capsys.readouterr()
    for k in range(5):
        (tmp_path / "test" / str(k)).mkdir(parents=True)
        picture(tmp_path / "test" / str(k) / "a.png", k)
    assert main(["evaluate", str(file), "--test", str(tmp_path / "test"), "--teacher", spec]) == 0
    assert "agreement" in capsys.readouterr().out
    assert main(["evaluate", spec, "--test", str(tmp_path / "test")]) == 0


def picture(path: Path, k: int) -> None:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.random.default_rng(k).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)


def test_a_student_of_its_architecture_has_the_classes_and_the_shape_of_its_teacher(folder: Path) -> None:
    teacher = load_model("tiny4", num_classes=7, in_channels=1, image_size=8, mean="mnist", seed=0)
    student = load_student(Model(f"hf:{folder / 'vit'}"), teacher, 7, (1, 8, 8), seed=0)
    assert student(images(shape=(1, 8, 8))).shape == (2, 7)
    assert torch.equal(student.mean, teacher.mean)
    with pytest.raises(DodistillError, match="have 5 classes, but num_classes is 7"):
        load_student(Model(f"hf:{folder / 'vit'}", weights="pretrained"), teacher, 7, (1, 8, 8), seed=0)


def test_what_transformers_would_do_in_silence_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    with pytest.raises(DodistillError, match=r"lack classifier.*random"):
        load_model(f"hf:{folder / 'headless'}")
    with pytest.raises(DodistillError, match="5 classes, but num_classes is 3"):
        load_model(f"hf:{folder / 'vit'}", num_classes=3)
    with pytest.raises(DodistillError, match="takes 3 channels, not 1"):
        load_model(f"hf:{folder / 'vit'}", in_channels=1)
    with pytest.raises(DodistillError, match="neither a folder"):
        load_model(f"hf:{tmp_path / 'gone'}")
    code = tmp_path / "code"
    code.mkdir()
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForImageClassification": "m.N"}}
    (code / "config.json").write_text(json.dumps(config))
    (code / "mine.py").write_text(f"import os; os.mkdir({str(tmp_path / 'sprung')!r})")
    (code / "model.safetensors").write_bytes(b"")
    with pytest.raises(DodistillError, match="runs no code of a repository"):
        load_model(f"hf:{code}")
    assert not (tmp_path / "sprung").exists()
    (code / "model.safetensors").rename(code / "pytorch_model.bin")
    with pytest.raises(DodistillError, match="no weights in safetensors"):
        load_model(f"hf:{code}")

    def offline(_repo: str, **_given: Any) -> str:
        raise OSError("cannot find the host")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(DodistillError, match=r"cannot be fetched \(cannot find the host\).*hf download OWNER/NAME"):
        load_model("hf:OWNER/NAME@main")


def test_the_name_on_the_hub_is_looked_up_in_the_cache_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[tuple[str, Any, bool]] = []

    def cached(repo: str, revision: Any = None, local_files_only: bool = False, **_given: Any) -> str:
        asked.append((repo, revision, local_files_only))
        return str(folder / "vit")

    monkeypatch.setattr(hub, "snapshot_download", cached)
    assert load_model("hf:OWNER/NAME@v1").spec["num_classes"] == 5
    assert asked == [("OWNER/NAME", "v1", True)]


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DodistillError, match=r"pip install 'dodistill\[hf\]'"):
        load_model("hf:OWNER/NAME")


def test_the_content_of_a_model_identifies_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for one in (a, b):
        one.mkdir()
        (one / "config.json").write_text("{}")
        (one / "model.safetensors").write_bytes(b"0123456789")
    assert content(f"hf:{a}") == content(f"hf:{b}")
    (b / "preprocessor_config.json").write_text("{}")
    assert content(f"hf:{a}") != content(f"hf:{b}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert content("hf:OWNER/NAME") == "hf:OWNER/NAME"
    refs = tmp_path / "models--OWNER--NAME" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0f0f\n")
    assert content("hf:OWNER/NAME") == "hf:OWNER/NAME@0f0f"


# --------------------------------------------------------------------------------------- timm and torchvision


def test_published_weights_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_resnet")
    builder = importlib.import_module("timm.models._builder")
    monkeypatch.setattr(builder, "load_state_dict_from_hf", lambda *_, **__: dict(net.state_dict()))
    model = load_model("timm:test_resnet", weights="pretrained")
    assert torch.equal(model.model.state_dict()["conv1.0.weight"], net.state_dict()["conv1.0.weight"])
    cfg = net.pretrained_cfg
    assert model.spec["num_classes"] == cfg["num_classes"]
    assert (model.spec["in_channels"], model.spec["image_size"]) == (3, cfg["input_size"][1])
    assert model.mean.flatten().tolist() == pytest.approx(cfg["mean"])
    assert load_model("timm:test_resnet", weights="pretrained", in_channels=1)(images(shape=(1, 64, 64))).shape[0] == 2
    with pytest.raises(DodistillError, match=f"have {cfg['num_classes']} classes, but num_classes is 5"):
        load_model("timm:test_resnet", weights="pretrained", num_classes=5)

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no host")

    monkeypatch.setattr(builder, "load_state_dict_from_hf", offline)
    with pytest.raises(DodistillError, match=r"timm:test_resnet are not here, and cannot be fetched \(no host\)"):
        load_model("timm:test_resnet", weights="pretrained")
    with pytest.raises(DodistillError, match="unknown weights 'r16'"):
        load_model("timm:test_resnet.r16", weights="pretrained")


def test_published_weights_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision").models
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = models.get_model_weights("squeezenet1_1").DEFAULT
    cached = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.manual_seed(0)
    net = models.squeezenet1_1()
    torch.save(net.state_dict(), cached)
    model = load_model("torchvision:squeezenet1_1", weights="pretrained")
    assert torch.equal(model.model.features[0].weight, net.features[0].weight)
    assert [model.spec[k] for k in ("num_classes", "in_channels", "image_size")] == [1000, 3, 224]
    with pytest.raises(DodistillError, match="have 1000 classes, but num_classes is 10"):
        load_model("torchvision:squeezenet1_1", weights="pretrained", num_classes=10)

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.mkdir, (tmp_path / "sprung",)

    torch.save({"x": Bomb()}, cached)
    with pytest.raises(DodistillError, match="would run code when read"):
        load_model("torchvision:squeezenet1_1", weights="pretrained")
    assert not (tmp_path / "sprung").exists()


def test_what_has_no_published_weights(tmp_path: Path) -> None:
    with pytest.raises(DodistillError, match="wrn16_1 has no published weights"):
        load_model("wrn16_1", weights="pretrained")


# ------------------------------------------------------------------------------------------- normalisation


def test_a_normalisation_that_is_not_known_is_asked_for(tmp_path: Path) -> None:
    torch.save(load_model("tiny4", num_classes=10, seed=0).model.state_dict(), tmp_path / "w.pth")
    file = str(tmp_path / "w.pth")
    with pytest.raises(DodistillError, match=r"w.pth does not say which normalisation .*give mean=NAME"):
        load_model("tiny4", weights=file)
    with pytest.raises(DodistillError, match=r"give --teacher.normalise NAME .*none.* or --teacher.mean 0.5"):
        load_trained(Model("tiny4", weights=file), (1, 8, 8))
    for given in ({"normalise": "none"}, {"normalise": "mnist"}, {"mean": (0.3,), "std": (0.4,)}, {"input_range": 255}):
        load_trained(Model("tiny4", weights=file, **given), (1, 8, 8))
    load_student(Model("tiny4", weights=file), load_model("tiny4", num_classes=10), 10, (1, 8, 8), 0)  # the teacher's
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\nfrom dodistill import Normalized\n"
        "def make(): return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))\n"
        "def whole(): return Normalized(make(), [0.3], [0.4])\n"
        "def fixed():\n    torch.manual_seed(0)\n    return make()\n"
    )
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).state_dict(), tmp_path / "n.pth")
    with pytest.raises(DodistillError, match="does not say which normalisation"):
        load_model(f"{tmp_path}/net.py:make", weights=tmp_path / "n.pth")
    assert load_model(f"{tmp_path}/net.py:whole", weights=tmp_path / "n.pth").mean.item() == pytest.approx(0.3)
    with pytest.raises(DodistillError, match=r"net.py:make returns random weights .*give --teacher.weights FILE"):
        load_trained(Model(f"{tmp_path}/net.py:make"), (1, 2, 2))
    load_trained(Model(f"{tmp_path}/net.py:make", weights="random"), (1, 2, 2))
    load_trained(Model(f"{tmp_path}/net.py:fixed"), (1, 2, 2))


@pytest.mark.parametrize(
    ("given", "works_on"),
    [
        ({"mean": (124.0, 116.0, 104.0), "std": (58.0, 57.0, 57.5), "input_range": 255.0}, lambda x: (255 * x - M) / S),
        ({"input_range": 255.0}, lambda x: 255 * x),
        ({"normalise": "none", "input_range": 255.0}, lambda x: 255 * x),
        ({"mean": (0.5,), "std": (0.5,)}, lambda x: 2 * x - 1),
    ],
)
def test_custom_normalisations_and_inputs_to_255(given: dict[str, Any], works_on: Any, tmp_path: Path) -> None:
    """From the config to the file: the network reads what its own preprocessing would give."""
    net = load_model("tiny4", num_classes=10, in_channels=3, image_size=16, seed=0)
    torch.save(net.model.state_dict(), tmp_path / "w.pth")
    model = load_trained(Model("tiny4", weights=str(tmp_path / "w.pth"), **given), SHAPE).eval()
    x = images()
    want = net.eval().model(works_on(x))
    assert torch.allclose(model(x), want, rtol=1e-4, atol=1e-4)
    save_model(model, tmp_path / "m.safetensors")
    assert torch.allclose(load_model(str(tmp_path / "m.safetensors")).eval()(x), want, rtol=1e-4, atol=1e-4)
    student = load_student(Model("tiny4"), model, 10, SHAPE, 0)
    assert torch.equal(student.std, model.std)


M, S = (torch.tensor(v).view(1, 3, 1, 1) for v in ((124.0, 116.0, 104.0), (58.0, 57.0, 57.5)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mean": (0.5,)}, "give both"),
        ({"normalise": "mnist", "std": (0.5,)}, "--teacher.normalise mnist and --teacher.std are both given"),
        ({"normalise": "imagenet", "input_range": 255.0}, "imagenet is for inputs in"),
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, "2 channels"),
    ],
)
def test_what_does_not_fit_together(given: dict[str, Any], said: str, teacher_file: Path) -> None:
    with pytest.raises(DodistillError, match=said):
        load_trained(Model(str(teacher_file), **given), (0, 0, 0))
    with pytest.raises(DodistillError, match="input_range is 0"):
        resolve(tree(), {"teacher.input_range": 0.0})


def test_the_flags_of_every_command(teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """-, _ and . are the same in a flag's name, and one number is a list of one."""
    net = load_model(str(teacher_file))
    torch.save(net.model.state_dict(), tmp_path / "w.pth")
    teacher = ["--teacher", "tiny8", "--teacher-weights", f"{tmp_path}/w.pth"]
    words = ["evaluate", str(teacher_file), "--test", "digits", *teacher]
    assert main(words) == 2
    assert "give --teacher.normalise NAME" in capsys.readouterr().err
    assert main([*words, "--teacher_mean", "0.3", "--teacher.std=0.4"]) == 0
    assert "agreement 100.00 %" in capsys.readouterr().out
    mine = ["evaluate", "tiny8", "--weights", f"{tmp_path}/w.pth", "--test", "digits", "--image-shape", "1,8,8"]
    assert main([*mine, "--mean", "76.5", "--std", "102", "--input-range", "255"]) == 0
    assert "accuracy" in capsys.readouterr().out
    taught = ["teach", "tiny4", "--data", "digits", "--epochs", "1", "--flip", "false", "--pad", "1"]
    assert main([*taught, "--mean", "0.3", "--std", "0.4", "--out", f"{tmp_path}/t.safetensors"]) == 0
    assert read_metadata(tmp_path / "t.safetensors")["mean"] == pytest.approx([0.3])
    recipe = tmp_path / "grid.yaml"
    recipe.write_text(
        f"base: {{student: tiny4, teacher: {{spec: tiny8, weights: {tmp_path}/w.pth, mean: [0.3], std: [0.4]}}}}\n"
        "grid: {seed: [0]}\n"
    )
    assert main(["compare", str(recipe), "--dry-run", "--out", str(tmp_path / "out")]) == 0


def test_a_random_model_is_never_scored_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "tiny4", "--test", "digits", "--image-shape", "1,8,8"]) == 2
    assert "--weights random, if that is meant" in capsys.readouterr().err
    random = ["evaluate", "tiny4", "--weights", "random", "--num-classes", "10", "--image-shape", "1,8,8"]
    assert main([*random, "--test", "digits"]) == 0


def test_inputs_to_255_are_in_the_exported_file() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    session = pytest.importorskip("onnxruntime").InferenceSession
    model = Normalized(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), *NORMALISATION["none"]).eval()
    wide = Normalized(model.model, [0.0], [1 / 255]).eval()
    x = torch.rand(2, 3, 2, 2)
    (found,) = session(onnx_bytes(wide, (3, 2, 2))).run(None, {"images": x.numpy()})
    assert torch.allclose(torch.tensor(found), model.model(255 * x), rtol=1e-3, atol=1e-3)
