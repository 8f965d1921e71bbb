"""A student of the user's own architecture, from a file or as a module, works to the end. What is printed runs."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dodistill.api import distill
from dodistill.commands.cli import main
from dodistill.data.images import Images
from dodistill.models import Normalized, load_model, read_metadata, save_model
from helpers import SHAPE, tree

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10, width=6):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width * 64, num_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).flatten(1))

def make(num_classes=10):
    return Net(num_classes)

print("net.py runs")
"""
QUICK = ["--preset", "desk", "--source.warmup", "1", "--source.K", "2", "--source.width", "4", "--source.batch", "16",
         "--augment.flip", "false", "--augment.pad", "1", "--steps", "6", "--loop.batch", "16", "--quiet",
         "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.py, and a finished run of its student."""
    folder = tmp_path_factory.mktemp("hers")
    (folder / "net.py").write_text(NET)
    with contextlib.chdir(folder):
        words = ["distill", "--teacher", str(teacher_file), "--student", "net.py:make", *QUICK, "--out", "run"]
        assert main([*words, "--test", "digits"]) == 0
    return folder


@pytest.fixture
def there(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))
    yield workplace
    sys.modules.pop("net", None)


def blocks(page: str) -> str:
    """The Python of a model card."""
    return str(re.findall(r"```python\n(.*?)```", page, re.S)[-1])


def run_python(code: str, **names: Any) -> dict[str, Any]:
    scope: dict[str, Any] = {"images": torch.rand(2, *SHAPE), **names}
    exec(code, scope)
    return scope


FILE = "run/student.safetensors"


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["evaluate", FILE, "--test", "digits"], f"net.py:make --weights {FILE}, or --allow-code"),
        (["look", "run", "--test", "digits", "--n", "60"], "--model net.py:make, or --allow-code"),
        (["export", "run", "s.safetensors"], "--model net.py:make, or --allow-code"),
        (["distill", "--teacher", FILE, "--student", "tiny4", *QUICK], f"--teacher net.py:make --teacher.weights {FILE}"),  # noqa: E501
        (["evaluate", "TEACHER", "--test", "digits", "--teacher", FILE], f"--teacher.weights {FILE}, or --allow-code"),
    ],
)  # fmt: skip
def test_code_that_a_file_names_does_not_run_by_itself_and_the_fix_works(
    words: list[str], fix: str, there: Path, teacher_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if words[0] == "look":
        pytest.importorskip("sklearn")
    words = [str(teacher_file) if word == "TEACHER" else word for word in words]
    words += ["--out", f"out-{words[0]}-{len(words)}"] if words[0] in ("distill", "look") else []
    Path("s.safetensors").unlink(missing_ok=True)
    assert main(words) == 2
    said = capsys.readouterr()
    assert fix in said.err
    assert "net.py runs" not in said.out
    assert main([*words, "--allow-code"]) == 0
    Path("s.safetensors").unlink(missing_ok=True)
    if "--model" in fix:
        assert main([*words, *shlex.split("--model net.py:make")]) == 0
    elif words[:2] == ["evaluate", FILE]:
        assert main(["evaluate", "net.py:make", "--weights", FILE, "--test", "digits"]) == 0
    else:
        at = words.index("--teacher")
        named = [*words[:at], "--teacher", "net.py:make", "--teacher.weights", FILE, *words[at + 2 :]]
        if words[0] == "distill":
            named[named.index("--out") + 1] += "-again"
        assert main(named) == 0


def test_the_typed_code_of_two_files_lets_runs_be_compared_as_they_were_made(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their weights and their normalisation stay those of the configs."""
    pytest.importorskip("sklearn")
    Path("other.py").write_text(NET.replace("net.py runs", "other.py runs"))
    made = load_model("net.py:make", seed=0, mean=[0.3], std=[0.4])
    torch.save(made.model.state_dict(), "net.pth")
    words = ["distill", "--teacher", "net.py:make", "--teacher.weights", "net.pth", "--image-shape", "1,8,8",
             "--teacher.mean", "0.3", "--teacher.std", "0.4", "--student", "other.py:make", *QUICK]  # fmt: skip
    for run in ("a", "b"):
        assert main([*words, "--out", run]) == 0
    capsys.readouterr()
    assert main(["rank", "a", "b", "--n", "60"]) == 2
    said = capsys.readouterr()
    assert "--teacher net.py:make --model other.py:make, or --allow-code" in said.err
    assert "runs\n" not in said.out
    assert main(["rank", "a", "b", "--n", "60", "--allow-code"]) == 0
    allowed = capsys.readouterr().out
    assert main(["rank", "a", "b", "--n", "60", "--teacher", "./net.py:make", "--model", "other.py:make"]) == 0
    assert capsys.readouterr().out == allowed
    assert "other weights" not in allowed


def test_the_card_and_the_report_print_what_runs(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = Path("run/README.md").read_text()
    assert 'load_model("net.py:make", weights="student.safetensors")' in card
    assert "reads: images in [0, 1]" in card
    found = run_python(blocks(card).replace('"student.safetensors"', f'"{FILE}"'))
    assert found["logits"].shape == (2, 10)
    assert main(["report", "run"]) == 0
    page = re.sub(r"<[^>]+>", "", Path("run/report.html").read_text()).replace("&#34;", '"')
    shell = re.search(r"dodistill evaluate (.*?) --test path/to/test", page)
    assert shell is not None
    assert main(["evaluate", *shlex.split(shell[1]), "--test", "digits"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert f'load_model("net.py:make", weights="{FILE}")' in page


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_module_in_python(
    wrapped: bool, there: Path, teacher: nn.Module, digits: Images, digits_test: Images,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The card shows her class, and the file is enough for `file.py:factory`."""
    import net  # type: ignore[import-not-found]

    torch.manual_seed(0)
    hers: nn.Module = net.Net(10)
    given = Normalized(hers, [0.3], [0.4]) if wrapped else hers
    settings = {k: v for k, v in tree("dfnd", steps=3).items() if k not in ("source", "intervention")}
    out = f"module-{wrapped}"
    result = distill(
        teacher, given, tree("dfnd")["source"], image_shape=SHAPE, unlabeled=digits.x[:300], test=digits_test, out=out,
        verbose=False, **settings,
    )  # fmt: skip
    file = f"{out}/student.safetensors"
    known = read_metadata(file)
    assert (known["class"], known["num_classes"], known["in_channels"], known["image_size"]) == ("Net", 10, 1, 8)
    card = Path(out, "README.md").read_text()
    code = blocks(card).replace("(...)", "(10)").replace('"student.safetensors"', f'"{file}"')
    assert "from net import Net" in code
    assert ("dodistill.Normalized(student, mean=[0.3], std=[0.4])" in code) is wrapped
    x = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(run_python(code, images=x)["logits"], result.student(x), atol=1e-5)
    for words in (["evaluate", file, "--test", "digits"], ["export", out, f"{out}/copy.safetensors"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "name of its network, your class Net; use" in said
        assert "path/to/file.py:factory" in said
    assert main(["evaluate", "net.py:make", "--weights", file, "--test", "digits"]) == 0
    accuracy = re.search(r"accuracy +([\d.]+) %", capsys.readouterr().out)
    assert accuracy is not None
    assert float(accuracy[1]) == pytest.approx(result.evaluate(digits_test)["accuracy"], abs=0.01)
    assert main(["export", out, f"{out}/copy.safetensors", "--model", "net.py:make"]) == 0
    shell = json.loads(Path(out, "summary.json").read_text())["student"]
    assert shell["class"] == "Net"


def test_a_module_with_a_context_head(there: Path, teacher: nn.Module, digits: Images) -> None:
    import net

    settings = {k: v for k, v in tree("dfnd", steps=3).items() if k not in ("source", "intervention")}
    result = distill(
        teacher, net.Net(10), tree("dfnd")["source"], "cid", image_shape=SHAPE, unlabeled=digits.x[:300], out="headed",
        verbose=False, **settings,
    )  # fmt: skip
    code = blocks(Path("headed/README.md").read_text())
    code = code.replace("(...)", "(10)").replace('"student.safetensors"', '"headed/student.safetensors"')
    x = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(run_python(code, images=x)["logits"], result.student(x), atol=1e-5)


def test_a_trained_teacher_of_her_code_is_named_in_the_error(
    there: Path, teacher: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(nn.Linear(4, 3), "bare.safetensors")
    assert main(["evaluate", "bare.safetensors", "--test", "digits"]) == 2
    assert "NAME --weights bare.safetensors" in capsys.readouterr().err
