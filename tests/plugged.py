"""Methods in files of their own, one on each axis, and what the tests of plug-ins do with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dodistill import Criterion, CriterionConfig
from dodistill.api import distill
from dodistill.config import registry
from dodistill.config.tree import merge
from dodistill.functional import losses
from helpers import SHAPE, student

SOURCE = '''"""Grey: images of one grey each. A second sentence."""
from dataclasses import dataclass
import torch
from dodistill import Acquired, Source, SourceConfig


@dataclass(frozen=True)
class Config(SourceConfig):
    every: int = 2
    n: int = 20  #: images per acquisition
    kind = "generator"
    presets = {"few": {"source": {"n": 12}, "optim": {"lr": 0.02}, "loop.ema": 0.5}}
    origin = {"few": "ours"}

    def build(self, context):
        return Grey(self, context)


class Grey(Source):
    def __init__(self, config, context):
        super().__init__(context)
        self.n, self.level = config.n, torch.zeros(())

    def acquire(self, student, round):
        self.level += 0.05
        self.terms = {"level": self.level.clone()}
        noise = torch.rand(self.n, *self.context.image_shape, generator=self.generator)
        return Acquired((noise * 0.9 + self.level).clamp(0, 1))

    def parts(self):
        return {"level": self.level}
'''
ACT = '''"""Shift: adds a constant."""
from dataclasses import dataclass
from dodistill import Intervention, InterventionConfig


class Shift(Intervention):
    def __init__(self, by):
        super().__init__()
        self.name, self.by = "shift", by

    def compensate(self, s, dictionary, batch=None):
        return s + self.by * s.detach().roll(1, 1)

    def log(self, s, t, dictionary, batch=None):
        return {"by": s.new_tensor(self.by)}


@dataclass(frozen=True)
class Config(InterventionConfig):
    by: float = 0.5  #: how far

    def build(self, context):
        return Shift(self.by)
'''
CRITERION = '''"""Cubed: the cubic distance."""
from dataclasses import dataclass
from dodistill import Criterion, CriterionConfig


class Cubed(Criterion):
    def __init__(self, power):
        super().__init__()
        self.power = power

    def forward(self, s, t, batch=None):
        return {"cubed": ((s - t).abs() ** self.power).mean() / 100}


@dataclass(frozen=True)
class Config(CriterionConfig):
    power: float = 3.0

    def build(self, context):
        return Cubed(self.power)
'''
UPDATE = '''"""Clipped: the plain gradient, clipped. At a multiple of its mean norm so far."""
from dataclasses import dataclass
import torch
from dodistill import Update, UpdateConfig


@dataclass(frozen=True)
class Config(UpdateConfig):
    most: float = 0.1
    replays = True

    def build(self):
        return Clipped(self.most)


class Clipped(Update):
    def __init__(self, most):
        super().__init__()
        self.most, self.mean = most, torch.zeros(())

    def parts(self):
        return {"mean": self.mean}

    def backward(self, student, acquire, retain=None):
        terms = acquire(student)
        if retain is not None:
            terms |= {f"retain_{k}": v for k, v in retain(student).items()}
        torch.stack(list(terms.values())).sum().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters()])
        self.mean.lerp_(norm, 0.2)
        torch.nn.utils.clip_grad_norm_(student.parameters(), self.most * float(self.mean))
        self.terms = {"norm": norm}
        return {k: v.detach() for k, v in terms.items()}
'''
REPLAY = '''"""Last: the newest images again."""
from dataclasses import dataclass
from dodistill import Replay, ReplayConfig


@dataclass(frozen=True)
class Config(ReplayConfig):
    size: int = 8

    def build(self, context):
        return Last(self, context)


class Last(Replay):
    def __init__(self, config, context):
        super().__init__(context)
        self.size, self.x, self.t = config.size, None, None

    @property
    def ready(self):
        return self.x is not None

    def remember(self, images, logits, round):
        self.x, self.t = images[: self.size], logits[: self.size]

    def draw(self, student, step):
        return self.x / 255, self.t

    def state_dict(self):
        return super().state_dict() | {"x": self.x, "t": self.t}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.x, self.t = state["x"], state["t"]
'''
FILES = {"grey.py": SOURCE, "shift.py": ACT, "cubed.py": CRITERION, "clipped.py": UPDATE, "last.py": REPLAY}
ALL = {"source": "grey.py", "intervention": "shift.py", "criterion": "cubed.py", "update": "clipped.py",
       "replay": "last.py"}  # fmt: skip
BASE: dict[str, Any] = {
    "augment": {"pad": 1, "flip": False}, "optim": {"lr": 0.05},
    "loop": {"steps": 6, "batch": 8, "device": "cpu", "threads": 1, "log_every": 1, "eval_every": 3, "ema": 0.9,
             "precision": "fp32"},  # `auto` measures: by the load, two runs may differ
}  # fmt: skip


def run(teacher: nn.Module, out: str | None = None, **more: Any) -> Any:
    return distill(teacher, student(), image_shape=SHAPE, verbose=False, out=out, **merge(BASE, more))


def of_file(name: str) -> Any:
    """The config class in a file, as `import` would have it."""
    return registry.load(name).config


def spy(name: str = "spy.py", text: str = SOURCE) -> Path:
    """A file that leaves a trace when it runs."""
    leave = f"with open({name + '.ran'!r}, 'a') as file:\n    file.write('x')\n"
    Path(name).write_text(f"{text}\n{leave}")
    return Path(name + ".ran")


def change(old: str, new: str, text: str = SOURCE) -> str:
    assert old in text
    return text.replace(old, new)


@dataclass(frozen=True)
class MyCriterion(CriterionConfig):
    """Nothing of it is in a file of its own."""

    weight: float = 1.0

    def build(self, context: Any) -> Criterion:
        return Weighted(self.weight)


class Weighted(Criterion):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, s: Tensor, t: Tensor, batch: Any = None) -> dict[str, Tensor]:
        return {"kl": self.weight * losses.kl(s, t, 2.0)}
