"""PRE-DFKD, MB-DFKD, LRA and CID against what their released code computes.

tests/golden/{pre,lra,cid}.json has the numbers and how each was made. Where we deviate on purpose the test has both
values: the released one, and what ours is instead.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dodistill.config import registry
from dodistill.config.tree import resolve
from dodistill.core.context import Context
from dodistill.engine import Distiller, Job
from dodistill.functional import losses
from dodistill.functional.augment import to_float
from dodistill.interventions.cid import CID
from dodistill.models import Normalized
from dodistill.models.teacher import Teacher
from dodistill.replay.bank import Bank
from dodistill.replay.generative import Generative
from dodistill.sources.pre import Pre, js_repo
from dodistill.updates.shared.base import Objective, Update
from formula import Net, alike, close, digest, fill, gauss, images, labels, net, wave

CPU = torch.device("cpu")


def golden(name: str) -> dict[str, Any]:
    text = (Path(__file__).parent / "golden" / f"{name}.json").read_text()
    return {k: v["value"] for k, v in json.loads(text)["values"].items()}


PRE, LRA, RELEASED = golden("pre"), golden("lra"), golden("cid")


@pytest.mark.parametrize("name", ["pre", "lra", "cid"])
def test_every_number_names_its_origin(name: str) -> None:
    book = json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text())
    for where in book["released"].values():
        assert sorted(where) == ["commit", "file", "repository"]
        assert len(where["commit"]) == 40
    for value in book["values"].values():
        assert sorted(value) == ["function", "how", "source", "value"]
        assert value["source"] in book["released"]


def grads(*modules: nn.Module) -> list[Tensor]:
    found = [p.grad for m in modules for p in m.parameters()]
    assert all(g is not None for g in found)
    return [g for g in found if g is not None]


def weights(*modules: nn.Module) -> list[Tensor]:
    """What the JSON calls the weights: parameters of two or more dimensions."""
    return [p.detach().clone() for m in modules for p in m.parameters() if p.dim() > 1]


def change(before: list[Tensor], after: list[Tensor]) -> list[float]:
    return digest([b - a for a, b in zip(before, after)])


# ----------------------------------------------------------------------------------- PRE-DFKD, MB-DFKD: the generator


@pytest.fixture
def by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.randn(shape) is gauss(shape, phase=2) while the test runs."""

    def randn(*shape: Any, **_: Any) -> Tensor:
        return gauss(*(shape if isinstance(shape[0], int) else shape[0]), phase=2.0)

    monkeypatch.setattr(torch, "randn", randn)


def context(std: float = 0.05) -> Context:
    """A teacher of images in [0, 1], normalised so strongly that no image of ours leaves [0, 1] and is clipped."""
    return Context(Teacher(Normalized(net(0.0), [0.5], [std]), (3, 8, 8)), CPU)


def pupil() -> Normalized:
    return Normalized(net(0.3), [0.5], [0.05])


def generator(std: float = 0.05, **more: Any) -> Pre:
    """The source with the released weights 1, 5, 0.1 and a generator filled by the formula."""
    source = registry.config("source", "pre")(batch=32, latent=16, **more).build(context(std))  # type: ignore[attr-defined]
    assert isinstance(source, Pre)
    fill(source.net, 0)
    for m in source.net.modules():
        if isinstance(m, nn.Conv2d):
            (norm,) = m.parametrizations.weight  # type: ignore[union-attr,misc]
            original: Tensor = m.parametrizations.weight.original  # type: ignore[union-attr,assignment]
            u, _, v = torch.linalg.svd(original.detach().flatten(1), full_matrices=False)
            norm._u.copy_(u[:, 0])  # type: ignore[operator,union-attr]
            norm._v.copy_(v[0])  # type: ignore[operator,union-attr]
    return source


@pytest.mark.usefixtures("by_formula")
def test_the_generator_its_losses_and_its_step() -> None:
    source, student = generator(), pupil().eval()
    x = source.net(source._z())
    assert alike(digest((x - 0.5) / 0.05), PRE["images"])
    source, before = generator(), []
    before = weights(source.net)
    source._step(student)
    terms = {k: float(v) for k, v in source.terms.items()}
    assert close([terms[k] for k in ("oh", "ie", "act")], PRE["generator: oh, ie, act"])
    assert close(-terms["adv"], PRE["generator: distance, student in eval mode"])
    # deviation: the constant 1 of `1 - D` is left out
    assert close(sum(terms.values()) + 1, PRE["generator: loss"])
    # `parameters()` has bias and weight of a convolution in the same order under both kinds of spectral norm
    assert alike(digest(grads(source.net)), PRE["generator: gradient"])
    assert alike(change(before, weights(source.net)), PRE["generator: step"])


@pytest.mark.usefixtures("by_formula")
def test_the_students_mode_and_clipping_are_ours() -> None:
    """Deviations: in the release the student is in train mode here, and no image is clipped."""
    source = generator()
    x = source.net(source._z())
    released = {mode: PRE[f"generator: distance, student in {mode} mode"] for mode in ("train", "eval")}
    for mode, value in released.items():
        terms, _ = source._losses(x, pupil().train(mode == "train"))
        assert close(-terms["adv"].item(), value)
    assert released["train"] == pytest.approx(3.543 * released["eval"], rel=1e-3)
    # with deviation 0.25, as real teachers have it, 4 % of the pixels leave [0, 1]
    clipped = generator(std=0.25)
    y = clipped.net(clipped._z())
    assert 0.02 < ((y == 0) | (y == 1)).float().mean() < 0.06
    terms, _ = clipped._losses(y, pupil())
    assert PRE["generator: oh, ie, act"][0] == pytest.approx(0.762688, abs=1e-6)
    assert terms["oh"].item() == pytest.approx(0.781002, abs=1e-4)


def test_the_distance_at_a_hundred_classes() -> None:
    s, t = 12 * wave(16, 100).double(), 12 * wave(16, 100, phase=1).double()
    assert close(float(js_repo(s, t)), PRE["distance, 100 classes"])
    assert float(losses.js(s, t)) > 100 * PRE["distance, 100 classes"]  # what it is said to be


# -------------------------------------------------------------------------------------------------------- the memory


def memory(**more: Any) -> Generative:
    made = registry.config("replay", "generative")(size=4, new=16, latent=16, width=64, **more).build(context())  # type: ignore[attr-defined]
    assert isinstance(made, Generative)
    fill(made.encoder, 1)
    fill(made.decoder, 2)
    made.encoder.train()
    made.decoder.train()
    return made


def new_images(it: Generative, n: int = 16) -> tuple[Tensor, Tensor]:
    x = 0.5 + 0.05 * gauss(32, 3, 8, 8, phase=3)[:n]
    with torch.no_grad():
        return x, it.context.teacher(x)


def near(mine: list[float], theirs: list[float], rel: float = 1e-4) -> bool:
    """Are terms equal, relative to the largest? A term of a tiny weight is known no better than the loss is."""
    return len(mine) == len(theirs) and all(abs(x - y) <= rel * max(theirs) for x, y in zip(mine, theirs))


def terms_of(it: Generative, *names: str) -> list[float]:
    return [float(it.terms[name]) for name in names]


@pytest.mark.usefixtures("by_formula")
def test_the_memorys_first_step_is_on_new_images() -> None:
    it = memory()
    before = weights(it.encoder, it.decoder)
    it._train(*new_images(it))
    assert near(terms_of(it, "image", "logits", "kld"), PRE["memory, first: image, logits, kld"])
    assert it.terms["kld"].item() == pytest.approx(PRE["memory, first: image, logits, kld"][2], rel=1e-3)
    assert alike(digest(grads(it.encoder, it.decoder)), PRE["memory, first: gradient"])
    assert alike(change(before, weights(it.encoder, it.decoder)), PRE["memory, first: step"])


@pytest.mark.usefixtures("by_formula")
@pytest.mark.parametrize("released", [False, True])
def test_its_later_steps_are_on_its_own_images_too(released: bool) -> None:
    """As released with `shapes_decoder`; without it, as the released code is once the decoder's gradient is cleared."""
    it = memory(shapes_decoder=released)
    before = weights(it.encoder, it.decoder)
    seen: list[Tensor] = []
    hook = it.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    it._train(*it._with_own(*new_images(it)))
    hook.remove()
    assert close(terms_of(it, "ie", "oh", "moments"), PRE["memory, later: ie, oh, moments"])
    assert alike(digest(seen[1]), PRE["memory, later: z"])
    assert near(terms_of(it, "image", "logits", "kld"), PRE["memory, later: image, logits, kld"])
    tag = "memory, later, as released" if released else "memory, later"
    assert alike(digest(grads(it.encoder)), PRE[f"{tag}: gradient of the encoder"])
    assert alike(digest(grads(it.decoder)), PRE[f"{tag}: gradient of the decoder"])
    assert alike(change(before, weights(it.encoder, it.decoder)), PRE[f"{tag}: step"])
    ratio = (
        PRE["memory, later, as released: gradient of the decoder"][0] / PRE["memory, later: gradient of the decoder"][0]
    )
    assert ratio == pytest.approx(3.74, abs=0.01)  # what the switch decides


@pytest.mark.usefixtures("by_formula")
def test_own_images_are_decoded_from_tuned_latents() -> None:
    it = memory()
    assert alike(digest((it._decode_balanced() - 0.5) / 0.05), PRE["memory, later: own images"])
    drawn, answer = memory().draw(pupil(), 0)
    assert alike(digest((drawn - 0.5) / 0.05), PRE["student: replayed images"])
    assert answer is None


# ----------------------------------------------------------------------------------------- the student, the settings


def build(name: str, **settings: Any) -> Update:
    update: Update = registry.config("update", name)(**settings).build()  # type: ignore[attr-defined]
    return update


def l1_on(x: Tensor) -> Objective:
    """L1 of logits to those of the teacher, on fixed inputs in normalised coordinates."""
    teacher = net(0.0).to(x.dtype)
    with torch.no_grad():
        t = teacher(x)
    return lambda student: {"kd": losses.l1(student(x), t)}


def learn(
    update: Update, student: nn.Module, *objectives: Objective
) -> tuple[dict[str, float], list[float], list[float]]:
    """Loss terms, digest of the gradients, digest of the step of the released SGD."""
    sgd = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    before = [p.detach().clone() for p in student.parameters()]
    terms = update.backward(student, *objectives)
    found = digest(grads(student))
    sgd.step()
    return {k: float(v) for k, v in terms.items()}, found, change(before, [p.detach() for p in student.parameters()])


def test_a_student_without_a_memory() -> None:
    terms, gradient, step = learn(build("plain"), net(0.3).train(), l1_on(gauss(32, 3, 8, 8, phase=3)))
    assert close(terms["kd"], PRE["student, no memory: loss"])
    assert alike(gradient, PRE["student, no memory: gradient"])
    assert alike(step, PRE["student, no memory: step"])


@pytest.mark.usefixtures("by_formula")
def test_replay_at_an_eighth_is_the_released_loss_up_to_its_scale() -> None:
    """Weights 8:1, and 8/9 of ours is theirs. Deviation: each kind is normalised by its own batch, so that in train
    mode, where the release has one batch of both, the values differ."""
    drawn, _ = memory().draw(pupil(), 0)
    new, old = l1_on(gauss(32, 3, 8, 8, phase=3)), l1_on((drawn - 0.5) / 0.05)
    terms, gradient, _ = learn(build("replay", weight=0.125), net(0.3).eval(), new, old)
    assert close(8 / 9 * sum(terms.values()), PRE["student, BatchNorm fixed: loss"])
    assert alike([8 / 9 * v for v in gradient], PRE["student, BatchNorm fixed: gradient"])
    terms, gradient, _ = learn(build("replay", weight=0.125), net(0.3).train(), new, old)
    assert PRE["student, as released: loss"] == pytest.approx(1.145658, abs=1e-5)
    assert 8 / 9 * sum(terms.values()) == pytest.approx(1.156290, abs=1e-5)
    assert PRE["student, as released: gradient"] == pytest.approx([0.851861, 0.021647], abs=1e-5)
    assert [8 / 9 * v for v in gradient] == pytest.approx([0.849162, 0.019560], abs=1e-5)


@pytest.mark.parametrize("preset", ["mb", "pre", "lra-bank", "lra-generative"])
def test_the_presets_are_the_released_settings(preset: str) -> None:
    c, theirs = resolve({"source": "pre", "preset": preset}), PRE[f"settings {preset}"]
    s, batch = c.source, theirs["batch_size"]
    assert (s.batch, c.loop.batch, s.latent, s.lr_g, c.optim.lr) == (
        batch, batch, theirs["latent_dim"], theirs["lr_G"], theirs["lr_S"],
    )  # fmt: skip
    assert (s.oh, s.ie, s.act, s.g_steps, s.every) == (
        theirs["oh"], theirs["ie"], theirs["a"], theirs["gen_iter"], theirs["kd_iter"],
    )  # fmt: skip
    steps = PRE[f"{preset}: steps per epoch"]
    assert c.loop.steps == theirs["max_epoch"] * steps[1]
    assert s.every * steps[0] == steps[1]
    if preset in ("pre", "mb"):
        known = PRE["settings"]
        assert {k: v for k, v in theirs.items() if k in known} == {k: v for k, v in known.items() if k != "n_epochs"}
        assert known["n_epochs"] == theirs["max_epoch"]
    if c.replay.name == "generative":
        assert c.replay.train * steps[0] == steps[2]
        assert (c.replay.size, c.replay.new, c.replay.latent) == (batch // 8, batch // 2, theirs["latent_dim"])
        assert (c.replay.lr, c.replay.lr_z) == (theirs["lr_G"] / 40, theirs["lr_G"])
        assert c.replay.shapes_decoder
        # deviation: the release trains the memory after each of its first 4 student steps, we before all of them
        assert PRE[f"{preset}: one iteration"] == "GSMSMSMSMSSSSSS"
    else:
        assert (c.replay.capacity, c.replay.size) == (theirs["memory_capacity"], batch // 8)
        bank = [n for n in range(1, 900) if n >= c.replay.first and (n - c.replay.first) % c.replay.every == 0]
        assert bank[:3] == PRE[f"{preset}: pushes"]
    if c.update.name == "retain":
        assert c.update.alpha == theirs["lr_S_in"]
    made = torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # the release leaves Adam's betas and eps at their defaults
    assert (s.betas, made.defaults["eps"]) == (made.defaults["betas"], 1e-8)


def test_the_ring_and_the_rate() -> None:
    bank = registry.config("replay", "bank")(capacity=10, size=2, every=1, first=1).build(context())  # type: ignore[attr-defined]
    assert isinstance(bank, Bank)
    for k in range(13):
        bank.remember(torch.full((2, 3, 8, 8), k, dtype=torch.uint8), torch.zeros(2, 10), k)
    assert bank.bank.x[::2, 0, 0, 0].tolist() == PRE["ring"]
    it = job({"source": "pre", "preset": "mb", "loop": {"device": "cpu"}})
    found = []
    for epoch in (0, 100, 200, 399):
        it.step = epoch * PRE["mb: steps per epoch"][1]
        found.append(it.matcher.rate(it.step / it.config.loop.steps))
    assert found == pytest.approx(PRE["rates"], rel=1e-6)


# --------------------------------------------------------------------------------------------------------------- LRA


def lra(update: Update, mode: bool = True) -> tuple[dict[str, float], list[float], list[float], dict[str, float]]:
    student = net(0.3).double().train(mode)
    new, old = gauss(32, 3, 8, 8).double(), gauss(4, 3, 8, 8, phase=1).double()
    out = learn(update, student, l1_on(new), l1_on(old))
    return *out, {k: float(v) for k, v in update.terms.items()}


@pytest.mark.parametrize("alpha", [0.9, 0.1])
def test_the_look_ahead(alpha: float) -> None:
    """The released inner step and loss, and the gradient that the released library gives once it does not copy."""
    tag = f"alpha {alpha}: "
    for order in ("exact", "first_order"):
        terms, gradient, _, said = lra(build("retain", alpha=alpha, order=order))
        assert close(terms["kd"], LRA["L_Acq at w"])
        assert close(terms["retain/kd"], LRA[f"{tag}L_Ret at w'"])
        w = torch.cat([p.detach().flatten() for p in net(0.3).double().parameters()])
        assert said["inner_step"] * float(w.norm()) == pytest.approx(LRA[f"{tag}w' - w"][0], rel=1e-4)
        assert alike(gradient, LRA[f"{tag}{order.replace('first_o', 'first-o')} gradient"])
    size = LRA[f"{tag}gradient of L_Ret at w'"][0] / LRA["gradient of L_Acq at w"][0]
    assert said["retain_over_acquire"] == pytest.approx(size, rel=1e-4)


def test_the_meta_gradient_alone() -> None:
    """(I - alpha H) u, and u: what the update adds to the gradient of L_Acq."""
    for alpha in (0.9, 0.1):
        for order, key in (("exact", "gradient of L_Ret(w') by w"), ("first_order", "gradient of L_Ret at w'")):
            student, parts = net(0.3).double().train(), []
            new, old = gauss(32, 3, 8, 8).double(), gauss(4, 3, 8, 8, phase=1).double()
            for update, objectives in ((build("retain", alpha=alpha, order=order), (l1_on(new), l1_on(old))),
                                       (build("plain"), (l1_on(new),))):  # fmt: skip
                student.zero_grad()
                update.backward(student, *objectives)
                parts.append([g.clone() for g in grads(student)])
            assert alike(digest([a - b for a, b in zip(*parts)]), LRA[f"alpha {alpha}: {key}"])


def test_what_the_release_does_instead() -> None:
    """Its outer loss reaches no weight: the gradient is MB-DFKD's, and `replay` at an eighth is ours of it."""
    assert close(LRA["as released: gradient"], LRA["MB-DFKD: gradient"], rel=1e-8)
    _, gradient, _, _ = lra(build("replay", weight=0.125), mode=False)
    assert alike([8 / 9 * v for v in gradient], LRA["as released, BatchNorm fixed: gradient"])
    # in train mode: one batch of both kinds there, each its own here
    terms, gradient, _, _ = lra(build("replay", weight=0.125))
    assert LRA["as released: loss over both"] == pytest.approx(1.182820, abs=1e-6)
    assert 8 / 9 * sum(terms.values()) == pytest.approx(1.181883, abs=1e-5)
    assert LRA["as released: gradient"] == pytest.approx([0.853608, 0.012469], abs=1e-6)
    assert [8 / 9 * v for v in gradient] == pytest.approx([0.854061, 0.012572], abs=1e-5)


def test_two_more_terms_that_the_release_would_have() -> None:
    """Deviations. With weights that are not copied it would hold retention at w beside that at w': 8/9 L_Acq(w) + 1/9
    L_Ret(w) + L_Ret(w'); the equation has L_Acq(w) + L_Ret(w'). And its inner step has a weight decay of 5e-4."""
    three, two = LRA["alpha 0.9: gradient of all three losses"], LRA["alpha 0.9: exact gradient"]
    assert three[0] == pytest.approx(1.954356, abs=1e-6)
    _, gradient, _, _ = lra(build("retain", alpha=0.9))
    assert gradient[0] == pytest.approx(two[0], rel=1e-4)
    assert two[0] == pytest.approx(1.928686, abs=1e-6)
    decayed = "alpha 0.9: inner weight decay 5e-4, as released: "
    assert LRA[f"{decayed}L_Ret at w'"] == pytest.approx(0.705208, abs=1e-6)
    assert LRA["alpha 0.9: L_Ret at w'"] == pytest.approx(0.704812, abs=1e-6)
    # the inner step with decay, by hand
    student = net(0.3).double().train()
    build("plain").backward(student, l1_on(gauss(32, 3, 8, 8).double()))
    w = [p.detach() for p in student.parameters()]
    for name, decay in ((decayed, 5e-4), ("alpha 0.9: ", 0.0)):
        moved = [-0.9 * (g + decay * p) for g, p in zip(grads(student), w)]
        assert alike(digest(moved), LRA[f"{name}w' - w"])


def test_the_outer_step() -> None:
    """SGD with the released settings, where there is nothing to replay yet."""
    assert LRA["settings"] == {"lr_S": 0.1, "lr_S_in": 0.9, "batch_size": 512}
    student = net(0.3).double().train()
    _, _, step = learn(build("retain"), student, l1_on(gauss(32, 3, 8, 8).double()))
    assert alike(step, LRA["empty memory: step"])


# --------------------------------------------------------------------------------------------------------------- CID


def job(tree: dict[str, Any], student: nn.Module | None = None) -> Distiller:
    cfg = resolve({"loop": {"device": "cpu", "threads": 1}}, tree)
    x, y = picture(range(4)), torch.cat([labels(16), labels(16), labels(16, 7), labels(16, 7)])
    return Distiller(Job(cfg, net(0.0), student or fill(Net(4), 0.3), (3, 8, 8), unlabeled=x, labels=y))


def picture(phases: Any) -> Tensor:
    return torch.cat([(images(16, 3, 8, 8, phase=p) * 255).round().byte() for p in phases])


class Cid:
    """The engine, at its own steps, on the batches of the JSON: the pool has them, the draw takes them in turn."""

    def __init__(self, u: float = 0.0, decay: bool = True) -> None:
        self.it = it = job(
            {"source": "data", "preset": "cid-resnet56-resnet20",
             "cid": {"u": u, "decay": decay}, "criterion": {"name": "cid", "a": 0.5, "b": 0.4, "c": 2.0},
             "optim": {"weight_decay": 0.05}, "augment": {"pad": 0, "flip": False},
             "loop": {"steps": 480, "batch": 16}},
        )  # fmt: skip
        x, y = it.context.unlabeled, it.context.labels
        assert x is not None
        with torch.no_grad():
            it.acquirer.pool.add(x, it.context.teacher(to_float(x[:])), it.acquirer.generators["pool"], y)
        part, r = next(iter(it.matcher.interventions)), it.matcher.criterion.r
        assert isinstance(part, CID)
        assert isinstance(r, nn.Linear)
        self.part = part
        self.modules = {"student": it.matcher.student, "W'": fill(part.head, 1), "r": fill(r, 2)}
        it.step, part.passes = 38, 19  # two steps are an epoch: the twentieth of 240

    def epoch(self, first: int) -> tuple[list[list[float]], dict[str, list[float]]]:
        """The terms of both steps, and how the parameters changed."""
        it, rows = self.it, []
        before = {k: [p.detach().clone() for p in m.parameters()] for k, m in self.modules.items()}
        for k in (first, first + 1):
            it.acquirer.slots.sampler = lambda n, g, k=k: torch.arange(16 * k, 16 * k + n)  # type: ignore[assignment,misc]
            it.meter.sums = {}
            it.match()
            rows.append([float(it.meter.sums[f"match/{n}"]) for n in ("kd", "sample", "class", "supervised")
                         if f"match/{n}" in it.meter.sums])  # fmt: skip
        steps = {k: change(before[k], [p.detach() for p in m.parameters()]) for k, m in self.modules.items()}
        return rows, steps


def test_cids_two_stages() -> None:
    run, book = Cid(), RELEASED
    rows, steps = run.epoch(0)
    for mine, theirs in zip(rows, book["stage 1: kl, sample, class"]):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert sum(map(sum, rows)) / 2 == pytest.approx(book["stage 1: loss"], rel=1e-4)
    for part, moved in steps.items():
        assert alike(moved, book[f"stage 1: step of {part}"]), part
    rows, steps = run.epoch(2)  # its first step turns to the contexts of the epoch before
    assert alike(digest(run.part.C), book["stage 1: context"])
    for mine, theirs in zip(rows, book["stage 2: kl, sample, class, cls"]):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert sum(map(sum, rows)) / 2 == pytest.approx(book["stage 2: loss"], rel=1e-4)
    for part, moved in steps.items():
        assert alike(moved, book[f"stage 2: step of {part}"]), part
    with torch.no_grad():
        deployed = run.it.scorer.complete("last").eval()(to_float(picture([4])))
    assert alike(digest(deployed), book["deployed"])
    old = run.part.C.clone()
    run.part._turn(42 / 480)
    assert alike(digest(run.part.C[:7]), book["stage 2: context of classes 0 to 6"])
    # deviation: a class without an input in the epoch has the context 0 there, and keeps its old one here
    assert book["stage 2: context of classes 7 to 9"] == [0, 0]
    assert torch.equal(run.part.C[7:], old[7:])
    assert old[7:].norm() > 1


def test_cids_moving_average_of_contexts() -> None:
    run = Cid(u=0.3)
    run.epoch(0)
    run.epoch(2)
    old = run.part.C.clone()
    run.part._turn(42 / 480)
    assert alike(digest(run.part.C[:7]), RELEASED["cu 0.3: context of classes 0 to 6"])
    assert alike(digest(0.3 * old[7:]), RELEASED["cu 0.3: context of classes 7 to 9"])  # towards 0 there
    assert torch.equal(run.part.C[7:], old[7:])


def test_the_heads_weight_decay_is_a_choice() -> None:
    """Released: W' has the student's, r has none. Without it W' moves otherwise."""
    decays = []
    for decay in (True, False):
        run = Cid(decay=decay)
        run.epoch(0)
        _, steps = run.epoch(2)
        decays.append(steps["W'"])
        assert [g["weight_decay"] for g in run.it.matcher.optimizers[0].param_groups] == [0.05, 0.05 * decay, 0.0]
    assert alike(decays[0], RELEASED["stage 2: step of W'"])
    assert RELEASED["stage 2: step of W'"][0] == pytest.approx(0.101629, abs=1e-5)
    assert not close(decays[1], RELEASED["stage 2: step of W'"], rel=1e-2)


@pytest.mark.parametrize(("preset", "pair"), [
    ("cid-wrn40_4-wrn16_2", "wrn_40_4 wrn_16_2"), ("cid-wrn40_2-wrn16_2", "wrn_40_2 wrn_16_2"),
    ("cid-resnet56-resnet20", "resnet56 resnet20"), ("cid-resnet50-mobilenetv2", "ResNet50 MobileNetV2"),
    ("cid-resnet50-vgg8", "ResNet50 vgg8"),
])  # fmt: skip
def test_cids_presets_are_the_released_settings(preset: str, pair: str) -> None:
    c, theirs = resolve({"source": "data", "preset": preset}), RELEASED["settings"]
    assert [c.criterion.a, c.criterion.b, c.criterion.c, c.criterion.temperature] == RELEASED["pairs"][pair]
    (part,) = c.interventions
    assert (part.u, part.temperature, part.decay) == (theirs["cu"], theirs["net_T"], True)
    assert c.criterion.init == part.init == theirs["init_epochs"] / theirs["epochs"]
    assert part.refresh == 1 / theirs["epochs"]
    assert (c.loop.batch, c.optim.momentum, c.optim.weight_decay, c.optim.nesterov) == (
        theirs["batch_size"], theirs["momentum"], theirs["weight_decay"], True,
    )  # fmt: skip
    # the release: 0.01 for MobileNetV2
    assert c.optim.lr == (0.01 if "mobilenet" in preset else theirs["learning_rate"])
    assert c.loop.steps == theirs["epochs"] * math.ceil(50_000 / theirs["batch_size"])
    if "mobilenet" not in preset:
        it = job({"source": "data", "preset": preset})
        for epoch, rate in RELEASED["rates"]:
            it.step = (epoch - 1) * c.loop.steps // theirs["epochs"]
            assert it.matcher.rate(it.step / it.config.loop.steps) == pytest.approx(rate, rel=1e-6)
