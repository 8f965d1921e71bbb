"""Bad inputs, one by one: each gets a sentence that names the value and the fix, and leaves everything as it was.

A case is a command line, or a piece of Python, with the words that its message must hold. The common rule: an exit
status other than 0, within 10 seconds, no traceback, one message, nothing left behind, nothing existing changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dodistill.commands.cli import main
from dodistill.models import load_model, save_model
from test_cli import QUICK

#: seconds that a refusal may take
PATIENCE = 10


@pytest.fixture(scope="session")
def finished(teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the command line; do not touch: take `place`."""
    out = tmp_path_factory.mktemp("finished") / "run"
    command = ["distill", "--teacher", str(teacher_file), "--student", "tiny4", "--source", "fast", "--out", str(out)]
    assert main([*command, *QUICK, "--no-report"]) == 0
    return out


@pytest.fixture
def place(tmp_path: Path, teacher_file: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `t.safetensors` and `run`, a finished run."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(teacher_file, "t.safetensors")
    shutil.copytree(finished, "run")
    return tmp_path


def state_of(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`, with what is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = os.fsencode(path.relative_to(folder)).decode(errors="replace")
        whole = path.is_file() and os.access(path, os.R_OK)
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if whole else "-"
    return found


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail if the block takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(words: Sequence[str], said: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must refuse its input."""
    before = state_of(Path.cwd())
    with within(PATIENCE):
        status = main(list(words))
    message = capsys.readouterr().err
    assert status not in (0, 75), message
    assert "Traceback" not in message
    for part in said:
        assert part in message, message
    assert state_of(Path.cwd()) == before
    return message


DISTILL = ["distill", "--teacher", "t.safetensors", "--student", "tiny4", *QUICK, "--out", "new"]
STUDENT = ["--student", "tiny4", "--steps", "4", "--quiet", "--out", "new"]
WILD = ["distill", "--teacher", "t.safetensors", *STUDENT, "--source", "dfnd", "--preset", "desk"]

#: id -> (words of the command, what the message names: the value, and the fix)
FLAGS: dict[str, tuple[list[str], list[str]]] = {
    "shape-zero": ([*DISTILL, "--image-shape", "3,0,0"], ["3, 0, 0", "image_shape"]),
    "shape-negative": ([*DISTILL, "--image-shape", "1,-8,-8"], ["-8"]),
    "shape-huge": ([*DISTILL, "--image-shape", "1,1000000,1000000"], ["1000000"]),
    "threads": ([*DISTILL, "--threads", "-1"], ["threads is -1", "at least 0"]),
    "mps": ([*DISTILL, "--device", "mps"], ["mps", "--device cpu"]),
    "meta": ([*DISTILL, "--device", "meta"], ["meta", "cpu"]),
    "cuda-9": ([*DISTILL, "--device", "cuda:9"], ["cuda:9", "--device cpu"]),
    "seed-large": ([*DISTILL, "--seed", str(2**64)], [str(2**64), "seed"]),
    "seed-negative": ([*DISTILL, "--seed", "-1"], ["seed is -1"]),
    "lr_g-nan": ([*DISTILL, "--source.lr_g", "nan"], ["source.lr_g is nan"]),
    "warmup": ([*DISTILL, "--source.warmup", "-1"], ["source.warmup is -1", "at least 0"]),
    "every": ([*DISTILL, "--source.every", "-5"], ["source.every is -5", "at least 0"]),
    "floor-nan": ([*DISTILL, "--optim.floor", "nan"], ["optim.floor is nan"]),
    "floor-above": ([*DISTILL, "--optim.floor", "7"], ["optim.floor is 7"]),
    "momentum-nan": ([*DISTILL, "--optim.momentum", "nan"], ["optim.momentum is nan"]),
    "ema-nan": ([*DISTILL, "--loop.ema", "nan"], ["loop.ema is nan"]),
    "views-gb-inf": ([*DISTILL, "--augment.views_gb", "inf"], ["augment.views_gb is inf"]),
    "checkpoint-seconds": ([*DISTILL, "--loop.checkpoint_seconds", "nan"], ["checkpoint_seconds is nan"]),
    "batch-one": ([*DISTILL, "--loop.batch", "1"], ["loop.batch is 1", "at least 2"]),
    "temperature": ([*DISTILL, "--criterion.temperature", "0"], ["criterion.temperature is 0"]),
    "temperature-nan": ([*DISTILL, "--criterion.temperature", "nan"], ["criterion.temperature is nan"]),
    "milestones": ([*DISTILL, "--optim.milestones", "2,-1"], ["optim.milestones", "0 and 1"]),
    "holdout-capacity": ([*DISTILL, "--pool.holdout_capacity", "0"], ["holdout_capacity is 0"]),
    "criterion-number": ([*DISTILL, "--criterion", "5"], ["'5'", "kl"]),
    "criterion-empty": (["distill", "--criterion", *DISTILL[1:]], ["--criterion"]),
    "max-seconds-word": ([*DISTILL, "--max-seconds", "soon"], ["max_seconds", "soon"]),
    "max-seconds-negative": ([*DISTILL, "--max-seconds", "-3"], ["max_seconds is -3"]),
    "max-seconds-nan": ([*DISTILL, "--max-seconds", "nan"], ["max_seconds is nan"]),
    "out-without-value": ([*DISTILL[:-1]], ["--out"]),
    "stray-word": (["distill", "--teacher", "t.safetensors", "stray"], ["'stray'", "--"]),
    "path-too-long": ([*DISTILL[:-1], "x" * 300], ["File name too long", "--out"]),
    "out-a-file": ([*DISTILL[:-1], "t.safetensors/run"], ["t.safetensors", "--out"]),
    "out-null-byte": ([*DISTILL[:-1], "a\0b"], ["null"]),
    "teach-decay": (["teach", "tiny4", "--data", "digits", "--weight_decay", "-1"], ["weight_decay is -1"]),
    "teach-lr": (["teach", "tiny4", "--data", "digits", "--lr", "nan"], ["lr is nan"]),
    "teach-momentum": (["teach", "tiny4", "--data", "digits", "--momentum", "2"], ["momentum is 2"]),
    "teach-warmup": (["teach", "tiny4", "--data", "digits", "--warmup", "3"], ["warmup is 3"]),
    "teach-smoothing": (["teach", "tiny4", "--data", "digits", "--label_smoothing", "1.5"], ["label_smoothing is 1.5"]),
    "teach-minival": (["teach", "tiny4", "--data", "digits", "--minival", "1.5"], ["1.5", "[0, 1)"]),
    "teach-precision": (["teach", "tiny4", "--data", "digits", "--precision", "half"], ["half", "bf16"]),
    "teach-over-a-teacher": (
        ["teach", "tiny4", "--data", "digits", "--out", "t.safetensors"], ["t.safetensors", "--out"]
    ),
    "evaluate-nothing": (["evaluate", "t.safetensors"], ["--test"]),
    "evaluate-missing": (["evaluate", "none.safetensors", "--test", "digits"], ["none.safetensors"]),
    "evaluate-a-folder": (["evaluate", "run", "--test", "digits"], ["run/student.safetensors"]),
    "evaluate-out-a-folder": (
        ["evaluate", "t.safetensors", "--calibrate", "digits", "--out", "run"], ["run", ".safetensors"],
    ),
    "evaluate-n-zero": (["evaluate", "t.safetensors", "--calibrate", "digits", "--n", "0"], ["--n is 0"]),
    "export-onto-a-file": (["export", "run", "t.safetensors"], ["t.safetensors"]),
    "export-no-run": (["export", "nowhere", "images"], ["nowhere"]),
    "report-no-run": (["report", "nowhere"], ["nowhere"]),
    "look-no-run": (["look", "nowhere", "--test", "digits"], ["nowhere"]),
    "look-out-a-folder": (["look", "run", "--test", "digits", "--out", "run"], ["run", "--out"]),
    "rank-no-run": (["rank", "run", "nowhere"], ["nowhere"]),
    "rank-one-run": (["rank", "run"], ["two run folders"]),
    "rank-no-images": (["rank", "run", "run", "--on", "none.npz"], ["none.npz"]),
    "demo-onto-a-file": (["demo", "--out", "t.safetensors"], ["t.safetensors", "--out"]),
    "demo-seed": (["demo", "--out", "d", "--seed", "-4"], ["seed is -4"]),
    "compare-no-recipe": (["compare", "none.yaml"], ["none.yaml"]),
    "compare-jobs": (["compare", "none.yaml", "--jobs", "many"], ["jobs", "many"]),
}  # fmt: skip


@pytest.mark.parametrize(("words", "said"), FLAGS.values(), ids=FLAGS)
def test_flags(words: list[str], said: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(words, said, capsys)


# --------------------------------------------------------------------------------------------------- recipes

GRID = "base: {teacher: t.safetensors, student: tiny4}\n"
#: id -> (bytes of recipe.yaml, what the message names)
RECIPES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["recipe.yaml", "grid"]),
    "a-list": (b"- 1\n- 2\n", ["recipe.yaml", "grid"]),
    "latin-1": ("grid: {seed: [0]}\nabout: caf\xe9\n".encode("latin-1"), ["recipe.yaml", "UTF-8"]),
    "nul": (b"grid: {seed: [0]}\nabout: \0\n", ["recipe.yaml"]),
    "itself": (b"grid: &a\n  seed: *a\n", ["recipe.yaml"]),
    "refers-to-itself": (b"base: &a {optim: *a}\ngrid: {seed: [0]}\n", ["recipe.yaml"]),
    "too-deep": (b"grid: " + b"[" * 5000 + b"]" * 5000, ["recipe.yaml", "deep"]),
    "doubling": (
        b"a0: &a0 [x, x]\n" + b"".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n".encode() for i in range(1, 40))
        + b"grid: {seed: *a39}\n", ["recipe.yaml"],
    ),
    "merging": (
        f"a: &a {{{', '.join(f'k{i}: 1' for i in range(400))}}}\nb: {{<<: [{', '.join(['*a'] * 300)}]}}\n".encode()
        + b"grid: {seed: [0]}\n", ["recipe.yaml", "merges", "write them out"],
    ),
    "merges-a-word": (b"grid: {<<: seed}\n", ["recipe.yaml", "<<", "mappings"]),
    "twice-merged": (b"base: &b {a: 1, a: 2}\ngrid: {<<: *b}\n", ["recipe.yaml", "twice"]),
    "twice": (b"grid: {seed: [0]}\ngrid: {seed: [1]}\n", ["recipe.yaml", "grid", "twice"]),
    "twice-inside": (GRID.encode() + b"grid: {seed: [0], seed: [1]}\n", ["recipe.yaml", "seed", "twice"]),
    "python-tag": (b"grid: !!python/object/apply:os.system [echo]\n", ["recipe.yaml"]),
    "arm-a-number": (GRID.encode() + b"grid: {arm: {plain: 5}}\n", ["grid.arm", "5"]),
    "axis-empty": (GRID.encode() + b"grid: {seed: []}\n", ["grid.seed"]),
    "when-without-where": (GRID.encode() + b"grid: {seed: [0]}\nwhen: [{then: {loop.steps: 3}}]\n", ["when", "where"]),
    "when-without-then": (GRID.encode() + b"grid: {seed: [0]}\nwhen: [{where: {seed: 0}}]\n", ["when", "then"]),
    "when-a-word": (GRID.encode() + b"grid: {seed: [0]}\nwhen: always\n", ["when", "always"]),
    "skip-a-word": (GRID.encode() + b"grid: {seed: [0]}\nskip: [seed]\n", ["skip", "seed"]),
    "skip-unknown-axis": (GRID.encode() + b"grid: {seed: [0]}\nskip: [{sead: 0}]\n", ["skip", "sead", "seed"]),
    "published-a-word": (GRID.encode() + b"grid: {seed: [0]}\npublished: [{where: {seed: 0}, value: high}]\n",
                         ["published", "high"]),
    "base-a-word": (b"base: fast\ngrid: {seed: [0]}\n", ["base", "fast"]),
    "teacher-without-model": (b"teachers: {t: {data: digits}}\ngrid: {seed: [0]}\n", ["teachers.t", "model"]),
    "teacher-a-word": (b"teachers: {t: tiny8}\ngrid: {seed: [0]}\n", ["teachers.t", "tiny8"]),
    "teachers-a-list": (b"teachers: [tiny8]\ngrid: {seed: [0]}\n", ["teachers", "tiny8"]),
    "teacher-with-out": (b"teachers: {t: {model: tiny8, data: digits, out: /tmp/x}}\ngrid: {seed: [0]}\n",
                         ["teachers.t", "out"]),
    "teacher-leads-out": (b"teachers: {../../t: {model: tiny8, data: digits}}\ngrid: {seed: [0]}\n", ["../../t"]),
    "name-leads-out": (b"name: ../../x\n" + GRID.encode() + b"grid: {seed: [0]}\n", ["../../x"]),
    "name-a-number": (b"name: [1]\ngrid: {seed: [0]}\n", ["name", "[1]"]),
    "unknown-key": (GRID.encode() + b"gird: {seed: [0]}\ngrid: {seed: [0]}\n", ["gird", "grid"]),
    "unknown-setting": (GRID.encode() + b"grid: {loop.sead: [0]}\n", ["sead", "seed"]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), RECIPES.values(), ids=RECIPES)
def test_recipes(text: bytes, said: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_bytes(text)
    refused(["compare", "recipe.yaml", "--dry-run"], said, capsys)
    refused(["compare", "recipe.yaml"], said, capsys)


@pytest.mark.parametrize("name", ["latin-1", "nul", "too-deep", "doubling", "twice", "python-tag"])
def test_recipes_of_one_run(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_bytes(RECIPES[name][0])
    refused(["distill", "recipe.yaml", *DISTILL[1:]], ["recipe.yaml"], capsys)


def test_a_grid_is_no_recipe_of_one_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my grid.yaml").write_text("name: mine\n" + GRID + "grid: {seed: [0]}\n")
    refused(["distill", "my grid.yaml", *DISTILL[1:]], ["my grid.yaml", "dodistill compare 'my grid.yaml'"], capsys)


def test_compare_with_a_cell_cut_short(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text(GRID + "grid: {seed: [0]}\n")
    Path("out/cells").mkdir(parents=True)
    Path("out/cells/1234.json").write_text('{"config": {')
    refused(["compare", "recipe.yaml", "--out", "out"], ["out/cells/1234.json"], capsys)
    Path("out/cells/1234.json").write_text("[]")
    refused(["compare", "recipe.yaml", "--out", "out"], ["out/cells/1234.json"], capsys)


def test_compare_into_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text(GRID + "grid: {seed: [0]}\n")
    refused(["compare", "recipe.yaml", "--out", "t.safetensors"], ["t.safetensors", "--out"], capsys)


# --------------------------------------------------------------------------------------------------- weights


def _metadata(place: Path, **values: str) -> None:
    """t.safetensors again, with other metadata."""
    from safetensors import safe_open

    with safe_open("t.safetensors", "pt") as f:
        known, tensors = dict(f.metadata()), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    save_file(tensors, "t.safetensors", known | values)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_classes", '"ten"'), ("num_classes", "-3"), ("num_classes", "2.5"), ("in_channels", '"grey"'),
     ("image_size", '"small"'), ("image_size", "0"), ("mean", '"dark"'), ("mean", "[0.1, 0.2]"), ("std", "[0]"),
     ("spec", "7"), ("head", '{"kind": 5}')],
)  # fmt: skip
def test_metadata_of_a_wrong_type(key: str, value: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _metadata(place, **{key: value})
    refused(DISTILL, ["t.safetensors", key], capsys)


def _net(teacher: nn.Module) -> dict[str, torch.Tensor]:
    return dict(teacher.model.state_dict())  # type: ignore[union-attr, operator]


#: id -> (what is done to the state dict, what the message names)
WEIGHTS: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "int8": (lambda s: {k: v.to(torch.int8) for k, v in s.items()}, ["int8"]),
    "nan": (lambda s: {k: v * float("nan") if v.is_floating_point() else v for k, v in s.items()}, ["NaN"]),
    "one-inf": (lambda s: {k: v.clone().index_fill_(0, torch.tensor([0]), float("inf")) if v.dim() == 4 else v
                           for k, v in s.items()}, ["infinity"]),
    "sparse": (lambda s: {k: v.to_sparse() if v.dim() == 4 else v for k, v in s.items()}, ["sparse"]),
    "complex": (lambda s: {k: v.to(torch.complex64) if v.dim() == 4 else v for k, v in s.items()}, ["complex"]),
    "one-key-gone": (lambda s: dict(list(s.items())[1:]), ["missing"]),
    "a-list": (lambda s: list(s.values()), ["state dict"]),
    "a-tensor": (lambda s: next(iter(s.values())), ["state dict"]),
    "numbers-as-keys": (lambda s: dict(enumerate(s.values())), ["state dict"]),
    "meta": (lambda s: {k: v.to("meta") for k, v in s.items()}, ["meta"]),
    "optimiser": (lambda s: {"optimizer": {"lr": 0.1}}, ["state dict"]),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights(
    change: Callable[[dict[str, Any]], Any], said: list[str], teacher: nn.Module, place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    torch.save(change(_net(teacher)), "w.pt")
    words = ["distill", "--teacher", "tiny8", "--teacher.weights", "w.pt", "--image-shape", "1,8,8", *DISTILL[3:]]
    refused(words, ["w.pt" if said != ["NaN"] else "NaN", *said], capsys)


def test_evaluate_does_not_score_nan(taught: nn.Module, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import copy

    sick = copy.deepcopy(taught)
    with torch.no_grad():
        next(sick.parameters()).fill_(float("nan"))
    save_model(sick, "sick.safetensors")
    refused(["evaluate", "sick.safetensors", "--test", "digits"], ["sick.safetensors", "NaN"], capsys)


#: id -> (text of m.py, what the message names)
FACTORIES: dict[str, tuple[str, list[str]]] = {
    "raises": ("def f():\n    raise KeyError('x')\n", ["m.py:f", "KeyError"]),
    "exits": ("def f():\n    raise SystemExit(0)\n", ["m.py:f", "SystemExit"]),
    "exits-on-import": ("import sys\nsys.exit(0)\n", ["m.py", "SystemExit"]),
    "returns-nothing": ("def f():\n    pass\n", ["m.py:f", "NoneType"]),
    "not-python": ("def f(:\n", ["m.py", "SyntaxError"]),
    "needs-arguments": ("def f(a, b):\n    pass\n", ["m.py:f", "TypeError"]),
    "forward-raises": (
        "import torch\nclass M(torch.nn.Module):\n    def forward(self, x):\n        raise KeyError('no')\n"
        "def f():\n    return M()\n", ["KeyError"],
    ),
    "one-image-only": (
        "import torch\nclass M(torch.nn.Module):\n    def forward(self, x):\n"
        "        return torch.zeros(min(len(x), 2), 10)\ndef f():\n    return M()\n", ["(2, 10)"],
    ),
    "integers": (
        "import torch\nclass M(torch.nn.Module):\n    def forward(self, x):\n"
        "        return torch.ones(len(x), 10, dtype=torch.long)\ndef f():\n    return M()\n", ["int64", "floating"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), FACTORIES.values(), ids=FACTORIES)
def test_factories(text: str, said: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("m.py").write_text(text)
    chosen = ["--source", "adversarial", "--preset", "desk", "--source.batch", "16", "--source.width", "4"]
    refused(["distill", "--teacher", "m.py:f", "--image-shape", "1,8,8", *STUDENT, *chosen], said, capsys)


# ---------------------------------------------------------------------------------------------------- images


def _images(n: int = 4) -> np.ndarray[Any, Any]:
    return np.zeros((n, 8, 8), np.uint8)


#: id -> (what is written, the name of the data, what the message names)
IMAGES: dict[str, tuple[Callable[[], object], str, list[str]]] = {
    "float": (lambda: np.savez("d.npz", x_train=_images().astype(float)), "d.npz", ["float64", "uint8"]),
    "objects": (lambda: np.savez("d.npz", x_train=np.array([{}, 1], object)), "d.npz", ["d.npz"]),
    "cut": (lambda: Path("d.npz").write_bytes(b"PK\3\4 no zip"), "d.npz", ["d.npz"]),
    "no-key": (lambda: np.savez("d.npz", images=_images()), "d.npz", ["x_train", "images"]),
    "flat": (lambda: np.savez("d.npz", x_train=np.zeros((4, 64), np.uint8)), "d.npz", ["(4, 64)"]),
    "none": (lambda: np.savez("d.npz", x_train=_images(0)), "d.npz", ["(0, 8, 8"]),
    "large": (lambda: np.savez("d.npz", x_train=np.zeros((4, 9, 9), np.uint8)), "d.npz", ["(1, 9, 9)", "(1, 8, 8)"]),
    "claims-24-gb": (lambda: _claims("d.npy", (25_000_000_000,)), "d.npy", ["d.npy"]),
    "empty-folder": (lambda: Path("d").mkdir(), "d", ["d", "empty"]),
    "folder-of-text": (lambda: (Path("d").mkdir(), Path("d/a.txt").write_text("x")), "d", ["a.txt"]),
    "eps": (lambda: (Path("d").mkdir(), Path("d/a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")),
            "d", ["a.png"]),
    "not-utf-8": (lambda: (Path("d").mkdir(), Path(os.fsdecode(b"d/\xff.png")).write_bytes(b"x")), "d", ["readable"]),
    "missing": (lambda: None, "d/none", ["d/none"]),
    "a-name": (lambda: None, "digit", ["'digit'", "digits"]),
}  # fmt: skip


def _claims(path: str, shape: tuple[int, ...]) -> None:
    """A .npy file with a header alone, of a large array."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


@pytest.mark.parametrize(("write", "name", "said"), IMAGES.values(), ids=IMAGES)
def test_unlabelled_images(
    write: Callable[[], object], name: str, said: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write()
    refused([*WILD, "--unlabeled", name], said, capsys)


def _labelled(y: object, x: object = None) -> None:
    np.savez("d.npz", x_test=_images() if x is None else x, y_test=np.asarray(y))  # type: ignore[arg-type]


#: id -> (what is written, what the message names)
LABELS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "beyond": (lambda: _labelled([0, 1, 2, 11]), ["11", "10 classes"]),
    "negative": (lambda: _labelled([0, 1, 2, -1]), ["d.npz"]),
    "float": (lambda: _labelled([0.0, 1.0, 2.0, 3.0]), ["float64"]),
    "too-few": (lambda: _labelled([0, 1]), ["(2,)", "4"]),
    "one-class": (lambda: _labelled([3, 3, 3, 3]), ["one class", "3"]),
    "words": (lambda: _labelled(["a", "b", "c", "d"]), ["d.npz"]),
    "other-size": (lambda: _labelled([0, 1, 2, 3], np.zeros((4, 9, 9), np.uint8)), ["(1, 9, 9)", "(1, 8, 8)"]),
}


@pytest.mark.parametrize(("write", "said"), LABELS.values(), ids=LABELS)
def test_test_sets(
    write: Callable[[], object], said: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write()
    refused([*DISTILL, "--test", "d.npz"], said, capsys)
    refused(["evaluate", "t.safetensors", "--test", "d.npz"], said, capsys)


def test_an_avif_that_is_damaged(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("d").mkdir()
    Path("d/a.avif").write_bytes(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(range(200)))
    refused([*WILD, "--unlabeled", "d"], ["a.avif"], capsys)


def test_sixteen_bits_keep_their_shades(place: Path) -> None:
    from dodistill.data.images import load_images

    Path("d").mkdir()
    shades = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(shades).save("d/a.png")
    x = load_images("d", image_shape=(1, 8, 8)).x
    assert np.allclose(x[0, 0].numpy(), shades / 257, atol=1)


# ------------------------------------------------------------------------------------------------ run folders


def _break(name: str, content: bytes | None) -> None:
    path = Path("run") / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)


#: id -> (file of the run, its new content (None: gone), the command, what the message names)
BROKEN: dict[str, tuple[str, bytes | None, list[str], list[str]]] = {
    "look-config-a-list": ("config.json", b"[1]", ["look", "run", "--test", "digits"], ["run/config.json"]),
    "look-config-gone": ("config.json", None, ["look", "run", "--test", "digits"], ["run/config.json"]),
    "look-no-student": ("student.safetensors", None, ["look", "run", "--test", "digits"], ["student.safetensors"]),
    "look-summary-cut": ("summary.json", b'{"a": ', ["look", "run", "--test", "digits"], ["run/summary.json"]),
    "export-pool-cut": ("pool-", b"PK", ["export", "run", "images"], ["pool-"]),
    "export-no-student": ("student.safetensors", None, ["export", "run", "s.onnx"], ["student.safetensors"]),
    "distill-config-cut": ("config.json", b'{"a": ', [*DISTILL[:-1], "run"], ["run/config.json"]),
    "distill-config-a-list": ("config.json", b"[1]", [*DISTILL[:-1], "run"], ["run/config.json"]),
    "distill-summary-cut": ("summary.json", b'{"a": ', ["again"], ["run/summary.json"]),
    "distill-summary-without-a-key": (
        "summary.json",
        b'{"finished": true}',
        ["again"],
        ["run/summary.json", "agreement"],
    ),
    "distill-summary-a-list": ("summary.json", b"[1]", ["again"], ["run/summary.json"]),
}


@pytest.mark.parametrize(("name", "content", "words", "said"), BROKEN.values(), ids=BROKEN)
def test_broken_run_folders(
    name: str, content: bytes | None, words: list[str], said: list[str], place: Path, finished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if name == "pool-":
        name = next(Path("run").glob("pool-*.pt")).name
    if words == ["again"]:  # the command of the run itself
        teacher = json.loads((finished / "config.json").read_text())["teacher"]["spec"]
        words = ["distill", "--teacher", teacher, "--student", "tiny4", "--source", "fast", "--out", "run", *QUICK]
    _break(name, content)
    refused(words, said, capsys)


@pytest.mark.parametrize("state", [[1, 2], {"pool_version": 1}, {"format": 3, "pool_version": "x"}, torch.ones(3)])
def test_a_checkpoint_that_is_another_object(
    state: Any, place: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = json.loads((finished / "config.json").read_text())["teacher"]["spec"]
    for name in ("checkpoint.pt", "previous.pt"):
        (Path("run") / name).unlink(missing_ok=True)
        torch.save(state, Path("run") / name)
    (Path("run") / "summary.json").unlink()
    words = ["distill", "--teacher", teacher, "--student", "tiny4", "--source", "fast", "--out", "run", *QUICK]
    refused(words, ["checkpoint"], capsys)


def test_a_plugin_that_ends_the_process(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text("raise SystemExit(0)\n")
    words = ["distill", "--teacher", "t.safetensors", *STUDENT, "--source", "mine.py"]
    refused(words, ["mine.py", "SystemExit"], capsys)


def test_weights_of_another_network_of_the_zoo(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = load_model("resnet8", num_classes=10)
    torch.save({f"module.{k}": v for k, v in _net(net).items()}, "w.pt")
    words = ["evaluate", "wrn16_1", "--weights", "w.pt", "--image-shape", "3,32,32", "--test", "digits"]
    refused(words, ["w.pt", "they fit resnet8", "other shapes"], capsys)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["distill", "--teacher", "tiny8", "--teacher.num_classes", "10", *STUDENT], "--teacher.weights FILE"),
        (["evaluate", "tiny8", "--test", "digits"], "--weights FILE"),
        (["evaluate", "t.safetensors", "--test", "digits", "--teacher", "tiny8"], "--teacher.weights FILE"),
        (["look", "run", "--test", "digits", "--teacher", "tiny8"], "FILE (or"),
    ],
)
def test_a_model_without_weights_is_not_scored_in_silence(
    words: list[str], flag: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(
        [*words, "--image-shape", "1,8,8"] if words[0] == "distill" else words, ["tiny8 has no weights", flag], capsys
    )


def test_random_weights_can_be_meant(place: Path) -> None:
    words = ["distill", "--teacher", "tiny8", "--teacher.num_classes", "10", "--teacher.weights", "random", *QUICK]
    assert main([*words, "--image-shape", "1,8,8", "--student", "tiny4", "--out", "new", "--no-report"]) == 0


@pytest.mark.parametrize("content", [b'{"a": ', b"[1]", b"{}", b'{"source": 5}'])
def test_auto_into_a_broken_run_folder(content: bytes, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run/config.json").write_bytes(content)
    words = ["distill", "--teacher", "t.safetensors", "--student", "tiny4", "--source", "auto", "--out", "run"]
    refused(words, ["config.json"], capsys)
