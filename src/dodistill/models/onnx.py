"""Export of a network to ONNX, from images in [0, 1] to logits, including normalisation and context head."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import DodistillError
from ..functional.modes import evaluating
from .normalized import Normalized

Shape = tuple[int, int, int]
Run = Callable[[Tensor], Tensor]  #: images fp32 [n, C, H, W] in [0, 1] -> logits [n, K]


def require_onnx(names: Sequence[str] = ("onnx", "onnxscript", "onnxruntime"), what: str = "ONNX export") -> None:
    """Raise DodistillError, which names the extra, if a library for ONNX is missing."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise DodistillError(f"{what} needs {error.name}: pip install 'dodistill[onnx]'") from error


def facts(model: nn.Module, image_shape: Shape) -> dict[str, Any]:
    """What an exported file tells about its model: version, inputs, and of a `Normalized` its spec (class names, where
    they are known) and normalisation."""
    out: dict[str, Any] = {
        "dodistill": __version__, "image_shape": list(image_shape),
        "images": "float32 [n, C, H, W] in [0, 1]; the normalisation is inside",
    }  # fmt: skip
    if isinstance(model, Normalized):
        out |= {key: value for key, value in model.spec.items() if value is not None}
        out |= {"mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist()}
    return out


def onnx_bytes(model: nn.Module, image_shape: Shape) -> bytes:
    """`model` as an ONNX file for batches of any size; input `images` fp32 [n, C, H, W] in [0, 1], output `logits`
    [n, K]. Its metadata are `facts`, lists as JSON.

    Raises DodistillError without the optional libraries, and for a network that the exporter cannot convert.
    """
    require_onnx()
    import onnx

    device = next(model.parameters()).device
    images = torch.full((2, *image_shape), 0.5, device=device)
    try:
        with evaluating(model), quiet():
            program = torch.onnx.export(
                model, (images,), input_names=["images"], output_names=["logits"], dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False,
            )  # fmt: skip
    except Exception as error:  # the exporter raises many kinds
        raise DodistillError(
            f"this network cannot be exported to ONNX: {reason(error)}; FILE.pt2 (torch.export) and FILE.safetensors "
            "are other formats."
        ) from error
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, as_text(facts(model, image_shape)))
    data: bytes = proto.SerializeToString()
    return data


def onnx_runner(data: bytes) -> Run:
    """The network of an ONNX file on one CPU thread of onnxruntime. Raises DodistillError if it cannot be read."""
    require_onnx()
    session = _session(data, "the exported network", 1)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.contiguous().numpy()})[0])

    return run


def _session(data: bytes, what: str, threads: int) -> Any:
    """The bytes of an ONNX file, `what`, in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a kind for each status
        raise DodistillError(f"onnxruntime does not read {what}: {reason(error)}") from error


class Exported(nn.Module):
    """A network in onnxruntime, on the CPU."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(["logits"], {"images": x.contiguous().numpy()})[0])


def read_onnx(path: str | Path) -> Normalized:
    """The network in a file that `export` wrote, from images in [0, 1] on the CPU to logits; its `spec` are the file's
    class names and image shape.

    Raises DodistillError for a file that is missing, damaged, or of another origin.
    """
    path = Path(path)
    if not path.is_file():
        raise DodistillError(f"there is no file {path} (looked for from {Path.cwd()}); correct the path.")
    require_onnx(["onnxruntime"], f"{path.suffix} file {path}")
    session = _session(path.read_bytes(), str(path), torch.get_num_threads())
    told = session.get_modelmeta().custom_metadata_map
    try:
        channels, *size = json.loads(told["image_shape"])
        spec = {"spec": path.name, "in_channels": channels, "image_size": size}
        net = Exported(session)
        spec |= {"num_classes": net(torch.zeros(1, channels, *size)).shape[1]}
        spec |= {"classes": tuple(json.loads(told["classes"]))} if "classes" in told else {}
    except Exception as error:  # its metadata, its inputs or its outputs are others
        raise DodistillError(
            f"{path} is no file that dodistill exported ({reason(error)}); export the student again, or score its "
            "student.safetensors."
        ) from error
    return Normalized(net, (0.0,), (1.0,), spec=spec)


def as_text(values: Mapping[str, Any]) -> dict[str, str]:
    """Texts as they are, everything else as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def reason(error: Exception) -> str:
    """The first line of an error of a library."""
    said = str(error).strip()
    return said.splitlines()[0][:300] if said else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' own warnings, log lines and prints."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
