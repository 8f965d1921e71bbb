"""What several test files build: tiny configs, jobs, and exact comparison of nested state."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dodistill import engine
from dodistill.api import distill_config
from dodistill.config import registry
from dodistill.config.tree import Distill, Tree, merge, resolve
from dodistill.core.context import Context
from dodistill.data.rows import Pixels, rows_of
from dodistill.engine import Distiller, Job
from dodistill.functional.augment import View
from dodistill.models import load_model
from dodistill.models.teacher import Teacher

SHAPE = (1, 8, 8)
SOURCES: dict[str, Tree] = {
    "real": {"name": "real", "n": 200},
    "fast": {"name": "fast", "K": 2, "batch": 32, "warmup": 1, "every": 4, "latent": 16, "width": 4, "reset_at": 2},
    "fast_imagenet": {
        "name": "fast_imagenet", "K": 2, "batch": 32, "warmup": 1, "every": 4, "latent": 8, "width": 4, "doublings": 2,
        "reinit": 2, "lr_g": 1e-3,
    },
    "deepinv": {"name": "deepinv", "iterations": 3, "batch": 32, "every": 4},
    "dfnd": {"name": "dfnd", "n": 200},
    "adversarial": {"name": "adversarial", "batch": 16, "width": 4, "latent": 8, "every": 2, "fresh": 2},
    "cmi": {"name": "cmi", "batch": 16, "width": 4, "latent": 8, "iterations": 2, "bank": 32, "negatives": 8},
    "dafl": {"name": "dafl", "batch": 16, "width": 4, "latent": 8, "every": 1, "fresh": 0},
    "data": {"name": "data"},
    "mixture": {
        "name": "mixture", "of": {
            "fast": {"K": 2, "batch": 32, "warmup": 1, "every": 4, "latent": 16, "width": 4, "reset_at": 2},
            "procedural": {"n": 80, "candidates": 160},
        },
    },
    "mosaic": {
        "name": "mosaic", "batch": 16, "width": 4, "latent": 8, "base": 8, "patches": 4, "every": 2, "pad": 1,
    },
    "nayer": {
        "name": "nayer", "iterations": 2, "batch": 20, "width": 4, "noise": 8, "loops": 2, "warmup": 1, "every": 2,
    },
    "noise": {"name": "noise", "n": 60, "candidates": 80, "batch": 20},
    "pre": {"name": "pre", "batch": 16, "width": 4, "latent": 8, "every": 2, "fresh": 2},
    "psaq": {"name": "psaq", "iterations": 2, "lr_warmup": 1, "batch": 32, "every": 4},
    "procedural": {"name": "procedural", "n": 80, "candidates": 160},
}  # fmt: skip


def tree(source: str = "fast", intervention: str = "none", /, steps: int = 6, **more: Any) -> Tree:
    """A config tree that runs in a moment. `more` wins."""
    base: Tree = {
        "source": SOURCES[source], "intervention": intervention, "augment": {"pad": 1, "flip": False},
        "view": {"pad": 1, "flip": False},
        "dictionary": {"clusters": 4, "iterations": 3}, "optim": {"lr": 0.05},
        "loop": {
            "steps": steps, "batch": 16, "device": "cpu", "threads": 1, "log_every": 1, "eval_every": 3, "ema": 0.9,
            "precision": "fp32",  # `auto` measures on a CPU with bf16: by the load, two runs may differ
        },
    }  # fmt: skip
    return merge(base, more)


def config(*args: Any, **more: Any) -> Distill:
    return resolve(tree(*args, **more))


def student(seed: int = 1, width: int = 4, classes: int = 10) -> nn.Module:
    return load_model(f"tiny{width}", num_classes=classes, in_channels=1, image_size=8, seed=seed)


def vit(seed: int = 0) -> nn.Module:
    """An untrained transformer for the same images."""
    return load_model("tinyvit32", num_classes=10, in_channels=1, image_size=8, mean=[0.3], std=[0.4], seed=seed)


def fitting(source: str, teacher: nn.Module) -> nn.Module:
    """`teacher`, or `vit` for a source that needs attention."""
    return vit() if "attention" in registry.config("source", source).needs else teacher


def context(teacher: nn.Module, seed: int = 0, unlabeled: Tensor | None = None, pad: int = 1) -> Context:
    wrapped = teacher if isinstance(teacher, Teacher) else Teacher(teacher, SHAPE)
    chosen = resolve({"augment": {"pad": pad, "flip": False}}).augment
    view = View("shift", "zeros" if pad else "none", pad, flip=False)
    given = None if unlabeled is None else rows_of(unlabeled)
    return Context(wrapped, torch.device("cpu"), seed=seed, augment=chosen, view=view, unlabeled=given)


def job(
    teacher: nn.Module, cfg: Distill, unlabeled: Pixels | None = None, test: engine.Test | None = None, seed: int = 1
) -> Distiller:
    return Distiller(Job(cfg, teacher, student(seed), SHAPE, unlabeled, test=test))


def same(a: Any, b: Any, where: str = "") -> None:
    """Assert that two nested states hold the same bits."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor), where
        assert a.shape == b.shape, where
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), f"{where} differs"
    elif isinstance(a, Mapping):
        assert isinstance(b, Mapping), where
        assert sorted(a) == sorted(b), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}[{i}]")
    elif isinstance(a, float) and math.isnan(a):
        assert math.isnan(b), where
    else:
        assert a == b, f"{where}: {a!r} is not {b!r}"


def calm(net: nn.Module, run: Callable[[], list[Tensor]], by: float = 1e-6) -> bool:
    """Whether `run` gives the same when the weights of `net` move by little more than rounding.

    It does not where a ReLU, a max-pooling or an argmax stands on its edge: which way the gradient goes is then up to
    the CPU, and two computations of it cannot be compared.
    """
    start, g, first = copy.deepcopy(net.state_dict()), torch.Generator().manual_seed(0), run()
    for _ in range(4):
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1 + by * torch.randn(p.shape, generator=g))
        again = run()
        net.load_state_dict(start)
        if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max())) for a, b in zip(first, again)):
            return False
    return True


TIMING = ("seconds", "rate", "acquire_seconds")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock decides."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


def untimed(state: dict[str, Any]) -> dict[str, Any]:
    """A run's state without the seconds that it took, and those in the reason for its precision."""
    kept = {k: v for k, v in state.items() if k not in TIMING}
    if "precision" in kept:
        kept["precision"] = kept["precision"]["chosen"]
    if "acquirer" in kept:
        kept["acquirer"] = {k: v for k, v in kept["acquirer"].items() if k not in TIMING}
    return kept


class Page(HTMLParser):
    """Collects tags and checks that they nest."""

    void = frozenset({"meta", "img", "br", "path", "rect", "circle", "image"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_offline(text: str) -> None:
    page = Page(text)
    assert not any(tag in ("script", "link", "iframe", "object", "base") for tag, _ in page.tags)
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action", "data"):
            value = attributes.get(name) or "data:"
            beside = (
                tag == "a" and name == "href" and re.match(r"(?!/)[^:]*$", value)
            )  # a link to a file below the page
            assert beside or value.startswith(("data:", "#"))
    assert not re.search(r"https?://|url\(|@import|//[a-z]+\.", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))


def two_runs(folder: Path, teacher_file: Path, **more: Any) -> list[Path]:
    """The folders of two finished runs of `dfnd` on scraps of photographs, of few steps and of more."""
    for name, steps in (("short", 4), ("long", 60)):
        models = {"teacher": {"spec": str(teacher_file)}, "student": {"spec": "tiny4"}}
        data = {"unlabeled": "strokes:300", "image_shape": [1, 8, 8]}
        cfg = resolve(tree("dfnd", steps=steps, data=data, **models, **more))
        distill_config(cfg, folder / name, verbose=False, report=False)
    return [folder / "short", folder / "long"]
