"""Trackers: a run in TensorBoard, Weights & Biases or Trackio. Each is a watcher, and its failure never ends a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...config.tree import Distill
from ...errors import DodistillError, nearest
from .shared import Backend, Tracking
from .tensorboard import TensorBoard
from .trackio import Trackio
from .wandb import Wandb

BACKENDS: dict[str, type[Backend]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def track_names(track: str | Sequence[str]) -> tuple[str, ...]:
    """`tensorboard,wandb`, or a sequence of names, as names without repetition.

    Raises DodistillError for an unknown name, and for a tracker that is not installed.
    """
    given = track.split(",") if isinstance(track, str) else track
    names = tuple(dict.fromkeys(name.strip() for name in given if name.strip()))
    for name in names:
        if name not in BACKENDS:
            raise DodistillError(nearest(name, BACKENDS, "tracker"))
        try:
            BACKENDS[name].load()
        except ImportError as error:
            raise DodistillError(f"--track {name} needs {name} ({error}): pip install 'dodistill[{name}]'") from error
    return names


def open_trackers(
    track: str | Sequence[str], folder: Path | None, config: Distill, say: Callable[[str], None]
) -> list[Tracking]:
    """One watcher per name. Call it before the run folder loads its checkpoint, which shortens metrics.jsonl.

    Args:
        track: see `track_names`.
        folder: the run folder; it keeps the trackers' run ids, in tracking.json.
        config: becomes the hyper-parameters.
        say: gets a sentence on where the files lie, as in "tensorboard: tensorboard --logdir runs/a/tensorboard".
    """
    names = track_names(track)
    if names and folder is None:
        raise DodistillError(f"track={','.join(names)!r} keeps its run id in the run folder; give out=FOLDER, too.")
    return [] if folder is None else [Tracking(name, BACKENDS[name](), folder, config, say) for name in names]
