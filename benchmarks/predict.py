"""Images per second without gradients, by how many go through the network at once: what `runtime.at_once` rests on.

python benchmarks/predict.py --teacher wrn16_2 --rounds 3
"""

from __future__ import annotations

import torch

from dodistill.functional.modes import evaluating
from measure import alternate, median, model, options, start

SIZES = (32, 64, 128, 256, 512)


def main() -> None:
    args = options(__doc__ or "", 3).parse_args()
    device = start(args)
    net = model(args.teacher, args, device)
    x = torch.rand(max(SIZES), 3, args.image, args.image, device=device).contiguous(memory_format=torch.channels_last)

    def all_by(n: int) -> None:
        with torch.no_grad():
            for part in x.split(n):
                net(part)

    with evaluating(net):
        rows = alternate([lambda n=n: all_by(n) for n in SIZES], device, args.rounds, args.repeat)  # type: ignore[misc]
    for i, n in enumerate(SIZES):
        print(f"  {n:4d} at once: {len(x) / median(rows, i):7.0f} images/s")


if __name__ == "__main__":
    main()
