"""The one loop: acquire -> observe -> draw -> match -> evaluate. It knows no method by name."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import registry
from .augment import crop_flip, to_float, to_uint8
from .batch import Batch
from .causal.base import Intervention, Interventions
from .causal.dictionary import FOREIGN, ConfounderDictionary
from .collapse import symptoms, vital_signs
from .config import Distill
from .errors import DodistillError
from .evaluate import agreement, predict, top1
from .pool import Draw, Pool
from .replay.base import Replay
from .run import RunFolder, fingerprint
from .runtime import Context, autocast, laid_out, pick_device, place
from .sources.base import Acquired
from .taps import Features, tapped
from .teacher import Teacher
from .updates.base import Objective
from .view import choose_view

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
        labels: true classes of `unlabeled`, long [n], for a source that distils with data.
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
        labels: Tensor | None = None,
    ) -> None:
        self.config, loop = config, config.loop
        if loop.threads:
            torch.set_num_threads(loop.threads)
        self.device = device = pick_device(loop.device)
        self.autocast = autocast(device, loop.precision)
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher, image_shape)
        place(self.teacher, device)
        require(config.source, self.teacher, unlabeled is not None)
        for part, pad in (("augment", config.augment.pad), ("view", config.view.pad)):
            if not 0 <= pad < min(self.teacher.image_shape[1:]):
                raise DodistillError(
                    f"{part}.pad is {pad} pixels; for images of {self.teacher.image_shape} it must lie between 0 and "
                    f"{min(self.teacher.image_shape[1:]) - 1}."
                )
        self.student = place(student, device)
        self._check_student()
        self.test = test if test is None else Test(test.x.to(device), test.y.to(device))
        self.ema = copy.deepcopy(self.student).requires_grad_(False).eval()

        extra = {FOREIGN: place(Teacher(foreign, image_shape), device)} if foreign is not None else {}
        self.context = Context(
            teacher=self.teacher, device=device, seed=loop.seed, autocast=self.autocast, augment=config.augment,
            view=choose_view(config.view, self.teacher), unlabeled=unlabeled,
            labels=labels, student=self.student, capacity=config.pool.capacity, extra=extra,
        )  # fmt: skip
        ctx = self.context
        self.source = config.source.build(ctx)
        self.dictionary: ConfounderDictionary | None = None
        if any(i.needs_dictionary for i in config.interventions):
            self.dictionary = config.dictionary.build(ctx, config.source.kind)
        self.interventions = Interventions(i.build(ctx) for i in config.interventions).to(device)
        self.criterion = config.criterion.build(ctx).to(device)
        self.update = config.update.build()
        self.replay: Replay = config.replay.build(ctx)
        self.replay.follow(self.source)
        #: what criterion and interventions want of both networks' insides
        self.needs = self.criterion.needs | self.interventions.needs
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
        self.last_log: dict[str, float] = {}
        self._window: dict[str, Tensor] = {}
        self._last_batch: tuple[Tensor, Tensor, Batch] | None = None
        #: what `collapse.symptoms` has found so far, each told once
        self.warnings: dict[str, str] = {}
        self._signs: dict[str, Tensor] = {}  # `vital_signs` of the newest inputs
        self._sound: Tensor | None = None  # are all acquisitions since the last look finite?

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
        """SGD for the student; parts without a rate of their own join it, without weight decay unless they want it;
        others get Adam."""
        c = self.config.optim
        groups: list[dict[str, Any]] = [{"params": list(self.student.parameters())}]
        others: list[torch.optim.Optimizer] = []
        for part in (*self.interventions.parts, self.criterion):
            parameters = [p for p in part.parameters() if p.requires_grad]
            if parameters and part.own_lr is None:
                decays = isinstance(part, Intervention) and part.decays
                groups.append({"params": parameters, "weight_decay": c.weight_decay if decays else 0.0})
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
            return c.lr * 0.1 ** sum(t >= m for m in c.milestones)
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
        logits = got.logits if got.logits is not None else predict(self.teacher, images, autocast=self.autocast)
        whole = [got.images, logits] if got.images.is_floating_point() else [logits]
        sound = torch.stack([torch.isfinite(v).all() for v in (*whole, *self.source.terms.values())]).all()
        self._sound = sound if self._sound is None else self._sound & sound
        if (self.round == 1 or not self._frequent) and not bool(self._sound):
            self._unsound(got.images, logits)
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
        labels = None if got.labels is None else got.labels.to(pick)
        self.holdout.add(images[back], logits[back.to(pick)], g, None if labels is None else labels[back.to(pick)])
        self.pool.add(images[front], logits[front.to(pick)], g, None if labels is None else labels[front.to(pick)])
        self.replay.observe(images[front], logits[front.to(pick)], self.round - 1)
        some = slice(None, None, max(1, n // 512))
        self._signs = vital_signs(images[some], logits[some])
        self._observe(logits, images, got.reference)
        self.acquire_seconds += time.perf_counter() - start

    @property
    def _frequent(self) -> bool:
        """Acquisitions between nearly all steps are checked at the first one and at the log points: the host has to
        wait for a check."""
        every: int = self.config.source.every
        return 0 < every < 10

    def _unsound(self, images: Tensor | None = None, logits: Tensor | None = None) -> None:
        """Say which part of an acquisition is not finite."""
        bad = [f"source/{k}" for k, v in self.source.terms.items() if not bool(torch.isfinite(v))]
        what = f"acquisition {self.round} diverged"
        if images is not None and images.is_floating_point() and not bool(torch.isfinite(images).all()):
            what = f"acquisition {self.round} made images that are not finite"
        elif logits is not None and not bool(torch.isfinite(logits).all()):
            what = f"the teacher answers acquisition {self.round} with NaN or infinity"
        raise Diverged(self._divergence(what, bad))

    def _observe(self, logits: Tensor, images: Tensor, reference: Acquired | None = None) -> None:
        """Rebuild the dictionary from the newest inputs or the pool, then let the interventions weigh the draw.

        A sampler's dictionary is built once (KDCI Sec. 3.2), as is one of reference inputs.
        """
        once = self.config.source.kind == "sampler"
        if self.dictionary is not None and not (once and self.dictionary.built):
            x, t = (self.pool.x, self.pool.logits) if self.dictionary.of == "pool" else (images, logits)
            if reference is not None:
                x = reference.images if reference.images.dtype == torch.uint8 else to_uint8(reference.images)
                t = (
                    reference.logits
                    if reference.logits is not None
                    else predict(self.teacher, x, autocast=self.autocast)
                )
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
        x = to_float(crop_flip(self.pool.x[index], aug.pad, g["augment"], aug.flip, aug.padding))
        # Without augmentation the inputs are those that the teacher has answered already.
        known = None if aug.pad or aug.flip else self.pool.logits[index]
        exactly = self.update.fp32 and self.replay.ready
        acquire = self._objective(x, known, index, self.pool.labels[index], exactly)
        remember = None
        if self.replay.ready:
            old, answer = self.replay.draw(self.student, self.step)
            remember = self._objective(old, answer, exactly=exactly)
        self.student.train()

        for group in self.optimizers[0].param_groups:
            group["lr"] = self._rate()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        terms = self.update.backward(self.student, acquire, remember)
        if self._last_batch is not None:
            _, target, batch = self._last_batch
            self.criterion.observe(target, batch)
            self.interventions.observe(target, batch)
        for optimizer in self.optimizers:
            optimizer.step()
        self._average()
        self.step += 1
        logged = {f"match/{k}": v for k, v in terms.items()} | {f"update/{k}": v for k, v in self.update.terms.items()}
        for name, value in logged.items():
            self._window[name] = self._window[name] + value if name in self._window else value

    def _objective(
        self, x: Tensor, t: Tensor | None, index: Tensor | None = None, labels: Tensor | None = None,
        exactly: bool = False,
    ) -> Objective:  # fmt: skip
        """The matching loss on inputs x, as a function of the student; t are the teacher's logits, where known.

        `exactly`: the student's passes in fp32. The teacher's keep the run's precision.
        """
        x = laid_out(x)
        theirs = Features()
        if t is None or self.needs:
            with torch.no_grad(), self.autocast(), tapped(self.teacher, self.needs) as theirs:
                asked = self.teacher(x)
            t = asked if t is None else t
        if index is not None and self.dictionary is not None and self.dictionary.of == "batch":
            self.dictionary.build(self._features(self.pool.x[index], t))
        where = torch.full((len(x),), -1, device=x.device) if index is None else index
        y = t.argmax(1) if labels is None else labels
        target, done = t, self.step / self.config.loop.steps
        precision = nullcontext if exactly else self.autocast

        def objective(student: Any) -> dict[str, Tensor]:
            with precision(), tapped(self.student, self.needs) as own:
                s = student(x)
            s = s.float()
            batch = Batch(where, y, s, done, own, theirs)
            if index is not None:
                self._last_batch = (s.detach(), target, batch)
            return dict(self.criterion(self.interventions.compensate(s, self.dictionary, batch), target, batch))

        return objective

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
        if self._frequent and self._sound is not None and not bool(self._sound):
            self._unsound()
        self._sound = None
        n = self.step % self.config.loop.log_every or self.config.loop.log_every
        named = {k: v / n for k, v in self._window.items()}
        named |= {f"source/{k}": v for k, v in self.source.terms.items()}
        named |= {f"replay/{k}": v for k, v in self.replay.terms.items()}
        named |= {f"inputs/{k}": v for k, v in self._signs.items()}
        if self._last_batch is not None:
            s, t, batch = self._last_batch
            named |= self.interventions.log(s, t, self.dictionary, batch)
        values = torch.stack([v.float().reshape(()).to(self.device) for v in named.values()]).tolist()
        out = dict(zip(named, values))
        bad = [k for k, v in out.items() if not math.isfinite(v)]
        if bad:
            raise Diverged(self._divergence("the loss is not a finite number", bad))
        self._window = {}
        out["loss"] = sum(v for k, v in out.items() if k.startswith("match/"))
        return out

    def _watch(self, values: Mapping[str, float]) -> dict[str, str]:
        """What has collapsed since the last look, each symptom once."""
        signs = {k.removeprefix("inputs/"): v for k, v in values.items() if k.startswith("inputs/")}
        done, agrees = self.step / self.config.loop.steps, self.last_eval.get("agreement")
        found = symptoms(signs, self.context.num_classes, agrees, done)
        fresh = {k: v for k, v in found.items() if k not in self.warnings}
        self.warnings |= fresh
        return fresh

    def evaluate(self) -> dict[str, float]:
        """Agreement with the teacher on the held-back inputs (%), and accuracy (%): on them (`minival`) where the data
        have labels, and on a test set where there is one. Of the students as they would be delivered."""
        out = {}
        for name, which in (("", "last"), ("_ema", "ema")):
            model = self.complete(which)
            held = predict(model, self.holdout.x, autocast=self.autocast)
            if not bool(torch.isfinite(held).all()):
                raise Diverged(self._divergence("the student answers with NaN or infinity", []))
            out[f"agreement{name}"] = agreement(held, self.holdout.logits)
            if self.context.labels is not None:
                out[f"minival{name}"] = top1(held, self.holdout.labels)
            if self.test is not None:
                out[f"test{name}"] = top1(predict(model, self.test.x, autocast=self.autocast), self.test.y)
        if self.test is not None:
            self.best_on_test = max(self.best_on_test, out["test"])
        self.last_eval = out
        return out

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

    @cached_property
    def made_of(self) -> dict[str, str]:
        """Fingerprints of what a run cannot change under way. A student starts anywhere, but keeps its structure."""
        ctx = self.context
        given = {"unlabelled images": ctx.unlabeled, "labels": ctx.labels}
        models = {"teacher": self.teacher, **ctx.extra}
        out = {k: fingerprint([*m.parameters(), *m.buffers()]) for k, m in models.items()}
        shapes = [(k, tuple(v.shape)) for k, v in self.student.state_dict().items()]
        out["student"] = hashlib.sha256(str(shapes).encode()).hexdigest()[:16]
        return out | {k: fingerprint([v]) for k, v in given.items() if v is not None}

    def require_same(self, began: Mapping[str, str] | None) -> None:
        """Refuse to go on with what another teacher, student or data began. None: nobody wrote it down then."""
        began, mine = began or self.made_of, self.made_of
        if other := sorted(k for k in began.keys() | mine.keys() if began.get(k) != mine.get(k)):
            raise DodistillError(
                f"this run began with other {' and other '.join(other)}; give what it began with, or choose another "
                "--out."
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything but the pool, which is saved on its own when it changes."""
        return {
            "student": self.student.state_dict(), "ema": self.ema.state_dict(), "source": self.source.state_dict(),
            "interventions": self.interventions.state_dict(), "criterion": self.criterion.state_dict(),
            "dictionary": self.dictionary.state_dict() if self.dictionary is not None else {},
            "optimizers": [o.state_dict() for o in self.optimizers],
            "holdout": self.holdout.state_dict(), "generators": {k: g.get_state() for k, g in self.generators.items()},
            "step": self.step, "round": self.round, "seconds": self.seconds, "acquire_seconds": self.acquire_seconds,
            "best_on_test": self.best_on_test, "last_eval": self.last_eval, "last_log": self.last_log,
            "warnings": self.warnings, "signs": self._signs,
            "window": self._window, "terms": self.source.terms, "draw": self.draw.state_dict(),
            "replay": self.replay.state_dict(), "replay_terms": self.replay.terms, "made_of": self.made_of,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], pool: Mapping[str, Any]) -> None:
        """Raises DodistillError for the state of a run that had another teacher, student or images."""
        self.require_same(state.get("made_of"))
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
        for name in (
            "step",
            "round",
            "seconds",
            "acquire_seconds",
            "best_on_test",
            "last_eval",
            "last_log",
            "warnings",
        ):
            setattr(self, name, state[name])
        self._window = {k: v.to(self.device) for k, v in state["window"].items()}
        self.source.terms = {k: v.to(self.device) for k, v in state["terms"].items()}
        self._signs = {k: v.to(self.device) for k, v in state["signs"].items()}
        self.replay.load_state_dict(state["replay"])
        self.replay.terms = {k: v.to(self.device) for k, v in state["replay_terms"].items()}
        if self.round:
            self.draw.set(self.pool, self.interventions.weights(self.pool, self.dictionary))
            self.draw.load_state_dict(state["draw"])

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
                often = max(10, loop.log_every // max(self.config.source.every, 1))
                if folder is not None and (self.config.source.every == 0 or self.round % often == 1):
                    folder.log(kind="pool", step=self.step, **self._pool_line())
            else:
                self._match()
            now = time.monotonic()
            last = self.step == loop.steps
            looking = matched and (self.step % loop.log_every == 0 or last)
            values: dict[str, float] = {}
            if looking:
                values = self._log()
                self.last_log = dict(values)
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
                for symptom, text in self._watch(values).items():
                    if folder is not None:
                        folder.log(kind="warning", step=self.step, symptom=symptom, text=text)
                    if progress is not None:
                        progress.note(text)
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
        if self._sound is not None and not bool(self._sound):
            self._unsound()
        bad = [n for n, p in self.student.named_parameters() if not bool(torch.isfinite(p).all())]
        if bad:
            terms = [k for k, v in self._window.items() if not bool(torch.isfinite(v))]
            raise Diverged(self._divergence("the student's weights are not finite", terms or bad[:3]))

    def delivered(self) -> tuple[str, nn.Module]:
        """The student to ship: the last weights or their average, whichever agrees more with the teacher held-back.

        No label and no test image takes part in the choice.
        """
        score = self.last_eval or self.evaluate()
        which = "ema" if score["agreement_ema"] > score["agreement"] else "last"
        return which, self.complete(which)

    def complete(self, which: str) -> nn.Module:
        """The `last` student or its average `ema`, with whatever interventions stay in it at test time."""
        return self.interventions.deliver(self.ema if which == "ema" else self.student, self.dictionary)


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
