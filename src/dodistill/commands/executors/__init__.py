"""Where the cells of a grid run: on this machine, on a Ray cluster, or as slurm jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import DodistillError, at_least
from ..storage import Storage
from .shared import Executor


@dataclass(frozen=True)
class Where:
    """What the flags of `compare` say of the place."""

    on: str = "local"
    jobs: int | None = None
    per_gpu: int = 0
    address: str = ""
    storage: str = ""
    slurm: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raises DodistillError for flags that do not fit."""
        at_least(1, "compare", jobs=self.jobs)
        at_least(0, "compare", per_gpu=self.per_gpu)
        for flag, given, of in (
            ("--address", self.address, ("ray",)),
            ("--slurm", self.slurm, ("slurm",)),
            ("--per-gpu", self.per_gpu, ("local", "ray")),
        ):
            if given and self.on not in of:
                raise DodistillError(f"{flag} {given} is of --on {' or '.join(of)}, not of --on {self.on}; remove it.")

    def stored(self, out: Path) -> str:
        """The storage: as given, or a folder of the output folder for cells that run elsewhere."""
        url = self.storage or ("" if self.on == "local" else str(out / "storage"))
        return url if "://" in url or not url else str(Path(url).expanduser().absolute())

    def executor(self, out: Path) -> Executor:
        """The executor. Raises DodistillError for a missing library, cluster or parameter, and for a storage that
        refuses."""
        if url := self.stored(out):
            Storage(url).check()
        if self.on == "ray":
            from .on_ray import OnRay

            return OnRay(self.address, self.jobs, self.per_gpu)
        if self.on == "slurm":
            from .on_slurm import OnSlurm

            return OnSlurm((out / "slurm").absolute(), self.jobs, self.slurm)
        from .local import Local, visible_gpus

        return Local(self.jobs, self.per_gpu, visible_gpus())
