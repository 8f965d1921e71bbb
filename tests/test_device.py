"""Where tensors lie: all runs, and goes on from a checkpoint, on a device that is not the CPU (see `pretend`)."""

from __future__ import annotations

import contextlib
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dodistill import api, engine
from dodistill.commands.cli import main
from dodistill.config import registry
from dodistill.core.watch import Watcher
from dodistill.data.images import Images
from dodistill.engine import Distiller, Job
from dodistill.engine.teach import Teach, teach
from dodistill.evaluation.probe import linear_probe
from helpers import SHAPE, SOURCES, config, fitting, same, student
from pretend import THERE, Stream, There, bare, pretended


def test_it_finds_what_a_gpu_would(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch):
        there, here = torch.arange(6.0, device=THERE), torch.arange(6.0)
        assert isinstance(there, There)
        assert isinstance(there * here.sum(), There)  # a number may come from anywhere
        assert torch.equal((there + 1).cpu(), here + 1)
        assert isinstance(there[here.long()], There)
        stream = Stream().manual_seed(1)
        assert isinstance(torch.rand(3, generator=stream, device=stream.device), There)
        with pytest.raises(RuntimeError, match="on one device"):
            there + here
        with pytest.raises(RuntimeError, match="indices should be"):
            here[there.long()]
        with pytest.raises(RuntimeError, match="its generator does not"):
            torch.rand(3, generator=stream)
        with pytest.raises(RuntimeError, match="its generator does not"):
            torch.rand(3, generator=torch.Generator(), device=THERE)


def run(
    teacher: nn.Module, digits: Images, test: Images, source: str, intervention: str, /, **more: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two steps of four, saved and loaded as from a file, and to the end; the last state and evaluation."""
    labels = digits.y[:200] if source == "data" and digits.y is not None else None

    def made() -> Distiller:
        cfg = config(source, intervention, steps=4, **more)
        assert test.y is not None
        shown = engine.Test(test.x[:40], test.y[:40])
        its = fitting(source, teacher)
        return Distiller(Job(cfg, its, student(), SHAPE, digits.x[:200], test=shown, labels=labels))

    first = made()
    while first.step < 2:
        first.acquire(Watcher()) if first.acquirer.due(first.step) else first.match()
    state, pool = bare(first.state_dict()), bare(first.acquirer.pool_state())
    second = made()
    second.load_state_dict(state, pool)
    assert second.run()
    second.scorer.delivered()
    return bare(second.state_dict()), second.scorer.last


CASES: list[tuple[str, str, dict[str, Any]]] = [(s, "cid+kdci+stratified", {}) for s in sorted(SOURCES)]
CASES += [("data", "none", {"criterion": c, "optim": {"lr": 1e-3}}) for c in registry.names("criterion")]
CASES += [
    ("pre", "none", {"update": {"name": "replay"}, "replay": {"name": "bank", "size": 8}}),
    ("pre", "none", {"update": {"name": "retain"}, "replay": {"name": "ema_generator", "size": 8}}),
    ("pre", "none", {"update": {"name": "retain", "order": "first_order"}, "replay": {
        "name": "generative", "size": 8, "new": 8, "latent": 4, "width": 4}}),
    ("fast", "kdci", {"pool": {"eviction": "reservoir", "capacity": 64}}),
    ("fast", "kdci", {"augment": {"mix": "cutmix"}}),
    ("fast", "kdci", {
        "augment": {"mix": "cutmix", "views": 1}, "source": {"extra": 1, "batch": 16}, "pool": {"capacity": 40}}),
    ("fast", "kdci", {"dictionary": {"of": "batch"}}),
    ("fast", "kdci", {"dictionary": {"of": "pool", "random": True}}),
    ("dfnd", "stratified", {"stratified": {"by": "cluster"}, "source": {"select": "balanced"}}),
    ("mosaic", "none", {"source": {"n": 50}}),
    ("adversarial", "none", {"source": {"ema": 0.9}}),
    ("cmi", "none", {"source": {"bank_dtype": "bfloat16"}}),
    ("fast_imagenet", "none", {"source": {"z_meta": "reptile"}}),
    ("fast_imagenet", "none", {"source": {"per_class": 4, "bank_dtype": "bfloat16"}}),
    ("deepinv", "none", {"source": {"low": 2, "lr_warmup": 1, "schedule": "cosine", "adv": 0.2, "js": "published"}}),
]  # fmt: skip


@pytest.mark.parametrize(("source", "intervention", "more"), CASES, ids=lambda v: str(v) if isinstance(v, str) else "")
def test_everything_runs_elsewhere_and_in_bf16(
    source: str, intervention: str, more: dict[str, Any], teacher: nn.Module, digits: Images, digits_test: Images,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In bf16, CUDA's default, what lasts is kept in fp32. Elsewhere it ends in the CPU's bits."""
    on_cpu, score = run(teacher, digits, digits_test, source, intervention, **more)
    low, rough = run(teacher, digits, digits_test, source, intervention, **more, loop={"precision": "bf16"})
    assert all(math.isfinite(v) for v in rough.values())
    mine = low["matcher"]
    kept = (*mine["student"].values(), *mine["ema"].values(), low["acquirer"]["holdout"]["logits"])
    assert {v.dtype for v in kept if v.is_floating_point()} == {torch.float32}
    assert any(not torch.equal(v, on_cpu["matcher"]["student"][k]) for k, v in mine["student"].items())

    with pretended(monkeypatch):
        there, its = run(teacher, digits, digits_test, source, intervention, **more)
    assert score == its
    for part, name in (
        ("matcher", "student"),
        ("acquirer", "source"),
        ("matcher", "interventions"),
        ("acquirer", "holdout"),
    ):
        same(on_cpu[part][name], there[part][name], name)


def test_a_run_folder_from_elsewhere(
    teacher: nn.Module, digits: Images, digits_test: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at once, started again, delivered and reported: what is in the folder is the CPU's, bit for bit."""
    files = []
    cfg = config("dfnd", "kdci+stratified", steps=5)
    assert digits_test.y is not None
    test = engine.Test(digits_test.x[:40], digits_test.y[:40])
    for name, where in (("here", contextlib.nullcontext()), ("there", pretended(monkeypatch))):
        with where:
            for deadline in (0.0, math.inf):
                result = api.run(
                    Job(cfg, teacher, student(), SHAPE, digits.x[:200], test=test), out=tmp_path / name, verbose=False,
                    deadline=deadline,
                )  # fmt: skip
                assert result.summary["finished"] == (deadline > 0)
        assert (tmp_path / name / "report.html").stat().st_size > 1000
        files.append(load_file(tmp_path / name / "student.safetensors"))
    same(*files)


def test_teaching_and_probing_elsewhere(
    digits: Images, digits_test: Images, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    done = []
    quick = Teach(epochs=1, batch=64, pad=1, flip=False, precision="fp32")
    for where, device in ((contextlib.nullcontext(), torch.device("cpu")), (pretended(monkeypatch), THERE)):
        with where:
            model = student()
            log = teach(model, digits, digits_test, quick, device=device)
            found = linear_probe(model, digits, digits_test, epochs=1)
            done.append((bare(dict(model.state_dict())), log["loss"], log["test"], found))
    same(*done)


def test_what_is_measured_and_shown_elsewhere(
    teacher_file: Path, digits: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("sklearn")
    data = {"unlabeled": "strokes:300", "image_shape": [1, 8, 8]}
    models = {"teacher": {"spec": str(teacher_file)}, "student": {"spec": "tiny4"}}
    api.distill_config(config("dfnd", data=data, **models), tmp_path / "run", verbose=False, report=False)
    student_file = str(tmp_path / "run" / "student.safetensors")
    measure = ["evaluate", student_file, "--test", "digits", "--teacher", str(teacher_file), "--calibrate", "digits",
               "--probe", "digits"]  # fmt: skip
    show = ["look", str(tmp_path / "run"), "--test", "digits", "--n", "60", "--out", str(tmp_path / "look.html")]
    shutil.copytree(tmp_path / "run", tmp_path / "twin")
    order = ["rank", str(tmp_path / "run"), str(tmp_path / "twin"), "--on", "digits", "--test", "digits", "--n", "60"]
    said = []
    for where in (contextlib.nullcontext(), pretended(monkeypatch)):
        with where:
            assert main(measure) == 0
            assert main(show) == 0
            assert main(order) == 0
        said.append((capsys.readouterr().out, (tmp_path / "look.html").read_text()))
    assert said[0] == said[1]
