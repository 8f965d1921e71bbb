"""Named loss terms: their sum is the loss, and their detached values are logged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of one or more scalar terms."""
    return torch.stack(list(terms.values())).sum()


def detached(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same terms without their graph."""
    return {name: value.detach() for name, value in terms.items()}
