"""Device, precision, random streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dodistill.core.runtime import at_once, autocast, emulated, generator, pick_device
from dodistill.errors import DodistillError

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


@pytest.mark.parametrize(("device", "most", "n"), [(CPU, 1000, 64), (CPU, 10, 10), (CUDA, 1000, 1000)])
def test_how_many_images_at_once(device: torch.device, most: int, n: int) -> None:
    assert at_once(device, most) == n


def test_auto_is_fp32_on_the_cpu() -> None:
    for precision, low in (("auto", False), ("fp32", False), ("bf16", True)):
        with autocast(CPU, precision)():
            assert torch.is_autocast_enabled("cpu") is low
    with pytest.raises(DodistillError, match="unknown precision 'half'"):
        autocast(CPU, "half")


def test_streams_are_independent_by_seed_and_purpose() -> None:
    def first(seed: int, purpose: str) -> float:
        return torch.rand(1, generator=generator(CPU, seed, purpose)).item()

    assert first(0, "a") == first(0, "a")
    assert len({first(0, "a"), first(1, "a"), first(0, "b")}) == 3


def test_a_device_that_is_not_there_is_named() -> None:
    assert pick_device("cpu") == CPU
    with pytest.raises(DodistillError, match="unknown device 'gpu9'"):
        pick_device("gpu9")
