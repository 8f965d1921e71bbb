"""One tree of frozen dataclasses: the YAML recipe, the CLI flags and the resolved config of a run are all this tree.

A tree is a nested dict of plain values, for instance

    {"source": {"name": "fast", "K": 5}, "intervention": "kdci+stratified", "kdci": {"scale": 2.0}, "loop": {"seed": 1}}

`resolve` fills in the preset and the defaults, refuses unknown keys and names the nearest key, and checks types. In
place of a choice's name a tree may contain the path of a file, a config class or a config: see `plugins`.
This module imports torch only through the methods that a tree names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ..errors import DodistillError, nearest
from . import plugins, registry
from .checks import check
from .contracts import (
    CriterionSettings,
    DictionarySettings,
    InterventionSettings,
    ReplaySettings,
    Settings,
    SourceSettings,
    UpdateSettings,
)
from .parts import Parts
from .plugins import Allow, Method

Tree = dict[str, Any]
C = TypeVar("C")


@dataclass(frozen=True)
class Model:
    """A network, in the grammar of `load_model`."""

    spec: str = ""  #: wrn40_2, timm:NAME, torchvision:NAME, hf:OWNER/NAME, file.py:factory, or a .safetensors file
    #: that dodistill wrote
    weights: str = ""  #: .safetensors, or .pt/.pth without code; pretrained: those published for timm:, torchvision:
    #: or hf:; random: if that is meant
    num_classes: int = 0  #: 0: from the weights, or from the teacher
    normalise: str = ""  #: cifar10, cifar100, imagenet, mnist, none; empty: from the weights, or from the teacher
    mean: tuple[float, ...] = ()  #: in place of a name: of each channel, or one for all, as in 0.5,0.5,0.5
    std: tuple[float, ...] = ()  #: likewise, with mean
    input_range: float = 1.0  #: the model's value for white, 1 or 255; mean and std are in this range
    classes: str = ""  #: their names, in order: a file with one a line, .json, or cat,dog,...; empty: from the weights


@dataclass(frozen=True)
class Data:
    """The images of a run. Distillation itself needs none, unless the source is a sampler."""

    image_shape: tuple[int, int, int] = (0, 0, 0)  #: (C, H, W) of the teacher's inputs; zeros: from its weights
    unlabeled: str = ""  #: images for a sampler: folder, .npz, .npy or a data set's name
    foreign: Model = field(default_factory=Model)  #: another model that predicts the dictionary (KDCI Table 5)
    test: str = ""  #: optional labelled images; their accuracy is reported, and no choice depends on it
    probe: tuple[str, ...] = ()
    #: labelled data sets, as in cifar100,mnist: accuracy of a linear classifier on the delivered student's features,
    #: computed after the end of a time limit
    crop_share: float = 0.0  #: centre crop / short side, for test images in folders; 0: 0.875 from 160 pixels, else 1


@dataclass(frozen=True)
class Optim:
    """The student's SGD."""

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "constant", "steps", "onecycle"] = "cosine"
    milestones: tuple[float, ...] = (0.4, 0.8)  #: shares of the run at which `steps` divides the rate by 10
    floor: float = 0.0  #: the final rate of the cosine


@dataclass(frozen=True)
class PoolConfig:
    """The substitution inputs that are kept."""

    capacity: int = 65_536
    eviction: Literal["oldest", "reservoir"] = "oldest"
    holdout: float = 0.03  #: share of each acquisition that is held back from training, to evaluate the student
    holdout_capacity: int = 1024


@dataclass(frozen=True)
class Augment:
    """Per-sample augmentation of the student's inputs."""

    crop: Literal["shift", "resized"] = "shift"  #: shift by up to pad pixels; resized: a random part, resized
    pad: int = 4  #: random crop after padding by this many pixels (0: none)
    scale: tuple[float, float] = (0.08, 1.0)  #: share of the area that a resized crop keeps
    flip: bool = True  #: random horizontal flip
    padding: Literal["zeros", "reflect"] = "zeros"  #: values of the pixels outside the image
    mix: Literal["none", "mixup", "cutmix"] = "none"  #: blends of an image with another one
    mix_share: float = 0.5  #: share of the inputs that are blends
    views: int = 0  #: views per image with teacher logits computed once (0: new at each draw; 162: every one, at pad 4)
    views_gb: float = 2.0  #: memory limit for these logits, in GB; it may reduce the number of views

    @property
    def mixes(self) -> bool:
        """Whether some inputs are blends of two images."""
        return self.mix != "none"

    @property
    def resizes(self) -> bool:
        """Whether the inputs are resized parts of images."""
        return self.crop == "resized"

    @property
    def moves(self) -> bool:
        """Whether an image has more than one view, blends aside."""
        return self.resizes or self.pad > 0 or self.flip


@dataclass(frozen=True)
class ViewConfig:
    """Augmentation of the teacher's inputs during synthesis: the augmentation of the teacher's training."""

    crop: Literal["shift", "resized", "auto"] = "shift"  #: shift; resized: a random part, resized; auto: see padding
    padding: Literal["zeros", "reflect", "none", "auto"] = "zeros"  #: of a shift; auto: by the BatchNorm statistics
    pad: int = 0  #: largest shift in pixels; 0: an eighth of the shorter side
    flip: bool | None = None  #: random horizontal flip; null: for colour images, not for one channel (digits, text)
    scale: tuple[float, float] = (0.08, 1.0)  #: share of the area that a resized crop keeps


@dataclass(frozen=True)
class Loop:
    """Length, batch size, hardware, and intervals of logging, evaluation and checkpoints."""

    steps: int = 2000  #: matching steps of the student
    time: str = ""
    #: limit for the whole run, as in 90s, 10m or 1h30m: steps and acquisitions are fitted to it; empty: none
    batch: int = 128
    seed: int = 0
    ema: float = 0.998  #: decay of the student's moving average
    precision: Literal["auto", "fp32", "bf16"] = "auto"  #: of forward passes; retain's exact step is always in fp32
    compile: Literal["off", "on", "graphs", "auto"] = "off"
    #: torch.compile for student, teacher and generators (on), or CUDA graphs of the student's step and the teacher's
    #: logits (graphs; eager on a CPU); auto: graphs on a GPU, on a CPU torch.compile if the remaining steps repay it
    device: str = "auto"
    threads: int = 0  #: CPU threads (0: PyTorch's choice); bit-identical results need the same number
    log_every: int = 50
    eval_every: int = 500
    checkpoint_seconds: float = 60.0
    restarts: tuple[int, ...] = ()  #: steps at which the rate's schedule begins anew; set where a run is trained longer


#: Settings that may differ between two starts of the same run, as they do not change the student.
#: (Bit-identical results need the same device and number of threads.)
RUNTIME = {"loop": ("device", "threads", "log_every", "checkpoint_seconds"), "data": ("probe",)}


@dataclass(frozen=True)
class Distill:
    """A resolved run: every field is a dataclass whose fields are the flags `--part.field`.

    `methods` are those of its choices that are not part of this package.
    """

    teacher: Model
    student: Model
    data: Data
    source: SourceSettings
    criterion: CriterionSettings
    update: UpdateSettings
    replay: ReplaySettings
    dictionary: DictionarySettings
    interventions: tuple[InterventionSettings, ...]
    optim: Optim
    pool: PoolConfig
    augment: Augment
    view: ViewConfig
    loop: Loop
    preset: str = ""
    methods: tuple[Method, ...] = ()

    @property
    def intervention(self) -> str:
        return "+".join(i.name for i in self.interventions) or "none"

    def to_tree(self) -> Tree:
        """The tree that resolves to this config, in plain values."""
        plain: dict[str, Any] = {
            "teacher": self.teacher, "student": self.student, "data": self.data, "dictionary": self.dictionary,
            "optim": self.optim, "pool": self.pool, "augment": self.augment, "view": self.view, "loop": self.loop,
        }  # fmt: skip
        tree: Tree = {part: dataclasses.asdict(settings) for part, settings in plain.items()}
        for axis, choice in self._chosen().items():
            name, code = self._named(axis, choice)
            tree[axis] = {"name": name, **code, **dataclasses.asdict(choice)}
        named = [self._named("intervention", i) for i in self.interventions]
        tree["intervention"] = "+".join(name for name, _ in named) or "none"
        for act, (_, code) in zip(self.interventions, named):
            tree[act.name] = {**code, **dataclasses.asdict(act)}
        tree["preset"] = self.preset
        out: Tree = json.loads(json.dumps(tree))
        return out

    def _chosen(self) -> dict[str, Settings]:
        """axis -> its one choice."""
        return {"source": self.source, "criterion": self.criterion, "update": self.update, "replay": self.replay}

    def _named(self, axis: str, choice: Settings) -> tuple[str, Tree]:
        """The name of a choice in the tree, and the fingerprint of its file if it is not part of this package."""
        for method in self.methods:
            if method.axis == axis and method.config is type(choice):
                return method.name, {"code": method.code}
        return choice.name, {}

    @property
    def clashes(self) -> list[str]:
        """A warning for each of its choices whose name an installed package also offers."""
        named = [*self._chosen().items(), *(("intervention", i) for i in self.interventions)]
        return [said for axis, choice in named if (said := registry.clash(axis, choice.name))]

    def choices(self) -> Tree:
        """The tree of the same choices with their default settings."""
        acts = tuple(type(i) for i in self.interventions)
        return {"intervention": acts, **{axis: _bare(choice) for axis, choice in self._chosen().items()}}

    def key(self) -> str:
        """12 hex digits that change with anything that changes the result."""
        tree = lasting(portable(self.to_tree()))
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def _bare(choice: Settings) -> Any:
    """A choice with its default settings; one that has parts keeps them, each with its own defaults."""
    values = {f.name: getattr(choice, f.name) for f in dataclasses.fields(choice)}
    parts = {key: dict.fromkeys(value) for key, value in values.items() if isinstance(value, Parts)}
    return {"name": type(choice), **parts} if parts else type(choice)


def code_in(tree: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Part of a plain config tree -> (name, fingerprint) of its choice, for those that are not part of this package."""
    out = {}
    for axis in ("source", "criterion", "update", "replay"):
        part = tree.get(axis)
        if isinstance(part, Mapping) and "code" in part:
            out[axis] = (str(part.get("name")), str(part["code"]))
    for name in plugins.names_in(tree.get("intervention")):
        part = tree.get(plugins.label(name))
        if isinstance(part, Mapping) and "code" in part:
            out[plugins.label(name)] = (name, str(part["code"]))
    return out


def lasting(tree: Tree) -> Tree:
    """A config tree without the settings of `RUNTIME`."""
    less = {part: {k: v for k, v in tree[part].items() if k not in names}
            for part, names in RUNTIME.items() if isinstance(tree.get(part), Mapping)}  # fmt: skip
    return {**tree, **less}


def portable(tree: Tree) -> Tree:
    """A plain config tree in which a method is identified by name and fingerprint, without the folder of its file."""
    out = dict(tree)
    for part, (name, _) in code_in(tree).items():
        if part in registry.AXES:
            out[part] = {**tree[part], "name": plugins.label(name)}
    if isinstance(tree.get("intervention"), str):
        out["intervention"] = "+".join(plugins.label(n) for n in plugins.names_in(tree["intervention"]))
    return out


# ---------------------------------------------------------------------------------------------------- building


def _fits(value: Any, hint: Any, where: str) -> Any:
    """`value`, converted to the annotated type where that is lossless; otherwise an error that names both."""
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
            some = "[a, b]" if args[:1] == (str,) else "[1, 2]"
            raise DodistillError(f"{where} is {value!r}; it must be a list, as in {some}.")
        if origin is tuple and args[-1:] != (...,):
            if len(value) != len(args):
                raise DodistillError(f"{where} is {value!r}; it must have {len(args)} entries.")
            return tuple(_fits(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args)))
        return origin(_fits(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
    if hint is Parts:
        if not isinstance(value, Mapping):
            raise DodistillError(f"{where} is {value!r}; it must map names to settings, as in {{fast: {{}}}}.")
        return Parts(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, {"spec": value} if hint is Model and isinstance(value, str) else value, where)
    if hint is float and isinstance(value, str):  # YAML reads 1e-3 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise DodistillError(f"{where} is {value}; it must be a finite number.")
    if hint is int and isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise DodistillError(f"{where} is {value}; it must fit in 64 bits.")
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise DodistillError(f"{where} is {value!r}; it must be of type {getattr(hint, '__name__', hint)}.")
    return value


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def build(cls: type[C], values: Any, where: str) -> C:
    """A dataclass from a mapping, strictly: unknown keys and wrong types are refused by name.

    An instance is returned unchanged, after a check of its `Literal` fields.
    """
    if isinstance(values, cls):
        for name, hint in _hints(type(values)).items():  # type: ignore[arg-type]
            if get_origin(hint) is Literal:
                _fits(getattr(values, name), hint, f"{where}.{name}")
        return values
    if not isinstance(values, Mapping):
        raise DodistillError(f"{where} is {values!r}; it must be a mapping of its settings.")
    hints = _hints(cls)  # type: ignore[arg-type]
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    known = list(defaults)
    for key in values:
        if key not in known:
            raise DodistillError(f"{where}: {nearest(str(key), known, 'key')}")
    # a default of infinity allows infinity
    free = {k for k, v in values.items() if v == math.inf == defaults[k]}
    return cls(**{k: v if k in free else _fits(v, hints[k], f"{where}.{k}") for k, v in values.items()})


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
    """`over` takes precedence. A choice with another name replaces the old choice together with its settings."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if key in (*registry.AXES, "teacher", "student") and key != "intervention":
            old, value = _labelled(key, old), _labelled(key, value)
            label = "name" if key in registry.AXES else "spec"
            if isinstance(old, Mapping) and isinstance(value, Mapping) and label in old and label in value:
                old = old if plugins.same(old[label], value[label]) else {}
        out[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def _labelled(part: str, value: Any) -> Any:
    """A choice without settings, as a mapping: "fast" -> {"name": "fast"}. A config becomes its class and its
    settings."""
    if part in ("teacher", "student"):
        return {"spec": value} if isinstance(value, str) else value
    given = {"name": value} if isinstance(value, str | type) or _is_config(value) else value
    if isinstance(given, Mapping) and _is_config(given.get("name")):
        return {**_own(given["name"]), **given, "name": type(given["name"])}
    return given


def _is_config(value: object) -> bool:
    """Whether a value in a tree is a config, in place of a choice's name."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _own(config: Any) -> Tree:
    """The settings of a config."""
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    return {
        key: {name: _own(part) for name, part in value.items()} if isinstance(value, Parts) else value
        for key, value in own.items()
    }


def _unpacked(tree: Tree) -> Tree:
    """An expanded tree in which each intervention that is a config has become its class and its settings."""
    given = tree.get("intervention")
    several = given if isinstance(given, tuple) else (given,)
    if not any(map(_is_config, several)):
        return tree
    out = {**tree, "intervention": tuple(type(g) if _is_config(g) else g for g in several)}
    for act in several:
        if _is_config(act) and isinstance(act, plugins.Named):
            out[act.name] = {**_own(act), **tree.get(act.name, {})}
    return out


def resolve(*trees: Mapping[str, Any], allow_code: Allow = False) -> Distill:
    """The resolved config. Precedence: later trees, earlier trees, the preset, the defaults.

    `allow_code`: which code files named by a tree, methods and models, may run: all (True), or those at these paths.
    A config class or a config in a tree needs no permission.
    """
    tree: Tree = {}
    for t in trees:
        tree = merge(tree, _unpacked(expand(t)))
    config = _resolve(tree, allow_code)
    for method in config.methods:
        if method.axis == "source":
            _check_presets(method, allow_code)
    return config


def _check_presets(source: Method, allow_code: Allow) -> None:
    """Refuse a source that is not part of this package if one of its presets does not resolve."""
    for preset, settings in config_of(source).presets.items():
        try:
            if "name" in _labelled("source", expand(settings).get("source", {})):
                raise DodistillError("it sets source.name; remove that key.")
            _resolve({"source": {"name": source.config}, "preset": preset}, allow_code)
        except DodistillError as error:
            raise DodistillError(f"{source.name}: preset {preset!r} does not resolve: {error}") from error


def config_of(source: Method) -> type[SourceSettings]:
    """The config class of a method that is a source."""
    assert source.axis == "source"
    return typing.cast(type[SourceSettings], source.config)


def chosen(tree: Mapping[str, Any], axis: str, default: str = "", allow_code: Allow = False) -> tuple[Method, Tree]:
    """The choice of an expanded tree on an axis (not interventions), and the settings given for it."""
    given = _labelled(axis, tree.get(axis) or {})
    if not isinstance(given, Mapping):
        raise DodistillError(
            f"{axis} is {given!r}; it must be a name, a mapping of name and settings, or a config (a frozen dataclass)."
        )
    settings = dict(given)
    what, code = settings.pop("name", None) or default, str(settings.pop("code", ""))
    settings.pop("preset", None)
    what = what if isinstance(what, str | type) else str(what)
    return registry.find(axis, what, allow_code, code), settings


def interventions(tree: Mapping[str, Any], allow_code: Allow = False) -> list[tuple[Method, Tree]]:
    """The interventions of an expanded tree, in order, and the settings given for each."""
    given = tree.get("intervention") or ()
    several: Any = (given,) if isinstance(given, str | type) else given
    if not isinstance(several, tuple) or not all(isinstance(g, str | type) for g in several):
        raise DodistillError(f"intervention is {given!r}; it must be a name or names, as in kdci or kdci+stratified.")
    out: list[tuple[Method, Tree]] = []
    for what in [n for g in several for n in (plugins.names_in(g) if isinstance(g, str) else [g])]:
        if what in ("", "none"):
            continue
        settings = tree.get(plugins.label(what), {}) if isinstance(what, str) else {}
        code = str(settings.get("code", "")) if isinstance(settings, Mapping) else ""
        method = registry.find("intervention", what, allow_code, code)
        settings = tree.get(method.config.name, {})
        if isinstance(settings, Mapping):
            settings = {k: v for k, v in settings.items() if k != "code"}
        out.append((method, settings))
    names = [m.config.name for m, _ in out]
    if len(set(names)) < len(names):
        given = "+".join(names)
        raise DodistillError(f"intervention {given!r} has a name twice; give each name once, as in kdci+stratified.")
    for method, _ in out:
        if method.config.name in (*PLAIN, *registry.AXES, "preset"):
            raise DodistillError(f"{method.name}: {method.config.name} is a part of the config; choose another name.")
    return out


DEFAULTS = {"source": "fast", "criterion": "kl", "update": "plain", "replay": "none"}
PLAIN: dict[str, type] = {
    "teacher": Model, "student": Model, "data": Data, "optim": Optim, "pool": PoolConfig, "augment": Augment,
    "view": ViewConfig, "loop": Loop,
}  # fmt: skip


def _resolve(tree: Tree, allow_code: Allow) -> Distill:
    for path, flag in plugins.paths(tree).items():  # before any of them runs
        plugins.refuse(path, flag, allow_code)
    source = tree.get("source")
    if (source.get("name") if isinstance(source, Mapping) else source) == "auto":
        raise DodistillError(
            "source auto is chosen for one teacher, by `dodistill distill --source auto` or distill(source='auto'); "
            "name the sources to compare."
        )
    method, _ = chosen(tree, "source", "fast", allow_code)
    preset = str(tree.get("preset", "") or (source.get("preset", "") if isinstance(source, Mapping) else ""))
    if preset:
        presets = config_of(method).presets
        if preset not in presets:
            raise DodistillError(f"source {method.name}: {nearest(preset, presets, 'preset')}")
        tree = merge(expand(presets[preset]), tree)

    found: list[Method] = []
    values: Tree = {"preset": preset}
    for axis, default in DEFAULTS.items():
        method, settings = chosen(tree, axis, default, allow_code)
        values[axis] = _built(method, settings, axis)
        found.append(method)
    acts = interventions(tree, allow_code)
    values["interventions"] = tuple(_built(m, settings, m.config.name) for m, settings in acts)
    found += [m for m, _ in acts]
    values["methods"] = tuple(m for m in found if m.code)
    # settings of an intervention that is not chosen are allowed, so that a recipe can state them once for all arms
    idle = [n for n in registry.known("intervention") if n in tree and n not in {m.config.name for m, _ in acts}]
    for name in idle:
        build(registry.config("intervention", name), tree[name], name)
    plain = {**PLAIN, "dictionary": registry.dictionary()}
    for part, cls in plain.items():
        given = tree.get(part, {})
        given = {"spec": given} if isinstance(given, str) and cls is Model else given
        values[part] = build(cls, given, part)
    taken = {*plain, *registry.AXES, "preset", *idle, *(m.config.name for m, _ in acts)}
    for key in tree:
        if key not in taken:
            every = [*plain, *registry.AXES, "preset", *registry.known("intervention")]
            raise DodistillError(f"config: {nearest(key, every, 'key')}")
    config = Distill(**values)
    check(config)
    return config


def _built(method: Method, settings: Any, where: str) -> Settings:
    """The settings of a choice. Those of a method from elsewhere must be values that config.json can hold."""
    out = build(method.config, settings, where)
    if method.code:
        try:
            json.dumps(dataclasses.asdict(out))
        except (TypeError, ValueError) as error:
            raise DodistillError(
                f"{method.name}: settings must be numbers, text, or lists of them ({error})."
            ) from error
    return out


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


def grown(old: Mapping[str, Any], new: Mapping[str, Any], default: Mapping[str, Any]) -> bool:
    """Whether `new` is `old` plus keys at their defaults, as after an update that added settings."""
    if not old.keys() <= new.keys():
        return False
    for key, value in new.items():
        if key not in old:
            if value != default.get(key):
                return False
        elif isinstance(value, Mapping) and isinstance(old[key], Mapping):
            if not grown(old[key], value, default.get(key) or {}):
                return False
        elif value != old[key]:
            return False
    return True
