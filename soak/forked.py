"""Commands of dodistill in forked children, which start at once because torch is loaded already."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from dodistill.commands.cli import main

torch.set_num_threads(1)


def start(words: Sequence[str], log: Path, memory_gb: float = 0.0) -> int:
    """Run a command in a child, its output appended to `log`. Returns the child's number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if memory_gb:
            most = int(memory_gb * 1e9)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        status = main(list(words))
    except BaseException as error:  # what main lets through is a traceback for the user
        os.write(2, f"Traceback: {type(error).__name__}: {error}\n".encode(errors="replace"))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, seconds: float) -> int | None:
    """The exit status (negative: of a signal) if the child ends within so long, else None."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.005)


def kill(child: int) -> None:
    """SIGKILL, and wait."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
