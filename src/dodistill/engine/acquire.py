"""From a source to a batch: acquires substitution inputs, keeps them in the pool, and draws batches (`Drawn`)."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from ..config.tree import Distill
from ..core.ahead import Ahead
from ..core.batch import Drawn
from ..core.context import Context
from ..core.pool import Draw, Pool
from ..core.runtime import restore_stream
from ..core.views import Views
from ..data.rows import Pixels, as_uint8, rows_of
from ..evaluation.collapse import vital_signs
from ..evaluation.evaluate import predict
from ..functional.memory_format import laid_out
from ..interventions.shared.base import Interventions
from ..interventions.shared.dictionary import FOREIGN, ConfounderDictionary
from ..models.taps import Features, tapped
from ..replay.shared.base import Replay
from ..sources.shared.base import Acquired, Source
from .answers import require_acquired, require_sound, require_terms
from .job import require_kind
from .meter import Diverged


class Acquirer:
    """Owns source, pool, held-back inputs, replay, dictionary and draw. Only it and the source call the teacher.

    Args:
        needs: features of the teacher that the matching reads (see `taps.tapped`).
    """

    def __init__(
        self, config: Distill, context: Context, interventions: Interventions, needs: frozenset[str] = frozenset()
    ) -> None:
        self.config, self.context = config, context
        self.interventions, self.needs = interventions, needs
        self.source = config.source.build(context)
        require_kind(self.source, Source, config.source)
        self.dictionary: ConfounderDictionary | None = None
        if any(i.needs_dictionary for i in config.interventions):
            self.dictionary = config.dictionary.build(context, config.source.kind)
        self.replay = config.replay.build(context)
        require_kind(self.replay, Replay, config.replay)
        self.replay.follow(self.source)
        shape, classes, device = context.image_shape, context.num_classes, context.device
        given = context.unlabeled
        self.pool = Pool(config.pool.capacity, shape, classes, device, config.pool.eviction, given)
        #: held-back inputs; never used for training, the student's agreement is measured on them
        self.holdout = Pool(config.pool.holdout_capacity, shape, classes, device, "reservoir", given)
        self.sampler = Draw()
        self.views = Views(self.pool, config.augment, context.generator("views"))
        self.generators = {name: context.generator(name) for name in ("pool", "draw", "augment")}
        self.slots = Ahead(self.pool, self.sampler, self.generators["draw"], context.ranks)  #: the draw of batches
        self.round = 0  #: acquisitions done
        self.seconds = 0.0  #: their total time
        self.signs: dict[str, Tensor] = {}  #: `vital_signs` of the newest inputs
        self._sound = torch.ones((), dtype=torch.bool, device=device)  # are all acquisitions since `check` finite?
        self.sharing = False  #: whether all ranks are inside the same acquisition
        self._remembers = False  # whether the replay of the first rank is ready

    # --------------------------------------------------------------------------------------------- acquire

    @property
    def warming(self) -> bool:
        """Whether the source is still in its warm-up, before the first matching step."""
        return self.round <= self.config.source.warmup

    def due(self, step: int) -> bool:
        """Whether an acquisition is due after `step` matching steps."""
        source = self.config.source
        return self.warming or (source.every > 0 and step >= (self.round - source.warmup) * source.every)

    @property
    def expected(self) -> float:
        """The expected time of the next acquisition: the mean so far, in seconds. 0 before the first."""
        return self.seconds / max(self.round, 1)

    @property
    def frequent(self) -> bool:
        """Whether there are few steps between acquisitions. Then only the first acquisition and those at log points are
        checked, because the host has to wait for a check."""
        return 0 < self.config.source.every < 10

    def acquire(self, student: nn.Module) -> None:
        """One acquisition, into pool, held-back inputs, replay and dictionary."""
        start = time.perf_counter()
        self.slots.undo()
        student.eval()
        got = self._acquired_by_all(student)
        held, kept = self._split(got)
        if self.round == 1:
            draws, most = self.context.ranks.share(lambda: self._draws(len(kept.images)))
            self.views.plan(draws, most, asked_each_time=bool(self.needs))
        self._store(held, kept)
        self._remembers = self.context.ranks.share(lambda: self._remembered(kept))
        self.signs = self._signs(got)
        self._rebuild(got)
        self.seconds += time.perf_counter() - start

    def _acquired_by_all(self, student: nn.Module) -> Acquired:
        """What the source acquires, labelled, and the count of the acquisition: both the same on every rank."""
        ranks, round = self.context.ranks, self.round + 1
        got = self._acquired_together(student) if self.config.source.together and ranks.world > 1 else None
        got = ranks.share(lambda: got or self._acquired(student), [self.context.unlabeled])
        self.round = round  # `_acquired` has counted it on the first rank alone
        return got

    def _store(self, held: Acquired, kept: Acquired) -> None:
        """Put both parts of an acquisition into their pools, and the teacher's logits of views beside the second."""
        assert held.logits is not None
        assert kept.logits is not None
        g = self.generators["pool"]
        self.holdout.add(held.images, held.logits, g, held.labels)
        slots = self.pool.add(kept.images, kept.logits, g, kept.labels)
        self._sound &= self.views.fill(slots, self._ask_together)
        if self.views.count and not self.frequent:
            self.check()

    def _signs(self, got: Acquired) -> dict[str, Tensor]:
        """`vital_signs` of at most about 1000 of the inputs, evenly spaced."""
        assert got.logits is not None
        some = slice(None, None, max(1, len(got.images) // 512))
        return vital_signs(got.images[some].to(got.logits.device), got.logits[some])

    def _acquired_together(self, student: nn.Module) -> Acquired:
        """`_acquired` on every rank, with the passes of the networks divided among them. Some devices round
        differently."""
        ranks, self.sharing = self.context.ranks, True
        try:
            with ranks.sharing(self.context.teacher, student):
                got = self._acquired(student)
        finally:
            self.sharing = False
        for part in self.source.parts().values():
            if isinstance(part, nn.Module):
                ranks.alike(part)
        return got

    def _acquired(self, student: nn.Module) -> Acquired:
        """What the source acquires, labelled. Counts the acquisition once the source has returned."""
        got = self.source.acquire(student, self.round)
        name, classes = self.config.source.name, self.context.num_classes
        require_acquired(got, name, self.context.image_shape, classes)
        require_terms(self.source.terms, f"source {name}, terms")
        self.round += 1
        if self.round == 1 and any(method.axis == "source" for method in self.config.methods):
            require_sound(got, name, classes)
        return self._labelled(got)

    def _remembered(self, kept: Acquired) -> bool:
        """Whether the replay is ready once it has seen what joined the pool."""
        assert kept.logits is not None
        self.replay.remember(kept.images, kept.logits, self.round - 1)
        return self.replay.ready

    def _labelled(self, got: Acquired) -> Acquired:
        """The same in uint8, with the teacher's logits. Raises Diverged for values that are not finite."""
        images = as_uint8(got.images)
        logits = self.context.label(images) if got.logits is None else got.logits
        whole = [got.images, logits] if isinstance(got.images, Tensor) and got.images.is_floating_point() else [logits]
        values = (*whole, *self.source.terms.values())
        self._sound &= torch.stack([torch.isfinite(v).all().to(logits.device) for v in values]).all()
        if self.round == 1 or not self.frequent:
            self.check(got.images, logits)
        return Acquired(images, logits, got.labels, got.reference)

    def check(self, images: Pixels | None = None, logits: Tensor | None = None) -> None:
        """Raise Diverged, and name the part, if an acquisition since the last check was not finite. Waits for the
        device."""
        if bool(self._sound):
            return
        bad = [f"source/{k}" for k, v in self.source.terms.items() if not bool(torch.isfinite(v))]
        what = f"acquisition {self.round} diverged"
        floats = isinstance(images, Tensor) and images.is_floating_point()
        if floats and not bool(torch.isfinite(images).all()):  # type: ignore[arg-type]
            what = f"acquisition {self.round} made images that are not finite"
        elif logits is not None and not bool(torch.isfinite(logits).all()):
            what = f"the teacher's logits of acquisition {self.round} contain NaN or infinity"
        elif not self.views.sound():
            what = "the teacher's logits of views exceed fp16's 65 504; use augment.views 0"
        raise Diverged(what, bad)

    def _split(self, got: Acquired) -> tuple[Acquired, Acquired]:
        """(a random share to evaluate the student on, the rest to train on)."""
        n = len(got.images)
        pool = self.config.pool
        held = min(max(1, round(n * pool.holdout)), n - 1, pool.holdout_capacity)
        order = torch.randperm(n, generator=self.generators["pool"], device=self.context.device)
        return got.take(order[:held]), got.take(order[held:])

    def _draws(self, n: int) -> tuple[float, int]:
        """(average draws of one image in the run, images in the full pool), for `n` images in the first acquisition."""
        source, loop, capacity = self.config.source, self.config.loop, self.config.pool.capacity
        rounds = source.warmup + max(1, math.ceil(loop.steps / source.every) if source.every else 1)
        each = self.source.expected(n, rounds) / rounds
        joining = min(each, capacity) * rounds
        if self.config.pool.eviction == "reservoir":  # acquisition k stays with probability capacity / kn
            joining = sum(min(each, capacity / k) for k in range(1, rounds + 1))
        return loop.steps * loop.batch / joining, min(round(each * rounds), capacity)

    def _rebuild(self, got: Acquired) -> None:
        """Rebuild the dictionary from the newest inputs or the pool, then update the interventions' draw weights.

        A sampler's dictionary is built once (KDCI Sec. 3.2), as is one of reference inputs.
        """
        once = self.config.source.kind == "sampler"
        if self.dictionary is not None and not (once and self.dictionary.built):
            x, t = (self.pool.x, self.pool.logits) if self.dictionary.of == "pool" else (got.images, got.logits)
            if got.reference is not None:
                x, t = as_uint8(got.reference.images), got.reference.logits
                t = self.context.label(x) if t is None else t
            assert t is not None
            self.dictionary.rebuild(self._features(x, t))
        self.sampler.set(self.pool, self.interventions.weights(self.pool, self.dictionary))

    def _ask(self, x: Tensor) -> Tensor:
        """The teacher's logits [B, K] of a batch in [0, 1]."""
        with self.context.autocast():
            return self.context.teacher.answers(laid_out(x))

    def _ask_together(self, x: Tensor) -> Tensor:
        """The same, of a batch that every rank has; each rank asks about its part."""
        ranks, n = self.context.ranks, len(x)
        return self._ask(x) if n < ranks.world else ranks.whole(self._ask(ranks.cut(x, n)), n)

    def _features(self, x: Pixels, t: Tensor) -> Tensor:
        """M [n, d] of images x (uint8): the teacher's logits t, unless another model makes the dictionary."""
        foreign = self.context.extra.get(FOREIGN)
        return t if foreign is None else predict(foreign, x, autocast=self.context.autocast)

    # ------------------------------------------------------------------------------------------------ draw

    def draw(self) -> Drawn:
        """The next batch, of several ranks each one's part. Nothing here waits for the device."""
        index = self.slots(self.config.loop.batch)
        ranks, n = self.context.ranks, len(index)
        mine = ranks.cut(index, n)
        x, known = self.views(index, self.generators["augment"], ranks)
        labels = None if self.config.augment.mixes else self.pool.labels[mine]
        drawn = self.answered(x, known, labels, mine, n)
        if self.dictionary is not None and self.dictionary.of == "batch":
            t = ranks.whole(drawn.t, n)
            # as rows: their pixels are read for a foreign model alone
            self.dictionary.rebuild(self._features(rows_of(self.pool.x).select(index), t))
        return drawn

    def replayed(self, student: nn.Module, step: int) -> Drawn | None:
        """A batch of replayed inputs; None without a replay, and while its memory is empty."""
        ranks = self.context.ranks
        if not (self.replay.ready if ranks.first else self._remembers):
            return None
        x, t = ranks.share(lambda: self.replay.draw(student, step))
        n = len(x)
        return self.answered(ranks.cut(x, n), ranks.cut(t, n), total=n)

    def answered(
        self, x: Tensor, t: Tensor | None = None, labels: Tensor | None = None, index: Tensor | None = None,
        total: int = 0,
    ) -> Drawn:  # fmt: skip
        """A batch with the teacher's logits (`t`, else computed) and its features (if needed): all of it, or this
        rank's part of `total` images."""
        x, theirs = laid_out(x), Features()
        if t is None and not self.needs:
            t = self._ask(x)
        elif self.needs:
            with torch.no_grad(), self.context.autocast(), tapped(self.context.teacher, self.needs) as theirs:
                asked = self.context.teacher(x)
            t = asked if t is None else t
        assert t is not None
        index = torch.full((len(x),), -1, device=x.device) if index is None else index
        return Drawn(x, t, t.argmax(1) if labels is None else labels, index, theirs, total)

    # ---------------------------------------------------------------------------------------------- report

    def describe(self) -> dict[str, Any]:
        """The pool's size, and the class shares of its images and of the draws."""
        line: dict[str, Any] = {
            "size": len(self.pool),
            "views": self.views.count,
            "class_shares": [round(v, 5) for v in self.pool.class_shares().tolist()],
            "drawn_shares": [round(v, 5) for v in self.sampler.shares(self.pool).tolist()],
        }
        if self.dictionary is not None:
            line["cluster_shares"] = [round(v, 5) for v in self.dictionary.P.tolist()]
        return line

    def terms(self) -> dict[str, Tensor]:
        """Log values of the last step of source and replay, and the newest inputs' vital signs; unsynced scalars."""
        named = {f"source/{k}": v for k, v in self.source.terms.items()}
        named |= {f"replay/{k}": v for k, v in self.replay.terms.items()}
        return named | {f"inputs/{k}": v for k, v in self.signs.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything except the pool, which is saved separately when it changes."""
        self.slots.undo()
        return {
            "source": self.source.state_dict(), "source_terms": self.source.terms,
            "replay": self.replay.state_dict(), "replay_terms": self.replay.terms,
            "dictionary": self.dictionary.state_dict() if self.dictionary is not None else {},
            "holdout": self.holdout.state_dict(), "sampler": self.sampler.state_dict(), "signs": self.signs,
            "generators": {k: g.get_state() for k, g in self.generators.items()},
            "round": self.round, "seconds": self.seconds,
        }  # fmt: skip

    def pool_state(self) -> dict[str, Any]:
        """The pool with its views."""
        return {**self.pool.state_dict(), "views": self.views.state_dict()}

    def load_state_dict(self, state: dict[str, Any], pool: dict[str, Any]) -> None:
        """`pool` is a `pool_state`."""
        self.slots.undo()
        self.pool.load_state_dict(pool)
        self.views.load_state_dict(pool["views"])
        self.source.load_state_dict(state["source"])
        self.replay.load_state_dict(state["replay"])
        if self.dictionary is not None:
            self.dictionary.load_state_dict(state["dictionary"])
        self.holdout.load_state_dict(state["holdout"])
        for name, generator in self.generators.items():
            restore_stream(generator, state["generators"][name])
        self.round, self.seconds, self._remembers = state["round"], state["seconds"], self.replay.ready
        self.source.terms, self.replay.terms, self.signs = (
            {k: v.to(self.context.device) for k, v in state[name].items()}
            for name in ("source_terms", "replay_terms", "signs")
        )
        if self.round:
            self.sampler.set(self.pool, self.interventions.weights(self.pool, self.dictionary))
            self.sampler.load_state_dict(state["sampler"])
