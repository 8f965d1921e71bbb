"""Image generators of the data-free literature. Output in [0, 1]; batch statistics at all times (train mode)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import DodistillError


class ConvGenerator(nn.Module):
    """Latent -> Linear -> two (upsample, conv) blocks -> Sigmoid, the toolbox's small generator.

    For 32x32, width 64, latent 256: 2 328 899 parameters, as published. Other image sizes must be divisible by 4.

    Args:
        latent: size of z.
        image_shape: (C, H, W) of the images.
        width: channels of the last hidden convolution; the first hidden maps have twice as many.
    """

    def __init__(self, latent: int, image_shape: tuple[int, int, int], width: int = 64) -> None:
        super().__init__()
        channels, height, w = image_shape
        if height % 4 or w % 4:
            raise DodistillError(
                "this generator makes images whose height and width are multiples of 4, the teacher reads "
                f"{height}x{w}; use another source (dodistill methods lists them)."
            )
        self.latent, self.base = latent, (2 * width, height // 4, w // 4)
        self.l1 = nn.Linear(latent, 2 * width * (height // 4) * (w // 4))
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, channels, 3, 1, 1),
            nn.Sigmoid(),
        )

    def forward(self, z: Tensor) -> Tensor:
        """[B, latent] -> [B, C, H, W] in [0, 1]."""
        h = self.l1(z).view(len(z), *self.base).contiguous(memory_format=torch.channels_last)
        out: Tensor = self.conv_blocks(h)
        return out.float()

    def reset_first_layers(self, generator: torch.Generator) -> None:
        """Redraw the Linear and the first BatchNorm from N(0, 0.02), biases 0 (an undocumented step of the release)."""
        first = self.conv_blocks[0]
        assert isinstance(first, nn.BatchNorm2d)
        with torch.no_grad():
            for weight, bias in ((self.l1.weight, self.l1.bias), (first.weight, first.bias)):
                weight.copy_(torch.randn(weight.shape, generator=generator, device=weight.device) * 0.02)
                bias.zero_()


def seeded(build: type[ConvGenerator], generator: torch.Generator, *args: object) -> ConvGenerator:
    """Construct a module with PyTorch's default initialisation, from an explicit stream and no global state."""
    seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(*args)  # type: ignore[arg-type]
