"""Pure functions of tensors: every loss that a source or a criterion is made of. Logits are [B, K], `s` the student's
and `t` the teacher's; nothing is detached here, so each caller decides where the gradient goes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

Stats = Sequence[tuple[Tensor, Tensor]]  #: per BatchNorm layer (mean [C], biased variance [C])


def kl(s: Tensor, t: Tensor, T: float = 1.0) -> Tensor:
    """T^2 KL(softmax(t/T) || softmax(s/T)), mean over the batch, >= 0. Hinton et al., Distilling the Knowledge in a
    Neural Network (2015)."""
    return T * T * _kl_rows(s / T, t / T).mean()


def _kl_rows(s: Tensor, t: Tensor) -> Tensor:
    """KL(softmax t || softmax s) of each row, [B]."""
    log_t = nnf.log_softmax(t, 1)
    return (log_t.exp() * (log_t - nnf.log_softmax(s, 1))).sum(1)


def l1(s: Tensor, t: Tensor) -> Tensor:
    """Mean absolute difference of the logits. Fang et al., Data-Free Adversarial Distillation (2019), Eq. 2."""
    return (s - t).abs().mean()


def js(p: Tensor, q: Tensor, T: float = 3.0) -> Tensor:
    """Jensen-Shannon divergence 1/2 KL(P||M) + 1/2 KL(Q||M), M = (P+Q)/2, of logits at temperature T; in [0, ln 2].

    As in Yin et al., Dreaming to Distill (2020), Eq. 7; their code computes `js_published`.
    """
    log_p, log_q = nnf.log_softmax(p / T, 1), nnf.log_softmax(q / T, 1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(1).mean()


def js_published(p: Tensor, q: Tensor, T: float = 3.0) -> Tensor:
    """The `js` of DeepInversion's released code: 1/2 KL(M||P) + 1/2 KL(M||Q) (the arguments of the
    library's KL are swapped), with P, Q and M clamped to [0.01, 0.99] after mixing and not normalised again.

    It can leave [0, ln 2]; the caller of that code clamps it to [0, 1]. With 100 classes the clamp hides most of it.
    """
    P, Q = torch.softmax(p / T, 1), torch.softmax(q / T, 1)
    M = (0.5 * (P + Q)).clamp(0.01, 0.99)
    P, Q = P.clamp(0.01, 0.99), Q.clamp(0.01, 0.99)
    return 0.5 * (M * (2 * M.log() - P.log() - Q.log())).sum(1).mean()


def adversarial(s: Tensor, t: Tensor) -> Tensor:
    """-mean_i( [argmax s_i == argmax t_i] KL(t_i || s_i) ), <= 0. It is low for inputs of which student and teacher
    predict the same class with different probabilities. Fang et al., CMI (2021), Eq. 9, as in the code of CMI and
    Fast."""
    return -((s.argmax(1) == t.argmax(1)) * _kl_rows(s, t)).mean()


def entropy(t: Tensor) -> Tensor:
    """Entropy of softmax(t), [B, K] -> [B], in nats, in [0, ln K]. Its mean is MosaicKD's alignment loss."""
    log_p = nnf.log_softmax(t, 1)
    return -(log_p.exp() * log_p).sum(1)


def balance(t: Tensor) -> Tensor:
    """sum_c p_c log2 p_c, p = mean over the batch of softmax(t), [B, K] -> in [-log2 K, 0]. MosaicKD's balance loss.

    It is lowest for equally frequent classes.
    """
    h: Tensor = torch.special.entr(torch.softmax(t, 1).mean(0)).sum()
    return -h / math.log(2)


def coverage(t: Tensor, least: float = 0.25) -> Tensor:
    """mean_c max(0, ln(least / K) - ln p_c), p = mean over the batch of softmax(t), [B, K] -> >= 0, in nats. Ours.

    0 where each class has `least` of its fair share 1/K or more. The gradient of the entropy of p (DAFL's L_ie) for
    class c is proportional to p_c, so it vanishes for an absent class. Here it is 1/K for such a class, for any p_c.
    """
    log_p = torch.logsumexp(nnf.log_softmax(t, 1), 0) - math.log(len(t))
    return (math.log(least / t.shape[1]) - log_p).clamp(min=0).mean()


def bn_statistics(
    stats: Stats,
    modules: Sequence[nn.Module],
    ema: Stats | None = None,
    momentum: float = 0.0,
    first: float = 1.0,
) -> Tensor:
    """Sum over BatchNorm layers of ||running_var - var||_2 + ||running_mean - mean||_2 (norms, not squares).

    Yin et al., Dreaming to Distill (2020), Eq. 4. `stats` are of the layers' inputs, in the graph; the targets are the
    running statistics of `modules`, in the same order. With `ema` (constants; empty at first) and `momentum` m the
    statistics are first replaced by (1-m) current + m ema, as the code of Fast does (its gradient is thereby scaled by
    1-m).
    `first` weighs the first layer (10 in DeepInversion's ImageNet code).
    """
    ema = ema or stats[:0]
    if len(stats) != len(modules) or len(ema) not in (0, len(stats)):
        raise ValueError(f"{len(stats)} statistics for {len(modules)} layers and {len(ema)} averages")
    total: Tensor | None = None
    for i, ((mean, var), module) in enumerate(zip(stats, modules)):
        if ema:
            mean = (1 - momentum) * mean + momentum * ema[i][0]
            var = (1 - momentum) * var + momentum * ema[i][1]
        to_mean, to_var = module.running_mean, module.running_var
        if not isinstance(to_mean, Tensor) or not isinstance(to_var, Tensor):
            raise ValueError(f"BatchNorm layer {i} keeps no running statistics to match")
        r = torch.linalg.vector_norm(to_var - var) + torch.linalg.vector_norm(to_mean - mean)
        r = first * r if i == 0 else r
        total = r if total is None else total + r
    if total is None:
        raise ValueError("no BatchNorm layer to match")
    return total


@torch.no_grad()
def bn_average(ema: Stats | None, stats: Stats, momentum: float) -> list[tuple[Tensor, Tensor]]:
    """The next `ema` of `bn_statistics`: m ema + (1-m) current, or the current statistics at first. Detached."""
    if not ema:
        return [(m.detach().clone(), v.detach().clone()) for m, v in stats]
    return [
        (momentum * em + (1 - momentum) * m, momentum * ev + (1 - momentum) * v) for (em, ev), (m, v) in zip(ema, stats)
    ]


def total_variation(x: Tensor, order: int = 2) -> Tensor:
    """Total variation of images [B, C, H, W] along four directions: horizontal, vertical and the two diagonals.

    order 2: the sum of the four L2 norms over the whole batch; order 1: the sum of the four mean absolute differences.
    Both as in the code of DeepInversion (Mahendran and Vedaldi, 2015).
    """
    differences = (
        x[..., :, :-1] - x[..., :, 1:],
        x[..., :-1, :] - x[..., 1:, :],
        x[..., 1:, :-1] - x[..., :-1, 1:],
        x[..., :-1, :-1] - x[..., 1:, 1:],
    )
    if order == 1:
        return torch.stack([d.abs().mean() for d in differences]).sum()
    return torch.stack([torch.linalg.vector_norm(d) for d in differences]).sum()


def l2_norm(x: Tensor, per_image: bool = False) -> Tensor:
    """||x||_2 of the whole batch (DeepInversion's CIFAR code), or the mean over images of it (its ImageNet code)."""
    norm: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1).mean() if per_image else torch.linalg.vector_norm(x)
    return norm


def noisy_transition(a: Tensor, teacher_accuracy: float) -> Tensor:
    """DFND's matrix Q [K, K] from its free parameter a [K, K-1]: the teacher's accuracy on the diagonal, and in row k
    the rest of the mass distributed by softmax(a_k). Rows sum to 1. Chen et al., DFND (2021), Eq. 6-7."""
    K = a.shape[0]
    off = (1 - teacher_accuracy) * torch.softmax(a, 1)
    diagonal = torch.full_like(a[:, :1], teacher_accuracy)
    # Row-major, the off-diagonal entries of a K x K matrix are K-1 runs of K entries, each between two diagonal ones.
    body = torch.cat([diagonal[:-1], off.reshape(K - 1, K)], 1).flatten()
    return torch.cat([body, diagonal[-1]]).view(K, K)


def noisy_adaptation(s: Tensor, t: Tensor, a: Tensor, teacher_accuracy: float) -> Tensor:
    """NLL(log(softmax(s) Q), argmax t): the student's clean prediction, multiplied by the teacher's assumed confusion.

    Chen et al., Learning Student Networks in the Wild (DFND, 2021), Eq. 8; `a` and `teacher_accuracy` as in
    `noisy_transition`.
    """
    noisy = torch.softmax(s, 1) @ noisy_transition(a, teacher_accuracy)
    return nnf.nll_loss(noisy.clamp_min(1e-12).log(), t.argmax(1))
