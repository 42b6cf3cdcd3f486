"""Runs programs that a model has written, one at a time, each in a confined process of its own.

    worker -> launcher -> program        launcher.py forks it, confine.py says what it may do

Program, input and output go through memory files and a pipe between worker and program; the launcher hands the
descriptors on. What a test expects stays here. A program ends by itself, or is killed when it passes its processor
time, three times that on the clock, MAX_THREADS, or MAX_OUTPUT_BYTES. It cannot make processes: it is all there is.
"""

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import r1fast
from r1fast.rewards.confine import LAYERS
from r1fast.rewards.launcher import REAP, START, STATUS

MAX_OUTPUT_BYTES = 1 << 24
MAX_THREADS = 64
CLOCK_LIMITS = 3.0  # time on the clock for one of processor time: sleeping costs us, and the machine may be busy
START_TIMEOUT_S = 60.0
_POLL_S, _WAIT_S = 0.02, 0.0005
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_TICKS = os.sysconf("SC_CLK_TCK")


class SandboxError(Exception):
    """Programs cannot be run here, or not any more: why."""


@dataclass(frozen=True)
class Program:
    """A script, which reads its standard input; with `function`, the module in which this is called with `arguments`
    (JSON). A method of a class `Solution` is found as well. arguments None: it is an expression, read after `setup`."""

    text: str
    function: str | None = None
    arguments: Sequence[Any] | None = ()
    setup: str = ""


class Ended(NamedTuple):
    """output: what was printed, or the JSON of what the function returned. fault: why it did not end well, or ""."""

    output: bytes
    fault: str
    out_of_time: bool = False


class Sandbox:
    """A launcher, started now and closed by `close` or the end of this process.

    layers: those of confine.LAYERS to try. Raises SandboxError where a program cannot be confined.
    """

    def __init__(self, layers: Sequence[str] = LAYERS) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(START_TIMEOUT_S)
        with theirs:
            self._launcher = subprocess.Popen(
                [sys.executable, "-P", "-s", "-B", "-m", "r1fast.rewards.launcher", *layers],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=_environment(),
                cwd="/",
                start_new_session=True,
            )
        try:
            lacking = self._socket.recv(4096).decode()
        except OSError as error:
            lacking = str(error)
        if not lacking:
            ended = self.run(Program(""), timeout_s=10.0, memory_bytes=1 << 30)
            lacking = ended.output.decode() or ended.fault
        if lacking:
            self.close()
            what = f"programs cannot be confined on this machine: {lacking}"
            raise SandboxError(f"{what}; the reward `code` runs none without that")

    def close(self) -> None:
        self._socket.close()
        self._launcher.kill()
        self._launcher.wait()

    def run(self, program: Program, given: bytes = b"", *, timeout_s: float, memory_bytes: int) -> Ended:
        """given: standard input. timeout_s: of processor time. memory_bytes: of address space, Python's own included.

        Raises SandboxError when the launcher is gone; this object is closed then.
        """
        what = {"program": program.text, "function": program.function}
        job = json.dumps(what | {"arguments": program.arguments, "setup": program.setup})
        read_end, write_end = os.pipe()
        descriptors = [_memory_file(job.encode()), _memory_file(given), write_end]
        try:
            limits = START.pack(memory_bytes, int(timeout_s) + 2)
            socket.send_fds(self._socket, [limits], descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            descriptors = []
            (pid,) = STATUS.unpack(self._receive())
            try:
                ended = _watch(pid, read_end, timeout_s)
            finally:
                os.kill(pid, signal.SIGKILL)  # it is nobody else's until it is reaped
                self._socket.send(REAP)
                (status,) = STATUS.unpack(self._receive())
            return ended if ended.fault else ended._replace(fault=_fault(os.waitstatus_to_exitcode(status)))
        except OSError as error:
            self.close()
            raise SandboxError(f"the launcher of programs is gone: {error}") from error
        finally:
            for descriptor in (read_end, *descriptors):
                os.close(descriptor)

    def _receive(self) -> bytes:
        if not (message := self._socket.recv(STATUS.size)):
            raise ConnectionError("it has ended")
        return message


def _environment() -> dict[str, str]:
    """All of it that a program sees, but for PYTHONPATH."""
    fixed = {"PYTHONPATH": str(Path(r1fast.__file__).parent.parent), "LC_ALL": "C.UTF-8", "MALLOC_ARENA_MAX": "1"}
    fixed["PYTHONHASHSEED"] = "0"  # one order of sets in every run
    fixed |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return fixed | {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def _memory_file(content: bytes) -> int:
    """The descriptor of a file of these bytes that nobody can change, read from its start."""
    descriptor = os.memfd_create("input", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor


def _watch(pid: int, read_end: int, timeout_s: float) -> Ended:
    """What the process writes until it has ended, and the limit that it has passed."""
    output = bytearray()
    poll = select.poll()
    poll.register(read_end, select.POLLIN)
    end = time.monotonic() + CLOCK_LIMITS * timeout_s
    is_open, next_look = True, 0.0
    while True:
        if is_open and poll.poll(_POLL_S * 1000):
            piece = os.read(read_end, 1 << 16)
            output += piece
            is_open = piece != b""
        if len(output) > MAX_OUTPUT_BYTES:
            return Ended(b"", f"more than {MAX_OUTPUT_BYTES} bytes of output")
        if is_open and time.monotonic() < next_look:
            continue
        next_look = time.monotonic() + _POLL_S
        state, processor_s, threads = _look_at(pid)
        if state in (b"Z", b"X") and not is_open:
            return Ended(bytes(output), "")
        if processor_s > timeout_s or time.monotonic() > end:
            return Ended(b"", f"more than {timeout_s:g} s", out_of_time=True)
        if threads > MAX_THREADS:
            return Ended(b"", f"more than {MAX_THREADS} threads")
        if not is_open:
            time.sleep(_WAIT_S)  # it ends now, or has closed its output and goes on


def _look_at(pid: int) -> tuple[bytes, float, int]:
    """State, seconds of processor time, threads."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return fields[0], (int(fields[11]) + int(fields[12])) / _TICKS, int(fields[17])


def _fault(code: int) -> str:
    if code == 0:
        return ""
    return f"exit code {code}" if code > 0 else f"signal {-code}"
