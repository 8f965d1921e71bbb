"""Precision: what `auto` measures, chooses, records and keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dodistill import DodistillError, distill
from dodistill.core import precision
from dodistill.core.precision import Precision, emulated, measured, trial
from dodistill.core.watch import Watcher
from dodistill.models.teacher import Teacher
from helpers import SHAPE, same, student, tree

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("has", "slow"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
        ({}, False),
    ],
)
def test_bf16_without_instructions_of_its_own_is_named(has: Any, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert emulated(CPU, "bf16") is slow
    assert not emulated(CPU, "fp32")
    assert not emulated(CPU, "auto")
    assert not emulated(CUDA, "bf16")


def test_auto_is_fp32_on_the_cpu_until_it_has_measured() -> None:
    for name, low in (("auto", False), ("fp32", False), ("bf16", True)):
        with Precision(CPU, name)():
            assert torch.is_autocast_enabled("cpu") is low
    with pytest.raises(DodistillError, match="unknown precision 'half'"):
        Precision(CPU, "half")


class Clock:
    """Time that passes only when work is done: `fp32` or `bf16` seconds an image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float) -> None:
        self.now, self.calls = 0.0, 0
        self.seconds = {False: fp32, True: bf16}
        for clock in ("perf_counter", "process_time"):
            monkeypatch.setattr(precision.time, clock, lambda: self.now)
        monkeypatch.setattr(precision, "emulated", lambda *_: False)

    def work(self, n: int) -> None:
        self.calls += 1
        self.now += n * self.seconds[torch.is_autocast_enabled("cpu")]


@pytest.mark.parametrize(
    ("bf16", "chosen", "said"),
    [(0.5e-3, "bf16", "measured 2.00 times"), (0.9e-3, "fp32", "measured 1.11 times"), (3e-3, "fp32", "0.33 times")],
)
def test_auto_takes_what_is_faster(bf16: float, chosen: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, auto = Clock(monkeypatch, 1e-3, bf16), Precision(CPU)
    auto.settle(clock.work)
    assert auto.chosen == chosen
    assert said in auto.reason
    assert clock.now < 4 * precision.SECONDS  # of both precisions, warm-up included
    with auto():
        assert torch.is_autocast_enabled("cpu") is (chosen == "bf16")
    calls = clock.calls
    auto.settle(clock.work)
    assert clock.calls == calls, "it measures once"


@pytest.mark.parametrize(("threads", "chosen"), [(1, "bf16"), (2, "fp32")])
def test_other_work_on_the_machine_does_not_count_on_one_thread(
    threads: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, auto = Clock(monkeypatch, 1e-3, 0.5e-3), Precision(CPU)
    monkeypatch.setattr(precision.torch, "get_num_threads", lambda: threads)
    waited = 0.0

    def work(n: int) -> None:
        nonlocal waited
        clock.work(n)
        waited += n * 1e-3 * torch.is_autocast_enabled("cpu")  # the process does not run

    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock.now + waited)
    auto.settle(work)
    assert auto.chosen == chosen


def test_what_is_far_slower_is_not_measured_further(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, auto = Clock(monkeypatch, 1e-3, 10e-3), Precision(CPU)
    auto.settle(clock.work)
    assert auto.chosen == "fp32"
    assert clock.calls == 4


@pytest.mark.parametrize(("device", "name"), [(CPU, "fp32"), (CPU, "bf16"), (CUDA, "auto"), (CUDA, "fp32")])
def test_what_is_set_is_not_measured(device: torch.device, name: str) -> None:
    def work(_n: int) -> None:
        raise AssertionError("measured")

    set_ = Precision(device, name)
    before = set_.chosen
    set_.settle(work)
    assert set_.chosen == before


def test_an_emulated_precision_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, auto = Clock(monkeypatch, 1.0, 1.0), Precision(CPU)
    monkeypatch.setattr(precision, "emulated", lambda *_: True)
    auto.settle(clock.work)
    assert clock.calls == 0
    assert auto.reason == "fp32: this CPU emulates bf16"


def test_a_model_that_does_not_run_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(_n: int) -> None:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no kernel for BFloat16")

    auto = Precision(CPU)
    monkeypatch.setattr(precision, "emulated", lambda *_: False)
    auto.settle(work)
    assert auto.chosen == "fp32"
    assert "no kernel for BFloat16" in auto.reason


def test_a_trial_changes_nothing(teacher: nn.Module) -> None:
    model = nn.Sequential(student(1), nn.Dropout(0.5)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stream = torch.get_rng_state()
    work = trial(model, SHAPE, CPU, Teacher(teacher, SHAPE).answers)
    assert set(measured(work, CPU, most=4)) == {"fp32", "bf16"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), stream)


def test_a_run_records_its_choice_and_a_resumed_one_keeps_it(
    teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "emulated", lambda *_: False)
    monkeypatch.setattr(precision, "measured", lambda *_: {"fp32": 2.0, "bf16": 1.0})
    settings: dict[str, Any] = tree(loop={"precision": "auto"})
    whole = distill(teacher, student(1), **settings, image_shape=SHAPE, out=tmp_path / "whole", verbose=False)
    assert whole.summary["precision"].startswith("bf16: bf16 measured 2.00 times")

    class Enough(Watcher):
        def on_log(self, step: int, values: object) -> None:
            raise KeyboardInterrupt

    settings["loop"] |= {"checkpoint_seconds": 0.0}
    parts = {"image_shape": SHAPE, "out": tmp_path / "cut", "verbose": False}
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, student(1), **settings, **parts, watchers=[Enough()])
    monkeypatch.setattr(precision, "measured", lambda *_: {"fp32": 1.0, "bf16": 2.0})
    again = distill(teacher, student(1), **settings, **parts)
    assert again.summary["precision"] == whole.summary["precision"]
    same(again.student.state_dict(), whole.student.state_dict())
