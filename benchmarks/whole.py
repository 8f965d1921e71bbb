"""The time of a whole `fast` cell, by arithmetic from measured parts, and of a short cell run for real as a check.

    python benchmarks/whole.py                                  # Fast-10: 220 acquisitions, 80 000 steps of 256
    python benchmarks/whole.py --preset desk --batch 128        # the desk schedule

Parts: one acquisition, with its answers to V views of each image; one step with a new view, which the teacher answers;
one step with a view that it has answered; one evaluation. `plain` is a step of the same networks in PyTorch's default
memory format, as the reference toolbox makes it: teacher, student forwards and backwards, SGD. The short cell has
`--real-steps` steps and 3 acquisitions. On the CPU all times are CPU time of one thread.

The bound is the time of the convolutions and matrix products of the cell with V views, at the rate of a matrix product
of 512 x 512 on this machine: what is left if all else were free.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import measure
from dodistill.config.tree import resolve
from dodistill.engine import Distiller, Job


def main() -> None:
    parser = measure.options(__doc__ or "", rounds=3)
    parser.add_argument("--preset", default="wrn", help="of fast: wrn, wrn-5, desk, ...")
    parser.add_argument("--views", type=int, default=16)
    parser.add_argument("--K", type=int, default=0, help="inner steps of an acquisition; 0: the preset's")
    parser.add_argument("--width", type=int, default=0, help="of the generator; 0: the preset's")
    parser.add_argument("--real-steps", type=int, default=20, help="steps of the short cell that is run for real")
    args = parser.parse_args()
    device = measure.start(args)
    shape = (3, args.image, args.image)
    source: dict[str, Any] = {"name": "fast", "batch": args.batch}
    source |= {k: v for k, v in (("K", args.K), ("width", args.width)) if v}
    loop = {"batch": args.batch, "precision": args.precision, "device": str(device), "threads": args.threads}
    loop |= {"compile": "graphs"}  # on a GPU; eager on a CPU
    base = {"preset": args.preset, "source": source, "loop": loop}

    def cell(views: int, **more: Any) -> Distiller:
        config = resolve({**base, "augment": {"views": views}}, more)
        teacher, student = (measure.model(spec, args, device) for spec in (args.teacher, args.student))
        it = Distiller(Job(config, teacher, student, shape))
        it.settle()
        return it

    def filled(views: int) -> Distiller:
        it = cell(views)
        it.compiled.begin()
        measure.fill(it, torch.randint(0, 256, (8 * args.batch, *shape), dtype=torch.uint8, device=device))
        it.acquirer.round = it.config.source.warmup + 2  # so that acquisitions have the adversarial term
        return it

    new, known = filled(0), filled(args.views)
    teacher, student = (measure.model(spec, args, device).to(memory_format=torch.contiguous_format) for spec in
                        (args.teacher, args.student))  # fmt: skip
    teacher.eval()
    student.train()
    sgd = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    x = torch.rand(args.batch, *shape, device=device)

    def plain() -> None:
        with torch.no_grad(), new.context.autocast():
            t = teacher(x)
        with new.context.autocast():
            s = student(x)
        sgd.zero_grad()
        (s.float() - t.float()).square().mean().backward()
        sgd.step()

    slots = torch.arange(min(16, args.batch), device=device)
    parts = {
        "acquisition": lambda: new.acquirer.source.acquire(new.matcher.student, new.config.source.warmup + 1),  # type: ignore[attr-defined]
        "views": lambda: known.acquirer.views.fill(slots, known.acquirer._ask),
        "step, new view": new.match,
        "step, known view": known.match,
        "step, plain": plain,
    }
    rows = measure.alternate(list(parts.values()), device, args.rounds, args.repeat)
    one = {name: measure.median(rows, i) for i, name in enumerate(parts)}
    one["views"] *= args.batch / len(slots)  # of all images of an acquisition

    c = new.config
    acquisitions = c.source.warmup + c.loop.steps // max(1, c.source.every)
    steps = c.loop.steps
    print(f"measured parts ({new.context.autocast.reason}); {args.batch} images, V = {args.views}")
    for name, value in one.items():
        rate = f", {args.batch / value:.0f} images/s" if name.startswith("step") else ""
        print(f"  {name:<18} {value:9.3f} s{rate}")
    title = f"preset {args.preset}: {acquisitions} acquisitions, {steps} steps"
    print(f"| {title} | synthesis | answers to views | steps | whole |")
    print("|---|---:|---:|---:|---:|")
    synthesis = acquisitions * one["acquisition"]
    for title, views, step in (
        ("plain steps", 0.0, "step, plain"),
        ("new views", 0.0, "step, new view"),
        (f"V = {args.views}", acquisitions * one["views"], "step, known view"),
    ):
        whole = synthesis + views + steps * one[step]
        print(f"| {title} | {synthesis:.0f} s | {views:.0f} s | {steps * one[step]:.0f} s | {whole:.0f} s |")

    rate = products(x, new, args.rounds)
    made, asked_, walked = (operations(parts[name]) for name in ("acquisition", "views", "step, known view"))
    work = acquisitions * (made + asked_ * args.batch / len(slots)) + steps * walked
    print(
        f"bound: {made / 1e12:.2f} TFLOP an acquisition, {walked / 1e9:.1f} GFLOP a step, {work / 1e15:.2f} PFLOP in "
        f"all; at {rate / 1e9:.0f} GFLOP/s {work / rate:.0f} s, {steps * walked / rate:.0f} s of them in the steps"
    )

    # Run for real: 1 + 2 acquisitions, and as many steps as told. `eval_every` leaves the one evaluation at the end.
    real_steps = max(2, args.real_steps)
    schedule = {"source": {"warmup": 1, "every": -(-real_steps // 2)},
                "loop": {"steps": real_steps, "eval_every": 10 * real_steps}}  # fmt: skip
    it = cell(args.views, **schedule)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    begun = clock()
    it.run()
    took = clock() - begun
    lone = measure.alternate([it.scorer.evaluate], device, 1)[0][0]
    asked = it.acquirer.views.count > 0
    expected = it.acquirer.round * (one["acquisition"] + (one["views"] if asked else 0.0)) + lone
    expected += real_steps * one["step, known view" if asked else "step, new view"]
    print(
        f"a short cell for real ({it.acquirer.round} acquisitions, {real_steps} steps, one evaluation of {lone:.2f} s, "
        f"{'known' if asked else 'new'} views): {took:.1f} s, by arithmetic {expected:.1f} s"
    )


def operations(step: measure.Step) -> float:
    """Of the convolutions and matrix products in `step`."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def products(x: Tensor, it: Distiller, rounds: int, n: int = 512) -> float:
    """Operations a second of a matrix product [n, n] x [n, n], in the precision of the run."""
    a = torch.rand(n, n, device=x.device)

    def product() -> None:
        with torch.no_grad(), it.context.autocast():
            torch.mm(a, a)

    return 2 * n**3 / min(row[0] for row in measure.alternate([product], x.device, max(rounds, 20)))


if __name__ == "__main__":
    main()
