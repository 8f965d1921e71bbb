"""The loop: whatever meets in it, the student learns, nothing else moves, and no method is known by name."""

from __future__ import annotations

import copy
import io
import itertools
import keyword
import tokenize
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dodistill import engine
from dodistill.api import distill
from dodistill.config import registry
from dodistill.core.watch import Watcher
from dodistill.criteria.adaptation import Adaptation
from dodistill.data.images import Images
from dodistill.data.rows import Pixels
from dodistill.engine import Distiller, Job
from dodistill.errors import DodistillError
from dodistill.evaluation.evaluate import agreement, predict
from dodistill.evaluation.probe import features
from dodistill.interventions.kdci import KDCI
from dodistill.models import Normalized, load_model
from helpers import SHAPE, config, job, same, student

INTERVENTIONS = ("none", "kdci", "stratified", "kdci+stratified")
CRITERIA = ("kl", "l1", "adaptation")


def run(job: Distiller) -> list[dict[str, Tensor]]:
    """To the end, and the loss terms of each step."""
    terms: list[dict[str, Tensor]] = []
    inner = job.matcher.update.backward

    def backward(*args: object) -> dict[str, Tensor]:
        terms.append(inner(*args))  # type: ignore[arg-type]
        return terms[-1]

    job.matcher.update.backward = backward  # type: ignore[method-assign,assignment]
    assert job.run()
    return terms


@pytest.mark.parametrize(
    ("source", "intervention", "criterion"),
    list(itertools.product(("fast", "deepinv", "dfnd"), INTERVENTIONS, CRITERIA)),
)
def test_every_combination(source: str, intervention: str, criterion: str, teacher: nn.Module, digits: Images) -> None:
    cfg = config(source, intervention, criterion=criterion, optim={"lr": 0.05, "weight_decay": 0.0})
    it = job(teacher, cfg, digits.x[:300])
    frozen = copy.deepcopy(it.context.teacher.state_dict())
    start = {k: v.clone() for k, v in it.matcher.student.state_dict().items()}
    terms = run(it)
    assert len(terms) == it.step == 6
    assert all(torch.isfinite(v) for t in terms for v in t.values())
    assert all(torch.isfinite(p).all() for p in it.matcher.student.parameters())

    # The gradient arrives exactly where it should.
    for name, p in it.matcher.student.named_parameters():
        assert p.grad is not None, name
        assert not torch.equal(p, start[name]), name
    same(frozen, it.context.teacher.state_dict())
    assert all(p.grad is None and not p.requires_grad for p in it.context.teacher.parameters())
    assert all(p.grad is None and not p.requires_grad for p in it.matcher.ema.parameters())
    parts = [type(p) for p in it.matcher.interventions]
    assert len(parts) == (0 if intervention == "none" else 1 + intervention.count("+"))
    learnt = dict(it.matcher.interventions.named_parameters())
    assert bool(learnt) == ("kdci" in intervention)
    assert KDCI in parts or not learnt
    for name, p in learnt.items():
        assert p.grad is not None
        assert p.grad.abs().sum() > 0, name
    a = dict(it.matcher.criterion.named_parameters())
    assert bool(a) == (criterion == "adaptation")
    for p in a.values():
        assert isinstance(it.matcher.criterion, Adaptation)
        assert p.grad is not None
        assert p.grad.abs().sum() > 0
        assert p.detach().abs().max() > 0
    stepped = {id(p) for o in it.matcher.optimizers for g in o.param_groups for p in g["params"]}
    assert stepped == {id(p) for p in (*it.matcher.student.parameters(), *learnt.values(), *a.values())}
    assert (it.acquirer.dictionary is not None) == ("kdci" in intervention)


def test_interventions_have_no_weight_decay_and_the_criterion_its_own_rate(teacher: nn.Module, digits: Images) -> None:
    it = job(teacher, config("dfnd", "kdci", criterion="adaptation"), digits.x[:300])
    sgd, adam = it.matcher.optimizers
    assert isinstance(sgd, torch.optim.SGD)
    assert isinstance(adam, torch.optim.Adam)
    assert [g["weight_decay"] for g in sgd.param_groups] == [5e-4, 0.0]
    assert adam.param_groups[0]["lr"] == 1e-3
    own = job(teacher, config("dfnd", "kdci", kdci={"own_lr": 0.02}), digits.x[:300])
    assert [len(o.param_groups) for o in own.matcher.optimizers] == [1, 1]
    assert own.matcher.optimizers[1].param_groups[0]["lr"] == 0.02
    run(own)
    assert own.matcher.optimizers[1].param_groups[0]["lr"] == 0.02  # the student's schedule is the student's


@pytest.mark.parametrize(
    ("warmup", "every", "steps", "expected"),
    [
        (0, 0, 7, [0]),
        (0, 3, 7, [0, 3, 6]),
        (0, 3, 6, [0, 3]),
        (2, 3, 7, [0, 0, 0, 3, 6]),
        (1, 100, 7, [0, 0]),
        (0, 1, 3, [0, 1, 2]),
        (2, 0, 3, [0, 0, 0]),
    ],
)
def test_the_schedule_of_acquisitions(
    warmup: int, every: int, steps: int, expected: list[int], teacher: nn.Module
) -> None:
    cfg = config("deepinv", steps=steps, source={"iterations": 1, "batch": 8, "warmup": warmup, "every": every})
    it = job(teacher, cfg)
    at: list[int] = []
    inner = it.acquirer.source.acquire

    def acquire(student: nn.Module, round: int):
        assert not student.training
        assert round == len(at)
        at.append(it.step)
        return inner(student, round)

    it.acquirer.source.acquire = acquire  # type: ignore[method-assign]
    assert len(run(it)) == steps
    assert at == expected
    assert it.acquirer.round == len(expected)


def rows(x: Pixels) -> set[bytes]:
    return {bytes(r) for r in x[:].flatten(1).cpu().numpy()}


@pytest.mark.parametrize("source", ["fast", "deepinv", "dfnd"])
def test_held_back_inputs_are_never_in_the_pool(source: str, teacher: nn.Module, digits: Images) -> None:
    cfg = config(source, "stratified", steps=12, pool={"holdout": 0.2, "capacity": 80, "holdout_capacity": 15})
    it = job(teacher, cfg, digits.x[:300])
    drawn: set[bytes] = set()
    inner = it.match

    def match() -> None:
        drawn.update(rows(it.acquirer.pool.x))
        inner()

    it.match = match  # type: ignore[method-assign]
    acquired = 0
    real = it.acquirer.source.acquire

    def acquire(student: nn.Module, round: int):
        nonlocal acquired
        got = real(student, round)
        acquired += len(got.images)
        return got

    it.acquirer.source.acquire = acquire  # type: ignore[method-assign]
    run(it)
    assert len(it.acquirer.holdout) > 1
    assert not rows(it.acquirer.holdout.x) & drawn
    assert it.acquirer.holdout.seen + it.acquirer.pool.seen == acquired
    assert len(it.acquirer.pool) <= 80
    assert len(it.acquirer.holdout) <= 15
    for part in (it.acquirer.pool, it.acquirer.holdout):
        assert torch.allclose(part.logits, predict(it.context.teacher, part.x), atol=1e-4)


def test_the_average_against_a_slow_reference(teacher: nn.Module) -> None:
    it = job(teacher, config(steps=12, loop={"ema": 0.5}))
    slow = {k: v.clone().double() for k, v in it.matcher.student.state_dict().items()}
    step = 0
    while it.step < 12:
        if it.acquirer.due(it.step):
            it.acquire(Watcher())
            continue
        it.match()
        decay = min(0.5, (1 + step) / (10 + step))
        step += 1
        for k, v in it.matcher.student.state_dict().items():
            slow[k] = decay * slow[k] + (1 - decay) * v.double() if v.is_floating_point() else v.double()
    assert decay == 0.5
    for k, v in it.matcher.ema.state_dict().items():
        assert torch.allclose(v.double(), slow[k], atol=1e-5), k
    assert not torch.equal(
        it.matcher.ema.state_dict()["model.fc.weight"], it.matcher.student.state_dict()["model.fc.weight"]
    )


def test_rates() -> None:
    def rates(**optim: object) -> list[float]:
        net = student()
        it = job(net, config(steps=10, optim={"lr": 1.0, **optim}))
        out = []
        for it.step in range(11):
            out.append(it.matcher.rate(it.step / 10))
        return out

    cosine = rates(floor=0.1)
    assert cosine[0] == 1.0
    assert cosine[5] == pytest.approx(0.55)
    assert cosine[10] == pytest.approx(0.1)
    assert rates(schedule="constant") == [1.0] * 11
    assert rates(schedule="steps") == pytest.approx([1.0] * 4 + [0.1] * 4 + [0.01] * 3)
    assert rates(schedule="onecycle")[:3] == pytest.approx([0.0, 0.5, 1.0])
    assert rates(schedule="onecycle")[10] == 0.0


def skewed(digits: Images) -> Tensor:
    """Mostly zeros, some of everything."""
    assert digits.y is not None
    keep = [(digits.y == k).nonzero()[: 100 if k == 0 else 12, 0] for k in range(10)]
    return digits.x[torch.cat(keep)]


@pytest.mark.parametrize("intervention", ["none", "kdci", "stratified", "kdci+stratified"])
def test_stratified_draws_come_evenly_by_class(intervention: str, teacher: nn.Module, digits: Images) -> None:
    it = job(teacher, config("dfnd", intervention, steps=2), skewed(digits))
    run(it)
    y = it.acquirer.pool.logits.argmax(1)
    index = it.acquirer.sampler(20_000, torch.Generator().manual_seed(0))
    shares = torch.bincount(y[index], minlength=10) / 20_000
    assert torch.allclose(shares, it.acquirer.sampler.shares(it.acquirer.pool), atol=0.015)
    if "stratified" in intervention:
        assert torch.allclose(shares, torch.full((10,), 0.1), atol=0.015)
    else:
        assert shares.max() > 0.35
        assert torch.allclose(shares, it.acquirer.pool.class_shares(), atol=0.015)


def test_kdci_acts_in_the_loss_and_only_there(teacher: nn.Module, digits: Images) -> None:
    """The delivered student is the network alone, and a scale of 0 is the plain run, bit for bit."""
    plain, none, strong = (
        job(teacher, config("dfnd", i, kdci={"scale": s}), digits.x[:300])
        for i, s in (("none", 1.0), ("kdci", 0.0), ("kdci", 50.0))
    )
    for it in (plain, none, strong):
        run(it)
    same(plain.matcher.student.state_dict(), none.matcher.student.state_dict())
    assert not torch.equal(
        plain.matcher.student.state_dict()["model.fc.weight"], strong.matcher.student.state_dict()["model.fc.weight"]
    )
    assert list(strong.matcher.student.state_dict()) == list(student().state_dict())


def test_another_model_may_make_the_dictionary(teacher: nn.Module, digits: Images) -> None:
    cfg = config("dfnd", "kdci")
    it = Distiller(Job(cfg, teacher, student(), SHAPE, digits.x[:300], foreign=student(9, classes=7)))
    run(it)
    assert it.acquirer.dictionary is not None
    assert it.acquirer.dictionary.Z.shape == (4, 7)


@pytest.mark.parametrize("of", ["latest", "pool", "batch"])
def test_what_the_dictionary_is_made_of(of: str, teacher: nn.Module) -> None:
    it = job(teacher, config("deepinv", "kdci", steps=9, dictionary={"of": of}))
    assert it.acquirer.dictionary is not None
    built: list[int] = []
    inner = it.acquirer.dictionary.rebuild
    it.acquirer.dictionary.rebuild = lambda M: (built.append(len(M)), inner(M))[1]  # type: ignore[method-assign,assignment]
    run(it)
    held = 3 * 1  # acquisitions of 32, of which one image each is held back
    if of == "batch":
        assert built == [32, 16, 16, 16, 16, 32, 16, 16, 16, 16, 32, 16] or built == [16] * 9
    else:
        assert built == ([32] * 3 if of == "latest" else [31, 62, 96 - held])


def test_the_loop_knows_no_method_by_name() -> None:
    """Neither as a name nor within a string; comments and docstrings may speak of them."""
    names = {n for axis in registry.AXES for n in registry.names(axis)} - set(registry.AXES)
    assert {"fast", "deepinv", "dfnd", "kdci", "stratified", "kl", "adaptation"} <= names
    words: set[str] = set()
    folder = Path(engine.__file__).parent
    parts = [folder / f"{name}.py" for name in ("loop", "job", "acquire", "match", "meter", "score")]
    lines = [line for p in parts for line in p.read_text().splitlines()]
    source = "\n".join(line for line in lines if not line.startswith("from "))  # folders may bear a method's name
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            words.add(token.string)
        if token.type == tokenize.STRING and previous not in (
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.NL,
        ):
            words.update(token.string.strip("\"'frb").replace(".", " ").split())
        if token.type != tokenize.COMMENT:
            previous = token.type
    assert "acquire" in words
    assert names & words <= set(keyword.kwlist)


@pytest.mark.parametrize("net", ["tiny4", "mobilenetv2"])
def test_a_loaded_student_answers_as_the_one_in_memory(
    net: str, teacher: nn.Module, digits: Images, tmp_path: Path
) -> None:
    """To the bit, for both are of one memory format: kernels of two formats round differently, on some CPUs only."""
    made = load_model(net, num_classes=10, in_channels=1, image_size=8, seed=1)
    result = distill(
        teacher, made, {"name": "data"}, image_shape=SHAPE, unlabeled=digits.x[:64], out=tmp_path / "run",
        verbose=False, augment={"pad": 0, "flip": False}, loop={"steps": 2, "batch": 16, "device": "cpu"},
    )  # fmt: skip
    loaded = load_model(str(tmp_path / "run" / "student.safetensors"))
    for (name, mine), its in zip(result.student.state_dict().items(), loaded.state_dict().values()):
        assert mine.stride() == its.stride(), name
    filters = [p for p in loaded.parameters() if p.dim() == 4]
    assert filters
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)
    strips = digits.x[:50].contiguous(memory_format=torch.channels_last)
    for x in (digits.x[:50], strips):
        assert torch.equal(predict(loaded, x), predict(result.student, x))
        assert torch.equal(features(loaded, x), features(result.student, x))


def test_the_delivered_student_is_chosen_without_the_test_set(
    teacher: nn.Module, digits: Images, digits_test: Images
) -> None:
    assert digits_test.y is not None
    results = []
    for test in (None, (digits_test.x, digits_test.y), (digits_test.x, (digits_test.y + 1) % 10)):
        net = student()
        tree = config("dfnd", steps=20).to_tree()
        settings = {k: v for k, v in tree.items() if k not in ("source", "intervention", "teacher", "student")}
        result = distill(
            teacher, net, tree["source"], image_shape=SHAPE, unlabeled=digits.x, test=test, verbose=False, **settings
        )
        results.append(result)
    plain, right, wrong = results
    same(plain.student.state_dict(), right.student.state_dict())
    same(plain.student.state_dict(), wrong.student.state_dict())
    assert plain.summary["delivered"] == right.summary["delivered"] == wrong.summary["delivered"]
    assert right.summary["agreement"] == wrong.summary["agreement"]
    assert right.summary["student_accuracy"] != wrong.summary["student_accuracy"]
    assert "student_accuracy" not in plain.summary
    assert not plain.student.training


@pytest.mark.parametrize("which", ["last", "ema"])
def test_the_shipped_student_can_be_trained_on(which: str, teacher: nn.Module) -> None:
    it = job(teacher, config())
    frozen = next(it.matcher.student.parameters()).requires_grad_(False)
    net = it.scorer.shipped(which)
    assert not any(m.training for m in net.modules())
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in it.matcher.student.parameters()]
    assert not frozen.requires_grad
    net(torch.rand(2, *SHAPE)).sum().backward()


def test_tied_weights_are_averaged_once(teacher: nn.Module) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = student()
            self.same = self.net

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.same(x)
            return out

    cfg = config(steps=4, loop={"ema": 0.5})
    plain, tied = job(teacher, cfg), Distiller(Job(cfg, teacher, Twice(), SHAPE))
    for it in (plain, tied):
        it.run()
    same(plain.matcher.ema.state_dict(), tied.matcher.ema.net.state_dict())


def test_a_part_of_the_images_is_always_trained_on(teacher: nn.Module) -> None:
    it = job(
        teacher, config("procedural", source={"name": "procedural", "n": 16, "candidates": 32}, pool={"holdout": 0.97})
    )
    it.acquirer.acquire(it.matcher.student)
    assert (len(it.acquirer.pool), len(it.acquirer.holdout)) == (1, 15)


@pytest.mark.parametrize(("last", "ema", "chosen"), [(50.0, 60.0, "ema"), (60.0, 50.0, "last"), (50.0, 50.0, "last")])
def test_the_choice_is_by_agreement(last: float, ema: float, chosen: str, teacher: nn.Module) -> None:
    it = job(teacher, config())
    it.scorer.last = {"agreement": last, "agreement_ema": ema, "test": 99.0, "test_ema": 1.0}
    name, net = it.scorer.delivered()
    assert name == chosen
    assert net is (it.matcher.ema if chosen == "ema" else it.matcher.student)


def test_it_looks_when_it_was_told_to(teacher: nn.Module, digits: Images) -> None:
    """eval_every need not be a multiple of log_every; both look at the last step."""
    cfg = config("dfnd", steps=11, loop={"log_every": 4, "eval_every": 3})
    it = job(teacher, cfg, digits.x[:300])
    looked: list[tuple[str, int]] = []
    for part, name in ((it, "read"), (it.scorer, "evaluate")):
        inner = getattr(part, name)
        setattr(part, name, lambda *a, inner=inner, name=name, **k: (looked.append((name, it.step)), inner(*a, **k))[1])
    run(it)
    assert [s for n, s in looked if n == "read"] == [4, 8, 11]
    assert [s for n, s in looked if n == "evaluate"] == [3, 6, 9, 11]


def test_the_log_is_the_mean_since_the_last_look(teacher: nn.Module, digits: Images) -> None:
    it = job(teacher, config("dfnd", steps=5, loop={"log_every": 2}), digits.x[:300])
    logged: list[float] = []
    inner = it.read

    def log() -> dict[str, float]:
        out = inner()
        logged.append(out["match/kd"])
        return out

    it.read = log  # type: ignore[method-assign]
    kd = [t["kd"].item() for t in run(it)]
    assert logged == pytest.approx([(kd[0] + kd[1]) / 2, (kd[2] + kd[3]) / 2, kd[4]], rel=1e-4)


def test_evaluation_is_agreement_and_accuracy(teacher: nn.Module, digits: Images, digits_test: Images) -> None:
    assert digits_test.y is not None
    it = job(teacher, config("dfnd"), digits.x[:300], test=engine.Test(digits_test.x, digits_test.y))
    run(it)
    held = it.acquirer.holdout
    got = it.scorer.evaluate()
    assert got["agreement"] == agreement(predict(it.matcher.student, held.x), held.logits)
    assert got["agreement_ema"] == agreement(predict(it.matcher.ema, held.x), held.logits)
    right = predict(it.matcher.student, digits_test.x).argmax(1) == digits_test.y
    assert got["test"] == pytest.approx(100 * right.float().mean().item())


def test_the_student_learns_from_unlabelled_digits(
    taught: Normalized, teacher: nn.Module, digits: Images, digits_test: Images
) -> None:
    cfg = config(
        "dfnd", steps=250, source={"n": 1200}, criterion={"name": "kl", "temperature": 4.0}, loop={"batch": 64}
    )
    it = job(teacher, cfg, digits.x)
    target = predict(taught, digits_test.x)
    before = agreement(predict(it.matcher.student, digits_test.x), target)
    run(it)
    after = agreement(predict(it.scorer.delivered()[1], digits_test.x), target)
    assert before < 40
    assert after > 80
    assert it.scorer.last["agreement"] > 80


@pytest.mark.parametrize("source", ["fast", "deepinv"])
def test_the_student_learns_from_what_is_made(source: str, teacher: nn.Module) -> None:
    """Far above chance on what was held back, with no data at all."""
    made = {"fast": {"K": 5, "batch": 64, "warmup": 3, "every": 6, "latent": 32, "width": 8}}.get(
        source, {"iterations": 30, "batch": 64, "every": 12, "best": False}
    )
    cfg = config(
        source, steps=180, source=made, criterion={"name": "kl", "temperature": 4.0}, loop={"batch": 64},
        pool={"holdout": 0.25}, optim={"lr": 0.1},
    )  # fmt: skip
    it = job(teacher, cfg)
    run(it)
    assert len(it.acquirer.holdout) > 200
    assert max(it.scorer.last["agreement"], it.scorer.last["agreement_ema"]) > 30


def test_the_global_random_state_is_left_alone(teacher: nn.Module, digits: Images) -> None:
    for source in ("fast", "deepinv", "dfnd"):
        net = student()
        before = torch.get_rng_state()
        it = Distiller(
            Job(config(source, "kdci+stratified", criterion="adaptation"), teacher, net, SHAPE, digits.x[:300])
        )
        assert it.run()
        assert torch.equal(before, torch.get_rng_state()), source


def test_same_seed_same_bits_and_another_seed_not(teacher: nn.Module) -> None:
    states = []
    for seed in (0, 0, 3):
        it = job(teacher, config(intervention="kdci+stratified", loop={"seed": seed}))
        run(it)
        states.append(it.matcher.student.state_dict())
        torch.rand(5)
    same(states[0], states[1])
    assert not torch.equal(states[0]["model.fc.weight"], states[2]["model.fc.weight"])


@pytest.mark.parametrize("pad", [-1, 8])
def test_a_crop_wider_than_the_image_is_refused(pad: int, teacher: nn.Module) -> None:
    with pytest.raises(DodistillError, match=f"augment.pad is {pad} pixels.*between 0 and 7"):
        job(teacher, config(augment={"pad": pad}))


def test_one_image_per_acquisition_is_too_few(teacher: nn.Module, digits: Images) -> None:
    it = job(teacher, config("real", source={"name": "real", "n": 1}), digits.x[:300])
    with pytest.raises(DodistillError, match="1 image"):
        it.run()
