"""The command line as a person uses it."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dodistill
from dodistill import load_model
from dodistill.commands.cli import COMMANDS, main

QUICK = ["--preset", "desk", "--source.warmup", "1", "--source.K", "2", "--source.width", "4", "--source.batch", "16",
         "--augment.flip", "false", "--augment.pad", "1", "--steps", "12", "--loop.batch", "16", "--quiet"]  # fmt: skip


CHOSEN = ["distill", "--source", "fast", "--preset", "wrn", "--intervention", "kdci"]


def help_of(*words: str) -> str:
    shown = subprocess.run(
        [sys.executable, "-m", "dodistill", *words, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "usage: dodistill" in shown
    return shown


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS), CHOSEN], ids=" ".join)
def test_help_answers_within_a_second(words: list[str]) -> None:
    took = []
    for _ in range(3):  # the best of three, in time of a processor: other tests run beside this one
        took.append(processor_time(lambda: help_of(*words)))
        if took[-1] < 1.0:
            return
    # a slow or busy machine: the help is still far faster than what it must not import
    torch_too = processor_time(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True))
    assert min(took) < torch_too / 2, took


def processor_time(work: Callable[[], object]) -> float:
    """Seconds of a processor that the processes started by `work` took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_help_lists_the_commands() -> None:
    said = help_of()
    for command in COMMANDS:
        assert re.search(rf"^│ +• {command} +[A-Z]", said, re.MULTILINE), command


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands_flags_and_values(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tyro-print-completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*COMMANDS, "--source.K", "--source.candidates", "--kdci.weights", "attention", "--label-smoothing"):
        assert word in script, word


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes(tmp_path: Path) -> None:
    script = tmp_path / "complete.bash"
    assert main(["--tyro-write-completion", "bash", str(script)]) == 0

    def completed(*words: str) -> set[str]:
        asks = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _tyro_dodistill; echo ${{COMPREPLY[@]}}"
        out = subprocess.run(["bash", "-c", f"source {script}; {asks}"], capture_output=True, text=True, check=True)
        return set(out.stdout.split())

    assert completed("dodistill", "dis") == {"distill"}
    assert completed("dodistill", "distill", "--kdci.w") == {"--kdci.width", "--kdci.weights"}
    assert completed("dodistill", "distill", "--source", "fa") == {"fast", "fast_imagenet"}


def test_distil_evaluate_report_export(teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    base = ["distill", "--teacher", str(teacher_file), "--student", "tiny4", "--source", "fast", "--out", str(out)]
    assert main([*base, *QUICK, "--intervention", "kdci+stratified", "--test", "digits"]) == 0
    said = capsys.readouterr().out
    assert "agreement" in said
    assert "accuracy" in said
    for name in ("config.json", "metrics.jsonl", "summary.json", "student.safetensors", "samples.png", "report.html",
                 "README.md", "dictionary.json", "checkpoint.pt"):  # fmt: skip
        assert (out / name).exists(), name
    config = json.loads((out / "config.json").read_text())
    assert config["source"]["K"] == 2
    assert config["intervention"] == "kdci+stratified"

    student = str(out / "student.safetensors")
    assert main(["evaluate", student, "--test", "digits", "--teacher", str(teacher_file)]) == 0
    calibrated = str(tmp_path / "calibrated.safetensors")
    assert (
        main(["evaluate", student, "--calibrate", "digits", "--n", "64", "--test", "digits", "--out", calibrated]) == 0
    )
    said = capsys.readouterr().out
    assert "of 500 images" in said
    assert "calibrated with 64 images of digits, without labels" in said
    before, after = load_model(student).state_dict(), load_model(calibrated).state_dict()
    assert before.keys() == after.keys()
    for key in before:  # its statistics, and they alone
        assert key.endswith("num_batches_tracked") or torch.equal(before[key], after[key]) is ("running" not in key)
    assert main(["evaluate", student, "--test", "digits", "--out", calibrated]) == 2
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").stat().st_size > 10_000
    assert main(["export", str(out), str(tmp_path / "images")]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert len(list((tmp_path / "images").rglob("*.png"))) == summary["images"]


def test_the_deadline_stops_cleanly_and_the_same_command_goes_on(teacher_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        "distill",
        "--teacher",
        str(teacher_file),
        "--student",
        "tiny4",
        *QUICK,
        "--out",
        str(out),
        "--no-report",
    ]
    assert main([*command, "--max-seconds", "0"]) == 75
    assert not (out / "summary.json").exists()
    assert main(command) == 0
    assert json.loads((out / "summary.json").read_text())["steps"] == 12


def test_warnings_are_shown_once_with_and_without_the_progress(
    teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--teacher", str(teacher_file), "--student", "tiny4", "--source", "noise", "--source.n", "40"]
    command = ["distill", *models, "--steps", "2", "--batch", "8", "--no-report", "--out"]
    finished = [*command, str(tmp_path / "b")]
    for words in ([*command, str(tmp_path / "a"), "--quiet"], finished, finished):
        assert main(words) == 0
        warnings = json.loads((Path(words[words.index("--out") + 1]) / "summary.json").read_text())["warnings"]
        said = capsys.readouterr().err
        assert warnings
        assert [said.count(text) for text in warnings] == [1] * len(warnings)


def test_a_recipe_file_and_flags_over_it(teacher_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"teacher: {teacher_file}\nstudent: tiny4\nsource: {{name: real, n: 100}}\n"
        "data: {unlabeled: digits}\nloop: {steps: 7, batch: 8}\naugment: {pad: 1, flip: false}\n"
    )
    out = tmp_path / "run"
    assert main(["distill", str(recipe), "--steps", "3", "--out", str(out), "--quiet", "--no-report"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["loop"]["steps"], config["loop"]["batch"], config["source"]["n"]) == (3, 8, 100)


def test_teach_writes_weights_that_know_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t.safetensors"
    assert (
        main(
            ["teach", "tiny4", "--data", "digits", "--epochs", "1", "--flip", "false", "--pad", "1", "--out", str(out)]
        )
        == 0
    )
    capsys.readouterr()
    assert main(["evaluate", str(out), "--test", "digits"]) == 0
    assert "1,702 parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["distill", "--teacher", "x.safetensors", "--student", "tiny4", "--source", "fats"], "did you mean 'fast'"),
        (["distill", "--student", "tiny4"], "no teacher given"),
        (["distill", "missing.yaml"], "missing.yaml"),
        (["teach", "tiny4"], "--data"),
        (["teach", "tiny4", "--data", "digits", "--epoch", "3"], "did you mean 'epochs'"),
        (["teach", "tiny4", "--data", "digits", "--epoch", "3"], "--epoch 3"),
        (["distill", "--kdci.scal", "2"], "kdci: unknown key 'scal'; did you mean 'scale'?"),
        (["distill", "--kdci.scal=2"], "You wrote --kdci.scal 2."),
        (["distill", "--intervention", "kdci", "--intervention.scale", "2"], "--augment.scale or --kdci.scale"),
        (["distill", "--intervention.nothing", "2"], "--intervention has no settings of its own; --help lists"),
        (["distill", "--normalise", "none"], "'normalise'; did you mean --data.foreign.normalise or --student.normal"),
        (["distill", "--stepps", "2"], "distill: unknown key 'stepps'; did you mean 'steps'"),
        (["compare", "x.yaml", "--job", "2"], "compare: unknown key 'job'; did you mean 'jobs'?"),
        (["compare", "x.yaml", "--jobs", "two"], "compare.jobs is 'two'; it must be of type int"),
        (["report", "a", "b"], "unexpected argument 'b'"),
        (["distill", "--seed", "1", "late.yaml"], "unexpected argument 'late.yaml'; give a recipe first"),
        (["distill", "--kdci.renormalize", "true", "late.yaml"], "unexpected 'late.yaml' after --kdci"),
        (["distil"], "unknown command 'distil'; did you mean 'distill'?"),
        (["look", "somewhere"], "--test DATA"),
        (["report", "nowhere"], "nowhere"),
        (["export", "nowhere", "x"], "nowhere"),
    ],
)
def test_mistakes_exit_with_2_and_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("dodistill: ")
    assert captured.err.count("\n") == 1


def test_help_of_distill_lists_the_flags_of_what_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--source", "deepinv", "--intervention", "kdci", "--help"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"--source.iterations INT\W+descent steps per acquisition \(default: 1000\)", said)
    assert "--kdci.renormalize" in said
    assert "toolbox" in said


@pytest.mark.parametrize("words", [["compare"], ["report"], ["distill", "--steps"], []], ids=" ".join)
def test_what_tyro_refuses_exits_with_2_too(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A word or a value that is missing."""
    assert main(words) == 2
    assert "--help" in capsys.readouterr().err


def test_a_command_s_own_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "base: {student: tiny4, teacher: t.safetensors}\ngrid: {seed: [0, 1], intervention: {plain: {}, kdci: {}}}\n"
    )
    assert main(["compare", "--dry-run", str(grid), "--only", "seed=1", "--only=intervention=kdci"]) == 0
    assert capsys.readouterr().out.count("todo") == 1
    assert main(["compare", str(grid), "--dry_run", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("todo") == 4
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dodistill {dodistill.__version__}\n"


def test_methods_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    said = capsys.readouterr().out
    for source in ("fast", "deepinv", "dfnd", "real"):
        assert f"\n{source} " in said
    assert main(["doctor"]) in (0, 1)
    assert "GFLOP/s" in capsys.readouterr().out


def test_evaluate_reads_bare_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of tensors that does not say what it reads: the command line says it instead."""
    file = tmp_path / "bare.safetensors"
    state = load_model("tiny4", num_classes=10, seed=0).model.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, file)
    told = ["evaluate", "tiny4", "--weights", str(file), "--test", "digits"]
    assert main(told) == 2
    assert "give --normalise NAME" in capsys.readouterr().err
    told += ["--normalise", "mnist"]
    assert main(told) == 2
    assert "--image-shape" in capsys.readouterr().err
    assert main([*told, "--image-shape", "1,16,16"]) == 0
    assert "of 500 images" in capsys.readouterr().out
    for wrong in ("1,16", "1,0,8", "1,a,a"):
        assert main([*told, "--image-shape", wrong]) == 2
        assert repr(wrong) in capsys.readouterr().err


def test_glibc_keeps_what_tensors_free() -> None:
    """48 MiB by glibc's own account: by default a mapping of its own, given back with the tensor; kept, neither."""
    code = (
        "import ctypes, sys, torch\nfrom dodistill.commands.cli import keep_memory\n"
        "kept = keep_memory() if sys.argv[1] == 'keep' else None\n"
        "names = 'arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost'.split()\n"
        "class Info(ctypes.Structure):\n    _fields_ = [(name, ctypes.c_size_t) for name in names]\n"
        "info = getattr(ctypes.CDLL(None), 'mallinfo2', None)\n"
        "if info is None: print(False, 0, 0); sys.exit()\n"
        "info.restype = Info\n"
        "before = info(); a = torch.ones(12 << 20); held = info(); del a; after = info()\n"
        "print(kept, held.hblks - before.hblks, held.arena - after.arena)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}

    def account(arm: str, **more: str) -> list[str]:
        command = [sys.executable, "-c", code, arm]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env | more).stdout.split()

    assert account("keep", MALLOC_ARENA_MAX="2")[0] == "False"  # whoever has settings of their own keeps them
    kept, mapped, returned = account("keep")
    if kept == "False":
        pytest.skip("no glibc of 2.33 or later here")
    assert (mapped, returned) == ("0", "0")
    assert account("plain")[1] == "1"
