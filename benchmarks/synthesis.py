"""What a source adds to its bare network passes: one acquisition of each, in turns with those passes alone.

    python benchmarks/synthesis.py [--sources fast cmi ...] [--batch 64] [--iterations 3]

Bare: one acquisition is watched, and each pass through the teacher, the student and the source's own networks is
noted: the input's shape, whether a gradient came back through it, and whether its BatchNorms used the statistics of the
batch. Those passes are then made again on the same inputs, at the same precision, backwards too, and nothing else.
What the source adds is its losses, BatchNorm statistics, crops, optimisers, copies, memory banks and draws. Aim: at
most 1.15 times the bare. Sources that train nothing have no synthesis: for them the table shows images per second.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import measure
from dodistill.config import registry
from dodistill.core.context import Context
from dodistill.core.precision import Precision
from dodistill.models.batchnorm import current_statistics
from dodistill.models.teacher import Teacher

#: Fields, by any name that sources use, for how long one acquisition takes and for how much it hands over.
ITERATIONS = ("K", "iterations")


class Pass(NamedTuple):
    module: nn.Module
    x: Tensor
    grad: bool  #: whether a gradient goes to the input
    own: bool  #: whether one goes to the weights
    current: bool  #: whether its BatchNorms use the statistics of the batch, in `current_statistics`


def settings(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The desk preset with this benchmark's batch and iterations, where the source has such fields."""
    cls = registry.config("source", name)
    chosen: dict[str, Any] = dict(cls.presets.get("desk", {}).get("source", {}))  # type: ignore[attr-defined]
    chosen.pop("name", None)
    known = cls.__dataclass_fields__  # type: ignore[attr-defined]
    chosen |= {k: args.iterations for k in ITERATIONS if k in known}
    chosen |= {"batch": args.batch} if "batch" in known else {}
    chosen |= {k: v for k, v in (("n", 4 * args.batch), ("candidates", 8 * args.batch)) if k in known}
    return chosen


def networks(source: object) -> list[nn.Module]:
    """The modules that a source holds, also in lists, one by one, without those that lie within another."""
    parts = [part for v in vars(source).values() for part in (v if isinstance(v, list) else [v])]
    held = [v for v in parts if isinstance(v, nn.Module)]
    return [m for m in held if not any(m is not o and m in set(o.modules()) for o in held)]


def borrowed(module: nn.Module) -> bool:
    """Whether its BatchNorms are without their running statistics at the moment."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    return any(m.track_running_stats and m.running_mean is None for m in norms)


def watch(source: Any, student: nn.Module, round: int) -> list[Pass]:
    """The network passes of one acquisition, in order."""
    passes: list[Pass] = []

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], Tensor):
            x = given[0]
            own = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
            # the student's weights take part in no source's gradient: only its input does
            passes.append(Pass(module, x.detach(), torch.is_grad_enabled() and x.requires_grad,
                               own and module is not student, module is student and borrowed(student)))  # fmt: skip

    teacher = source.context.teacher
    teacher.answers(torch.zeros(2, *teacher.image_shape, device=source.context.device))
    watched = [teacher, *(m for m in teacher.answering if isinstance(m, nn.Module)), student, *networks(source)]
    handles = [m.register_forward_pre_hook(note) for m in watched]
    try:
        source.acquire(student, round)
    finally:
        for handle in handles:
            handle.remove()
    return passes


def bare(passes: list[Pass], low: Any, device: torch.device) -> measure.Step:
    lying = [p._replace(x=p.x.requires_grad_(p.grad) if p.grad else p.x) for p in passes]

    def step() -> None:
        for module, x, grad, own, current in lying:
            weights = [p for p in module.parameters() if p.requires_grad] if own else []
            statistics = current_statistics(module) if current else nullcontext()
            with torch.set_grad_enabled(grad or own), low(), statistics:
                out = module(x)
            if grad or own:
                torch.autograd.grad(out.float().square().mean(), [*([x] if grad else []), *weights], allow_unused=True)

    return step


def shares(acquire: measure.Step) -> dict[str, float]:
    """The share of an acquisition's own CPU time by kind of operation, in percent."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        acquire()
    kinds = {"convolutions": "conv", "BatchNorm": "batch_norm", "its statistics": "Moments"}
    found = dict.fromkeys([*kinds, "the rest"], 0.0)
    events = profile.key_averages()
    whole = sum(e.self_cpu_time_total for e in events)
    for event in events:
        kind = next((k for k, part in kinds.items() if part in event.key), "the rest")
        found[kind] += 100 * event.self_cpu_time_total / whole
    return found


def main() -> None:
    parser = measure.options(__doc__ or "", rounds=4)
    parser.add_argument("--sources", nargs="+", default=list(registry.names("source")))
    parser.add_argument("--iterations", type=int, default=3, help="inner steps of the sources that have them")
    parser.add_argument("--profile", action="store_true", help="also what the time of an acquisition is made of")
    parser.set_defaults(batch=64, teacher="wrn16_2")
    args = parser.parse_args()
    device = measure.start(args)
    low = Precision(device, args.precision)
    shape = (3, args.image, args.image)
    unlabeled = torch.randint(256, (8 * args.batch, *shape), dtype=torch.uint8)
    print("| source | passes | images/s | of bare | from | to |\n|---|---:|---:|---:|---:|---:|")
    for name in args.sources:
        teacher = Teacher(measure.model(args.teacher, args, device), shape).to(device)
        student = measure.model(args.student, args, device).eval()
        context = Context(teacher, device, autocast=low, unlabeled=unlabeled)
        config: Any = registry.config("source", name)(**settings(name, args))
        source = config.build(context)
        rounds = iter(range(config.warmup + 1, 10**9))  # after the warm-up, with the student's passes
        made: list[int] = []

        def acquire(source: Any = source, rounds: Any = rounds, made: Any = made, student: Any = student) -> None:
            made.append(len(source.acquire(student, next(rounds)).images))

        passes = watch(source, student, next(rounds))
        rows = measure.alternate([bare(passes, low, device), acquire], device, args.rounds, args.repeat)
        rate = made[-1] / measure.median(rows, 1)
        if args.profile:
            print(f"  {name}: " + ", ".join(f"{kind} {share:.0f} %" for kind, share in shares(acquire).items()))
        if not any(p.grad or p.own for p in passes):
            print(f"| {name} | {len(passes)} | {rate:.0f} | | | |", flush=True)
            continue
        middle, least, most = measure.ratio(rows, 1, 0)
        print(f"| {name} | {len(passes)} | {rate:.1f} | {middle:.3f} | {least:.3f} | {most:.3f} |", flush=True)


if __name__ == "__main__":
    main()
