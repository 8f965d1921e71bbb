"""The table of sources tells the truth, and `--source auto` does what its own table says."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dodistill import distill
from dodistill.commands.cli import main
from dodistill.config import methods, registry
from dodistill.config.methods import HOUR, Choice, asks, choose, first_words, rows, settle, table
from dodistill.config.tree import resolve
from dodistill.data.images import Images
from dodistill.errors import DodistillError
from dodistill.functional.augment import to_float
from helpers import SHAPE, context, fitting, student

RGB = (3, 32, 32)

# ----------------------------------------------------------------------------------------------------- choose


def lines() -> Iterator[list[str]]:
    """The rows of the table in the docstring of `choose`: images, BatchNorm, sides, time, source, preset."""
    head, *body = (re.split(r"\s{2,}", line) for line in methods._choose_table())
    assert head == ["unlabelled images?", "BatchNorm?", "H, W multiples of 4?", "time", "source", "preset"]
    yield from body


TIMES = {
    ">= 6 h": [6 * HOUR, 100 * HOUR], "less, none": [1.0, 600.0, 6 * HOUR - 1, math.inf], "< 3 min": [1.0, 179.0],
    ">= 15 min": [900.0, HOUR, 6 * HOUR - 1], "else, none": [180.0, 899.0, math.inf],
}  # fmt: skip


def test_choose_does_what_its_docstring_says() -> None:
    given = {"yes": [True], "no": [False], "any": [False, True]}
    shapes = {"yes": [RGB, (1, 28, 28)], "no": [(3, 30, 32), (1, 32, 17)], "any": [RGB, (1, 30, 30)]}
    checked = set()
    for images, batchnorm, sides, *rest in lines():
        if len(rest) == 1:
            assert (sides, rest) == ("no", ["as the two lines above"])  # asked below
            continue
        time, source, preset = rest
        for unlabeled in given[images]:
            for has in given[batchnorm]:
                for shape in shapes[sides]:
                    for seconds in TIMES[time]:
                        choice = choose(has, unlabeled, seconds, shape)
                        assert (choice.source, choice.preset) == (source, preset), (images, batchnorm, sides, seconds)
                        checked.add((unlabeled, has, shape[1] % 4 == 0 == shape[2] % 4, seconds))
    for seconds in (1.0, 600.0, math.inf, 7 * HOUR):
        for shape in shapes["no"]:
            odd, none = choose(True, False, seconds, shape), choose(False, False, seconds, shape)
            assert (odd.source, odd.preset) == (none.source, none.preset)
            assert f"{shape[1]}x{shape[2]}" in odd.reason
    assert len(checked) > 25


@pytest.mark.parametrize("unlabeled", [True, False])
@pytest.mark.parametrize("has_batchnorm", [True, False])
@pytest.mark.parametrize("seconds", [60.0, 600.0, 9 * HOUR, math.inf])
def test_a_choice_can_be_built_and_says_why(has_batchnorm: bool, unlabeled: bool, seconds: float) -> None:
    choice = choose(has_batchnorm, unlabeled, seconds)
    config = resolve({"source": choice.source, "preset": choice.preset})
    assert has_batchnorm or "batchnorm" not in config.source.needs
    assert unlabeled or "unlabeled" not in config.source.needs
    said = str(choice)
    assert said.startswith(f"source auto: {choice.source}, preset {choice.preset}, since ")
    assert said.endswith(".")
    assert ". " not in said  # one sentence
    spoken = {60.0: "1 min", 600.0: "10 min", 9 * HOUR: "9 h", math.inf: "no time limit"}[seconds]
    assert spoken in said


def test_settle_keeps_what_the_user_said() -> None:
    assert asks({"source": "auto"})
    assert asks({"source.name": "auto"})
    assert not asks({"source": "fast"})
    assert not asks({})
    tree, choice = settle({"source": "auto", "loop.steps": 7}, True, False, math.inf, RGB)
    assert tree == {"source": {"name": "fast"}, "preset": "desk", "loop": {"steps": 7}}
    tree, choice = settle({"source": "auto", "source.K": 2, "preset": "vgg11"}, True, False, math.inf, RGB)
    assert (tree["source"], tree["preset"], choice.preset) == ({"name": "fast", "K": 2}, "vgg11", "vgg11")
    tree, choice = settle({"source": {"name": "auto", "seconds": 60}}, True, False, math.inf, RGB)
    assert (tree["source"], choice.source) == ({"name": "procedural"}, "procedural")
    begun = {"source": {"name": "deepinv"}, "preset": "toolbox"}
    tree, choice = settle({"source": "auto"}, True, False, math.inf, RGB, begun)
    assert (tree["source"], tree["preset"]) == ({"name": "deepinv"}, "toolbox")
    assert "begun" in choice.reason
    for wrong in (0, -5, True, "10m"):
        with pytest.raises(DodistillError, match=r"source\.seconds is"):
            settle({"source": {"name": "auto", "seconds": wrong}}, True, False, math.inf, RGB)


def test_choosing_needs_no_torch() -> None:
    code = "import sys; from dodistill.config.methods import choose; choose(True, False); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ------------------------------------------------------------------------------------------- auto, end to end

TINY: dict[str, Any] = {"augment": {"pad": 1, "flip": False}, "loop": {"steps": 2, "batch": 8}, "verbose": False}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.flatten(1))
        return out


def test_auto_in_python(teacher: nn.Module, digits: Images, tmp_path: Path) -> None:
    quick = {"warmup": 0, "K": 1, "batch": 8, "width": 2, "latent": 4}
    result = distill(teacher, student(), {"name": "auto", **quick}, image_shape=SHAPE, out=tmp_path / "a", **TINY)
    assert result.summary["choice"] == str(choose(True, False, math.inf, SHAPE))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["source"]["name"], config["source"]["K"], config["preset"]) == ("fast", 1, "desk")
    few = {"n": 20, "candidates": 30}
    assert (
        "procedural"
        in distill(Plain(), student(), {"name": "auto", **few}, image_shape=SHAPE, **TINY).summary["choice"]
    )
    done = distill(teacher, student(), {"name": "auto", "n": 20}, image_shape=SHAPE, unlabeled=digits.x[:50], **TINY)
    assert done.summary["choice"].startswith("source auto: dfnd, preset desk, since unlabelled images were given")
    assert "choice" not in distill(teacher, student(), {"name": "fast", **quick}, image_shape=SHAPE, **TINY).summary
    with pytest.raises(DodistillError, match="'desks'"):
        distill(teacher, student(), "auto", image_shape=SHAPE, preset="desks", **TINY)


def test_auto_on_the_command_line(teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = [
        "distill", "--teacher", str(teacher_file), "--student", "tiny4", "--source", "auto", "--out", str(out),
        "--source.n", "40", "--source.candidates", "60", "--steps", "3", "--batch", "8", "--augment.pad", "1",
        "--quiet", "--no-report",
    ]  # fmt: skip
    assert main([*command, "--max-seconds", "0"]) == 75
    capsys.readouterr()
    assert main([*command, "--max-seconds", "500"]) == 0  # by itself `fast`; the folder was begun with another
    said = capsys.readouterr().out
    assert "source auto: procedural, preset desk, since this run folder was begun with it." in said
    config = json.loads((out / "config.json").read_text())
    assert (config["source"]["name"], config["preset"]) == ("procedural", "desk")
    assert json.loads((out / "summary.json").read_text())["choice"] in said
    assert main([*command[:6], "auto", "--help"]) == 0
    assert "unlabelled images?" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- the table

SMALL: dict[str, dict[str, Any]] = {
    "adversarial": {"batch": 8, "width": 2, "latent": 4, "fresh": 3},
    "cmi": {"batch": 8, "width": 2, "latent": 4, "iterations": 2, "bank": 16, "negatives": 4},
    "dafl": {"batch": 8, "width": 2, "latent": 4, "fresh": 0, "g_steps": 2},
    "data": {},
    "deepinv": {"iterations": 3, "batch": 8},
    "dfnd": {"n": 50},
    "fast": {"K": 3, "batch": 8, "width": 2, "latent": 4},
    "fast_imagenet": {"K": 3, "batch": 8, "width": 2, "latent": 4, "doublings": 2},
    "mixture": {
        "of": {"fast": {"K": 3, "batch": 8, "width": 2, "latent": 4}, "procedural": {"n": 40, "candidates": 100}}
    },
    "mosaic": {"batch": 8, "width": 2, "latent": 4, "base": 4, "patches": 4, "every": 2, "pad": 1},
    "nayer": {"iterations": 3, "batch": 20, "width": 2, "noise": 4, "loops": 2, "warmup": 0},
    "noise": {"n": 20, "candidates": 30, "batch": 10},
    "pre": {"batch": 8, "width": 2, "latent": 4, "fresh": 2},
    "psaq": {"iterations": 2, "batch": 8},
    "procedural": {"n": 40, "candidates": 100},
    "real": {"n": 50},
}


def test_every_source_is_checked() -> None:
    assert set(SMALL) == set(registry.names("source"))


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_passes_are_counted_right(name: str, teacher: nn.Module, digits: Images) -> None:
    config: Any = registry.config("source", name)(**SMALL[name])
    teacher = fitting(name, teacher)
    source = config.build(context(teacher, 0, digits.x[:50]))
    forwards = backwards = 0

    def count(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal forwards, backwards
        forwards += len(args[0])
        backwards += len(args[0]) * args[0].requires_grad

    pupil = student().eval()
    wrapped = source.context.teacher
    handle = wrapped.model.register_forward_pre_hook(count)
    wrapped.answers(to_float(digits.x[:2]))  # makes the copy that labels images, which takes the hook along
    source.acquire(pupil, 0)  # samplers look at everything once; counted from the second on, where there is one
    if config.every == 0:
        source = config.build(replace(context(teacher, 0, digits.x[:50]), teacher=wrapped))
    forwards = backwards = 0
    got = source.acquire(pupil, int(config.every != 0))
    handle.remove()
    if got.logits is None:
        forwards += len(got.images)
    expected = config.teacher_passes()
    assert (forwards / len(got.images), backwards / len(got.images)) == pytest.approx(expected)


def test_the_rows_say_what_the_code_says() -> None:
    every = {row.name: row for row in rows()}
    assert set(every) == set(registry.names("source"))
    for name, row in every.items():
        config: Any = registry.config("source", name)
        assert {*row.layers, *(["unlabeled"] if row.unlabeled else [])} == config.needs
        assert row.slots == resolve({"source": name, "preset": "desk"}).pool.capacity
        assert len(row.about) > 30
    assert every["fast"].cost == "6 + 5"
    assert every["procedural"].trains == "nothing"
    text = table()
    for axis in registry.AXES:
        for name in registry.names(axis):
            assert f"\n{name} " in text or f"\n  {name} " in text


@pytest.mark.parametrize("axis", list(registry.AXES))
def test_first_words_are_whole_sentences(axis: str) -> None:
    for name in registry.names(axis):
        said = first_words(registry.own(axis, name))
        assert 20 < len(said) < 260, name
        assert not said.endswith(("et al.", ":", ",")), name
        assert (registry.module(axis, name).__doc__ or "").split()[0] == said.split()[0]


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    assert capsys.readouterr().out == table() + "\n"


def test_a_choice_prints() -> None:
    assert str(Choice("a", "b", "c")) == "source auto: a, preset b, since c."
