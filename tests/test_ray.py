"""A grid on Ray's own cluster of two nodes on this machine, of which one is lost under its running cells."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from dodistill.commands.compare import compare
from dodistill.commands.storage import Storage
from helpers import same
from test_cell import wait
from test_trust import grid as grid  # a fixture

pytest.importorskip("ray", reason="ray is an extra")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore")]
NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes of one CPU and a pretended GPU. Afterwards no process of theirs is left."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("OMP_NUM_THREADS", "1"), ("RAY_TMPDIR", "/tmp")):
            patch.setenv(name, value)
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("scratch")))  # a lost process leaves its folder there
        its = Cluster(initialize_head=True, head_node_args=NODE)
        session = Path(its.head_node.get_session_dir_path()).name
        its.second = its.add_node(**NODE)
        try:
            yield its
        finally:
            ray.shutdown()
            its.shutdown()
            wait(lambda: session not in listed(), 60)


def listed() -> str:
    return subprocess.run(["ps", "ax", "-ww", "-o", "args"], capture_output=True, text=True, check=True).stdout


class Watch(threading.Thread):
    """Follows the storage, and takes a node away once two cells are running."""

    def __init__(self, storage: Path, cluster: Any) -> None:
        super().__init__(daemon=True)
        self._storage, self._cluster = Storage(str(storage)), cluster
        self.attempts: dict[str, list[str]] = {}  #: key -> the attempts that stored a checkpoint, in order
        self.began: dict[str, int] = {}  #: key -> the set that its last attempt went on from
        self.lost: list[str] = []  #: the cells that were running when the node was taken away
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.is_set():
            self.look()
            running = [key for key in self.attempts if self._storage.names(f"{key}/sets")]
            if len(running) == 2 and not self.lost:
                self.lost = running
                self._cluster.remove_node(self._cluster.second, allow_graceful=False)
            time.sleep(0.05)

    def look(self) -> None:
        for key in self._storage.names(""):
            for name in [] if key.startswith("teacher") else self._storage.names(f"{key}/sets"):
                attempts = self.attempts.setdefault(key, [])
                if (attempt := name[9:17]) not in attempts:
                    attempts.append(attempt)
                if attempt == attempts[-1]:
                    try:
                        found = json.loads(self._storage.read(f"{key}/sets/{name}"))
                    except FileNotFoundError:  # replaced meanwhile
                        continue
                    self.began[key] = found["began"]


def test_a_lost_node_changes_no_bit(
    grid: Path, tmp_path: Path, cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load(grid.read_text())
    lesson = {"model": "tiny4", "data": "digits", "normalise": "mnist", "epochs": 1, "batch": 256, "flip": "false"}
    recipe["teachers"] = {"taught": lesson | {"precision": "fp32"}}
    recipe["base"]["teacher"] = "{teachers}/taught.safetensors"
    recipe["base"]["loop"] |= {"steps": 400, "eval_every": 200, "log_every": 20, "checkpoint_seconds": 0.0}
    recipe["grid"] = {"seed": [0, 1, 2]}
    grid.write_text(yaml.safe_dump(recipe, sort_keys=False))
    out, storage, local = grid.parent / "out", tmp_path / "storage", tmp_path / "local"
    watch = Watch(storage, cluster)
    watch.start()
    try:
        assert compare(grid, out, on="ray", address=cluster.address, storage=str(storage), per_gpu=2) == 0
    finally:
        watch.ended.set()
        watch.join()
    said = capsys.readouterr()
    assert "training taught" in said.err
    assert "3 of 3 cells" in said.out
    assert len(watch.lost) == 2
    again = [key for key in watch.lost if len(watch.attempts[key]) == 2]
    assert again, watch.attempts
    assert all(watch.began[key] > 0 for key in again)  # they went on from a checkpoint of the lost node
    assert not [p for p in storage.rglob("*") if p.is_file()]

    (local / "teachers").mkdir(parents=True)
    (local / "teachers/taught.safetensors").write_bytes((out / "teachers/taught.safetensors").read_bytes())
    assert compare(grid, local, jobs=2) == 0
    names = sorted(p.name for p in (out / "cells").iterdir())
    assert names == sorted(p.name for p in (local / "cells").iterdir())
    for name in names:
        mine, its = (json.loads((place / "cells" / name).read_text()) for place in (out, local))
        for record in (mine, its):
            assert str(tmp_path) not in json.dumps(record)
        keys = ("label", "last", "best", "agreement", "teacher", "share_ratio", "key", "config", "weights", "code")
        assert {k: mine[k] for k in keys} == {k: its[k] for k in keys}
        students = [load_file(place / mine["folder"] / "student.safetensors") for place in (out, local)]
        same(*students)
        assert (out / mine["folder"] / "report.html").exists()


def test_a_signal_stops_what_runs_and_drops_what_waits(
    grid: Path, tmp_path: Path, cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The running cell stores a checkpoint, from which the next start goes on."""
    recipe = yaml.safe_load(grid.read_text())
    recipe["base"]["loop"] |= {"steps": 100_000, "eval_every": 100_000, "log_every": 1, "checkpoint_seconds": 1e9}
    recipe["grid"] = {"seed": [0, 1]}
    grid.write_text(yaml.safe_dump(recipe, sort_keys=False))
    storage = Storage(str(tmp_path / "storage"))

    scratch = Path(os.environ["TMPDIR"])
    before = set(scratch.iterdir())  # of the lost node

    def begun() -> bool:
        for folder in set(scratch.iterdir()) - before:
            try:
                if '"log"' in (folder / "runs/it/metrics.jsonl").read_text():
                    return True
            except OSError:  # not begun, or removed meanwhile
                continue
        return False

    def terminate() -> None:
        try:
            wait(begun)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    assert compare(grid, grid.parent / "out", on="ray", address=cluster.address, storage=storage.url) == 75
    said = capsys.readouterr().err
    assert said.count("stopped") >= 2
    assert "FAILED" not in said
    assert len([name for name in storage.names("") if storage.names(f"{name}/sets")]) in (1, 2)
    assert str(scratch) not in listed()
