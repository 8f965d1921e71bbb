"""The balance of the classes in the substitution data, and advice on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .format import number

SKEWED = 5.0  #: max:min above which the page shows a warning


@dataclass(frozen=True)
class Shares:
    """The balance of the classes. `effective` is exp(entropy): K if all K are equal, 1 if there is only one."""

    values: list[float]
    ratio: float
    effective: float
    missing: list[int]

    @property
    def skewed(self) -> bool:
        return bool(self.missing) or self.ratio > SKEWED

    @property
    def ratio_text(self) -> str:
        return "∞" if math.isinf(self.ratio) else f"{number(self.ratio, 3)}:1"


def shares(values: object) -> Shares | None:
    """Normalised proportions; None if `values` holds none."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        return None
    kept = [float(v) if isinstance(v, int | float) and math.isfinite(v) and v > 0 else 0.0 for v in values]
    total = sum(kept)
    if total <= 0:
        return None
    kept = [v / total for v in kept]
    entropy = -sum(v * math.log(v) for v in kept if v > 0)
    ratio = max(kept) / min(kept) if min(kept) > 0 else math.inf
    return Shares(kept, ratio, math.exp(entropy), [k for k, v in enumerate(kept) if v == 0])


def extremes(pool: Shares, names: Sequence[str], most: int = 5) -> tuple[str, str]:
    """(the most frequent classes, the least frequent ones), by name, with their shares; of few classes all are in the
    first."""
    order = sorted(range(len(pool.values)), key=lambda k: -pool.values[k])
    said = [f"{names[k]} {number(100 * pool.values[k], 3)} %" for k in order]
    return (", ".join(said), "") if len(said) <= 2 * most else (", ".join(said[:most]), ", ".join(said[-most:]))


def advice(
    pool: Shares | None, drawn: Shares | None, intervention: str, names: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """(tone, sentences) about the class shares of the pool and of the draws; `names` of the classes, if known."""
    if pool is None:
        return "quiet", []
    called = names or [f"class {k}" for k in range(len(pool.values))]
    seen = drawn or pool
    says: list[str] = []
    if pool.missing:
        some = ", ".join(names[k] if names else str(k) for k in pool.missing[:8]) + (
            ", …" if len(pool.missing) > 8 else ""
        )
        which = f"{len(pool.missing)} of {len(pool.values)} classes never appear ({some})"
        which = f"Class {some} never appears" if len(pool.missing) == 1 else which
        says.append(
            f"{which} in the substitution data. No draw can compensate for that: the student learns about a missing "
            "class only from the teacher's probabilities on other inputs. Run longer, or try another source."
        )
    present = [v for v in seen.values if v > 0]
    ratio = max(present) / min(present)
    if ratio > SKEWED:
        most, least = seen.values.index(max(present)), seen.values.index(min(present))
        says.append(
            f"The student's inputs are skewed: {called[most]} was drawn {number(ratio, 3)} times as often as "
            f"{called[least]}."
        )
        if "stratified" not in intervention:
            also = "" if intervention in ("", "none", "plain") else intervention + "+"
            says.append(f"Try `--intervention {also}stratified`: it draws rare classes as often as frequent classes.")
        else:
            says.append(
                "The stratified draw is already on; its cap on the weights of rare classes leaves this skew. Use a "
                "larger or more varied pool."
            )
    if says:
        return "warn", says
    if pool.skewed and drawn is not None:
        return "good", [f"The pool is skewed ({pool.ratio_text}), but the draw is balanced ({drawn.ratio_text})."]
    return "good", ["The classes are balanced; no change is needed."]
