"""Methods that installed packages offer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch import nn

from dodistill.config import plugins, registry
from dodistill.config.methods import table
from dodistill.config.tree import resolve
from dodistill.errors import DodistillError
from plugged import ACT, CRITERION, FILES, run

# --------------------------------------------------------------------------------------------- entry points


def package(site: Path, name: str, points: dict[str, str], modules: dict[str, str]) -> None:
    """An installed package, as `pip` leaves it: its modules beside its dist-info."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("".join(f"[{group}]\n{lines}\n" for group, lines in points.items()))
    for path, text in modules.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)


@pytest.fixture
def site(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = here / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_a_package_offers_methods_on_every_axis(site: Path, teacher: nn.Module) -> None:
    groups = dict(zip(registry.AXES, ("grey", "shift", "cubed", "clipped", "last")))
    points = {f"dodistill.{registry.AXES[axis]}": f"{name} = five_axes.{name}" for axis, name in groups.items()}
    package(site, "five-axes", points, {f"five_axes/{name}": text for name, text in FILES.items()})
    for axis, name in groups.items():
        assert registry.known(axis)[-1] == name
        assert name not in registry.names(axis)
    assert "five_axes" not in sys.modules  # found, and not imported
    with pytest.raises(DodistillError, match="did you mean 'grey'"):
        resolve({"source": "gray"})
    assert "five_axes" not in sys.modules
    out = run(teacher, "run", **groups, shift={"by": 0.25}, preset="few")
    tree = json.loads(Path("run/config.json").read_text())
    assert (tree["source"]["name"], tree["source"]["n"], tree["intervention"]) == ("grey", 12, "shift")
    assert tree["shift"] == {"code": plugins.fingerprint(ACT.encode()), "by": 0.25}
    assert out.summary["log"]["shift/by"] == 0.25
    assert resolve(tree).key() == out.summary["key"]  # an installed package needs no leave
    same = {axis: f"{name}.py" for axis, name in groups.items()}
    assert resolve(tree, same, allow_code=True).key() == out.summary["key"]  # the same text
    said = table()
    assert "\ngrey " in said
    assert all(f"\n  {name:<14}" in said for name in list(groups.values())[1:])
    assert resolve({"intervention": "kdci", "shift": {"by": 2}}).intervention == "kdci"  # a setting not in use


def test_what_is_wrong_with_an_entry_point(site: Path, teacher: nn.Module) -> None:
    group = "dodistill.criteria"
    package(
        site, "bad-one",
        {group: "kl = bad_one.cubed\nbroken = bad_one.broken\nempty = bad_one.empty\nother = bad_one.cubed\n"
                "direct = bad_one.cubed:Config\ntwice = bad_one.twice"},
        {"bad_one/cubed.py": CRITERION, "bad_one/broken.py": "1 / 0", "bad_one/empty.py": "", "bad_one/twice.py": ""},
    )  # fmt: skip
    package(site, "bad-two", {group: "twice = bad_two"}, {"bad_two.py": CRITERION})
    said = {
        "broken": "bad_one.broken does not import: ZeroDivisionError: division by zero",
        "empty": "it must name a module that has a class Config; see docs/tutorial.md",
        "other": "the entry point is called 'other', but its Config.name is 'cubed'",
        "direct": "its entry point is bad_one.cubed:Config; it must name a module",
        "twice": "criterion twice of bad-one 1.0 and bad-two 1.0: several packages offer this name",
    }
    for name, text in said.items():
        with pytest.raises(DodistillError) as error:
            resolve({"criterion": name})
        assert text in str(error.value), name
    said["kl"] = "criterion kl is part of dodistill. bad-one 1.0 also offers a kl, which cannot be chosen: rename"
    listing = " ".join(table().split())
    assert all(text in listing for text in said.values())
    out = run(teacher, None, source="procedural", **{"source.n": 20, "source.candidates": 30})
    assert said["kl"] in out.summary["warnings"][0]
    assert not resolve({"criterion": "l1"}).clashes
