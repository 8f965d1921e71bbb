"""One run in two processes: equal to one process, whatever the method; stops, losses, resumption and refusals."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dodistill
from dodistill.commands.cli import main
from dodistill.config import registry
from dodistill.config.tree import Tree
from dodistill.core.launch import joined
from dodistill.core.ranks import Group, Ranks
from dodistill.criteria import kl
from dodistill.criteria.shared.base import Criterion
from dodistill.data.images import Images
from dodistill.engine.shared_batch import couples
from dodistill.errors import DodistillError
from dodistill.interventions.shared.base import Intervention
from dodistill.updates.shared.base import Update
from helpers import SOURCES, tree

HERE = Path(__file__).parent
LOOP = {"eval_every": 5, "log_every": 5}
STEPS = 5


def start(folder: Path, rank: int, port: int, *words: str, **more: str) -> subprocess.Popen[str]:
    """One process of two, as torchrun would start it."""
    env = os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *words], env=env | more, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def together(folder: Path, *words: str, seconds: float = 900, **more: str) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of two processes that ran to their ends."""
    at = port()
    both = [start(folder, rank, at, *words, **more) for rank in (0, 1)]
    try:
        said = [process.communicate(timeout=seconds) for process in both]
    finally:
        for process in both:
            process.kill()
    return [(process.returncode, out, error) for process, (out, error) in zip(both, said)]


def cases() -> dict[str, dict[str, Any]]:
    """Every source, each intervention, every update and criterion, and what else meets a batch."""
    made: dict[str, Tree] = {}
    for source in SOURCES:
        made[source] = tree(source, "kdci+stratified", steps=STEPS, loop=LOOP)
    for source, intervention in itertools.product(("fast", "dfnd", "deepinv"), ("none", "kdci", "stratified")):
        made[f"{source} {intervention}"] = tree(source, intervention, steps=STEPS, loop=LOOP)
    bank = {"name": "bank", "capacity": 2, "size": 8, "every": 1, "first": 1}
    vae = {"name": "generative", "size": 6, "new": 16, "train": 1, "latent": 8, "width": 4}
    average = {"name": "ema_generator", "size": 6}
    for name, replay, update in (
        ("replay bank", bank, {"name": "replay"}),
        ("replay generative", vae, {"name": "replay"}),
        ("retain bank", bank, {"name": "retain", "alpha": 0.1}),
        ("retain first order", bank, {"name": "retain", "order": "first_order", "alpha": 0.1}),
        ("retain average", average, {"name": "retain", "alpha": 0.1}),
    ):
        acts, source = ("kdci" if "retain" in name else "none"), ("adversarial" if replay is average else "dfnd")
        made[name] = tree(source, acts, steps=STEPS, loop=LOOP, replay=replay, update=update)
    for criterion in ("l1", "hinton", "adaptation", "dkd", "at", "fitnet", "sp", "rkd", "crd", "cid"):
        more: Tree = {"criterion": {"name": criterion} | ({"negatives": 32} if criterion == "crd" else {})}
        made[f"criterion {criterion}"] = tree("data", steps=STEPS, loop=LOOP, **more)
    cid = {"criterion": "cid", "cid": {"init": 0.2, "refresh": 0.2}}
    made["cid, both"] = tree("data", "cid+kdci", steps=STEPS, loop=LOOP, **cid)
    made["coupled, retained"] = tree(
        "dfnd", "kdci", steps=STEPS, loop=LOOP, criterion="cid", replay=bank,
        update={"name": "retain", "alpha": 0.1},
    )  # fmt: skip
    made["dictionary of batches"] = tree(
        "fast", "kdci", steps=STEPS, loop=LOOP, dictionary={"clusters": 4, "iterations": 3, "of": "batch"}
    )
    made["uneven parts"] = tree("dfnd", "kdci", steps=STEPS, loop=LOOP | {"batch": 15})
    made["stored views"] = tree("dfnd", steps=STEPS, loop=LOOP, augment={"pad": 1, "flip": False, "views": 2})
    made["resized crops"] = tree("dfnd", steps=STEPS, loop=LOOP, augment={"crop": "resized", "mix": "mixup"})
    blends = {"augment": {"views": 1, "mix": "cutmix"}, "source": {"batch": 8, "extra": 1}}
    made["stored blends"] = tree("fast", steps=STEPS, loop=LOOP, **blends)
    made["rows of a file"] = tree("dfnd", "kdci+stratified", steps=STEPS, loop=LOOP)
    return {name: {"tree": value, "file": name == "rows of a file"} for name, value in made.items()}


@pytest.fixture(scope="module")
def given(taught: nn.Module, digits: Images, digits_test: Images) -> dict[str, Any]:
    assert digits.y is not None
    assert digits_test.y is not None
    return {
        "teacher": taught, "x": digits.x[:300], "y": digits.y[:300], "test_x": digits_test.x[:50],
        "test_y": digits_test.y[:50],
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found in all cases and scenes."""
    folder = tmp_path_factory.mktemp("ranks")
    np.save(folder / "images.npy", given["x"].numpy())
    torch.save(given | {"file": str(folder / "images.npy")}, folder / "given.pt")
    torch.save(cases(), folder / "cases.pt")
    ends = together(folder, str(HERE / "ranked.py"), str(folder))
    files = [folder / f"found-{rank}.json" for rank in (0, 1)]
    both = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    for status, _, error in ends:
        if status:
            print(status, error[-4000:])  # pytest shows it with the test that misses something
    return both


@pytest.mark.parametrize("name", list(cases()))
def test_two_processes_equal_one(name: str, found: list[dict[str, Any]]) -> None:
    """Weights, buffers, the average, optimisers, pool and dictionary after the last step; and what was logged."""
    gaps = (found[0] | found[1])[name]
    assert gaps.keys() >= {"networks", "optimizers", "pool", "holdout", "logs"}
    assert ("dictionary" in gaps) == ("kdci" in str(cases()[name]["tree"]["intervention"]))
    most = dict.fromkeys(gaps, 1e-5) | {"logs": 1e-4, "optimizers": 1e-4}
    if gaps["pool"][0] > 1e-5:  # an image made in parts may round to the next of 256 levels, where it lies between two
        most = dict.fromkeys(gaps, 1e-3) | {"pool": 1.01 / 255, "holdout": 1.01 / 255, "logs": 1e-2, "dictionary": 1e-2}
        most |= {"optimizers": 0.1}  # momentum sums the differences of the gradients
    wrong = {part: (gap, where) for part, (gap, where) in gaps.items() if gap > most[part]}
    assert not wrong, wrong


@pytest.mark.parametrize("name", ["begun_on_two", "begun_on_one"])
def test_a_checkpoint_knows_nothing_of_the_number_of_processes(name: str, found: list[dict[str, Any]]) -> None:
    """The run stops at the word of the last rank, on all ranks at the same step, and goes on with another number."""
    scene = found[0][name]
    assert scene["half"] == [False, 3]
    assert name == "begun_on_one" or found[1][name]["half"] == [False, 3]
    assert scene["gap"][0] < 1e-5, scene


def test_time_is_that_of_the_first_rank(found: list[dict[str, Any]]) -> None:
    for its in found:
        finished, where = its["out_of_time_in_an_acquisition"]
        assert not finished
        assert where == "in labelling images, 64 of 300, of acquisition 1"
    assert found[0]["steps_by_the_first_clock"] == found[1]["steps_by_the_first_clock"]
    finished, step, steps = found[0]["steps_by_the_first_clock"]
    assert finished
    assert step == steps < 50


def test_an_acquisition_is_shared_out(found: list[dict[str, Any]]) -> None:
    for its in found:
        seen, untouched = its["synthesis"]
        assert max(seen) == 16
        assert untouched


def test_an_error_of_the_first_rank_stops_all(found: list[dict[str, Any]]) -> None:
    assert [its["diverged"][0] for its in found] == ["Diverged", "Elsewhere"]
    assert "match/kd, in step 2" in found[0]["diverged"][1]
    assert found[0]["an_error_of_the_first"] == ["ValueError", "no room"]
    assert found[1]["an_error_of_the_first"] == ["Elsewhere", "rank 0 has stopped: ValueError: no room"]


@pytest.mark.parametrize(
    ("scene", "said"),
    [
        ("another_setting", "rank 1 differs from rank 0 in optim.lr: 0.1 -> 0.2"),
        ("another_teacher", "rank 1 differs from rank 0 in teacher: '"),
        ("other_images", "rank 1 differs from rank 0 in unlabelled images: '"),
        ("another_version", f"rank 1 differs from rank 0 in dodistill: '{dodistill.__version__}' -> '9.9.9'"),
        ("a_silent_criterion", "criterion SilentConfig does not say whether it couples the images of a batch"),
    ],
)
def test_what_would_go_wrong_is_refused(scene: str, said: str, found: list[dict[str, Any]]) -> None:
    for its in found:
        assert its[scene][0] == "DodistillError"
        assert its[scene][1].startswith(said)


def test_distill_in_python_gives_each_process_the_result(found: list[dict[str, Any]]) -> None:
    first, other = ([run[:3] for run in its["distilled"]] for its in found)
    assert first == other
    assert first[0] == first[1]  # the second one opens the finished run
    assert first[0][0]
    assert [run[3] for run in found[1]["distilled"]] == ["None", "None"]
    assert found[0]["distilled"][0][3].endswith("whole")


def test_each_process_has_its_own_dropout(found: list[dict[str, Any]]) -> None:
    for its in found:
        on_both, twice, as_before = its["dropout"]
        assert 800 < on_both < 1200  # a quarter of 4000, as of independent masks
        assert 800 < twice < 1200
        assert as_before


def test_parts_of_a_batch() -> None:
    group = [Group(rank, 3, torch.device("cpu")) for rank in range(3)]
    x = torch.arange(8)
    assert torch.equal(torch.cat([one.cut(x, 8) for one in group]), x)
    assert sum(one.weight(8) for one in group) == pytest.approx(3)
    with pytest.raises(DodistillError, match="3 processes cannot share a batch of 2; give a batch of 3 or more"):
        group[0].cut(x[:2], 2)
    alone = Ranks()
    assert alone.cut(x, 8) is x
    assert alone.weight(8) == 1.0
    assert alone.averaged([x, None])[0] is x


def test_every_process_needs_a_device_of_its_own() -> None:
    group = Group(1, 2, torch.device("cpu"))
    group.require_device(torch.device("cpu"))
    with pytest.raises(DodistillError, match="device is 'cuda:1', but 2 processes need one each; give --device cuda"):
        group.require_device(torch.device("cuda:1"))
    with pytest.raises(DodistillError, match="rank 1 finds no GPU of its own"):
        group.require_device(torch.device("cuda"))


class _Own(kl.KL):
    def forward(self, s: Tensor, t: Tensor, batch: Any = None) -> dict[str, Tensor]:
        return super().forward(s, t, batch)


class _Stated(_Own):
    couples = True


class _Weights(Intervention):
    def weights(self, pool: Any, dictionary: Any) -> None:
        return None


def test_what_a_class_says_counts_unless_a_class_below_changes_what_it_does() -> None:
    said = [couples(part) for part in (kl.KL(4.0), _Own(4.0), _Stated(4.0), _Weights(), Intervention())]
    assert said == [False, None, True, False, False]


@pytest.mark.parametrize("axis", ["criterion", "update", "intervention"])
def test_every_choice_of_this_package_says_whether_it_couples(axis: str) -> None:
    for name in registry.names(axis):
        made = sys.modules[registry.config(axis, name).__module__]
        bases = (Criterion, Intervention, Update)
        parts = [v for v in vars(made).values() if isinstance(v, type) and issubclass(v, bases)]
        for part in [p for p in parts if p.__module__ == made.__name__]:
            assert couples(part.__new__(part)) is not None, part


# ------------------------------------------------------------------------------------------ a process is lost


def children(pid: int) -> list[int]:
    """The processes that a process has started (Linux)."""
    tasks = Path(f"/proc/{pid}/task")
    return [int(c) for task in tasks.iterdir() for c in (task / "children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in /proc")
def test_a_killed_process_stops_all_and_one_process_goes_on(teacher_file: Path, tmp_path: Path) -> None:
    """Under torchrun. One process then finishes the run from the last checkpoint."""
    words = [
        "distill", "--teacher", str(teacher_file), "--student", "tiny4", "--source", "procedural", "--preset", "desk",
        "--source.n", "60", "--source.candidates", "80", "--steps", "150", "--loop.batch", "16", "--augment.pad", "1",
        "--loop.checkpoint_seconds", "0", "--no-report", "--quiet", "--device", "cpu", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dodistill"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "said", "w") as said:
        both = subprocess.Popen([sys.executable, *launcher, *words], env=env, stdout=said, stderr=said)
        try:
            until = time.monotonic() + 300
            while not (tmp_path / "run" / "checkpoint.pt").exists():
                assert time.monotonic() < until, (tmp_path / "said").read_text()
                assert both.poll() is None, (tmp_path / "said").read_text()
                time.sleep(0.02)
            ranks = {int(_environment(pid)["RANK"]): pid for pid in children(both.pid) if "RANK" in _environment(pid)}
            os.kill(ranks[1], signal.SIGKILL)
            killed = time.monotonic()
            assert both.wait(60) != 0
            assert time.monotonic() - killed < 30
        finally:
            both.kill()
    text = (tmp_path / "said").read_text()
    assert re.search(r"dodistill: (another process of this run has ended|nothing was heard of rank 1)", text), text
    assert not (tmp_path / "run" / "summary.json").exists()
    assert main(words) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 150


def _environment(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(line.split("=", 1) for line in lines if "=" in line)


_HANGS = """
import os, signal, sys, time
from dodistill.core import launch
launch.BEAT, launch.LOST = 0.5, 3.0
with launch.joined() as ranks:
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    print("waits", ranks.any(False))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no signal that stops a process")
def test_a_process_that_hangs_ends_the_others_with_a_reason(tmp_path: Path) -> None:
    """Without torchrun. The other process waits in an operation of the group, and its connection is alive."""
    at = port()
    both = [start(tmp_path, rank, at, "-c", _HANGS) for rank in (0, 1)]
    try:
        out, error = both[0].communicate(timeout=300)
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert both[0].returncode == 1
    assert "rank 0: nothing was heard of rank 1 for 3 seconds" in error
    assert "waits" not in out


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "the environment variable RANK is ''; it must be a number, as torchrun sets it"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not; start the processes by torchrun"),
    ],
)
def test_half_a_launch_is_refused(variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DodistillError, match=said), joined():
        pass


def test_one_process_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as ranks:
        assert type(ranks) is Ranks
    assert not torch.distributed.is_initialized()
