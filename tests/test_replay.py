"""Replays: what they keep, what they hand back, what they train, and that a checkpoint holds all of it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dodistill.config import registry
from dodistill.config.tree import Distill, resolve
from dodistill.data.images import Images
from dodistill.engine.run_folder import RunFolder
from dodistill.errors import DodistillError
from dodistill.functional.augment import to_float
from dodistill.models.teacher import Teacher
from dodistill.replay.bank import Bank
from dodistill.replay.generative import Generative, balance
from dodistill.replay.none import Config as NoReplay
from dodistill.replay.shared.vae import Decoder, Encoder, kl_to_normal
from helpers import SHAPE, config, context, fitting, job, metrics, same, student, untimed

SMALL: dict[str, dict[str, Any]] = {
    "bank": {"capacity": 3, "size": 4, "every": 2, "first": 2},
    "generative": {"size": 6, "new": 8, "train": 2, "latent": 8, "width": 4, "lr": 2e-3},
    "ema_generator": {"size": 8},
}


def build(name: str, teacher: nn.Module, seed: int = 0, **settings: Any) -> Any:
    return registry.config("replay", name)(**(SMALL[name] | settings)).build(context(teacher, seed))  # type: ignore[attr-defined]


def batch(round: int, n: int = 10) -> tuple[Tensor, Tensor]:
    """Images that carry their round in every pixel and their place in the logits."""
    images = torch.full((n, *SHAPE), 1 + round, dtype=torch.uint8)
    return images, torch.arange(n)[:, None] + 100.0 * round + torch.zeros(n, 10)


def rounds(bank: Bank) -> list[int]:
    """The round that each kept image came from."""
    return [int(v) - 1 for v in bank.bank.x[:, 0, 0, 0]]


# ------------------------------------------------------------------------------------------------------ the bank


def test_a_ring_of_batches_at_the_papers_cadence(teacher: nn.Module) -> None:
    bank = build("bank", teacher)
    kept = []
    for r in range(12):
        assert bank.ready == (r >= 2)
        bank.remember(*batch(r), r)
        kept.append(rounds(bank)[::4])
        assert len(rounds(bank)) % 4 == 0
    # rounds 1, 3, 5 fill it (the second, fourth, sixth acquisition); 7, 9, 11 replace the oldest
    assert kept[1] == [1]
    assert kept[5] == [1, 3, 5]
    assert kept[7] == [7, 3, 5]
    assert kept[11] == [7, 9, 11]


def test_a_draw_is_one_stored_batch_with_the_teachers_answers(teacher: nn.Module) -> None:
    bank, pupil = build("bank", teacher), student()
    for r in range(6):
        bank.remember(*batch(r), r)
    seen = set()
    for step in range(60):
        x, t = bank.draw(pupil, step)
        assert x.shape == (4, *SHAPE)
        assert x.is_floating_point()
        (r,) = {round(float(v) * 255) - 1 for v in x.flatten()}  # one round in all of them
        assert torch.equal(t, batch(r)[1][:4])
        seen.add(r)
    assert seen == {1, 3, 5}


def test_the_published_sizes_and_cadence() -> None:
    """10 batches of an eighth of the student's; pushes at the end of epochs 0, 5, 10, ... of 36 or 72 acquisitions."""
    source = registry.config("source", "pre")
    for preset, epoch in (("mb", 36), ("lra-bank", 72)):
        found = resolve({"source": "pre", "preset": preset})
        bank = found.replay
        assert (bank.capacity, bank.size) == (10, found.loop.batch // 8)
        ends = [(e + 1) * epoch for e in range(0, 400, 5)]
        pushes = [n for n in range(1, 400 * epoch + 1) if n >= bank.first and (n - bank.first) % bank.every == 0]
        assert pushes == ends
        assert found.loop.steps == 400 * epoch * found.source.every
    assert isinstance(found.source, source)


def test_a_reservoir_is_a_uniform_sample(teacher: nn.Module) -> None:
    counts = torch.zeros(20)
    for seed in range(60):
        bank = build("bank", teacher, seed, eviction="reservoir", every=1, first=1, capacity=5)
        for r in range(20):
            bank.remember(*batch(r), r)
        for r in rounds(bank):
            counts[r] += 1
    assert counts.sum() == 60 * 20
    assert counts.min() > 30  # 60 expected, deviation 7.6
    assert counts.max() < 90
    x, t = bank.draw(student(), 0)
    assert torch.equal(t[:, 0] // 100, (x[:, 0, 0, 0] * 255).round() - 1)
    drawn = {tuple(bank.draw(student(), 0)[1][:, 0].tolist()) for _ in range(10)}
    assert len(drawn) == 10


def test_the_bank_asks_the_teacher_nothing(teacher: nn.Module, digits: Images) -> None:
    bank = build("bank", teacher, every=1, first=1)
    x = digits.x[:10]
    with torch.no_grad():
        t = bank.context.teacher(to_float(x))
    bank.remember(x, t, 0)

    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("asked")

    bank.context.teacher.model = Never()
    replayed, known = bank.draw(student(), 0)
    assert torch.equal(replayed, to_float(x[:4]))
    assert torch.equal(known, t[:4])


# ----------------------------------------------------------------------------------------------------- generative


def test_its_losses_are_those_of_the_equations() -> None:
    g = torch.Generator().manual_seed(0)
    t, z = torch.randn(7, 5, generator=g).double(), torch.randn(7, 3, generator=g).double()
    terms = balance(t, z, 5.0, 2.0)
    p = [sum(float(t[b].softmax(0)[c]) for b in range(7)) / 7 for c in range(5)]
    assert terms["ie"].item() == pytest.approx(5 * sum(v * math.log10(v) for v in p), rel=1e-10)
    oh = -sum(float(t[b].log_softmax(0).max()) for b in range(7)) / 7
    assert terms["oh"].item() == pytest.approx(2 * oh, rel=1e-10)
    moments = 0.0
    for j in range(3):
        column = z[:, j].tolist()
        mean = sum(column) / 7
        moments += ((sum((v - mean) ** 2 for v in column) / 6 - 1) ** 2 + mean**2) / 3
    assert terms["moments"].item() == pytest.approx(moments, rel=1e-10)
    mu, log_var = torch.randn(4, 3, generator=g).double(), torch.randn(4, 3, generator=g).double()
    own = torch.distributions.Normal(mu, (0.5 * log_var).exp())
    expected = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    assert torch.allclose(kl_to_normal(mu, log_var), expected)
    assert kl_to_normal(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


def seen(teacher: nn.Module, digits: Images, start: int = 0, n: int = 24) -> tuple[Tensor, Tensor]:
    x = digits.x[start : start + n]
    with torch.no_grad():
        return x, Teacher(copy.deepcopy(teacher), SHAPE)(to_float(x))


def test_it_learns_to_say_what_it_saw(teacher: nn.Module, digits: Images) -> None:
    memory: Generative = build("generative", teacher, new=64, size=16, width=16, latent=64, train=4, lr=5e-3, kld=1e-2)
    x, t = seen(teacher, digits, 0, 1000)
    losses = []
    for r in range(18):
        memory.remember(x, t, r)
        losses.append({k: float(v) for k, v in memory.terms.items()})
    assert losses[-1]["image"] < 0.8 * losses[0]["image"]
    assert losses[-1]["logits"] < 0.8 * losses[0]["logits"]
    with torch.no_grad():
        u = (to_float(x[:256]) - memory.mean) / memory.std
        again = memory.context.teacher(memory._decode(memory.encoder(u)[0]).clamp(0, 1)).argmax(1)
    assert (again == t[:256].argmax(1)).float().mean() > 0.3  # the class of what it saw, by the teacher, from mu alone
    replayed, known = memory.draw(student(), 0)
    assert known is None
    assert replayed.shape == (16, *SHAPE)
    assert replayed.min() >= 0
    assert replayed.max() <= 1
    with torch.no_grad():
        assert len(memory.context.teacher(replayed).argmax(1).unique()) > 2


def test_latents_are_tuned_and_nothing_else_is(teacher: nn.Module, digits: Images) -> None:
    """The draw takes one step of Adam on z, down its loss; the decoder's weights and gradients do not notice."""
    memory: Generative = build("generative", teacher, lr_z=0.02)
    memory.remember(*seen(teacher, digits), 0)
    before = {k: v.clone() for k, v in memory.decoder.state_dict().items()}
    for p in memory.parameters:
        p.grad = torch.full_like(p, 7.0)
    z: list[Tensor] = []
    decode = memory._decode

    def keep(latents: Tensor) -> Tensor:
        z.append(latents)
        return decode(latents)

    memory._decode = keep  # type: ignore[method-assign]
    memory.draw(student(), 0)
    same(before, memory.decoder.state_dict())  # in eval mode its statistics stand too
    assert all(bool((p.grad == 7).all()) for p in memory.parameters if p.grad is not None)
    assert all(p.grad is None for p in memory.context.teacher.parameters())
    first, tuned = z
    assert not tuned.requires_grad
    again = first.detach().clone().requires_grad_()
    opt = torch.optim.Adam([again], lr=0.02)
    losses = balance(memory.context.teacher(decode(again).clamp(0, 1)), again, 5.0, 1.0)
    torch.stack(list(losses.values())).sum().backward()
    opt.step()
    assert torch.allclose(tuned, again.detach(), atol=1e-5)
    assert (tuned - first).abs().max() > 0.01


def test_the_training_step_is_that_of_the_reconstruction_alone(teacher: nn.Module, digits: Images) -> None:
    """Where the release lets the tuning of z write into the decoder's gradient, ours is the gradient of L (unless
    `shapes_decoder`)."""
    memory: Generative = build("generative", teacher, lr=1e-3)
    memory.remember(*seen(teacher, digits), 0)
    state = copy.deepcopy(memory.state_dict())
    x, t = to_float(seen(teacher, digits)[0]), seen(teacher, digits)[1]
    memory.opt.zero_grad()
    memory._decode_balanced()  # what would pollute
    own = build("generative", teacher, seed=9, lr=1e-3)
    own.load_state_dict(state)
    own.encoder.train()
    own.decoder.train()
    for part in (memory, own):
        part.generator.manual_seed(5)
        part._train(x, t)
    for p, q in zip(memory.parameters, own.parameters):
        assert p.grad is not None
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6 * float(q.grad.abs().max()) + 1e-9)


@pytest.mark.parametrize("shapes", [False, True])
def test_new_and_self_decoded_inputs(shapes: bool, teacher: nn.Module, digits: Images) -> None:
    """The first training step of all sees new images alone, later ones `new` + `size`, with the teacher's answers. A
    step begins without gradients, but for what the tuning leaves in the decoder with `shapes_decoder`."""
    memory: Generative = build("generative", teacher, train=3, shapes_decoder=shapes)
    inputs: list[tuple[Tensor, Tensor]] = []
    train = memory._train

    def keep(x: Tensor, t: Tensor) -> None:
        assert all(p.grad is None for p in memory.encoder.parameters())
        assert all((p.grad is not None) == (shapes and bool(inputs)) for p in memory.decoder.parameters())
        inputs.append((x, t))
        train(x, t)

    memory._train = keep  # type: ignore[method-assign]
    x, t = seen(teacher, digits)
    memory.remember(x, t, 0)
    memory.remember(x, t, 1)
    assert [len(x) for x, _ in inputs] == [8, 14, 14, 14, 14, 14]
    known = {tuple(image.flatten().tolist()): answer for image, answer in zip(to_float(x), t)}
    parts = [[tuple(i.flatten().tolist()) for i in images[:8]] for images, _ in inputs[:3]]
    assert len({i for part in parts for i in part}) == len(known)  # each step its own part: 3 * 8 = 24 of 24
    for images, answers in inputs:
        for image, answer in zip(images[:8], answers):
            assert torch.equal(answer, known[tuple(image.flatten().tolist())])
        with torch.no_grad():
            assert torch.allclose(answers[8:], memory.context.teacher(images[8:]), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (3, 32, 32), (1, 4, 12)])
def test_any_shape_that_4_divides(shape: tuple[int, int, int]) -> None:
    class Any_(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :5]

    ctx = context(Teacher(Any_(), shape))
    memory: Any = registry.config("replay", "generative")(**SMALL["generative"]).build(ctx)  # type: ignore[attr-defined]
    x = torch.randint(0, 256, (20, *shape), dtype=torch.uint8)
    memory.remember(x, ctx.teacher(to_float(x)), 0)
    assert memory.draw(student(), 0)[0].shape == (6, *shape)


def test_published_sizes() -> None:
    """32x32: the decoder is DAFL's generator, the encoder's heads are 2048 -> 1000."""
    with torch.device("meta"):
        encoder, decoder = (net(1000, (3, 32, 32), 64) for net in (Encoder, Decoder))
    assert tuple(encoder.mu.weight.shape) == (1000, 2048)
    assert sum(p.numel() for p in encoder.parameters()) == 4_321_872
    assert sum(p.numel() for p in decoder.parameters()) == 8_423_939


# ------------------------------------------------------------------------------------------- the averaged generator


class Maker:
    """A source as far as a replay looks at it: z -> images, every pixel sigmoid(w . z)."""

    def __init__(self, steps: int = 1) -> None:
        self.net, self.steps = nn.Sequential(nn.Linear(3, 64), nn.BatchNorm1d(64), nn.Sigmoid()), steps
        self.net.append(nn.Unflatten(1, SHAPE))

    def makes_with(self) -> tuple[nn.Module, int, int]:
        return self.net, 3, self.steps

    def learn(self, by: float) -> None:
        with torch.no_grad():
            for p in self.net.parameters():
                p.add_(by)


def following(teacher: nn.Module, maker: Maker, seed: int = 0, **settings: Any) -> Any:
    memory = build("ema_generator", teacher, seed, **settings)
    memory.follow(maker)
    return memory


@pytest.mark.parametrize("steps", [1, 2])
def test_the_average_is_that_of_the_equation(teacher: nn.Module, steps: int) -> None:
    maker = Maker(steps)
    memory = following(teacher, maker, decay=0.9)
    assert not memory.ready
    expected: list[Tensor] = []
    for n in range(30):
        maker.learn(0.1 * (-1) ** n + 0.05)
        memory.remember(*batch(n), n)
        decay = min(0.9**steps, (1 + n) / (10 + n)) if n else 0.0
        now = [p.detach().clone() for p in maker.net.parameters()]
        expected = [decay * a + (1 - decay) * b for a, b in zip(expected or now, now)]
        assert memory.ready
        for a, b in zip(memory.net.parameters(), expected):
            torch.testing.assert_close(a, b)
    assert not any(torch.equal(a, b) for a, b in zip(memory.net.parameters(), maker.net.parameters()))


def test_it_draws_what_the_average_makes_and_moves_no_weight(teacher: nn.Module) -> None:
    maker = Maker()
    memory = following(teacher, maker, size=5)
    memory.remember(*batch(0), 0)
    live, mean = copy.deepcopy(maker.net.state_dict()), [p.clone() for p in memory.net.parameters()]
    stream = torch.Generator()
    stream.set_state(memory.generator.get_state())
    x, answer = memory.draw(student(), 0)
    assert answer is None  # the images are new, so the teacher is asked
    again = copy.deepcopy(memory.net)(torch.randn(5, 3, generator=stream))
    torch.testing.assert_close(x, again.detach(), atol=0.5 / 255 + 1e-6, rtol=0)
    assert x.shape == (5, *SHAPE)
    assert not x.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(mean, memory.net.parameters()))
    same(live, maker.net.state_dict())


def test_a_slow_average_lags_and_a_quick_one_does_not(teacher: nn.Module) -> None:
    """A generator that has drifted for long: what is replayed lies between where it was and where it is."""
    at = {}
    for decay in (0.0, 0.5, 0.95):
        maker = Maker()
        memory = following(teacher, maker, decay=decay)
        for n in range(600):
            maker.learn(0.01)
            memory.remember(*batch(0), n)
        ahead = maker.net[0].bias - memory.net[0].bias
        at[decay] = ahead.mean().item()
    assert at[0.0] == pytest.approx(0, abs=1e-6)
    assert at[0.5] == pytest.approx(0.01, rel=0.01)  # a drift of d a step is followed d * decay / (1 - decay) behind
    assert at[0.95] == pytest.approx(0.19, rel=0.05)


def test_sources_without_a_lasting_generator_are_refused(teacher: nn.Module) -> None:
    cfg = resolve(config("deepinv").to_tree(), {"replay": {"name": "ema_generator", "size": 8}, "update": "replay"})
    with pytest.raises(DodistillError, match="use one of adversarial, dafl, mosaic, pre, or --replay bank"):
        job(teacher, cfg)
    for name in registry.names("source"):
        cfg = config(name)
        source = cfg.source.build(context(fitting(name, teacher), unlabeled=torch.zeros(60, *SHAPE, dtype=torch.uint8)))
        assert (source.makes_with() is not None) == cfg.source.generates, name


# ------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", ["bank", "generative"])
def test_same_seed_same_replay(name: str, teacher: nn.Module, digits: Images) -> None:
    settings = {"bank": {"every": 1, "first": 1}}.get(name, {})

    def draws(seed: int) -> list[Tensor]:
        memory = build(name, teacher, seed, **settings)
        for r in range(3):
            memory.remember(*seen(teacher, digits, 24 * r), r)
        return [memory.draw(student(), s)[0] for s in range(4)]

    first = draws(0)
    torch.rand(3)
    same(first, draws(0))
    assert any(not torch.equal(a, b) for a, b in zip(first, draws(1)))


@pytest.mark.parametrize(("name", "more"), [("bank", {}), ("bank", {"eviction": "reservoir"}), ("generative", {})])
def test_its_state_is_all_of_it(name: str, more: dict[str, Any], teacher: nn.Module, digits: Images) -> None:
    a, b = build(name, teacher, 0, **more), build(name, teacher, 5, **more)
    for r in range(3):
        a.remember(*seen(teacher, digits, 24 * r), r)
    a.draw(student(), 0)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert b.ready
    for r in range(3, 6):
        for memory in (a, b):
            memory.remember(*seen(teacher, digits, 24 * r), r)
        same(a.draw(student(), r), b.draw(student(), r))
    same(a.state_dict(), b.state_dict())


def learner(replay: str, **update: Any) -> Distill:
    memory = {"bank": {"name": "bank", "capacity": 2, "size": 8, "every": 2, "first": 1},
              "generative": {"name": "generative", **SMALL["generative"]},
              "ema_generator": {"name": "ema_generator", **SMALL["ema_generator"]}}[replay]  # fmt: skip
    return resolve(
        config("pre" if replay == "ema_generator" else "fast", "kdci", steps=9).to_tree(),
        {"source": {"every": 2}, "replay": memory, "update": {"name": "retain", "alpha": 0.2, **update},
         "loop": {"log_every": 2, "eval_every": 4}},
    )  # fmt: skip


@pytest.mark.parametrize("replay", ["bank", "generative", "ema_generator"])
def test_a_run_stopped_anywhere_ends_in_the_same_bits(replay: str, teacher: nn.Module, tmp_path: Path) -> None:
    cfg = learner(replay)
    whole, folder = job(teacher, cfg, seed=50), RunFolder(tmp_path / "whole", cfg)
    assert whole.run(folder)
    folder.close()
    for life in range(40):
        it, folder = job(teacher, cfg, seed=60 + life), RunFolder(tmp_path / "parts", cfg)
        if life == 0:
            it.matcher.student.load_state_dict(job(teacher, cfg, seed=50).matcher.student.state_dict())
            it.matcher.ema.load_state_dict(it.matcher.student.state_dict())
        done = it.run(folder, (), 0.0)  # the deadline has always come: one acquisition or step per life
        folder.close()
        torch.rand(3)
        if done:
            break
    assert life > 9
    same(untimed(whole.state_dict()), untimed(it.state_dict()))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert any("match/retain/kd" in line for line in metrics(tmp_path / "whole"))


@pytest.mark.parametrize("order", ["exact", "first_order"])
@pytest.mark.parametrize("replay", ["bank", "generative", "ema_generator"])
def test_gradients_reach_what_learns_and_nothing_else(replay: str, order: str, teacher: nn.Module) -> None:
    """Student and KDCI's matrices move at every step; teacher, average and memory get nothing of it."""
    it = job(teacher, learner(replay, order=order))
    frozen = copy.deepcopy(it.context.teacher.state_dict())
    start = {
        n: p.detach().clone()
        for n, p in (*it.matcher.student.named_parameters(), *it.matcher.interventions.named_parameters())
    }
    backward, retained = it.matcher.update.backward, []

    def spy(student: nn.Module, acquire: Any, retain: Any) -> dict[str, Tensor]:
        memory = copy.deepcopy({k: v for k, v in it.acquirer.replay.state_dict().items() if k != "generator"})
        out = backward(student, acquire, retain)
        retained.append("retain/kd" in out)
        same(memory, {k: v for k, v in it.acquirer.replay.state_dict().items() if k != "generator"})
        return out

    it.matcher.update.backward = spy  # type: ignore[method-assign,assignment]
    assert it.run()
    assert retained[-1]
    for name, p in (*it.matcher.student.named_parameters(), *it.matcher.interventions.named_parameters()):
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
        assert not torch.equal(p, start[name]), name
    same(frozen, it.context.teacher.state_dict())
    assert all(p.grad is None for p in (*it.context.teacher.parameters(), *it.matcher.ema.parameters()))


def test_memory_is_what_it_holds(teacher: nn.Module, digits: Images) -> None:
    bank = build("bank", teacher, every=1, first=1, capacity=2)
    empty = bank.memory
    bank.remember(*seen(teacher, digits), 0)
    assert bank.memory - empty == 4 * (64 + 10 * 4 + 8)  # pixels, logits, a label each
    full = bank.memory
    for r in range(1, 6):
        bank.remember(*seen(teacher, digits), r)
    assert bank.memory - empty == 2 * (full - empty)
    memory = build("generative", teacher)
    memory.remember(*seen(teacher, digits), 0)
    weights = sum(4 * p.numel() for p in memory.parameters)
    assert memory.memory > 3 * weights  # and two moments of Adam
    assert memory.memory < 4 * weights + 20_000


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("bank", {"capacity": 0}, "replay.capacity is 0; it must be at least 1"),
        ("bank", {"size": 1}, "replay.size is 1; it must be at least 2"),
        ("bank", {"every": 0}, "replay.every is 0"),
        ("bank", {"first": 0}, "replay.first is 0"),
        ("generative", {"size": 1}, "replay.size is 1"),
        ("ema_generator", {"size": 1}, "replay.size is 1"),
        ("ema_generator", {"decay": 1.0}, "replay.decay is 1.0"),
        ("generative", {"new": 1}, "replay.new is 1"),
        ("generative", {"train": 0}, "replay.train is 0"),
        ("generative", {"lr": 0.0}, "replay.lr is 0.0"),
        ("generative", {"ie": -1.0}, "replay.ie is -1.0"),
    ],
)
def test_bad_settings_are_named(name: str, settings: dict[str, Any], said: str, teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match=said):
        build(name, teacher, **settings)


def test_acquisitions_that_are_too_small(teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match=r"give --replay\.size 5"):
        build("bank", teacher, size=32).remember(*batch(0), 0)


def test_generative_needs_a_size_that_4_divides() -> None:
    class Any_(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :5]

    ctx = context(Teacher(Any_(), (1, 10, 8)))
    with pytest.raises(DodistillError, match=r"takes 10x8; give --replay bank"):
        registry.config("replay", "generative")().build(ctx)  # type: ignore[attr-defined]


def test_none_remembers_nothing(teacher: nn.Module) -> None:
    nothing = NoReplay().build(context(teacher))
    nothing.remember(*batch(0), 0)
    assert not nothing.ready
    with pytest.raises(RuntimeError, match="nothing to draw"):
        nothing.draw(student(), 0)
