"""Settings of several choices under one key, as in `source: {name: mixture, of: {fast: {K: 5}, procedural: {}}}`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn


class Parts(dict[str, Any]):
    """Name -> settings, in the order of the names. It cannot be changed, so that it can be a field of a frozen config.

    The settings are a config (a frozen dataclass), or a mapping of those that differ from the defaults.
    """

    def __init__(self, settings: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        super().__init__(sorted(dict(settings).items()))

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self))

    def __reduce__(self) -> tuple[type[Parts], tuple[dict[str, Any]]]:
        return Parts, (dict(self),)

    def __str__(self) -> str:
        """The names as a YAML mapping, which gives each its default settings."""
        return f"{{{', '.join(self)}}}"

    def _refuse(self, *_args: Any, **_settings: Any) -> NoReturn:
        raise TypeError("the parts of a config cannot be changed; make a new config.")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _refuse  # type: ignore
