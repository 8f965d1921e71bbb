"""What KDCI costs: one distillation step with and without it, in turns in one process, as a ratio.

    python benchmarks/kdci.py [--batch 64] [--classes 100]

The paper reports +1.3 to 3.3 % time and at most +0.12 % memory; the aim here is at most 1 % and 0.1 %. The time of `F`
alone, forward and backward, is printed beside the ratio: where a step is long and the machine is busy, the ratio is
noisier than the effect. Memory is what a step needs at its peak beyond what was there before, see `measure.peak`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

import measure
from dodistill.core.context import Context
from dodistill.core.precision import Precision
from dodistill.functional import losses
from dodistill.interventions.kdci import Config
from dodistill.interventions.shared.base import Interventions
from dodistill.interventions.shared.dictionary import DictionaryConfig


def main() -> None:
    parser = measure.options(__doc__ or "", rounds=10)
    parser.add_argument("--clusters", type=int, nargs="+", default=[8, 32, 128])
    args = parser.parse_args()
    device = measure.start(args)
    low = Precision(device, args.precision)
    shape = (3, args.image, args.image)
    teacher = measure.model(args.teacher, args, device).requires_grad_(False).eval()
    student = measure.model(args.student, args, device).train()
    context = Context(cast(Any, SimpleNamespace(num_classes=args.classes, image_shape=shape)), device)
    x = torch.rand(args.batch, *shape, device=device).contiguous(memory_format=torch.channels_last)
    logits = torch.randn(args.batch, args.classes, device=device)

    def stepper(parts: Interventions, dictionary: Any) -> measure.Step:
        groups: list[dict[str, Any]] = [{"params": list(student.parameters()), "weight_decay": 5e-4}]
        if own := list(parts.parameters()):
            groups.append({"params": own, "weight_decay": 0.0})
        sgd = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, fused=True)

        def step() -> None:
            with torch.no_grad(), low():
                t = teacher(x)
            with low():
                s = student(x)
            sgd.zero_grad()
            losses.kl(parts.compensate(s.float(), dictionary), t.float(), 20.0).backward()
            sgd.step()

        return step

    plain = stepper(Interventions(), None)
    lone = measure.peak(plain, device)
    print(f"a step without KDCI needs {lone / 2**20:.1f} MiB at its peak")
    for N in args.clusters:
        dictionary = DictionaryConfig(clusters=N).build(context, "generator")

        def build(dictionary: Any = dictionary) -> None:
            dictionary.rebuild(logits)

        build()
        parts = Interventions([Config().build(context)])
        with_F = stepper(parts, dictionary)

        def alone(parts: Interventions = parts, dictionary: Any = dictionary) -> None:
            s: Tensor = logits.clone().requires_grad_()
            parts.compensate(s, dictionary).sum().backward()

        memory = measure.peak(with_F, device) / lone
        # Beside the peak: weights, gradients and momenta of F, and the dictionary, which stay from step to step.
        kept = sum(3 * p.nbytes for p in parts.parameters()) + sum(b.nbytes for b in dictionary.buffers())
        rows = measure.alternate([plain, with_F], device, args.rounds, args.repeat)
        own = measure.alternate([alone, build], device, 30)
        base = measure.median(rows, 0)
        whole, least, most = measure.ratio(rows, 1, 0)
        F = measure.median(own, 0)
        print(
            f"N = {N:3d}: step {1e3 * base:8.2f} ms; with KDCI {100 * (whole - 1):+.2f} % "
            f"(from {100 * (least - 1):+.2f} to {100 * (most - 1):+.2f}); "
            f"F alone {1e3 * F:.3f} ms = {100 * F / base:.3f} %; "
            f"dictionary {1e3 * measure.median(own, 1):.1f} ms per acquisition; "
            f"peak memory {100 * (memory - 1):+.3f} %, kept {kept / 2**10:.1f} KiB = {100 * kept / lone:.3f} %"
        )


if __name__ == "__main__":
    main()
