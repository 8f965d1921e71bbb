"""One batch of `fast` (K inner steps), against its bare generator and teacher passes, in turns in one process.

    python benchmarks/synthesis.py [--batch 64] [--K 2]

Bare: K times generator forward, teacher forward, backward through both, at the same precision, on what lies there.
`fast` adds the BatchNorm statistics of every layer, crop and flip, the losses, two optimisers, the copy of the
generator, and, once the student matches, a pass through the student (shown apart). Aim: at most 1.3 times the bare.
"""

from __future__ import annotations

import torch

import measure
from dodistill.runtime import Context, autocast
from dodistill.sources.fast import Config, Fast
from dodistill.teacher import Teacher


def main() -> None:
    parser = measure.options(__doc__ or "", rounds=5)
    parser.add_argument("--K", type=int, default=10)
    args = parser.parse_args()
    device = measure.start(args)
    low = autocast(device, args.precision)
    shape = (3, args.image, args.image)
    teacher = Teacher(measure.model(args.teacher, args, device), shape).to(device)
    student = measure.model(args.student, args, device).eval()
    source = Fast(Config(K=args.K, batch=args.batch), Context(teacher, device, autocast=low))
    generator = source.fast
    z = torch.randn(args.batch, generator.latent, device=device, requires_grad=True)

    def bare() -> None:
        for _ in range(args.K):
            with low():
                t = teacher(generator(z))
            t.square().mean().backward()
            generator.zero_grad()
            z.grad = None

    def without() -> None:
        source.acquire(student, 1)

    def complete() -> None:
        source.acquire(student, source.config.warmup + 1)

    rows = measure.alternate([bare, without, complete], device, args.rounds, args.repeat)
    base = measure.median(rows, 0)
    print(f"bare {base:.2f} s for {args.batch} images ({args.batch / base:.1f} images/s)")
    for what, i in (("without the adversarial term (warm-up)", 1), ("complete, with the student's pass", 2)):
        middle, least, most = measure.ratio(rows, i, 0)
        print(f"fast {what}: {middle:.3f} of bare (from {least:.3f} to {most:.3f}); aim: <= 1.3")


if __name__ == "__main__":
    main()
