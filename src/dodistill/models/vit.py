"""A small vision transformer: `tinyvit{W}` has width W, 4 blocks, heads of 16 channels, and patches of 4 x 4 pixels.

Dosovitskiy et al., An Image is Worth 16x16 Words (ICLR 2021), with fixed sine-cosine positions and the mean of the
patches in place of a class token, as in Beyer et al., Better Plain ViT Baselines for ImageNet-1k (2022). One network
reads images of any size. Names and shapes of the layers are those of timm's `VisionTransformer` with
class_token=False, global_pool="avg" and fc_norm=False; its `pos_embed` would be `positions`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH, DEPTH, HEAD = 4, 4, 16
AMPLITUDE = 0.3  #: of the positions; at 1 they are larger than a fresh network's patches, which then learn slowly


def positions(height: int, width: int, channels: int, device: torch.device | None = None) -> Tensor:
    """[height * width, channels]: sines and cosines of the row, then of the column, at channels / 4 frequencies each,
    times AMPLITUDE."""
    n = channels // 4
    frequency = 10_000.0 ** (-torch.arange(n, device=device) / n)
    row, column = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (row, column)]
    return AMPLITUDE * torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)


class PatchEmbed(nn.Module):
    """[B, C, H, W] -> patches [B, H/4 * W/4, width] with their positions."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        here = positions(x.shape[2], x.shape[3], x.shape[1], x.device).to(x.dtype)
        return x.flatten(2).transpose(1, 2) + here


class Attention(nn.Module):
    """Self-attention over tokens [B, N, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = width // HEAD
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, HEAD)).permute(2, 0, 3, 1, 4).unbind()
        weights = (q @ k.transpose(2, 3) * HEAD**-0.5).softmax(-1)
        mixed: Tensor = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return mixed


class Mlp(nn.Module):
    """Two layers on each token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each on a normalised input and beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class TinyViT(nn.Module):
    """[B, in_channels, H, W] -> logits [B, num_classes]. H and W are multiples of 4."""

    num_prefix_tokens = 0

    def __init__(self, width: int, num_classes: int, in_channels: int = 1) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(in_channels, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.patch_embed(x))).mean(1))
        return logits
