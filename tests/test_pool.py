"""The pool keeps what its eviction promises, and the draw follows its weights."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from dodistill.core.pool import Draw, Pool
from dodistill.errors import DodistillError

CPU = torch.device("cpu")
SHAPE = (1, 2, 2)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def items(start: int, n: int) -> tuple[Tensor, Tensor]:
    """Images and logits that both spell the number of the item."""
    ids = torch.arange(start, start + n)
    return ids.to(torch.uint8).view(-1, 1, 1, 1).expand(n, *SHAPE).contiguous(), ids.float()[:, None].expand(n, 3)


def ids(pool: Pool) -> list[int]:
    """The numbers of the items, after checking that image and logits are of the same one."""
    numbers = pool.logits[:, 0].long()
    assert torch.equal(pool.x, numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, *SHAPE))
    return numbers.tolist()


BATCHES = [3, 1, 4, 9, 2, 7, 30, 1, 5]  # some within the room left, one across its end, one larger than everything


def test_oldest_is_a_ring() -> None:
    pool, slots, seen = Pool(7, SHAPE, 3, CPU), {}, 0
    for n in BATCHES:
        pool.add(*items(seen, n), rng())
        for i in range(seen, seen + n):
            slots[i % 7] = i
        seen += n
        assert ids(pool) == [slots[k] for k in sorted(slots)]
        assert (pool.seen, len(pool)) == (seen, min(seen, 7))


def test_reservoir_is_algorithm_r() -> None:
    pool, mine, reference, seen = Pool(7, SHAPE, 3, CPU, "reservoir"), rng(3), rng(3), 0
    slots: list[int] = []
    for n in BATCHES:
        pool.add(*items(seen, n), mine)
        free = min(n, 7 - len(slots))
        slots += range(seen, seen + free)
        if free < n:
            for i, u in zip(range(seen + free, seen + n), torch.rand(n - free, generator=reference)):
                slot = int(u * (i + 1))
                if slot < 7:
                    slots[slot] = i
        seen += n
        assert ids(pool) == slots


def test_reservoir_keeps_everything_equally_often() -> None:
    capacity, offered, runs, g = 5, 20, 800, rng(1)
    counts = torch.zeros(offered)
    for _ in range(runs):
        pool = Pool(capacity, SHAPE, 3, CPU, "reservoir")
        for start, n in ((0, 3), (3, 4), (7, 1), (8, 12)):
            pool.add(*items(start, n), g)
        kept = ids(pool)
        assert len(set(kept)) == capacity
        counts[kept] += 1
    p = capacity / offered
    z = (counts - runs * p) / (runs * p * (1 - p)) ** 0.5
    assert z.abs().max() < 4
    assert z.square().mean() < 2.2


def test_floats_go_to_the_nearest_level() -> None:
    pool, levels = Pool(64, (1, 16, 16), 3, CPU), torch.arange(256).view(1, 1, 16, 16)
    for off in (-0.49, 0.0, 0.49):
        pool.add(((levels + off) / 255).clamp(0, 1), torch.zeros(1, 3), rng())
        assert torch.equal(pool.x[-1:], levels.to(torch.uint8))


def test_it_grows_with_its_content() -> None:
    pool = Pool(100_000, SHAPE, 3, CPU)
    pool.add(*items(0, 10), rng())
    assert len(pool._x) < 100
    for start in range(10, 200, 10):
        pool.add(*items(start, 10), rng())
    assert ids(pool) == list(range(200))
    assert 200 <= len(pool._x) <= 400
    assert pool.version == 20


@pytest.mark.parametrize("eviction", ["oldest", "reservoir"])
def test_a_saved_pool_goes_on_as_if_never_saved(eviction: str) -> None:
    a, g = Pool(20, SHAPE, 3, CPU, eviction), rng(5)
    a.add(*items(0, 13), g)
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    b, h = Pool(20, SHAPE, 3, CPU, eviction), rng(9)
    b.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    h.set_state(g.get_state())
    for start, n in ((13, 4), (17, 9), (26, 2)):
        a.add(*items(start, n), g)
        b.add(*items(start, n), h)
    assert ids(a) == ids(b)
    assert (a.seen, a.version) == (b.seen, b.version)


def test_the_saved_pool_has_no_room_behind_it() -> None:
    pool = Pool(10_000, (1, 32, 32), 3, CPU)
    for _ in range(2):
        pool.add(torch.zeros(600, 1, 32, 32, dtype=torch.uint8), torch.zeros(600, 3), rng())
    pool.add(torch.zeros(1, 1, 32, 32, dtype=torch.uint8), torch.zeros(1, 3), rng())
    file = io.BytesIO()
    torch.save(pool.state_dict(), file)
    assert len(file.getvalue()) < 1.1 * 1201 * (1024 + 12 + 8) + 10_000


def test_bad_settings_are_named() -> None:
    with pytest.raises(DodistillError, match="capacity is 0"):
        Pool(0, SHAPE, 3, CPU)
    with pytest.raises(DodistillError, match="eviction 'newest'"):
        Pool(5, SHAPE, 3, CPU, "newest")


def filled(classes: list[int]) -> Pool:
    pool = Pool(100, SHAPE, 3, CPU)
    y = torch.tensor(classes)
    pool.add(torch.zeros(len(y), *SHAPE, dtype=torch.uint8), torch.nn.functional.one_hot(y, 3).float(), rng())
    return pool


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_draw_follows_the_weights() -> None:
    pool, draw, n = filled([0, 1, 2, 0, 1, 0, 0, 0]), Draw(), 40_000
    weights = torch.tensor([0.0, 5.0, 1.0, 2.0, 0.0, 3.0, 1.0, 0.0])
    draw.set(pool, weights)
    counts = torch.bincount(draw(n, rng()), minlength=8).float()
    assert not counts[weights == 0].any()  # also the first and the last
    there = weights > 0
    assert chi_square(counts[there], n * (weights / weights.sum())[there]) < 20  # 4 degrees of freedom: 1 in 2000
    assert draw.shares(pool).tolist() == pytest.approx([6 / 12, 5 / 12, 1 / 12], abs=1e-6)


def test_without_weights_the_draw_is_even() -> None:
    pool, draw, n = filled([0, 1, 2, 0, 1, 0, 0, 0]), Draw(), 40_000
    draw.set(pool, torch.ones(8))
    draw.set(pool, None)
    assert draw.shares(pool).tolist() == pytest.approx([5 / 8, 2 / 8, 1 / 8])
    draw.WALK = 0  # type: ignore[misc]  # as from a large pool
    counts = torch.bincount(draw(n, rng()), minlength=8).float()
    assert chi_square(counts, torch.full((8,), n / 8)) < 26
    assert torch.equal(draw(50, rng(4)), draw(50, rng(4)))
    assert not torch.equal(draw(50, rng(4)), draw(50, rng(5)))


def test_a_small_pool_is_walked_through() -> None:
    pool, draw, g = filled([i % 3 for i in range(10)]), Draw(), rng()
    draw.set(pool, None)
    first, second, third = draw(4, g), draw(4, g), draw(4, g)
    assert sorted(torch.cat([first, second, third])[:10].tolist()) == list(range(10))
    assert len(set(draw(8, g).tolist())) == 8  # the second pass goes on where it stopped
    everything = draw(25, g)  # more than there is: as evenly as it can be
    assert torch.bincount(everything, minlength=10).max() <= 4
    assert draw(2, g).shape == (2,)

    def start() -> tuple[Draw, torch.Generator]:
        fresh, at = Draw(), rng(7)
        fresh.set(pool, None)
        fresh(3, at)
        return fresh, at

    (a, ga), (b, gb) = start(), start()
    saved = b.state_dict()
    resumed = Draw()
    resumed.set(pool, None)
    resumed.load_state_dict(saved)
    assert torch.equal(a(9, ga), resumed(9, gb))
    a.set(pool, None)
    assert sorted(a(10, ga).tolist()) == list(range(10))  # a new pool, a new walk


def test_labels_default_to_the_teachers_and_follow_their_images() -> None:
    pool = filled([0, 1, 2])
    assert pool.labels.tolist() == pool.logits.argmax(1).tolist()
    pool.add(pool.x.clone(), pool.logits.clone(), rng(), torch.tensor([7, 8, 9]))
    assert pool.labels.tolist()[-3:] == [7, 8, 9]
    again = filled([1])
    again.load_state_dict(pool.state_dict())
    assert torch.equal(again.labels, pool.labels)


@pytest.mark.parametrize("bad", [[1.0, float("nan")], [1.0, float("inf")], [2.0, -1.0], [0.0, 0.0]])
def test_bad_weights_are_refused(bad: list[float]) -> None:
    with pytest.raises(DodistillError, match="draw weights must be finite, >= 0 and not all zero"):
        Draw().set(filled([0, 1]), torch.tensor(bad))
