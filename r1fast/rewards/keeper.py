"""Keeps all that a worker starts, so that nothing of it outlives the pool or the trainer.

    trainer -> keeper -> shield -> worker -> whatever a reward starts

The keeper is a child subreaper (prctl(2)): orphans below it become its children, whatever session or group they have
moved to. It ends everything when the worker ends, when the pool asks for it (SIGTERM), and when the trainer is gone.
The shield is what a reward finds as its parent; killing or stopping it harms nobody else. A reward that looks for the
keeper to kill it is not held by this.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

TRAINER_POLL_S = 0.5  # how long a killed trainer's workers go on at most
KILL_LIMIT_S = 10.0  # for processes that the kernel does not let go of
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def keep(trainer: int, memory_bytes: int, serve: Callable[[], None]) -> NoReturn:
    """Run `serve` in a worker below this process, and exit as the worker did when it and all its offspring are gone.

    trainer: process id of the parent. memory_bytes: of data, for the worker and for each process that it starts.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    mask = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    keeper = os.getpid()
    shield = os.fork()
    if shield == 0:
        _shield(keeper, memory_bytes, serve, mask)
    status = None
    # The parent's death signal would come when the thread that started us ends, not the trainer: so look for it.
    while status is None and os.getppid() == trainer:
        got = signal.sigtimedwait([signal.SIGCHLD, signal.SIGTERM], TRAINER_POLL_S)
        if got is not None and got.si_signo == signal.SIGTERM:
            break
        status = _reap(shield)
    _kill_offspring()
    _exit_like(status or 0)


def _shield(keeper: int, memory_bytes: int, serve: Callable[[], None], mask: set[int]) -> NoReturn:
    _die_with(keeper)
    shield = os.getpid()
    worker = os.fork()
    if worker == 0:
        _die_with(shield)
        os.setpgid(0, 0)
        # Of data, not of address space: what torch and CUDA reserve and never write is not memory.
        allowed = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = memory_bytes if allowed == resource.RLIM_INFINITY else min(memory_bytes, allowed)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        # What the limit does not count (shared memory, many processes) costs the worker, and not the trainer.
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            serve()
            os._exit(0)  # a reward's threads and atexit functions have no say in when its worker ends
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _exit_like(os.waitpid(worker, 0)[1])


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def _die_with(parent: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died before the call
        os._exit(1)


def _reap(wanted: int) -> int | None:
    """Takes the children that have ended off the list; the status of `wanted` if it is among them."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return 0
        if pid == 0:
            return None
        if pid == wanted:
            return status


def _kill_offspring() -> None:
    """Kill until no child is left. What forks while it is looked for is found in a later round."""
    end = time.monotonic() + KILL_LIMIT_S
    own_group = os.getpgrp()
    while _reap(-1) is None:
        found = _offspring()
        for group in {group for _, group in found} - {own_group}:
            _kill(-group)  # the whole group at once: its members cannot out-fork this
        for pid, _ in found:
            _kill(pid)
        if time.monotonic() > end:
            print(f"r1fast: reward processes that cannot be killed: {[pid for pid, _ in found]}", file=sys.stderr)
            return
        time.sleep(0.002)


def _kill(target: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or a program that runs as another user
        os.kill(target, signal.SIGKILL)


def _offspring() -> list[tuple[int, int]]:
    """(process id, process group) of all processes below this one."""
    children: dict[int, list[tuple[int, int]]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # ended meanwhile, or hidden
            _, parent, group, *_ = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
            children.setdefault(int(parent), []).append((int(name), int(group)))
    found = list(children.get(os.getpid(), []))
    for pid, _ in found:  # it grows
        found += children.get(pid, [])
    return found


def _exit_like(status: int) -> NoReturn:
    """End with a child's exit code, or by the signal that ended it."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
