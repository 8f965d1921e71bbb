"""Device, random streams."""

from __future__ import annotations

import pytest
import torch

from dodistill.core.runtime import at_once, generator, limited_threads, pick_device, restore_stream
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


def test_a_state_of_another_kind_of_device_seeds_the_stream() -> None:
    """A CUDA generator's state has 16 bytes, that of a CPU 5056."""

    def first(state: torch.Tensor) -> float:
        stream = torch.Generator()
        restore_stream(stream, state)
        return torch.rand(1, generator=stream).item()

    there = generator(CPU, 0, "a")
    assert first(there.get_state()) == torch.rand(1, generator=there).item()
    cuda = [torch.full((16,), k, dtype=torch.uint8) for k in (1, 1, 2)]
    assert first(cuda[0]) == first(cuda[1]) != first(cuda[2])


def test_no_number_of_threads_sets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """To set even the present number switches MKL's own choice off."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _n: pytest.fail("set"))
    with limited_threads(0):
        pass


def test_the_number_of_threads_is_as_before() -> None:
    before = torch.get_num_threads()
    for n, inside in ((2, 2), (0, before)):
        with limited_threads(n):
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == before
