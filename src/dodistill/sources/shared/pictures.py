"""Pictures drawn by formulas, without data, training or downloads. Batched tensor code on the generator's device.

Each of `KINDS` draws n images, float [n, C, H, W] in [0, 1], for any C, H, W, from an explicit generator and without a
host-device sync: about ten thousand 32x32 pictures a second on one CPU core.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...functional.augment import to_uint8

Shape = tuple[int, int, int]


def uniform(g: torch.Generator, *size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform in [low, high)."""
    return low + (high - low) * torch.rand(size, generator=g, device=g.device)


def grid(shape: Shape, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """(x [1, 1, W], y [1, H, 1]) from -1 to 1, the longer side; pixels are square."""
    _, h, w = shape
    x = torch.arange(w, device=g.device) * 2 - (w - 1)
    y = torch.arange(h, device=g.device) * 2 - (h - 1)
    return x.view(1, 1, w) / max(h, w), y.view(1, h, 1) / max(h, w)


def waves(v: Tensor, channels: int, g: torch.Generator) -> Tensor:
    """A field v [n, H, W] as colours [n, C, H, W]: a cosine of its own frequency and phase for each channel."""
    n = len(v)
    often = uniform(g, n, 1, 1, 1, low=0.4, high=1.2) * uniform(g, n, channels, 1, 1, low=0.7, high=1.3)
    phase = uniform(g, n, channels, 1, 1)
    return torch.cos((v[:, None] * often).add_(phase).mul_(2 * math.pi)).mul_(0.5).add_(0.5)


def shapes(n: int, shape: Shape, g: torch.Generator, most: int = 5) -> Tensor:
    """`most` overlapping polygons and ellipses, filled or outlined, each with a gradient of colour."""
    c = shape[0]
    x, y = grid(shape, g)

    def gradient() -> Tensor:
        """A colour that runs linearly across the picture, [n, C, H, W]."""
        angle = uniform(g, n, 1, 1, high=2 * math.pi)
        along = (x * angle.cos() + y * angle.sin())[:, None]
        slope = uniform(g, n, c, 1, 1, low=-1, high=1) * uniform(g, n, 1, 1, 1, high=0.6)
        return (along * slope).add_(uniform(g, n, c, 1, 1))

    out = gradient()
    for _ in range(most):
        dx, dy = x - uniform(g, n, 1, 1, low=-0.9, high=0.9), y - uniform(g, n, 1, 1, low=-0.9, high=0.9)
        r, turn = 0.15 * 5 ** uniform(g, n, 1, 1), uniform(g, n, 1, 1, high=2 * math.pi)
        flat = uniform(g, n, 1, 1, low=0.4)  # an ellipse's short side : its long side
        along, across = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()
        round_ = (along.square_() + across.square_() / flat.square()).sqrt_().sub_(r)
        edge = torch.full_like(round_, -1.0)
        for j in range(5):  # a polygon: where all of five half-planes meet
            angle = turn + 2 * math.pi / 5 * (j + uniform(g, n, 1, 1, low=-0.6, high=0.6))
            edge = torch.maximum(edge, dx * angle.cos() + dy * angle.sin() - r * uniform(g, n, 1, 1, low=0.4))
        edge = torch.where(uniform(g, n, 1, 1) < 0.5, edge, round_)
        thin = uniform(g, n, 1, 1, low=0.04, high=0.2)
        edge = torch.where(uniform(g, n, 1, 1) < 0.5, edge, edge.abs() - thin)  # filled, or its outline
        cover = (0.5 - edge * max(shape[1:]) / 2).clamp_(0, 1)[:, None]  # smooth over one pixel
        out = out.lerp_(gradient(), cover)
    return out.clamp_(0, 1)


def leaves(n: int, shape: Shape, g: torch.Generator, layers: int = 32) -> Tensor:
    """Dead leaves: discs, diamonds and squares that hide one another, radii r with density ~ r^-3, as in nature."""
    c, h, w = shape
    x, y = grid(shape, g)
    r = (0.08 * uniform(g, n, layers, low=0.006).rsqrt()).clamp_(max=1.0)
    p = 2.0 ** torch.randint(3, (n, layers), generator=g, device=g.device)  # |x|^p + |y|^p < r^p
    dx = (x - uniform(g, n, layers, 1, low=-1, high=1)).abs_().pow(p[..., None])
    dy = (y.view(1, 1, h) - uniform(g, n, layers, 1, low=-1, high=1)).abs_().pow(p[..., None])
    inside = dx[:, :, None, :] < (r.pow(p)[..., None] - dy)[..., None]  # [n, layers, H, W]
    rank = torch.arange(1, layers + 1, device=g.device, dtype=torch.uint8).view(1, layers, 1, 1)
    top = (inside * rank).amax(1).long()  # 0: the ground
    hue = uniform(g, n, c, 1) + uniform(g, n, c, layers + 1, low=-0.5, high=0.5)
    out = hue.clamp_(0, 1).gather(2, top.view(n, 1, h * w).expand(n, c, h * w)).view(n, c, h, w)
    return out.mul_(uniform(g, n, 1, h, w, low=0.85))


def textures(n: int, shape: Shape, g: torch.Generator) -> Tensor:
    """Noise with amplitudes ~ f^-alpha, alpha from 0.5 to 2.5, stretched along one direction; half of it marbled."""
    c, h, w = shape
    fy = torch.fft.fftfreq(h, 1 / h, device=g.device).view(1, h, 1)
    fx = torch.fft.rfftfreq(w, 1 / w, device=g.device).view(1, 1, -1)
    turn, flat = uniform(g, n, 1, 1, high=math.pi), uniform(g, n, 1, 1, low=0.2)
    along, across = fx * turn.cos() + fy * turn.sin(), fy * turn.cos() - fx * turn.sin()
    f2 = along.square() + (across * flat).square()
    alpha = uniform(g, n, 1, 1, low=0.5, high=2.5)
    amplitude = torch.where(f2 > 0, f2.clamp_min(1e-6).pow(-alpha / 2), 0)[:, None]
    white = torch.randn(n, c, h, f2.shape[2], 2, generator=g, device=g.device)
    field = torch.fft.irfft2(torch.view_as_complex(white) * amplitude, s=(h, w))
    field = field / field.flatten(2).std(2).clamp_min(1e-6).view(n, c, 1, 1)
    blend = torch.randn(n, c, c, generator=g, device=g.device) * 0.3 + 0.5  # correlated channels
    field = torch.bmm(blend, field.flatten(2)).view(n, c, h, w)
    plain = field * uniform(g, n, 1, 1, 1, low=0.1, high=0.35) + uniform(g, n, c, 1, 1, low=0.2, high=0.8)
    return torch.where(uniform(g, n, 1, 1, 1) < 0.5, plain.clamp_(0, 1), waves(field[:, 0] * 0.5, c, g))


def fractals(n: int, shape: Shape, g: torch.Generator, iterations: int = 16) -> Tensor:
    """Julia sets by escape time: z <- z^2 + c with c near the edge of the Mandelbrot set's cardioid; random view."""
    x, y = grid(shape, g)
    turn, zoom = uniform(g, n, 1, 1, high=2 * math.pi), 0.3 * 5 ** uniform(g, n, 1, 1)
    cos, sin = turn.cos() * zoom, turn.sin() * zoom
    re, im = (
        x * cos - y * sin + uniform(g, n, 1, 1, low=-0.8, high=0.8),
        x * sin + y * cos + uniform(g, n, 1, 1, low=-0.4, high=0.4),
    )
    theta, near = uniform(g, n, 1, 1, high=2 * math.pi), uniform(g, n, 1, 1, low=0.95, high=1.2)
    c_re = (theta.cos() / 2 - (2 * theta).cos() / 4) * near
    c_im = (theta.sin() / 2 - (2 * theta).sin() / 4) * near
    smooth = torch.zeros_like(re)
    for _ in range(iterations):
        re, im = (re * re).sub_(im * im).add_(c_re).clamp_(-4, 4), (re * im).mul_(2).add_(c_im).clamp_(-4, 4)
        smooth.add_((re * re).addcmul_(im, im).neg_().exp_())  # a smooth count of the steps spent inside
    return waves(smooth * (4 / iterations), shape[0], g)


def stripes(n: int, shape: Shape, g: torch.Generator, waves: int = 3) -> Tensor:
    """Sinusoids of several directions and lengths, added; half of them cut to hard-edged bands."""
    x, y = grid(shape, g)
    v = torch.zeros(n, *shape[1:], device=g.device)
    for i in range(waves):
        turn, often = uniform(g, n, 1, 1, high=2 * math.pi), 2 * max(2.0, max(shape[1:]) / 5) ** uniform(g, n, 1, 1)
        one = torch.sin((x * turn.cos() + y * turn.sin()) * often + uniform(g, n, 1, 1, high=2 * math.pi))
        v += one * (uniform(g, n, 1, 1) < 1 / (i + 1))  # one, two or three of them
    hard = (v * uniform(g, n, 1, 1, low=4, high=20)).clamp_(-1, 1)
    v = torch.where(uniform(g, n, 1, 1) < 0.5, v, hard)[:, None]
    a, b = uniform(g, n, shape[0], 1, 1), uniform(g, n, shape[0], 1, 1)
    return (a + (b - a) * v.mul(0.5).add_(0.5)).clamp_(0, 1)


KINDS: dict[str, Callable[[int, Shape, torch.Generator], Tensor]] = {
    "shapes": shapes, "leaves": leaves, "textures": textures, "fractals": fractals, "stripes": stripes,
}  # fmt: skip


def stretched(x: Tensor, g: torch.Generator) -> Tensor:
    """Each image of x [n, C, H, W], inverted or not: a level around its mean becomes 0, its brightest pixel 1."""
    n = len(x)
    x = torch.where(uniform(g, n, 1, 1, 1) < 0.5, 1 - x, x)
    std, mean = torch.std_mean(x.flatten(1), 1)
    high = x.flatten(1).amax(1)
    low = torch.minimum(mean + uniform(g, n, low=-1.2, high=1.2) * std, mean + 0.7 * (high - mean)).view(n, 1, 1, 1)
    return ((x - low) / (high.view(n, 1, 1, 1) - low).clamp_min(1e-3)).clamp_(0, 1)


def shares(weights: tuple[float, ...], n: int) -> dict[str, int]:
    """Kind -> its number of pictures, in proportion to the weights (at least one positive), with sum n."""
    total, before, out = sum(weights), 0.0, {}
    for kind, weight in zip(KINDS, weights):
        out[kind] = round(n * (before + weight) / total) - round(n * before / total)
        before += weight
    return out


def draw(counts: dict[str, int], shape: Shape, g: torch.Generator, stretch: bool) -> Tensor:
    """uint8 [sum of counts, C, H, W]: `counts` pictures of each kind, in order, drawn in chunks that fit the cache."""
    chunk = max(8, 131_072 // (shape[1] * shape[2]))
    parts = []
    for kind, count in counts.items():
        for start in range(0, count, chunk):
            x = KINDS[kind](min(chunk, count - start), shape, g)
            parts.append(to_uint8(stretched(x, g) if stretch else x))
    return torch.cat(parts)
