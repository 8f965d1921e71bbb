"""One cell by `run_cell`, and the queue of GPUs of a grid on one machine."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dodistill import run_cell
from dodistill.commands.cell import Failed, Stopped, placed
from dodistill.commands.compare import compare
from dodistill.commands.executors import local
from dodistill.commands.executors.local import Local
from dodistill.commands.executors.shared import Work
from dodistill.config.grid import Cell, cells, read_recipe
from dodistill.errors import STOPPED, DodistillError
from test_trust import grid as grid  # a fixture


def the_cell(recipe: Path) -> Cell:
    (cell,) = cells(read_recipe(recipe), recipe.parent / "out/teachers")
    return cell


def test_a_record_is_that_of_the_grid(grid: Path) -> None:
    cell, out = the_cell(grid), grid.parent / "out"
    named = {"published": 90.0, "threads": 1, "teachers": str(out / "teachers")}
    given = pickle.loads(pickle.dumps((run_cell, (cell.config, str(out / "runs" / cell.slug), cell.label), named)))
    record = given[0](*given[1], **given[2])
    assert (record["key"], record["published"], record["label"]) == (cell.key, 90.0, {"seed": "0"})
    assert "{teachers}/t.safetensors" in json.dumps(record)
    assert str(out) not in json.dumps(record)
    assert compare(grid, out) == 0  # the run is there already: only its record is made
    assert json.loads((out / "cells" / f"{cell.key}.json").read_text()) == record | {"published": None}


@pytest.mark.parametrize("folder", ["/home/zoé/teachers", "C:\\Users\\me\\teachers", '/a "b"', "/home/me"])
def test_a_folder_of_any_name_is_replaced(folder: str) -> None:
    assert placed({"spec": f"{folder}/t.pth", "n": [1]}, folder, "{teachers}") == {"spec": "{teachers}/t.pth", "n": [1]}
    assert placed({"spec": "{teachers}/t.pth"}, "{teachers}", folder) == {"spec": f"{folder}/t.pth"}
    assert placed({"spec": folder}, "", "x") == {"spec": folder}


def test_the_settings_of_a_cell_are_replaced_in_one_move(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second `compare` writes them again, while the process of the first may be reading them."""
    cell, run = the_cell(grid), grid.parent / "run"
    settings, read = grid.parent / "run.yaml", grid.parent / "read.yaml"
    settings.write_text("first")
    os.link(settings, read)
    monkeypatch.setattr("dodistill.commands.cell.supervise", lambda *_: STOPPED)
    with pytest.raises(Stopped):
        run_cell(cell.config, run)
    assert read.read_text() == "first"
    assert yaml.safe_load(settings.read_text()) == cell.config.to_tree()
    assert not list(grid.parent.glob(".run*"))


def test_failures_are_exceptions_that_pickle(grid: Path) -> None:
    cell, run = the_cell(grid), grid.parent / "run"
    tree = cell.config.to_tree() | {"teacher": {"spec": str(grid.parent / "none.safetensors")}}
    with pytest.raises(Failed, match=r"exit status 2.*none\.safetensors") as caught:
        run_cell(tree, run, threads=1)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.status, str(again)) == (2, str(caught.value))
    with pytest.raises(DodistillError, match="did you mean 'steps'"):
        run_cell(tree | {"loop": {"stesp": 1}}, run)


PARENT = """
import sys, dodistill
from pathlib import Path
dodistill.run_cell(dodistill.resolve(__import__("yaml").safe_load(Path(sys.argv[1]).read_text())), sys.argv[2])
"""


def test_a_cell_ends_with_its_caller_and_goes_on(grid: Path) -> None:
    """Killed without notice, the caller leaves no process behind; another one goes on, and can be told to stop."""
    cell, run = the_cell(grid), grid.parent / "run"
    tree = cell.config.to_tree()
    tree["loop"] |= {"steps": 100_000, "eval_every": 100_000, "log_every": 1}
    (grid.parent / "config.yaml").write_text(json.dumps(tree))
    with subprocess.Popen([sys.executable, "-c", PARENT, str(grid.parent / "config.yaml"), str(run)]) as caller:
        wait(lambda: (run / "metrics.jsonl").exists() and last_step(run) > 0)  # earlier there is nothing to save
        caller.kill()
    wait(lambda: str(run) not in processes())
    assert (run / "checkpoint.pt").exists()
    step = last_step(run)
    stop = threading.Event()
    threading.Thread(target=lambda: (wait(lambda: last_step(run) > step), stop.set()), daemon=True).start()
    with pytest.raises(Stopped, match="rerun to resume"):
        run_cell(tree, run, threads=1, stop=stop)
    assert last_step(run) > step
    assert str(run) not in processes()


def wait(true: Any, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def processes() -> str:
    return subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout


def last_step(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def work(name: str, device: str = "auto") -> Work:
    return Work({}, name, {}, None, "", device=device)


@pytest.mark.parametrize(
    ("jobs", "per_gpu", "gpus", "at_a_time", "of_a_card"),
    [
        (None, 0, "", 1, {}),
        (3, 0, "", 3, {}),
        (3, 4, "", 3, {}),
        (None, 0, "01", 1, {"0": 1, "1": 1}),
        (2, 0, "01", 2, {"0": 1, "1": 1}),
        (3, 0, "01", 3, {"0": 2, "1": 2}),
        (None, 2, "01", 4, {"0": 2, "1": 2}),
        (9, 1, "57", 2, {"5": 1, "7": 1}),
    ],
)
def test_each_cell_has_a_card_or_a_share(
    jobs: int | None, per_gpu: int, gpus: str, at_a_time: int, of_a_card: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    now: list[str] = []
    seen: list[tuple[int, dict[str, int]]] = []
    lock, barrier = threading.Lock(), threading.Barrier(at_a_time)

    def pretend(_tree: Any, folder: str, *_: Any, environment: dict[str, str], **named: Any) -> dict[str, Any]:
        card = environment.get("CUDA_VISIBLE_DEVICES", "none")
        with lock:
            now.append(card)
            seen.append((len(now), {name: now.count(name) for name in {*now} - {"none"}}))
        barrier.wait(10)
        with lock:
            now.remove(card)
        return {"card": card, "threads": named["threads"]}

    monkeypatch.setattr(local, "run_cell", pretend)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    executor = Local(jobs, per_gpu, list(gpus))
    assert executor.jobs == at_a_time
    records = [h.result().record or {} for h in executor.submit([work(str(i)) for i in range(4 * at_a_time)])]
    executor.close()
    assert max(count for count, _ in seen) == at_a_time
    assert all(cards.get(name, 0) <= most for _, cards in seen for name, most in of_a_card.items())
    used = {r["card"] for r in records}
    assert used == (set(of_a_card) or {"none"}) if at_a_time > 1 or not gpus else used <= set(of_a_card)
    assert {r["threads"] for r in records} == {8 // at_a_time}


def test_a_cell_that_names_its_device_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "run_cell", lambda *_, environment, **__: environment)
    executor = Local(2, 0, ["3"])
    handles = executor.submit([work("a", "cpu"), work("b", "cuda:1"), work("c", "cuda")])
    assert [h.result().record for h in handles] == [{}, {}, {"CUDA_VISIBLE_DEVICES": "3"}]
    executor.close()


@pytest.mark.parametrize(("given", "names"), [(None, ["0", "1"]), ("4, 6", ["4", "6"]), ("2", ["2"])])
def test_the_names_of_gpus(given: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.torch.cuda, "device_count", lambda: len(names))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert local.visible_gpus() == names


def test_an_interrupted_call_stops_its_process(tmp_path: Path) -> None:
    from dodistill.commands.cell import supervise

    class Interrupts:
        def is_set(self) -> bool:
            raise KeyboardInterrupt

    code = "import sys, time; print(sys.argv, flush=True); time.sleep(600)"
    with pytest.raises(KeyboardInterrupt):
        supervise([sys.executable, "-c", code, str(tmp_path)], tmp_path / "log", {}, stop=Interrupts())
    assert str(tmp_path) not in processes()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
