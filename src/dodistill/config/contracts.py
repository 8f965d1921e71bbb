"""Types that the settings of a choice must implement on each axis. The base class in an axis' `shared/` does so.

The classes that they build are imported for the type checker only, so this module needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from ..core.context import Context
    from ..criteria.shared.base import Criterion
    from ..interventions.shared.base import Intervention
    from ..interventions.shared.dictionary import ConfounderDictionary
    from ..replay.shared.base import Replay
    from ..sources.shared.base import Source
    from ..updates.shared.base import Update

Kind = Literal["generator", "inversion", "sampler", "data"]


class Settings(Protocol):
    """A frozen dataclass: its fields are the flags of a choice."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]


class SourceSettings(Settings, Protocol):
    """See `sources.shared.base.SourceConfig`."""

    kind: ClassVar[Kind]
    needs: ClassVar[frozenset[str]]
    reads_labels: ClassVar[bool]
    generates: ClassVar[bool]
    together: ClassVar[bool]
    presets: ClassVar[dict[str, dict[str, Any]]]
    origin: ClassVar[dict[str, str]]
    trains: ClassVar[str]
    keeps: ClassVar[str]
    costs: ClassVar[tuple[dict[str, float], ...]]

    @property
    def warmup(self) -> int: ...
    @property
    def every(self) -> int: ...
    @property
    def members(self) -> Mapping[str, SourceSettings]: ...
    def teacher_passes(self) -> tuple[float, float]: ...
    def counted(self, unlabeled: int) -> SourceSettings: ...
    def build(self, context: Context) -> Source: ...


class InterventionSettings(Settings, Protocol):
    """See `interventions.shared.base.InterventionConfig`."""

    @property
    def needs_dictionary(self) -> bool: ...
    def build(self, context: Context) -> Intervention: ...


class CriterionSettings(Settings, Protocol):
    """See `criteria.shared.base.CriterionConfig`."""

    def build(self, context: Context) -> Criterion: ...


class UpdateSettings(Settings, Protocol):
    """See `updates.shared.base.UpdateConfig`."""

    replays: ClassVar[bool]

    def build(self) -> Update: ...


class ReplaySettings(Settings, Protocol):
    """See `replay.shared.base.ReplayConfig`."""

    def build(self, context: Context) -> Replay: ...


class DictionarySettings(Settings, Protocol):
    """See `interventions.shared.dictionary.DictionaryConfig`."""

    def build(self, context: Context, kind: str) -> ConfounderDictionary: ...
