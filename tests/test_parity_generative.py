"""Fast, CMI, DAFL and DeepInversion beside the released code, by numbers.

tests/golden/*.json hold what the released code computes on the inputs and weights of tests/formula.py: each loss term
with its weight, and what each update does. Random draws are replaced on both sides by `formula.Draws`, random crops and
flips by fixed ones. Where ours deviates on purpose, the test states both numbers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dodistill.commands.compare import cells, read_recipe
from dodistill.config import registry
from dodistill.config.tree import resolve
from dodistill.core.context import Context
from dodistill.functional import losses
from dodistill.functional.augment import View, to_uint8
from dodistill.models import Normalized
from dodistill.models.normalized import NORMALISATION
from dodistill.models.taps import batchnorm_inputs
from dodistill.models.teacher import Teacher
from dodistill.sources import cmi
from dodistill.sources.shared import fresh
from dodistill.sources.shared.generators import ConvGenerator
from formula import Draws, alike, close, digest, fill, gauss, images, labels, net, wave

GOLDEN = Path(__file__).parent / "golden"
METHODS = ("cmi", "dafl", "deepinv", "fast")
SIZE = (3, 8, 8)
LOGITS_T, LOGITS_S = 6 * wave(8, 10, phase=1), 6 * wave(8, 10, phase=2)


def released(method: str) -> dict[str, Any]:
    """Name -> what the released code computes."""
    values = json.loads((GOLDEN / f"{method}.json").read_text())["values"]
    return {name: entry["value"] for name, entry in values.items()}


def agree(method: str, group: str, mine: dict[str, Any]) -> None:
    """Each number of ours with the released one "group: name"; `mine` must have all of the group.

    Lists of terms have a comma in their name, and all numbers of them are compared; other pairs are digests.
    """
    theirs = {k.partition(": ")[2]: v for k, v in released(method).items() if k.partition(": ")[0] == group}
    assert sorted(mine) == sorted(theirs), group
    for name, value in mine.items():
        same = close if isinstance(value, float) or "," in name else alike
        assert same(value, theirs[name]), f"{group}: {name}: {value} is not the released {theirs[name]}"


class Still(View):
    """Shows the images as they are."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Draws:
    out = Draws()
    monkeypatch.setattr(torch, "randn", out.randn)
    monkeypatch.setattr(torch, "randint", out.randint)
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
    monkeypatch.setattr(cmi, "resized_crop", lambda x, *_, **__: x.roll(1, 3))
    monkeypatch.setattr(fresh, "to_uint8", lambda x: x.detach())
    return out


def wrapped(phase: float, mean: Any = None, std: Any = None, classes: int = 10) -> nn.Module:
    """`formula.net` behind a normalisation, CIFAR-10's unless another is given."""
    known = NORMALISATION["cifar10"]
    return Normalized(net(phase, classes), mean or known[0], std or known[1]).eval()


def build(
    name: str, mean: Any = None, std: Any = None, shape: tuple[int, int, int] = SIZE, classes: int = 10, **more: Any
) -> tuple[Any, nn.Module]:
    """The source with teacher net(0), and the student net(0.3)."""
    teacher = Teacher(wrapped(0, mean, std, classes), shape)
    context = Context(teacher, torch.device("cpu"), view=Still())
    source = registry.config("source", name)(**more).build(context)  # type: ignore[attr-defined]
    return source, wrapped(0.3, mean, std)


def terms(source: Any, *names: str) -> list[float]:
    return [source.terms[n].item() if n in source.terms else 0.0 for n in names]


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def moved(module: nn.Module, start: list[Tensor], matrices: bool = False) -> list[float]:
    return digest([p - q for p, q in zip(module.parameters(), start) if p.dim() > 1 or not matrices])


def gradients(module: nn.Module) -> list[float]:
    return digest([p.grad for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("method", METHODS)
def test_every_number_says_where_it_is_from(method: str) -> None:
    whole = json.loads((GOLDEN / f"{method}.json").read_text())
    assert whole["method"] == method
    assert "formula.py" in whole["inputs"]
    for origin in whole["released"].values():
        assert set(origin) == {"repository", "commit", "file"}
        assert len(origin["commit"]) == 40
    for entry in whole["values"].values():
        assert set(entry) == {"value", "source", "function", "how"}
        assert entry["source"] in whole["released"]
        assert len(entry["how"]) > 5


# ------------------------------------------------------------------------------------------------------ fast

FAST: dict[str, Any] = {
    "latent": 6, "width": 4, "batch": 16, "K": 3, "lr_g": 2e-3, "lr_z": 0.01, "adv": 1.1, "bn": 10.0, "oh": 0.4,
    "bn_momentum": 0.9, "warmup": 0,
}  # fmt: skip


def test_generator() -> None:
    g = fill(ConvGenerator(6, SIZE, 4))
    assert alike(digest(g(gauss(16, 6, phase=96)) - 0.5), released("fast")["images"])


def test_fast_by_first_order_maml(draws: Draws) -> None:
    """Three acquisitions: inner Adam on copy and z, the sum of the inner gradients, meta Adam at K lr_g, averages."""
    source, student = build("fast", **FAST)
    start = weights(fill(source.meta))
    for draws.call in range(3):
        x = source.acquire(student, draws.call).images
        mine = {
            "bn, oh, adv": terms(source, "bn", "ce", "adv"),
            "images": digest(x - 0.5),
            "meta-gradient": gradients(source.meta),
            "meta step": moved(source.meta, start),
            "statistics": digest([t for pair in source.ema for t in pair]),
        }
        agree("fast", f"call {draws.call}", mine)


@pytest.mark.parametrize(("meta", "name"), [("reptile", "reptile"), ("none", "no meta")])
def test_fast_by_reptile_and_without(meta: str, name: str, draws: Draws) -> None:
    source, student = build("fast", **FAST, meta=meta)
    start = weights(fill(source.meta))
    for draws.call in range(2):
        x = source.acquire(student, draws.call).images
        mine = {"bn, oh, adv": terms(source, "bn", "ce", "adv"), "images": digest(x - 0.5)}
        if meta == "reptile":
            mine["meta-gradient"] = gradients(source.meta)
        agree("fast", f"{name}, call {draws.call}", mine | {"step": moved(source.meta, start)})


def test_fast_sets_in_at_these_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warm-up of 20: the reset at call 140 as released; the adversarial term at call 22, released at call 20."""
    source, student = build("fast", **FAST | {"K": 1, "warmup": 20, "batch": 4})
    call, resets = 0, list[int]()
    monkeypatch.setattr(source.meta, "reset_first_layers", lambda _g: resets.append(call))
    asked = list[int]()
    student.register_forward_hook(lambda *_: asked.append(call))
    for call in (*range(18, 25), *range(137, 143)):
        source.acquire(student, call - 1)
    theirs = released("fast")
    assert resets == [theirs["reset at call"]] == [140]
    assert (theirs["adversarial from call"], asked[0]) == (20, 22)


def test_matching_at_temperature_20() -> None:
    assert close(losses.kl(LOGITS_S, LOGITS_T, 20.0).item(), released("fast")["kd"])


@pytest.mark.parametrize("K", [10, 5, 2])
@pytest.mark.parametrize(
    ("preset", "tags"), [("wrn", ["wrn", "wrnS401", "wrnS162"]), ("vgg11", ["vgg"]), ("resnet34", ["r34"])]
)
def test_fast_presets(preset: str, tags: list[str], K: int) -> None:
    c = resolve({"source": "fast", "preset": preset if K == 10 else f"{preset}-{K}"})
    s = c.source
    assert (c.optim.floor, c.loop.steps, s.every, s.reset_at) == (2e-4, 80_000, 400, 120)
    mine = [s.K, s.lr_g, s.lr_z, s.adv, s.oh, s.bn, s.bn_momentum, s.warmup, c.loop.batch, c.optim.lr]
    for tag in tags:
        assert [*mine, c.criterion.temperature] == released("fast")["script"][f"{tag}-{K}"]
    assert s.batch == c.loop.batch  # --batch_size stands for both


@pytest.mark.parametrize("table", ["table1", "table2", "table4", "table5", "figure4"])
def test_kdcis_tables_have_fast_10(table: str, tmp_path: Path) -> None:
    """KDCI's Fast row is Fast-10 to the digit, for every pair."""
    recipe = read_recipe(Path(__file__).parents[1] / "recipes" / f"{table}.yaml")
    found = {(s.K, s.lr_g, s.lr_z) for c in cells(recipe, tmp_path) if (s := c.config.source).name == "fast"}
    assert found == {(10, 2e-3, 0.01)}


# ------------------------------------------------------------------------------------------------------- cmi

CMI: dict[str, Any] = {
    "latent": 6, "width": 4, "batch": 16, "iterations": 3, "lr_g": 1e-3, "adv": 0.5, "bn": 1.0, "oh": 1.0, "cr": 0.8,
    "tau": 0.1, "bank": 64, "negatives": 8, "head": 5,
}  # fmt: skip


def test_cmi(draws: Draws) -> None:
    """Three acquisitions: reset of the generator, its Adam with z, the contrast with bank and batch, head, bank."""
    source, student = build("cmi", **CMI)
    head = weights(fill(source.head))
    for draws.call in range(3):
        x = source.acquire(student, draws.call + 1).images  # ours has no adversarial term in acquisition 0
        mine = {
            "bn, oh, adv": terms(source, "bn", "ce", "adv"),
            "cr": source.terms["cr"].item(),
            "images": digest(x - 0.5),
            "generator": digest([p for p in source.G.parameters() if p.dim() > 1]),
            "head's step": moved(source.head, head),
            "bank": digest(source.bank.rows[: len(source.bank)]),
        }
        agree("cmi", f"call {draws.call}", mine)


def test_cmi_where_the_bank_is_exactly_full(draws: Draws) -> None:
    """The released bank reads as empty then, and the loss is not a number; ours goes on."""
    source, student = build("cmi", **CMI | {"bank": 32})
    fill(source.head)
    for draws.call in range(3):
        source.acquire(student, draws.call + 1)
    theirs = released("cmi")
    assert theirs["bank of 32, call 2: cr"] is None
    assert close(source.terms["cr"].item(), theirs["call 2: cr"])  # as with a larger bank: 8 rows of 32


def test_cmi_with_other_features(draws: Draws) -> None:
    source, student = build("cmi", **CMI, layers=("conv2",))
    fill(source.head)
    for draws.call in range(2):
        source.acquire(student, draws.call + 1)
    agree("cmi", "feature_layers, call 1", {"cr": source.terms["cr"].item()})


def test_cmi_of_fasts_repository(draws: Draws) -> None:
    source, student = build("cmi", **CMI | {"tau": 0.2})
    fill(source.head)
    for draws.call in range(2):
        x = source.acquire(student, draws.call + 1).images
    agree("cmi", "fast's copy, call 1", {"cr": source.terms["cr"].item(), "images": digest(x - 0.5)})


@pytest.mark.parametrize(
    ("preset", "origin", "iterations"),
    [("cmi", "", 200), ("cmi500", "", 500), ("toolbox", "fast ", 200), ("toolbox500", "fast ", 500)],
)
def test_cmi_presets(preset: str, origin: str, iterations: int) -> None:
    c = resolve({"source": "cmi", "preset": preset})
    s, theirs = c.source, released("cmi")
    mine = [200, s.lr_g, s.adv, s.bn, s.oh, s.cr, s.tau, s.every, c.loop.batch, c.optim.lr, c.criterion.temperature]
    assert [*mine, s.batch] == theirs[f"{origin}script"]
    assert c.optim.floor == theirs[f"{origin}floor"]
    assert s.iterations == iterations


# ------------------------------------------------------------------------------------------------------ dafl

TOOLBOX: dict[str, Any] = {
    "latent": 6, "width": 4, "batch": 16, "g_steps": 2, "fresh": 1, "lr_g": 1e-3, "oh": 1.0, "ie": 20.0, "act": 1e-3,
}  # fmt: skip
HUAWEI: dict[str, Any] = {
    "latent": 6, "width": 64, "batch": 16, "g_steps": 1, "fresh": 0, "lr_g": 0.02, "betas": (0.9, 0.999), "eps": 0.8,
    "output": "standardised", "log": "log10", "oh": 0.05, "ie": 5.0, "act": 0.01,
}  # fmt: skip


def test_dafl_of_the_toolbox(draws: Draws) -> None:
    source, student = build("dafl", **TOOLBOX)
    start = weights(fill(source.net))
    for draws.call in range(2):
        x = source.acquire(student, draws.call).images
        mine = {
            "oh, ie, act": terms(source, "oh", "ie", "act"),
            "gradient": gradients(source.net),
            "step": moved(source.net, start),
            "sample": digest(x - 0.5),
        }
        agree("dafl", f"toolbox, 10 classes, call {draws.call}", mine)
    draws.call = 0
    source, student = build("dafl", classes=100, **TOOLBOX)
    fill(source.net)
    source.acquire(student, 0)
    agree("dafl", "toolbox, 100 classes, call 0", {"oh, ie, act": terms(source, "oh", "ie", "act")})


def test_dafl_of_cmis_repository(draws: Draws) -> None:
    """A first map of 4 ngf channels. The student's batches are made in eval mode there, in train mode here."""
    source, student = build("dafl", **TOOLBOX, base=16)
    fill(source.net)
    x = source.acquire(student, 0).images
    theirs = released("dafl")
    assert close(terms(source, "oh", "ie", "act"), theirs["cmi's copy: oh, ie, act"])
    assert alike(digest(x - 0.5), theirs["cmi's copy: sample in train mode"])
    assert digest(x - 0.5)[0] == pytest.approx(10.074, abs=1e-3)
    assert theirs["cmi's copy: sample"][0] == pytest.approx(13.066, abs=1e-3)


def test_dafl_of_huawei(draws: Draws) -> None:
    """Two steps of generator and student on the same batch. Within valid pixels nothing is clipped (deviation 0.1)."""
    source, student = build("dafl", [0.5], [0.1], **HUAWEI)
    start = weights(fill(source.net))
    sgd = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for draws.call in range(2):
        got = source.acquire(student.eval(), draws.call)
        before = weights(student)
        loss = losses.kl(student.train()(got.images), got.logits)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        mine = {
            "images": digest((got.images - 0.5) / 0.1),
            "oh, ie, act": terms(source, "oh", "ie", "act"),
            "kd": loss.item(),
            "gradient": gradients(source.net),
            "step": moved(source.net, start, matrices=True),
            "student's step": moved(student, before),
        }
        agree("dafl", f"huawei, step {draws.call}", mine)


def test_dafl_clips_what_huawei_leaves(draws: Draws) -> None:
    """In CIFAR-10's normalisation pixels lie in [-2.4, 2.5] or so: what is beyond stays there, and is cut off here."""
    source, student = build("dafl", **HUAWEI)
    fill(source.net)
    x = source.acquire(student, 0).images
    assert x.min() >= 0
    assert x.max() <= 1
    u = (x - source.context.teacher.model.mean) / source.context.teacher.model.std
    theirs = released("dafl")["huawei, step 0: images"][0]
    assert (digest(u)[0], theirs) == pytest.approx((55.412, 55.424), abs=1e-3)


def test_dafl_matches_at_temperature_1() -> None:
    assert close(losses.kl(LOGITS_S, LOGITS_T).item(), released("dafl")["kd"])


def test_huaweis_rate() -> None:
    c = resolve({"source": "dafl", "preset": "huawei"})
    assert c.loop.steps == 2000 * 120
    for epoch, rate in released("dafl")["huawei: student's rate"].items():
        passed = sum(int(epoch) / 2000 >= m for m in c.optim.milestones)
        assert c.optim.lr * 0.1**passed == pytest.approx(rate)


# --------------------------------------------------------------------------------------------------- deepinv


def inverted(source: Any, student: nn.Module) -> tuple[list[float], Tensor]:
    x = source.acquire(student, 0).images
    found = terms(source, "ce", "bn", "js", "tv", "l2")
    return found, x


@pytest.mark.parametrize("steps", [1, 3])
def test_deepinv_of_the_toolbox(steps: int, draws: Draws, monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms and Adam in normalised coordinates with clipping. The toolbox sorts its labels; ours adds 1 to -JS."""
    given = draws.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: v.sort().values if len(v := given(*a, **k)) > 2 else v)
    source, student = build(
        "deepinv", batch=16, iterations=steps, lr=0.5, adv=1.0, bn=10.0, oh=1.0, tv=1e-3, l2=1e-5, js="published",
        best=False,
    )  # fmt: skip
    found, x = inverted(source, student)
    found[2] -= 1
    agree("deepinv", f"toolbox, step {steps}", {"ce, bn, js, tv, l2": found, "images": digest(x - 0.5)})


@pytest.mark.parametrize("steps", [1, 3])
def test_deepinv_of_nvidia(steps: int, draws: Draws) -> None:
    source, student = build(
        "deepinv", [0.5], [0.05], (3, 32, 32), batch=16, iterations=steps, lr=0.05, betas=(0.9, 0.999), adv=10.0,
        bn=10.0, tv=0.01, tv_norm="l2", l2=1e-3, js="published", jitter=2, flip=False, clip=False, best=False,
    )  # fmt: skip
    found, x = inverted(source, student)
    mine = {"ce, bn, js, tv, l2": found, "loss": sum(found), "pixels": digest((x - 0.5) / 0.05)}
    agree("deepinv", f"nvidia, step {steps}", mine)


def test_total_variation() -> None:
    u = gauss(16, *SIZE, phase=16 * math.prod(SIZE))
    assert close(losses.total_variation(u, 1).item(), released("deepinv")["tv, l1"])


@pytest.mark.parametrize(("classes", "name", "true"), [(10, "js", 0.11379), (100, "js, 100 classes", 0.13659)])
def test_jensen_shannon_as_published_and_as_written(classes: int, name: str, true: float) -> None:
    """The default is the divergence of the paper, not what the released code computes."""
    s, t = 6 * wave(8, classes, phase=2), 6 * wave(8, classes, phase=1)
    theirs = released("deepinv")[name]
    assert close(losses.js_published(s, t, 3.0).item(), theirs)
    assert theirs == pytest.approx({10: 0.13439, 100: 0.00981}[classes], abs=1e-5)
    assert losses.js(s, t, 3.0).item() == pytest.approx(true, abs=1e-5)


def test_deepinv_of_fasts_repository(draws: Draws) -> None:
    """It takes 0.001 of the student's BatchNorm loss from the teacher's; ours has the teacher's alone."""
    source, student = build("deepinv", batch=16)
    u = draws.randn(16, *SIZE).roll((1, -1), (2, 3)).flip(3)
    found = []
    for model in (source.context.teacher, student):
        with batchnorm_inputs(model) as taps:
            model(source.mean + source.std * u)
            found.append(10 * losses.bn_statistics(taps, taps.modules).item())
    theirs = released("deepinv")
    assert close(found[1], theirs["fast's copy: student's bn"])
    assert close(found[0] - 0.001 * found[1], theirs["fast's copy: bn"])
    assert (found[0], theirs["fast's copy: bn"]) == pytest.approx((86.805, 86.712), abs=1e-3)


def test_deepinv_toolbox_is_cmis_copy() -> None:
    """The repositories of CMI and Fast differ in the weight of the total variation and in the last rate."""
    c = resolve({"source": "deepinv", "preset": "toolbox"})
    theirs = released("deepinv")
    assert [c.source.tv, c.optim.floor] == theirs["tv, floor"] == [1e-3, 0.0]
    assert theirs["fast tv, floor"] == [0.0, 2e-4]
    assert resolve({"source": "dafl", "preset": "toolbox"}).optim.floor == 2e-4  # that one is Fast's


# ------------------------------------------------------------------------------------------------------ pool


def test_labels_of_the_formula() -> None:
    assert labels(5).tolist() == [1, 4, 7, 0, 3]


def test_the_pool_rounds_where_the_toolbox_cuts_off() -> None:
    x = images(2, *SIZE)
    theirs = released("fast")["pool"]
    assert to_uint8(x, truncate=True).int().sum().item() == theirs
    assert to_uint8(x).int().sum().item() == pytest.approx(theirs + x.numel() / 2, abs=20)
