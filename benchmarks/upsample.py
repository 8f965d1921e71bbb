"""The generator's upsampling convolutions as one transposed convolution, against Upsample and Conv2d: whole generators.

python benchmarks/upsample.py --batch 128 --rounds 6
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn

from dodistill.models.upsample import UpsampleConv
from dodistill.sources.shared.generators import ConvGenerator
from measure import alternate, options, ratio, start


def plainly(generator: ConvGenerator) -> ConvGenerator:
    """A copy that upsamples first and convolves then."""
    out = copy.deepcopy(generator)
    for i, layer in enumerate(out.conv_blocks):
        if isinstance(layer, UpsampleConv):
            conv = nn.Conv2d(layer.in_channels, layer.out_channels, 3, 1, 1, bias=layer.bias is not None)
            conv.load_state_dict(layer.state_dict())
            out.conv_blocks[i] = nn.Sequential(nn.Upsample(scale_factor=2), conv)
    return out.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def step(net: ConvGenerator, z: torch.Tensor, dtype: torch.dtype, backward: bool) -> None:
    """One pass, and the way back where `backward`."""
    with torch.autocast(z.device.type, dtype, enabled=dtype == torch.bfloat16), torch.set_grad_enabled(backward):
        x = net(z)
    if backward:
        x.square().mean().backward()


def main() -> None:
    args = options(__doc__ or "", 6).parse_args()
    device = start(args)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    for width, latent in ((24, 128), (64, 256)):
        ours = (
            ConvGenerator(latent, (3, args.image, args.image), width).to(device).to(memory_format=torch.channels_last)
        )
        z = torch.randn(args.batch, latent, device=device)

        theirs = plainly(ours)
        for name, backward in (("forward", False), ("forward and backward", True)):
            steps = [functools.partial(step, net, z, dtype, backward) for net in (ours, theirs)]
            median, low, high = ratio(alternate(steps, device, args.rounds, args.repeat), 1, 0)
            print(f"width {width:3}, {name:20}: {median:.2f} times as fast ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
