"""The VAE of PRE-DFKD: an encoder and a decoder of small images, in normalised coordinates."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ...functional.fresh_weights import uniform_weights
from ...functional.memory_format import laid_out, place
from ...models.upsample import UpsampleConv


def kl_to_normal(mu: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mu, exp log_var) || N(0, 1)), summed over latents, mean over the batch: [B, d], [B, d] -> scalar >= 0."""
    return (-0.5 * (1 + log_var - mu.square() - log_var.exp())).sum(1).mean()


class Encoder(nn.Module):
    """u [B, C, H, W] in normalised coordinates -> mu, log sigma^2 [B, latent]; u is first put to length 1 along H."""

    def __init__(self, latent: int, image_shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        channels, *size = image_shape
        for _ in range(3):
            size = [(n + 1) // 2 for n in size]
        self.one, self.one_norm = nn.Conv2d(channels, width, 3, 1, 1), nn.BatchNorm2d(width, 0.8)
        self.two, self.two_norm = nn.Conv2d(width, 2 * width, 3, 1, 1), nn.BatchNorm2d(2 * width, 0.8)
        self.three, self.three_norm = nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width)
        self.mu, self.log_var = (nn.Linear(2 * width * size[0] * size[1], latent) for _ in range(2))

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        h = nnf.leaky_relu(self.one_norm(self.one(nnf.normalize(u, dim=2))), 0.2)
        h = nnf.leaky_relu(self.two_norm(self.two(h)), 0.2)
        h = self.three_norm(self.three(h[..., ::2, ::2]))[..., ::2, ::2].flatten(1)
        return self.mu(h).float(), self.log_var(h).float()


class Decoder(nn.Module):
    """z [B, latent] -> u [B, C, H, W]; each channel of a batch is standardised (in eval mode: by running
    statistics)."""

    def __init__(self, latent: int, image_shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        channels, height, wide = image_shape
        self.first = (2 * width, height // 4, wide // 4)
        self.linear = nn.Linear(latent, 2 * width * (height // 4) * (wide // 4))
        self.layers = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            UpsampleConv(2 * width, 2 * width), nn.BatchNorm2d(2 * width, 0.8), nn.LeakyReLU(0.2, inplace=True),
            UpsampleConv(2 * width, width), nn.BatchNorm2d(width, 0.8), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, channels, 3, 1, 1), nn.Tanh(), nn.BatchNorm2d(channels, affine=False),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        h = laid_out(self.linear(z).view(len(z), *self.first))
        out: Tensor = self.layers(h)
        return out.float()


def vae(
    latent: int, image_shape: tuple[int, int, int], width: int, generator: torch.Generator
) -> tuple[Encoder, Decoder]:
    """Encoder and decoder on the generator's device, started as released: weights uniform in +-0.08, biases 0."""
    with torch.device("meta"):
        encoder, decoder = Encoder(latent, image_shape, width), Decoder(latent, image_shape, width)
    for net in (encoder, decoder):
        net.to_empty(device=generator.device)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.reset_parameters()
        uniform_weights(net, 0.08, generator)
    return place(encoder), place(decoder)
