"""What Windows lacks, and macOS counts otherwise: the package imports and runs without it. CI runs this file there."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import dodistill
from dodistill.core import runtime

ROOT = Path(dodistill.__file__).parent

_ELSEWHERE = """
import sys
for name in ("resource", "fcntl", "grp", "termios"):
    sys.modules[name] = None
import json, pkgutil, importlib, os, signal, warnings
import filelock, torch, matplotlib
import dodistill
for name in ("fork", "O_NOFOLLOW", "killpg"):
    delattr(os, name)
for name in ("SIGALRM", "SIGKILL", "SIGHUP"):
    delattr(signal, name)
warnings.filterwarnings("error", category=EncodingWarning, module="dodistill")  # Windows: cp1252, not UTF-8
for found in pkgutil.walk_packages(dodistill.__path__, "dodistill."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
from dodistill.commands.cli import main
teacher = dodistill.load_model("tiny4", num_classes=3, in_channels=1, image_size=8, seed=1, mean=[0.5], std=[0.5])
dodistill.save_model(teacher, "teacher.safetensors", image_size=8)
run = "--student tiny4 --source procedural --source.n 40 --source.candidates 40 --batch 8 --augment.pad 1".split()
again = ["distill", "--teacher", "teacher.safetensors", *run, "--steps", "2", "--out", "run", "--quiet"]
stopped = main([*again, "--max-seconds", "0"])
print(json.dumps([stopped, main(again), main(["report", "run"]), main(["methods"])]))
"""


def test_it_runs_without_what_windows_lacks(tmp_path: Path) -> None:
    """Stopped, resumed and reported, without `resource`, `fcntl`, `os.fork`, and with each file's encoding given."""
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", _ELSEWHERE], capture_output=True, text=True,
        timeout=240, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [75, 0, 0, 0], done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["peak_memory_mb"] is None
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(("platform", "mebibytes"), [("linux", 3072.0), ("darwin", 3.0)])
def test_the_unit_of_the_peak_memory(platform: str, mebibytes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = types.SimpleNamespace(ru_maxrss=3 * 2**20)
    fake = types.SimpleNamespace(getrusage=lambda who: usage, RUSAGE_SELF=0)
    monkeypatch.setitem(sys.modules, "resource", fake)
    monkeypatch.setattr(sys, "platform", platform)
    assert runtime.peak_memory_mb(torch.device("cpu")) == mebibytes


def test_text_is_read_and_written_as_utf8() -> None:
    """A default encoding is another one on Windows."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr in ("read_text", "write_text"):
                assert any(k.arg == "encoding" for k in node.keywords), f"{path.name}:{node.lineno}"


def test_only_the_top_of_no_file_imports_what_one_system_has() -> None:
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = {a.name for a in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
            assert not names & {"resource", "fcntl", "grp", "pwd", "termios", "pty", "msvcrt", "winreg"}, path.name
