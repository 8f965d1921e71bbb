"""fast_imagenet: its generator, Reptile by hand, latents that are carried on, and a generator for each class."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dodistill.config.tree import resolve
from dodistill.core.watch import Watcher
from dodistill.data.images import Images
from dodistill.errors import DodistillError
from dodistill.sources.fast_imagenet import Config, FastImagenet
from dodistill.sources.shared.banks import BankType, GeneratorBank
from dodistill.sources.shared.base import scaled
from dodistill.sources.shared.generators import DeepGenerator
from helpers import SHAPE, config, context, job, same, student

SMALL: dict[str, Any] = {"K": 3, "batch": 16, "latent": 6, "width": 4, "doublings": 2, "lr_g": 1e-3}


def build(teacher: nn.Module, seed: int = 0, **settings: Any) -> FastImagenet:
    return FastImagenet(Config(**(SMALL | settings)), context(teacher, seed))


def vector(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.fixture
def pupil() -> nn.Module:
    return student().eval()


# ------------------------------------------------------------------------------------------------ the generator


def test_the_generator_has_the_published_size_and_shapes() -> None:
    net = DeepGenerator(256, (3, 224, 224))
    assert sum(p.numel() for p in net.parameters()) == 592_451
    assert net.latent_shape == (256, 14, 14)
    convs = [(m.in_channels, m.out_channels) for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert convs == [(256, 128), (128, 128), (128, 64), (64, 64), (64, 64), (64, 3)]
    small = DeepGenerator(6, (3, 32, 48), 4, 4)
    assert small.latent_shape == (6, 2, 3)
    x = small(torch.randn(5, 6, 2, 3))
    assert x.shape == (5, 3, 32, 48)
    assert x.min() >= 0
    assert x.max() <= 1
    with pytest.raises(DodistillError, match=r"a map of latents 4 times.*multiples of 16, but the teacher takes 8x24"):
        DeepGenerator(6, (3, 8, 24))


# --------------------------------------------------------------------------------------------------- one of each


def test_gradients_reach_the_copy_and_its_latents_alone(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build(teacher)
    reached: list[set[int]] = []
    step = torch.optim.Adam.step

    def watched(self: torch.optim.Adam, *args: Any) -> Any:
        reached.append({id(p) for group in self.param_groups for p in group["params"] if bool(p.grad.any())})
        return step(self, *args)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.optim.Adam, "step", watched)
        source.acquire(pupil, 0)
    copies = {id(p) for p in source.nets[0].parameters()}
    assert len(reached) == source.config.K + 1
    for inner in reached[:-1]:
        assert copies < inner
        assert len(inner) == len(copies) + 1  # and the latents
    assert reached[-1] <= {id(p) for p in source.meta.parameters()}
    assert all(p.grad is None for p in (*teacher.parameters(), *pupil.parameters()))
    assert set(source.terms) == {"bn", "ce", "adv"}


@pytest.mark.parametrize("z_meta", ["carried", "reptile"])
def test_the_meta_step_is_reptile(z_meta: str, teacher: nn.Module, pupil: nn.Module) -> None:
    """Adam on (start - end of the descent), written out: moments from zero, two acquisitions."""
    source = build(teacher, z_meta=z_meta)
    c = source.config
    mine = [torch.zeros_like(v) for v in (vector(source.meta), vector(source.meta))]
    at = vector(source.meta).double()
    z, zs = source.z.detach().clone(), [torch.zeros_like(source.z), torch.zeros_like(source.z)]
    ends: list[Tensor] = []
    inner = source._descend

    def watched(make: Any, y: Tensor, s: Any, opt: Any, leaves: Any, steps: int, **more: Any) -> Tensor:
        assert torch.equal(leaves[0], z)  # each acquisition starts from the shared latents
        out = inner(make, y, s, opt, leaves, steps, **more)
        ends.append(leaves[0].detach().clone())
        return out

    source._descend = watched  # type: ignore[method-assign]

    def adam(at: Tensor, g: Tensor, m: list[Tensor], t: int, lr: float) -> Tensor:
        m[0] = 0.5 * m[0] + 0.5 * g
        m[1] = 0.999 * m[1] + 0.001 * g * g
        return at - lr * (m[0] / (1 - 0.5**t)) / ((m[1] / (1 - 0.999**t)).sqrt() + 1e-8)

    for t in (1, 2):
        start = vector(source.meta)
        source.acquire(pupil, t - 1)
        way = start - vector(source.nets[0])
        assert way.abs().max() > 1e-4
        at = adam(at, way.double(), mine, t, c.lr_g_meta)
        assert torch.allclose(vector(source.meta).double(), at, atol=1e-7)
        if z_meta == "carried":
            z = ends[-1]
        else:
            z = adam(z, z - ends[-1], zs, t, c.lr_z_meta)
        assert not torch.equal(source.z.detach(), ends[-1]) or z_meta == "carried"
        assert torch.allclose(source.z.detach(), z, atol=1e-6)
        z = source.z.detach().clone()


def test_latents_and_moments_are_renewed_in_time(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build(teacher, K=1, reinit=3, lr_z=1e-4)
    renewed, last = [], source.z.detach().clone()
    for r in range(7):
        meta = vector(source.meta)
        source.acquire(pupil, r)
        if (source.z.detach() - last).abs().max() > 0.01:
            renewed.append(r)
        steps = {int(s["step"]) for s in source.opt_meta.state.values()}
        assert steps == {(r + 1) % 3 + 1 if r >= 2 else r + 1}
        assert (vector(source.meta) - meta).abs().max() <= 10 * source.config.lr_g_meta  # the generator goes on
        last = source.z.detach().clone()
    assert renewed == [2, 5]  # the third and the sixth acquisition
    never = build(teacher, K=1, reinit=0, lr_z=1e-4)
    start = never.z.detach().clone()
    for r in range(7):
        never.acquire(pupil, r)
    assert (never.z.detach() - start).abs().max() < 0.01


def test_the_last_images_are_handed_over(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build(teacher, lr_g=0.5, lr_z=1.0)  # so that the loss rises
    made: list[Tensor] = []
    source.nets[0].register_forward_hook(lambda _m, _a, out: made.append(out.detach().clone()))
    x = source.acquire(pupil, 0).images
    assert torch.equal(x, made[-1])
    assert not torch.equal(x, made[0])


@pytest.mark.parametrize("per_class", [0, 4])
def test_it_learns_to_please_the_teacher(per_class: int, teacher: nn.Module, pupil: nn.Module) -> None:
    source = build(
        teacher, K=5, batch=64, width=8, latent=16, bn=10.0, oh=0.4, adv=0.0, lr_g=2e-3, lr_g_meta=0.01,
        per_class=per_class, reinit=0,
    )  # fmt: skip
    values = []
    for r in range(12):
        source.acquire(pupil, r)
        values.append(source.terms["bn"].item() + source.terms["ce"].item())
    assert sum(values[-3:]) < 0.8 * sum(values[:3])


# --------------------------------------------------------------------------------------------------- one per class


def test_a_generator_exists_once_its_class_was_drawn(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build(teacher, per_class=2)
    n = vector(source.nets[0]).numel()
    shown: list[Tensor] = []
    inner = source._descend

    def watched(make: Any, y: Tensor, *rest: Any, **more: Any) -> Tensor:
        shown.append(y)
        return inner(make, y, *rest, **more)

    source._descend = watched  # type: ignore[method-assign]
    assert not source.bank.rows
    for r in range(4):
        before = dict(source.bank.rows)
        x = source.acquire(pupil, r).images
        assert x.shape == (16, *SHAPE)
        drawn = shown[-1].unique().tolist()
        assert torch.equal(shown[-1].bincount(minlength=10)[drawn], torch.tensor([8, 8]))
        assert source.bank.rows.keys() == before.keys() | set(drawn)
        for k, row in source.bank.rows.items():
            assert row.device.type == "cpu"
            assert (k in before and torch.equal(row, before[k])) == (k not in drawn)
        assert source.terms["bank_mib"].item() == pytest.approx(len(source.bank.rows) * n * 4 / 2**20)
    assert len(source.bank.rows) < 10
    assert f"10 of {n:,} parameters" in source.notes[0]


def test_each_class_goes_on_with_its_own_generator(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build(teacher, per_class=1, K=1)
    started: dict[int, Tensor] = {}
    load = GeneratorBank.load

    def watched(self: GeneratorBank, k: int, net: nn.Module) -> None:
        load(self, k, net)
        started[k] = vector(net)
        assert torch.equal(started[k], self.rows[k])

    with pytest.MonkeyPatch.context() as m:
        m.setattr(GeneratorBank, "load", watched)
        seen: dict[int, Tensor] = {}
        for r in range(12):
            started.clear()
            source.acquire(pupil, r)
            ((k, start),) = started.items()
            if k in seen:
                assert torch.equal(start, seen[k])
            seen[k] = vector(source.nets[0])
            assert not torch.equal(seen[k], start)
    assert len(seen) < 12


def test_each_class_is_drawn_by_its_own_generator(teacher: nn.Module, pupil: nn.Module) -> None:
    source = build(teacher, per_class=2, K=1)
    halves: list[Tensor] = []
    for net in source.nets:
        net.register_forward_hook(lambda _m, _a, out: halves.append(out.detach().clone()))
    x = source.acquire(pupil, 0).images
    assert [len(h) for h in halves] == [8, 8]
    assert torch.equal(x, torch.cat(halves))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bank_keeps_and_gives_back(dtype: BankType) -> None:
    bank = GeneratorBank(dtype)
    net, other = (DeepGenerator(6, SHAPE, 4, 2).to(memory_format=torch.channels_last) for _ in range(2))
    bank.store(3, net)
    bank.load(3, other)
    assert torch.allclose(vector(net), vector(other), rtol=0 if dtype == "float32" else 0.01, atol=0)
    assert other.conv_blocks[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert bank.mib == vector(net).numel() * (4 if dtype == "float32" else 2) / 2**20
    again = GeneratorBank(dtype)
    again.load_state_dict(copy.deepcopy(bank.state_dict()))
    same(bank.state_dict(), again.state_dict())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"per_class": 3}, r"source.per_class is 3; it must divide source.batch \(16\)"),
        ({"per_class": 16}, "two images or more for each, and the teacher has 10 classes"),
        ({"per_class": 12, "batch": 24}, "the teacher has 10 classes"),
        ({"per_class": -1}, "source.per_class is -1; it must be at least 0"),
        ({"K": 0}, "source.K is 0"),
        ({"doublings": 4}, "multiples of 16, but the teacher takes 8x8: lower source.doublings"),
    ],
)
def test_refused_before_anything_is_computed(settings: dict[str, Any], said: str, teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match=said):
        build(teacher, **settings)


# -------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("settings", [{}, {"z_meta": "reptile"}, {"per_class": 2}])
def test_its_state_is_all_of_it(settings: dict[str, Any], teacher: nn.Module, pupil: nn.Module) -> None:
    a, b = build(teacher, reinit=4, **settings), build(teacher, 5, reinit=4, **settings)
    for r in range(2):
        a.acquire(pupil, r)
    b.acquire(pupil, 0)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for r in range(2, 6):
        assert torch.equal(a.acquire(pupil, r).images, b.acquire(pupil, r).images)
    same(a.state_dict(), b.state_dict())


def test_a_run_with_a_generator_per_class_goes_on(teacher: nn.Module, digits: Images) -> None:
    cfg = config("fast_imagenet", "kdci", steps=6, source={"per_class": 4, "bank_dtype": "bfloat16", "every": 2})
    whole = job(teacher, cfg)
    assert whole.run()
    first = job(teacher, cfg)
    while first.step < 3:
        first.acquire(Watcher()) if first.acquirer.due(first.step) else first.match()
    second = job(teacher, cfg)
    second.load_state_dict(copy.deepcopy(first.state_dict()), copy.deepcopy(first.acquirer.pool_state()))
    assert second.run()
    same(whole.acquirer.source.state_dict(), second.acquirer.source.state_dict())
    same(whole.matcher.student.state_dict(), second.matcher.student.state_dict())


# ------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_a_time_limit_leaves_each_class_its_part_of_the_batch(share: float, teacher: nn.Module) -> None:
    settings = Config(per_class=10, batch=100, K=20, latent=4, width=4, doublings=2)
    cut, _ = scaled(settings, share)
    assert (cut.batch, cut.K) == (100, max(2, round(20 * share)))
    cut.build(context(teacher))


def test_the_presets_are_the_logs() -> None:
    """The three released logs agree in everything but adv."""
    for preset, adv in (("resnet18", 1.0), ("mobilenetv2", 0.1), ("resnet50", 0.1)):
        d = resolve({"source": "fast_imagenet", "preset": preset})
        s = d.source
        assert (s.batch, s.K, s.lr_g, s.lr_z, s.lr_g_meta, s.lr_z_meta) == (100, 50, 2e-4, 0.01, 1e-4, 5e-3)
        assert (s.bn, s.oh, s.adv, s.bn_momentum, s.reinit, s.every, s.warmup) == (0.1, 0.1, adv, 0.9, 50, 100, 0)
        assert (s.latent, s.width, s.doublings, s.z_meta, s.per_class) == (256, 64, 4, "carried", 0)
        assert (d.criterion.name, d.criterion.temperature) == ("kl", 5.0)
        assert (d.optim.lr, d.optim.momentum, d.optim.weight_decay, d.optim.floor) == (0.1, 0.9, 1e-4, 0.0)
        assert (d.loop.steps, d.loop.batch, d.optim.schedule) == (400_000, 100, "cosine")
        assert (d.view.crop, d.view.scale) == ("resized", (0.75, 1.0))
    assert resolve({"source": "fast_imagenet", "preset": "per-class"}).source.per_class == 10
