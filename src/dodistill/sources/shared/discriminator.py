"""A discriminator of image patches, and its loss."""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """One logit per 10x10 patch, real against generated: [B, C, H, W], normalised -> [B, 1, H/4, W/4].

    531 328 parameters for RGB and the default width, as in MosaicKD's release.
    """

    def __init__(self, channels: int, width: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * width, 1, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out.float()


def patch_loss(d: Tensor, real: bool) -> Tensor:
    """Cross-entropy of patch logits d [B, 1, h, w] to the label "real" or "generated": summed over the patches of an
    image, mean over images; >= 0."""
    return nnf.softplus(-d if real else d).flatten(1).sum(1).mean()
