"""Mixture (ours): several sources fill one pool, each at its own cadence and with its own share of the images.

    source: {name: mixture, of: {fast: {every: 50, width: 32}, procedural: {n: 20000, candidates: 40000}}}

Each part acquires as if it were alone: in its warm-up, and then every `every` steps. An acquisition of the mixture is
the images of all parts whose turn it is. Its `every` is the smallest of the parts', its `warmup` the longest:

    round r <= warmup       part p takes part while r <= warmup_p; a part with every 0 ends here
    round warmup + j        part p takes part if floor(j min(every_p) / every_p) has grown: at the first acquisition at
                            or after its own turn

Another `every`, given or set by `--time`, stretches the cadence of all parts alike.

A part's share of the pool is its images per acquisition times its acquisitions. A draw is uniform over the pool, unless
an intervention weights it.

What the pool does with them. Under `eviction: oldest` a full pool overwrites its oldest images, whichever part made
them. A part that acquires once would be gone after `capacity` images of the others. Such a run is refused after its
first acquisition, when the numbers are known. Either the capacity holds the images of the whole run; or the part comes
back (its `every`), and then each part keeps the share that it brings per step; or the eviction is `reservoir`: then
each part keeps the share that it has among all images so far, and that of a part that acquires once falls.

Details
 1. Images of the user's join as pixels, not as rows. True labels are dropped: other parts have none.
 2. KDCI's dictionary is built from the newest acquisition, as for every source, which may hold images of one part
    alone; `dictionary.of: pool` reads them all. Reference inputs of a part (mosaic) are not used.
 3. The random stream of a part is the one that it has alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import registry
from ..config.contracts import SourceSettings
from ..config.parts import Parts
from ..config.tree import build
from ..core.context import Context
from ..data.rows import Rows, as_uint8
from ..errors import DodistillError, nearest
from . import fast
from .shared.base import Acquired, Kind, Source, SourceConfig, scaled

_KINDS: tuple[Kind, ...] = ("generator", "inversion", "sampler", "data")
_DEFAULT = Parts({"fast": {}, "procedural": {}})


@dataclass(frozen=True)
class Config(SourceConfig):
    """The parts with their settings. `--source.of.NAME.KEY VALUE` sets one of them."""

    warmup: int = -1  #: acquisitions before the first matching step; -1: as many as the longest warm-up of a part
    every: int = -1  #: matching steps per acquisition; 0 acquires once; -1: the smallest of the parts'. Another value
    #: stretches the cadence of all parts alike
    of: Annotated[Parts, "{NAME: SETTINGS}"] = _DEFAULT
    #: the sources and their settings; null: the defaults, false: without this source
    scale: float = 1.0  #: cost of each part's acquisitions, as a share of that by its settings; `--time` lowers it

    name: ClassVar[str] = "mixture"
    # those of the default parts; an instance has those of its own
    kind: ClassVar[Kind] = "generator"
    needs: ClassVar[frozenset[str]] = frozenset({"batchnorm"})
    costs: ClassVar[tuple[dict[str, float], ...]] = ({"scale": 0.05},)
    trains: ClassVar[str] = "what its parts train"
    keeps: ClassVar[str] = "what its parts keep"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "desk": {
            **fast.Config.presets["desk"],
            "source": {
                "of": {
                    "fast": fast.Config.presets["desk"]["source"],
                    "procedural": {"n": 10_000, "candidates": 30_000},
                }
            },
        },
    }
    origin: ClassVar[dict[str, str]] = {"desk": "ours: `fast` as in its `desk`, and 10 000 drawn pictures"}

    def __post_init__(self) -> None:
        parts = Parts({name: _built(name, given) for name, given in self.of.items() if given is not False})
        if not parts:
            raise DodistillError("source.of has no source; name at least one, as in {fast: {}, procedural: {}}.")
        longest, shortest = max(part.warmup for part in parts.values()), _shortest(parts)
        warmup = longest if self.warmup < 0 else self.warmup
        every = shortest if self.every < 0 else self.every
        if warmup > longest or (every and not shortest):
            raise DodistillError(
                f"source.warmup is {warmup} and source.every {every}, but the longest warm-up of a part is {longest}, "
                f"and the smallest every {shortest}: some acquisitions would be empty. Remove both keys, or set them "
                "for a part, as source.of.NAME.every."
            )
        kinds = {part.kind for part in parts.values()}
        own = {
            "of": parts, "warmup": warmup, "every": every,
            "kind": next(kind for kind in _KINDS if kind in kinds),
            "needs": frozenset().union(*(part.needs for part in parts.values())),
            "generates": any(part.generates for part in parts.values()),
            "costs": ({"scale": max(scaled(part, 0.0)[1] for part in parts.values())},),
        }  # fmt: skip
        for key, value in own.items():
            object.__setattr__(self, key, value)

    @property
    def members(self) -> Mapping[str, SourceSettings]:
        return self.of

    def turns(self, part: SourceSettings, rounds: int) -> int:
        """How many of the first `rounds` acquisitions a part takes part in."""
        warm = min(rounds, min(part.warmup, self.warmup) + 1)
        ticks = max(0, rounds - self.warmup - 1)
        return warm + (ticks * _shortest(self.of) // part.every if part.every else 0)

    def teacher_passes(self) -> tuple[float, float]:
        """Those of the part that acquires most often; of several, the most expensive one."""
        often = [part for part in self.of.values() if part.every] or list(self.of.values())
        least = min(part.every for part in often)
        forwards, backwards = max(part.teacher_passes() for part in often if part.every == least)
        return forwards, backwards

    def counted(self, unlabeled: int) -> Config:
        return replace(self, of=Parts({name: part.counted(unlabeled) for name, part in self.of.items()}))

    def build(self, context: Context) -> Source:
        return Mixture(self, context)


def _shortest(parts: Mapping[str, SourceSettings]) -> int:
    """The smallest `every` of parts; 0 if all of them acquire once."""
    return min((part.every for part in parts.values() if part.every), default=0)


def _built(name: str, given: Any) -> SourceSettings:
    """The settings of one part, checked as those of a source are."""
    names = [known for known in registry.names("source") if known != Config.name]
    if name not in names:
        raise DodistillError(f"source.of: {nearest(str(name), names, 'source')}")
    return build(registry.config("source", name), {} if given is None else given, f"source.of.{name}")


class Mixture(Source):
    """Builds the parts, and joins what those return whose turn it is."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(context)
        self.config = config
        if not 0 < config.scale <= 1:
            raise DodistillError(f"source.scale is {config.scale}; it must lie in (0, 1].")
        self.members: dict[str, Source] = {}
        for name, part in config.of.items():
            try:
                cut = replace(scaled(part, config.scale)[0], warmup=min(part.warmup, config.warmup))
                self.members[name] = cut.build(context)
            except DodistillError as error:
                raise DodistillError(f"part {name} of source mixture: {error}") from error
        self.notes = [f"{name}: {note}" for name, part in self.members.items() for note in part.notes]
        self._first: dict[str, int] = {}  # images of each part in the first acquisition

    def acquire(self, student: nn.Module, round: int) -> Acquired:
        images, logits, c = [], [], self.config
        for name, source in self.members.items():
            turn = c.turns(c.of[name], round)
            if c.turns(c.of[name], round + 1) == turn:
                continue
            got = source.acquire(student, turn)
            mine = {f"{name}/{key}": value for key, value in source.terms.items()}
            if isinstance(got.images, Tensor) and got.images.is_floating_point():
                mine[f"{name}/mean"] = got.images.mean()  # rounding to uint8 would hide values that are not finite
            self.terms = {**self.terms, **mine}
            x = as_uint8(got.images)
            x = (x[:] if isinstance(x, Rows) else x).to(self.context.device)
            images.append(x)
            logits.append(self.context.label(x) if got.logits is None else got.logits)
            if round == 0:
                self._first[name] = len(x)
        return Acquired(torch.cat(images), torch.cat(logits))

    def expected(self, first: int, rounds: int) -> float:
        """Raises DodistillError where the pool would overwrite the images of a part that acquires once."""
        c, size = self.config, sum(self._first.values())
        brings = {
            name: self.members[name].expected(n, c.turns(c.of[name], rounds)) * first / size
            for name, n in self._first.items()
        }
        total, once = sum(brings.values()), [name for name in brings if not c.of[name].every]
        if once and len(once) < len(brings) and total > self.context.capacity and self.context.eviction == "oldest":
            each = ", ".join(f"{name} {n:,.0f}" for name, n in brings.items())
            raise DodistillError(
                f"the parts of source mixture bring {total:,.0f} images in this run ({each}), but pool.capacity is "
                f"{self.context.capacity:,}, and {once[0]}, which acquires once, would be overwritten; give "
                f"--pool.capacity {-(-int(total + 1) // 1000) * 1000}, --pool.eviction reservoir, or "
                f"--source.of.{once[0]}.every STEPS."
            )
        return total

    def makes_with(self) -> tuple[nn.Module, int, int] | None:
        """That of the first part by name that has one."""
        return next((made for part in self.members.values() if (made := part.makes_with()) is not None), None)

    def generators(self) -> list[nn.Module]:
        return [net for part in self.members.values() for net in part.generators()]

    def parts(self) -> dict[str, Any]:
        return dict(self.members)
