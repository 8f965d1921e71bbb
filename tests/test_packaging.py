"""What importing costs and needs, which way imports run, and that nothing touches global random state."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dodistill
from dodistill.api import distill
from dodistill.data.images import Images
from helpers import SHAPE, student, tree

ROOT = Path(dodistill.__file__).parent
FILES = sorted(p for p in ROOT.rglob("*.py"))
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(ROOT)], "dodistill.") if not m.name.endswith("__main__"))


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_does_not_import_torch() -> None:
    heavy = ("torch", "numpy", "rich", "jinja2", "yaml", "PIL", "safetensors", "matplotlib")
    code = (
        f"import sys, dodistill; dodistill.__version__; dir(dodistill); print([m for m in {heavy} if m in sys.modules])"
    )
    assert python(code) == "[]"


_HELP = """
import contextlib, io, sys
from dodistill.commands.cli import COMMANDS, main
from dodistill.config import registry
asked = [["--help"], *([name, "--help"] for name in COMMANDS), ["distill", "--source", "auto", "--help"]]
asked += [["distill", f"--{axis}", name, "--help"] for axis in registry.AXES for name in registry.names(axis)]
asked += [["distill", *"--source fast --preset wrn --intervention kdci+stratified+cid --help".split()]]
asked += [["--tyro-print-completion", "bash"]]
for words in asked:
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(words) == 0, words
    heavy = [name for name in ("torch", "numpy", "PIL", "rich", "jinja2", "matplotlib") if name in sys.modules]
    assert not heavy, (words, heavy)
print(len(asked))
"""


def test_no_help_imports_torch() -> None:
    assert int(python(_HELP)) > 40


_WITHOUT = """
import importlib, sys
for name in ("sklearn", "timm", "torchvision", "onnx", "onnxscript", "onnxruntime", "huggingface_hub", "tensorboard",
             "wandb", "trackio", "fsspec", "ray", "submitit"):
    sys.modules[name] = None
for name in NAMES:
    importlib.import_module(name)
import dodistill
for name in dodistill.__all__:
    getattr(dodistill, name)
from dodistill.config.tree import resolve
from dodistill.config import registry
for source in registry.names("source"):
    resolve({"source": source, "preset": "desk", "intervention": "kdci+stratified"})
student = dodistill.load_model("tiny4", num_classes=3, in_channels=1, image_size=8, seed=0)
teacher = dodistill.load_model("tiny4", num_classes=3, in_channels=1, image_size=8, seed=1)
source = {"name": "fast", "K": 1, "batch": 4, "latent": 4, "width": 2, "warmup": 0, "every": 0}
loop = {"steps": 2, "batch": 4}
out = dodistill.distill(teacher, student, source, "kdci", image_shape=(1, 8, 8), verbose=False, loop=loop)
print(out.summary["steps"])
"""


def test_everything_imports_and_runs_without_the_optional_libraries() -> None:
    assert len(MODULES) > 50
    assert python(_WITHOUT.replace("NAMES", repr(MODULES))) == "2"


OPTIONAL = [
    "sklearn", "timm", "torchvision", "onnx", "onnxscript", "onnxruntime", "huggingface_hub", "tensorboard", "wandb",
    "trackio", "fsspec", "ray", "submitit",
]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_libraries_are_imported_only_where_needed(name: str) -> None:
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert name not in {n.split(".")[0] for n in names}, path.name


# The folders, top to bottom, as docs/architecture.md draws them: a file may import from its own line and those below.
LAYERS = [
    "__main__", "commands", "api", "report", "engine", "sources interventions criteria updates replay", "evaluation",
    "core", "models", "data", "config", "functional", "files", "errors __init__",
]  # fmt: skip
RANK = {name: i for i, line in enumerate(LAYERS) for name in line.split()}
AXES = ("sources", "interventions", "criteria", "updates", "replay")


def imports(path: Path) -> Iterator[str]:
    """First part of each dodistill module that the file imports when it is imported itself."""
    inside = path.relative_to(ROOT).parts
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = inside[: len(inside) - node.level] + tuple((node.module or "").split(".") if node.module else ())
        elif (node.module or "").split(".")[0] == "dodistill":
            base = tuple(str(node.module).split(".")[1:])
        else:
            continue
        yield from ([base[0]] if base else [a.name if (ROOT / f"{a.name}.py").exists() or (ROOT / a.name).is_dir()
                                            else "__init__" for a in node.names])  # fmt: skip


def test_the_top_of_the_package_holds_no_loose_modules() -> None:
    files = {p.stem for p in ROOT.glob("*.py")}
    assert files == {"__init__", "__main__", "api", "errors", "files"}
    assert {p.name for p in ROOT.iterdir() if p.is_dir()} - {"__pycache__"} == set(RANK) - files


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports(path):
        assert RANK[name] >= RANK[own], f"{own} imports {name}, which lies above it"
        assert own not in AXES or name not in AXES or name == own, f"axis {own} imports axis {name}"


@pytest.mark.parametrize("axis", AXES)
def test_a_file_in_the_folder_of_an_axis_is_a_choice(axis: str) -> None:
    """Helpers live in `shared/`: the registry needs no list of exceptions."""
    for file in (ROOT / axis).glob("*.py"):
        text = file.read_text()
        assert file.stem == "__init__" or ("class Config" in text and "def build(" in text), file.stem


@pytest.mark.parametrize("path", sorted((ROOT / "functional").glob("*.py")), ids=lambda p: p.stem)
def test_functional_imports_torch_only(path: Path) -> None:
    assert not list(imports(path))


def test_the_bottom_needs_no_torch() -> None:
    files = [ROOT / "errors.py", ROOT / "files.py", ROOT / "__init__.py", ROOT / "commands" / "cli.py"]
    for path in [*files, *(ROOT / "config").glob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert "torch" not in {n.split(".")[0] for n in names}, path.name


_FROM_NOTHING = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}
_IN_PLACE = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_"}


class Randomness(ast.NodeVisitor):
    """Calls that draw from, or seed, the global stream."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.forked = 0

    def visit_With(self, node: ast.With) -> None:
        forked = any("fork_rng" in ast.unparse(item) for item in node.items)
        self.forked += forked
        self.generic_visit(node)
        self.forked -= forked

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        drawn = name.removeprefix("torch.") in _FROM_NOTHING or (name.split(".")[-1] in _IN_PLACE)
        if drawn and not any(k.arg == "generator" for k in node.keywords):
            self.found.append(ast.unparse(node))
        if name in ("torch.manual_seed", "torch.seed", "torch.cuda.manual_seed_all") and not self.forked:
            self.found.append(ast.unparse(node))
        if name.startswith(("np.random.", "numpy.random.", "random.")):
            self.found.append(ast.unparse(node))
        self.generic_visit(node)


def test_the_randomness_detector_detects() -> None:
    bad = "torch.manual_seed(0)\ntorch.rand(3)\nx.normal_()\nnp.random.rand(2)\nrandom.random()"
    good = "torch.rand(3, generator=g)\nx.normal_(generator=g)\nwith torch.random.fork_rng():\n    torch.manual_seed(1)"
    for code, n in ((bad, 5), (good, 0)):
        visitor = Randomness()
        visitor.visit(ast.parse(code))
        assert len(visitor.found) == n


# Networks draw their fresh weights from PyTorch's stream by nature; load_model(seed=...) and `seeded` guard it.
_EXEMPT = ("models", "commands/doctor.py")


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if not str(p.relative_to(ROOT)).startswith(_EXEMPT)],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_randomness_comes_from_generators_only(path: Path) -> None:
    visitor = Randomness()
    visitor.visit(ast.parse(path.read_text()))
    assert not visitor.found


@pytest.mark.parametrize("source", ["fast", "deepinv", "dfnd"])
def test_distilling_leaves_the_global_stream_alone(
    source: str, teacher: torch.nn.Module, digits: Images, tmp_path: Path
) -> None:
    settings = {k: v for k, v in tree(source).items() if k not in ("source", "intervention")}
    net = student()
    before = torch.get_rng_state()
    distill(
        teacher, net, tree(source)["source"], "kdci+stratified", image_shape=SHAPE, unlabeled=digits.x[:300],
        out=tmp_path / "run", verbose=False, **settings,
    )  # fmt: skip
    assert torch.equal(before, torch.get_rng_state())


def test_no_path_of_a_machine() -> None:
    for path in FILES:
        text = path.read_text()
        assert "/home/" not in text, path.name
        assert "/tmp/" not in text, path.name
