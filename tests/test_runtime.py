"""Device, random streams."""

from __future__ import annotations

import pytest
import torch

from dodistill.core.runtime import at_once, generator, pick_device
from dodistill.errors import DodistillError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("device", "most", "n"), [(CPU, 1000, 64), (CPU, 10, 10), (CUDA, 1000, 1000)])
def test_how_many_images_at_once(device: torch.device, most: int, n: int) -> None:
    assert at_once(device, most) == n


def test_streams_are_independent_by_seed_and_purpose() -> None:
    def first(seed: int, purpose: str) -> float:
        return torch.rand(1, generator=generator(CPU, seed, purpose)).item()

    assert first(0, "a") == first(0, "a")
    assert len({first(0, "a"), first(1, "a"), first(0, "b")}) == 3


def test_a_device_that_is_not_there_is_named() -> None:
    assert pick_device("cpu") == CPU
    with pytest.raises(DodistillError, match="unknown device 'gpu9'"):
        pick_device("gpu9")
