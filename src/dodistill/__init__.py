"""dodistill: distil a trained image classifier without its training data, under P(S | do(X)).

>>> import dodistill                                                            # doctest: +SKIP
>>> teacher = dodistill.load_model("wrn40_2", weights="teacher.safetensors")    # doctest: +SKIP
>>> student = dodistill.load_model("wrn16_1", num_classes=10, mean="cifar10")   # doctest: +SKIP
>>> result = dodistill.distill(teacher, student, source="fast", intervention="kdci", out="runs/first")
...                                                                             # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import distill as distill
    from .api import evaluate as evaluate
    from .commands.cell import run_cell as run_cell
    from .config.tree import resolve as resolve
    from .core.batch import Batch as Batch
    from .core.context import Context as Context
    from .criteria.shared.base import Criterion as Criterion
    from .criteria.shared.base import CriterionConfig as CriterionConfig
    from .data.images import load_images as load_images
    from .engine.teach import teach as teach
    from .errors import DodistillError as DodistillError
    from .interventions.shared.base import Intervention as Intervention
    from .interventions.shared.base import InterventionConfig as InterventionConfig
    from .models import Normalized as Normalized
    from .models import load_model as load_model
    from .models import save_model as save_model
    from .models.teacher import Teacher as Teacher
    from .replay.shared.base import Replay as Replay
    from .replay.shared.base import ReplayConfig as ReplayConfig
    from .report.report import write_report as write_report
    from .report.result import Result as Result
    from .sources.shared.base import Acquired as Acquired
    from .sources.shared.base import Source as Source
    from .sources.shared.base import SourceConfig as SourceConfig
    from .updates.shared.base import Objective as Objective
    from .updates.shared.base import Update as Update
    from .updates.shared.base import UpdateConfig as UpdateConfig

_HOME = {
    "distill": "api", "evaluate": "api", "Result": "report.result", "resolve": "config.tree",
    "load_images": "data.images", "run_cell": "commands.cell",
    "DodistillError": "errors", "Normalized": "models", "load_model": "models", "save_model": "models",
    "write_report": "report.report", "teach": "engine.teach", "Teacher": "models.teacher",
    # building blocks of your own methods: docs/tutorial.md
    "Source": "sources.shared.base", "SourceConfig": "sources.shared.base", "Acquired": "sources.shared.base",
    "Intervention": "interventions.shared.base", "InterventionConfig": "interventions.shared.base",
    "Criterion": "criteria.shared.base", "CriterionConfig": "criteria.shared.base",
    "Update": "updates.shared.base", "UpdateConfig": "updates.shared.base", "Objective": "updates.shared.base",
    "Replay": "replay.shared.base", "ReplayConfig": "replay.shared.base",
    "Context": "core.context", "Batch": "core.batch",
}  # fmt: skip
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `import dodistill` and `--help` do not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
