"""A run that was stopped, killed or damaged goes on, and ends in the bits of one that was not."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dodistill import files
from dodistill.api import distill, distill_config, run
from dodistill.config.tree import Distill, Tree, resolve
from dodistill.core.watch import Watcher
from dodistill.data.images import Images
from dodistill.engine import Distiller, Job
from dodistill.engine import run_folder as run_module
from dodistill.engine.run_folder import RunFolder, drop_checkpoints, fingerprint
from dodistill.errors import DodistillError
from dodistill.report.result import Result
from helpers import SHAPE, config, job, metrics, same, student, tree, untimed

ALL = "kdci+stratified"


class Stop:
    """A deadline that has come when `when` says so, whatever the clock."""

    def __init__(self, when: Callable[[], bool]) -> None:
        self.when = when

    def __lt__(self, _now: float) -> bool:
        return self.when()


class Begun(Watcher):
    """Whether a run has made progress since it was started or resumed."""

    def __init__(self, it: Distiller) -> None:
        self.it, self.at = it, (-1, -1)

    def on_start(self, step: int, steps: int) -> None:
        self.at = (self.it.acquirer.round, step)

    def __call__(self) -> bool:
        return (self.it.acquirer.round, self.it.step) != self.at


def stopped_at(it: Distiller, folder: RunFolder, when: Callable[[Distiller], bool]) -> bool:
    begun = Begun(it)
    finished = it.run(folder, (begun,), Stop(lambda: begun() and when(it)))  # type: ignore[arg-type]
    folder.close()
    return finished


# --------------------------------------------------------------------------------------- stopped in process


@pytest.mark.parametrize("source", ["fast", "deepinv", "dfnd"])
@pytest.mark.parametrize("by", ["class", "cluster"])
def test_stopped_after_every_acquisition_and_step(
    source: str, by: str, teacher: nn.Module, digits: Images, tmp_path: Path
) -> None:
    cfg = config(
        source, ALL, steps=9, criterion="adaptation", stratified={"by": by}, pool={"capacity": 90, "holdout": 0.1},
        loop={"log_every": 2, "eval_every": 3}, kdci={"own_lr": 1e-2}, optim={"nesterov": True},
    )  # fmt: skip
    if source == "deepinv":
        cfg = resolve(cfg.to_tree(), {"pool.eviction": "reservoir"})
    x = digits.x[:300]
    whole, folder = job(teacher, cfg, x, seed=50), RunFolder(tmp_path / "whole", cfg)
    assert stopped_at(whole, folder, lambda _: False)

    # The deadline is asked after each acquisition and each step, and has always come. Each life builds another student:
    # what it starts from must not matter from the second one on.
    lives = 0
    while True:
        it, folder = job(teacher, cfg, x, seed=50 + lives), RunFolder(tmp_path / "parts", cfg)
        lives += 1
        if stopped_at(it, folder, lambda _: True):
            break
        assert lives < 40
        torch.rand(lives)
    assert lives == whole.acquirer.round + whole.step
    assert it.step == 9
    same(untimed(whole.state_dict()), untimed(it.state_dict()))
    same(whole.acquirer.pool_state(), it.acquirer.pool_state())
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert len(metrics(tmp_path / "parts")) >= 9


class Masked(nn.Module):
    """A student with dropout, which draws from torch's global stream."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = student(), nn.Dropout2d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(self.drop(torch.cat([x, x]).view(-1, 1, 8, 8))[: len(x)])
        return out


def test_dropout_draws_the_same_masks_after_a_stop(teacher: nn.Module, tmp_path: Path) -> None:
    cfg = config("procedural", steps=5)
    ends = []
    for name, stops in (("whole", False), ("again", False), ("parts", True)):
        for life in range(9):
            torch.manual_seed(life + 10 * len(ends))
            before = torch.get_rng_state()
            it = Distiller(Job(cfg, teacher, Masked(), SHAPE))
            done = stopped_at(it, RunFolder(tmp_path / name, cfg), lambda _: stops)  # noqa: B023
            assert torch.equal(torch.get_rng_state(), before), "the caller's stream is as it was"
            if done:
                break
        ends.append(untimed(it.state_dict()))
    same(ends[0], ends[1])
    same(ends[0], ends[2])


@pytest.mark.parametrize("older", [False, True])
def test_a_run_that_began_on_another_device_goes_on(halfway: Any, older: bool) -> None:
    """With streams begun anew, as the states of a GPU's are of another kind; and the summary says so. Checkpoints of
    an older version do not name the device."""
    path, _, again = halfway
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    assert state["devices"] == ["cpu"]

    def of_a_gpu(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {k: v if k == "host" else of_a_gpu(v) for k, v in tree.items()}
        is_stream = isinstance(tree, Tensor) and tree.dtype == torch.uint8 and tree.numel() > 2000
        return torch.full((16,), 7, dtype=torch.uint8) if is_stream and tree.dim() == 1 else tree

    state = of_a_gpu(state)
    del state["devices"]
    torch.save(state if older else {**state, "devices": ["cuda"]}, path / "checkpoint.pt")
    found = run(again().job, path, verbose=False)
    assert found.finished
    there = "another device" if older else "cuda"
    assert f"this run has moved ({there} -> cpu): its streams" in " ".join(found.summary["warnings"])


def test_a_step_outside_a_run_leaves_the_global_streams(teacher: nn.Module, digits: Images) -> None:
    it = job(teacher, config("dfnd", "none", steps=2), digits.x)
    assert it.run()
    before = torch.get_rng_state()
    it.match()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pool_that_has_not_changed_is_not_copied(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", config())
    folder.save({}, lambda: {"x": torch.zeros(1)}, 1)
    folder.save({"step": 1}, lambda: pytest.fail("it was asked for"), 1)
    loaded = folder.load()
    assert loaded is not None
    assert loaded[0]["step"] == 1


def test_under_a_time_limit_fewer_steps_than_planned_are_the_whole_run(tmp_path: Path) -> None:
    cfg = config(steps=9, loop={"time": "8s"})
    RunFolder(tmp_path / "run", cfg).close()
    (tmp_path / "run" / "summary.json").write_text('{"steps": 5, "finished": true}')
    RunFolder(tmp_path / "run", cfg).close()
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "summary-5.json").exists()


def test_a_finished_last_step_is_not_a_stop(teacher: nn.Module, digits: Images, tmp_path: Path) -> None:
    """The deadline comes during the last step: nothing is left to do, so the run is done."""
    cfg = config("dfnd", steps=3)
    it, folder = job(teacher, cfg, digits.x[:300]), RunFolder(tmp_path / "run", cfg)
    assert stopped_at(it, folder, lambda it: it.step == 3)
    saved = RunFolder(tmp_path / "run", cfg).load()
    assert saved is not None
    assert saved[0]["step"] == 3


def test_a_run_does_not_go_on_with_other_models_or_images(teacher: nn.Module, digits: Images, tmp_path: Path) -> None:
    """Models given in memory have no name in the config, and a file may be another one than it was."""
    settings: dict[str, Any] = {
        "source": "dfnd", "image_shape": SHAPE, "loop": {"steps": 4, "batch": 16}, "dictionary": {"clusters": 2},
        "out": tmp_path / "run", "verbose": False,
    }  # fmt: skip
    x = digits.x[:200]

    def again(teacher: nn.Module = teacher, width: int = 4, x: Tensor = x) -> Result:
        return distill(copy.deepcopy(teacher), student(width=width), unlabeled=x, **settings)

    cfg = resolve(json.loads((again().folder / "config.json").read_text()))  # type: ignore[operator]
    other = copy.deepcopy(teacher)
    next(other.parameters()).data[0] += 1e-3
    for finished in (True, False):
        if not finished:  # the same of a run that was stopped halfway
            shutil.rmtree(tmp_path / "run")
            it = Distiller(Job(cfg, copy.deepcopy(teacher), student(), SHAPE, x))
            assert not stopped_at(it, RunFolder(tmp_path / "run", cfg), lambda it: it.step == 2)
        before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
        with pytest.raises(DodistillError, match="began with other teacher; give"):
            again(other)
        with pytest.raises(DodistillError, match="began with other student; give"):
            again(width=8)
        with pytest.raises(DodistillError, match="began with other teacher and other unlabelled images; give"):
            again(other, x=x.flip(0))
        assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
        assert again().summary["steps"] == 4


def test_fingerprints() -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.tensor(3)
    assert fingerprint([a, b]) == fingerprint([a.clone(), b]) != fingerprint([b, a])
    assert len({fingerprint([v]) for v in (a, a.T, a.view(3, 2), a.double(), a + 1, -a)}) == 6
    images = torch.rand(2, 3, 4, 4)
    assert fingerprint([images]) == fingerprint([images.to(memory_format=torch.channels_last)])
    long = torch.arange(100.0)
    changed = long.clone()
    changed[40] = 0
    assert fingerprint([long], most=40) != fingerprint([changed], most=40) != fingerprint([changed[:90]], most=40)


# ---------------------------------------------------------------------------------------------- the folder


@pytest.fixture
def halfway(teacher: nn.Module, digits: Images, tmp_path: Path) -> tuple[Path, Distill, Callable[[], Distiller]]:
    """A run stopped twice, so that it has two checkpoints, and how to make the job again."""
    cfg = config("deepinv", ALL, steps=12)
    path = tmp_path / "run"
    for step in (3, 6):
        folder = RunFolder(path, cfg)
        assert not stopped_at(job(teacher, cfg), folder, lambda it, step=step: it.step == step)
    assert (path / "checkpoint.pt").exists()
    assert (path / "previous.pt").exists()
    assert sorted(p.name for p in path.glob("pool-*.pt")) == ["pool-1.pt", "pool-2.pt"]
    return path, cfg, lambda: job(teacher, cfg)


def finish(path: Path, cfg: Distill, again: Callable[[], Distiller]) -> tuple[Distiller, RunFolder]:
    it, folder = again(), RunFolder(path, cfg)
    assert it.run(folder)
    folder.close()
    return it, folder


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif "garbage" in how:
        path.write_bytes(random.Random(how).randbytes(1000))
    else:
        path.write_bytes(data[: int(float(how) * len(data))])


@pytest.mark.parametrize("how", ["0", "0.01", "0.5", "0.98", "garbage", "more garbage", "gone"])
@pytest.mark.parametrize("file", ["checkpoint.pt", "pool-2.pt"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(file: str, how: str, halfway: Any, tmp_path: Path) -> None:
    path, cfg, again = halfway
    whole, _ = finish(tmp_path / "whole", cfg, again)
    damage(path / file, how)
    it, folder = finish(path, cfg, again)
    if (file, how) != ("checkpoint.pt", "gone"):
        assert len(folder.notes) == 1
        assert file in folder.notes[0]
        assert "damaged or truncated" in folder.notes[0]
        assert "The previous checkpoint is used" in folder.notes[0]
    same(untimed(whole.state_dict()), untimed(it.state_dict()))
    assert metrics(tmp_path / "whole") == metrics(path)


def test_after_a_fall_back_there_are_two_whole_checkpoints_again(halfway: Any) -> None:
    path, cfg, again = halfway
    damage(path / "checkpoint.pt", "0.5")
    assert not stopped_at(again(), RunFolder(path, cfg), lambda it: it.step == 4)
    damage(path / "checkpoint.pt", "0.5")  # a second misfortune
    saved = RunFolder(path, cfg).load()
    assert saved is not None
    assert saved[0]["step"] == 3


def test_when_nothing_is_whole_it_says_so(halfway: Any) -> None:
    path, cfg, _ = halfway
    before = sorted(path.iterdir())
    for name in ("checkpoint.pt", "previous.pt"):
        damage(path / name, "0.5")
    with pytest.raises(DodistillError, match=r"checkpoint.pt is damaged.*previous.pt is damaged.*choose another --out"):
        RunFolder(path, cfg).load()
    assert sorted(path.iterdir()) == before


def test_a_folder_of_another_config_is_refused_by_key(halfway: Any) -> None:
    path, cfg, _ = halfway
    state = (path / "checkpoint.pt").read_bytes()
    other = resolve(cfg.to_tree(), {"loop.seed": 3, "source.bn": 2.0, "optim.lr": 0.07})
    with pytest.raises(DodistillError) as error:
        RunFolder(path, other)
    for said in ("belongs to another config", "loop.seed: 0 -> 3", "source.bn: 10.0 -> 2.0", "optim.lr: 0.05 -> 0.07"):
        assert said in str(error.value)
    assert "--out" in str(error.value)
    assert (path / "checkpoint.pt").read_bytes() == state
    RunFolder(path, resolve(cfg.to_tree(), {"loop.log_every": 7, "loop.checkpoint_seconds": 1, "loop.threads": 2}))


def test_a_folder_that_was_begun_before_a_setting_existed_goes_on(halfway: Any) -> None:
    path, cfg, _ = halfway
    older = json.loads((path / "config.json").read_text())
    del older["augment"]["views"], older["optim"]["floor"]
    (path / "config.json").write_text(json.dumps(older))
    RunFolder(path, cfg)
    with pytest.raises(DodistillError, match=r"augment\.views: (None|0) -> 4"):
        RunFolder(path, resolve(cfg.to_tree(), {"augment.views": 4}))
    (path / "config.json").write_text(json.dumps({**older, "aroma": {"sweet": 1}}))
    with pytest.raises(DodistillError, match="aroma"):
        RunFolder(path, cfg)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(DodistillError, match=r"not empty and holds no config\.json"):
        RunFolder(tmp_path, config())
    (tmp_path / "thesis.tex").unlink()
    for name in (".config.json.tmp", ".plan.json.tmp"):
        (tmp_path / name).write_text("{")  # a start that was killed while it wrote this
    RunFolder(tmp_path, config())
    (tmp_path / "config.json").write_text('{"loop"')
    with pytest.raises(DodistillError, match=r"config\.json is damaged or cut short"):
        RunFolder(tmp_path, config())
    (tmp_path / "file").write_text("")
    with pytest.raises(DodistillError, match="file is a file"):
        RunFolder(tmp_path / "file" / "run", config())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("where", ["open", "fsync", "replace", "torch.save"])
def test_a_full_or_read_only_disk_is_an_error_and_nothing_is_lost(
    where: str, number: int, halfway: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, cfg, again = halfway
    whole, _ = finish(tmp_path / "whole", cfg, again)
    folder, it = RunFolder(path, cfg), again()

    def fail(*args: Any, **_: Any) -> Any:
        if where == "open" and args[1] != "xb":
            return open(*args)
        raise OSError(number, os.strerror(number))

    def zip_writer(*_: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0\nmore")

    with monkeypatch.context() as m:
        if where == "open":
            m.setattr(files, "open", fail, raising=False)
        elif where == "torch.save":
            m.setattr(torch, "save", zip_writer)
        else:
            m.setattr(os, where, fail)
        with pytest.raises(DodistillError, match=r"cannot write .*\.pt") as error:
            stopped_at(it, folder, lambda it: it.step == 9)
    said = "unexpected pos" if where == "torch.save" else os.strerror(number)
    assert said in str(error.value)
    assert "rerun the command" in str(error.value)
    folder.close()
    assert not list(path.glob(".*.tmp")) or where == "replace"
    saved = RunFolder(path, cfg).load()
    assert saved is not None
    assert saved[0]["step"] == 6
    it, _ = finish(path, cfg, again)
    same(untimed(whole.state_dict()), untimed(it.state_dict()))
    assert metrics(tmp_path / "whole") == metrics(path)


def test_small_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    run_module.write_atomically(file, b"old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DodistillError, match=r"cannot write .*a.json: No space left"):
        run_module.write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_a_killed_life_wrote_after_its_checkpoint_is_forgotten(halfway: Any, tmp_path: Path) -> None:
    """Killed long after the last checkpoint: its later metrics and pools are not those of the new life."""
    path, cfg, again = halfway
    whole, _ = finish(tmp_path / "whole", cfg, again)
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "log", "step": 7, "loss": 0}\n{"kind": "lo')
    (path / "pool-3.pt").write_bytes((path / "pool-1.pt").read_bytes())
    it, _ = finish(path, cfg, again)
    assert metrics(tmp_path / "whole") == metrics(path)
    pool = torch.load(path / f"pool-{it.acquirer.pool.version}.pt", weights_only=True)
    same(dict(pool), whole.acquirer.pool_state())


def test_killed_before_the_first_checkpoint(teacher: nn.Module, tmp_path: Path) -> None:
    cfg = config(steps=8)
    whole, _ = finish(tmp_path / "whole", cfg, lambda: job(teacher, cfg))
    it, folder = job(teacher, cfg), RunFolder(tmp_path / "run", cfg)
    inner = it.match

    def killed() -> None:
        if it.step == 5:
            raise KeyboardInterrupt
        inner()

    it.match = killed  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt):
        it.run(folder)
    folder.close()
    assert len(metrics(tmp_path / "run")) > 3
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    it, _ = finish(tmp_path / "run", cfg, lambda: job(teacher, cfg))
    same(untimed(whole.state_dict()), untimed(it.state_dict()))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")


# ------------------------------------------------------------------------------------- finished, and killed


def command_tree(teacher: Path, source: str, unlabeled: Path, steps: int, **more: Any) -> Tree:
    return tree(
        source, ALL, steps=steps, teacher={"spec": str(teacher)}, student={"spec": "tiny4"},
        criterion="adaptation", data={"unlabeled": str(unlabeled) if source == "dfnd" else ""}, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def unlabeled(digits: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import numpy as np

    path = tmp_path_factory.mktemp("data") / "unlabeled.npy"
    np.save(path, digits.x[:300, 0].numpy())
    return path


def test_a_finished_run_is_not_run_again(
    teacher_file: Path, unlabeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, out = resolve(command_tree(teacher_file, "fast", unlabeled, 6)), tmp_path / "run"
    first = distill_config(cfg, out, verbose=False)
    files = {p.name: p.read_bytes() for p in out.iterdir()}
    assert {"config.json", "metrics.jsonl", "samples.png", "student.safetensors", "README.md", "report.html",
            "summary.json", "checkpoint.pt"} <= set(files)  # fmt: skip
    same(load_file(out / "student.safetensors"), first.student.model.state_dict())  # type: ignore[union-attr]

    def never(*_: Any) -> None:
        raise AssertionError("ran again")

    monkeypatch.setattr(Distiller, "match", never)
    monkeypatch.setattr(Distiller, "acquire", never)
    second = distill_config(cfg, out, verbose=False)
    assert second.summary == json.loads((out / "summary.json").read_text())
    same(first.student.state_dict(), second.student.state_dict())
    assert not second.student.training
    assert {p.name: p.read_bytes() for p in out.iterdir()} == files

    (out / "report.html").unlink()  # killed while it was written
    distill_config(cfg, out, verbose=False)
    assert (out / "report.html").exists()
    drop_checkpoints(out)
    assert not list(out.glob("*.pt"))
    third = distill_config(cfg, out, verbose=False)
    same(first.student.state_dict(), third.student.state_dict())


def test_killed_between_the_last_step_and_the_delivery(
    teacher_file: Path, unlabeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = resolve(command_tree(teacher_file, "fast", unlabeled, 6))
    whole = distill_config(cfg, tmp_path / "whole", verbose=False)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("dodistill.report.delivery.deliver", killed)
        with pytest.raises(KeyboardInterrupt):
            distill_config(cfg, tmp_path / "run", verbose=False)
    again = distill_config(cfg, tmp_path / "run", verbose=False)
    same(whole.student.state_dict(), again.student.state_dict())
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")


def flags(tree: Tree, prefix: str = "") -> list[str]:
    out: list[str] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            out += flags(value, f"{prefix}{key}.")
        elif value != "":
            out += [f"--{prefix}{key}", str(value)]
    return out


def last_step(out: Path) -> int:
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=-1)
    except OSError:
        return -1


KILLS = 2  # of one run; `make soak` makes two hundred


@pytest.mark.slow
@pytest.mark.parametrize("source", ["fast", "dfnd"])
@pytest.mark.timeout(900)
def test_a_real_process_killed_at_random_moments(
    source: str, teacher_file: Path, unlabeled: Path, tmp_path: Path
) -> None:
    steps, chance = 160, random.Random(time.time_ns())
    slow = {"loop": {"checkpoint_seconds": 0.1, "batch": 256}}
    given = command_tree(teacher_file, source, unlabeled, steps, **slow)
    cfg = resolve(given)
    distill_config(cfg, tmp_path / "whole", verbose=False, report=False)

    out, kills, moments = tmp_path / "run", 0, []
    command = [sys.executable, "-m", "dodistill", "distill", *flags(given), "--out", str(out), "--quiet", "--no-report"]
    for life in range(12):
        with open(tmp_path / "output.txt", "wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            target = last_step(out) + chance.randint(0, steps // 2) if life < KILLS else steps + 1
            patience = time.monotonic() + 120
            while process.poll() is None and last_step(out) < target:
                assert time.monotonic() < patience
                time.sleep(0.005)
            if process.poll() is None and life < KILLS:
                time.sleep(chance.random() * 0.05)
                process.send_signal(signal.SIGKILL)
            code = process.wait()
        text = (tmp_path / "output.txt").read_text()
        if code == 0:
            break
        assert code == -signal.SIGKILL, text
        kills += 1
        moments.append(last_step(out))
    assert code == 0
    assert kills >= 1, moments
    whole: dict[str, Tensor] = load_file(tmp_path / "whole" / "student.safetensors")
    same(whole, load_file(out / "student.safetensors"), f"killed at {moments}")
    assert metrics(tmp_path / "whole") == metrics(out), f"killed at {moments}"
    mine, its = (json.loads((p / "summary.json").read_text()) for p in (out, tmp_path / "whole"))
    for key in ("agreement", "delivered", "steps", "images", "class_shares", "drawn_shares", "key"):
        assert mine[key] == its[key]


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    cfg = config("fast")
    held = RunFolder(tmp_path / "run", cfg)
    RunFolder(tmp_path / "run", cfg)  # the same process may look at its own folder
    held.close()
    held = RunFolder(tmp_path / "run", cfg)
    code = (
        "import json, sys\nfrom dodistill.config.tree import resolve\n"
        "from dodistill.engine.run_folder import RunFolder\n"
        "RunFolder(sys.argv[1], resolve(json.load(open(sys.argv[1] + '/config.json'))))"
    )

    def other() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(tmp_path / "run")]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    refused = other()
    assert refused.returncode == 1
    assert "is in use by another process; wait for it" in refused.stderr
    held.close()
    assert other().returncode == 0, other().stderr
