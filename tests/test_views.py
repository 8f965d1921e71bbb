"""Views: the teacher answers V views of an image once, each step draws one of them, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dodistill.api import distill
from dodistill.config.tree import Augment, resolve
from dodistill.core.pool import Pool
from dodistill.core.views import Views
from dodistill.core.watch import Watcher
from dodistill.data.images import Images
from dodistill.engine import Distiller
from dodistill.engine.meter import Diverged
from dodistill.engine.run_folder import RunFolder
from dodistill.errors import DodistillError
from dodistill.functional.augment import resized_crop, shift_flip, to_float
from dodistill.models.zoo import build
from helpers import SHAPE, SOURCES, config, fitting, job, same, student, tree
from test_resume import stopped_at

CPU = torch.device("cpu")
ON: dict[str, Any] = {"augment": {"views": 2, "flip": True}}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def answer(x: Tensor) -> Tensor:
    """Three numbers that tell views of an image apart."""
    ramp = torch.linspace(0, 1, x[0].numel()).view(1, *x.shape[1:])
    return torch.stack([x.sum((1, 2, 3)), (x * ramp).sum((1, 2, 3)), (x * ramp**2).sum((1, 2, 3))], 1)


class Asked:
    """`answer`, and how many images it was asked."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return answer(x)


def views(
    V: int = 4, capacity: int = 6, eviction: str = "oldest", padding: str = "zeros", draws: float = 99.0,
    mix: str = "none", share: float = 0.5,
) -> tuple[Pool, Views]:  # fmt: skip
    pool = Pool(capacity, SHAPE, 3, CPU, eviction)
    augment = Augment(pad=2, flip=True, padding=padding, views=V, mix=mix, mix_share=share)  # type: ignore[arg-type]
    seen = Views(pool, augment, rng(1))
    seen.plan(draws, capacity)
    return pool, seen


def put(pool: Pool, seen: Views, n: int, seed: int = 0) -> int:
    """`n` random images join; how many views the teacher was asked for."""
    ask = Asked()
    images = torch.rand(n, *SHAPE, generator=rng(seed))
    assert bool(seen.fill(pool.add(images, torch.zeros(n, 3), rng(seed)), ask))
    return ask.images


# ------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix"])
@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("eviction", ["oldest", "reservoir"])
def test_each_view_comes_with_the_answer_to_its_own_pixels(padding: str, eviction: str, mix: str) -> None:
    pool, seen = views(padding=padding, eviction=eviction, mix=mix)
    for i, n in enumerate((3, 2, 4, 5, 9)):  # within the room, beyond it, over it twice
        put(pool, seen, n, seed=i)
        index = torch.arange(len(pool)).repeat(20)
        x, t = seen(index, rng(i))
        assert t is not None
        torch.testing.assert_close(t, answer(x), rtol=2e-3, atol=2e-3)
        assert len(t.unique(dim=0)) > len(pool)  # several views of each, told apart


def test_a_view_is_a_shift_and_a_flip_of_its_image() -> None:
    pool, seen = views(V=50)
    put(pool, seen, 1)
    x, _ = seen(torch.zeros(300, dtype=torch.long), rng())
    whole, pixels = torch.arange(-2, 3), set()
    for dy in whole:
        for dx in whole:
            for mirrored in (False, True):
                view = shift_flip(pool.x, dy[None], dx[None], torch.tensor([mirrored]), "zeros", 2)
                pixels.add(to_float(view).numpy().tobytes())
    drawn = {v[None].numpy().tobytes() for v in x}
    assert drawn <= pixels
    assert 20 < len(drawn) <= 50


@pytest.mark.parametrize(("flip", "count"), [(True, 50), (False, 25)])
def test_as_many_views_as_there_are_are_each_stored_once(flip: bool, count: int) -> None:
    """So that a draw of them is a draw of a new view."""
    pool = Pool(6, SHAPE, 3, CPU)
    seen = Views(pool, Augment(pad=2, flip=flip, views=1000), rng(1))
    seen.plan(1e9, 6)
    assert seen.count == count
    assert f"all {count} views" in seen.reason
    for n in (3, 2, 4):
        put(pool, seen, n, seed=n)
    assert len(seen.shift) == 6
    for slot in range(6):
        drawn = [(int(dy), int(dx), bool(m)) for (dy, dx), m in zip(seen.shift[slot, :, 0], seen.mirrored[slot, :, 0])]
        sides = range(-2, 3)
        assert sorted(drawn) == sorted((y, x, m) for y in sides for x in sides for m in {False, flip})
    x, t = seen(torch.arange(6).repeat(50), rng())
    assert t is not None
    torch.testing.assert_close(t, answer(x), rtol=2e-3, atol=2e-3)


def test_the_teacher_is_asked_once_for_what_joins_and_never_by_a_draw() -> None:
    pool, seen = views(V=4, capacity=6)
    assert [put(pool, seen, n, i) for i, n in enumerate((3, 3, 2))] == [12, 12, 8]  # each image that joins, four times
    before = seen.t.clone()
    seen(torch.arange(6), rng())
    assert torch.equal(seen.t, before)


def test_a_reservoir_asks_only_for_the_survivors() -> None:
    pool, seen = views(V=4, capacity=6, eviction="reservoir")
    put(pool, seen, 6)
    asked = put(pool, seen, 200, 1)
    assert asked <= 4 * 6
    assert asked % 4 == 0


def test_an_answer_that_fp16_cannot_hold_is_noticed() -> None:
    pool, seen = views()
    slots = pool.add(torch.rand(2, *SHAPE, generator=rng()), torch.zeros(2, 3), rng())
    assert not bool(seen.fill(slots, lambda x: answer(x) + 1e6))


def test_a_run_whose_answers_fp16_cannot_hold_says_what_to_do(teacher: nn.Module, digits: Images) -> None:
    it = job(Loud(teacher), config("dfnd", steps=400, **ON), digits.x[:300])
    with pytest.raises(Diverged, match=r"65 504; use augment.views 0"):
        it.run()


class Loud(nn.Module):
    """A teacher with logits that are finite in fp32 only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x) * 1e6
        return out


# ------------------------------------------------------------------------------------------- resized crops


@pytest.mark.parametrize("mix", ["none", "mixup"])
def test_a_resized_crop_is_new_at_each_draw_and_of_its_image(mix: str, teacher: nn.Module, digits: Images) -> None:
    """Stored views are asked for in vain, and the teacher answers to the crop itself."""
    augment = {"crop": "resized", "scale": (0.3, 0.6), "views": 16, "mix": mix, "mix_share": 1.0}
    it = job(teacher, config("data", "none", steps=4, augment=augment, criterion={"name": "kl"}), digits.x[:200])
    it.acquire(Watcher())
    acquirer = it.acquirer
    assert acquirer.views.count == 0
    assert "resized crops are not stored" in acquirer.views.reason
    first, second = acquirer.draw(), acquirer.draw()
    torch.testing.assert_close(first.t, it.context.teacher(first.x), rtol=1e-3, atol=1e-3)
    assert not torch.equal(first.x, second.x)
    if mix == "none":
        clean = to_float(acquirer.pool.x[first.index])
        assert bool((first.x.amin((1, 2, 3)) >= clean.amin((1, 2, 3)) - 1e-6).all())
        assert bool((first.x.amax((1, 2, 3)) <= clean.amax((1, 2, 3)) + 1e-6).all())


def test_a_resized_crop_is_that_of_the_library_function() -> None:
    pool = Pool(6, SHAPE, 3, CPU)
    seen = Views(pool, Augment(crop="resized", scale=(0.25, 0.5)), rng(1))
    seen.plan(99.0, 6)
    put(pool, seen, 6)
    index = torch.tensor([4, 0, 2, 2])
    x, t = seen(index, rng(5))
    assert t is None
    assert torch.equal(x, resized_crop(to_float(pool.x[index]), rng(5), (0.25, 0.5), flip=True))


def test_resized_crops_do_not_need_room_for_shifts() -> None:
    it = distill(build("tiny4", 10, 1), build("tiny4", 10, 1), "noise", image_shape=(1, 4, 4), steps=1, batch=8,
                 augment={"crop": "resized"}, verbose=False)  # fmt: skip
    assert "resized crops are not stored" in it.summary["views"]


# ------------------------------------------------------------------------------------------- mixed images


@pytest.mark.parametrize("how", ["mixup", "cutmix"])
@pytest.mark.parametrize("V", [0, 4])
def test_mixed_images_lie_between_two_of_the_pool(V: int, how: str) -> None:
    pool = Pool(6, SHAPE, 3, CPU)
    seen = Views(pool, Augment(pad=0, flip=False, mix=how, mix_share=1.0, views=V), rng(1))  # type: ignore[arg-type]
    seen.plan(99.0, 6)
    assert seen.count == V
    assert how in seen.reason
    put(pool, seen, 6)
    index = torch.arange(6)
    x, t = seen(index, rng())
    assert (t is None) == (V == 0)
    clean = to_float(pool.x)
    lows, highs = torch.minimum(clean[:, None], clean[None]), torch.maximum(clean[:, None], clean[None])
    between = ((x[:, None] >= lows - 1e-6) & (x[:, None] <= highs + 1e-6)).flatten(2).all(2)
    assert bool(between.any(1).all())
    assert not torch.equal(x, clean)


def test_stored_blends_are_a_share_of_the_views() -> None:
    pool, seen = views(V=50, capacity=40, mix="mixup", share=0.3)
    put(pool, seen, 40)
    _, alone = views(V=50, capacity=40)
    alone.pool = pool
    alone._reserve(40)
    alone.shift, alone.mirrored = seen.shift[:, :, :1], seen.mirrored[:, :, :1]
    index, view = torch.arange(40).repeat_interleave(50), torch.arange(50).repeat(40)
    same = (seen._pixels(index, view) - alone._pixels(index, view)).abs().amax((1, 2, 3)) < 1e-6
    assert 1 - same.float().mean().item() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("eviction", ["oldest", "reservoir"])
def test_only_blends_with_an_image_that_left_are_asked_about_again(eviction: str) -> None:
    pool, seen = views(V=3, capacity=50, eviction=eviction, mix="cutmix")
    assert put(pool, seen, 30) == 90  # room for all: nobody leaves
    assert put(pool, seen, 20, 1) == 60
    before, partner, blended = seen.t.clone(), seen.partner.clone(), seen.u[:, :, 0] < 0.5
    images = torch.rand(4, *SHAPE, generator=rng(2))
    slots, ask = pool.add(images, torch.zeros(4, 3), rng(2)), Asked()
    seen.fill(slots, ask)
    left = torch.isin(torch.arange(50), slots)
    orphans = left[partner.long()] & blended & ~left[:, None]
    assert 0 < int(orphans.sum()) < 30
    assert ask.images == 3 * len(slots) + int(orphans.sum())
    assert torch.equal((seen.t != before).any(2), orphans | left[:, None])


def test_a_checkpoint_without_blends_is_read() -> None:
    pool, seen = views()
    put(pool, seen, 5)
    older = seen.state_dict()
    older["shift"], older["mirrored"] = older["shift"][:, :, 0], older["mirrored"][:, :, 0]
    del older["partner"], older["u"]
    _, again = views()
    again.pool = pool
    again.load_state_dict(older)
    index = torch.arange(5)
    for was, now in zip(seen(index, rng(3)), again(index, rng(3))):
        assert was is not None
        assert now is not None
        assert torch.equal(was, now)


def test_a_run_with_mixed_images_asks_the_teacher_about_them(
    teacher: nn.Module, digits: Images, tmp_path: Path
) -> None:
    cfg = config("data", "none", steps=4, augment={"mix": "mixup", "mix_share": 1.0}, criterion={"name": "kl"})
    it = job(teacher, cfg, digits.x[:200])
    it.acquire(Watcher())
    drawn = it.acquirer.draw()
    torch.testing.assert_close(drawn.t, it.context.teacher(drawn.x), rtol=1e-3, atol=1e-3)
    assert torch.equal(drawn.labels, drawn.t.argmax(1))
    clean = it.acquirer.pool.logits[drawn.index]
    assert not torch.allclose(drawn.t, clean, atol=0.1)


# ------------------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize(
    ("augment", "draws", "most", "features", "count", "says"),
    [
        ({"views": 16}, 365.0, 56_000, False, 16, "computed once for 16 views of each image (22.4 MB)"),
        ({"views": 16}, 15.9, 56_000, False, 0, "drawn 15.9 times, which is less than 16 views"),
        ({"views": 0}, 365.0, 56_000, False, 0, "augment.views is 0"),
        ({"views": 16}, 365.0, 56_000, True, 0, "reads the teacher's features"),
        ({"views": 16, "pad": 0, "flip": False}, 365.0, 56_000, False, 0, "without augmentation"),
        ({"views": 16, "crop": "resized"}, 365.0, 56_000, False, 0, "resized crops are not stored"),
        ({"pad": 0, "flip": False, "crop": "resized"}, 365.0, 56_000, False, 0, "resized crops are not stored"),
        ({"views": 16, "pad": 0}, 365.0, 56_000, False, 2, "all 2 views"),
        ({"views": 300}, 365.0, 56_000, False, 162, "all 162 views of each image (227 MB)"),
        ({"views": 162}, 161.9, 56_000, False, 0, "less than 162 views"),
        (
            {"views": 16, "mix": "cutmix"},
            365.0,
            56_000,
            False,
            16,
            "some of them blended (cutmix) (44.8 MB)",
        ),
        (
            {"mix": "cutmix"},
            365.0,
            56_000,
            False,
            0,
            "some of them blended (cutmix), each with a teacher",
        ),
        ({"views": 9, "mix": "mixup", "pad": 0, "flip": False}, 365.0, 56_000, False, 9, "9 views"),
        ({"views": 100, "views_gb": 0.001}, 1e9, 4_000, False, 10, "100 do not fit in augment.views_gb = 0.001 GB"),
        ({"views": 500, "views_gb": 0.001}, 1e9, 4_000, False, 0, "all 162 of an image do not fit"),
        ({"views": 500, "views_gb": 0.0164}, 1e9, 4_000, False, 162, "all 162 views of each image (16.2 MB)"),
        ({"views": 16, "views_gb": 1e-6}, 1e9, 4_000, False, 0, "one per image does not fit"),
    ],
)
def test_how_many_views_are_kept(
    augment: dict[str, Any], draws: float, most: int, features: bool, count: int, says: str
) -> None:
    seen = Views(Pool(60_000, (3, 32, 32), 10, CPU), resolve({"augment": augment}).augment, rng())
    seen.plan(draws, most, features)
    assert seen.count == count
    assert says in seen.reason


def test_at_a_thousand_classes_it_says_how_many_fit() -> None:
    seen = Views(Pool(65_536, (3, 32, 32), 1000, CPU), resolve({"augment": {"views": 16}}).augment, rng())
    seen.plan(365.0, 65_536)
    assert seen.count == 15
    assert "15 views" in seen.reason
    assert "16 do not fit" in seen.reason


@pytest.mark.parametrize("source", ["fast", "dfnd", "adversarial"])
@pytest.mark.parametrize("eviction", ["oldest", "reservoir"])
@pytest.mark.parametrize("capacity", [40, 4000])
def test_the_draws_of_an_image_are_counted_right(
    source: str, eviction: str, capacity: int, teacher: nn.Module, digits: Images
) -> None:
    """draws * images that joined = steps * batch."""
    cfg = config(source, steps=9, pool={"capacity": capacity, "eviction": eviction}, **ON)
    it = job(teacher, cfg, digits.x[:300])
    joined: list[int] = []
    offered: list[int] = []
    add = it.acquirer.pool.add

    def count(*args: Any) -> Tensor:
        offered.append(len(args[0]))
        joined.append(len(slots := add(*args)))
        return slots

    it.acquirer.pool.add = count  # type: ignore[method-assign]
    it.run()
    draws, most = it.acquirer._draws(offered[0])
    assert most == len(it.acquirer.pool)
    assert draws * sum(joined) == pytest.approx(9 * 16, rel=0.2 if eviction == "reservoir" else 1e-6)


# --------------------------------------------------------------------------------------------------- in a run


class Tally:
    """A number that a module shares with its copies."""

    def __init__(self) -> None:
        self.images = 0

    def __deepcopy__(self, _memo: dict[int, Any]) -> Tally:
        return self


class Counter(nn.Module):
    """The teacher, and how many images it and its copies have answered."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.tally = Tally()

    def forward(self, x: Tensor) -> Tensor:
        self.tally.images += len(x)
        out: Tensor = self.model(x)
        return out


def steps_ask(it: Distiller, counter: Counter) -> int:
    """Images that the teacher answers in three steps of the student."""
    while it.acquirer.due(it.step):
        it.acquirer.acquire(it.matcher.student)
    it.acquirer._ask(to_float(it.acquirer.pool.x[:2]))  # makes the copy that answers
    before = counter.tally.images
    for _ in range(3):
        it.match()
    return counter.tally.images - before


@pytest.mark.parametrize("intervention", ["none", "kdci", "stratified"])
@pytest.mark.parametrize("source", sorted(SOURCES))
def test_no_step_asks_the_teacher(source: str, intervention: str, teacher: nn.Module, digits: Images) -> None:
    """Not in any source, with walks (small pools) and weighted draws."""
    counter = Counter(fitting(source, teacher))
    given = digits.x[:300]
    for V, asked in ((0, 3 * 512), (1, 0)):
        cfg = config(source, intervention, steps=60, augment={"views": V, "flip": True}, source={"every": 60},
                     loop={"batch": 512})  # fmt: skip
        it = job(counter, cfg, given)
        assert steps_ask(it, counter) == asked, it.acquirer.views.reason


def test_the_dictionary_of_a_batch_is_built_from_the_views_answers(teacher: nn.Module, digits: Images) -> None:
    counter = Counter(teacher)
    cfg = config("dfnd", "kdci", steps=400, dictionary={"of": "batch"}, **ON)
    it = job(counter, cfg, digits.x[:300])
    assert steps_ask(it, counter) == 0
    assert it.acquirer.dictionary is not None
    assert it.acquirer.dictionary.built


def test_what_reads_features_asks_each_time_and_says_so(teacher: nn.Module, digits: Images) -> None:
    counter = Counter(teacher)
    cfg = config("dfnd", steps=400, criterion="fitnet", **ON)
    it = job(counter, cfg, digits.x[:300])
    assert steps_ask(it, counter) == 48
    assert "features" in it.acquirer.views.reason


@pytest.mark.parametrize("update", ["replay", "retain"])
def test_replayed_inputs_are_untouched(update: str, teacher: nn.Module) -> None:
    counter = Counter(teacher)
    more = {"update": update, "replay": {"name": "bank", "size": 8, "first": 1, "every": 1}}
    it = job(counter, config("pre", steps=400, source={"every": 0, "warmup": 1}, **more, **ON))
    assert steps_ask(it, counter) == 0


@pytest.mark.parametrize("source", ["fast", "dfnd", "deepinv"])
@pytest.mark.parametrize(("eviction", "mix"), [("oldest", "none"), ("reservoir", "none"), ("oldest", "cutmix")])
def test_stopped_at_each_step_it_ends_in_the_same_bits(
    source: str, eviction: str, mix: str, teacher: nn.Module, digits: Images, tmp_path: Path
) -> None:
    cfg = config(source, "kdci+stratified", steps=6, loop={"batch": 64},
                 pool={"capacity": 50, "eviction": eviction}, augment={**ON["augment"], "mix": mix})  # fmt: skip
    whole = job(teacher, cfg, digits.x[:300])
    whole.run()
    assert whole.acquirer.views.count == 2
    for step in range(1, 6):
        assert not stopped_at(job(teacher, cfg, digits.x[:300]), RunFolder(tmp_path / str(step), cfg),
                              lambda it: it.step >= step)  # fmt: skip  # noqa: B023
        again = job(teacher, cfg, digits.x[:300], seed=7)
        folder = RunFolder(tmp_path / str(step), cfg)
        again.run(folder)
        folder.close()
        same(again.matcher.state_dict(), whole.matcher.state_dict())
        same(again.acquirer.pool_state(), whole.acquirer.pool_state())


def test_the_summary_says_which_was_chosen(teacher: nn.Module, digits: Images) -> None:
    settings = {k: v for k, v in tree("dfnd", **ON).items() if k not in ("source", "intervention")}
    for batch, says in ((16, "less than 2 views"), (128, "once for 2 views")):
        settings["loop"] = {**settings["loop"], "batch": batch}
        out = distill(teacher, student(), SOURCES["dfnd"], image_shape=SHAPE, unlabeled=digits.x[:300], verbose=False,
                      **settings)  # fmt: skip
        assert says in out.summary["views"]


@pytest.mark.parametrize(
    ("bad", "says"),
    [({"views": -1}, "views is -1"), ({"views_gb": 0}, "views_gb is 0"), ({"scale": [0.5, 0.2]}, "augment.scale is")],
)
def test_bad_values_are_refused(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(DodistillError, match=says):
        resolve({"augment": bad})
