"""Training: it learns, repeats itself, says what it did, and refuses what cannot work."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dodistill.commands.cli import main
from dodistill.data.images import Images, load_images
from dodistill.engine.teach import Teach, lr_at, teach
from dodistill.errors import DodistillError
from dodistill.models import load_model

QUICK = Teach(model="tiny8", epochs=6, batch=64, lr=0.2, pad=1, flip=False, minival=0.1, precision="fp32")


def digits() -> tuple[Images, Images]:
    pytest.importorskip("sklearn")
    return load_images("digits"), load_images("digits", "test")


def test_it_learns_digits_and_reports() -> None:
    train, test = digits()
    net = load_model("tiny8", num_classes=10, seed=0)
    logs: list[dict] = []
    begun: list[int] = []
    result = teach(net, train, test, QUICK, logs.append, on_step=begun.append)
    assert sorted(begun + [log["step"] for log in logs]) == list(range(1, result["steps"] + 1))
    assert result["test"] > 90
    assert result["minival"] > 85
    assert result["train_images"] == 1297 - 130
    assert result["steps"] == 6 * (1167 // 64) == logs[-1]["step"]
    assert [log["epoch"] for log in logs] == [1, 2, 3, 4, 5, 6]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert not net.training


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    train, _ = digits()
    nets = []
    train = train.select(torch.arange(300))
    for seed in (0, 0, 1):
        net = load_model("tiny8", num_classes=10, seed=0)
        teach(net, train, config=dataclasses.replace(QUICK, epochs=1, seed=seed))
        nets.append(net.model.conv1.weight)
    assert torch.equal(nets[0], nets[1])
    assert not torch.equal(nets[0], nets[2])


def test_test_images_change_nothing() -> None:
    train, test = digits()
    nets = []
    for given in (test, None):
        net = load_model("tiny8", num_classes=10, seed=0)
        result = teach(net, train, given, dataclasses.replace(QUICK, epochs=1, minival=0))
        nets.append(net.model.fc.weight)
    assert torch.equal(nets[0], nets[1])
    assert (result["test"], result["minival"]) == (None, None)


def test_one_step_is_nesterov_sgd() -> None:
    """A single full-batch step without augmentation against torch's update written out."""
    train, _ = digits()
    few = train.select(torch.arange(32))
    config = dataclasses.replace(QUICK, epochs=1, batch=32, pad=0, minival=0, lr=0.1, label_smoothing=0.1)
    net, twin = (load_model("tiny8", num_classes=10, seed=0).train() for _ in range(2))
    loss = torch.nn.functional.cross_entropy(twin(few.x / 255), few.y, label_smoothing=0.1)
    grads = torch.autograd.grad(loss, list(twin.parameters()))
    result = teach(net, few, config=config)
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-4)
    lr = lr_at(config, 0, 1)
    for p, q, g in zip(net.parameters(), twin.parameters(), grads):
        d = g + 5e-4 * q
        assert torch.allclose(p, q - lr * 1.9 * d, atol=1e-5)


def test_adamw_steps_as_pytorchs_and_resumes_in_the_same_bits() -> None:
    train, _ = digits()
    train = train.select(torch.arange(64))
    config = dataclasses.replace(QUICK, optimizer="adamw", lr=1e-3, weight_decay=0.05, epochs=2, pad=0, minival=0)
    start = load_model("tinyvit16", num_classes=10, seed=0)
    whole, by_hand, half = (copy.deepcopy(start) for _ in range(3))
    teach(whole, train, config=config)
    assert train.y is not None
    optimizer = torch.optim.AdamW(by_hand.parameters(), weight_decay=0.05)
    by_hand.train()
    for step in range(2):
        optimizer.param_groups[0]["lr"] = lr_at(config, step, 2)
        optimizer.zero_grad()
        nn.functional.cross_entropy(by_hand(train.x.float() / 255), train.y).backward()
        optimizer.step()
    for name in ("head.weight", "patch_embed.proj.weight"):  # biases of keys have no gradient but rounding
        mine, other = (net.model.state_dict()[name] for net in (whole, by_hand))
        assert torch.allclose(mine, other, atol=1e-4), name
        assert not torch.allclose(mine, start.model.state_dict()[name], atol=1e-4), name
    states: list[dict] = []
    stopped = teach(half, train, config=config, on_checkpoint=lambda s: states.append(copy.deepcopy(s)), deadline=0.0)
    assert stopped == {"finished": False, "epoch": 1}
    teach(half, train, config=config, resume=states[0])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters()))


def test_a_checkpoint_from_before_the_optimizer_had_a_name_resumes() -> None:
    train, _ = digits()
    train, config, states = train.select(torch.arange(64)), dataclasses.replace(QUICK, epochs=2), list[dict]()
    net = load_model("tiny4", num_classes=10, seed=0)
    teach(net, train, config=config, on_checkpoint=lambda s: states.append(copy.deepcopy(s)), deadline=0.0)
    del states[0]["config"]["optimizer"]
    assert "finished" not in teach(net, train, config=config, resume=states[0])


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_schedules(schedule: str) -> None:
    config = Teach(lr=2.0, schedule=schedule, warmup=0.2)
    rates = [lr_at(config, t, 100) for t in range(100)]
    assert max(rates) == pytest.approx(2.0)
    assert rates.index(max(rates)) == (19 if schedule == "onecycle" else 0)
    assert 0 < rates[-1] < 0.03
    down = rates[rates.index(max(rates)) :]
    assert down == sorted(down, reverse=True)
    assert lr_at(config, 0, 1) > 0


def test_what_cannot_work_is_refused() -> None:
    train, _ = digits()
    net = load_model("tiny8", num_classes=10, seed=0)
    with pytest.raises(DodistillError, match="have no labels; teaching needs them"):
        teach(net, Images(train.x))
    with pytest.raises(DodistillError, match="labels go up to 9, but the model has 4 classes"):
        teach(load_model("tiny8", num_classes=4), train, config=QUICK)
    with pytest.raises(DodistillError, match=r"shape \(1, 8, 8\)"):
        teach(load_model("wrn16_1", num_classes=10), train, config=QUICK)
    with pytest.raises(DodistillError, match="pad is 9"):
        teach(net, train, config=dataclasses.replace(QUICK, pad=9))
    with pytest.raises(DodistillError, match="loss became"):
        teach(net, train, config=dataclasses.replace(QUICK, lr=1e30))
    with pytest.raises(DodistillError, match="use sgd or adamw"):
        Teach(optimizer="adam")
    with pytest.raises(DodistillError, match="onecycle or cosine"):
        Teach(schedule="step")


def test_bf16_learns_too() -> None:
    train, test = digits()
    net = load_model("tiny8", num_classes=10, seed=0)
    assert teach(net, train, test, dataclasses.replace(QUICK, precision="bf16"))["test"] > 90
    assert next(net.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_stopped_and_resumed_ends_in_the_same_bits(dropout: float) -> None:
    train, _ = digits()
    schedule = Teach(epochs=3, batch=64, pad=1, flip=False)

    def fresh() -> nn.Module:
        net = load_model("tiny4", num_classes=10, in_channels=1, image_size=8, seed=0)
        return nn.Sequential(nn.Dropout2d(dropout), net)

    whole = fresh()
    teach(whole, train, None, schedule)
    first, saved = fresh(), []
    stopped = teach(first, train, None, schedule, on_checkpoint=lambda s: saved.append(copy.deepcopy(s)), deadline=0.0)
    assert stopped == {"finished": False, "epoch": 1}
    second = fresh()
    result = teach(second, train, None, schedule, resume=saved[-1])
    assert result["steps"] == 3 * (1271 // 64)
    for a, b in zip(whole.state_dict().values(), second.state_dict().values()):
        assert torch.equal(a, b)
    with pytest.raises(DodistillError, match="another schedule"):
        teach(fresh(), train, None, Teach(epochs=4, batch=64, pad=1, flip=False), resume=saved[-1])


def test_on_the_command_line_too(tmp_path: Path) -> None:
    def command(name: str) -> list[str]:
        settings = ["--data", "digits", "--epochs", "2", "--flip", "false", "--pad", "1"]
        return ["teach", "tiny4", *settings, "--out", str(tmp_path / name)]

    assert main(command("whole.safetensors")) == 0
    assert main([*command("halves.safetensors"), "--max-seconds", "0"]) == 75
    assert (tmp_path / "halves.teaching.pt").exists()
    assert main(command("halves.safetensors")) == 0
    assert not (tmp_path / "halves.teaching.pt").exists()
    whole, halves = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "halves.safetensors")
    assert all(torch.equal(whole[k], halves[k]) for k in whole)
