"""Memory of sources between acquisitions: rings of features, and generators by class."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

BankType = Literal["float32", "bfloat16"]
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class FeatureBank:
    """A ring of at most `capacity` rows, allocated once on the device."""

    def __init__(self, capacity: int, width: int, dtype: BankType, device: torch.device) -> None:
        self.rows = torch.empty(capacity, width, dtype=_TYPES[dtype], device=device)
        self.seen = 0

    def __len__(self) -> int:
        return min(self.seen, len(self.rows))

    def add(self, rows: Tensor) -> None:
        """Replace the oldest rows by `rows` [n, width], where n is at most the capacity."""
        slots = torch.arange(self.seen, self.seen + len(rows), device=self.rows.device) % len(self.rows)
        self.rows[slots] = rows.detach().to(self.rows.dtype)
        self.seen += len(rows)

    def sample(self, k: int, generator: torch.Generator) -> Tensor:
        """k different rows at random, in fp32; all rows, where there are fewer."""
        index = torch.randperm(len(self), generator=generator, device=self.rows.device)[:k]
        return self.rows[index].float()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows[: len(self)].clone(), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]
        self.rows[: len(self)] = state["rows"].to(self.rows.device)


class GeneratorBank:
    """Class -> the parameters of its generator, as one flat vector on the host. A class is present once stored."""

    def __init__(self, dtype: BankType) -> None:
        self.dtype = _TYPES[dtype]
        self.rows: dict[int, Tensor] = {}

    def store(self, k: int, net: nn.Module) -> None:
        self.rows[k] = torch.cat([p.detach().flatten() for p in net.parameters()]).to("cpu", self.dtype)

    @torch.no_grad()
    def load(self, k: int, net: nn.Module) -> None:
        parameters = list(net.parameters())
        row = self.rows[k].to(parameters[0].device, parameters[0].dtype)
        for p, values in zip(parameters, row.split([p.numel() for p in parameters])):
            p.copy_(values.view(p.shape))

    @property
    def mib(self) -> float:
        return sum(row.numel() * row.element_size() for row in self.rows.values()) / 2**20

    def state_dict(self) -> dict[int, Tensor]:
        return dict(self.rows)

    def load_state_dict(self, state: dict[int, Tensor]) -> None:
        self.rows = {k: row.to("cpu", self.dtype) for k, row in state.items()}
