"""Export of a network by torch.export: a `.pt2` file, from images in [0, 1] to logits, that needs no code of ours."""

from __future__ import annotations

import io
import json

import torch
from torch import Tensor, nn

from ..errors import DodistillError
from ..functional.modes import evaluating
from .onnx import Run, Shape, facts, quiet, reason

FACTS = "dodistill.json"  #: the file inside that holds `facts`


def program_bytes(model: nn.Module, image_shape: Shape) -> bytes:
    """`model` as a file of torch.export.save, for batches of any size; input fp32 [n, C, H, W] in [0, 1].

    Raises DodistillError for a network that torch.export cannot trace.
    """
    images = torch.full((2, *image_shape), 0.5, device=next(model.parameters()).device)
    file = io.BytesIO()
    try:
        with evaluating(model), quiet():
            program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("n")},))
            torch.export.save(program, file, extra_files={FACTS: json.dumps(facts(model, image_shape))})
    except Exception as error:  # torch.export raises many kinds
        raise DodistillError(
            f"this network cannot be exported by torch.export: {reason(error)}; FILE.onnx (ONNX) and FILE.safetensors "
            "are other formats."
        ) from error
    return file.getvalue()


def program_runner(data: bytes) -> Run:
    """The network of such a file."""
    with quiet():
        module = torch.export.load(io.BytesIO(data)).module()

    def run(images: Tensor) -> Tensor:
        logits: Tensor = module(images)
        return logits

    return run
