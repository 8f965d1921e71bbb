"""The state of a part of a run, from the things that change in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import DodistillError


def saved(parts: Mapping[str, Any], owner: object) -> dict[str, Any]:
    """Name -> state of tensors and of things with `state_dict` and `load_state_dict`.

    Raises DodistillError, which names the `owner` of the parts, for anything else.
    """
    for name, part in parts.items():
        if not isinstance(part, Tensor) and not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
            who = type(owner)
            raise DodistillError(
                f"{who.__module__}.{who.__name__}: parts()[{name!r}] is a {type(part).__name__}; a checkpoint keeps "
                "tensors, and things with state_dict and load_state_dict."
            )
    return {name: part if isinstance(part, Tensor) else part.state_dict() for name, part in parts.items()}


@torch.no_grad()
def restore(parts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Give the parts the state that `saved` returned; tensors change in place."""
    for name, part in parts.items():
        if isinstance(part, Tensor):
            part.copy_(state[name])
        else:
            part.load_state_dict(state[name])
