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
    from .config.tree import resolve as resolve
    from .data.images import load_images as load_images
    from .engine import Result as Result
    from .engine.teach import teach as teach
    from .errors import DodistillError as DodistillError
    from .models import Normalized as Normalized
    from .models import load_model as load_model
    from .models import save_model as save_model
    from .models.teacher import Teacher as Teacher
    from .report.report import write_report as write_report

_HOME = {
    "distill": "api", "resolve": "config.tree", "load_images": "data.images", "Result": "engine",
    "DodistillError": "errors", "Normalized": "models", "load_model": "models", "save_model": "models",
    "write_report": "report.report", "teach": "engine.teach", "Teacher": "models.teacher",
}  # fmt: skip
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `import dodistill` and `--help` do not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
