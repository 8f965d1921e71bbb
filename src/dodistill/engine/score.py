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
        device = matcher.context.device
        self.matcher, self.acquirer = matcher, acquirer
        self.test = None if test is None else Test(test.x.to(device), test.y.to(device))
        self.last: dict[str, float] = {}
        self.best_on_test = 0.0

    def evaluate(self) -> dict[str, float]:
        """Agreement with the teacher on the held-back inputs (%), and accuracy (%): on them (`minival`) where the data
        have labels, and on a test set where there is one."""
        holdout, cast, out = self.acquirer.holdout, self.matcher.context.autocast, {}
        for name, which in (("", "last"), ("_ema", "ema")):
            model = self.complete(which)
            held = predict(model, holdout.x, autocast=cast)
            if not bool(torch.isfinite(held).all()):
                raise Diverged("the student's logits contain NaN or infinity", [])
            out[f"agreement{name}"] = agreement(held, holdout.logits)
            if self.matcher.context.labels is not None:
                out[f"minival{name}"] = top1(held, holdout.labels)
            if self.test is not None:
                out[f"test{name}"] = top1(predict(model, self.test.x, autocast=cast), self.test.y)
        if self.test is not None:
            self.best_on_test = max(self.best_on_test, out["test"])
        self.last = out
        return out

    def delivered(self) -> tuple[str, nn.Module]:
        """The student to deploy: the last weights or their average, whichever agrees more with the teacher on the
        held-back inputs.

        The choice uses no labels and no test images.
        """
        score = self.last or self.evaluate()
        which = "ema" if score["agreement_ema"] > score["agreement"] else "last"
        return which, self.complete(which)

    def explained(self, which: str, most: int = 1024) -> dict[str, Any]:
        """What tells why the student `which` scores as it does, for the summary.

        `train_agreement` in %, with the teacher on at most `most` images of the pool; where there is a test set also
        `teacher_accuracy` in %, and for each class `class_accuracy` and `teacher_class_accuracy` in % (None without
        test images of the class) and `class_images`, the number of its test images.
        """
        model, context, pool = self.complete(which), self.matcher.context, self.acquirer.pool
        some = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:most].to(pool.device)
        seen = predict(model, pool.x[some], autocast=context.autocast)
        out: dict[str, Any] = {"train_agreement": agreement(seen, pool.logits[some])}
        if self.test is not None:
            x, y = self.test.x, self.test.y
            theirs = predict(context.teacher, x, autocast=context.autocast)
            out |= {
                "teacher_accuracy": top1(theirs, y), "teacher_class_accuracy": class_accuracy(theirs, y),
                "class_accuracy": class_accuracy(predict(model, x, autocast=context.autocast), y),
                "class_images": torch.bincount(y, minlength=context.num_classes).tolist(),
            }  # fmt: skip
        return out

    def complete(self, which: str) -> nn.Module:
        """The `last` student or its average `ema`, with the interventions that stay at test time."""
        m = self.matcher
        return m.interventions.deliver(m.ema if which == "ema" else m.student, self.acquirer.dictionary)

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last, "best_on_test": self.best_on_test}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last, self.best_on_test = dict(state["last"]), state["best_on_test"]
