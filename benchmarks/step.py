"""The distillation step as the engine runs it, against the bare networks, in turns in one process.

    python benchmarks/step.py [--batch 64] [--precision fp32] [--intervention kdci+stratified]

Bare: teacher forward, student forward and backward, fused SGD, on one fixed batch. The engine adds the draw, crop and
flip, the criterion, the intervention and the moving average. It also adds the log line and the rebuilding of dictionary
and weights, spread over the steps between two of them. Aim: at least 85 % of the bare throughput. With `--views V` the
teacher's answers are known, and the engine does not run its forward pass.
"""

from __future__ import annotations

import argparse

import torch

import measure
from dodistill.config.tree import resolve
from dodistill.core.runtime import repeatable
from dodistill.engine import Distiller, Job
from dodistill.sources.shared.base import Acquired


def main() -> None:
    parser = measure.options(__doc__ or "", rounds=12)
    parser.add_argument("--intervention", default="kdci+stratified")
    parser.add_argument("--pool", type=int, default=10_000, help="images in it")
    parser.add_argument("--every", type=int, default=400, help="steps per acquisition (the papers' value)")
    parser.add_argument("--views", type=int, default=0, help="augment.views; above 0 no step asks the teacher")
    parser.add_argument("--compile", default="off", choices=["off", "on", "graphs"], help="of the engine's step")
    parser.add_argument("--log-every", type=int, default=50)
    args = parser.parse_args()
    device = measure.start(args)
    shape = (3, args.image, args.image)
    loop = {"batch": args.batch, "precision": args.precision, "device": str(device), "threads": args.threads}
    loop |= {"compile": args.compile}
    config = resolve({"source": {"name": "fast", "every": args.every}, "intervention": args.intervention, "loop": loop,
                      "augment": {"views": args.views}})  # fmt: skip
    teacher, student = (measure.model(spec, args, device) for spec in (args.teacher, args.student))
    it = Distiller(Job(config, teacher, student, shape))
    with repeatable(device):
        measured(args, it, device, shape)


def measured(args: argparse.Namespace, it: Distiller, device: torch.device, shape: tuple[int, int, int]) -> None:
    it.compiled.begin()
    images = torch.randint(0, 256, (args.pool, *shape), dtype=torch.uint8, device=device)
    logits = measure.fill(it, images)
    newest = Acquired(images[:256], logits[:256])

    plain = measure.model(args.student, args, device).train()
    sgd = torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True)
    x = torch.rand(args.batch, *shape, device=device).contiguous(memory_format=torch.channels_last)

    def bare() -> None:
        with torch.no_grad(), it.context.autocast():
            t = it.context.teacher(x)
        with it.context.autocast():
            s = plain(x)
        sgd.zero_grad()
        (s.float() - t).square().mean().backward()
        sgd.step()

    rows = measure.alternate([bare, it.match, bare], device, args.rounds, args.repeat)
    # The bare step stands on both sides of the other: their ratio says how far to trust the numbers.
    for row in rows:
        row.append((row[0] + row[2]) / 2)
    base = measure.median(rows, 3)
    step, low, high = measure.ratio(rows, 1, 3)
    null, _, _ = measure.ratio(rows, 0, 2)
    other = measure.alternate([it.read, lambda: it.acquirer._rebuild(newest)], device, 10)
    rare = measure.median(other, 0) / args.log_every + measure.median(other, 1) / args.every
    whole = step + rare / base
    print(f"bare step {1e3 * base:.1f} ms ({args.batch / base:.0f} images/s); bare against bare {null:.3f}")
    print(f"engine's step {step:.3f} of that (from {low:.3f} to {high:.3f})")
    print(
        f"log {1e3 * measure.median(other, 0):.2f} ms each {args.log_every} steps, dictionary and weights "
        f"{1e3 * measure.median(other, 1):.2f} ms each {args.every}: {100 * rare / base:.3f} % of a step"
    )
    print(f"throughput {100 / whole:.1f} % of bare (aim: >= 85 %)")


if __name__ == "__main__":
    main()
