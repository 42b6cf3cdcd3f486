"""A worker as the trainer sees it: a process that is asked, waited for until a time limit, and killed.

What comes back is judged before it is used: a reply answers the request that was sent (by its id), is of bounded size,
and is JSON of the expected form. Anything else costs the process, and the call.
"""

import json
import math
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import connection
from typing import Any

from r1fast import host_memory
from r1fast.rewards.keeper import KILL_LIMIT_S
from r1fast.rewards.worker import HEADER, MAX_REPLY_BYTES, Scored, cut

LOAD_TIMEOUT_S = 120.0  # process start and the import of a user's module, which may pull in anything
MEMORY_SHARE = 0.5  # of the machine, shared by the workers that can be busy at once


class CallFailed(Exception):
    """Why a call has no values. lost: it cost the worker (time, memory, a crash), rather than being an exception of
    the reward. loading: the function could not be loaded, so no other call can work either."""

    def __init__(self, text: str, *, lost: bool, loading: bool = False) -> None:
        super().__init__(text)
        self.lost, self.loading = lost, loading


def memory_share(num_workers: int) -> int:
    """Bytes for each worker: its part of half of the memory that this machine or its container has."""
    return int(host_memory.total() * MEMORY_SHARE / num_workers)


class WorkerProcess:
    """One process, started by the first request and again by the first request after it was killed."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket
        self._loaded: set[str] = set()
        self.used = False  # it has seen completions: a thread or a changed module may be left of them

    def load(self, name: str, location: str) -> None:
        """Import the reward `name`, once per process. Raises CallFailed."""
        if self._process is not None and connection.wait([self._socket], 0):
            self.kill()  # nothing was asked: it has died since, or a reward wrote into the socket
        if name not in self._loaded:
            try:
                self._request(("load", name, location), LOAD_TIMEOUT_S)
            except CallFailed as error:
                raise CallFailed(f"it cannot be loaded in a worker: {error}", lost=error.lost, loading=True) from None
            self._loaded.add(name)

    def call(self, name: str, kwargs: dict[str, Any], num_rows: int, timeout_s: float) -> Scored:
        """Raises CallFailed; the worker may be gone then."""
        reply = self._request(("call", name, kwargs, num_rows), timeout_s)
        values, reasons = reply.get("values"), reply.get("rows")
        is_list = isinstance(values, list) and len(values) == num_rows and isinstance(reasons, dict)
        if not is_list or not all(x is None or (isinstance(x, float) and math.isfinite(x)) for x in values):
            self.kill()
            raise CallFailed("something else than its values was written on the reply socket", lost=True)
        return values, {row: str(reasons[str(row)]) for row in range(num_rows) if str(row) in reasons}

    def _request(self, message: tuple[Any, ...], timeout_s: float) -> Any:
        number = secrets.randbits(64)
        payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        deadline = time.monotonic() + timeout_s
        self._process = self._process or self._start()
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(HEADER.pack(number, len(payload)) + payload)
            got, size = HEADER.unpack(self._receive(HEADER.size, deadline))
            reply = json.loads(self._receive(size, deadline)) if got == number and size <= MAX_REPLY_BYTES else None
        except TimeoutError:
            self.kill()
            raise CallFailed(f"no result after {timeout_s:g} s, worker killed", lost=True) from None
        except (EOFError, ConnectionError):
            raise CallFailed(f"the worker died: {_describe_exit(self.kill())}", lost=True) from None
        except (ValueError, RecursionError):  # no JSON
            reply = None
        except BaseException:  # an interrupt leaves half a message in the socket
            self.kill()
            raise
        if not isinstance(reply, dict):
            self.kill()
            raise CallFailed("what was written on the reply socket is no reply to the call", lost=True)
        if "error" in reply:
            if lost := reply.get("memory") is True:
                self.kill()
            raise CallFailed(cut(str(reply["error"])).rstrip(), lost=lost)
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        # The worker must find what this process finds: r1fast itself and the user's reward modules.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        self._socket, theirs = socket.socketpair()
        with theirs:
            return subprocess.Popen(
                [sys.executable, "-m", "r1fast.rewards.worker", str(os.getpid()), str(self._memory_bytes)],
                stdin=theirs.fileno(),
                stdout=2,  # what rewards print
                env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def _receive(self, num_bytes: int, deadline: float) -> bytes:
        data = b""
        while len(data) < num_bytes:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-6))  # 0 would mean: do not wait at all
            if not (piece := self._socket.recv(num_bytes - len(data))):
                raise EOFError
            data += piece
        return data

    def kill(self) -> int:
        """Ends the process and all that it started; returns its exit code."""
        process, self._process = self._process, None
        self._loaded.clear()
        self.used = False
        if process is None:
            return 0
        for number in (signal.SIGTERM, signal.SIGCONT):
            process.send_signal(number)
        try:
            process.wait(KILL_LIMIT_S + 5.0)
        except subprocess.TimeoutExpired:
            process.kill()
        self._socket.close()
        return process.wait()


def _describe_exit(code: int) -> str:
    return f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
