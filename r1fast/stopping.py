"""How a run ends early: a signal asks, all ranks agree on the step, and what was done is kept.

SIGTERM and Ctrl-C set a flag, which is shared with a number that each update exchanges anyway: every rank finishes
that step, saves it and raises Stopped. A rank that samples is interrupted at once, and the others hear of it when the
samples are gathered. Elsewhere (rewards, a reward model, a rollout in the background) the run goes on to the next of
these points.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch

from r1fast.parallel.mesh import Dist

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_REQUEST_S = 2.0  # a launcher passes on what the terminal sent to all: one request, though two signals
_FAILED = 1 << 10  # above all signals


class Stopped(Exception):
    """Raised by all ranks at the same place, after a signal to any of them."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Interrupted(BaseException):
    """Raised by the signal's handler inside `with stop.interruptible()`; ends sampling, and nothing else catches it."""


class Stop:
    """What this process was asked for, and what all ranks have agreed on; `with stop:` handles the signals.

    After a signal they stay handled: a launcher tells a rank that is about to end once more when another has ended.
    problem: why rank 0 could not write its log: between collectives it cannot tell the others.
    """

    def __init__(self) -> None:
        self.asked = 0  # a signal's number
        self.agreed = 0  # the same on every rank
        self.problem: OSError | None = None
        self._interrupts = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # others get no signals
            self._previous = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for signum, handler in self._previous.items() if not self.asked else ():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            if time.monotonic() - self._since > SAME_REQUEST_S:
                os._exit(128 + signum)
            return
        self.asked, self._since = signum, time.monotonic()
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(signum).name
            os.write(2, f"r1fast: {name}: the run stops at the next safe point; once more stops it at once\n".encode())
        if self._interrupts:
            raise Interrupted

    def share(self, dist: Dist, number: int = 0) -> int:
        """The largest number of all ranks; what any of them was asked for is agreed on with it. Collective."""
        mine = _FAILED if self.problem else self.asked
        largest, code = dist.all_reduce_max(torch.tensor([number, mine])).tolist()
        if code >= _FAILED:
            raise self.problem or OSError("rank 0 could not write its log")
        self.agreed = code
        return largest

    def check(self, dist: Dist) -> None:
        """Raise Stopped on every rank if any was asked for it. Collective."""
        self.share(dist)
        self.end()

    def end(self) -> None:
        """Raise Stopped if that is what the ranks have agreed on."""
        if self.agreed:
            raise Stopped(self.agreed)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A signal raises Interrupted here, in the main thread; an earlier one does so at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._interrupts = True
        try:
            if self.asked:
                raise Interrupted
            yield
        finally:
            self._interrupts = False
