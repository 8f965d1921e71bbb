"""The YAML front matter of a model card, and what a card that leaves this machine may say about it."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

#: From where a path begins (at a root, a home, a drive, a share, file:// or a parent folder, where a word begins) to
#: the end of the text, as folders may have spaces and commas, or to the next of several files of code.
_PATH = re.compile(
    r"(?<![\w/.\\-])(?:[A-Za-z]:[\\/](?!/)|file:/+|\\\\(?=\w)|~?/(?![/\s])|\.{1,2}[\\/])(?:(?!\.py\+).)*", re.DOTALL
)
LICENCE = "other"


def front_matter(
    config: Mapping[str, Any], summary: Mapping[str, Any], licence: str = LICENCE, files: Sequence[str] = ()
) -> str:
    """The block between `---` lines: licence, library, task, tags, and the accuracy of the weights if it was measured.

    `licence` is an id of the hub; `other` is that of the teacher. `files` lie beside the card.
    """
    tags = ["image-classification", "knowledge-distillation", "data-free"]
    tags += ["onnx"] if any(name.endswith(".onnx") for name in files) else []
    found: dict[str, Any] = {"library_name": "dodistill", "license": licence}
    if licence == LICENCE:
        found["license_name"] = "as-the-teacher"
    found |= {"pipeline_tag": "image-classification", "tags": tags}
    accuracy = summary.get("delivered_accuracy")
    if isinstance(accuracy, int | float):
        data = config.get("data")
        test = str(data.get("test") or "") if isinstance(data, Mapping) else ""
        slug = re.sub(r"\W+", "-", test.lower()).strip("-") or "test-set"
        found["metrics"] = ["accuracy"]
        found["model-index"] = [{
            "name": str(summary.get("student_name") or "student"),
            "results": [{
                "task": {"type": "image-classification"},
                "dataset": {"name": test or "a test set", "type": slug},
                "metrics": [{"type": "accuracy", "value": round(float(accuracy), 2), "name": "accuracy, in percent"}],
            }],
        }]  # fmt: skip
    text: str = yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---"


def without_folders(value: Any) -> Any:
    """A config, a summary or a text in which each path of this machine is the name of its file alone.

    In a command each word is taken alone. In other text what stands between the first path and the last separator is
    lost: nothing tells it from a folder's name.
    """
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    if isinstance(value, str):
        if value.startswith("dodistill "):
            with contextlib.suppress(ValueError):  # an apostrophe: no command, but a sentence
                return " ".join(shlex.quote(without_folders(word)) for word in shlex.split(value))
        return _PATH.sub(lambda found: re.split(r"[\\/]", found[0].rstrip("\\/"))[-1], value)
    return value
