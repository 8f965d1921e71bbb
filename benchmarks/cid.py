"""A CID step against a KD step at the same batch, and how both grow with the number of classes.

    python benchmarks/cid.py [--batch 64] [--rounds 6] [--counts 10 100 1000]

KD is `criterion hinton`, CE and KL on the student's logits; CID is `criterion cid` with `intervention cid`, its
contexts in use. Both are the engine's own step: draw, crop, teacher, student, losses, SGD. Aims: at most 1.25 times,
and no growth with the classes beyond that of the logits and of the dictionary [K, d] itself.
"""

from __future__ import annotations

import torch

import measure
from dodistill.config.tree import resolve
from dodistill.engine import Distiller, Job
from dodistill.interventions.cid import CID


def main() -> None:
    parser = measure.options(__doc__ or "", rounds=6)
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 100, 1000], help="numbers of classes")
    parser.add_argument("--pool", type=int, default=2000, help="images in it")
    args = parser.parse_args()
    device = measure.start(args)
    shape = (3, args.image, args.image)
    loop = {"batch": args.batch, "precision": args.precision, "device": str(device), "threads": args.threads}
    for classes in args.counts:
        args.classes = classes
        jobs = []
        for choice in ({"criterion": "hinton"}, {"criterion": "cid", "intervention": "cid", "cid": {"init": 0.0}}):
            tree = {"source": "data", "pool": {"capacity": args.pool}, "loop": {**loop, "steps": 100_000}, **choice}
            teacher, student = (measure.model(spec, args, device) for spec in (args.teacher, args.student))
            blank = torch.zeros(2, *shape, dtype=torch.uint8)
            it = Distiller(Job(resolve(tree), teacher, student, shape, blank, torch.zeros(2).long()))
            measure.fill(it, torch.randint(0, 256, (args.pool, *shape), dtype=torch.uint8, device=device))
            for part in it.matcher.interventions:
                assert isinstance(part, CID)
                part.filled = True
                part.C.copy_(torch.randn(part.C.shape))
            jobs.append(it)
        kd, cid = jobs
        rows = measure.alternate([kd.match, cid.match, kd.match], device, args.rounds, args.repeat)
        for row in rows:
            row.append((row[0] + row[2]) / 2)
        ratio, low, high = measure.ratio(rows, 1, 3)
        null, _, _ = measure.ratio(rows, 0, 2)
        print(
            f"{classes:>5} classes: KD {1e3 * measure.median(rows, 3):.1f} ms, CID / KD {ratio:.3f} (from {low:.3f} to "
            f"{high:.3f}; KD against KD {null:.3f}; aim <= 1.25)"
        )


if __name__ == "__main__":
    main()
