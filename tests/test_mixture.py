"""Several sources in one pool: whose turn it is, what joins, what is refused, and how it is written in a config."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from dodistill import api
from dodistill.commands.cli import read
from dodistill.config.choices import parts, read_recipe
from dodistill.config.code import code_of
from dodistill.config.parts import Parts
from dodistill.config.tree import Distill, grown, resolve
from dodistill.core.watch import Watcher
from dodistill.data.images import Images
from dodistill.data.rows import Rows, as_uint8
from dodistill.engine import Distiller
from dodistill.engine.budget import scaled
from dodistill.errors import DodistillError
from helpers import SOURCES, config, context, job, same, student, vit

FAST = {k: v for k, v in SOURCES["fast"].items() if k != "name"}  # warm-up 1, every 4, batch 32
DRAWN = {"n": 80, "candidates": 160}


def mixed(steps: int = 14, /, *, more: Any = None, **of: Any) -> Distill:
    return config("procedural", steps=steps, source={"name": "mixture", "of": of}, **(more or {}))


def alone(name: str, settings: Any, teacher: nn.Module, turns: int, unlabeled: Tensor | None = None) -> list[Tensor]:
    source = resolve({"source": {"name": name, **settings}}).source.build(context(teacher, unlabeled=unlabeled))
    made = []
    for turn in range(turns):
        x = as_uint8(source.acquire(student().eval(), turn).images)
        made.append(x[:] if isinstance(x, Rows) else x)
    return made


# ------------------------------------------------------------------------------------------------ what joins


def test_the_images_of_each_part_join_at_its_own_cadence(teacher: nn.Module, digits: Images) -> None:
    """fast: twice in the warm-up, then every 4 steps; dfnd: every 10 steps, so at steps 12 and 20; procedural: once."""
    x = digits.x[:60]
    cfg = mixed(21, fast=FAST, procedural=DRAWN, dfnd={"n": 20, "every": 10, "warmup": 0})
    assert (cfg.source.every, cfg.source.warmup, cfg.source.kind) == (4, 1, "generator")
    assert cfg.source.needs == {"batchnorm", "unlabeled"}
    source = cfg.source.build(context(teacher, unlabeled=x))
    rounds = [source.acquire(student().eval(), r) for r in range(7)]  # 0, 1, then at steps 4, 8, 12, 16, 20
    assert [len(got.images) for got in rounds] == [20 + 32 + 80, 32, 32, 32, 52, 32, 52]
    # each part makes what it makes alone, in the same bits, and its logits are the teacher's
    fast, drawn = (alone(n, s, teacher, t) for n, s, t in (("fast", FAST, 7), ("procedural", DRAWN, 1)))
    found = alone("dfnd", {"n": 20}, teacher, 3, x)
    same(rounds[0].images, torch.cat([found[0], fast[0], drawn[0]]))
    same(rounds[3].images, fast[3])
    same(rounds[6].images, torch.cat([found[2], fast[6]]))
    for got in rounds:
        assert isinstance(got.images, Tensor)
        assert (got.images.dtype, got.labels) == (torch.uint8, None)
        assert got.logits is not None
        torch.testing.assert_close(got.logits, source.context.label(got.images))
    assert {"fast/bn", "fast/mean", "procedural/kept_entropy"} <= set(source.terms)


def test_the_pool_of_a_run_holds_them_all(teacher: nn.Module) -> None:
    it = job(teacher, mixed(14, fast=FAST, procedural=DRAWN))
    assert it.run()
    # rounds 0 and 1, and at steps 4, 8 and 12
    assert it.acquirer.round == 5
    assert it.acquirer.pool.seen + it.acquirer.holdout.seen == 80 + 5 * 32


def test_a_part_that_comes_once_is_not_overwritten(teacher: nn.Module) -> None:
    def made(capacity: int, eviction: str = "oldest", **settings: Any) -> Distiller:
        more = {"pool": {"capacity": capacity, "eviction": eviction}}
        return job(teacher, mixed(14, fast=FAST, procedural=DRAWN | settings, more=more))

    with pytest.raises(DodistillError, match=r"bring 234 images .*\(fast 156, procedural 78\), but pool.capacity is"):
        made(200).run()
    for fits in (made(1000), made(200, "reservoir"), made(200, every=8)):
        assert fits.run()


def test_another_cadence_stretches_that_of_all_parts(teacher: nn.Module) -> None:
    parts = {"fast": FAST, "procedural": DRAWN | {"every": 8}}
    sizes = []
    for every in (-1, 2, 40):
        source = resolve({"source": {"name": "mixture", "of": parts, "every": every}}).source
        assert source.every == (4 if every < 0 else every)
        made = source.build(context(teacher))
        sizes.append([len(made.acquire(student().eval(), r).images) for r in range(6)])
    assert sizes == [[112, 32, 32, 112, 32, 112]] * 3


def test_draws_are_counted_by_part(teacher: nn.Module) -> None:
    """Else the first acquisition, with the images of the part that comes once, would stand for all."""
    it = job(teacher, mixed(14, fast=FAST, procedural=DRAWN, more={"augment": {"views": 2, "pad": 1}}))
    assert it.run()
    said = re.search(r"drawn ([\d.]+) times", it.acquirer.views.reason)
    assert said is not None
    assert float(said[1]) == pytest.approx(14 * 16 / it.acquirer.pool.seen, rel=0.01)


def test_images_that_are_not_finite_are_found(teacher: nn.Module) -> None:
    it = job(teacher, mixed(14, fast=FAST, procedural=DRAWN))
    with torch.no_grad():
        next(it.acquirer.source.members["fast"].meta.parameters()).fill_(torch.nan)
    with pytest.raises(Exception, match="acquisition 1 ") as failed:
        it.run()
    assert "source/fast/mean" in failed.value.bad  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("rounds", range(1, 6))
def test_a_stop_between_two_acquisitions_changes_no_bit(rounds: int, teacher: nn.Module, digits: Images) -> None:
    def made() -> Distiller:
        dafl = {"batch": 8, "width": 4, "latent": 8, "every": 6}
        return job(teacher, mixed(14, fast=FAST, procedural=DRAWN, dafl=dafl), digits.x[:60])

    whole, first = made(), made()
    assert whole.run()
    while first.acquirer.round < rounds:
        first.acquire(Watcher()) if first.acquirer.due(first.step) else first.match()
    file = io.BytesIO()
    torch.save((first.state_dict(), first.acquirer.pool_state()), file)
    second = made()
    second.load_state_dict(*torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert second.run()
    same(whole.acquirer.source.state_dict(), second.acquirer.source.state_dict())
    same(whole.acquirer.source.terms, second.acquirer.source.terms)
    same(whole.acquirer.pool_state(), second.acquirer.pool_state())
    same(whole.matcher.student.state_dict(), second.matcher.student.state_dict())


# ----------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"of": {"fats": {}}}, "source.of: unknown source 'fats'; did you mean 'fast'"),
        ({"of": {"mixture": {}}}, "source.of: unknown source 'mixture'"),
        ({"of": {"fast": {"widht": 3}}}, "source.of.fast: unknown key 'widht'; did you mean 'width'"),
        ({"of": {"fast": {"K": "many"}}}, "source.of.fast.K is 'many'; it must be of type int"),
        ({"of": {"fast": {"lr_g": 0}}}, "source.of.fast.lr_g is 0"),
        ({"of": {"fast": 3}}, "source.of.fast is 3; it must be a mapping"),
        ({"of": ["fast"]}, "source.of is ['fast']; it must map names to settings"),
        ({"of": {"fast": False, "procedural": False}}, "source.of has no source"),
        ({"warmup": 21}, "some acquisitions would be empty"),
        ({"of": {"procedural": {}}, "every": 5}, "some acquisitions would be empty"),
    ],
)
def test_wrong_parts_are_refused_by_name(source: Any, says: str) -> None:
    with pytest.raises(DodistillError) as refused:
        resolve({"source": {"name": "mixture", **source}})
    assert says in str(refused.value)


def test_a_teacher_without_batchnorm_is_refused_for_the_part_that_reads_it(digits: Images) -> None:
    with pytest.raises(DodistillError, match="'fast' reads the statistics of BatchNorm layers"):
        job(vit(), mixed(3, fast=FAST, procedural=DRAWN))
    with pytest.raises(DodistillError, match="needs unlabelled images"):
        job(vit(), mixed(3, dfnd={}, procedural=DRAWN))
    assert job(vit(), mixed(3, dfnd={"n": 20}, procedural=DRAWN), digits.x[:60]).run()
    with pytest.raises(DodistillError, match=r"part procedural of source mixture: source.candidates is 3, source.n 80"):
        job(vit(), mixed(3, procedural={"n": 80, "candidates": 3}))


# -------------------------------------------------------------------------------------------------- in a config


def test_the_same_parts_by_yaml_flags_and_config(tmp_path: Path) -> None:
    text = "source: {name: mixture, of: {fast: {every: 50, width: 32, warmup: 5}, procedural: {n: 20000}}}"
    wanted = resolve(yaml.safe_load(text))
    (tmp_path / "mine.yaml").write_text(text)
    assert (wanted.source.every, wanted.source.warmup) == (50, 5)
    assert wanted.source.of["procedural"].n == 20_000
    for line in (
        str(tmp_path / "mine.yaml"),
        "--source mixture --source.of '{fast: {every: 50, width: 32, warmup: 5}, procedural: {n: 20000}}'",
        "--source mixture --source.of.fast.every 50 --source.of.fast.width=32 --source.of.fast.warmup 5 "
        "--source.of.procedural.n 20000",
    ):
        arguments, typed = read("distill", shlex.split(line))
        assert resolve(read_recipe(arguments.get("recipe", "")), typed) == wanted, line
    tree = wanted.to_tree()
    assert resolve(json.loads(json.dumps(tree))) == wanted
    assert resolve(tree).key() == wanted.key()
    assert resolve({"source": wanted.source}) == wanted
    assert resolve({"source": wanted.source, "source.of.fast.K": 3}).source.of["fast"].width == 32
    assert pickle.loads(pickle.dumps(wanted)) == copy.deepcopy(wanted) == wanted
    assert hash(wanted.source) == hash(resolve(tree).source)
    assert wanted.key() != resolve(tree, {"source.of.fast.K": 3}).key()
    assert set(code_of(wanted)) >= {"source mixture", "source fast", "source procedural"}


def test_parts_are_added_taken_away_and_frozen() -> None:
    desk = {"source": "mixture", "preset": "desk"}
    more = resolve(desk, {"source.of.dafl": None, "source.of.fast.K": 3}).source
    assert list(more.of) == ["dafl", "fast", "procedural"]
    assert (more.of["fast"].K, more.of["fast"].width) == (3, 32)
    fewer = resolve(desk, {"source.of.fast": False}).source
    assert (list(fewer.of), fewer.needs, fewer.kind, fewer.every) == (["procedural"], frozenset(), "sampler", 0)
    for change in (lambda: more.of.update(a=1), lambda: more.of.__setitem__("a", 1), more.of.clear):
        with pytest.raises(TypeError, match="cannot be changed"):
            change()
    assert list(Parts({"b": {}, "a": {}})) == ["a", "b"]


def test_the_help_shows_the_settings_of_each_part(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("source: {name: mixture, of: {fast: {width: 24}}}")
    for words in (["--source", "mixture", "--preset", "desk"], [str(tmp_path / "mine.yaml")]):
        found = {flag.name: flag.default for part in parts(words) for flag in part.flags}
        width, others = (32, {"procedural"}) if "--source" in words else (24, set())
        assert (found["source.of.fast.width"], found["source.of.fast.K"]) == (width, 5 if others else 10)
        assert set(found["source.of"]) == {"fast"} | others
    found = {flag.name for part in parts([*words, "--source.of", "{fast: false, dafl: {}}"]) for flag in part.flags}
    assert "source.of.dafl.fresh" in found
    assert "source.of.fast.K" not in found


def test_an_unknown_flag_of_a_part_is_refused_by_name() -> None:
    for line, says in (
        ("--source.of.fast.widht 3", "source.of.fast: unknown key 'widht'; did you mean 'width'"),
        ("--source.of.fats.K 3", "unknown source 'fats'; did you mean 'fast'"),
    ):
        with pytest.raises(DodistillError) as refused:
            read("distill", ["--source", "mixture", *line.split()])
        assert says in str(refused.value)


def test_a_new_setting_of_a_part_keeps_old_cells() -> None:
    """A record that lacks a key counts as done if the key is at the default of its source."""
    cfg = resolve({"source": {"name": "mixture", "of": {"dafl": {"every": 5}, "procedural": {}}}})
    new, default = cfg.to_tree(), resolve(cfg.choices()).to_tree()
    old = json.loads(json.dumps(new))
    del old["source"]["of"]["dafl"]["latent"]
    assert grown(old, new, default)
    assert not grown(old, resolve(cfg.to_tree(), {"source.of.dafl.latent": 7}).to_tree(), default)


def test_a_time_limit_scales_all_parts(teacher: nn.Module) -> None:
    source = resolve({"source": "mixture", "preset": "desk"}).source
    half, share = scaled(source, 0.5)
    assert share == pytest.approx(0.5)
    made = half.build(context(teacher)).members
    assert (made["procedural"].config.n, made["procedural"].config.candidates) == (5000, 15_000)
    assert made["fast"].config.K * made["fast"].config.batch == pytest.approx(0.5 * 5 * 128, rel=0.15)
    short = dataclasses.replace(source, warmup=3)
    assert short.build(context(teacher)).members["fast"].config.warmup == 3


def test_unlabelled_images_of_a_file_reach_the_part_that_samples_them(
    teacher_file: Path, digits: Images, tmp_path: Path
) -> None:
    import numpy as np

    np.save(tmp_path / "x.npy", digits.x[:60].numpy())
    cfg = mixed(2, fast=FAST, dfnd={"n": 20}, more={
        "teacher": {"spec": str(teacher_file)}, "student": {"spec": "tiny4"},
        "data": {"unlabeled": str(tmp_path / "x.npy")}, "loop": {"steps": 2},
    })  # fmt: skip
    result = api.distill_config(cfg, out=None, verbose=False)
    assert result.summary["images"] > 0
