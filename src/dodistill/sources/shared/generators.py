"""Image generators of the data-free literature. Their output is in [0, 1], and they stay in train mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import DodistillError
from ...functional.memory_format import laid_out
from ...models.normalized import Space
from ...models.upsample import UpsampleConv


class Generator(nn.Module):
    """Base of image generators: latents or labels -> images [B, C, H, W] in [0, 1]. `loop.compile on` compiles them."""


class _Pixels(nn.Module):
    """Normalised coordinates u -> valid pixels, mean + std * u clipped to [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.register_buffer("mean", space[0].detach().clone(), persistent=False)
        self.register_buffer("std", space[1].detach().clone(), persistent=False)

    def forward(self, u: Tensor) -> Tensor:
        return (self.mean + self.std * u.float()).clamp(0, 1)


class ConvGenerator(Generator):
    """Latent -> Linear -> two (upsample and conv) blocks -> Sigmoid, the toolbox's small generator.

    For 32x32, width 64, latent 256: 2 328 899 parameters, as published. Other image sizes must be divisible by 4.
    With a `space` it is the generator of DAFL and DFAD: its convolutions have biases, and Tanh -> BatchNorm without
    affine replaces the Sigmoid. Each channel of a batch is then standardised in the teacher's normalised coordinates,
    and clipped to valid pixels.
    For 32x32, width 64, latent 1000: 8 423 939 parameters, as published.

    Args:
        latent: size of z.
        image_shape: (C, H, W) of the images.
        width: channels of the last hidden convolution; the one before it has twice as many.
        base: channels of the first map, 0: 2 * width. 256 with width 64 is the toolbox's large generator.
        eps: of the two hidden BatchNorms (Huawei's DAFL: 0.8).
        space: (mean, std) of the teacher's normalisation.
    """

    def __init__(
        self,
        latent: int,
        image_shape: tuple[int, int, int],
        width: int = 64,
        base: int = 0,
        eps: float = 1e-5,
        space: Space | None = None,
    ) -> None:
        super().__init__()
        base, bias = base or 2 * width, space is not None
        channels, height, w = image_shape
        if height % 4 or w % 4:
            raise DodistillError(
                "this generator makes images whose height and width are multiples of 4, but the teacher takes "
                f"{height}x{w}; use another source (dodistill methods lists them)."
            )
        self.latent, self.base = latent, (base, height // 4, w // 4)
        self.l1 = nn.Linear(latent, base * (height // 4) * (w // 4))
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(base),
            UpsampleConv(base, 2 * width, bias=bias),
            nn.BatchNorm2d(2 * width, eps=eps),
            nn.LeakyReLU(0.2, inplace=True),
            UpsampleConv(2 * width, width, bias=bias),
            nn.BatchNorm2d(width, eps=eps),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, channels, 3, 1, 1),
            *([nn.Sigmoid()] if space is None else [nn.Tanh(), nn.BatchNorm2d(channels, affine=False), _Pixels(space)]),
        )

    def forward(self, z: Tensor) -> Tensor:
        """[B, latent] -> [B, C, H, W] in [0, 1]."""
        h = laid_out(self.l1(z).view(len(z), *self.base))
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


class DeepGenerator(Generator):
    """Map of latents -> conv -> `doublings` (upsample and conv) blocks -> conv -> Sigmoid, Fast's for ImageNet.

    For 224x224, latent 256, width 64, 4 doublings: 592 451 parameters, as released (the release has an unused Linear
    beside them). No layer depends on the image size.

    Args:
        latent: channels of the map of latents.
        image_shape: (C, H, W) of the images; H and W are multiples of 2^doublings.
        width: channels of the hidden convolutions after the second doubling; the ones before it have twice as many.
        doublings: number of times that H and W are doubled.

    Attributes:
        latent_shape: (latent, H / 2^doublings, W / 2^doublings).
    """

    def __init__(self, latent: int, image_shape: tuple[int, int, int], width: int = 64, doublings: int = 4) -> None:
        super().__init__()
        (channels, height, w), scale = image_shape, 2**doublings
        if height % scale or w % scale:
            raise DodistillError(
                f"this generator doubles a map of latents {doublings} times, so it makes images whose height and width "
                f"are multiples of {scale}, but the teacher takes {height}x{w}: lower source.doublings, or use another "
                "source (dodistill methods lists them)."
            )
        self.latent_shape = (latent, height // scale, w // scale)
        i = 2 * width
        blocks: list[nn.Module] = [nn.Conv2d(latent, i, 3, 1, 1, bias=False), nn.BatchNorm2d(i)]
        for k in range(doublings):
            o = 2 * width if k == 0 else width
            blocks += [nn.LeakyReLU(0.2, inplace=True), UpsampleConv(i, o, bias=False), nn.BatchNorm2d(o)]
            i = o
        blocks += [nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(i, channels, 3, 1, 1), nn.Sigmoid()]
        self.conv_blocks = nn.Sequential(*blocks)

    def forward(self, z: Tensor) -> Tensor:
        """[B, *latent_shape] -> [B, C, H, W] in [0, 1]."""
        out: Tensor = self.conv_blocks(laid_out(z))
        return out.float()
