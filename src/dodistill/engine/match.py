"""The matching step: one step of the student on a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..config.tree import Distill
from ..core.batch import Batch, Drawn
from ..core.context import Context
from ..criteria.shared.base import Criterion
from ..functional.schedules import rate_at
from ..functional.terms import detached
from ..interventions.shared.base import Intervention, Interventions
from ..interventions.shared.dictionary import ConfounderDictionary
from ..models.taps import tapped
from ..updates.shared.base import Update
from .answers import require_gradient, require_logits, require_terms
from .job import require_kind
from .plan import Plan
from .shared_batch import couples, require_shareable, whole


class Matcher:
    """Owns the student, its moving average, the optimisers, the update, the criterion and the interventions."""

    def __init__(self, config: Distill, context: Context, plan: Plan | None = None) -> None:
        """`plan`: how many steps there are; None: those of the config."""
        assert context.student is not None
        self.config, self.context = config, context
        self.plan = plan or Plan(config.loop.steps, config.loop.restarts)
        self.student = context.student
        self.ema = copy.deepcopy(self.student).requires_grad_(False).eval()
        #: the student by torch.compile, for its training step (see `engine.compiled`)
        self.compiled: Callable[[Tensor], Tensor] | None = None
        acts = [i.build(context) for i in config.interventions]
        for act, settings in zip(acts, config.interventions):
            require_kind(act, Intervention, settings)
        self.interventions = Interventions(acts).to(context.device)
        criterion = config.criterion.build(context)
        require_kind(criterion, Criterion, config.criterion)
        self.criterion = criterion.to(context.device)
        self.update = config.update.build()
        require_kind(self.update, Update, config.update)
        self.ranks = self.update.ranks = context.ranks
        parts: dict[str, object] = {f"intervention {s.name}": act for act, s in zip(acts, config.interventions)}
        parts |= {f"criterion {config.criterion.name}": criterion, f"update {config.update.name}": self.update}
        require_shareable(parts, self.student, context.ranks, config.loop.batch)
        #: whether each process needs the whole batch for the loss
        self.couples = any(couples(part) for part in parts.values())
        #: features of both networks that criterion and interventions read
        self.needs: frozenset[str] = self.criterion.needs | self.interventions.needs
        self.optimizers = self._optimizers()
        #: the last objective on new inputs, for the log
        self.last: Objective | None = None
        # ([tensors of the average], [those of the student]), in one order: floating-point ones, and the others
        self._floats = self._side_by_side(lambda v: v.is_floating_point())
        self._counts = self._side_by_side(lambda v: not v.is_floating_point())

    def _side_by_side(self, which: Callable[[Tensor], bool]) -> tuple[list[Tensor], list[Tensor]]:
        """([of the average], [of the student]), the tensors `which` holds of; tied ones once, to be averaged once."""
        mine, its = self.student.state_dict(), self.ema.state_dict()
        again = _second_names(self.ema)
        names = [k for k, v in its.items() if k not in again and which(v)]
        return [its[k] for k in names], [mine[k] for k in names]

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """SGD for the student and for parts without their own rate (these have no weight decay unless they request it);
        Adam for parts with their own rate."""
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

    def rate(self, done: float) -> float:
        """The student's learning rate when a share `done` of the steps is done."""
        c = self.config.optim
        return rate_at(c.schedule, done, c.lr, c.floor, c.milestones)

    def step(
        self, drawn: Drawn, replayed: Drawn | None, dictionary: ConfounderDictionary | None, step: int
    ) -> dict[str, Tensor]:
        """One step of the student on a batch. Returns its terms, detached. Nothing here waits for the device.

        `replayed`: a batch of past inputs, for an update that uses one. `step`: steps done before this one.
        """
        done = self.plan.done(step)
        exactly = self.update.fp32 and replayed is not None
        acquire = Objective(self, drawn, dictionary, done, exactly)
        remember = None if replayed is None else Objective(self, replayed, dictionary, done, exactly)
        self.student.train()
        for group in self.optimizers[0].param_groups:
            group["lr"] = self.rate(self.plan.scheduled(step))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        terms = self.update.backward(self.student, acquire, remember)
        if self.last is None:
            require_terms(terms, f"update {self.config.update.name}, backward")
            require_terms(self.update.terms, f"update {self.config.update.name}, terms")
            require_gradient(self.student, f"update {self.config.update.name}")
        terms = detached(terms)  # a graph that is kept until the next log line fills the memory
        self.ranks.average(p for o in self.optimizers for group in o.param_groups for p in group["params"])
        self.criterion.observe(acquire.t, acquire.batch)
        self.interventions.observe(acquire.t, acquire.batch)
        for optimizer in self.optimizers:
            optimizer.step()
        self._average(step)
        self.last = acquire
        return {f"match/{k}": v for k, v in terms.items()} | {f"update/{k}": v for k, v in self.update.terms.items()}

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """The moving average of the student, with the usual warm-up of its decay."""
        decay = min(self.config.loop.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._floats, 1 - decay)
        if self._counts[0]:
            torch._foreach_copy_(*self._counts)

    def terms(self, dictionary: ConfounderDictionary | None) -> dict[str, Tensor]:
        """Log values of the interventions for the last batch; unsynced scalars."""
        if self.last is None:
            return {}
        batch, t = self.last.whole()
        logged = self.interventions.log(batch.raw, t, dictionary, batch)
        require_terms(logged, f"intervention {self.config.intervention}, log")
        return logged

    def infinite(self) -> list[str]:
        """Names of the student's parameters that are not finite. Waits for the device."""
        return [n for n, p in self.student.named_parameters() if not bool(torch.isfinite(p).all())]

    def state_dict(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(), "ema": self.ema.state_dict(),
            "interventions": self.interventions.state_dict(), "criterion": self.criterion.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers], "update": self.update.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.ema.load_state_dict(state["ema"])
        self.interventions.load_state_dict(state["interventions"])
        self.criterion.load_state_dict(state["criterion"])
        if "update" in state:  # absent in older checkpoints
            self.update.load_state_dict(state["update"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)


def _second_names(net: nn.Module) -> set[str]:
    """The further names of parameters and buffers that `net` has under several names, as tied weights."""
    listed = (net.named_parameters, net.named_buffers)
    every = {name for each in listed for name, _ in each(remove_duplicate=False)}
    return every - {name for each in listed for name, _ in each()}


class Objective:
    """The matching loss on one batch, as a function of the student (or of the student at other weights).

    `batch` is the batch of the last call, and `t` the teacher's logits [B, K] of it: this process's part, or the whole
    batch where the loss couples its images. `exactly`: the student's passes are in fp32, whatever the run's precision.
    """

    def __init__(
        self, matcher: Matcher, drawn: Drawn, dictionary: ConfounderDictionary | None, done: float, exactly: bool
    ) -> None:
        self.matcher, self.drawn, self.dictionary, self.done = matcher, drawn, dictionary, done
        self.precision = nullcontext if exactly else matcher.context.autocast
        self.t, self.total = drawn.t, drawn.total or len(drawn.x)
        self._batch: Batch | None = None

    @property
    def batch(self) -> Batch:
        if self._batch is None:
            raise RuntimeError("the update has not evaluated this objective")
        return self._batch

    def __call__(self, student: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        m, d = self.matcher, self.drawn
        run = m.compiled if student is m.student and m.compiled is not None else student
        with m.ranks.synchronised():
            with self.precision(), tapped(m.student, m.needs) as own:
                s = run(d.x)
            self._batch, self.t = Batch(d.index, d.labels, s.float(), self.done, own, d.theirs), d.t
            if m.couples:
                self._batch, self.t = self.whole()
            batch = self._batch
            s = m.interventions.compensate(batch.raw, self.dictionary, batch)
            if m.last is None:  # the first step tells
                require_logits(s, batch.raw, f"intervention {m.config.intervention}")
            terms = m.criterion(s, self.t, batch)
            if m.last is None:
                require_terms(terms, f"criterion {m.config.criterion.name}", trained=torch.is_grad_enabled())
        weight = 1.0 if m.couples else m.ranks.weight(self.total)
        return dict(terms) if weight == 1.0 else {name: weight * value for name, value in terms.items()}

    def whole(self) -> tuple[Batch, Tensor]:
        """The whole batch and the teacher's logits of it. With several processes, all of them call this."""
        n, ranks = self.total, self.matcher.ranks
        if len(self.t) == n:
            return self.batch, self.t
        return whole(self.batch, n, ranks), ranks.whole(self.t, n)
