"""Flags are the config tree, spelled on a command line."""

from __future__ import annotations

import pytest

from dodistill.config import flags, registry
from dodistill.config.tree import Loop
from dodistill.errors import DodistillError


def read(line: str) -> dict[str, object]:
    return flags.tree(flags.raw(line.split()))


def test_values_are_read_as_yaml_reads_them() -> None:
    assert read("--loop.steps 60 --optim.lr 1e-3 --data.image_shape 3,32,32 --source.reset-at=0") == {
        "loop.steps": 60,
        "optim.lr": 1e-3,
        "data.image_shape": [3, 32, 32],
        "source.reset_at": 0,
    }
    assert read("--augment.flip false --kdci.renormalize") == {"augment.flip": False, "kdci.renormalize": True}


def test_a_negative_number_is_a_value_and_not_a_flag() -> None:
    assert read("--optim.lr -0.5 --seed -1") == {"optim.lr": -0.5, "loop.seed": -1}


def test_short_names() -> None:
    assert read("--teacher t.safetensors --steps 3") == {"teacher.spec": "t.safetensors", "loop.steps": 3}
    with pytest.raises(DodistillError, match="say the same thing"):
        read("--steps 3 --loop.steps 4")


def test_a_stray_word_is_refused_by_name() -> None:
    with pytest.raises(DodistillError, match="'stray'"):
        flags.raw(["--steps", "3", "stray"])


def test_help_has_every_field_with_its_comment() -> None:
    text = flags.help_of(Loop, "loop.")
    assert "--loop.steps [2000]  matching steps of the student" in text
    assert "--loop.ema [0.998]" in text


def test_comments_of_fields() -> None:
    kdci, stratified, noise = (registry.config(*c) for c in (
        ("intervention", "kdci"), ("intervention", "stratified"), ("source", "noise")))  # fmt: skip
    assert flags.comment(kdci, "weights").startswith("attention (Eq. 5) | random")  # below a bracket
    assert flags.comment(stratified, "cap").endswith("100:1")  # two lines
    assert flags.comment(noise, "law") == "gaussian, uniform"  # none, but only two values
    assert flags.comment(noise, "every").startswith("matching steps per acquisition")  # its base's
    assert flags.comment(noise, "n") == "images kept per acquisition"
