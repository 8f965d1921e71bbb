"""Source `data`: all of a data set, its labels where it has some, and never where they were not asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dodistill import distill
from dodistill.commands.cli import main
from dodistill.config import registry
from dodistill.config.tree import resolve
from dodistill.core.watch import Watcher
from dodistill.data.images import Images, load_images
from dodistill.engine import Distiller, Job
from dodistill.errors import DodistillError
from dodistill.evaluation.evaluate import predict
from dodistill.report.images import export_images
from dodistill.sources.data import Config
from helpers import SHAPE, config, student

CID = ("wrn40_4-wrn16_2", "wrn40_2-wrn16_2", "resnet56-resnet20", "resnet50-mobilenetv2", "resnet50-vgg8")


def job(teacher: nn.Module, digits: Images, **more: object) -> Distiller:
    tree = {"source": {"name": "data", **more}, "pool": {"capacity": 1300, "holdout": 0.1}}
    return Distiller(Job(config("real", **tree), teacher, student(), SHAPE, digits.x, labels=digits.y))


def test_everything_is_there_once_with_its_label(teacher: nn.Module, digits: Images) -> None:
    assert digits.y is not None
    it = job(teacher, digits)
    it.acquire(Watcher())
    assert not it.acquirer.due(it.step)
    assert len(it.acquirer.pool) + len(it.acquirer.holdout) == len(digits)
    known = {bytes(x.numpy()): int(y) for x, y in zip(digits.x, digits.y)}
    for part in (it.acquirer.pool, it.acquirer.holdout):
        assert [known[bytes(x.numpy())] for x in part.x] == part.labels.tolist()
        torch.testing.assert_close(part.logits, predict(teacher, part.x), rtol=1e-4, atol=1e-4)


def test_a_share_is_the_same_images_whatever_the_seed(teacher: nn.Module, digits: Images) -> None:
    found = []
    for seed in (0, 5):
        cfg = config("real", source={"name": "data", "share": 0.2}, loop={"seed": seed})
        it = Distiller(Job(cfg, teacher, student(), SHAPE, digits.x, labels=digits.y))
        it.acquire(Watcher())
        found.append({bytes(x.numpy()) for part in (it.acquirer.pool, it.acquirer.holdout) for x in part.x})
    assert found[0] == found[1]
    assert abs(len(found[0]) - 0.2 * len(digits)) < 8  # a few digits are alike to the bit


@pytest.mark.parametrize(
    ("settings", "labels", "said"),
    [
        ({"share": 0.0}, None, "share is 0.0"),
        ({"share": 1.5}, None, "share is 1.5"),
        ({}, torch.zeros(5).long(), r"labels have shape \(5,\)"),
        ({}, torch.full((1297,), 10), "run from 10 to 10"),
    ],
)
def test_mistakes(
    settings: dict[str, object], labels: torch.Tensor | None, said: str, teacher: nn.Module, digits: Images
) -> None:
    with pytest.raises(DodistillError, match=said):
        distill(teacher, student(), {"name": "data", **settings}, unlabeled=digits.x, labels=labels, verbose=False,
                image_shape=SHAPE, augment={"pad": 1})  # fmt: skip


def test_a_pool_that_is_too_small_is_said(teacher: nn.Module, digits: Images) -> None:
    with pytest.raises(DodistillError, match=r"1297 images, but pool.capacity is 1000; give --pool.capacity 1297"):
        distill(teacher, student(), {"name": "data"}, unlabeled=digits.x, verbose=False, image_shape=SHAPE,
                augment={"pad": 1}, pool={"capacity": 1000})  # fmt: skip
    it = job(teacher, digits, share=0.5)
    it.acquire(Watcher())
    assert len(it.acquirer.pool) + len(it.acquirer.holdout) == round(0.5 * len(digits))


def test_labels_for_a_source_that_never_reads_them_are_refused(teacher: nn.Module, digits: Images) -> None:
    with pytest.raises(DodistillError, match="source real reads no labels"):
        distill(teacher, student(), "real", unlabeled=digits.x, labels=digits.y, verbose=False, image_shape=SHAPE)
    readers = [n for n in registry.names("source") if registry.config("source", n).reads_labels]
    assert readers == ["data"]


def test_from_the_command_line(teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labelled by name, by `--train`, and a folder without labels; `real` reads none of them."""
    base = ["--teacher", str(teacher_file), "--student", "tiny4", "--preset", "desk", "--augment.pad", "1",
            "--augment.flip", "false", "--steps", "3", "--batch", "16", "--quiet", "--no-report"]  # fmt: skip
    plain = tmp_path / "plain"
    export_images(load_images("digits").x[:30], plain, torch.zeros(30).long())
    for file in list(plain.rglob("*.png")):
        file.rename(plain / f"{file.parent.name}-{file.name}")
    np.save(tmp_path / "x.npy", load_images("digits").x[:30].numpy()[:, 0])
    for i, (source, flag, spec, labelled) in enumerate(
        [("data", "--data.unlabeled", "digits", True), ("data", "--train", "digits", True),
         ("data", "--train", str(plain), False), ("data", "--train", str(tmp_path / "x.npy"), False),
         ("real", "--train", "digits", False)]
    ):  # fmt: skip
        out = tmp_path / f"run{i}"
        assert main(["distill", "--source", source, flag, spec, "--out", str(out), *base]) == 0
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        scores = [line for line in lines if line["kind"] == "eval"][-1]
        assert ("minival" in scores) == labelled, spec
        assert "agreement" in scores


def test_without_images_it_says_what_to_give(teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match=r"--data\.unlabeled"):
        distill(teacher, student(), "data", verbose=False, image_shape=SHAPE, augment={"pad": 1})


@pytest.mark.parametrize("pair", CID)
def test_the_released_settings_of_cid(pair: str) -> None:
    cfg = resolve({"source": "data", "preset": f"cid-{pair}"})
    assert cfg.intervention == "cid"
    assert cfg.criterion.name == "cid"
    expected = {"wrn40_4-wrn16_2": (55, 0.1), "wrn40_2-wrn16_2": (65, 1), "resnet56-resnet20": (10, 1),
                "resnet50-mobilenetv2": (33, 0.1), "resnet50-vgg8": (8, 2)}  # fmt: skip
    assert (cfg.criterion.a, cfg.criterion.b, cfg.criterion.c) == (1, *expected[pair])
    assert (cfg.criterion.temperature, cfg.criterion.init, cfg.interventions[0].init) == (4, 20 / 240, 20 / 240)
    assert cfg.optim.lr == (0.01 if "mobilenet" in pair else 0.05)
    assert (cfg.optim.nesterov, cfg.optim.schedule, cfg.optim.milestones) == (True, "steps", (0.625, 0.75, 0.875))
    assert (cfg.loop.batch, cfg.loop.steps) == (64, 240 * 782)
    assert resolve({"source": "data", "preset": f"cid-{pair}", "intervention": "none"}).intervention == "none"
    assert resolve(cfg.to_tree()) == cfg


def test_every_preset_says_where_it_is_from() -> None:
    assert set(Config.presets) == set(Config.origin)
    assert resolve({"source": "data", "preset": "desk"}).criterion.name == "hinton"
    released = resolve({"source": "data", "preset": "repdistiller", "criterion": "crd"})
    other, optim = released.criterion, released.optim
    assert (other.name, other.ce, other.kd) == ("crd", 1.0, 0.0)
    assert (optim.lr, optim.momentum, optim.nesterov) == (
        0.05,
        0.9,
        False,
    )  # CID has Nesterov


def test_a_preset_s_intervention_reaches_python(teacher: nn.Module, digits: Images) -> None:
    more = {"verbose": False, "image_shape": SHAPE, "augment": {"pad": 1, "flip": False}, "unlabeled": digits.x[:90],
            "loop": {"steps": 2, "batch": 8}, "preset": "cid-resnet56-resnet20"}  # fmt: skip
    by_preset = distill(teacher, student(), "data", **more)  # type: ignore[arg-type]
    without = distill(teacher, student(), "data", "none", **more)  # type: ignore[arg-type]
    assert by_preset.summary["key"] != without.summary["key"]


def test_the_rate_falls_where_it_is_told(teacher: nn.Module) -> None:
    from helpers import job as plain

    optim = {"lr": 1.0, "schedule": "steps", "milestones": [0.5, 0.7, 0.9]}
    it = plain(teacher, config(steps=10, optim=optim))
    rates = []
    for it.step in range(10):
        rates.append(it.matcher.rate(it.step / 10))
    assert rates == pytest.approx([1.0] * 5 + [0.1] * 2 + [0.01] * 2 + [0.001])
