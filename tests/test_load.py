"""Models from anywhere, weights in and out, and every way in which they may not fit."""

import argparse
import os
import pickle
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dodistill.commands.cli import main
from dodistill.errors import DodistillError
from dodistill.models import NORMALISATION, Normalized, load_model, read_metadata, save_model


def tiny(classes: int = 10, **kwargs) -> Normalized:
    return load_model("tiny8", num_classes=classes, seed=1, **kwargs)


def same(a: nn.Module, b: nn.Module) -> bool:
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return torch.allclose(a.eval()(x), b.eval()(x), rtol=1e-4, atol=1e-5)  # formats and versions round differently


def test_normalisation_by_name_by_value_and_default() -> None:
    x = torch.rand(2, 3, 8, 8)
    mean, std = NORMALISATION["cifar10"]
    net = Normalized(nn.Identity(), mean, std)
    for c in range(3):
        assert torch.allclose(net(x)[:, c], (x[:, c] - mean[c]) / std[c])
    assert load_model("wrn16_1", num_classes=2, mean="cifar10").std.flatten().tolist() == pytest.approx(std)
    assert torch.equal(Normalized(nn.Identity())(x), x)
    assert list(net.state_dict()) == []
    for bad in (
        {"mean": "cifar11"},
        {"mean": (0.5,)},
        {"mean": (0.1, 0.2), "std": (1.0, 1.0)},
        {"mean": (0,), "std": (0,)},
    ):
        with pytest.raises(DodistillError):
            tiny(**bad)
    with pytest.raises(DodistillError, match=r"3 channels.*takes 1"):
        tiny(mean="cifar10")


def test_a_seed_fixes_the_weights_and_leaves_the_global_state() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b = tiny(), tiny()
    assert same(a, b)
    assert torch.equal(before, torch.get_rng_state())
    assert not same(a, load_model("tiny8", num_classes=10, seed=2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_saved_model_describes_itself(layout: torch.memory_format, tmp_path: Path) -> None:
    net = tiny(7, mean="mnist", image_size=28)
    net.to(memory_format=layout)
    save_model(net, tmp_path / "a.safetensors", accuracy=99.5)
    back = load_model(str(tmp_path / "a.safetensors"))
    assert same(net, back)
    assert back.spec == {"spec": "tiny8", "num_classes": 7, "in_channels": 1, "image_size": 28}
    assert back.mean.item() == pytest.approx(0.1307)
    assert read_metadata(tmp_path / "a.safetensors")["accuracy"] == 99.5
    named = load_model("tiny8", weights=tmp_path / "a.safetensors")
    assert same(net, named)
    net.model.load_state_dict(torch.load(_resaved(tmp_path, back)))  # the file's keys are the bare network's
    with pytest.raises(DodistillError, match="have 7 classes, but num_classes is 10"):
        load_model(str(tmp_path / "a.safetensors"), num_classes=10)


def _resaved(folder: Path, net: Normalized) -> Path:
    torch.save(net.model.state_dict(), folder / "bare.pt")
    return folder / "bare.pt"


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "module", "both", "normalized"])
def test_weights_in_every_wrapping(tmp_path: Path, wrap: str) -> None:
    net = tiny(12)
    state = net.state_dict() if wrap == "normalized" else net.model.state_dict()
    if wrap in ("module", "both"):
        state = {f"module.{k}": v for k, v in state.items()}
    torch.save({"state_dict": state, "epoch": 3} if wrap in ("state_dict", "both") else state, tmp_path / "w.pth")
    back = load_model("tiny8", weights=tmp_path / "w.pth", mean="none")
    assert back.spec["num_classes"] == 12
    assert same(net, back)


def test_weights_without_batchnorm_counters_load(tmp_path: Path) -> None:
    state = {k: v for k, v in tiny().model.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "w.pt")
    assert same(tiny(), load_model("tiny8", weights=tmp_path / "w.pt", mean="none"))


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    save_model(tiny(100), tmp_path / "w.safetensors")
    with pytest.raises(DodistillError, match=r"weights .* have 100 classes, but num_classes is 10"):
        load_model("tiny8", num_classes=10, weights=tmp_path / "w.safetensors")
    with pytest.raises(DodistillError, match=r"conv1.weight is \(8, 1, 3, 3\), the network has \(16, 1, 3, 3\)"):
        load_model("tiny16", num_classes=100, weights=tmp_path / "w.safetensors")
    with pytest.raises(DodistillError, match=r"missing: .*block1.layer.0.bn1.weight.*unexpected: bn2.bias"):
        load_model("wrn16_1", in_channels=1, weights=tmp_path / "w.safetensors")
    with pytest.raises(DodistillError, match="no weights file at"):
        load_model("tiny8", weights=tmp_path / "nowhere.pt")


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("style", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, style: str) -> None:
    trap = tmp_path / "sprung"
    if style == "torch":
        torch.save({"state_dict": tiny().model.state_dict(), "x": Bomb(str(trap))}, tmp_path / "w.pt")
    else:
        (tmp_path / "w.pt").write_bytes(pickle.dumps(Bomb(str(trap))))
    with pytest.raises(DodistillError, match=r"would run code when read .*refused(.|\n)*weights_only=False"):
        load_model("tiny8", weights=tmp_path / "w.pt")
    assert not trap.exists()


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda net: net,
        lambda net: {"epoch": 3, "model": net},
        lambda net: {"ema": net, "args": argparse.Namespace(lr=1)},
        lambda net: {"args": argparse.Namespace(lr=1), "state_dict": net.state_dict()},
    ],
    ids=["module", "in a dict", "of another name", "state dict"],
)
def test_the_advice_given_for_a_pickled_module_works(tmp_path: Path, wrapped: Callable[[nn.Module], Any]) -> None:
    """The command in the message converts a pickled module, or what a dict holds, into weights that load."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    torch.save(wrapped(net), tmp_path / "w.pt")
    (tmp_path / "m.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))"
    )
    with pytest.raises(DodistillError, match="would run code") as caught:
        load_model(f"{tmp_path}/m.py:make", weights=tmp_path / "w.pt")
    _, *words = shlex.split(str(caught.value).splitlines()[-1])
    subprocess.run([sys.executable, *words], cwd=tmp_path, check=True, timeout=120)
    back = load_model(f"{tmp_path}/m.py:make", weights=tmp_path / "converted.pt", mean="none")
    assert torch.equal(back.model[1].weight, net[1].weight)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "old.pt"])
@pytest.mark.parametrize("keep", [0, 1, 5, 0.5, 0.98])
def test_truncated_weights(tmp_path: Path, suffix: str, keep: float) -> None:
    whole = tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        save_model(tiny(), whole)
    else:
        torch.save(tiny().model.state_dict(), whole, _use_new_zipfile_serialization=suffix == "pt")
    data = whole.read_bytes()
    whole.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(DodistillError, match="damaged or truncated"):
        load_model("tiny8", num_classes=10, weights=whole)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html>404</html>")
    with pytest.raises(DodistillError, match="not a torch file"):
        load_model("tiny8", weights=tmp_path / "page.pt")
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(DodistillError, match=r"no state dict \(found \['epoch'\]\)"):
        load_model("tiny8", weights=tmp_path / "w.pt")


def test_whole_files_of_other_kinds_are_not_called_damaged(tmp_path: Path) -> None:
    """TorchScript, numpy arrays, a pointer of Git LFS; and a suffix in capitals."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but people have such files
        torch.jit.trace(net, torch.rand(1, 1, 2, 2)).save(tmp_path / "s w.pt")
    with pytest.raises(DodistillError, match="TorchScript") as caught:
        load_model("tiny8", weights=tmp_path / "s w.pt")
    _, *words = shlex.split(str(caught.value).splitlines()[-1])
    subprocess.run([sys.executable, *words], cwd=tmp_path, check=True, timeout=120)
    (tmp_path / "m.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))"
    )
    back = load_model(f"{tmp_path}/m.py:make", weights=tmp_path / "converted.pt", mean="none")
    assert torch.equal(back.model[1].weight, net[1].weight)
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    with pytest.raises(DodistillError, match=r"numpy arrays.*state dict"):
        load_model("tiny8", weights=tmp_path / "w.npz")
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(DodistillError, match="git lfs pull"):
            load_model("tiny8", weights=tmp_path / name, mean="none")
    save_model(net, tmp_path / "W.SafeTensors")
    assert same_weights(load_model(f"{tmp_path}/m.py:make", weights=tmp_path / "W.SafeTensors", mean="none"), net)


def same_weights(a: Normalized, b: nn.Module) -> bool:
    mine, its = a.model.state_dict(), b.state_dict()
    return list(mine) == list(its) and all(torch.equal(mine[k], its[k]) for k in its)


HERS = """
from torch import nn
class Net(nn.Module):  # its layers sorted by name: deep, hidden, out, stem
    def __init__(self):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 5)
    def forward(self, x):
        return self.out(self.hidden(self.deep(self.stem(x)).mean((2, 3))))
def half(): return Net().half()
def double(): return Net().double()
net = Net()
def wide(width): return Net()
"""


@pytest.mark.parametrize("name", ["Net", "half", "double"])
def test_a_file_that_lists_layers_by_name(tmp_path: Path, name: str) -> None:
    """Classes and channels are those of the network; it computes in fp32, whatever the factory made."""
    (tmp_path / "m.py").write_text(HERS)
    made = load_model(f"{tmp_path}/m.py:Net", seed=0)
    save_file(made.model.state_dict(), tmp_path / "w.safetensors")
    back = load_model(
        f"{tmp_path}/m.py:{name}", weights=tmp_path / "w.safetensors", mean=[0.1, 0.2, 0.3], std=[1, 1, 1],
        classes="a,b,c,d,e",
    )  # fmt: skip
    assert (back.spec["num_classes"], back.spec["in_channels"]) == (5, 3)
    assert back(torch.rand(2, 3, 4, 4)).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "said"), [("net", r"a network, not a function.*def make\(\): return net"), ("wide", "'width'.*defaults")]
)
def test_what_is_no_factory(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "m.py").write_text(HERS)
    with pytest.raises(DodistillError, match=said):
        load_model(f"{tmp_path}/m.py:{name}")


def test_the_fix_of_a_path_with_spaces_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "her é files"
    folder.mkdir()
    (folder / "m.py").write_text(HERS)
    file = save_model(load_model(f"{folder}/m.py:Net", seed=0, image_size=4), folder / "s.safetensors")
    assert main(["evaluate", str(file), "--test", "digits"]) == 2
    fix = capsys.readouterr().err.partition("yourself: ")[2].partition(", or --allow-code")[0]
    assert shlex.split(fix) == [f"{folder}/m.py:Net", "--weights", str(file)]


def test_saving_is_atomic_and_its_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_model(tiny(), path)
    before = path.read_bytes()

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DodistillError, match="No space left"):
        save_model(load_model("tiny8", num_classes=10, seed=9), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(DodistillError, match="cannot write"):
        save_model(tiny(), tmp_path / "no" / "such" / "w.safetensors")


FILE = """
import torch
from torch import nn
def make(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))
def fixed(): return nn.Linear(12, 4)
def broken(): raise KeyError("gone")
def nothing(): return 3
"""


def test_factory_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FILE)
    assert load_model(f"{tmp_path}/net.py:make", num_classes=6)(torch.rand(2, 3, 2, 2)).shape == (2, 6)
    assert load_model(f"{tmp_path}/net.py:fixed").spec["num_classes"] == 4
    for name, said in [("mak", "did you mean 'make'"), ("broken", "KeyError"), ("nothing", "returned a int")]:
        with pytest.raises(DodistillError, match=said):
            load_model(f"{tmp_path}/net.py:{name}")
    with pytest.raises(DodistillError, match="no file"):
        load_model("nowhere.py:make")


def test_a_factory_without_a_signature_gets_no_arguments(tmp_path: Path) -> None:
    """`inspect.signature` raises ValueError for some callables of C. This one stands for them."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Compiled:\n"
        "    @property\n"
        "    def __signature__(self): raise ValueError('no signature found')\n"
        "    def __call__(self): return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))\n"
        "make = Compiled()\n"
    )
    assert load_model(f"{tmp_path}/net.py:make", num_classes=3)(torch.rand(2, 1, 2, 2)).shape == (2, 3)


def test_a_weights_file_cannot_ask_for_code(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FILE + f"\nimport os; os.mkdir({str(tmp_path / 'sprung')!r})")
    save_model(nn.Linear(12, 4), tmp_path / "w.safetensors", spec=f"{tmp_path}/net.py:fixed")
    with pytest.raises(DodistillError, match="code runs only if you name it"):
        load_model(str(tmp_path / "w.safetensors"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("net.py", "net.py:FACTORY"),
        ("folder/net", "use a zoo name, timm:NAME"),
        ("tim:resnet18", "did you mean 'timm'"),
        ("teacher.pth", "weights='teacher.pth'"),
        ("timm:resnet19", "similar names: .*resnet18"),
        ("torchvision:resnet19", "did you mean 'resnet18'"),
        ("gone.safetensors", "no weights file"),
    ],
)
def test_what_is_no_model_is_refused_with_the_fix(spec: str, said: str) -> None:
    if spec.startswith(("timm", "torchvision")):
        pytest.importorskip(spec.partition(":")[0])
    with pytest.raises(DodistillError, match=said):
        load_model(spec, num_classes=10)


def test_timm_and_torchvision() -> None:
    timm = pytest.importorskip("timm")
    net = load_model("timm:test_resnet", num_classes=5, in_channels=1)
    assert net(torch.rand(2, 1, 32, 32)).shape == (2, 5)
    cfg = timm.create_model("test_resnet").pretrained_cfg
    colour = load_model("timm:test_resnet", num_classes=5)
    assert colour.mean.flatten().tolist() == pytest.approx(cfg["mean"])
    vision = load_model("torchvision:squeezenet1_1", num_classes=5)
    assert vision(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    assert vision.std.flatten().tolist() == pytest.approx(NORMALISATION["imagenet"][1])


@pytest.mark.parametrize("origin", ["timm", "torchvision"])
@pytest.mark.parametrize("kind", [ImportError, RuntimeError])
def test_an_absent_or_broken_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, origin: str, kind: type) -> None:
    import builtins

    real = builtins.__import__

    def fake(name: str, *args, **kwargs):
        if name == origin:
            raise kind("operator torchvision::nms does not exist")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(DodistillError, match=r"pip install 'dodistill\[timm\]'"):
        load_model(f"{origin}:resnet18")


@pytest.mark.parametrize("name", ["wrn16_1", "resnet18", "resnet20", "vgg8", "mobilenetv2", "tiny8"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_are_read_off_any_weights_file(name: str, channels: int, tmp_path: Path) -> None:
    """safetensors lists tensors by name, so the first convolution of the file is not that of the network."""
    model = load_model(name, num_classes=7, in_channels=channels, image_size=32, seed=0)
    ours, bare, torch_file = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.pt"
    save_model(model, ours)
    save_file({k: v.contiguous() for k, v in model.model.state_dict().items()}, bare)
    torch.save({"state_dict": model.model.state_dict()}, torch_file)
    for file in (ours, bare, torch_file):
        known = load_model(name, weights=file, mean=None if file == ours else "none").spec
        assert (known["in_channels"], known["num_classes"]) == (channels, 7), file.suffix
