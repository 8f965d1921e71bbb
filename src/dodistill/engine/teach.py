"""Train a classifier on real data: a teacher, or a student as the upper bound of a table."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.precision import Precision, trial
from ..core.runtime import generator, restore_stream, seeded_steps
from ..data.images import Images, minival, refuse_one_class
from ..errors import DodistillError, at_least, positive
from ..evaluation.evaluate import accuracy, predict
from ..functional.augment import View, to_float
from ..functional.memory_format import laid_out, place
from ..functional.schedules import cosine
from ..models import Normalized
from ..models.normalized import logits_of


@dataclass(frozen=True)
class Teach:
    """How to train. The defaults are for 32x32 colour images; `flip` must be off for digits."""

    model: str = "wrn40_2"  #: a spec of `load_model`
    num_classes: int | None = None  #: None: read from the labels
    epochs: int = 200
    batch: int = 128
    lr: float = 0.1  #: peak
    optimizer: str = "sgd"  #: sgd (Nesterov), or adamw, which vision transformers need, at lr 1e-3 or so
    momentum: float = 0.9  #: of sgd
    weight_decay: float = 5e-4
    schedule: str = "onecycle"  #: onecycle (linear up to the peak, linear down to 0) or cosine
    warmup: float = 0.2  #: share of the steps on the way up (onecycle)
    label_smoothing: float = 0.0
    pad: int = 4  #: largest shift in pixels
    padding: str = "zeros"  #: zeros or reflect
    crop: str = "shift"  #: shift, or resized: a random part of the image, resized (as for ImageNet)
    scale: tuple[float, float] = (0.08, 1.0)  #: share of the area that a resized crop keeps
    flip: bool = True
    precision: str = "auto"  #: auto, fp32, bf16
    minival: float = 0.02  #: share of the training images held back; reported, and usable for selection
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adamw"):
            raise DodistillError(f"unknown optimizer {self.optimizer!r}; use sgd or adamw.")
        if self.schedule not in ("onecycle", "cosine"):
            raise DodistillError(f"unknown schedule {self.schedule!r}; use onecycle or cosine.")
        if self.crop not in ("shift", "resized"):
            raise DodistillError(f"unknown crop {self.crop!r}; use shift or resized.")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise DodistillError(f"scale is {list(self.scale)}; give shares 0 < low <= high <= 1, as in [0.08, 1].")
        at_least(1, "teach", epochs=self.epochs, num_classes=self.num_classes)
        at_least(2, "teach", batch=self.batch)
        at_least(0, "teach", weight_decay=self.weight_decay, pad=self.pad, seed=self.seed)
        positive("teach", ", as in 0.1", lr=self.lr)
        if self.precision not in ("auto", "fp32", "bf16"):
            raise DodistillError(f"unknown precision {self.precision!r}; use auto, fp32 or bf16.")
        for name in ("minival", "momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise DodistillError(f"teach.{name} is {getattr(self, name)}; it must lie in [0, 1).")
        if not 0 <= self.warmup <= 1:
            raise DodistillError(f"teach.warmup is {self.warmup}; it is a share of the steps, between 0 and 1.")


Log = dict[str, Any]


def lr_at(config: Teach, step: int, steps: int) -> float:
    """Learning rate of step 0..steps-1."""
    if config.schedule == "cosine":
        return cosine(step, config.lr, of=steps)
    peak = max(1.0, config.warmup * steps)
    return config.lr * min((step + 1) / peak, (steps - step) / max(1.0, steps - peak + 1))


def teach(
    model: nn.Module,
    images: Images,
    test: Images | None = None,
    config: Teach | None = None,
    on_log: Callable[[Log], None] | None = None,
    device: torch.device | None = None,
    resume: Mapping[str, Any] | None = None,
    on_checkpoint: Callable[[dict[str, Any]], None] | None = None,
    deadline: float = math.inf,
    on_step: Callable[[int], None] | None = None,
) -> Log:
    """Train `model` (logits of images in [0, 1]) in place, on `device` (default: where it is).

    SGD-Nesterov or AdamW on the whole data set, which is kept on the device and augmented in batches; one sync with the
    device per epoch, when `on_log` gets `{epoch, epochs, step, steps, loss, lr, minival, seconds}`. Returns `{loss,
    minival, test, seconds, images_per_second, steps, train_images, precision}`; accuracies in percent, None without
    images to measure on.
    `on_step` gets the number of each step at its start, for a progress display.
    After each epoch `on_checkpoint` gets the state for `resume`, which is bit-identical on the CPU. After `deadline`
    (time.monotonic()) the training stops at the end of the epoch and returns `{"finished": False, "epoch": ...}`.
    The weights are those of the last step. `test` is scored once, at the end, and chooses nothing. A `Normalized`
    without class names gets those of the images.
    Raises DodistillError without labels, when labels exceed the classes, and when the loss becomes NaN.
    """
    config = config or Teach()
    device = device or next(model.parameters()).device
    _require_labelled(images, test)
    if config.padding not in ("reflect", "zeros") or not 0 <= config.pad < min(images.image_shape[1:]):
        raise DodistillError(
            f"pad is {config.pad} and padding {config.padding!r}; for {images.image_shape} images pad must be below "
            "height and width, and padding reflect or zeros."
        )
    kept, held = minival(len(images), config.minival, config.seed)
    if len(kept) < 2:
        raise DodistillError(f"{len(kept)} training image(s) are too few; give at least 2 beside the minival share.")
    val = images.select(held).to(device) if len(held) else None
    train = images.select(kept).to(device)
    assert train.y is not None
    place(model, device)
    cast = Precision(device, config.precision)
    outputs = _check_classes(model, train, images.num_classes)
    if isinstance(model, Normalized) and len(images.classes) == outputs:
        model.spec.setdefault("classes", images.classes)

    rng = generator(device, config.seed, "teach")
    batch = min(config.batch, len(train))
    per_epoch = len(train) // batch
    steps = config.epochs * per_epoch
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(trained, config)
    begun, before = 0, 0.0
    if resume is not None:
        if {"optimizer": "sgd"} | resume["config"] != asdict(config):  # older checkpoints do not name it
            raise DodistillError(
                "the checkpoint belongs to another schedule; use its settings, or delete the checkpoint."
            )
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        restore_stream(rng, resume["rng"])
        cast.load_state_dict(resume.get("precision") or cast.state_dict())  # absent in older checkpoints
        begun, before = resume["epoch"], resume["seconds"]
    else:
        cast.settle(trial(model, train.image_shape, device))
    model.train()
    start, step, evaluating = time.perf_counter(), begun * per_epoch, 0.0
    log: Log = {"loss": math.nan, "minival": None, "seconds": before} | dict(resume["log"] if resume else {})
    with seeded_steps(device, config.seed) as begin:
        for epoch in range(begun, config.epochs):
            order = torch.randperm(len(train), device=device, generator=rng)
            total = torch.zeros((), device=device)
            for index in order[: per_epoch * batch].view(per_epoch, batch):
                begin(step)
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(config, step, steps)
                x = _augmented(train.x[index], config, rng)
                with cast():
                    loss = F.cross_entropy(
                        logits_of(model(x), config.model).float(),
                        train.y[index],
                        label_smoothing=config.label_smoothing,
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.detach()
                step += 1
                if on_step is not None and step % per_epoch:
                    on_step(step)
            mean = (total / per_epoch).item()
            if not math.isfinite(mean):
                raise DodistillError(f"the loss became {mean} in epoch {epoch + 1}; lower lr (now {config.lr}).")
            now = time.perf_counter()
            scored = accuracy(model, val, autocast=cast) if val is not None else None
            evaluating += time.perf_counter() - now
            seconds = before + time.perf_counter() - start
            log = {"epoch": epoch + 1, "epochs": config.epochs, "step": step, "steps": steps, "loss": mean}
            log |= {"lr": optimizer.param_groups[0]["lr"], "minival": scored, "seconds": seconds}
            if on_log is not None:
                on_log(log)
            if on_checkpoint is not None:
                on_checkpoint(
                    {"config": asdict(config), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "rng": rng.get_state(), "precision": cast.state_dict(), "epoch": epoch + 1, "seconds": seconds,
                     "log": log}
                )  # fmt: skip
            if time.monotonic() > deadline and epoch + 1 < config.epochs:
                return {"finished": False, "epoch": epoch + 1}
    trained_in = time.perf_counter() - start - evaluating
    model.eval()
    return {
        "loss": log["loss"],
        "minival": log["minival"],
        "test": accuracy(model, test.to(device), autocast=cast) if test is not None else None,
        "seconds": log["seconds"],
        "images_per_second": (step - begun * per_epoch) * batch / max(trained_in, 1e-9),
        "steps": steps,
        "train_images": len(train),
        "precision": cast.reason,
    }


def _require_labelled(images: Images, test: Images | None) -> None:
    """Refuse images that nothing can be learned from, or scored on: without labels, or of one class."""
    if images.y is None:
        raise DodistillError("the training images have no labels; teaching needs them: give labelled images.")
    if test is not None and test.y is None:
        raise DodistillError("the test images have no labels; accuracy needs them: give labelled images.")
    refuse_one_class(images, "training images")
    if test is not None:
        refuse_one_class(test, "test images")


def _optimizer(trained: list[nn.Parameter], config: Teach) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    return torch.optim.SGD(
        trained,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
        fused=True,
    )


def _augmented(x: Tensor, config: Teach, rng: torch.Generator) -> Tensor:
    view = View(config.crop, config.padding, config.pad, config.flip, config.scale)
    x = view(to_float(x), rng) if config.crop == "resized" else to_float(view(x, rng))
    return laid_out(x)


def _check_classes(model: nn.Module, train: Images, classes: int) -> int:
    """The number of outputs, by one forward pass in eval mode. Its messages replace an index error of the
    cross-entropy."""
    try:
        outputs = predict(model, train.x[:2]).shape[1]
    except RuntimeError as error:
        raise DodistillError(
            f"the model does not take images of shape {train.image_shape} (channels, height, width): "
            f"{str(error).splitlines()[0]}"
        ) from error
    if classes > outputs:
        raise DodistillError(
            f"labels go up to {classes - 1}, but the model has {outputs} classes; give num_classes={classes}."
        )
    return outputs
