"""Export of a network to ONNX, from images in [0, 1] to logits, including normalisation and context head."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import torch
from torch import nn

from ..errors import DodistillError
from ..files import replacing
from ..functional.modes import evaluating


def export_onnx(model: nn.Module, path: str | Path, image_shape: tuple[int, int, int]) -> Path:
    """Write `model` for batches of any size; input `images` fp32 [n, C, H, W] in [0, 1], output `logits` [n, K].

    Raises DodistillError without the optional libraries, and for a network that the exporter cannot convert.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise DodistillError(f"ONNX export needs {error.name}: pip install 'dodistill[onnx]'") from error
    device = next(model.parameters()).device
    images = torch.full((2, *image_shape), 0.5, device=device)
    said = io.StringIO()
    try:
        with evaluating(model), warnings.catch_warnings(), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")  # the exporter's own warnings
            program = torch.onnx.export(
                model, (images,), input_names=["images"], output_names=["logits"], dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False,
            )  # fmt: skip
    except Exception as error:  # the exporter raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DodistillError(f"this network cannot be exported to ONNX: {reason}") from error
    assert program is not None
    with replacing(Path(path)) as file:
        file.write(program.model_proto.SerializeToString())
    return Path(path)
