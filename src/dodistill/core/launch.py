"""The group of a launch by torchrun, and how its processes notice that one of them is gone.

torchrun gives each process RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without them, or with a
WORLD_SIZE of 1, there is no group, and nothing of torch.distributed is touched.

The first rank may acquire for hours while the others wait, so no operation has a short time limit. Instead each process
writes a sign of life into the launch's store every `BEAT` seconds, and ends, with a reason, when nothing is heard of
another one for `LOST` seconds, or when another one has ended by an error.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from .. import __version__
from ..errors import DodistillError
from .collective import Lost
from .ranks import Group, Ranks

START = 120.0  #: seconds in which all processes must arrive
BEAT, LOST = 2.0, 20.0
GRACE = 8.0  #: seconds for a process to end by itself once another one has ended by an error
LONG = timedelta(days=30)
_ENDED, _FAILED = "ended", "failed "


def launched() -> bool:
    """Whether this process is one of several that torchrun has started."""
    return _number("WORLD_SIZE", 1) > 1


@contextmanager
def joined(leave: bool = False) -> Iterator[Ranks]:
    """The group of this launch; a group of one where there is none. `leave`: end the group with the block.

    Raises DodistillError where processes are missing or have other versions, and for a process that is lost.
    """
    if not launched():
        yield Ranks()
        return
    rank, world, local = _number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK", 0)
    cuda = torch.cuda.is_available() and local < torch.cuda.device_count()
    if cuda:
        torch.cuda.set_device(local)
    _begin(rank, world, cuda)
    pulse = Pulse(rank, world)
    said = _ENDED
    try:
        group = Group(rank, world, torch.device("cuda", local) if cuda else torch.device("cpu"))
        group.require_same(lambda: {"dodistill": __version__, "PyTorch": torch.__version__})
        yield group
    except Lost as error:
        said = _FAILED + str(error)
        raise DodistillError(pulse.reason(str(error))) from error
    except BaseException as error:
        said = _FAILED + (str(error).partition("\n")[0] or type(error).__name__)
        raise
    finally:
        pulse.end(said)
        if leave:
            with suppress(RuntimeError):
                dist.destroy_process_group()


def _begin(rank: int, world: int, cuda: bool) -> None:
    """Connect to the other processes, unless the user's program has done so."""
    if dist.is_initialized():
        return
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = _store(rank == 0 and not agent)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        group = PrefixStore(f"dodistill/{attempt}", store)
        group.set(f"here/{rank}", "")
        group.wait([f"here/{r}" for r in range(world)], timedelta(seconds=START))
        backend = "cpu:gloo,cuda:nccl" if cuda and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=LONG)
    except RuntimeError as error:
        raise DodistillError(
            f"rank {rank} of {world} cannot reach the others at {_address()} ({str(error).partition(chr(10))[0]}); "
            "start all processes, by torchrun."
        ) from error


def _store(serves: bool = False) -> TCPStore:
    """A connection to the launch's store. `serves`: this process keeps it, which without torchrun is the first one."""
    host, port = _address()
    return TCPStore(host, port, None, serves, timedelta(seconds=START), wait_for_workers=False)


def _address() -> tuple[str, int]:
    host = os.environ.get("MASTER_ADDR", "")
    if not host:
        raise DodistillError("WORLD_SIZE is set, but MASTER_ADDR is not; start the processes by torchrun.")
    return host, _number("MASTER_PORT")


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdigit():
        raise DodistillError(
            f"the environment variable {name} is {text!r}; it must be a number, as torchrun sets it. Without several "
            "processes, unset WORLD_SIZE."
        )
    return int(text)


class Pulse:
    """The signs of life of the processes of a group, in a thread with its own connection to the store."""

    def __init__(self, rank: int, world: int) -> None:
        """Returns once all processes have given the first one."""
        self.rank, self.world = rank, world
        self._heard = {r: ("", time.monotonic()) for r in range(world) if r != rank}
        self._done = threading.Event()
        connection = _store()
        turn = connection.add(f"dodistill/turn/{rank}", 1)  # a program may distil several times
        self._store = PrefixStore(f"dodistill/pulse/{turn}", connection)
        self._store.set(str(rank), "0")
        self._store.wait([str(r) for r in range(world)], timedelta(seconds=START))
        self._thread = threading.Thread(target=self._beat, name="dodistill pulse", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        count = 0
        while not self._done.wait(BEAT):
            count += 1
            with suppress(RuntimeError):  # no news; where the store is gone, that of every process
                self._store.set(str(self.rank), str(count))
                self._listen()
            if reason := self._lost():
                self._stop(reason)

    def _listen(self) -> None:
        for r, (before, _) in self._heard.items():
            said = self._store.get(str(r)).decode()
            if said != before:
                self._heard[r] = said, time.monotonic()

    def _lost(self) -> str:
        """The reason why this process must end; empty while all is well."""
        now = time.monotonic()
        for r, (said, since) in self._heard.items():
            if said.startswith(_FAILED) and now - since > GRACE:
                return self._because(r, said)
            if not said.startswith((_FAILED, _ENDED)) and now - since > LOST:
                return (
                    f"nothing was heard of rank {r} for {LOST:.0f} seconds: its process or its machine has stopped. "
                    "The last checkpoint is kept; rerun the command to resume."
                )
        return ""

    @staticmethod
    def _because(rank: int, said: str) -> str:
        return f"rank {rank} has stopped: {said.removeprefix(_FAILED)}"

    def reason(self, error: str) -> str:
        """Why an operation of the group failed: what another process said at its end, if it said something."""
        until = time.monotonic() + 3.0
        while time.monotonic() < until and not self._done.is_set():
            for r, (said, _) in list(self._heard.items()):
                if said.startswith(_FAILED) and "connection" not in said.lower():
                    return self._because(r, said)
            time.sleep(0.1)
        return (
            f"another process of this run has ended ({error}); its own output tells why. The last checkpoint is kept; "
            "rerun the command to resume."
        )

    def _stop(self, reason: str) -> NoReturn:
        print(f"dodistill: rank {self.rank}: {reason}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread may wait for the lost process for ever

    def end(self, said: str) -> None:
        """The last sign of this process."""
        self._done.set()
        self._thread.join(BEAT + 10.0)
        with suppress(RuntimeError):
            self._store.set(str(self.rank), said)
