"""The one loop: acquire -> observe -> draw -> match -> evaluate. It knows no method by name."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import registry
from .augment import crop_flip, to_float, to_uint8
from .causal.base import Interventions
from .causal.dictionary import FOREIGN, ConfounderDictionary
from .config import Distill
from .errors import DodistillError
from .evaluate import agreement, predict, top1
from .pool import Draw, Pool
from .run import RunFolder
from .runtime import Context, autocast, pick_device
from .teacher import Teacher

if TYPE_CHECKING:
    from .progress import Progress


class Diverged(DodistillError):
    """A loss term is no longer a finite number."""


@dataclass
class Test:
    """Labelled images that are only reported on: x uint8 [n, C, H, W], y long [n]."""

    x: Tensor
    y: Tensor


class Distiller:
    """Everything that one run consists of, and its state.

    Args:
        config: the resolved config.
        teacher: any module from [0, 1] images to logits.
        student: any module from [0, 1] images to logits; trained in place.
        image_shape: (C, H, W).
        unlabeled: uint8 [n, C, H, W] for a sampler.
        test: optional; reported on, never used to choose.
        foreign: another model that predicts M for the dictionary (KDCI Table 5).
    """

    def __init__(
        self,
        config: Distill,
        teacher: nn.Module,
        student: nn.Module,
        image_shape: tuple[int, int, int],
        unlabeled: Tensor | None = None,
        test: Test | None = None,
        foreign: nn.Module | None = None,
    ) -> None:
        self.config, loop = config, config.loop
        if loop.threads:
            torch.set_num_threads(loop.threads)
        self.device = device = pick_device(loop.device)
        self.autocast = autocast(device, loop.precision)
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher, image_shape)
        self.teacher.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        require(config.source, self.teacher, unlabeled is not None)
        if not 0 <= config.augment.pad < min(self.teacher.image_shape[1:]):
            raise DodistillError(
                f"augment.pad is {config.augment.pad} pixels; for images of {self.teacher.image_shape} it must lie "
                f"between 0 and {min(self.teacher.image_shape[1:]) - 1}."
            )
        self.student = student.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._check_student()
        self.test = test if test is None else Test(test.x.to(device), test.y.to(device))
        self.ema = copy.deepcopy(self.student).requires_grad_(False).eval()

        extra = {FOREIGN: Teacher(foreign, image_shape).to(device)} if foreign is not None else {}
        self.context = Context(
            teacher=self.teacher, device=device, seed=loop.seed, autocast=self.autocast, augment=config.augment,
            unlabeled=unlabeled, extra=extra,
        )  # fmt: skip
        ctx = self.context
        self.source = config.source.build(ctx)
        self.dictionary: ConfounderDictionary | None = None
        if any(i.needs_dictionary for i in config.interventions):
            self.dictionary = config.dictionary.build(ctx, config.source.kind)
        self.interventions = Interventions(i.build(ctx) for i in config.interventions).to(device)
        self.criterion = config.criterion.build(ctx).to(device)
        self.update = config.update.build()
        shape, classes = ctx.image_shape, ctx.num_classes
        self.pool = Pool(config.pool.capacity, shape, classes, device, config.pool.eviction)
        self.holdout = Pool(config.pool.holdout_capacity, shape, classes, device, "reservoir")
        self.draw = Draw()
        self.generators = {name: ctx.generator(name) for name in ("pool", "draw", "augment")}
        self.optimizers = self._optimizers()
        self.step = self.round = 0
        self.seconds = self.acquire_seconds = 0.0
        self.best_on_test = 0.0
        self.last_eval: dict[str, float] = {}
        self._window: dict[str, Tensor] = {}
        self._last_batch: tuple[Tensor, Tensor] | None = None

    # ------------------------------------------------------------------------------------------- set-up

    def _check_student(self) -> None:
        """The student must answer as the teacher does; cheap, and before anything is computed."""
        with torch.no_grad():
            self.student.eval()
            try:
                out = self.student(torch.full((2, *self.teacher.image_shape), 0.5, device=self.device))
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
                raise DodistillError(
                    f"the student cannot read images of shape {self.teacher.image_shape} (C, H, W): {error}"
                ) from error
        if not isinstance(out, Tensor):
            raise DodistillError(f"the student returns {type(out).__name__}, not one tensor of logits; wrap it.")
        if out.shape != (2, self.teacher.num_classes):
            raise DodistillError(
                f"the student returns shape {tuple(out.shape)} for 2 images, the teacher {self.teacher.num_classes} "
                f"classes; build the student with num_classes={self.teacher.num_classes}."
            )

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """SGD for the student; parts without a rate of their own join it without weight decay; others get Adam."""
        c = self.config.optim
        groups: list[dict[str, Any]] = [{"params": list(self.student.parameters())}]
        others: list[torch.optim.Optimizer] = []
        for part in (*self.interventions.parts, self.criterion):
            parameters = [p for p in part.parameters() if p.requires_grad]
            if parameters and part.own_lr is None:
                groups.append({"params": parameters, "weight_decay": 0.0})
            elif parameters:
                others.append(torch.optim.Adam(parameters, lr=part.own_lr, fused=True))
        sgd = torch.optim.SGD(
            groups, lr=c.lr, momentum=c.momentum, nesterov=c.nesterov, weight_decay=c.weight_decay, fused=True
        )
        return [sgd, *others]

    def _rate(self) -> float:
        c, t = self.config.optim, self.step / self.config.loop.steps
        if c.schedule == "cosine":
            return c.floor + (c.lr - c.floor) * 0.5 * (1 + math.cos(math.pi * t))
        if c.schedule == "steps":
            return c.lr * (0.1 ** ((t >= 0.4) + (t >= 0.8)))
        if c.schedule == "onecycle":
            return c.lr * (t / 0.2 if t < 0.2 else (1 - t) / 0.8)
        return c.lr

    # -------------------------------------------------------------------------------- acquire, observe

    def _acquire(self) -> None:
        start = time.perf_counter()
        self.student.eval()
        got = self.source.acquire(self.student, self.round)
        self.round += 1
        images = got.images if got.images.dtype == torch.uint8 else to_uint8(got.images)
        sound = not got.images.is_floating_point() or bool(torch.isfinite(got.images).all())
        logits = got.logits if got.logits is not None else predict(self.teacher, images, autocast=self.autocast)
        bad = [f"source/{k}" for k, v in self.source.terms.items() if not bool(torch.isfinite(v))]
        if not sound:
            raise Diverged(self._divergence(f"acquisition {self.round} made images that are not finite", bad))
        if not bool(torch.isfinite(logits).all()):
            raise Diverged(self._divergence(f"the teacher answers acquisition {self.round} with NaN or infinity", bad))
        if bad:
            raise Diverged(self._divergence(f"acquisition {self.round} diverged", bad))
        g = self.generators["pool"]
        n = len(images)
        if n < 2:
            raise DodistillError(
                f"acquisition {self.round} has {n} image(s); it needs one to learn from and one to judge by."
            )
        held = min(max(1, round(n * self.config.pool.holdout)), self.config.pool.holdout_capacity)
        order = torch.randperm(n, generator=g, device=self.device).to(images.device)
        back, front = order[:held], order[held:]
        pick = logits.device
        self.holdout.add(images[back], logits[back.to(pick)], g)
        self.pool.add(images[front], logits[front.to(pick)], g)
        self._observe(logits, images)
        self.acquire_seconds += time.perf_counter() - start

    def _observe(self, logits: Tensor, images: Tensor) -> None:
        """Rebuild the dictionary from the newest inputs or the pool, then let the interventions weigh the draw."""
        if self.dictionary is not None:
            whole = self.dictionary.of == "pool"
            x, t = (self.pool.x, self.pool.logits) if whole else (images, logits)
            self.dictionary.build(self._features(x, t))
        self.draw.set(self.pool, self.interventions.weights(self.pool, self.dictionary))

    def _features(self, x: Tensor, t: Tensor) -> Tensor:
        """M [n, d] of images x (uint8): the teacher's logits t, unless another model makes the dictionary."""
        foreign = self.context.extra.get(FOREIGN)
        return t if foreign is None else predict(foreign, x, autocast=self.autocast)

    # ------------------------------------------------------------------------------------------- match

    def _match(self) -> None:
        """One step of the student. Nothing here waits for the device."""
        loop, aug, g = self.config.loop, self.config.augment, self.generators
        index = self.draw(loop.batch, g["draw"])
        x = to_float(crop_flip(self.pool.x[index], aug.pad, g["augment"], aug.flip))
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), self.autocast():
            t = self.teacher(x)
        if self.dictionary is not None and self.dictionary.of == "batch":
            self.dictionary.build(self._features(self.pool.x[index], t))
        self.student.train()

        def objective(student: Any) -> dict[str, Tensor]:
            with self.autocast():
                s = student(x)
            s = s.float()
            self._last_batch = (s.detach(), t)
            return dict(self.criterion(self.interventions.compensate(s, self.dictionary), t))

        for group in self.optimizers[0].param_groups:
            group["lr"] = self._rate()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        terms = self.update.backward(self.student, objective)
        for optimizer in self.optimizers:
            optimizer.step()
        self._average()
        self.step += 1
        for name, value in terms.items():
            self._window[name] = self._window[name] + value if name in self._window else value

    @torch.no_grad()
    def _average(self) -> None:
        """The moving average of the student, with the usual warm-up of its decay."""
        decay = min(self.config.loop.ema, (1 + self.step) / (10 + self.step))
        if not hasattr(self, "_pairs"):
            mine, its = self.student.state_dict(), self.ema.state_dict()
            floats = [k for k in mine if mine[k].is_floating_point()]
            self._pairs = ([its[k] for k in floats], [mine[k] for k in floats])
            counts = [k for k in mine if not mine[k].is_floating_point()]
            self._counts = ([its[k] for k in counts], [mine[k] for k in counts])
        torch._foreach_lerp_(self._pairs[0], self._pairs[1], 1 - decay)
        if self._counts[0]:
            torch._foreach_copy_(*self._counts)

    # ---------------------------------------------------------------------------------- look, evaluate

    def _divergence(self, what: str, bad: list[str]) -> str:
        terms = f"; not finite: {', '.join(bad)}" if bad else ""
        return (
            f"{what}{terms}, at step {self.step}. Lower that term's weight or the rate "
            f"(optim.lr is {self.config.optim.lr}); the last good checkpoint is kept."
        )

    def _log(self) -> dict[str, float]:
        """Mean loss terms since the last look, with a single device sync."""
        n = self.step % self.config.loop.log_every or self.config.loop.log_every
        named = {f"match/{k}": v / n for k, v in self._window.items()}
        named |= {f"source/{k}": v for k, v in self.source.terms.items()}
        if self._last_batch is not None:
            named |= self.interventions.log(*self._last_batch, self.dictionary)
        values = torch.stack([v.float().reshape(()).to(self.device) for v in named.values()]).tolist()
        out = dict(zip(named, values))
        bad = [k for k, v in out.items() if not math.isfinite(v)]
        if bad:
            raise Diverged(self._divergence("the loss is not a finite number", bad))
        self._window = {}
        out["loss"] = sum(v for k, v in out.items() if k.startswith("match/"))
        return out

    def evaluate(self) -> dict[str, float]:
        """Agreement with the teacher on the held-back inputs (%), and, where there is a test set, accuracy (%)."""
        out = {}
        for name, model in (("", self.student), ("_ema", self.ema)):
            held = self._answers(model, self.holdout.x)
            if not bool(torch.isfinite(held).all()):
                raise Diverged(self._divergence("the student answers with NaN or infinity", []))
            out[f"agreement{name}"] = agreement(held, self.holdout.logits)
            if self.test is not None:
                out[f"test{name}"] = top1(self._answers(model, self.test.x), self.test.y)
        if self.test is not None:
            self.best_on_test = max(self.best_on_test, out["test"])
        self.last_eval = out
        return out

    def _answers(self, model: nn.Module, x: Tensor) -> Tensor:
        """What the delivered student would say: its logits, with F(z) only if an intervention stays at test time."""
        s = predict(model, x, autocast=self.autocast)
        with torch.no_grad():
            return self.interventions.compensate_at_test(s, self.dictionary)

    def _pool_line(self) -> dict[str, Any]:
        line: dict[str, Any] = {
            "size": len(self.pool),
            "class_shares": [round(v, 5) for v in self.pool.class_shares().tolist()],
            "drawn_shares": [round(v, 5) for v in self.draw.shares(self.pool).tolist()],
        }
        if self.dictionary is not None:
            line["cluster_shares"] = [round(v, 5) for v in self.dictionary.P.tolist()]
        return line

    # ------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything but the pool, which is saved on its own when it changes."""
        return {
            "student": self.student.state_dict(), "ema": self.ema.state_dict(), "source": self.source.state_dict(),
            "interventions": self.interventions.state_dict(), "criterion": self.criterion.state_dict(),
            "dictionary": self.dictionary.state_dict() if self.dictionary is not None else {},
            "optimizers": [o.state_dict() for o in self.optimizers],
            "holdout": self.holdout.state_dict(), "generators": {k: g.get_state() for k, g in self.generators.items()},
            "step": self.step, "round": self.round, "seconds": self.seconds, "acquire_seconds": self.acquire_seconds,
            "best_on_test": self.best_on_test, "last_eval": self.last_eval, "window": self._window,
            "terms": self.source.terms,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], pool: Mapping[str, Any]) -> None:
        for name in ("student", "ema", "source", "interventions", "criterion"):
            getattr(self, name).load_state_dict(state[name])
        if self.dictionary is not None:
            self.dictionary.load_state_dict(state["dictionary"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.holdout.load_state_dict(dict(state["holdout"]))
        self.pool.load_state_dict(dict(pool))
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name].cpu())
        for name in ("step", "round", "seconds", "acquire_seconds", "best_on_test", "last_eval"):
            setattr(self, name, state[name])
        self._window = {k: v.to(self.device) for k, v in state["window"].items()}
        self.source.terms = {k: v.to(self.device) for k, v in state["terms"].items()}
        if self.round:
            self.draw.set(self.pool, self.interventions.weights(self.pool, self.dictionary))

    # --------------------------------------------------------------------------------------------- run

    def _due(self) -> bool:
        """Is the next thing to do an acquisition?"""
        source = self.config.source
        if self.round <= source.warmup:
            return True
        due: bool = source.every > 0 and self.step >= (self.round - source.warmup) * source.every
        return due

    def run(
        self, folder: RunFolder | None = None, progress: Progress | None = None, deadline: float = math.inf
    ) -> bool:
        """Go on to the last step, or to `deadline` (time.monotonic()). True when the last step is done."""
        loop = self.config.loop
        if folder is not None and (saved := folder.load()) is not None:
            self.load_state_dict(*saved)
            if self.step >= loop.steps:  # killed between its last step and its delivery
                return True
        if progress is not None:
            self.context.progress = progress.inner
        mark = saved_at = time.monotonic()
        looked = (self.step, mark)
        while self.step < loop.steps:
            matched = not self._due()
            if not matched:
                self._acquire()
                if folder is not None and (self.config.source.every == 0 or self.round % 10 == 1):
                    folder.log(kind="pool", step=self.step, **self._pool_line())
            else:
                self._match()
            now = time.monotonic()
            last = self.step == loop.steps
            looking = matched and (self.step % loop.log_every == 0 or last)
            values: dict[str, float] = {}
            if looking:
                values = self._log()
                now = time.monotonic()
                values["rate"] = (self.step - looked[0]) * loop.batch / max(now - looked[1], 1e-9)
                values["lr"] = self._rate()
                looked = (self.step, now)
            if matched and (self.step % loop.eval_every == 0 or last):
                result = self.evaluate()
                if folder is not None:
                    folder.log(kind="eval", step=self.step, **result)
            if looking:
                elapsed = self.seconds + now - mark
                if folder is not None:
                    folder.log(kind="log", step=self.step, seconds=round(elapsed, 3), **values)
                if progress is not None:
                    progress.update(self.step, **_shown(values, self.last_eval))
            elif progress is not None and self.step == 0:
                progress.inner("warming up the source", self.round, self.config.source.warmup + 1)
            stop = now > deadline and not last
            if folder is not None and (stop or (now - saved_at > loop.checkpoint_seconds)) and self.step < loop.steps:
                self.seconds += now - mark
                mark = now
                self._finite()
                folder.save(self.state_dict(), self.pool.state_dict(), self.pool.version)
                saved_at = time.monotonic()
            if stop:
                return False
        self.seconds += time.monotonic() - mark
        self._finite()
        if folder is not None:
            folder.log(kind="pool", step=self.step, **self._pool_line())
            folder.save(self.state_dict(), self.pool.state_dict(), self.pool.version)
        return True

    def _finite(self) -> None:
        """A checkpoint of broken weights would bury the last good one."""
        bad = [n for n, p in self.student.named_parameters() if not bool(torch.isfinite(p).all())]
        if bad:
            terms = [k for k, v in self._window.items() if not bool(torch.isfinite(v))]
            raise Diverged(self._divergence("the student's weights are not finite", terms or bad[:3]))

    def delivered(self) -> tuple[str, nn.Module]:
        """The student to ship: the last weights or their average, whichever agrees more with the teacher held-back.

        No label and no test image takes part in the choice.
        """
        score = self.last_eval or self.evaluate()
        which, model = ("ema", self.ema) if score["agreement_ema"] > score["agreement"] else ("last", self.student)
        return which, Compensated(model, self.interventions, self.dictionary) if self.interventions.at_test else model


class Compensated(nn.Module):
    """A student that keeps its intervention at test time (kdci.at_test); `student` is the network alone."""

    def __init__(
        self, student: nn.Module, interventions: Interventions, dictionary: ConfounderDictionary | None
    ) -> None:
        super().__init__()
        self.student, self.interventions, self.dictionary = student, interventions, dictionary

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> compensated logits [B, K]."""
        return self.interventions.compensate_at_test(self.student(x).float(), self.dictionary)


def _shown(values: Mapping[str, float], last: Mapping[str, float]) -> dict[str, float]:
    out = {"loss": values["loss"], "img/s": values["rate"]}
    return out | {k: v for k, v in last.items() if k in ("agreement", "test")}


def require(source: Any, teacher: Teacher, has_unlabeled: bool) -> None:
    """Refuse a teacher that this source cannot serve, naming the sources that would work."""
    able = []
    for name in registry.names("source"):
        needs = registry.config("source", name).needs  # type: ignore[attr-defined]
        if "batchnorm" not in needs or teacher.has_batchnorm:
            able.append(name)
    teacher.require(source.needs - {"unlabeled"}, source.name, able)
    if "unlabeled" in source.needs and not has_unlabeled:
        raise DodistillError(
            f"source {source.name} needs unlabelled images; give --data.unlabeled FOLDER (or .npz, .npy), or in Python "
            "distill(..., unlabeled=images)."
        )


@dataclass
class Result:
    """What a run leaves: the student to ship, the numbers, and the folder."""

    student: nn.Module
    summary: dict[str, Any]
    folder: Path | None
