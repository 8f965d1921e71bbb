"""One tree of frozen dataclasses: the YAML recipe, the CLI flags and the resolved config of a run are all this tree.

A tree is a nested dict of plain values, for instance

    {"source": {"name": "fast", "K": 5}, "intervention": "kdci+stratified", "kdci": {"scale": 2.0}, "loop": {"seed": 1}}

`resolve` fills in the preset and the defaults, refuses what it does not know by naming the nearest key, and checks
types.
No torch here, except through the methods that a tree names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ..errors import DodistillError, nearest
from . import registry

Tree = dict[str, Any]
C = TypeVar("C")


@dataclass(frozen=True)
class Model:
    """A network, by `load_model`'s grammar."""

    spec: str = ""  #: wrn40_2, timm:NAME, torchvision:NAME, file.py:factory, or a .safetensors that dodistill wrote
    weights: str = ""  #: .safetensors, or .pt/.pth without code
    num_classes: int = 0  #: 0: from the weights, or from the teacher
    normalise: str = ""  #: cifar10, cifar100, imagenet, mnist, none; empty: from the weights, or from the teacher


@dataclass(frozen=True)
class Data:
    """Where images come from. Distillation itself needs none, unless the source is a sampler."""

    image_shape: tuple[int, int, int] = (0, 0, 0)  #: (C, H, W) of what the teacher reads; zeros: from its weights
    unlabeled: str = ""  #: images for a sampler: folder, .npz, .npy or a data set's name
    foreign: Model = field(default_factory=Model)  #: another model that predicts the dictionary (KDCI Table 5)
    test: str = ""  #: optional labelled images, only ever reported on, never selected by
    crop_share: float = 0.0  #: of test images in folders, crop : short side; 0: 0.875 from 160 pixels on, else 1


@dataclass(frozen=True)
class Optim:
    """The student's SGD."""

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "constant", "steps", "onecycle"] = "cosine"
    milestones: tuple[float, ...] = (0.4, 0.8)  #: shares of the run at which `steps` divides the rate by 10
    floor: float = 0.0  #: the cosine's last rate


@dataclass(frozen=True)
class Pool:
    """The substitution inputs that are kept."""

    capacity: int = 65_536
    eviction: Literal["oldest", "reservoir"] = "oldest"
    holdout: float = 0.03  #: share of every acquisition that the student never sees; it is judged by that
    holdout_capacity: int = 1024


@dataclass(frozen=True)
class Augment:
    """Per-sample augmentation of the student's inputs."""

    pad: int = 4  #: random crop after padding by this many pixels (0: none)
    flip: bool = True  #: random horizontal flip
    padding: Literal["zeros", "reflect"] = "zeros"  #: what the crop brings in from outside the image
    views: int = 0  #: views of each image that the teacher answers once, when it enters the pool (0: each at its draw)
    views_gb: float = 2.0  #: most memory for these answers, in GB; fewer views are kept where they do not fit


@dataclass(frozen=True)
class View:
    """How the teacher is shown images during synthesis: the augmentation that the teacher was trained with."""

    crop: Literal["shift", "resized", "auto"] = "shift"  #: shift; resized: a random part, resized; auto: see padding
    padding: Literal["zeros", "reflect", "none", "auto"] = "zeros"  #: of a shift; auto: by the BatchNorm statistics
    pad: int = 0  #: largest shift in pixels; 0: an eighth of the height
    flip: bool | None = None  #: random horizontal flip; null: for colour images, not for one channel (digits, text)
    scale: tuple[float, float] = (0.08, 1.0)  #: share of the area that a resized crop keeps


@dataclass(frozen=True)
class Loop:
    """How long, how wide, on what, and how often to look."""

    steps: int = 2000  #: matching steps of the student
    batch: int = 128
    seed: int = 0
    ema: float = 0.998  #: decay of the student's moving average
    precision: Literal["auto", "fp32", "bf16"] = "auto"  #: of forward passes; retain's exact step is always in fp32
    device: str = "auto"
    threads: int = 0  #: CPU threads (0: PyTorch's choice); the same bits need the same number
    log_every: int = 50
    eval_every: int = 500
    checkpoint_seconds: float = 60.0


#: What may differ between two starts of the same run: where it runs and how often it looks, not what it computes.
#: (The same bits need the same device and number of threads.)
RUNTIME = ("device", "threads", "log_every", "checkpoint_seconds")


@dataclass(frozen=True)
class Distill:
    """A resolved run: every field is a dataclass whose fields are the flags `--part.field`."""

    teacher: Model
    student: Model
    data: Data
    source: Any
    criterion: Any
    update: Any
    replay: Any
    dictionary: Any
    interventions: tuple[Any, ...]
    optim: Optim
    pool: Pool
    augment: Augment
    view: View
    loop: Loop
    preset: str = ""

    @property
    def intervention(self) -> str:
        return "+".join(i.name for i in self.interventions) or "none"

    def to_tree(self) -> Tree:
        """The tree that resolves to this config."""
        plain = ("teacher", "student", "data", "dictionary", "optim", "pool", "augment", "view", "loop")
        tree: Tree = {part: dataclasses.asdict(getattr(self, part)) for part in plain}
        for axis in ("source", "criterion", "update", "replay"):
            choice = getattr(self, axis)
            tree[axis] = {"name": choice.name, **dataclasses.asdict(choice)}
        tree["intervention"] = self.intervention
        for choice in self.interventions:
            tree[choice.name] = dataclasses.asdict(choice)
        tree["preset"] = self.preset
        out: Tree = json.loads(json.dumps(tree))
        return out

    def key(self) -> str:
        """12 hex digits that change with anything that changes the result."""
        tree = self.to_tree()
        tree["loop"] = {k: v for k, v in tree["loop"].items() if k not in RUNTIME}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------- building


def _fits(value: Any, hint: Any, where: str) -> Any:
    """`value`, converted to the annotated type where that loses nothing; otherwise an error that names both."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        problem: DodistillError | None = None
        for option in (a for a in args if a is not type(None)):
            try:
                return _fits(value, option, where)
            except DodistillError as error:
                problem = error
        assert problem is not None
        raise problem
    if origin is Literal:
        if isinstance(value, bool):  # YAML reads true as a boolean
            value = str(value).lower()
        if value in args:
            return value
        raise DodistillError(f"{where}: {nearest(str(value), map(str, args), 'value')}")
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise DodistillError(f"{where} is {value!r}; it must be a list, as in [1, 2].")
        if origin is tuple and args[-1:] != (...,):
            if len(value) != len(args):
                raise DodistillError(f"{where} is {value!r}; it must have {len(args)} entries.")
            return tuple(_fits(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args)))
        return origin(_fits(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, {"spec": value} if hint is Model and isinstance(value, str) else value, where)
    if hint is float and isinstance(value, str):  # YAML reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise DodistillError(f"{where} is {value!r}; it must be of type {getattr(hint, '__name__', hint)}.")
    return value


def build(cls: type[C], values: Any, where: str) -> C:
    """A dataclass from a mapping, strictly: unknown keys and wrong types are refused by name."""
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise DodistillError(f"{where} is {values!r}; it must be a mapping of its settings.")
    hints = get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise DodistillError(f"{where}: {nearest(str(key), known, 'key')}")
    return cls(**{key: _fits(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def expand(tree: Mapping[str, Any]) -> Tree:
    """Dotted keys become nested ones: {"loop.seed": 1} -> {"loop": {"seed": 1}}."""
    out: Tree = {}
    for key, value in tree.items():
        value = expand(value) if isinstance(value, Mapping) else value
        head, *rest = str(key).split(".")
        for part in reversed(rest):
            value = {part: value}
        out = merge(out, {head: value})
    return out


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """`over` wins. A choice by another name replaces the settings of the old choice instead of joining them."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if key in registry.AXES or key in ("teacher", "student"):
            label = "name" if key in registry.AXES else "spec"
            if key != "intervention":
                value = {label: value} if isinstance(value, str) else value
                old = {label: old} if isinstance(old, str) else old
            if isinstance(old, Mapping) and isinstance(value, Mapping) and label in old and label in value:
                old = old if old[label] == value[label] else {}
        out[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def resolve(*trees: Mapping[str, Any]) -> Distill:
    """Later trees win over earlier ones, all of them over the preset, the preset over the defaults."""
    tree: Tree = {}
    for t in trees:
        tree = merge(tree, expand(t))
    source = tree.get("source") or {"name": "fast"}
    source = source if isinstance(source, Mapping) else {"name": source}
    name = str(source.get("name", "fast"))
    if name == "auto":
        raise DodistillError(
            "source auto is chosen for one teacher, by `dodistill distill --source auto` or distill(source='auto'); "
            "name the sources to compare."
        )
    config = registry.config("source", name)
    preset = str(tree.pop("preset", "") or source.get("preset", ""))
    if preset:
        presets: dict[str, Tree] = config.presets  # type: ignore[attr-defined]
        if preset not in presets:
            raise DodistillError(f"source {name}: {nearest(preset, presets, 'preset')}")
        tree = merge(merge({"source": {"name": name}}, presets[preset]), tree)

    intervention = tree.pop("intervention", "none") or "none"
    if not isinstance(intervention, str):
        raise DodistillError(f"intervention is {intervention!r}; name them, as in none, kdci or kdci+stratified.")
    names = [n.strip() for n in intervention.split("+") if n.strip() not in ("", "none")]
    if len(set(names)) < len(names):
        raise DodistillError(f"intervention {intervention!r} names one twice; name each once, as in kdci+stratified.")
    acts = {n: registry.config("intervention", n) for n in names}
    # settings of an intervention that is not chosen are allowed, so that a recipe can state them once for all arms
    settings: dict[str, Any] = {
        n: build(registry.config("intervention", n), tree.pop(n), n)
        for n in registry.names("intervention")
        if n in tree
    }
    interventions = tuple(settings.get(n) or cls() for n, cls in acts.items())

    def choose(axis: str, default: str) -> Any:
        given = tree.pop(axis, None) or {}
        given = {"name": given} if isinstance(given, str) else dict(given)
        chosen = str(given.pop("name", default))
        given.pop("preset", None)
        return build(registry.config(axis, chosen), given, axis)

    parts: Tree = {
        "source": choose("source", "fast"),
        "criterion": choose("criterion", "kl"),
        "update": choose("update", "plain"),
        "replay": choose("replay", "none"),
        "interventions": interventions,
        "preset": preset,
    }
    plain: dict[str, type] = {
        "teacher": Model, "student": Model, "data": Data, "dictionary": registry.dictionary(), "optim": Optim,
        "pool": Pool, "augment": Augment, "view": View, "loop": Loop,
    }  # fmt: skip
    for part, cls in plain.items():
        given = tree.pop(part, {})
        given = {"spec": given} if isinstance(given, str) and cls is Model else given
        parts[part] = build(cls, given, part)
    if tree:
        known = [*plain, *registry.AXES, "preset", *registry.names("intervention")]
        raise DodistillError(f"config: {nearest(next(iter(tree)), known, 'key')}")
    config_ = Distill(**parts)
    _check(config_)
    return config_


def _check(config: Distill) -> None:
    loop, pool = config.loop, config.pool
    positive = {"loop.steps": loop.steps, "loop.batch": loop.batch, "pool.capacity": pool.capacity,
                "loop.log_every": loop.log_every, "loop.eval_every": loop.eval_every}  # fmt: skip
    for name, value in positive.items():
        if value < 1:
            raise DodistillError(f"{name} is {value}; it must be at least 1.")
    if not 0 < pool.holdout < 1:
        raise DodistillError(f"pool.holdout is {pool.holdout}; it must lie between 0 and 1, as in 0.03.")
    if not 0 <= loop.ema < 1:
        raise DodistillError(f"loop.ema is {loop.ema}; it must lie in [0, 1), as in 0.998.")
    if config.update.replays != (config.replay.name != "none"):
        wants, fix = ("", "give --replay NAME") if config.update.replays else ("no ", "give --update replay or retain")
        raise DodistillError(
            f"update {config.update.name} has {wants}use for replayed inputs; replay is {config.replay.name}: {fix}."
        )
    augment = config.augment
    if augment.views < 0:
        raise DodistillError(f"augment.views is {augment.views}; it must be at least 0 (0: new views at each draw).")
    if not augment.views_gb > 0:
        raise DodistillError(f"augment.views_gb is {augment.views_gb}; it must be above 0, as in 2.")
    view = config.view
    if view.pad < 0:
        raise DodistillError(f"view.pad is {view.pad}; it must be at least 0 (0: an eighth of the height).")
    if not 0 < view.scale[0] <= view.scale[1] <= 1:
        raise DodistillError(f"view.scale is {list(view.scale)}; give shares 0 < low <= high <= 1, as in [0.08, 1].")
    if not 0 <= config.data.crop_share <= 1:
        raise DodistillError(
            f"data.crop_share is {config.data.crop_share}; it must lie in (0, 1], as in 0.875, or be 0, the default."
        )
    optim = config.optim
    if not 0 < optim.lr < math.inf:
        raise DodistillError(f"optim.lr is {optim.lr}; it must be positive, as in 0.1.")
    if not 0 <= optim.momentum < 1 or (optim.nesterov and not optim.momentum):
        raise DodistillError(f"optim.momentum is {optim.momentum}; it must lie in [0, 1), and above 0 for nesterov.")
    if not 0 <= optim.weight_decay < math.inf:
        raise DodistillError(f"optim.weight_decay is {optim.weight_decay}; it must be at least 0, as in 5e-4.")


def difference(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines 'key: old -> new' for every leaf in which two trees differ."""
    lines: list[str] = []
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            lines += difference(x, y, f"{prefix}{key}.")
        elif x != y:
            lines.append(f"{prefix}{key}: {x!r} -> {y!r}")
    return lines
