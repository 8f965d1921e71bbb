"""What retaining costs: one step of the student by each update, in turns in one process, as ratios to plain replay.

    python benchmarks/update.py [--student resnet18] [--batch 128] [--share 0.125 1]

First the student's own work alone: forward and backward passes and the fused SGD, on inputs and teacher's logits that
lie there. Then with what every run adds to it for all four alike, the teacher's pass over the new inputs. `share` is
the number of replayed images per new one: an eighth in the papers. Aims, against a replay step: exact at most 2.5 in
time and 2.2 in memory, first-order at most 1.7. Memory is a step's peak beyond what was there before, see
`measure.peak`. The exact step is in fp32 whatever --precision says, as in a run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import measure
from dodistill.config import registry
from dodistill.core.precision import Precision
from dodistill.functional import losses

UPDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "replay": ("replay", {}),
    "first-order": ("retain", {"order": "first_order"}),
    "exact": ("retain", {"order": "exact"}),
}


def main() -> None:
    parser = measure.options(__doc__ or "", rounds=6)
    parser.add_argument("--share", type=float, nargs="+", default=[0.125, 1.0], help="replayed images per new one")
    parser.set_defaults(batch=64)
    args = parser.parse_args()
    device = measure.start(args)
    low = Precision(device, args.precision)
    teacher = measure.model(args.teacher, args, device).requires_grad_(False).eval()
    student = measure.model(args.student, args, device).train()
    new = torch.rand(args.batch, 3, args.image, args.image, device=device).contiguous(memory_format=torch.channels_last)

    def ask() -> None:
        with torch.no_grad(), low():
            teacher(new)

    def objective(n: int, precision: Callable[[], Any]) -> Callable[[Any], dict[str, Tensor]]:
        x = torch.rand(n, 3, args.image, args.image, device=device).contiguous(memory_format=torch.channels_last)
        t = torch.randn(n, args.classes, device=device)

        def of(model: Any) -> dict[str, Tensor]:
            with precision():
                s = model(x)
            return {"kd": losses.l1(s.float(), t)}

        return of

    def stepper(name: str, share: float) -> measure.Step:
        choice, settings = UPDATES[name]
        update = registry.config("update", choice)(**settings).build()
        precision = nullcontext if update.fp32 else low  # as the engine has it
        acquire, retain = objective(args.batch, precision), objective(max(2, round(share * args.batch)), precision)
        sgd = torch.optim.SGD(student.parameters(), lr=1e-4, momentum=0.9, fused=True)

        def step() -> None:
            sgd.zero_grad()
            update.backward(student, acquire, retain)
            sgd.step()

        return step

    for share in args.share:
        steps = [stepper(name, share) for name in UPDATES]
        peaks = [measure.peak(step, device) for step in steps]
        rows = measure.alternate([*steps, ask], device, args.rounds, args.repeat)
        base = list(UPDATES).index("replay")
        print(f"{share:g} replayed per new image; replay: {1e3 * measure.median(rows, base):.1f} ms, "
              f"{peaks[base] / 2**20:.1f} MiB; the teacher's pass {1e3 * measure.median(rows, -1):.1f} ms")  # fmt: skip
        with_teacher = [[t + row[-1] for t in row[:-1]] for row in rows]
        for i, name in enumerate(UPDATES):
            middle, least, most = measure.ratio(rows, i, base)
            whole, _, _ = measure.ratio(with_teacher, i, base)
            print(f"  {name:<12} time {middle:.2f} ({least:.2f} to {most:.2f}), with the teacher {whole:.2f}   "
                  f"memory {peaks[i] / peaks[base]:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
