"""The config tree: who wins, what is refused and how, and that it survives being written down."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dodistill.config import registry
from dodistill.config import tree as c
from dodistill.config.strict_yaml import read_yaml
from dodistill.config.tree import RUNTIME, Distill, difference, expand, merge, resolve
from dodistill.errors import DodistillError, nearest


def test_defaults() -> None:
    d = resolve()
    assert (d.source.name, d.criterion.name, d.update.name, d.intervention) == ("fast", "kl", "plain", "none")
    assert d.loop == c.Loop()
    assert d.preset == ""


def test_preset_is_over_defaults_and_under_everything_else() -> None:
    preset = registry.config("source", "fast").presets["desk"]
    d = resolve({"source": "fast", "preset": "desk"})
    assert (d.source.K, d.source.warmup) == (preset["source"]["K"], preset["source"]["warmup"])
    assert d.source.K != registry.config("source", "fast")().K
    assert d.loop.batch == 128
    recipe, flags = {"preset": "desk", "source": {"name": "fast", "K": 3}, "loop": {"seed": 5}}, {"loop.seed": 6}
    d = resolve(recipe, flags)
    assert (d.source.K, d.source.batch, d.loop.seed) == (3, 128, 6)
    assert resolve({"source": {"name": "fast", "preset": "desk"}}) == resolve({"source": "fast", "preset": "desk"})


def test_another_choice_drops_the_settings_of_the_presets_choice() -> None:
    d = resolve({"source": "fast", "preset": "desk", "criterion": "l1"})
    assert d.criterion == registry.config("criterion", "l1")()
    d = resolve({"source": "fast", "preset": "desk", "criterion": {"temperature": 3.0}})
    assert (d.criterion.name, d.criterion.temperature) == ("kl", 3.0)
    d = resolve({"teacher": {"spec": "wrn40_2", "weights": "a.pth"}}, {"teacher": "wrn16_1"})
    assert d.teacher == c.Model(spec="wrn16_1")


@pytest.mark.parametrize("source", registry.names("source"))
def test_every_preset_resolves_and_survives_being_written_down(source: str) -> None:
    presets: dict[str, Any] = registry.config("source", source).presets
    origin: dict[str, str] = registry.config("source", source).origin
    assert set(presets) == set(origin)
    assert "desk" in presets
    for preset in presets:
        d = resolve({"source": source, "preset": preset, "intervention": "kdci+stratified", "kdci": {"scale": 2}})
        again = resolve(json.loads(json.dumps(d.to_tree())))
        assert again == d
        assert again.key() == d.key()
        assert d.interventions[0].scale == 2.0


def test_merges_of_yaml(tmp_path: Path) -> None:
    """A mapping's own keys win, then those of the first in a list, in every version of PyYAML."""
    many = "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}\n" for i in range(1, 20))
    (tmp_path / "a.yaml").write_text(
        "common: &common {steps: 100, lr: 0.1}\nquick: &quick {<<: *common, steps: 10}\n"
        "base: {<<: *quick, batch: 32}\nboth: {<<: [*quick, *common]}\nitself: &i {<<: *i, a: 1}\n"
        f"m0: &m0 {{key: 1}}\n{many}"
    )
    found = read_yaml(tmp_path / "a.yaml")
    assert found["quick"] == found["both"] == {"steps": 10, "lr": 0.1}
    assert found["base"] == {"steps": 10, "lr": 0.1, "batch": 32}
    assert found["itself"] == {"a": 1}
    assert found["m19"] == {"key": 1}


def test_dotted_keys() -> None:
    assert expand({"a.b.c": 1, "a": {"b.d": 2}, "e": 3}) == {"a": {"b": {"c": 1, "d": 2}}, "e": 3}
    assert expand({"source": "fast", "source.K": 2}) == {"source": {"name": "fast", "K": 2}}
    assert expand({"source.K": 2, "source": "fast"}) == {"source": {"name": "fast", "K": 2}}
    assert merge({"source": {"name": "fast", "K": 2}}, {"source": "dfnd"}) == {"source": {"name": "dfnd"}}
    d = resolve({"source.name": "dfnd", "source.n": 9, "kdci.scale": 2, "intervention": "kdci", "data.foreign": "vgg8"})
    assert (d.source.name, d.source.n, d.interventions[0].scale, d.data.foreign.spec) == ("dfnd", 9, 2.0, "vgg8")


def test_settings_of_an_arm_that_is_not_chosen_are_allowed_but_checked() -> None:
    d = resolve({"kdci": {"scale": 2.0}})
    assert d.interventions == ()
    assert d == resolve()
    with pytest.raises(DodistillError, match=r"kdci: unknown key 'scael'; did you mean 'scale'"):
        resolve({"kdci": {"scael": 2.0}})


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"data.crop_share": 1.5}, "data.crop_share is 1.5; it must lie in"),
        ({"loop.sed": 1}, "loop: unknown key 'sed'; did you mean 'seed'"),
        ({"source": {"name": "fast", "k": 3}}, "source: unknown key 'k'"),
        ({"lop": {"seed": 1}}, "config: unknown key 'lop'; did you mean 'loop'"),
        ({"source": "auto"}, "source auto is chosen for one teacher"),
        ({"source": "fats"}, "unknown source 'fats'; did you mean 'fast'"),
        ({"intervention": "kdic"}, "unknown intervention 'kdic'; did you mean 'kdci'"),
        ({"intervention": "kdci+stratifed"}, "did you mean 'stratified'"),
        ({"intervention": "kdci+kdci"}, "has a name twice"),
        ({"intervention": ["kdci"]}, "intervention is"),
        ({"criterion": "kll"}, "unknown criterion 'kll'; did you mean 'kl'"),
        ({"update": "plane"}, "unknown update 'plane'"),
        ({"preset": "dsk"}, "source fast: unknown preset 'dsk'; did you mean 'desk'"),
        ({"source": "dfnd", "preset": "wrn"}, "source dfnd: unknown preset 'wrn'. Known: desk, paper"),
        ({"loop.steps": "many"}, "loop.steps is 'many'; it must be of type int"),
        ({"loop.steps": 2.5}, "loop.steps is 2.5; it must be of type int"),
        ({"loop.steps": True}, "loop.steps is True; it must be of type int"),
        ({"optim.lr": "fast"}, "optim.lr is 'fast'; it must be of type float"),
        ({"optim.nesterov": "yes"}, "optim.nesterov is 'yes'; it must be of type bool"),
        ({"data.image_shape": [3, 32]}, "data.image_shape is [3, 32]; it must have 3 entries"),
        ({"data.image_shape": 32}, "data.image_shape is 32; it must be a list"),
        ({"data.image_shape": [1, "x", 2]}, "data.image_shape[1] is 'x'"),
        ({"loop": 5}, "loop is 5; it must be a mapping"),
        ({"optim.schedule": "cosin"}, "optim.schedule: unknown value 'cosin'; did you mean 'cosine'"),
        ({"loop.precision": "fp16"}, "loop.precision: unknown value 'fp16'"),
        ({"source": {"name": "deepinv", "js": "right"}}, "source.js: unknown value 'right'. Known: published, true"),
        ({"pool.eviction": "old"}, "pool.eviction: unknown value 'old'"),
        ({"loop.steps": 0}, "loop.steps is 0; it must be at least 1"),
        ({"loop.batch": -1}, "loop.batch is -1"),
        ({"pool.capacity": 0}, "pool.capacity is 0"),
        ({"pool.holdout": 1.0}, "pool.holdout is 1.0"),
        ({"loop.ema": 1}, "loop.ema is 1.0"),
        ({"optim.lr": 0}, "optim.lr is 0.0"),
        ({"optim.lr": float("nan")}, "optim.lr is nan"),
        ({"optim.momentum": 1.5}, "optim.momentum is 1.5"),
        ({"optim": {"momentum": 0, "nesterov": True}}, "above 0 for nesterov"),
        ({"optim.weight_decay": -1}, "optim.weight_decay is -1.0"),
    ],
)
def test_what_is_refused_is_named(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(DodistillError) as error:
        resolve(tree)
    assert said in str(error.value)


def test_values_that_lose_nothing_are_converted() -> None:
    d = resolve({"optim.lr": "1e-3", "pool.holdout": "0.5", "kdci": {"own_lr": None}, "data.test": 5})
    assert (d.optim.lr, d.pool.holdout, d.data.test) == (1e-3, 0.5, "5")
    assert resolve({"optim.lr": 1}).optim.lr == 1.0
    assert resolve({"source": {"name": "deepinv", "betas": [0, 1]}}).source.betas == (0.0, 1.0)
    assert resolve({"source": {"name": "deepinv", "js": True}}).source.js == "true"  # as YAML reads it


def test_names_of_interventions() -> None:
    assert resolve({"intervention": None}).intervention == "none"
    assert resolve({"intervention": "none"}).interventions == ()
    assert resolve({"intervention": "kdci + stratified"}).intervention == "kdci+stratified"


def leaves(d: Distill) -> list[tuple[str, Any]]:
    """Every leaf of the tree by its dotted name."""

    def walk(tree: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
        out = []
        for key, value in tree.items():
            name = f"{prefix}{key}"
            out += walk(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
        return out

    return walk(d.to_tree(), "")


def other(name: str, value: Any, hint: str) -> Any:
    """A legal value that is not `value`."""
    special = {
        "data.image_shape": [1, 2, 3], "optim.schedule": "steps", "pool.eviction": "reservoir", "dictionary.of": "pool",
        "loop.precision": "bf16", "loop.compile": "on", "loop.restarts": [100], "loop.time": "10m",
        "source.meta": "reptile", "kdci.weights": "constant", "stratified.by": "cluster",
        "stratified.prior": [1.0, 2.0], "preset": "wrn", "view.crop": "resized", "view.padding": "reflect",
        "view.flip": True, "augment.padding": "reflect", "view.scale": [0.2, 0.9], "augment.mix": "mixup",
        "data.probe": ["digits"], "augment.crop": "resized", "augment.scale": [0.2, 0.9],
    }  # fmt: skip
    if name in special:
        return special[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.01
    if isinstance(value, list):
        return [other(name, v, hint) for v in value] or [0.5]
    return 3 if value is None else f"{value}x"


def test_the_key_changes_with_all_that_matters_and_nothing_else() -> None:
    start = resolve({"intervention": "kdci+stratified"})
    checked = 0
    for name, value in leaves(start):
        if name in ("source.name", "criterion.name", "update.name", "replay.name", "intervention"):
            continue
        changed = resolve(start.to_tree(), {name: other(name, value, name)})
        assert changed != start, name
        part, _, setting = name.partition(".")
        runtime = setting in RUNTIME.get(part, ())
        assert (changed.key() == start.key()) == runtime, name
        lines = difference(start.to_tree(), changed.to_tree())
        assert any(line.startswith(f"{name}: ") for line in lines), name
        checked += 1
    assert checked > 50
    others = [{"source": "dfnd"}, {"intervention": "kdci"}, {"intervention": "stratified+kdci"}, {"criterion": "l1"}]
    keys = {resolve(start.to_tree(), o).key() for o in others} | {start.key()}
    assert len(keys) == 5
    assert all(len(k) == 12 for k in keys)


def test_the_tree_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve().loop.seed = 3  # type: ignore[misc]


def test_nearest() -> None:
    assert nearest("fats", ["fast", "deepinv"], "source") == (
        "unknown source 'fats'; did you mean 'fast'? Known: deepinv, fast."
    )
    assert nearest("zzz", ["fast"]) == "unknown name 'zzz'. Known: fast."
