"""MosaicKD, DFND and KDCI's Eq. 4-5 against numbers of the released code: tests/golden says how each was made.

Where we deviate on purpose, both values stand here, and the reason stands in the method's docstring.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dodistill.config.tree import resolve
from dodistill.criteria.adaptation import Adaptation
from dodistill.criteria.adaptation import Config as AdaptationConfig
from dodistill.criteria.kl import KL
from dodistill.engine import Distiller, Job
from dodistill.functional import losses
from dodistill.functional.augment import to_float
from dodistill.interventions.kdci import KDCI
from dodistill.interventions.kdci import Config as KdciConfig
from dodistill.interventions.shared.dictionary import ConfounderDictionary
from dodistill.models import Normalized
from dodistill.sources.dfnd import Dfnd
from dodistill.sources.mosaic import Mosaic
from formula import alike, close, digest, fill, gauss, images, net, wave

REL = 1e-4


def golden(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    tree = json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text())
    assert {"repository", "commit", "files", "made"} < tree.keys()
    return tree["settings"], tree["values"]


def same(mine: Tensor, theirs: list[float], rel: float = REL) -> None:
    torch.testing.assert_close(mine.detach().double().flatten(), torch.tensor(theirs).double(), rtol=rel, atol=1e-6)


def levels(n: int, size: int, phase: float) -> Tensor:
    """uint8 images [n, 3, size, size]."""
    return (images(n, 3, size, size, phase=phase) * 255).round().to(torch.uint8)


def model(phase: float, S: dict[str, Any]) -> Normalized:
    return Normalized(net(phase, S["classes"]), S["mean"], S["std"])


def job(S: dict[str, Any], unlabeled: Tensor, /, **tree: Any) -> Distiller:
    """A run of the networks that the golden numbers were made with."""
    cfg = resolve({
        "optim": {"lr": S["lr"], "momentum": S["momentum"], "weight_decay": S["weight_decay"], **tree.pop("optim", {})},
        "augment": {"pad": 0, "flip": False}, **tree,
        "loop": {"device": "cpu", "threads": 1, "precision": "fp32", "batch": 2 * S["batch"], **tree.pop("loop", {})},
    })  # fmt: skip
    return Distiller(Job(cfg, model(0.5, S), model(1.5, S), (3, S["size"], S["size"]), unlabeled))


def student_step(run: Distiller, x: Tensor) -> dict[str, float]:
    """One step of the student on images x, by the engine's objective, rate and optimisers; the loss terms."""
    terms = run.matcher.step(run.acquirer.answered(x), None, None, run.step)
    return {k.removeprefix("match/"): float(v) for k, v in terms.items()}


# -------------------------------------------------------------------------------------------------------- MosaicKD


class Replayed:
    """A run of `mosaic` that is given the draws of the release's loop, step by step."""

    def __init__(self, **settings: Any) -> None:
        self.S, self.values = golden("mosaic")
        S = self.S
        weights = {k: S[k] for k in ("local", "align", "adv", "balance", "lr_g", "anneal", "every", "batch", "latent")}
        source = {"name": "mosaic", **weights, "width": S["width"], "base": 4 * S["width"], "patches": S["patches"]}
        self.job = job(
            S, levels(24, S["size"], 60), source=source | {"pad": 0, "flip": False} | settings,
            criterion={"name": "kl", "temperature": S["T"]}, optim={"floor": 0.0},
            loop={"steps": S["anneal"] * S["every"]},
        )  # fmt: skip
        assert isinstance(self.job.acquirer.source, Mosaic)
        self.source = self.job.acquirer.source
        fill(self.source.G, 2.5)
        fill(self.source.D, 3.5)
        self.first = {k: [p.detach().clone() for p in m.parameters()] for k, m in self.nets().items()}

    def nets(self) -> dict[str, nn.Module]:
        return {"G": self.source.G, "D": self.source.D, "S": self.job.matcher.student}

    def moved(self, name: str) -> list[float]:
        return digest([p.detach() - q for p, q in zip(self.nets()[name].parameters(), self.first[name])])

    def acquire(self, r: int) -> tuple[list[Tensor], Tensor]:
        """Acquisition r: the images [2 B, C, H, W] of each of the student's steps as floats, and as handed over."""
        S, source = self.S, self.source
        zs = [gauss(S["batch"], S["latent"], phase=10 + 6 * r + k) for k in range(6)]
        us = [levels(S["batch"], S["size"], p) for p in (30 + r, *range(40 + 5 * r, 45 + 5 * r))]
        z, u = iter(zs), iter(us)
        source._z = lambda: next(z)  # type: ignore[method-assign]
        source.ood.draw = lambda n, generator: next(u)  # type: ignore[method-assign]
        got = source.acquire(self.job.matcher.student.eval(), r).images
        with torch.no_grad():
            return [torch.cat([source.G(a), to_float(b)]) for a, b in zip(zs[1:], us[1:])], got


def test_mosaic_two_iterations_of_the_released_loop() -> None:
    """Terms, the steps of D and G, and the student's steps on [made; out-of-domain], all with rates and momenta."""
    it = Replayed()
    kd = []
    for r, terms in enumerate(it.values["rounds"]):
        batches, handed = it.acquire(r)
        for name in ("d", "local", "align", "adv", "balance"):
            assert close(it.source.terms[name].item(), terms[name], REL), (r, name)
        assert close(sum(it.source.terms[k].item() for k in ("local", "align", "adv", "balance")), terms["g"], REL)
        assert alike(it.moved("D"), it.values["D moved"][r], REL)
        assert alike(it.moved("G"), it.values["G moved"][r], REL)
        # on purpose: made images reach the student in 256 levels
        assert (to_float(handed) - torch.cat(batches)).abs().max() < 0.501 / 255
        it.job.step = r * it.S["every"]  # on purpose: our rate falls within these five steps, see the next test
        kd += [student_step(it.job, x)["kd"] for x in batches]
    same(torch.tensor(kd), it.values["kd"])
    assert alike(it.moved("S"), it.values["S moved"], REL)
    # on purpose: the made images of G's step leave no trace in the student's running statistics
    bn = it.job.matcher.student.model.bn1  # type: ignore[union-attr]
    ours, theirs = (it.values[f"S running, {how}"] for how in ("without the batches of G's steps", "as released"))
    assert isinstance(bn, nn.BatchNorm2d)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    same(bn.running_mean, ours["bn1 mean"])
    same(bn.running_var, ours["bn1 var"])
    assert not torch.allclose(torch.tensor(ours["bn1 mean"]), torch.tensor(theirs["bn1 mean"]), rtol=0.1)


def test_mosaic_plays_against_the_batch_statistics_of_the_student() -> None:
    theirs = golden("mosaic")[1]["rounds"][0]["adv"]
    played = {}
    for how in ("batch", "running"):
        it = Replayed(student_bn=how)
        it.acquire(0)
        played[how] = it.source.terms["adv"].item()
    assert close(played["batch"], theirs, REL)
    assert not close(played["running"], theirs, 0.1)
    assert Replayed().source.config.student_bn == "batch"


def test_mosaic_rates() -> None:
    it = Replayed()
    S, ours, students = it.S, [], []
    for r in range(S["anneal"]):
        it.acquire(r)
        ours.append(it.source.opt_G.param_groups[0]["lr"])
        assert ours[-1] == it.source.opt_D.param_groups[0]["lr"]
    assert ours == pytest.approx(it.values["rates of G and D"], rel=REL)
    for it.job.step in range(S["anneal"] * S["every"]):
        students.append(it.job.matcher.rate(it.job.step / it.job.config.loop.steps))
    theirs = it.values["rates of S"]  # one rate for the five steps of an acquisition
    assert students[:: S["every"]] == pytest.approx(theirs[:: S["every"]], rel=REL)
    assert students[4] == pytest.approx(0.1 * 0.904508, rel=REL)  # on purpose: ours falls with every step
    assert theirs[4] == 0.1


def test_mosaic_subset() -> None:
    S, values = golden("mosaic")
    it = Replayed(n=10)
    kept = it.source._look()
    assert it.source.ood.keep.tolist() == values["subset"]
    assert torch.equal(kept.images[:], levels(24, S["size"], 60)[values["subset"]])


# ------------------------------------------------------------------------------------------------------------ DFND


def sampler(S: dict[str, Any], mean: list[float], std: list[float]) -> list[int]:
    x = levels(S["images"], S["size"], 5)
    run = job(S | {"mean": mean, "std": std}, x, source={"name": "dfnd", "n": S["n"], "chunk": 16})
    assert isinstance(run.acquirer.source, Dfnd)
    kept = run.acquirer.source.acquire(run.matcher.student, 0).images
    return [next(i for i, image in enumerate(x) if torch.equal(image, k)) for k in kept]


def test_dfnd_selection() -> None:
    S, values = golden("dfnd")
    with torch.no_grad():
        t = model(0.5, S)(to_float(levels(S["images"], S["size"], 5)))
    same(nn.functional.cross_entropy(t, t.argmax(1), reduction="none"), values["v"])
    assert sampler(S, S["mean"], S["std"]) == values["selected"]
    # on purpose: the images pass the teacher's normalisation; the release takes ImageNet's for every teacher
    theirs = sampler(S, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert theirs == values["selected in ImageNet's constants, as released"] != values["selected"]


@pytest.mark.parametrize("K", [10, 100])
def test_dfnd_terms(K: int) -> None:
    S, values = golden("dfnd")
    values = values[f"{K} classes"]
    criterion = Adaptation(K, S["T"], values["teacher_accuracy"], 1.0, S["lr_a"])
    with torch.no_grad():
        criterion.a.copy_(2 * wave(K, K - 1, phase=7))
    s, t = (3 * wave(S["batch"], K, phase=8)).requires_grad_(), 4 * wave(S["batch"], K, phase=9)
    Q = losses.noisy_transition(criterion.a, values["teacher_accuracy"])
    same(Q[0, :12], values["first row of Q"])
    same(Q[-1, -12:], values["last row of Q"])
    assert alike(digest(Q), values["Q"], REL)
    terms = criterion(s, t)
    assert close(terms["kd"].item(), values["kd"], REL)
    assert close(terms["noisy"].item(), values["noisy"], REL)
    of_s, of_a = torch.autograd.grad(terms["kd"] + terms["noisy"], [s, criterion.a])
    assert alike(digest(of_s), values["gradient of s"], REL)
    assert alike(digest(of_a), values["gradient of a"], REL)


def test_dfnd_three_steps() -> None:
    """SGD for the student and Adam for a, as the release has them."""
    S, values = golden("dfnd")
    values = values["training"]
    paper = resolve({"source": "dfnd", "preset": "paper"}).to_tree()
    assert {k: paper["optim"][k] for k in ("lr", "momentum", "weight_decay")} == {
        k: S[k] for k in ("lr", "momentum", "weight_decay")
    }
    run = job(
        S, levels(S["images"], S["size"], 5), source="dfnd", preset="paper",
        criterion={"teacher_accuracy": S["teacher_accuracy"]}, pool={"capacity": 64},
    )  # fmt: skip
    assert isinstance(run.matcher.criterion, Adaptation)
    first = [p.detach().clone() for p in run.matcher.student.parameters()]
    got = [student_step(run, to_float(levels(S["batch"], S["size"], 20 + k))) for k in range(S["steps"])]
    same(torch.tensor([sum(terms.values()) for terms in got]), values["loss"])
    assert alike(
        digest([p.detach() - q for p, q in zip(run.matcher.student.parameters(), first)]), values["S moved"], REL
    )
    assert alike(digest(run.matcher.criterion.a), values["a"], REL)
    same(run.matcher.criterion.a[0], values["first row of a"])


def test_dfnd_schedule() -> None:
    """The constants of the paper, 80 000 steps of 256; the released loop stops one epoch short and rounds to epochs."""
    S, values = golden("dfnd")
    epoch, rates = values["steps of an epoch"], values["rates by epoch"]
    run = job(S, levels(S["images"], S["size"], 5), source="dfnd", preset="paper", pool={"capacity": 64})
    steps = resolve({"source": "dfnd", "preset": "paper"}).loop.steps
    ours = []
    for run.step in (0, 31_999, 32_000, 63_999, 64_000, steps - 1):
        ours.append(run.matcher.rate(run.step / run.config.loop.steps))
    assert ours == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    falls = [i * epoch for i in range(1, len(rates)) if rates[i] != rates[i - 1]]
    assert (steps, len(rates) * epoch) == (80_000, 77_352)
    assert falls == [30_472, 63_288]
    assert sorted(set(rates)) == pytest.approx([0.001, 0.01, 0.1])


def test_the_default_accuracy_of_the_teacher_is_a_guess() -> None:
    """The release writes in what was measured; nothing measures it here."""
    S, values = golden("dfnd")
    assert AdaptationConfig().teacher_accuracy == 0.95
    assert (S["teacher_accuracy"], values["100 classes"]["teacher_accuracy"]) == (0.9523, 0.7774)
    s, t = 3 * wave(S["batch"], 100, phase=8), 4 * wave(S["batch"], 100, phase=9)
    at = [losses.noisy_adaptation(s, t, 2 * wave(100, 99, phase=7), q).item() for q in (0.7774, 0.95)]
    assert close(at[0], values["100 classes"]["noisy"], REL)
    assert at == pytest.approx([4.588847, 4.600798], rel=REL)


# ------------------------------------------------------------------------------------------------------------ KDCI


def prior(**settings: Any) -> tuple[KDCI, ConfounderDictionary, Tensor, Tensor]:
    """The module with the weights that CCIM's had, a dictionary with its Z and P, s and t."""
    S, _ = golden("kdci")
    K, N = S["classes"], S["clusters"]
    kdci = KDCI(KdciConfig(width=S["width"], **settings), K, K, False, torch.Generator().manual_seed(0))
    assert kdci.attention is not None
    shell = nn.ModuleDict({
        "query": nn.Linear(K, S["width"], bias=False), "key": nn.Linear(K, S["width"], bias=False),
        "w_t": nn.Linear(S["width"], 1, bias=False),
    })  # fmt: skip
    fill(shell, 4.0)
    with torch.no_grad():
        for mine, name in ((kdci.attention.W_q, "query"), (kdci.attention.W_k, "key"), (kdci.attention.W_t, "w_t")):
            mine.copy_(shell[name].weight)
    dictionary = ConfounderDictionary(N, K, torch.Generator().manual_seed(0))
    dictionary.Z.copy_(3 * wave(N, K, phase=1))
    P = torch.arange(1.0, N + 1)
    dictionary.P.copy_(P / P.sum())
    dictionary.built = True
    return kdci, dictionary, (2 * wave(S["batch"], K, phase=2)).requires_grad_(), 4 * wave(S["batch"], K, phase=3)


def test_kdci_prior_is_that_of_its_ancestor() -> None:
    _, values = golden("kdci")
    kdci, dictionary, s, _ = prior()
    lam = kdci.lam(s, dictionary)
    same(lam[0], values["lam, first row"])
    assert alike(digest(lam), values["lam"], REL)
    F = kdci.F(lam, dictionary)
    same(F[0], values["F, first row"])
    assert alike(digest(F), values["F"], REL)
    # lam_i P_i do not sum to 1, there as here; with `renormalize` they do
    weight = (lam[0] * dictionary.P).sum().item()
    assert close(weight, values["sum of lam P, first row"], REL)
    full = prior(renormalize=True)[0].F(lam, dictionary)
    torch.testing.assert_close(full[0] * weight, F[0])


def test_kdci_loss_and_its_gradients() -> None:
    """T^2 KL(t || s + F): the compensation comes before the temperature, and the gradient also passes through lam."""
    S, values = golden("kdci")
    kdci, dictionary, s, t = prior()
    assert kdci.attention is not None
    loss = KL(S["T"])(kdci.compensate(s, dictionary), t)["kd"]
    assert close(loss.item(), values["kd"], REL)
    assert close(KL(S["T"])(s, t)["kd"].item(), values["kd without F"], REL)
    assert not close(values["kd"], values["kd without F"], REL)
    a = kdci.attention
    grads = torch.autograd.grad(loss, [s, a.W_q, a.W_k, a.W_t])
    for name, grad in zip(("s", "W_q", "W_k", "W_t"), grads):
        assert alike(digest(grad), values[f"gradient of {name}"], REL), name


def test_kdci_dictionary_where_every_clustering_agrees() -> None:
    _, values = golden("kdci")
    group = torch.arange(60) * 7 % 10 % 4
    M = 6 * wave(4, 40, phase=6)[group] + 0.5 * wave(60, 40, phase=7)
    dictionary = ConfounderDictionary(4, 40, torch.Generator().manual_seed(0))
    assert dictionary.basis is not None  # PCA to 32 assigns, the centres are of the logits themselves
    dictionary.rebuild(M)
    order = sorted(range(4), key=lambda i: (round(dictionary.P[i].item(), 3), dictionary.Z[i].mean().item()))
    Z = dictionary.Z[order]
    same(dictionary.P[order], values["shares"])
    assert alike(digest(Z), values["prototypes"], REL)
    same(Z[:, 0], values["prototypes, first entries"])
    same(Z.mean(1), values["prototypes, mean"])
