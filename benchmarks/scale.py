"""What a step and its memory cost as the pool, the classes and the dictionary grow.

    python benchmarks/scale.py [--pools 65536 1000000] [--counts 10 100 1000] [--clusters 8 32 128]

One matching step of the engine with KDCI and an even draw, in turns with the step of the first size. The aim: a step's
cost does not grow with the pool or with N of the dictionary, nor with the number of classes beyond the logits' own
size. Memory is a step's peak beyond what was there before (`measure.peak`). The pool itself is apart: C*H*W + 4*classes
+ 8 bytes an image.
"""

from __future__ import annotations

import torch

import measure
from dodistill.config.tree import resolve
from dodistill.engine import Distiller, Job


def main() -> None:
    parser = measure.options(__doc__ or "", rounds=6)
    parser.add_argument("--pools", type=int, nargs="+", default=[65_536, 1_000_000], help="images in the pool")
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 100, 1000], help="numbers of classes")
    parser.add_argument("--clusters", type=int, nargs="+", default=[8, 32, 128], help="N of the dictionary")
    parser.add_argument("--intervention", default="kdci+stratified")
    parser.set_defaults(batch=64, teacher="wrn16_2")
    args = parser.parse_args()
    device = measure.start(args)
    shape = (3, args.image, args.image)
    loop = {"batch": args.batch, "precision": args.precision, "device": str(device), "threads": args.threads}

    def build(pool: int, classes: int, clusters: int) -> Distiller:
        args.classes = classes
        tree = {"source": "fast", "intervention": args.intervention, "dictionary": {"clusters": clusters},
                "pool": {"capacity": pool}, "loop": {**loop, "steps": 1_000_000}}  # fmt: skip
        teacher, student = (measure.model(spec, args, device) for spec in (args.teacher, args.student))
        it = Distiller(Job(resolve(tree), teacher, student, shape))
        images = torch.empty(pool, *shape, dtype=torch.uint8, device=device)
        images.copy_(torch.randint(0, 256, shape, dtype=torch.uint8, device=device))
        measure.fill(it, images)
        return it

    first = (args.pools[0], args.counts[0], args.clusters[0])
    sizes = [(p, first[1], first[2]) for p in args.pools[1:]]
    sizes += [(first[0], k, first[2]) for k in args.counts[1:]]
    sizes += [(first[0], first[1], n) for n in args.clusters[1:]]
    base = build(*first)
    lone = measure.peak(base.match, device)
    once = measure.alternate([base.match], device, args.rounds, args.repeat)
    print("| pool | classes | N | step, ms | of the first | from | to | peak, MiB |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    print("| {} | {} | {} | {:.1f} | 1 | | | {:.1f} |".format(*first, 1e3 * measure.median(once, 0), lone / 2**20))
    for size in sizes:
        it = build(*size)
        peak = measure.peak(it.match, device) / 2**20
        rows = measure.alternate([base.match, it.match, base.match], device, args.rounds, args.repeat)
        for row in rows:
            row.append((row[0] + row[2]) / 2)
        middle, low, high = measure.ratio(rows, 1, 3)
        print("| {} | {} | {} | {:.1f} | {:.3f} | {:.3f} | {:.3f} | {:.1f} |".format(
            *size, 1e3 * measure.median(rows, 1), middle, low, high, peak), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
