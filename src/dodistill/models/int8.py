"""A network in 8-bit integers, for a CPU: onnxruntime's static quantisation of an ONNX file.

QDQ format, activations uint8, weights int8 with a scale for each output channel. The range of each activation is that
of the calibration images. Weights have 7 of their 8 bits: x86 processors without VNNI add pairs of products of
uint8 and int8 in 16 bits, where two products of full range overflow (onnxruntime's `reduce_range`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DodistillError
from ..functional.augment import to_float
from .onnx import as_text, quiet, reason, require_onnx

BATCH = 32


def int8_bytes(data: bytes, images: Tensor, facts: dict[str, Any]) -> bytes:
    """The ONNX file `data` quantised, as the content of a file; `images` uint8 [n, C, H, W] calibrate it.

    Raises DodistillError without onnxruntime, and for a network that it cannot quantise.
    """
    require_onnx()
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """The calibration images, batch by batch."""

        def __init__(self) -> None:
            self.batches = iter(images.split(BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": to_float(batch).numpy()}

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        plain, prepared, small = (str(Path(folder) / f"{name}.onnx") for name in ("plain", "prepared", "small"))
        Path(plain).write_bytes(data)
        try:
            with quiet():
                quant_pre_process(plain, prepared, skip_symbolic_shape=True)  # folds BatchNorm
                quantize_static(
                    prepared, small, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                )  # fmt: skip
        except Exception as error:  # onnxruntime raises many kinds
            raise DodistillError(
                f"this network cannot be quantised: {reason(error)}; FILE.onnx, FILE.pt2 and FILE.safetensors are "
                "other formats."
            ) from error
        proto = onnx.load(small)
    onnx.helper.set_model_props(proto, as_text({**facts, "quantised": f"int8, calibrated on {len(images)} images"}))
    out: bytes = proto.SerializeToString()
    return out
