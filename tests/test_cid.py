"""CID: its losses and its contexts against slow readings, the student that it ships, with data and without."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dodistill import distill, engine
from dodistill.commands.cli import main
from dodistill.config.tree import resolve
from dodistill.core.batch import Batch
from dodistill.core.context import Context
from dodistill.core.watch import Watcher
from dodistill.criteria import cid as criterion
from dodistill.data.images import Images
from dodistill.engine import Distiller, Job
from dodistill.errors import DodistillError
from dodistill.evaluation.evaluate import predict
from dodistill.evaluation.probe import features
from dodistill.interventions.cid import CID, Config
from dodistill.interventions.kdci import Config as KDCI
from dodistill.interventions.shared.base import Interventions
from dodistill.interventions.shared.dictionary import ConfounderDictionary
from dodistill.models import heads, load_model, read_metadata, save_model
from dodistill.models.onnx import onnx_bytes
from dodistill.models.taps import Features
from dodistill.models.teacher import Teacher
from helpers import SHAPE, config, same, student

B, K, D, E = 12, 4, 5, 7


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=stream(seed))


# ------------------------------------------------------------------------------------------------- losses


def test_sample_loss_is_the_mean_of_relative_squared_distances() -> None:
    f, h = randn(B, E), 3 * randn(B, E, seed=1)
    slow = np.mean([((a - b) ** 2).sum() / (b**2).sum() for a, b in zip(f.double().numpy(), h.double().numpy())])
    assert criterion.normalised_mse(f, h).item() == pytest.approx(slow, rel=1e-5)


def slow_class_shape(f: Tensor, h: Tensor, y: list[int]) -> float:
    def cos(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    F, H, losses = f.double().numpy(), h.double().numpy(), []
    for k in set(y):
        members = [i for i, label in enumerate(y) if label == k]
        if len(members) >= 2:
            pairs = itertools.product(members, members)
            losses.append(sum((cos(F[i], F[j]) - cos(H[i], H[j])) ** 2 for i, j in pairs) / len(members) ** 2)
    return sum(losses) / len(losses) if losses else 0.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=12))
def test_class_loss_is_that_of_the_loops(y: list[int]) -> None:
    f, h = randn(len(y), D), randn(len(y), E, seed=1)
    got = criterion.class_shape(f, h, torch.tensor(y)).item()
    assert got == pytest.approx(slow_class_shape(f, h, y), rel=1e-4, abs=1e-7)
    assert 0 <= got <= 4


def test_class_loss_asks_for_the_shape_alone() -> None:
    """Turned, mirrored and scaled by sample, the class has the same shape; with no pair there is nothing to compare."""
    f, y = randn(B, D), torch.arange(B) % K
    turn = torch.linalg.qr(randn(D, D, seed=2))[0]
    scale = torch.rand(B, 1, generator=stream(3)) + 0.1
    assert criterion.class_shape(f, scale * (f @ turn), y) < 1e-10
    alone = randn(3, D).requires_grad_()
    loss = criterion.class_shape(alone, randn(3, E), torch.arange(3))
    loss.backward()
    assert loss == 0
    assert alone.grad is not None
    assert torch.isfinite(alone.grad).all()


def context(teacher: nn.Module | None = None, labels: Tensor | None = None, net: nn.Module | None = None) -> Context:
    teacher = teacher or student(9, classes=K)
    return Context(Teacher(teacher, SHAPE), torch.device("cpu"), student=net or student(classes=K), labels=labels)


def batch(done: float = 0.5, y: Tensor | None = None, f: Tensor | None = None, z: Tensor | None = None) -> Batch:
    f, z = randn(B, 16) if f is None else f, 2 * randn(B, K, seed=4) if z is None else z
    y = torch.arange(B) % K if y is None else y
    return Batch(torch.arange(B), y, z, done, Features(f), Features(randn(B, 16, seed=5)))


@pytest.mark.parametrize("done", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_criterion_adds_up(done: float, labelled: bool) -> None:
    labels = torch.zeros(3).long() if labelled else None
    it = criterion.Config(a=0.5, b=3.0, c=2.0, ce=0.7, temperature=2.0).build(context(labels=labels))
    s, t, at = randn(B, K, seed=6), randn(B, K, seed=7), batch(done)
    terms = it(s, t, at)
    assert isinstance(it, criterion.CID)
    assert it.r.weight.shape == (16, 16)

    def kl(p: Tensor) -> Tensor:
        target = torch.softmax(t / 2, 1)
        return 4 * (target * (target.log() - torch.log_softmax(p / 2, 1))).sum(1).mean()

    assert at.student.penultimate is not None
    assert at.teacher.penultimate is not None
    f, h = at.student.penultimate, at.teacher.penultimate
    expected = {
        "kd": 0.5 * kl(at.raw),
        "sample": 3 * criterion.normalised_mse(it.r(f), h),
        "class": 2 * criterion.class_shape(f, h, at.labels),
    }
    if done >= 20 / 240:
        expected["supervised"] = 0.35 * (nn.functional.cross_entropy(s, at.labels) if labelled else kl(s))
    assert sorted(terms) == sorted(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-6)


def test_supervision_can_be_chosen() -> None:
    labels = torch.zeros(3).long()
    for choice, given_, hard in (("teacher", labels, False), ("labels", None, True), ("auto", labels, True)):
        it: Any = criterion.Config(supervise=choice).build(context(labels=given_))  # type: ignore[arg-type]
        assert it.labelled == hard


# ----------------------------------------------------------------------------------------------- contexts


def build(**settings: Any) -> CID:
    it = Config(**settings).build(context())
    assert it.head.weight.shape == (K, 32)
    return it


def slow_prototypes(seen: list[tuple[Batch, Tensor]], old: np.ndarray, T: float) -> np.ndarray:
    """c_k in loops, over all inputs of a pass."""
    total, mass = np.zeros_like(old), np.zeros(len(old))
    for at, t in seen:
        assert at.student.penultimate is not None
        for f, y, logits in zip(at.student.penultimate.double().numpy(), at.labels.tolist(), t.double().numpy()):
            w = math.exp(logits[y] / T) / sum(math.exp(v / T) for v in logits)
            total[y] += w * f
            mass[y] += w
    return np.stack([total[k] / mass[k] if mass[k] else old[k] for k in range(len(old))])


@pytest.mark.parametrize("u", [0.0, 0.3])
def test_prototypes_are_of_the_pass_before(u: float) -> None:
    it = build(temperature=3.0, refresh=0.25, init=0.0, u=u)
    before, passes = np.zeros((K, 16)), []
    used = []
    for step in range(16):  # four passes of four steps; no input of class 3 after the first
        at = batch(step / 16, y=torch.arange(B) % (K if step < 4 else K - 1), f=randn(B, 16, seed=step))
        t = 3 * randn(B, K, seed=50 + step)
        it.compensate(at.raw, None, at)
        it.compensate(at.raw, None, at)  # a look ahead changes nothing
        used.append(it.C.clone())
        it.observe(t, at)
        passes.append((at, t))
    assert not used[3].any()
    for n in range(1, 4):
        fresh = slow_prototypes(passes[4 * n - 4 : 4 * n], before, 3.0)
        before = fresh if n == 1 else u * before + (1 - u) * fresh
        for step in range(4 * n, 4 * n + 4):
            np.testing.assert_allclose(used[step].numpy(), before, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(used[15][3].numpy(), used[4][3].numpy())


@pytest.mark.parametrize("weights", ["softened", "prior", "uniform"])
def test_the_intervened_prediction(weights: str) -> None:
    it = build(weights=weights, init=0.0, refresh=0.5, temperature=2.0)
    y = torch.tensor([0] * 6 + [1] * 3 + [2] * 2 + [3])
    it.observe(randn(B, K), batch(0.0, y=y))
    at = batch(0.5)
    got = it.compensate(at.raw, None, at)
    f, C = at.student.penultimate, it.C.double().numpy()
    assert f is not None
    W, b = it.head.weight.detach().double().numpy(), it.head.bias.detach().double().numpy()
    for i in range(B):
        z = at.raw[i].double().numpy() / 2
        q = {"softened": np.exp(z) / np.exp(z).sum(), "prior": np.array([6, 3, 2, 1]) / 12, "uniform": np.ones(K) / K}
        ctx = sum(q[weights][k] * C[k] for k in range(K))
        slow = W @ np.concatenate([f[i].double().numpy(), ctx]) + b
        np.testing.assert_allclose(got[i].detach().numpy(), slow, rtol=1e-4, atol=1e-5)
    assert (it.C.abs().sum(1) > 0).all()


def test_the_gradient_goes_through_the_features_and_not_through_the_context() -> None:
    it = build(init=0.0, refresh=0.5)
    it.observe(randn(B, K), batch(0.0))
    f, z = randn(B, 16, seed=8).requires_grad_(), randn(B, K, seed=9).requires_grad_()
    at = batch(0.5, f=f, z=z)
    weigh = randn(B, K, seed=10)
    (it.compensate(z, None, at) * weigh).sum().backward()
    assert f.grad is not None
    assert z.grad is not None
    torch.testing.assert_close(f.grad, weigh @ it.head.weight[:, :16].detach())
    assert z.grad.abs().max() == 0
    assert it.head.weight.grad is not None
    assert (it.head.weight.grad.abs().sum(0) > 0).all()
    assert not it.C.requires_grad


def test_it_joins_another_intervention_in_either_order() -> None:
    kdci = KDCI().build(context())
    dictionary = ConfounderDictionary(3, K, stream())
    dictionary.rebuild(4 * randn(50, K))
    it = build(init=0.0, refresh=0.5)
    it.observe(randn(B, K), batch(0.0))
    at = batch(0.5)
    alone = it.compensate(at.raw, dictionary, at)
    first = Interventions([it, kdci]).compensate(at.raw, dictionary, at)
    last = Interventions([kdci, it]).compensate(at.raw, dictionary, at)
    torch.testing.assert_close(first, kdci.compensate(alone, dictionary, at))
    torch.testing.assert_close(last, alone + (kdci.compensate(at.raw, dictionary, at) - at.raw), rtol=1e-4, atol=1e-5)


def test_before_its_time_it_does_nothing() -> None:
    it = build(init=0.5, refresh=0.25)
    net = student(classes=K)
    for done in (0.0, 0.25, 0.4):
        at = batch(done)
        assert it.compensate(at.raw, None, at) is at.raw
        it.observe(randn(B, K), at)
        assert it.deliver(net, None) is net
    it.eval()
    at = batch(1.0)
    assert it.compensate(at.raw, None, at) is at.raw  # looking at a test set opens no pass
    it.train()
    at = batch(0.5)
    assert it.compensate(at.raw, None, at) is not at.raw
    assert it.deliver(net, None) is not net


def test_what_is_delivered_says_the_same_without_the_intervention() -> None:
    it = build(init=0.0, refresh=0.5, temperature=3.0)
    it.observe(randn(B, K), batch(0.0))
    net = student(classes=K).eval()
    keys = list(net.state_dict())
    x = torch.rand(B, *SHAPE, generator=stream())
    seen: list[Tensor] = []
    fc = net.get_submodule("model.fc")
    handle = fc.register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    z = net(x)
    handle.remove()
    it.compensate(z, None, batch(0.5, f=seen[0], z=z))
    shipped = it.deliver(net, None)
    torch.testing.assert_close(shipped(x), it.compensate(z, None, batch(0.6, f=seen[0], z=z)))
    assert not torch.allclose(shipped(x), z, atol=1e-2)
    assert list(net.state_dict()) == keys
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in shipped.modules())


@pytest.mark.parametrize(
    ("config_", "said"),
    [
        (Config(temperature=0), "temperature is 0"),
        (Config(init=1.0), "init is 1.0"),
        (Config(refresh=0.0), "refresh 0.0"),
        (Config(u=1.0), "u 1.0"),
        (criterion.Config(b=-1), "b, c and ce are weights"),
    ],
)
def test_bad_values_are_named(config_: Any, said: str) -> None:
    with pytest.raises(DodistillError, match=said):
        config_.build(context())


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(DodistillError, match=r"cid.weights: unknown value 'soft'; did you mean 'softened'"):
        resolve({"intervention": "cid", "cid": Config(weights="soft")})  # type: ignore[arg-type]
    with pytest.raises(DodistillError, match=r"criterion.supervise: unknown value 'nobody'"):
        resolve({"criterion": {"name": "cid", "supervise": "nobody"}})


def test_a_student_without_a_place_for_the_head_is_refused() -> None:
    conv = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, K, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(DodistillError, match="last layer must be a Linear"):
        Config().build(context(net=conv))
    twice = student(classes=K)
    heads.attach(twice)
    with pytest.raises(DodistillError, match="already has a context head"):
        Config().build(context(net=twice))


# ------------------------------------------------------------------------------------------------ the loop

QUICK = {"cid": {"refresh": 0.125, "init": 0.25}, "criterion": {"name": "cid", "init": 0.25}}


def job(teacher: nn.Module, digits: Images, intervention: str = "cid", labels: bool = True, **more: Any) -> Distiller:
    cfg = config("real", intervention, **{"steps": 8, **QUICK, **more, "source": {"name": "data"}})
    assert digits.y is not None
    return Distiller(Job(cfg, teacher, student(), SHAPE, digits.x[:200], labels=digits.y[:200] if labels else None))


def test_the_loop_trains_what_it_should(teacher: nn.Module, digits: Images) -> None:
    it = job(teacher, digits)
    frozen = copy.deepcopy(it.context.teacher.state_dict())
    assert it.run()
    same(frozen, it.context.teacher.state_dict())
    part = next(iter(it.matcher.interventions))
    assert isinstance(part, CID)
    learnt = [*it.matcher.student.parameters(), *it.matcher.criterion.parameters(), *part.parameters()]
    assert len(list(part.parameters())) == len(list(it.matcher.criterion.parameters())) == 2
    for p in learnt:
        assert p.grad is not None
        assert p.grad.abs().sum() > 0
    assert [g["weight_decay"] for g in it.matcher.optimizers[0].param_groups] == [5e-4, 0.0, 0.0]
    assert part.count.sum() == 16  # the step since the last turn, once each
    assert part.active


def test_labels_are_the_data_s_where_there_are_some(teacher: nn.Module, digits: Images) -> None:
    assert digits.y is not None
    wrong = (predict(teacher, digits.x[:200]).argmax(1) + 1) % 10
    cfg = config("real", "cid", **{"steps": 2, **QUICK, "source": {"name": "data"}})
    it = Distiller(Job(cfg, teacher, student(), SHAPE, digits.x[:200], labels=wrong))
    assert it.run()
    assert torch.equal(it.acquirer.pool.labels, (it.acquirer.pool.logits.argmax(1) + 1) % 10)
    assert torch.equal(it.acquirer.holdout.labels, (it.acquirer.holdout.logits.argmax(1) + 1) % 10)
    found = it.scorer.evaluate()
    held = predict(it.scorer.complete("last"), it.acquirer.holdout.x)
    assert found["minival"] == pytest.approx(100 * (held.argmax(1) == it.acquirer.holdout.labels).float().mean().item())
    assert it.matcher.last is not None
    at = it.matcher.last.batch
    assert torch.equal(at.labels, it.acquirer.pool.labels[at.index])
    bare = job(teacher, digits, labels=False)
    assert bare.run()
    assert torch.equal(bare.acquirer.pool.labels, bare.acquirer.pool.logits.argmax(1))
    assert "minival" not in bare.scorer.evaluate()


@pytest.mark.parametrize("intervention", ["cid", "cid+kdci"])
@pytest.mark.parametrize("update", ["plain", "retain"])
def test_without_data(intervention: str, update: str, teacher: nn.Module) -> None:
    """Labels from the teacher, no cross-entropy, beside KDCI, and under an update that looks ahead."""
    more: dict[str, Any] = {
        "update": update,
        **({"replay": {"name": "bank", "size": 8, "first": 1, "every": 1}} if update == "retain" else {}),
    }
    cfg = config("fast", intervention, **{"steps": 16, **QUICK, **more})
    it = Distiller(Job(cfg, teacher, student(), SHAPE))
    terms: list[dict[str, Tensor]] = []
    inner = it.matcher.update.backward
    it.matcher.update.backward = lambda *a: (terms.append(inner(*a)), terms[-1])[1]  # type: ignore[method-assign]
    assert it.run()
    assert all("supervised" not in t for t in terms[:4])
    assert all("supervised" in t for t in terms[4:])
    assert isinstance(it.matcher.criterion, criterion.CID)
    assert not it.matcher.criterion.labelled
    for name, p in it.matcher.interventions.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    part = next(iter(it.matcher.interventions))
    assert isinstance(part, CID)
    assert part.count.sum() == 2 * 16  # new inputs once each, replayed ones not
    assert it.acquirer.replay.ready == (update == "retain")
    assert isinstance(heads.find(it.scorer.complete("last")), heads.ContextHead)


@pytest.mark.parametrize(
    ("source", "at", "loss"), [("data", 5, "cid"), ("data", 1, "kl"), ("data", 2, "kl"), ("fast", 5, "cid")]
)
def test_killed_and_resumed_to_the_same_bits(
    source: str, at: int, loss: str, teacher: nn.Module, digits: Images
) -> None:
    def fresh() -> Distiller:
        if source == "data":
            return job(teacher, digits, criterion=loss, cid={"init": 0.5})
        return Distiller(Job(config("fast", "cid+kdci", **{"steps": 8, **QUICK}), teacher, student(), SHAPE))

    whole, first, second = fresh(), fresh(), fresh()
    assert whole.run()
    for _ in range(at):
        while first.acquirer.due(first.step):
            first.acquire(Watcher())
        first.match()
    second.load_state_dict(copy.deepcopy(first.state_dict()), copy.deepcopy(first.acquirer.pool_state()))
    assert second.run()
    for part in ("student", "ema", "interventions", "criterion"):
        same(getattr(whole.matcher, part).state_dict(), getattr(second.matcher, part).state_dict(), part)
    same(whole.scorer.last, second.scorer.last)


def shipped(teacher: nn.Module, digits: Images, out: Path | None) -> Any:
    assert digits.y is not None
    return distill(
        teacher, student(), {"name": "data"}, "cid", unlabeled=digits.x[:300], labels=digits.y[:300], out=out,
        image_shape=SHAPE, verbose=False, augment={"pad": 1, "flip": False}, loop={"steps": 24, "batch": 32}, **QUICK,
    )  # fmt: skip


def test_one_file_holds_the_student_with_its_context(teacher: nn.Module, digits: Images, tmp_path: Path) -> None:
    result = shipped(teacher, digits, tmp_path / "run")
    file = tmp_path / "run" / "student.safetensors"
    assert read_metadata(file)["head"] == {"temperature": 4.0, "weights": "softened"}
    loaded = load_model(str(file))
    x = digits.x[:50]
    assert torch.equal(predict(loaded, x), predict(result.student, x))
    head = heads.find(loaded)
    assert head is not None
    assert head.C.abs().sum() > 0
    bare = sum(p.numel() for p in student().parameters())
    assert result.summary["student_parameters"] == bare + 10 * 16 + 10 * 33
    again = load_model("tiny4", num_classes=10, in_channels=1, weights=file)
    assert torch.equal(predict(again, x), predict(loaded, x))

    # the finished folder opens to the same student, with its checkpoints and without
    reopened = shipped(teacher, digits, tmp_path / "run")
    assert torch.equal(predict(reopened.student, x), predict(loaded, x))
    for pattern in ("checkpoint.pt", "previous.pt", "pool-*.pt"):
        for checkpoint in (tmp_path / "run").glob(pattern):
            checkpoint.unlink()
    bared = shipped(teacher, digits, tmp_path / "run")
    assert torch.equal(predict(bared.student, x), predict(loaded, x))


def test_a_shipped_student_can_teach(teacher: nn.Module, digits: Images, tmp_path: Path) -> None:
    result = shipped(teacher, digits, None)
    onward = distill(
        result.student, student(3), {"name": "data"}, unlabeled=digits.x[:100], image_shape=SHAPE, verbose=False,
        augment={"pad": 1}, loop={"steps": 2, "batch": 16},
    )  # fmt: skip
    assert onward.summary["steps"] == 2
    save_model(result.student, tmp_path / "s.safetensors")
    assert torch.equal(predict(load_model(str(tmp_path / "s.safetensors")), digits.x[:9]),
                       predict(result.student, digits.x[:9]))  # fmt: skip


def test_the_student_as_onnx(teacher: nn.Module, digits: Images, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    result = shipped(teacher, digits, tmp_path / "run")
    file = tmp_path / "student.onnx"
    assert main(["export", str(tmp_path / "run"), str(file)]) == 0
    assert file.stat().st_size > 1000
    session = pytest.importorskip("onnxruntime").InferenceSession(str(file))
    x = (digits.x[:7].float() / 255).contiguous()
    (logits,) = session.run(None, {"images": x.numpy()})
    np.testing.assert_allclose(logits, result.student(x).detach().numpy(), rtol=1e-3, atol=1e-4)


def test_onnx_without_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(DodistillError, match=r"dodistill\[onnx\]"):
        onnx_bytes(student(), SHAPE)


def test_the_student_learns_and_its_prototypes_are_its_classes(
    teacher: nn.Module, digits: Images, digits_test: Images
) -> None:
    assert digits_test.y is not None
    cfg = config(
        "real", "cid", steps=250, source={"name": "data"}, criterion={"name": "cid"}, cid={"refresh": 0.05},
        optim={"lr": 0.05}, loop={"batch": 64, "log_every": 125, "eval_every": 250},
    )  # fmt: skip
    it = Distiller(
        Job(cfg, teacher, student(), SHAPE, digits.x, test=engine.Test(digits_test.x, digits_test.y), labels=digits.y)
    )
    assert it.run()
    assert it.scorer.last["test"] > 80
    assert it.scorer.last["minival"] > 75
    head = heads.find(it.scorer.complete("last"))
    assert head is not None
    f = features(it.matcher.student, digits_test.x)
    nearest = torch.cdist(f, head.C).argmin(1)  # a prototype is where its class is
    assert (nearest == digits_test.y).float().mean() > 0.6
