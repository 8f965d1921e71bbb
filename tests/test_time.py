"""`--time`: a run that ends, with a student, when its time is up; `--max-seconds` inside an acquisition."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dodistill import DodistillError, distill, engine
from dodistill.api import distill_config, require_one_length
from dodistill.commands.cli import main
from dodistill.config import registry
from dodistill.config.checks import seconds_in
from dodistill.config.methods import LONG, SHORT, choose, longer
from dodistill.config.tree import Distill, resolve
from dodistill.core import precision
from dodistill.core.deadline import Deadline
from dodistill.core.watch import Watcher
from dodistill.data.images import Images
from dodistill.engine.budget import ROUNDS, Speed, extrapolated, fitted, measured, scaled
from dodistill.engine.plan import Plan
from dodistill.engine.run_folder import RunFolder
from dodistill.evaluation import evaluate
from dodistill.report.more_time import more_time
from helpers import SHAPE, config, job, metrics, same, student, tree, untimed


class Slow(nn.Module):
    """A teacher that takes `seconds` for each pass."""

    def __init__(self, model: nn.Module, seconds: float) -> None:
        super().__init__()
        self.model, self.seconds = model, seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        out: Tensor = self.model(x)
        return out


# ------------------------------------------------------------------------------------------------- durations


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", math.inf), ("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("1h30m", 5400), ("1h 2m 3s", 3723)],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert seconds_in(text, "loop.time") == seconds


@pytest.mark.parametrize("text", ["ten", "10 minutes", "-5", "0", "0m", "1.2.3s", "5s3m", "inf", "nan", "."])
def test_other_texts_are_refused_with_their_value(text: str) -> None:
    with pytest.raises(DodistillError, match=rf"loop.time is '{text}'; .*as in 90s, 10m or 1h30m"):
        config("real", loop={"time": text})


def test_steps_and_time_are_not_both_given(capsys: pytest.CaptureFixture[str], teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match="steps 5 and time 10m are both given; give one"):
        require_one_length({"loop.steps": 5, "loop.time": "10m"})
    with pytest.raises(DodistillError, match="steps 5 and time 60 are both given"):
        distill(teacher, student(), steps=5, time=60, image_shape=SHAPE)
    assert main(["distill", "--teacher", "tiny4", "--student", "tiny4", "--steps", "5", "--time", "60"]) == 2
    assert "steps 5 and time 60 are both given" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ plan


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def walk(plan: Plan, clock: Clock, seconds: Any) -> tuple[int, list[float]]:
    """Steps of `seconds(step)` until the plan ends: (steps, the shares done after each)."""
    step, done = 0, [plan.done(0)]
    while step < plan.steps:
        clock.now += seconds(step)
        step += 1
        plan.adjust(step)
        done.append(plan.done(step))
    return step, done


def test_without_a_limit_the_steps_are_fixed() -> None:
    plan = Plan(7)
    assert [plan.done(s) for s in range(8)] == [s / 7 for s in range(8)]
    assert not plan.adjust(3)
    assert plan.steps == 7
    assert plan.state_dict() == {}


@pytest.mark.parametrize("planned", [5, 100, 10_000])
@pytest.mark.parametrize(
    "seconds", [lambda _: 1.0, lambda s: 1.0 if s < 40 else 3.0, lambda s: 3.0 if s < 20 else 0.5,
                lambda s: 6.0 if s % 8 == 0 else 0.5],
    ids=["steady", "slower", "faster", "bursts"],
)  # fmt: skip
def test_the_last_step_falls_at_the_limit_whatever_was_planned(planned: int, seconds: Any) -> None:
    clock = Clock()
    plan = Plan(planned, (), 120.0, began=clock.now, reserve=20.0, clock=clock)
    steps, done = walk(plan, clock, seconds)
    used = clock.now - 100.0
    assert used <= 100.0 + 6.0, "at most one step beyond the limit"
    assert planned == 5 or used >= 93.0, "and the time is used"
    assert done[0] == 0.0
    assert done[-1] == pytest.approx(1.0, abs=0.02)
    assert all(0 < b - a < 0.5 for a, b in itertools.pairwise(done)), "the share done only grows, and without a jump"
    assert len(done) == steps + 1


def test_the_reserve_grows_on_a_slower_machine() -> None:
    """Steps were expected to take 1 s, and take 2 s: so will the evaluation for which 20 s were kept."""
    clock = Clock()
    plan = Plan(100, (), 120.0, began=clock.now, reserve=20.0, pace=1.0, clock=clock)
    walk(plan, clock, lambda _: 2.0)
    assert 76.0 <= clock.now - 100.0 <= 82.0


def test_the_plan_of_a_resumed_run_goes_on_with_what_is_left() -> None:
    clock = Clock()
    plan = Plan(1000, (), 100.0, began=clock.now, clock=clock)
    for step in range(1, 41):
        clock.now += 1.0
        plan.adjust(step)
    state, share = json.loads(json.dumps(plan.state_dict())), plan.done(40)
    clock.now += 5000.0  # a night
    again = Plan(1000, (), 100.0, began=clock.now, clock=clock)
    again.load_state_dict(state, used=40.0)
    assert again.done(40) == pytest.approx(share)
    assert again.used() == pytest.approx(40.0)
    step = 40
    while step < again.steps:
        clock.now += 1.0
        step += 1
        again.adjust(step)
    assert 98 <= step <= 101


# --------------------------------------------------------------------------------------------------- fitting


def cost(cfg: Distill, was: Distill, speed: Speed) -> float:
    """The predicted time of a fitted config, if an acquisition costs in proportion to its settings."""
    ratio = 1.0
    for group in was.source.costs:
        name = next(n for n in group if getattr(was.source, n))
        ratio *= getattr(cfg.source, name) / getattr(was.source, name)
    a, source, steps = speed.acquisition * ratio, cfg.source, cfg.loop.steps
    rounds = source.warmup + (math.ceil(steps / source.every) if source.every else 1)
    return rounds * a + steps * speed.step


def test_a_source_that_does_not_say_what_it_costs_fits() -> None:
    was = config(steps=2000)
    now, _ = fitted(was.source, was, Speed(0.1, 0.0, 0.001, 0.001), 10.0, evaluation=0.1)
    assert 50 < now.loop.steps <= 100


@pytest.mark.parametrize("name", registry.names("source"))
@pytest.mark.parametrize("left", [3.0, 30.0, 300.0, 30_000.0])
@pytest.mark.parametrize("acquisition", [0.01, 1.0, 50.0])
def test_every_source_fits(name: str, left: float, acquisition: float) -> None:
    source = {"name": name} if name != "dfnd" else {"name": name, "candidates": 40_000}
    was, speed = config(name, steps=2000, source=source), Speed(0.1, acquisition, 0.001, 0.001)
    now, said = fitted(was.source, was, speed, left, evaluation=0.1)
    once = cost(replace(now, loop=replace(now.loop, steps=1)), was, speed)  # what cannot be cut
    assert cost(now, was, speed) <= max(left * 1.1, once + 0.1) or not was.source.costs
    if was.source.warmup * acquisition + 2000 * 0.1 + 2000 / max(was.source.every, 1) * acquisition < 0.9 * left:
        assert now.source == was.source, "a schedule that fits is not cut"
        assert now.loop.steps > 2000
    for setting in ("warmup", "every", *(n for group in was.source.costs for n in group)):
        if getattr(now.source, setting) != getattr(was.source, setting):
            assert any(line.startswith(f"source.{setting} ") for line in said), f"{setting} was cut without a word"
    if now.source.every and now.loop.steps > 10 * ROUNDS:
        assert now.loop.steps > now.source.every, "the student sees more than the first acquisition"
    assert now.loop.eval_every <= now.loop.steps


def test_every_source_says_what_its_acquisition_costs() -> None:
    """But for `real`, which labels the given images whatever its settings."""
    assert [name for name in registry.names("source") if not registry.config("source", name).costs] == ["real"]


def test_scaled_settings_cost_what_they_say() -> None:
    inversion = config("deepinv", source={"name": "deepinv", "iterations": 1000, "batch": 256}).source
    quarter, share = scaled(inversion, 0.25)
    assert share == pytest.approx(0.25, rel=0.02)
    assert quarter.iterations * quarter.batch == pytest.approx(0.25 * 256_000, rel=0.02)
    least, share = scaled(inversion, 0.0)
    assert (least.iterations, least.batch) == (10, 16)
    assert share == pytest.approx(160 / 256_000)
    pictures = config("procedural", source={"name": "procedural", "n": 20_000, "candidates": 60_000}).source
    tenth, _ = scaled(pictures, 0.1)
    assert (tenth.n, tenth.candidates) == (2000, 6000)
    tiny = config("procedural", source={"name": "procedural", "n": 50, "candidates": 60}).source
    assert scaled(tiny, 0.0) == (tiny, 1.0), "never more than was asked for"


@pytest.mark.parametrize(
    ("cost", "patience", "least", "found"),
    [
        (lambda p: 0.5 + 10 * p, 1.0, 0.01, 10.5),  # a small part has an overhead of five times its work
        (lambda p: 0.5 + 10 * p, 0.6, 0.01, 60.0),  # no patience for a larger one
        (lambda p: 3.0 * p, 1.0, 0.25, 3.0),
        (lambda p: 0.001, 1.0, 0.01, 0.001),  # the whole is timed
        (lambda p: 2.0, 9.0, 1.0, 2.0),  # there is no smaller part
        (lambda p: 1.0 - p / 2, 2.0, 0.1, 1.0 - 0.2 / 1.9),  # noise: no work gets faster with its size
    ],
)  # fmt: skip
def test_the_duration_of_a_work_from_its_parts(cost: Any, patience: float, least: float, found: float) -> None:
    asked: list[float] = []

    def timed(share: float) -> tuple[float, float]:
        asked.append(max(share, least))
        return cost(asked[-1]), asked[-1]

    assert extrapolated(timed, patience) == pytest.approx(found)
    assert len(asked) <= 2
    assert all(cost(p) <= max(2 * patience, cost(least)) for p in asked)


def test_speed_is_measured_in_the_precision_of_the_run(
    teacher: nn.Module, digits: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[bool] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = teacher

        def forward(self, x: Tensor) -> Tensor:
            inside.append(torch.is_autocast_enabled("cpu"))
            out: Tensor = self.model(x)
            return out

    def chosen(work: Callable[[int], object], _device: torch.device) -> dict[str, float]:
        work(2)
        inside.clear()
        return {"fp32": 2.0, "bf16": 1.0}

    monkeypatch.setattr(precision, "emulated", lambda *_: False)
    monkeypatch.setattr(precision, "measured", chosen)
    for name, expected in (("auto", True), ("fp32", False)):
        inside.clear()
        cfg = config("fast", source={"name": "fast", "K": 1, "batch": 8, "width": 2}, loop={"precision": name})
        speed = measured(engine.Job(cfg, Spy(), student(1), SHAPE), patience=0.01)
        assert set(inside) == {expected}
        assert min(speed.step, speed.acquisition, speed.answer, speed.asked) > 0


def test_dfnd_asks_about_some_of_the_images(teacher: nn.Module, digits: Images) -> None:
    it = job(teacher, config("dfnd", source={"name": "dfnd", "n": 500, "candidates": 64}), digits.x)
    it.acquire(Watcher())
    assert it.acquirer.pool.seen + it.acquirer.holdout.seen == 64
    whole = config("dfnd").source
    assert whole.counted(300) == config("dfnd", source={"name": "dfnd", "n": 200, "candidates": 300}).source


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("seconds", [0.5, 8.0])
def test_there_is_always_a_student_a_report_and_a_sentence(
    seconds: float, teacher: nn.Module, digits_test: Images, tmp_path: Path
) -> None:
    settings = {k: v for k, v in tree("procedural").items() if k not in ("loop", "source", "intervention")}
    start = time.monotonic()
    result = distill(
        teacher, student(), source="auto", image_shape=SHAPE, test=digits_test, out=tmp_path / "run", verbose=False,
        time=seconds, loop={"threads": 1, "device": "cpu"}, **settings,
    )  # fmt: skip
    took, summary = time.monotonic() - start, result.summary
    assert summary["finished"]
    assert summary["steps"] >= 1
    assert summary["time"]["limit"] == seconds
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines if line["kind"] == "log"][-1] == summary["steps"]
    assert took < seconds + 15, "the report, on a busy machine"
    if seconds > 5:
        assert summary["time"]["used"] <= seconds
        assert summary["steps"] > 20
    assert "From 3 min 00 s on, --source auto takes fast" in summary["time"]["more"]
    assert any(line.startswith(f"time {seconds}: ") for line in summary["warnings"])
    assert "more time should help" in (tmp_path / "run" / "report.html").read_text() or seconds > 5
    shown = json.loads((tmp_path / "run" / "config.json").read_text())
    assert shown["loop"]["time"] == str(seconds)
    assert (tmp_path / "run" / "student.safetensors").exists()
    again = distill(
        teacher, student(), source="auto", image_shape=SHAPE, test=digits_test, out=tmp_path / "run", verbose=False,
        time=seconds, loop={"threads": 1, "device": "cpu"}, **settings,
    )  # fmt: skip
    assert again.summary["steps"] == summary["steps"], "a finished run is not run again"


def test_max_seconds_stops_inside_an_acquisition(teacher: nn.Module, tmp_path: Path) -> None:
    """Labelling takes 40 passes of 0.1 s; the deadline comes after about 0.5 s, and nothing is lost but the passes."""
    cfg = config(
        "procedural", source={**tree("procedural")["source"], "chunk": 4}, loop={"eval_every": 100, "precision": "fp32"}
    )
    slow = job(Slow(teacher, 0.1), cfg)
    start = time.monotonic()
    folder = RunFolder(tmp_path / "run", cfg)
    assert not slow.run(folder, (), Deadline(start + 0.5))
    folder.close()
    assert time.monotonic() - start < 3, "all passes take four seconds and more"
    assert slow.stopped.startswith("in labelling images, ")
    assert slow.stopped.endswith("of acquisition 1")
    assert not list((tmp_path / "run").glob("*.pt"))
    again, whole = job(Slow(teacher, 0.0), cfg), job(Slow(teacher, 0.0), cfg)
    folder = RunFolder(tmp_path / "run", cfg)
    assert again.run(folder)
    folder.close()
    assert whole.run()
    same(untimed(again.state_dict()), untimed(whole.state_dict()))


def test_an_acquisition_that_would_overrun_is_left_to_the_next_start(teacher: nn.Module, tmp_path: Path) -> None:
    cfg = config("noise", source={**tree("noise")["source"], "every": 2}, steps=6)
    it, folder = job(Slow(teacher, 0.15), cfg), RunFolder(tmp_path / "run", cfg)  # four passes for each acquisition
    ends: list[float] = []

    class Late:
        """Passes once two steps are done and another acquisition is due."""

        def __lt__(self, now: float) -> bool:
            ends.append(now - time.monotonic())
            return it.step == 2 and now > time.monotonic() + 0.3

    assert not it.run(folder, (), Late())  # type: ignore[arg-type]
    folder.close()
    assert (it.step, it.acquirer.round) == (2, 1), "the second acquisition was not begun"
    saved = RunFolder(tmp_path / "run", cfg).load()
    assert saved is not None
    assert saved[0]["step"] == 2
    assert max(ends) == pytest.approx(it.acquirer.expected, rel=0.5)


def test_max_seconds_stops_inside_an_evaluation(
    teacher: nn.Module, digits: Images, digits_test: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps before it are kept, and the evaluation is made at the next start: as if there had been no stop."""
    monkeypatch.setattr(evaluate, "at_once", lambda _device, _most: 100)
    cfg, test = config("dfnd", steps=6), engine.Test(digits_test.x, digits_test.y)
    whole, folder = job(teacher, cfg, digits.x, test), RunFolder(tmp_path / "whole", cfg)
    assert whole.run(folder)
    folder.close()
    it, folder = job(teacher, cfg, digits.x, test), RunFolder(tmp_path / "run", cfg)
    asked: list[bool] = []

    class InEvaluation:
        def __lt__(self, _now: float) -> bool:
            asked.append(it.step == 3 and it._behind)
            return asked[-1]

    assert not it.run(folder, (), InEvaluation())  # type: ignore[arg-type]
    folder.close()
    assert it.stopped == f"in evaluating (last), 100 of {len(digits_test.x)}"
    assert it.step == 3
    again, folder = job(teacher, cfg, digits.x, test), RunFolder(tmp_path / "run", cfg)
    assert again.run(folder)
    folder.close()
    same(untimed(whole.state_dict()), untimed(again.state_dict()))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


# ----------------------------------------------------------------------------------------------- more time


def test_what_more_time_would_change() -> None:
    source = config("procedural").source
    rising, flat = [(200, 40.0), (400, 60.0), (600, 70.0)], [(200, 90.0), (400, 91.0), (600, 91.2)]
    assert "rose by 10.0 points in the last 33 % of the steps: more time should help" in more_time(
        rising, 600, source, 16, 1000, 1000
    )
    said = more_time(flat, 600, source, 128, 40_000, 10_000, longer(True, False, 60.0, (3, 32, 32)))
    assert "changed by +0.2 points" in said
    assert "Each of the 40,000 images was drawn 1.9 times" in said
    assert said.endswith("From 3 min 00 s on, --source auto takes fast, preset desk.")
    assert "Only 3 steps fitted" in more_time([(3, 5.0)], 3, source, 16, 1000, 30)
    assert more_time(flat, 600, config("fast").source, 128, 2000, 10_000).count(".") == 2
    # two standard errors of the difference of two shares near 0.65, over 100 inputs: 200 sqrt(2 * 0.65 * 0.35 / 100)
    said = more_time(rising, 600, source, 16, 1000, 100)
    assert (
        "changed by +10.0 points in the last 33 % of the steps, which can be chance (up to 13.5 points with 100" in said
    )
    assert "does not tell whether more time would help" in said


def test_longer_names_the_next_limit_that_matters() -> None:
    found = longer(True, False, 60.0, (3, 32, 32))
    assert found is not None
    assert found[0] == SHORT
    found = longer(True, False, 600.0, (3, 32, 32))
    assert found is not None
    assert (found[0], found[1].preset) == (900.0, "hour")
    found = longer(True, False, 3600.0, (3, 32, 32))
    assert found is not None
    assert (found[0], found[1].preset) == (LONG, "wrn")
    assert longer(True, False, 7 * 3600.0, (3, 32, 32)) is None


def test_a_slow_machine_takes_the_source_that_needs_no_training() -> None:
    """400 000 answers of a teacher that gives 1000 in a second take 400 s, more than the 3 minutes that are usual."""
    shape = (3, 32, 32)
    assert choose(True, False, 200.0, shape, passes=200.0 * 1000).source == "procedural"
    assert "can answer about 200,000 images in the time" in choose(True, False, 200.0, shape, passes=200_000).reason
    assert choose(True, False, 500.0, shape, passes=500.0 * 1000).source == "fast"
    found = longer(True, False, 200.0, shape, rate=1000.0)
    assert found is not None
    assert (found[0], found[1].source) == (420.0, "fast")


def test_the_command_says_where_it_stopped_and_what_would_help(
    teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", Ticks())
    source = ["--source", "procedural", "--source.n", "80", "--source.candidates", "160", "--source.chunk", "8"]
    models = ["--teacher", str(teacher_file), "--student", "tiny4", "--out", str(tmp_path / "run")]
    assert main(["distill", *models, *source, "--max-seconds", "12", "--quiet", "--threads", "1"]) == 75
    said = capsys.readouterr().err
    assert "stopped at step 0 of 2000, in labelling images, " in said
    assert "give a longer --max-seconds, or --time for a student within that time; rerun the command" in said


class Ticks:
    """A clock that is a second later at each call."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_stopped_run_goes_on_with_its_fit_and_what_is_left_of_its_time(teacher_file: Path, tmp_path: Path) -> None:
    given = tree("fast", loop={"time": "6s"}) | {"teacher": str(teacher_file), "student": "tiny4"}
    cfg = resolve(given, {"data.image_shape": list(SHAPE)})
    out = tmp_path / "run"

    class AfterTwoSteps:
        """A deadline that comes once the first checkpoint could hold two steps."""

        asked = 0

        def __lt__(self, _now: float) -> bool:
            self.asked += 1
            return self.asked > 6

    first = distill_config(cfg, out, verbose=False, report=False, deadline=AfterTwoSteps())  # type: ignore[arg-type]
    assert not first.finished
    reached, plan = first.summary["step"], (out / "plan.json").read_bytes()
    assert reached > 0
    other = resolve(given, {"data.image_shape": list(SHAPE), "loop.log_every": 2, "loop.threads": 2})
    second = distill_config(other, out, verbose=False, report=False)  # what may differ between two starts
    assert second.finished
    assert (out / "plan.json").read_bytes() == plan, "it is not fitted again"
    assert second.summary["steps"] > reached
    assert second.summary["time"]["used"] < 6 + 3, "the time counts over both starts"
    with pytest.raises(DodistillError, match="belongs to another config"):
        distill_config(resolve(given, {"data.image_shape": list(SHAPE), "loop.time": "7s"}), out, verbose=False)
