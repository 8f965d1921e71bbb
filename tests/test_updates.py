"""Updates: their gradients against finite differences and slow references, in float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dodistill.config import registry
from dodistill.config.tree import resolve
from dodistill.core.precision import Precision
from dodistill.core.watch import Watcher
from dodistill.criteria.l1 import L1
from dodistill.data.images import Images
from dodistill.engine import Distiller
from dodistill.errors import DodistillError
from dodistill.interventions import kdci
from dodistill.updates.replay import alignment, stand_in
from dodistill.updates.shared.base import Objective, Update
from helpers import config, job, same

Loss = Callable[[Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Two convolutions, BatchNorm and a smooth nonlinearity, so that differences are well behaved."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(1, 3, 3, 1, 1), nn.BatchNorm2d(3)
        self.two, self.last = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.one(x)))
        out: Tensor = self.last(F.silu(self.two(h)).mean((2, 3)))
        return out


@pytest.fixture(params=[True, False], ids=["train", "eval"])
def net(request: pytest.FixtureRequest) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = Net().double()
    assert made.norm.running_mean is not None
    made.norm.running_mean.fill_(0.1)
    return made.train(request.param)


def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 6, 6, generator=g, dtype=torch.float64)
    return x, 2 * torch.randn(n, 5, generator=g, dtype=torch.float64)


def mse(s: Tensor, t: Tensor) -> Tensor:
    return (s - t).square().mean()


def objective(seed: int, n: int = 6, loss: Loss = mse, scale: nn.Parameter | None = None) -> Objective:
    """A loss on fixed inputs, of two terms; `scale` [5] stands for an intervention that learns."""
    x, t = draw(n, seed)

    def of(student: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        s = student(x)
        s = s if scale is None else s * scale + scale.square().sum() * s.square()
        return {"kd": loss(s, t), "size": 0.1 * s.square().mean()}

    return of


def build(name: str, **settings: Any) -> Update:
    update: Update = registry.config("update", name)(**settings).build()  # type: ignore[attr-defined]
    return update


def gradients(update: Update, net: nn.Module, *objectives: Objective | None, also: Any = ()) -> dict[str, Tensor]:
    """What the update leaves, by name; the network itself stays as it was."""
    copied = copy.deepcopy(net)
    for p in also:
        p.grad = None
    update.backward(copied, *objectives)  # type: ignore[arg-type]
    found = {n: p.grad.clone() for n, p in copied.named_parameters() if p.grad is not None}
    return found | {f"also{i}": p.grad.clone() for i, p in enumerate(also)}


def value(
    net: nn.Module, acquire: Objective, retain: Objective, alpha: float, weight: float, w: dict[str, Tensor]
) -> Tensor:
    """L_Acq(w) + weight L_Ret(w - alpha grad L_Acq(w)), straight from the equation, with its graph."""

    def at(weights: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        buffers = {n: b.clone() for n, b in net.named_buffers()}
        return lambda x: functional_call(net, {**weights, **buffers}, (x,))

    first = sum(acquire(at(w)).values())
    assert isinstance(first, Tensor)
    g = torch.autograd.grad(first, list(w.values()), create_graph=True)
    moved = {n: p - alpha * d for (n, p), d in zip(w.items(), g)}
    return first + weight * sum(retain(at(moved)).values())


def leaves(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}


@pytest.mark.parametrize("alpha", [0.05, 0.9])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_meta_gradient_is_that_of_the_equation(net: Net, alpha: float, weight: float) -> None:
    acquire, retain = objective(1), objective(2, 4)
    g = gradients(build("retain", alpha=alpha, weight=weight), net, acquire, retain)
    w = leaves(net)
    whole = value(net, acquire, retain, alpha, weight, w)
    assert set(g) == set(w)
    for name, d in zip(w, torch.autograd.grad(whole, list(w.values()))):
        assert torch.allclose(g[name], d, rtol=1e-9, atol=1e-12), name


def difference(net: nn.Module, direction: dict[str, Tensor], of: Callable[[dict[str, Tensor]], Tensor]) -> float:
    """Central difference of a function of the weights along a direction."""
    h = 1e-5
    ends = []
    for sign in (1, -1):
        w = {n: (p.detach() + sign * h * direction[n]).requires_grad_() for n, p in net.named_parameters()}
        ends.append(float(of(w).detach()))
    return (ends[0] - ends[1]) / (2 * h)


def test_finite_differences_agree_and_catch_every_shortcut(net: Net) -> None:
    """Along random directions: the exact gradient fits the objective; what is easily mistaken for it does not."""
    acquire, retain, alpha = objective(1), objective(2, 4), 0.5
    exact = gradients(build("retain", alpha=alpha), net, acquire, retain)
    shortcuts = {
        "first order": gradients(build("retain", alpha=alpha, order="first_order"), net, acquire, retain),
        "at w": gradients(build("replay"), net, acquire, retain),
        # the released code's outer loss: its copy is detached, so that nothing is added
        "detached copy": gradients(build("plain"), net, acquire, None),
    }
    g = torch.Generator().manual_seed(0)
    worst = dict.fromkeys(shortcuts, 0.0)
    for _ in range(4):
        d = {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in net.named_parameters()}
        slope = difference(net, d, lambda w: value(net, acquire, retain, alpha, 1.0, w))
        along = {k: sum(float((grads[n] * d[n]).sum()) for n in d) for k, grads in (("e", exact), *shortcuts.items())}
        assert along["e"] == pytest.approx(slope, rel=1e-6, abs=1e-8)
        worst = {k: max(worst[k], abs(along[k] - slope) / abs(slope)) for k in shortcuts}
    assert min(worst.values()) > 0.01, worst


@pytest.mark.parametrize("order", ["exact", "first_order"])
def test_the_retention_term_changes_every_gradient_of_the_student(net: Net, order: str) -> None:
    acquire = objective(1)
    alone = gradients(build("plain"), net, acquire, None)
    both = gradients(build("retain", alpha=0.1, order=order), net, acquire, objective(2, 4))
    for name, g in alone.items():
        assert (both[name] - g).abs().max() > 1e-6 * g.abs().max(), name


def test_without_anything_to_replay_it_is_the_plain_update(net: Net) -> None:
    plain = gradients(build("plain"), net, objective(1), None)
    for update in (build("retain"), build("retain", order="first_order"), build("replay")):
        same(plain, gradients(update, net, objective(1), None))
        assert not update.terms


def test_exact_and_first_order_coincide_as_alpha_falls(net: Net) -> None:
    acquire, retain = objective(1), objective(2, 4)
    gaps = []
    for alpha in (0.1, 0.01, 0.001):
        a = gradients(build("retain", alpha=alpha), net, acquire, retain)
        b = gradients(build("retain", alpha=alpha, order="first_order"), net, acquire, retain)
        gaps.append(max(float((a[n] - b[n]).abs().max()) for n in a))
    assert gaps[0] > 0
    for wide, narrow in itertools.pairwise(gaps):  # alpha * H u: linear in alpha
        assert narrow == pytest.approx(wide / 10, rel=0.2)


@pytest.mark.parametrize("order", ["exact", "first_order"])
def test_at_alpha_0_it_is_plain_replay(net: Net, order: str) -> None:
    acquire, retain = objective(1), objective(2, 4)
    a = gradients(build("retain", alpha=0.0, order=order, weight=0.4), net, acquire, retain)
    b = gradients(build("replay", weight=0.4), net, acquire, retain)
    w = leaves(net)
    whole = value(net, acquire, retain, 0.0, 0.4, w)
    for name, d in zip(w, torch.autograd.grad(whole, list(w.values()))):
        assert torch.allclose(a[name], b[name], rtol=1e-12, atol=1e-14)
        assert torch.allclose(b[name], d, rtol=1e-9, atol=1e-12)


UPDATES = [("replay", {}), ("retain", {"alpha": 0.5}), ("retain", {"alpha": 0.5, "order": "first_order"})]


@pytest.mark.parametrize(("name", "settings"), UPDATES)
def test_running_statistics_move_once_by_the_new_inputs(net: Net, name: str, settings: dict[str, Any]) -> None:
    plain, other = copy.deepcopy(net), copy.deepcopy(net)
    build("plain").backward(plain, objective(1))
    build(name, **settings).backward(other, objective(1), objective(2, 4))
    before, after = dict(net.named_buffers()), dict(other.named_buffers())
    same(dict(plain.named_buffers()), after)
    assert net.training == (not torch.equal(before["norm.running_mean"], after["norm.running_mean"]))
    assert net.training == (int(after["norm.num_batches_tracked"]) == 1)
    same(dict(net.named_parameters()), dict(other.named_parameters()))


@pytest.mark.parametrize(("name", "settings"), UPDATES)
def test_gradients_are_added_and_stay_out_of_frozen_weights(net: Net, name: str, settings: dict[str, Any]) -> None:
    objectives = objective(1), objective(2, 4)
    net.two.requires_grad_(False)
    fresh = gradients(build(name, **settings), net, *objectives)
    assert set(fresh) == {n for n, _ in net.named_parameters() if not n.startswith("two")}
    for p in net.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    build(name, **settings).backward(net, *objectives)
    for n, g in fresh.items():
        assert torch.allclose(net.get_parameter(n).grad, g + 1, atol=1e-12)  # type: ignore[arg-type]


def test_a_weight_that_only_one_loss_uses(net: Net) -> None:
    """Gradients that are None on one side, or on both."""
    net.extra, net.idle = nn.Parameter(torch.ones(5).double()), nn.Parameter(torch.ones(5).double())  # type: ignore[assignment]

    def with_extra(student: Any) -> dict[str, Tensor]:
        terms = objective(2, 4)(student)
        return {**terms, "extra": net.extra.square().sum()}  # type: ignore[union-attr,operator]

    for name, settings in UPDATES:
        net.zero_grad()
        build(name, **settings).backward(net, objective(1), with_extra)
        assert torch.equal(net.extra.grad, 2 * torch.ones(5).double())  # type: ignore[arg-type,union-attr]
        assert net.idle.grad is None  # type: ignore[union-attr]


# -------------------------------------------------------------------------------- what else learns from the losses


def test_an_intervention_that_learns_gets_the_exact_gradient_of_both_losses(net: Net) -> None:
    scale = nn.Parameter(torch.linspace(0.5, 1.5, 5, dtype=torch.float64))
    acquire, retain, alpha = objective(1, scale=scale), objective(2, 4, scale=scale), 0.5
    found = gradients(build("retain", alpha=alpha), net, acquire, retain, also=[scale])
    w = leaves(net)
    whole = value(net, acquire, retain, alpha, 1.0, w)
    d = torch.autograd.grad(whole, [*w.values(), scale])
    for name, right in zip([*w, "also0"], d):
        assert torch.allclose(found[name], right, rtol=1e-9, atol=1e-12), name
    # first order: each loss's own gradient, at its own weights
    first = gradients(build("retain", alpha=alpha, order="first_order"), net, acquire, retain, also=[scale])
    g = torch.autograd.grad(sum(acquire(copy.deepcopy(net)).values()), [scale])[0]  # type: ignore[arg-type]
    moved = gradients(build("plain"), net, acquire, None)
    there = {n: p.detach() - alpha * moved[n] for n, p in net.named_parameters()}
    u = torch.autograd.grad(sum(retain(stand_in(net, there)).values()), [scale])[0]  # type: ignore[arg-type]
    assert torch.allclose(first["also0"], g + u, rtol=1e-9)
    assert not torch.allclose(found["also0"], g + u, rtol=1e-3)


@pytest.mark.parametrize("room", [2**19, 1])
def test_kdci_gets_the_exact_gradient_too(
    room: int, net: Net, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In double precision, also where its attention is computed in parts and once more on the way back."""
    monkeypatch.setattr(kdci, "ROOM", room)
    it = job(teacher, config("fast", "kdci", steps=1))
    g = torch.Generator().manual_seed(0)
    dictionary, part, criterion = it.acquirer.dictionary, next(iter(it.matcher.interventions)), L1()
    assert dictionary is not None
    dictionary.rebuild(torch.randn(40, 10, generator=g))
    net.last = nn.Linear(4, 10)
    it.matcher.interventions.double()
    dictionary.double()
    net.double()

    def of(seed: int, n: int) -> Objective:
        x, t = draw(n, seed)
        t = torch.cat([t, -t], 1)

        def run(student: Any) -> dict[str, Tensor]:
            s = student(x)
            return criterion(s + part.F(part.lam(s, dictionary), dictionary), t)  # type: ignore[operator,no-any-return]

        return run

    own = list(part.parameters())
    assert len(own) == 3
    acquire, retain, alpha = of(1, 6), of(2, 4), 0.4
    found = gradients(build("retain", alpha=alpha), net, acquire, retain, also=own)
    w = leaves(net)
    whole = value(net, acquire, retain, alpha, 1.0, w)
    d = torch.autograd.grad(whole, [*w.values(), *own])
    for name, right in zip([*w, "also0", "also1", "also2"], d):
        assert torch.allclose(found[name], right, rtol=1e-7, atol=1e-11), name
        assert right.abs().sum() > 0, name


# ----------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(("order", "alpha"), [("exact", 0.9), ("exact", 0.1), ("first_order", 0.9), ("exact", 0.0)])
def test_the_exact_step_is_fp32_whatever_the_precision(order: str, alpha: float, teacher: nn.Module) -> None:
    """Under bf16 the exact step leaves the gradients of fp32; without a Hessian product the run's precision stays."""
    cfg = resolve(
        config("fast", steps=4, augment={"pad": 0, "flip": False}, loop={"precision": "bf16"}).to_tree(),
        {"replay": {"name": "bank", "size": 8, "capacity": 2, "every": 1, "first": 2},
         "update": {"name": "retain", "alpha": alpha, "order": order}},
    )  # fmt: skip

    def left(it: Distiller) -> Tensor:
        """The gradients of the student after one step."""
        it.match()
        return torch.cat([p.grad.flatten() for p in it.matcher.student.parameters() if p.grad is not None])

    low, full = job(teacher, cfg), job(teacher, cfg)
    plain = job(teacher, resolve(cfg.to_tree(), {"replay": "none", "update": "plain"}))
    low.acquire(Watcher())
    plain.acquire(Watcher())
    same(left(plain), left(low))  # nothing to replay yet: the plain update, in bf16
    low.acquire(Watcher())
    assert low.acquirer.replay.ready
    full.load_state_dict(low.state_dict(), low.acquirer.pool_state())
    full.context.autocast = Precision(torch.device("cpu"), "fp32")
    mine, right = left(low), left(full)
    gap = float((mine - right).norm() / right.norm())
    assert (gap < 1e-6) if order == "exact" and alpha > 0 else (gap > 1e-3)


# ------------------------------------------------------------------------------------------------------- the log


def test_alignment_is_the_cosine(net: Net) -> None:
    g, u = [torch.tensor([3.0, 0.0]), None], [torch.tensor([3.0, 3.0]), torch.tensor([[4.0]])]
    found = alignment(g, u)  # type: ignore[arg-type]
    assert found["alignment"].item() == pytest.approx(9 / (3 * 34**0.5))
    assert found["retain_over_acquire"].item() == pytest.approx(34**0.5 / 3)
    zero = [torch.zeros(2), None]
    assert alignment(zero, u)["alignment"].item() == 0  # type: ignore[arg-type]
    for update in (build("replay"), build("retain", alpha=0.0)):
        terms = update.backward(net, objective(1), objective(1))  # the same loss twice
        assert update.terms["alignment"].item() == pytest.approx(1, abs=1e-6)
        assert list(terms) == ["kd", "size", "retain/kd", "retain/size"]
        assert not any(v.requires_grad for v in (*terms.values(), *update.terms.values()))


def test_the_loss_in_the_log_holds_both_losses_and_no_cosine(teacher: nn.Module) -> None:
    cfg = resolve(
        config("fast", steps=4).to_tree(),
        {"replay": {"name": "bank", "size": 8, "capacity": 2, "every": 1, "first": 1},
         "update": {"name": "retain", "alpha": 0.1, "weight": 0.5}},
    )  # fmt: skip
    it = job(teacher, cfg)
    seen: list[dict[str, float]] = []
    log = it.read

    def keep() -> dict[str, float]:
        seen.append(log())
        return seen[-1]

    it.read = keep  # type: ignore[method-assign]
    assert it.run()
    for line in seen:
        assert line["loss"] == pytest.approx(line["match/kd"] + line["match/retain/kd"])
        assert -1 <= line["update/alignment"] <= 1
        assert line["update/inner_step"] > 0


@pytest.mark.parametrize(
    ("update", "said"),
    [
        ({"name": "retain", "alpha": -0.1}, "update.alpha is -0.1"),
        ({"name": "retain", "weight": 0.0}, "update.weight is 0"),
        ({"name": "replay", "weight": -1.0}, "update.weight is -1"),
        ({"name": "retain", "alpha": float("nan")}, "update.alpha is nan"),
    ],
)
def test_bad_settings_are_named(update: dict[str, Any], said: str, teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match=said):
        job(teacher, resolve(config("fast").to_tree(), {"replay": "bank", "update": update}))


def test_an_update_that_replays_needs_a_replay(digits: Images) -> None:
    for update in ("replay", "retain"):
        with pytest.raises(DodistillError, match="give --replay NAME"):
            config("fast", update=update)
    with pytest.raises(DodistillError, match="give --update replay or retain"):
        config("fast", replay="bank")


@pytest.mark.parametrize("criterion", registry.names("criterion"))
def test_every_criterion_has_the_second_derivatives_that_exact_asks_for(criterion: str, teacher: nn.Module) -> None:
    """Also where inputs repeat, so that features coincide, as a replay's may."""
    cfg = resolve(
        config("fast", "kdci", steps=3, criterion=criterion).to_tree(),
        {"replay": {"name": "bank", "size": 8, "capacity": 2, "every": 1, "first": 1, "eviction": "reservoir"},
         "update": {"name": "retain", "alpha": 0.1}},
    )  # fmt: skip
    it = job(teacher, cfg)
    assert it.run()
    for name, p in (*it.matcher.student.named_parameters(), *it.matcher.interventions.named_parameters()):
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().sum() > 0, name
