"""One process of a group, for test_ranks.py. `python ranked.py FOLDER` runs the cases in FOLDER/cases.pt together with
the other processes, and some of them alone, and plays the scenes below. FOLDER/found-RANK.json gets what it finds."""

from __future__ import annotations

import copy
import faulthandler
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import helpers
from dodistill.api import distill
from dodistill.config.tree import Tree, resolve
from dodistill.core import launch
from dodistill.core.batch import Batch
from dodistill.core.context import Context
from dodistill.core.deadline import Deadline
from dodistill.core.launch import joined
from dodistill.core.ranks import Ranks
from dodistill.core.runtime import seeded_steps
from dodistill.criteria.shared.base import Criterion, CriterionConfig
from dodistill.data.rows import FileRows
from dodistill.engine import Distiller, Job, Test
from dodistill.engine.plan import Plan
from dodistill.engine.run_folder import NoFolder, RunFolder, fingerprint
from dodistill.errors import DodistillError
from dodistill.files import replacing
from dodistill.report.result import Recorder
from helpers import SHAPE, fitting, student

Case = Mapping[str, Any]


def made(case: Case, given: Mapping[str, Any], ranks: Ranks) -> Distiller:
    """The run of a case. The other ranks begin with other weights, which those of the first one must replace."""
    config = resolve(copy.deepcopy(case["tree"]))
    teacher = fitting(config.source.name, copy.deepcopy(given["teacher"]))
    labels = given["y"] if config.source.reads_labels else None
    test = Test(given["test_x"], given["test_y"])
    x = FileRows(given["file"]) if case.get("file") else given["x"]
    return Distiller(Job(config, teacher, student(1 + ranks.rank), SHAPE, x, labels, test), ranks=ranks)


def ended(it: Distiller) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run to the end: what there is then, and what was logged."""
    recorder = Recorder()
    assert it.run(watchers=[recorder] if it.ranks.first else [])
    networks = it.matcher.state_dict()
    state = {"optimizers": networks.pop("optimizers"), "networks": networks, "pool": it.acquirer.pool.state_dict()}
    state["holdout"] = it.acquirer.holdout.state_dict()
    if it.acquirer.dictionary is not None:
        state["dictionary"] = it.acquirer.dictionary.state_dict()
    return state, recorder.history


def apart(a: Any, b: Any, where: str = "") -> tuple[float, str]:
    """The largest difference of two nested states, relative to a tensor's largest number if that exceeds 1 (of 8-bit
    images, to 255), and its place."""
    if isinstance(a, Tensor):
        if not a.numel():
            return 0.0, where
        image = b.dtype == torch.uint8
        a, b = a.double(), b.double()
        return float((a - b).abs().max() / (255 if image else b.abs().max().clamp_min(1.0))), where
    if isinstance(a, Mapping):
        assert list(a) == list(b), (where, list(a), list(b))
        return max((apart(a[k], b[k], f"{where}.{k}") for k in a), default=(0.0, where))
    if isinstance(a, list | tuple):
        assert len(a) == len(b), where
        return max((apart(x, y, f"{where}.{i}") for i, (x, y) in enumerate(zip(a, b))), default=(0.0, where))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) / max(abs(b), 1.0), where
    assert a == b, (where, a, b)
    return 0.0, where


TIMES = ("seconds", "rate")


def numbers(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in history]


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    nested = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return [t for value in nested for t in tensors(value)]


def equality(name: str, case: Case, given: Mapping[str, Any], ranks: Ranks, turn: int) -> dict[str, Any] | None:
    """How far a run of the group is from one of a single process, which each rank makes of every other case."""
    state, history = ended(made(case, given, ranks))
    ranks.require_same(lambda: {name: fingerprint(tensors(state))})
    logged = ranks.share(lambda: numbers(history))
    if turn % ranks.world != ranks.rank:
        return None
    alone, its = ended(made(case, given, Ranks()))
    return {part: apart(state[part], alone[part]) for part in alone} | {"logs": apart(logged, numbers(its))}


# ------------------------------------------------------------------------------------- stops, losses, refusals


def refused(act: Callable[[], object]) -> list[str]:
    """The type and text of the error that `act` must raise."""
    try:
        act()
    except DodistillError as error:
        return [type(error).__name__, str(error)]
    raise AssertionError("nothing was refused")


class Scenes:
    """Each method is one scene that both processes play; what it returns goes to the tests."""

    def __init__(self, folder: Path, given: Mapping[str, Any], ranks: Ranks) -> None:
        self.folder, self.given, self.ranks = folder, given, ranks

    def made(self, tree: Tree, ranks: Ranks | None = None) -> Distiller:
        return made({"tree": tree}, self.given, ranks or self.ranks)

    def _opened(self, name: str, it: Distiller, ranks: Ranks) -> RunFolder | NoFolder:
        return RunFolder(self.folder / name, it.config) if ranks.first else NoFolder()

    def _half(self, name: str, tree: Tree, ranks: Ranks) -> list[Any]:
        """Begin a run, and stop after three steps, at the word of the last rank."""
        it, deadline = self.made(tree, ranks), Deadline()
        inner = it.match

        def match() -> None:
            inner()
            if it.step == 3 and ranks.rank == ranks.world - 1:
                deadline.stop()

        it.match = match  # type: ignore[method-assign]
        folder = self._opened(name, it, ranks)
        done = it.run(folder, deadline=deadline)
        folder.close()
        return [done, it.step]

    def _rest(self, name: str, tree: Tree, ranks: Ranks) -> dict[str, Any]:
        """The second half: what there is at the end."""
        it = self.made(tree, ranks)
        folder = self._opened(name, it, ranks)
        assert it.run(folder)
        folder.close()
        return it.matcher.state_dict()

    def begun_on_two(self) -> dict[str, Any]:
        tree = two_kinds()
        half = self._half("two-one", tree, self.ranks)
        state = self._rest("two-one", tree, Ranks()) if self.ranks.first else {}
        return {"half": half, "gap": self._gap(state, tree)}

    def begun_on_one(self) -> dict[str, Any]:
        tree = two_kinds()
        half = self._half("one-two", tree, Ranks()) if self.ranks.first else []
        return {"half": half, "gap": self._gap(self._rest("one-two", tree, self.ranks), tree)}

    def _gap(self, state: dict[str, Any], tree: Tree) -> Any:
        """From an uninterrupted run of one process."""
        if not self.ranks.first:
            return None
        networks, _ = ended(self.made(tree, Ranks()))
        return apart({k: state[k] for k in networks["networks"]}, networks["networks"])

    def out_of_time_in_an_acquisition(self) -> Any:
        it = self.made(helpers.tree("dfnd"))
        return [it.run(deadline=0.0 if self.ranks.first else math.inf), it.stopped]

    def steps_by_the_first_clock(self) -> Any:
        """A time limit of 20 ticks, and 2 ticks for a step, on the first rank; for the others time stands still."""
        now = iter(range(0, 1000, 2)) if self.ranks.first else iter([0.0] * 1000)
        plan = Plan(50, (), 20.0, 0.0, 0.0, 1.0, clock=lambda: float(next(now)))
        job = self.made(helpers.tree("dfnd")).job
        it = Distiller(job, plan, self.ranks)
        return [it.run(), it.step, plan.steps]

    def synthesis(self) -> Any:
        """The batches that the teacher's first layer passes on this rank, in an acquisition of 32 images."""
        it, seen = self.made(helpers.tree("deepinv")), set()
        layer = next(m for m in it.context.teacher.modules() if isinstance(m, nn.Conv2d))
        with torch.random.fork_rng():
            hook = layer.register_forward_pre_hook(lambda _, args: seen.add(len(args[0])))
            it.acquirer.acquire(it.matcher.student)
        hook.remove()
        untouched = "forward" not in vars(it.matcher.student) and it.context.teacher.shared_passes is None
        return [sorted(seen), untouched]

    def diverged(self) -> Any:
        it = self.made(helpers.tree("dfnd", optim={"lr": 1e30}, loop={"log_every": 2, "eval_every": 2}))
        return refused(it.run)

    def dropout(self) -> Any:
        """How many elements the masks of two steps keep together, on both ranks and on this one."""
        ones, before = torch.ones(4000), torch.get_rng_state()
        masks = []
        with seeded_steps(torch.device("cpu"), 0, self.ranks.rank) as begin:
            for step in (0, 1, 0):
                begin(step)
                masks.append(nn.functional.dropout(ones, 0.5) / 2)
        whole = self.ranks.whole(masks[0], 8000).view(2, 4000)
        as_before = torch.equal(masks[0], masks[2]) and torch.equal(before, torch.get_rng_state())
        return [float((whole[0] * whole[1]).sum()), float((masks[0] * masks[1]).sum()), as_before]

    def an_error_of_the_first(self) -> Any:
        def work() -> None:
            raise ValueError("no room")

        try:
            self.ranks.share(work)
        except Exception as error:
            return [type(error).__name__, str(error)]

    def another_setting(self) -> Any:
        return refused(lambda: self._distil(lr=0.1 if self.ranks.first else 0.2))

    def another_teacher(self) -> Any:
        teacher = copy.deepcopy(self.given["teacher"])
        if not self.ranks.first:
            next(teacher.parameters()).data.add_(1e-3)
        return refused(lambda: self._distil(teacher=teacher))

    def other_images(self) -> Any:
        return refused(lambda: self._distil(unlabeled=self.given["x"][: 200 + self.ranks.rank]))

    def another_version(self) -> Any:
        def enter() -> None:
            with joined():
                pass

        before = launch.__version__
        launch.__version__ = before if self.ranks.first else "9.9.9"
        try:
            return refused(enter)
        finally:
            launch.__version__ = before

    def a_silent_criterion(self) -> Any:
        return refused(lambda: self._distil(criterion=SilentConfig()))

    def distilled(self) -> Any:
        """`distill` in Python, to the end, and again in the folder of the finished run."""
        out = []
        for _ in range(2):
            result = self._distil(out=self.folder / "whole", criterion=StatedConfig())
            weights = fingerprint(result.student.state_dict().values())
            out.append([result.summary["finished"], result.summary["student_accuracy"], weights, str(result.folder)])
        return out

    def _distil(self, teacher: nn.Module | None = None, unlabeled: Tensor | None = None, **more: Any) -> Any:
        """A short run by `distill`, of a student that each rank has drawn for itself."""
        tree = helpers.tree("dfnd")
        settings = {k: tree[k] for k in ("augment", "view", "loop")} | more
        images = self.given["x"] if unlabeled is None else unlabeled
        return distill(
            teacher or copy.deepcopy(self.given["teacher"]), student(5 + self.ranks.rank), tree["source"],
            image_shape=SHAPE, unlabeled=images, test=(self.given["test_x"], self.given["test_y"]), verbose=False,
            **settings,
        )  # fmt: skip


def two_kinds() -> Tree:
    """A run whose source, replay, dictionary and pool all change on the way."""
    bank = {"name": "bank", "capacity": 4, "size": 8, "every": 1, "first": 1}
    return helpers.tree("fast", "kdci", replay=bank, update={"name": "retain", "alpha": 0.1})


class Silent(Criterion):
    def forward(self, s: Tensor, t: Tensor, batch: Batch | None = None) -> dict[str, Tensor]:
        return {"gap": (s - t).square().mean()}


class Stated(Silent):
    couples = False


@dataclass(frozen=True)
class SilentConfig(CriterionConfig):
    def build(self, context: Context) -> Criterion:
        return Silent()


@dataclass(frozen=True)
class StatedConfig(CriterionConfig):
    def build(self, context: Context) -> Criterion:
        return Stated()


SCENES = [
    name for name, value in vars(Scenes).items() if inspect.isfunction(value) and name[0] != "_" and name != "made"
]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(float(os.environ.get("RANKED_SECONDS", "1500")), exit=True)
    given = torch.load(folder / "given.pt", weights_only=False)
    cases = torch.load(folder / "cases.pt", weights_only=False)
    found: dict[str, Any] = {}

    def keep(name: str, value: Any) -> None:
        found[name] = value
        with replacing(folder / f"found-{ranks.rank}.json") as file:
            file.write(json.dumps(found).encode())

    with joined(leave=True) as ranks:
        for turn, (name, case) in enumerate(cases.items()):
            print(f"case {name}", file=sys.stderr)
            if (gaps := equality(name, case, given, ranks, turn)) is not None:
                keep(name, gaps)
        scenes = Scenes(folder, given, ranks)
        for name in SCENES:
            print(f"scene {name}", file=sys.stderr)
            keep(name, getattr(scenes, name)())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
