"""CUDA graphs of networks: their kernels are recorded once, for one batch size, and replayed by a single launch.

A replay runs the same kernels on the same addresses. So its results are those of the eager network, bit for bit. A
batch of another size runs eagerly. The network must do the same at each call: one that draws random numbers outside
of PyTorch, or reads values of its tensors in Python, would repeat what it did while it was recorded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from typing import cast as cast_to

import torch
from torch import Tensor, nn
from torch.func import functional_call

Network = Callable[[Tensor], Tensor]
Cast = Callable[[], AbstractContextManager[Any]]

#: passes before the recording, in which kernels are chosen and workspaces allocated
WARMUP = 3


def recorded_training(student: nn.Module, x: Tensor, cast: Cast) -> Network:
    """`student` in train mode, forward and backward, for batches of the shape of x [B, C, H, W].

    The student's parameters must stay at their addresses. The recording passes x through the student several times,
    which moves the running statistics of its BatchNorms.
    """
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}

    def passed(batch: Tensor, *weights: Tensor) -> Tensor:
        with cast():
            return cast_to(Tensor, functional_call(student, dict(zip(trained, weights)), (batch,)))

    # Recorded with aliases of the parameters: autograd ties these to the streams of the recording, and warns of it.
    aliases = [p.detach().requires_grad_() for p in trained.values()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
        graphed = torch.cuda.make_graphed_callables(
            passed, (x, *aliases), num_warmup_iters=WARMUP, allow_unused_input=True
        )  # fmt: skip

    def run(batch: Tensor) -> Tensor:
        if batch.shape != x.shape or not student.training:
            with cast():
                return student(batch)  # type: ignore[no-any-return]
        out = cast_to(Tensor, graphed(batch, *trained.values()))
        return out.clone()  # the next replay overwrites what the graph returned

    return run


def recorded(network: Network, x: Tensor, cast: Cast) -> Network:
    """`network`, without gradients, for batches of the shape of x [B, C, H, W].

    Call it outside of autocast, whose cache of converted weights would not outlive the recording.
    """

    def passed(batch: Tensor) -> Tensor:
        with torch.no_grad(), cast():
            return network(batch)

    shown, side = x.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            passed(shown)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = passed(shown)

    def run(batch: Tensor) -> Tensor:
        if batch.shape != shown.shape:
            return passed(batch)
        shown.copy_(batch)
        graph.replay()
        return out.clone()

    return run
