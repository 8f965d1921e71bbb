"""`dodistill doctor`: versions and hardware of this machine, and common problems."""

from __future__ import annotations

import importlib
import os
import platform
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Arguments:
    """List the versions and the hardware of this machine, and what is broken."""


def run(_arguments: Arguments) -> int:
    return doctor()


def _version(name: str) -> str:
    """The version of an optional package, or why it cannot be used."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return "not installed"
    except RuntimeError as error:  # raised by a torchvision that does not match torch
        return f"BROKEN: {str(error).splitlines()[0]} (install torch and {name} from the same index)"
    return str(getattr(module, "__version__", "?"))


def doctor() -> int:
    """Print the list. Returns 1 when an installed package is broken."""
    import torch

    from .. import __version__
    from ..core.precision import Precision, trial
    from ..models import load_model

    print(f"dodistill {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    broken = False
    for name in ("torchvision", "timm", "sklearn"):
        version = _version(name)
        broken |= version.startswith("BROKEN")
        print(f"  {name:<12} {version}")
    print(f"  data         DODISTILL_DATA={os.environ.get('DODISTILL_DATA', '(not set)')}")
    if torch.cuda.is_available():
        print(f"  device       {torch.cuda.get_device_name()}")
    print(f"  CPU          {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    device = torch.device("cpu")
    net = torch.nn.Conv2d(32, 32, 3, 1, 1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(64, 32, 32, 32).contiguous(memory_format=torch.channels_last)
    for name in ("fp32", "bf16"):
        best = float("inf")
        with torch.no_grad(), Precision(device, name)():
            for _ in range(5):
                start = time.perf_counter()
                net(x)
                best = min(best, time.perf_counter() - start)
        print(f"  {name:<12} {2 * 64 * 32 * 32 * 9 * 32 * 32 / best / 1e9:.0f} GFLOP/s in a 3x3 convolution")
    auto = Precision(device)
    auto.settle(trial(load_model("wrn16_1", num_classes=10, in_channels=3), (3, 32, 32), device))
    print(f"  precision    auto is {auto.reason} (training step of wrn16_1)")
    return int(broken)
