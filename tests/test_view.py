"""The view: what the teacher is shown during synthesis, as the config says it or as its BatchNorm statistics do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dodistill.config.tree import ViewConfig, resolve
from dodistill.engine import view
from dodistill.errors import DodistillError
from dodistill.functional.augment import View, to_float
from dodistill.models import load_model
from dodistill.models.teacher import Teacher
from dodistill.sources.shared.pictures import draw
from helpers import SHAPE, job
from helpers import config as settings

COLOUR = (3, 16, 16)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def used_to(padding: str, crop: str = "shift") -> Teacher:
    """A network with the running statistics of drawn pictures under one view; other pictures than `auto` draws."""
    net = load_model("tiny8", num_classes=10, in_channels=3, image_size=16, seed=3)
    seen = to_float(draw({"shapes": 600, "leaves": 600}, COLOUR, rng(7), False))
    shown = View(crop, padding, 4, True)(seen, rng(8))
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None  # the plain mean over batches
            m.reset_running_stats()
    net.train()
    with torch.no_grad():
        net(shown)
    return Teacher(net, COLOUR)


@pytest.mark.parametrize(
    ("padding", "found"), [("zeros", {"zeros"}), ("none", {"none"}), ("reflect", {"reflect", "none"})]
)
def test_auto_finds_the_view_of_the_statistics(padding: str, found: set[str]) -> None:
    """Reflected borders and none look alike to so small a network; a black border does not."""
    c = ViewConfig(padding="auto", pad=4)
    assert view.choose_view(c, used_to(padding)).padding in found


def test_auto_finds_resized_crops() -> None:
    found = view.choose_view(ViewConfig(crop="auto", padding="auto", pad=4), used_to("none", "resized"))
    assert found == View("resized", "none", 0, True, (0.08, 1.0))


def test_what_is_said_is_taken_and_nothing_is_computed(monkeypatch: pytest.MonkeyPatch, teacher: nn.Module) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(view, "mismatch", never)
    wrapped = Teacher(teacher, SHAPE)
    assert view.choose_view(resolve().view, wrapped) == View(
        "shift", "zeros", 1, False
    )  # an eighth of 8 pixels; digits
    given = resolve({"view": {"crop": "resized", "scale": [0.75, 1.0], "flip": True}}).view
    assert view.choose_view(given, wrapped) == View("resized", "none", 0, True, (0.75, 1.0))


@pytest.mark.parametrize(("channels", "flip"), [(1, False), (3, True)])
def test_the_literatures_default_at_32_pixels(channels: int, flip: bool) -> None:
    """Zeros, 4 pixels, and flips where there is colour."""
    (only,) = view.candidates(resolve().view, (channels, 32, 32)).values()
    assert only == View("shift", "zeros", 4, flip)


@pytest.mark.parametrize(
    "shown", [View("shift", "zeros", 3), View("shift", "reflect", 3), View("shift", "none", 3), View("resized")]
)
def test_a_view_keeps_shape_and_range_and_is_differentiable(shown: View) -> None:
    x = torch.rand(64, 3, 8, 8, requires_grad=True)
    y = shown(x, rng())
    assert y.shape == x.shape
    low, high = y.detach().aminmax()
    assert float(low) >= 0
    assert float(high) <= 1 + 1e-6
    assert torch.equal(y, shown(x, rng()))
    (g,) = torch.autograd.grad(y.sum(), x)
    assert g.abs().sum() > 0


def test_what_comes_in_from_outside() -> None:
    bright = torch.ones(256, 1, 8, 8)
    assert float(View("shift", "zeros", 3)(bright, rng()).mean()) < 0.95  # black borders
    for padding in ("reflect", "none"):
        assert torch.equal(View("shift", padding, 3)(bright, rng()), bright)
    x = torch.rand(32, 1, 8, 8)
    assert torch.equal(View("shift", "none", 3, flip=False)(x, rng()), x)
    assert not torch.equal(View("shift", "none", 3, flip=True)(x, rng()), x)


def test_the_source_shows_the_view_and_the_student_its_augmentation(teacher: nn.Module) -> None:
    """Augmentation off and a view that blackens: the teacher of the synthesis sees black, the student does not."""
    cfg = settings("fast", steps=4, augment={"pad": 0}, view={"padding": "zeros", "pad": 3})
    it = job(teacher, cfg)
    seen: list[Tensor] = []
    inner = it.context.view
    it.context.view = lambda x, g: seen.append(inner(x, g)) or seen[-1]  # type: ignore[func-returns-value,assignment,return-value]
    assert it.run()
    assert len(seen) == 2 * it.acquirer.round  # K = 2 inner steps
    black = [float((x.amin((1, 3)) == 0).float().mean()) for x in seen]
    assert min(black) > 0.05
    drawn = it.acquirer.draw()
    assert torch.equal(drawn.t, it.acquirer.pool.logits[drawn.index])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"view": {"pad": -1}}, "view.pad is -1; it must be at least 0"),
        ({"view": {"scale": [0.0, 1.0]}}, r"view.scale is \[0.0, 1.0\]; give shares"),
        ({"view": {"scale": [0.9, 0.5]}}, r"view.scale is \[0.9, 0.5\]; give shares"),
        ({"view": {"padding": "zeroes"}}, "view.padding: unknown value 'zeroes'; did you mean 'zeros'"),
        ({"view": {"crop": "random"}}, "view.crop: unknown value 'random'"),
        ({"view": {"padd": 4}}, "view: unknown key 'padd'; did you mean 'pad'"),
        ({"augment": {"padding": "none"}}, "augment.padding: unknown value 'none'"),
    ],
)
def test_bad_settings_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(DodistillError, match=said):
        resolve(given)


def test_a_pad_beyond_the_image_is_named(teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match=r"view.pad is 8 pixels; for images of \(1, 8, 8\) it must lie between 0"):
        job(teacher, settings("fast", view={"pad": 8}))


@pytest.mark.parametrize("shape", [(1, 64, 8), (3, 8, 64)])
def test_long_images_shift_by_an_eighth_of_the_shorter_side(shape: tuple[int, int, int]) -> None:
    views = view.candidates(ViewConfig(padding="auto"), shape)
    assert {v.pad for v in views.values()} == {1}
    for one in views.values():
        assert one(torch.rand(2, *shape), torch.Generator().manual_seed(0)).shape == (2, *shape)
    with pytest.raises(DodistillError, match="images of 1x8 have nothing to reflect"):
        view.candidates(ViewConfig(padding="reflect"), (1, 1, 8))


def test_auto_without_statistics_is_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    cfg = settings("procedural", view={"padding": "auto"})
    with pytest.raises(DodistillError, match=r"auto compares BatchNorm statistics.*--view.padding zeros"):
        job(net, cfg)
