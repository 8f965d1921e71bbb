"""`python -m dodistill.commands.child COMMAND ...`: the command line, for a process that must not outlive its parent.

It holds the reading end of a pipe as its stdin. When the parent ends, however it ends, the pipe closes: the process
then stops as at SIGTERM, with a checkpoint. It ignores the signals by which schedulers announce a preemption to all
processes of a job: its parent acts on them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from .cli import main

#: Seconds that a process has for its last checkpoint once its parent is gone.
GRACE = 60.0


def end_with_parent() -> None:
    """Stop this process when its stdin closes."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


if __name__ == "__main__":
    for name in ("SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.exit(main())
