"""The scorer: evaluates the student, and chooses which of its two versions is delivered."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..evaluation.evaluate import agreement, class_accuracy, predict, top1
from .acquire import Acquirer
from .job import Test
from .match import Matcher
from .meter import Diverged


class Scorer:
    """Scores the last student and its moving average, as they would be delivered."""

    def __init__(self, matcher: Matcher, acquirer: Acquirer, test: Test | None) -> None:
        self.matcher, self.acquirer, self.test = matcher, acquirer, test
        self.last: dict[str, float] = {}
        self.best_on_test = 0.0
        #: `last`, `ema`, `teacher` -> the accuracy of each class at the last evaluation
        self.by_class: dict[str, list[float | None]] = {}
        self.teacher: float | None = None  #: its accuracy on the test set, known from the first evaluation on

    def evaluate(self, tests: bool = True) -> dict[str, float]:
        """Agreement with the teacher on the held-back inputs (%), and accuracy (%): on them (`minival`) where the data
        have labels, and, with `tests`, on a test set where there is one."""
        holdout, cast, out = self.acquirer.holdout, self.matcher.context.autocast, {}
        for name, which in (("", "last"), ("_ema", "ema")):
            model = self.complete(which)
            held = predict(model, holdout.x, autocast=cast)
            if not bool(torch.isfinite(held).all()):
                raise Diverged("the student's logits contain NaN or infinity", [])
            out[f"agreement{name}"] = agreement(held, holdout.logits)
            if self.matcher.context.labels is not None:
                out[f"minival{name}"] = top1(held, holdout.labels)
            if self.test is not None and tests:
                out[f"test{name}"] = self._on_test(which, model)
        if self.test is not None and tests:
            self.teacher_accuracy()
            self.best_on_test = max(self.best_on_test, out["test"])
        self.last = out
        return out

    def teacher_accuracy(self) -> float:
        """The teacher's accuracy on the test set in percent, computed once."""
        if self.teacher is None:
            self.teacher = self._on_test("teacher", self.matcher.context.teacher)
        return self.teacher

    def _on_test(self, name: str, model: nn.Module) -> float:
        """Accuracy on the test set in percent; that of each class stays in `by_class`."""
        assert self.test is not None
        context, test = self.matcher.context, self.test

        def progress(done: int, total: int) -> None:
            context.progress(f"evaluating ({name})", done, total)

        logits = predict(model, test.x, autocast=context.autocast, progress=progress)
        self.by_class[name] = class_accuracy(logits, test.y)
        return top1(logits, test.y)

    def delivered(self) -> tuple[str, nn.Module]:
        """The student to deploy: the last weights or their average, whichever agrees more with the teacher on the
        held-back inputs.

        The choice uses no labels and no test images.
        """
        score = self.last or self.evaluate()
        which = "ema" if score["agreement_ema"] > score["agreement"] else "last"
        return which, self.complete(which)

    def explained(self, which: str, most: int = 1024) -> dict[str, Any]:
        """Measures that explain the score of the student `which`, for the summary.

        `train_agreement` in %, with the teacher on at most `most` images of the pool; where there is a test set also
        `teacher_accuracy` in %, and for each class `class_accuracy` and `teacher_class_accuracy` in % (None without
        test images of the class) and `class_images`, the number of its test images.
        """
        model, context, pool = self.complete(which), self.matcher.context, self.acquirer.pool
        some = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:most].to(pool.device)
        seen = predict(model, pool.x[some], autocast=context.autocast)
        out: dict[str, Any] = {"train_agreement": agreement(seen, pool.logits[some])}
        if self.test is not None:
            for name, network in (("teacher", context.teacher), (which, model)):
                if name not in self.by_class:  # a checkpoint of an older version
                    self._on_test(name, network)
            out |= {
                "teacher_accuracy": self.teacher_accuracy(), "teacher_class_accuracy": self.by_class["teacher"],
                "class_accuracy": self.by_class[which],
                "class_images": torch.bincount(self.test.y, minlength=context.num_classes).tolist(),
            }  # fmt: skip
        return out

    def complete(self, which: str) -> nn.Module:
        """The `last` student or its average `ema`, with the interventions that stay at test time."""
        m = self.matcher
        return m.interventions.deliver(m.ema if which == "ema" else m.student, self.acquirer.dictionary)

    def shipped(self, which: str) -> nn.Module:
        """`complete` as the user gets it: in eval mode, and with the student's `requires_grad` of each parameter."""
        m = self.matcher
        for average, own in zip(m.ema.parameters(), m.student.parameters()):
            average.requires_grad_(own.requires_grad)
        return self.complete(which).eval()

    def state_dict(self) -> dict[str, Any]:
        return {
            "last": self.last, "best_on_test": self.best_on_test, "teacher": self.teacher,
            "by_class": self.by_class,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last, self.best_on_test = dict(state["last"]), state["best_on_test"]
        self.teacher, self.by_class = state.get("teacher"), dict(state.get("by_class", {}))
