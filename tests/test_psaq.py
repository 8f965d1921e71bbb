"""PSAQ: the released code's numbers, slow oracles, where its gradients go, and which teachers have patches."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dodistill.config import registry
from dodistill.config.tree import resolve
from dodistill.core.context import Context
from dodistill.errors import DodistillError
from dodistill.functional import losses
from dodistill.functional.augment import View
from dodistill.functional.density import kernel_entropy
from dodistill.models import Normalized, load_model
from dodistill.models.normalized import NORMALISATION
from dodistill.models.patches import patch_tokens
from dodistill.models.teacher import Teacher
from dodistill.models.vit import TinyViT, positions
from dodistill.sources.psaq import similarities
from formula import Draws, Vit, alike, close, digest, fill, gauss, images, labels, wave
from helpers import SHAPE, context, job, same, student, tree, vit

GOLDEN = json.loads((Path(__file__).parent / "golden" / "psaq.json").read_text())["values"]


def released(name: str) -> Any:
    return GOLDEN[name]["value"]


def build(teacher: nn.Module | None = None, seed: int = 0, **settings: Any) -> Any:
    config = registry.config("source", "psaq")(**({"iterations": 3, "batch": 16, "lr_warmup": 1} | settings))
    return config.build(context(teacher or vit(), seed))  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------- the released code


@pytest.mark.parametrize(("iterations", "bandwidth"), [(1, 0.01), (2, 0.1)])
def test_its_images_are_the_released_ones(iterations: int, bandwidth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes of Adam on the formula's transformer, whose heads are read before their projection."""
    draws = Draws()
    monkeypatch.setattr(torch, "randn", draws.randn)
    monkeypatch.setattr(torch, "randint", draws.randint)
    teacher = Teacher(Normalized(fill(Vit()).eval(), *NORMALISATION["imagenet"]), (3, 16, 16))
    config: Any = registry.config("source", "psaq")
    settings = {"batch": 16, "iterations": iterations, "lr_warmup": 1, "bandwidth": bandwidth}
    source = config(**settings, tv_target=(2600.0, 2600.0)).build(Context(teacher, torch.device("cpu"), view=View()))
    x = source.acquire(teacher, 0).images
    terms = [source.terms[name].item() for name in ("ce", "entropy", "tv")]
    assert close(terms, released(f"{iterations} a pass: ce, entropy, tv"))
    assert alike(digest(x - 0.5), released(f"{iterations} a pass: images"))


def both_ways(cosines: Tensor, counts: Tensor, n: int) -> Tensor:
    """[B, n (n + 1) / 2] of one window -> [B, n * n], each ordered pair once."""
    i, j = torch.triu_indices(n, n)
    full = torch.zeros(len(cosines), n, n)
    full[:, i, j] = full[:, j, i] = cosines
    assert counts.sum() == n * n
    return full.flatten(1)


def test_its_terms_are_the_released_ones() -> None:
    patches = gauss(8, 2, 17, 6, phase=4).mean(1)[:, None, 1:]
    assert alike(digest(both_ways(*similarities(patches), 16)), released("similarities"))
    assert close(kernel_entropy(0.9 * wave(8, 256, phase=3)).item(), released("entropy"))
    assert close(losses.total_variation(gauss(4, 3, 8, 8, phase=5)).item(), released("tv"))
    source = build(iterations=500, lr_warmup=100)
    assert close([source._rate(i) for i in (0, 50, 99, 100, 300, 499)], released("rates"))


def test_the_presets_are_the_released_numbers() -> None:
    config: Any = registry.config("source", "psaq")
    for preset, lr in (("vit", 0.2), ("swin", 0.25)):
        c = config(**config.presets[preset]["source"])
        assert (c.batch, c.iterations, c.lr, c.betas, c.lr_warmup) == (32, 500, lr, (0.5, 0.9), 100)
        assert (c.entropy, c.oh, c.tv, c.tv_target) == (1.0, 1.0, 0.05, (2500.0, 3000.0))
        assert (c.bandwidth, c.points, c.adv) == (0.01, 10, 0.0)
        assert [round(224 * share) for share in c.jitter] == [15, 30]


# ------------------------------------------------------------------------------------------------------- oracles


def test_similarities_and_their_spread_by_loops() -> None:
    u = gauss(2, 3, 4, 5, phase=1)
    cosines, counts = similarities(u)
    assert cosines.shape == (2, 30)
    slow = [F.cosine_similarity(u[1, w, i], u[1, w, j], dim=0).item() for w in range(3) for i in range(4)
            for j in range(4)]  # fmt: skip
    mine = [both_ways(part, n, 4)[1] for part, n in zip(cosines.split(10, 1), counts.split(10))]
    assert torch.cat(mine).tolist() == pytest.approx(slow, abs=1e-5)
    s = torch.cat([both_ways(part, n, 4) for part, n in zip(cosines.split(10, 1), counts.split(10))], 1)

    h, points, entropies = 0.05, 6, []
    low, high = s.min().item(), s.max().item()
    at = [low + (high - low) * k / (points - 1) for k in range(points)]
    for row in s.tolist():
        p = [sum(math.exp(-((x - v) ** 2) / (2 * h * h)) for v in row) / 48 / (h * math.sqrt(2 * math.pi)) + 1e-4
             for x in at]  # fmt: skip
        f = [-v * math.log(v) for v in p]
        entropies.append(sum((f[k] + f[k + 1]) / 2 * (at[k + 1] - at[k]) for k in range(points - 1)))
    assert kernel_entropy(s, h, points).item() == pytest.approx(sum(entropies) / 2, rel=1e-4)
    assert kernel_entropy(cosines, h, points, counts).item() == pytest.approx(sum(entropies) / 2, rel=1e-4)


def test_the_gradient_of_the_entropy_is_that_of_its_formula() -> None:
    s, w, h = gauss(2, 6, phase=2).double().requires_grad_(), torch.tensor([1, 2, 1, 2, 2, 1]), 0.3
    x = torch.linspace(0, 1, 7, dtype=torch.double) * (s.max() - s.min()).item() + s.min().item()
    kernels = torch.exp(-((x[:, None] - s[:, None]) ** 2) / (2 * h * h)) / (h * math.sqrt(2 * math.pi))
    p = (kernels * w).sum(2) / w.sum() + 1e-4
    plain = torch.trapezoid(-p * p.log(), x, dim=1).mean()
    mine = kernel_entropy(s, h, 7, w)
    assert mine.item() == pytest.approx(plain.item(), rel=1e-9)
    assert torch.allclose(torch.autograd.grad(mine, s)[0], torch.autograd.grad(plain, s)[0], rtol=1e-9)


def test_spread_similarities_have_the_higher_entropy() -> None:
    close_, even = torch.full((2, 64), 0.9), torch.linspace(-0.9, 0.9, 64).expand(2, 64)
    close_ = close_ + 0.01 * wave(2, 64)
    assert kernel_entropy(even, 0.05) > kernel_entropy(close_, 0.05) + 0.3


# ----------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("term", ["ce", "entropy", "tv", "js"])
def test_every_term_reaches_the_pixels_and_nothing_else(term: str) -> None:
    source = build(adv=1.0, bandwidth=0.2)
    pupil = student().eval()
    u = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with patch_tokens(source.context.teacher) as taps:
        terms = source._terms(u, torch.arange(16) % 10, pupil, 1, 1e9, taps)
        assert set(terms) == {"ce", "entropy", "tv", "js"}
        (g,) = torch.autograd.grad(terms[term], u)
    assert torch.isfinite(g).all()
    assert (g.flatten(1).norm(dim=1) > 0).all()
    source.acquire(pupil, 0)
    assert all(p.grad is None for p in (*pupil.parameters(), *source.context.teacher.parameters()))


def test_terms_without_weight_are_not_computed() -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    source = build(entropy=0.0, tv=0.0)
    source.acquire(Never(), 0)
    assert set(source.terms) == {"ce"}


def test_it_descends_and_spreads_the_similarities() -> None:
    first, last = build(iterations=1, bandwidth=0.1), build(iterations=40, bandwidth=0.1)
    for source in (first, last):
        x = source.acquire(student().eval(), 0).images
        assert x.min() >= 0
        assert x.max() <= 1
    assert last.terms["ce"] < 0.7 * first.terms["ce"]
    assert last.terms["entropy"] < first.terms["entropy"]  # minus the entropy


def test_same_seed_same_images_and_its_state_is_all_of_it() -> None:
    pupil = student().eval()
    a, b = build(), build(seed=5)
    first = [a.acquire(pupil, r).images for r in range(2)]
    again = build()
    same(first, [again.acquire(pupil, r).images for r in range(2)])
    assert not torch.equal(first[0], b.acquire(pupil, 0).images)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert torch.equal(a.acquire(pupil, 2).images, b.acquire(pupil, 2).images)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"iterations": 0}, "source.iterations is 0"), ({"points": 1}, "source.points is 1; it must be at least 2"),
     ({"bandwidth": 0.0}, "source.bandwidth is 0"), ({"batch": 1}, "source.batch is 1")],
)  # fmt: skip
def test_bad_settings_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(DodistillError, match=said):
        build(**settings)


# --------------------------------------------------------------------------------------------- which teachers fit


def seen(model: nn.Module, shape: tuple[int, int, int], n: int = 2) -> list[tuple[int, ...]]:
    """Shapes of the patch tokens of `n` images; no hook stays."""
    model.eval()
    with patch_tokens(model) as taps:
        assert taps.layers == []
        model(images(n, *shape).requires_grad_())
        out = [tuple(layer.shape) for layer in taps.layers]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return out


def test_tokens_are_the_mean_over_heads_before_the_projection() -> None:
    net = fill(Vit()).eval()
    x = images(2, 3, 16, 16)
    with patch_tokens(net) as taps:
        net(x)
        (first, _) = taps.layers
    tokens = torch.cat([net.cls_token.expand(2, -1, -1), net.patch(x).flatten(2).transpose(1, 2)], 1) + net.pos_embed
    qkv = net.blocks[0].attn.qkv(net.blocks[0].norm1(tokens))
    q, k, v = (part.reshape(2, 17, 2, 6).transpose(1, 2) for part in qkv.split(12, 2))
    heads = (q @ k.transpose(2, 3) / math.sqrt(6)).softmax(3) @ v
    assert torch.allclose(first[:, 0], heads.mean(1)[:, 1:], atol=1e-5)


class Encoder(nn.Module):
    """PyTorch's own encoder on patches of 4 pixels, with two tokens before them, which nothing declares."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 16, 4, 4)
        self.before = nn.Parameter(torch.zeros(1, 2, 16))
        self.batch_first = batch_first
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 16, batch_first=batch_first), 2, enable_nested_tensor=False
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.before.expand(len(x), -1, -1), self.patch(x).flatten(2).transpose(1, 2)], 1)
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        out: Tensor = self.head(x.mean(1))
        return out


@pytest.mark.parametrize("batch_first", [True, False])
def test_pytorchs_encoder(batch_first: bool) -> None:
    net = Encoder(batch_first)
    assert seen(net, (1, 16, 16), 3) == [(3, 1, 16, 16)] * 2
    assert seen(net, (1, 8, 12)) == [(2, 1, 6, 16)] * 2  # the grid has the shape of the image
    source = build(net)
    assert source.acquire(student().eval(), 0).images.shape == (16, *SHAPE)


def test_heads_that_a_layer_returns_are_averaged() -> None:
    """As in Hugging Face's: the heads side by side, in a tuple; another module projects them."""

    class Heads(nn.Module):
        num_attention_heads = 2

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x, None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Heads()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x.flatten(1)[:, :32].unflatten(1, (4, 8)))[0].mean((1, 2))
            return out

    x, net = images(3, 1, 8, 8), Net()
    with patch_tokens(net) as taps:
        net(x)
        (tokens,) = taps.layers
    assert torch.allclose(tokens[:, 0], x.flatten(1)[:, :32].view(3, 4, 2, 4).mean(2))


@pytest.mark.parametrize(
    ("net", "shape"), [(TinyViT(32, 10), (1, 28, 28)), (Normalized(TinyViT(32, 10, 3)), (3, 8, 12))]
)
def test_our_own(net: nn.Module, shape: tuple[int, int, int]) -> None:
    assert seen(net, shape) == [(2, 1, shape[1] * shape[2] // 16, 16)] * 4


@pytest.mark.parametrize(
    ("name", "size", "patches"),
    [
        ("test_vit", 32, [(2, 1, 4, 32)] * 6),  # class token
        ("vit_dpwee_patch16_reg1_gap_256", 64, None),  # a register, no class token
        ("deit_tiny_distilled_patch16_224", 64, [(2, 1, 16, 64)] * 12),  # class and distillation token
    ],
)
def test_timms(name: str, size: int, patches: list[tuple[int, ...]] | None) -> None:
    pytest.importorskip("timm")
    net = load_model(f"timm:{name}", num_classes=10, in_channels=3, image_size=size, seed=0)
    found = seen(net, (3, size, size))
    assert found == patches if patches else {shape[:3] for shape in found} == {(2, 1, 16)}


def test_timms_windows_of_swin() -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(1, 1), num_heads=(2, 2), num_classes=10
    )
    assert seen(net, (3, 56, 56)) == [(2, 4, 49, 6), (2, 1, 49, 12)]


def test_timm_computes_what_ours_does() -> None:
    models = pytest.importorskip("timm.models.vision_transformer")
    net = TinyViT(48, 10).eval()
    theirs = models.VisionTransformer(
        img_size=28, patch_size=4, in_chans=1, num_classes=10, embed_dim=48, depth=4, num_heads=3, class_token=False,
        global_pool="avg", fc_norm=False,
    ).eval()  # fmt: skip
    theirs.load_state_dict(net.state_dict() | {"pos_embed": positions(7, 7, 48)[None]})
    x = images(3, 1, 28, 28)
    assert torch.allclose(net(x), theirs(x), atol=1e-5)


def test_a_teacher_without_attention_is_refused_before_the_run(teacher: nn.Module) -> None:
    said = (
        r"'psaq' reads the outputs of attention layers, but this teacher \(Tiny\) has none, only BatchNorm2d, Conv2d, "
        r"Linear. Methods that work with it: .*fast"
    )
    with pytest.raises(DodistillError, match=said) as error:
        job(teacher, resolve(tree("psaq")))
    assert "psaq" not in str(error.value).partition("work with it:")[2]


def test_attention_without_patches_is_refused_by_its_layers() -> None:
    class Pooling(nn.Module):
        """One query for the whole image: no patches."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            rows = x[:, 0]
            out: Tensor = self.head(self.attention(rows.mean(1, keepdim=True), rows, rows)[0][:, 0])
            return out

    with pytest.raises(DodistillError, match=r"'psaq' compares patches .* Its layers: Linear, NonDynamically"):
        build(Pooling())


def test_labels_are_those_of_the_config() -> None:
    assert labels(4).tolist() == [1, 4, 7, 0]
    source = build(batch=20, balanced=True, iterations=60, lr_warmup=5, entropy=0.0, tv=0.0)
    t = source.context.teacher(source.acquire(student().eval(), 0).images)
    assert (t.argmax(1) == torch.arange(20) % 10).float().mean() > 0.6
