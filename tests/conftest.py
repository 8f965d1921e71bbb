"""One thread, and one small teacher that every engine test shares."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from dodistill.data.images import Images, load_images
from dodistill.engine.teach import Teach, teach
from dodistill.evaluation.evaluate import accuracy
from dodistill.models import Normalized, load_model, save_model
from helpers import SHAPE
from plugged import FILES

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> Images:
    return load_images("digits")


@pytest.fixture(scope="session")
def digits_test() -> Images:
    return load_images("digits", "test")


@pytest.fixture(scope="session")
def taught(digits: Images, digits_test: Images) -> Normalized:
    """A teacher of 8x8 digits; do not touch: take `teacher`."""
    model = load_model("tiny8", num_classes=10, in_channels=1, image_size=8, mean=[0.3], std=[0.4], seed=0)
    teach(model, digits, None, Teach(epochs=8, batch=64, pad=1, flip=False, minival=0.0))
    assert digits.image_shape == SHAPE
    assert accuracy(model, digits_test) > 90
    return model


@pytest.fixture
def teacher(taught: Normalized) -> nn.Module:
    return copy.deepcopy(taught)


@pytest.fixture(scope="session")
def teacher_file(taught: Normalized, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_model(taught, path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a plug-in for each axis."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    return tmp_path
