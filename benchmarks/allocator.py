"""What it is worth to have glibc keep freed memory, as the command line does (`cli.keep_memory`): CPU seconds and page
faults of training steps, in a process of its own each.

    python benchmarks/allocator.py --student wrn16_1 --batch 64 --steps 8
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys

ROUNDS = 3


def steps(student: str, size: int, batch: int, n: int, keep: bool) -> None:
    import torch

    from dodistill.commands.cli import keep_memory
    from dodistill.models import load_model

    if keep and not keep_memory():
        raise SystemExit("no glibc here, or MALLOC_ or GLIBC_TUNABLES is set in the environment.")
    torch.set_num_threads(1)
    net = load_model(student, num_classes=10, in_channels=3, image_size=size, seed=0)
    net.to(memory_format=torch.channels_last).train()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(n):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    print(user + system, system, (after.ru_minflt - before.ru_minflt) / n, after.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="wrn16_1")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--arm", choices=("plain", "keep"), help="one arm, in this process")
    known = parser.parse_args()
    if known.arm:
        steps(known.student, known.size, known.batch, known.steps, known.arm == "keep")
        return
    found: dict[str, list[list[float]]] = {"plain": [], "keep": []}
    for _ in range(ROUNDS):
        for arm, rows in found.items():
            command = [sys.executable, __file__, "--student", known.student, "--size", str(known.size), "--batch",
                       str(known.batch), "--steps", str(known.steps), "--arm", arm]  # fmt: skip
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
            rows.append([float(v) for v in done.stdout.split()])
    print(f"{known.student}, batch {known.batch}, {known.steps} steps, 1 thread, least of {ROUNDS} rounds")
    least = {arm: min(rows) for arm, rows in found.items()}
    for arm, (cpu, system, faults, peak) in least.items():
        share = cpu / least["plain"][0]
        print(
            f"{arm:6} {cpu:7.2f} s CPU (kernel {system:.2f}), {faults:8.0f} faults a step, peak {peak:5.0f} MiB, "
            f"{share:.3f}"
        )


if __name__ == "__main__":
    main()
