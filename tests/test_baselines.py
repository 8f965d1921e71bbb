"""The baselines of distillation with data: each against a slow reading of its equations, and in the loop."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dodistill import engine
from dodistill.config import registry
from dodistill.core.batch import Batch
from dodistill.core.context import Context
from dodistill.core.watch import Watcher
from dodistill.criteria import at, crd, dkd, fitnet, rkd, sp
from dodistill.criteria.shared.base import Labelled, paired, probes
from dodistill.data.images import Images
from dodistill.engine import Distiller, Job
from dodistill.errors import DodistillError
from dodistill.functional.losses import kl
from dodistill.models.taps import Features, probe, stages, tapped
from dodistill.models.teacher import Teacher
from dodistill.models.zoo import build
from helpers import SHAPE, config, same, student

B, K = 6, 4
NAMES = ("hinton", "fitnet", "at", "sp", "rkd", "crd", "dkd")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def context(capacity: int = 20, teacher: nn.Module | None = None, net: nn.Module | None = None) -> Context:
    chosen = Teacher(teacher or student(9, width=8, classes=K), SHAPE)
    return Context(chosen, torch.device("cpu"), student=net or student(classes=K), capacity=capacity)


def features(width: int, seed: int) -> Features:
    """What a tiny network of that width shows of 8x8 images."""
    maps = [randn(B, width * 2**i, 8 // 2**i, 8 // 2**i, seed=seed + i).requires_grad_() for i in range(3)]
    return Features(randn(B, 4 * width, seed=seed + 5).requires_grad_(), maps)


def batch(done: float = 0.5, index: Tensor | None = None) -> Batch:
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    where = torch.arange(B) if index is None else index
    return Batch(where, y, randn(B, K), done, features(4, 10), features(8, 20))


def own(name: str, at_: Batch, s: Tensor | None = None, t: Tensor | None = None, **settings: Any) -> Tensor:
    """The sum of a criterion's own terms, its weights set to 1 (or as given)."""
    it = registry.config("criterion", name)(**{"ce": 0.0, **settings}).build(context())
    return torch.stack(
        list(it(randn(B, K) if s is None else s, randn(B, K, seed=1) if t is None else t, at_).values())
    ).sum()


# ------------------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("name", NAMES)
def test_labels_and_softened_logits_come_first(name: str) -> None:
    it = registry.config("criterion", name)(ce=0.3, kd=0.6, temperature=3.0).build(context())
    s, t, here = randn(B, K, seed=2), randn(B, K, seed=3), batch()
    terms = it(s, t, here)
    torch.testing.assert_close(terms["ce"], 0.3 * nnf.cross_entropy(s, here.labels))
    torch.testing.assert_close(terms["kd"], 0.6 * kl(s, t, 3.0))
    assert (len(terms) > 2) == (name != "hinton")
    none = registry.config("criterion", name)(ce=0.0, kd=0.0).build(context())
    assert not {"ce", "kd"} & set(none(s, t, here))


def test_fitnet_is_the_distance_to_a_middle_map() -> None:
    it = fitnet.Config(ce=0.0, weight=2.0).build(context())
    assert isinstance(it, fitnet.FitNet)
    here = batch()
    got = it(randn(B, K), randn(B, K), here)["hint"]
    F, H = here.student.stages[1], here.teacher.stages[1]
    assert F.shape[1:] == (8, 4, 4)
    conv = it.r[0]
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    r = torch.einsum("bchw,oc->bohw", F, conv.weight[:, :, 0, 0]) + conv.bias[:, None, None]
    mean, var = r.mean((0, 2, 3), keepdim=True), r.var((0, 2, 3), correction=0, keepdim=True)
    slow = 2 * ((r - mean) / (var + 1e-5).sqrt() - H).square().mean()
    torch.testing.assert_close(got, slow)
    assert not list(it.buffers())
    last = fitnet.Config(stage=2).build(context())
    assert isinstance(last, fitnet.FitNet)
    assert last.r[0].weight.shape == (32, 16, 1, 1)
    with pytest.raises(DodistillError, match="stage is 3; student and teacher share 3"):
        fitnet.Config(stage=3).build(context())


def test_at_compares_where_energy_lies() -> None:
    here, slow = batch(), 0.0
    for F, H in zip(here.student.stages, here.teacher.stages):
        maps = []
        for A in (F, H):
            q = (A.detach().double() ** 2).mean(1).flatten(1).numpy()
            maps.append(q / np.linalg.norm(q, axis=1, keepdims=True))
        slow += ((maps[0] - maps[1]) ** 2).mean()
    assert own("at", here, weight=3.0).item() == pytest.approx(3 * slow, rel=1e-5)
    scaled = Features(None, [5 * m for m in here.student.stages])
    assert own("at", Batch(here.index, here.labels, here.raw, 0.5, scaled, here.student)) < 1e-9


def test_sp_compares_which_inputs_look_alike() -> None:
    here, maps = batch(), []
    for A in (here.student.stages[-1], here.teacher.stages[-1]):
        flat = A.detach().double().flatten(1).numpy()
        G = np.array([[a @ b for b in flat] for a in flat])
        maps.append(G / np.linalg.norm(G, axis=1, keepdims=True))
    slow = ((maps[0] - maps[1]) ** 2).sum() / B**2
    assert own("sp", here, weight=2.0).item() == pytest.approx(2 * slow, rel=1e-5)


def huber(a: float) -> float:
    return 0.5 * a * a if abs(a) < 1 else abs(a) - 0.5


def test_rkd_compares_distances_and_angles() -> None:
    here, psi = batch(), []
    assert here.student.penultimate is not None
    assert here.teacher.penultimate is not None
    for x in (here.student.penultimate, here.teacher.penultimate):
        f = x.detach().double().numpy()
        gap = np.array([[np.linalg.norm(a - b) for b in f] for a in f])
        gap /= gap.sum() / (B * (B - 1))
        angle = np.zeros((B, B, B))
        for j, i, k in itertools.product(range(B), repeat=3):
            a, b = f[i] - f[j], f[k] - f[j]
            size = np.linalg.norm(a) * np.linalg.norm(b)
            angle[j, i, k] = a @ b / size if size else 0.0
        psi.append((gap, angle))
    means = [np.mean([huber(v) for v in (a - b).flatten()]) for a, b in zip(*psi)]
    assert own("rkd", here, distance=2.0, angle=0.0).item() == pytest.approx(2 * means[0], rel=1e-4)
    assert own("rkd", here, distance=0.0, angle=3.0).item() == pytest.approx(3 * means[1], rel=1e-4)


def test_rkd_bears_equal_inputs() -> None:
    """A draw with replacement brings the same input twice; its distance is 0, and its gradient finite."""
    f = randn(B, 5)
    f[1] = f[0]
    f.requires_grad_()
    rkd.distances(f).square().sum().backward()
    rkd.angles(f).square().sum().backward()
    assert f.grad is not None
    assert torch.isfinite(f.grad).all()


def test_dkd_takes_the_target_and_the_others_apart() -> None:
    s, t, here, T = 2 * randn(B, K, seed=4), 2 * randn(B, K, seed=5), batch(1.0), 3.0
    target, others = 0.0, 0.0
    for a, b, y in zip(s.double().numpy(), t.double().numpy(), here.labels.tolist()):
        p, q = (np.exp(v / T) / np.exp(v / T).sum() for v in (a, b))
        for mine, its in ((p[y], q[y]), (1 - p[y], 1 - q[y])):
            target += its * np.log(its / mine) / B
        rest = [k for k in range(K) if k != y]
        p, q = p[rest] / p[rest].sum(), q[rest] / q[rest].sum()
        others += (q * np.log(q / p)).sum() / B
    alone = {"temperature": T, "s": s, "t": t}
    assert own("dkd", here, alpha=2.0, beta=0.0, **alone).item() == pytest.approx(2 * T * T * target, rel=1e-4)
    assert own("dkd", here, alpha=0.0, beta=3.0, **alone).item() == pytest.approx(3 * T * T * others, rel=1e-4)
    full, half = own("dkd", here, **alone), own("dkd", batch(10 / 240), **alone)
    torch.testing.assert_close(half, full / 2)
    # the two parts make up the whole: KL = TCKD + (1 - p_y of the teacher) NCKD, sample by sample
    one = slice(0, 1)
    a, b = dkd.decoupled(s[one], t[one], here.labels[one], 1.0)
    away = 1 - torch.softmax(t[one], 1)[0, here.labels[0]]
    torch.testing.assert_close(a + away * b, kl(s[one], t[one], 1.0), rtol=1e-4, atol=1e-6)


def test_dkd_is_finite_at_the_extremes() -> None:
    s = torch.tensor([[200.0, 0.0, -200.0], [-200.0, 200.0, 0.0]]).requires_grad_()
    a, b = dkd.decoupled(s, -s.detach(), torch.tensor([0, 0]), 1.0)
    (a + b).backward()
    assert torch.isfinite(a + b)
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()
    with pytest.raises(DodistillError, match="use hinton"):
        dkd.Config().build(context(teacher=student(9, classes=2), net=student(classes=2)))


# ----------------------------------------------------------------------------------------------------- crd


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_crd_against_its_loops() -> None:
    it = crd.Config(ce=0.0, weight=0.5, negatives=9, width=3, tau=0.5, momentum=0.25).build(context())
    assert isinstance(it, crd.CRD)
    it.observe(randn(B, K), batch(index=torch.arange(B) + 6))  # others are in the memory already
    before, here = it.memory.double().numpy(), batch()
    state = it.generator.get_state()
    got = it(randn(B, K), randn(B, K), here)["contrast"]
    drawn = (torch.rand(9, generator=torch.Generator().set_state(state)) * 12).long().tolist()
    assert max(drawn) > 5

    embedded = []
    for e, f in zip(it.embed, (here.student.penultimate, here.teacher.penultimate)):
        assert isinstance(e, nn.Linear)
        assert f is not None
        embedded.append(unit((e.weight.double() @ f.double().T).detach().numpy().T + e.bias.detach().double().numpy()))
    label = it.label.tolist()
    slow, N = 0.0, 9
    for side in (0, 1):
        v, memory = embedded[side], before[1 - side]
        score = np.exp(v @ memory[list(range(B))].T / 0.5).diagonal()
        others = np.exp(v @ memory[drawn].T / 0.5)
        Z = np.concatenate([score, others.flatten()]).mean()
        for i in range(B):
            loss = -np.log(score[i] / Z / (score[i] / Z + N))
            valid = [n for n, j in enumerate(drawn) if label[j] != here.labels[i] and j != i]
            far = [-np.log(N / (others[i, n] / Z + N)) for n in valid]
            slow += (loss + N * np.mean(far)) / B
    assert got.item() == pytest.approx(0.5 * slow, rel=1e-4)

    it.observe(randn(B, K), here)
    for side in (0, 1):
        moved = unit(0.25 * before[side][:B] + 0.75 * embedded[side])
        np.testing.assert_allclose(it.memory[side][:B].numpy(), moved, rtol=1e-4, atol=1e-5)
    assert it.label[:B].tolist() == here.labels.tolist()
    assert it.top == 12


def test_crd_s_scale_is_that_of_the_first_batch() -> None:
    it = crd.Config(negatives=5, width=3).build(context())
    assert isinstance(it, crd.CRD)
    it(randn(B, K), randn(B, K), batch())
    first = it.log_Z.clone()
    assert (first != 0).all()
    other = Batch(torch.arange(B), batch().labels, randn(B, K), 0.5, features(4, 50), features(8, 60))
    it(randn(B, K), randn(B, K), other)
    assert torch.equal(it.log_Z, first)


def test_crd_leaves_replayed_inputs_out() -> None:
    it = crd.Config(ce=0.0, negatives=5, width=3).build(context())
    assert isinstance(it, crd.CRD)
    memory = it.memory.clone()
    nobody = batch(index=torch.full((B,), -1))
    terms = it(randn(B, K), randn(B, K), nobody)
    assert terms["contrast"] == 0
    assert torch.equal(memory, it.memory)
    with pytest.raises(DodistillError, match="negatives is 0"):
        crd.Config(negatives=0).build(context())


def test_crd_goes_on_where_it_stopped() -> None:
    """A restored CRD has the memory, the scale and the draws of the one that was saved."""
    it, other = (crd.Config(negatives=5, width=3).build(context()) for _ in range(2))
    for seed in (0, 1):
        it(randn(B, K, seed=seed), randn(B, K), batch())
        it.observe(randn(B, K), batch())
    other.load_state_dict(it.state_dict())
    here = Batch(torch.arange(B), batch().labels, randn(B, K), 0.5, features(4, 50), features(8, 60))
    for _ in range(2):  # the second call draws after the first
        found, expected = (c(randn(B, K), randn(B, K), here)["contrast"] for c in (other, it))
        assert torch.equal(found, expected)
    assert not torch.equal(it(randn(B, K), randn(B, K), here)["contrast"], expected)


# ---------------------------------------------------------------------------------------------------- taps


class Last(nn.Module):
    """Channels last, as in the blocks of a ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 48)
        self.back = nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(self.linear(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 50, 34)])
def test_channels_last_activations_are_no_stages(shape: tuple[int, int, int]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 12, 4, 4), Last(), nn.Conv2d(12, 24, 2, 2, padding=1), nn.Identity())
    seen = probe(net, shape, frozenset({"stages"}), torch.device("cpu"))
    h, w = shape[1] // 4, shape[2] // 4
    assert [tuple(m.shape) for m in seen.stages] == [(2, 12, h, w), (2, 24, h // 2 + 1, w // 2 + 1)]


def test_stages_are_the_last_maps_of_each_size() -> None:
    """As in RepDistiller: the outputs of the stages, on VGG after their ReLU. A wrapped network is looked into."""
    net = build("wrn16_1", 5, 3).eval()
    outs: dict[str, Tensor] = {}
    places = ("block1", "block2", "block3")
    for name in places:
        net.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: outs.update({name: out}))
    with tapped(net, frozenset({"stages", "features"})) as seen:
        logits = net(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert [tuple(m.shape) for m in seen.stages] == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    for got, name in zip(seen.stages, places):
        assert got is outs[name]
    assert seen.penultimate is not None
    assert torch.allclose(net.get_submodule("fc")(seen.penultimate), logits)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("resnet20", [32, 16, 8]),
        ("resnet18", [32, 16, 8, 4]),
        ("vgg8", [32, 16, 8, 4]),
        ("mobilenetv2", [32, 16, 8, 4]),
    ],
)
def test_stages_of_other_families(name: str, sizes: list[int]) -> None:
    net = build(name, 5, 3).train()
    seen = probe(net, (3, 32, 32), frozenset({"stages"}), torch.device("cpu"))
    assert [m.shape[2] for m in seen.stages] == sizes
    wrapped = probe(nn.Sequential(net), (3, 32, 32), frozenset({"stages"}), torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(seen.stages, wrapped.stages, strict=True))
    assert name == "mobilenetv2" or min(m.min() for m in seen.stages) >= 0  # its units end without an activation
    assert all(m.training for m in net.modules())
    assert not any(m._forward_hooks for m in net.modules())


def test_a_network_names_its_stages() -> None:
    net = build("mobilenetv2", 5, 3).eval()
    seen = probe(net, (3, 32, 32), frozenset({"stages"}), torch.device("cpu"))
    assert [m.shape[1] for m in seen.stages] == [24, 32, 96, 320]  # RepDistiller's f1 to f4
    net.stage_names = ("features.99",)  # type: ignore[assignment]
    with pytest.raises(DodistillError, match=r"MobileNetV2 has 'features.99', which is no submodule"):
        probe(net, (3, 32, 32), frozenset({"stages"}), torch.device("cpu"))


def test_stages_forget_the_pass_before() -> None:
    net = build("tiny4", 5, 1)
    with stages(net) as found:
        net(torch.rand(2, 1, 16, 16))
        assert sorted(found) == [(4, 4), (8, 8), (16, 16)]
        net(torch.rand(2, 1, 8, 8))
        assert sorted(found) == [(2, 2), (4, 4), (8, 8)]
    assert not found


def test_networks_without_a_resolution_in_common_are_refused() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, K))
    for choice in (at.Config(), fitnet.Config()):
        with pytest.raises(DodistillError, match="has none, the teacher 8x8, 4x4, 2x2"):
            choice.build(context(net=flat))
    with pytest.raises(DodistillError, match="has none"):
        sp.Config().build(context(net=flat))
    assert len(paired(*probes(context(), frozenset({"stages"})))) == 3


# ------------------------------------------------------------------------------------------------ the loop


def job(name: str, teacher: nn.Module, digits: Images, test: engine.Test | None = None, **more: Any) -> Distiller:
    settings: dict[str, Any] = {"name": name, **({"negatives": 64} if name == "crd" else {})}
    tree = {"criterion": settings, "pool": {"capacity": 1300}, "steps": 6, **more, "source": {"name": "data"}}
    return Distiller(Job(config("real", **tree), teacher, student(), SHAPE, digits.x, test=test, labels=digits.y))


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_arrives_where_it_should(name: str, teacher: nn.Module, digits: Images) -> None:
    it = job(name, teacher, digits)
    frozen = copy.deepcopy(it.context.teacher.state_dict())
    start = {k: v.clone() for k, v in it.matcher.student.named_parameters()}
    assert it.run()
    same(frozen, it.context.teacher.state_dict())
    assert all(p.grad is None for p in it.context.teacher.parameters())
    for k, p in it.matcher.student.named_parameters():
        assert not torch.equal(p, start[k]), k
    for k, p in it.matcher.criterion.named_parameters():
        assert p.grad is not None, k
        if not k.startswith("r.0.bias"):  # BatchNorm takes a bias before it away
            assert p.grad.abs().sum() > 0, k
    assert isinstance(it.matcher.criterion, Labelled)


@pytest.mark.parametrize("name", ["fitnet", "crd", "dkd"])
def test_resumed_to_the_same_bits(name: str, teacher: nn.Module, digits: Images) -> None:
    whole, first, second = (job(name, teacher, digits) for _ in range(3))
    assert whole.run()
    for _ in range(3):
        while first.acquirer.due(first.step):
            first.acquire(Watcher())
        first.match()
    second.load_state_dict(copy.deepcopy(first.state_dict()), copy.deepcopy(first.acquirer.pool_state()))
    assert second.run()
    for part in ("student", "criterion"):
        same(getattr(whole.matcher, part).state_dict(), getattr(second.matcher, part).state_dict(), part)


WEIGHTS: dict[str, dict[str, Any]] = {
    "fitnet": {"weight": 1.0},
    "at": {"weight": 5.0},
    "sp": {"weight": 300.0},
    "crd": {"negatives": 256},
}


@pytest.mark.parametrize("name", NAMES)
def test_the_student_learns(name: str, teacher: nn.Module, digits: Images, digits_test: Images) -> None:
    assert digits_test.y is not None
    settings = {"name": name, "ce": 1.0, **WEIGHTS.get(name, {})}
    it = job(
        name, teacher, digits, engine.Test(digits_test.x, digits_test.y), steps=120, criterion=settings,
        optim={"lr": 0.05}, loop={"batch": 64, "log_every": 60, "eval_every": 120},
    )  # fmt: skip
    first: dict[str, float] = {}
    inner = it.read
    it.read = lambda: (out := inner(), first.update({k: v for k, v in out.items() if k not in first}))[0]  # type: ignore[method-assign]
    assert it.run()
    assert it.scorer.last["test"] > 60
    mine = [k for k in it.meter.last if k.startswith("match/") and k not in ("match/ce", "match/kd", "match/contrast")]
    for term in mine if name != "dkd" else []:
        assert it.meter.last[term] < first[term], term


def test_fitnet_and_the_rest_work_on_labels_of_the_teacher(teacher: nn.Module) -> None:
    """Without data too, though nobody asks for it."""
    it = Distiller(Job(config("fast", criterion={"name": "sp"}), teacher, student(), SHAPE))
    assert it.run()
    assert it.matcher.last is not None
    seen = it.matcher.last.batch
    assert torch.equal(seen.labels, it.acquirer.pool.labels[seen.index])
