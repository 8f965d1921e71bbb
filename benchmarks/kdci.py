"""What KDCI costs: one distillation step with and without it, in one process, in turns, as a ratio.

    python benchmarks/kdci_overhead.py [--batch 256] [--rounds 10] [--device auto] [--precision auto]

The paper reports +1.3 to 3.3 % time and at most +0.12 % memory; the aim here is at most 1 % and 0.1 %. Memory is the
device's peak (CUDA only). The time of `F` alone, forward and backward, is printed beside it: where a step is long and
the machine is busy, the ratio is noisier than the effect.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

import dodistill
from dodistill import losses
from dodistill.causal.base import Interventions
from dodistill.causal.dictionary import DictionaryConfig
from dodistill.causal.kdci import Config
from dodistill.runtime import Context, autocast, pick_device

CLASSES, SHAPE = 10, (3, 32, 32)


def clock(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(step: Callable[[], None], device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=1, help="steps in a timing (20 or more on a GPU)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--teacher", default="wrn40_2")
    parser.add_argument("--student", default="wrn16_1")
    args = parser.parse_args()
    device = pick_device(args.device)
    low = autocast(device, args.precision)
    torch.manual_seed(0)
    teacher, student = (
        dodistill.load_model(name, num_classes=CLASSES).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name in (args.teacher, args.student)
    )
    teacher.requires_grad_(False).eval()
    student.train()
    context = Context(cast(Any, SimpleNamespace(num_classes=CLASSES, image_shape=SHAPE)), device)
    x = torch.rand(args.batch, *SHAPE, device=device).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        logits = teacher(x).float()

    def stepper(parts: Interventions, dictionary: Any) -> Callable[[], None]:
        groups = [{"params": list(student.parameters()), "weight_decay": 5e-4}]
        if parts.shared_parameters():
            groups.append({"params": parts.shared_parameters(), "weight_decay": 0.0})
        sgd = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, fused=True)

        def step() -> None:
            for _ in range(args.repeat):
                with torch.no_grad(), low():
                    t = teacher(x)
                with low():
                    s = student(x)
                sgd.zero_grad()
                losses.kl(parts.compensate(s.float(), dictionary), t.float(), 20.0).backward()
                sgd.step()

        return step

    plain = stepper(Interventions(), None)
    print(
        f"{args.teacher} -> {args.student}, batch {args.batch}, {device}, {args.rounds} rounds of {args.repeat} steps"
    )
    for N in (8, 32, 128):
        dictionary = DictionaryConfig(clusters=N).build(context, "generator")
        build = [clock(lambda d=dictionary: d.build(logits), device) for _ in range(6)][1:]  # type: ignore[misc]
        parts = Interventions([Config().build(context)])
        with_F = stepper(parts, dictionary)

        def alone(parts: Interventions = parts, dictionary: Any = dictionary) -> None:
            s: Tensor = logits.clone().requires_grad_()
            parts.compensate(s, dictionary).sum().backward()

        for warm_up in (plain, with_F, alone):
            warm_up()
        pairs = [(clock(plain, device), clock(with_F, device)) for _ in range(args.rounds)]
        own = statistics.median(clock(alone, device) for _ in range(50))
        base = statistics.median(a for a, _ in pairs)
        ratio = statistics.median(b / a for a, b in pairs)
        memory = peak(plain, device), peak(with_F, device)
        print(
            f"N = {N:3d}: step {1e3 * base / args.repeat:8.2f} ms, with KDCI {100 * (ratio - 1):+.2f} %; "
            f"F alone {1e3 * own:.3f} ms = {100 * own * args.repeat / base:.3f} % of a step; "
            f"dictionary {1e3 * statistics.median(build):.1f} ms per acquisition; "
            + (f"memory {100 * (memory[1] / memory[0] - 1):+.3f} %" if memory[0] else "memory: CUDA only")
        )


if __name__ == "__main__":
    main()
