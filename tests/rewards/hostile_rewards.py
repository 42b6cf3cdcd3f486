"""Rewards that do, for one completion ("hostile"), what no reward should; others score len(completion) / 8.

EXPECTED says by name what the hostile row may come to: "lost" (scores 0: its call took too long, too much memory, or
the worker), "failed" (no score), "scored" (as if nothing were), "none" (does not apply). Counts are small and all
sleeps end, so that a test which fails leaves nothing for long.
"""

import builtins
import collections
import contextlib
import ctypes
import itertools
import json
import math
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

EXPECTED: dict[str, tuple[str, ...]] = {}
LONG_S = 120.0
SLEEPER = [sys.executable, "-c", f"import time; time.sleep({LONG_S})"]


def hostile(*expected: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(act: Callable[..., Any]) -> Callable[..., Any]:
        def reward(completions: list[str], **_: Any) -> Any:
            values: list[Any] = [len(completion) / 8 for completion in completions]
            if "hostile" not in completions:
                return values
            given = act(values, completions.index("hostile"))
            return values if given is None else given

        EXPECTED[act.__name__] = expected
        return reward

    return register


def sleep_on() -> None:
    end = time.monotonic() + LONG_S
    while time.monotonic() < end:
        time.sleep(1.0)


def with_value(values: list[Any], at: int, value: Any) -> list[Any]:
    return [*values[:at], value, *values[at + 1 :]]


# Time


@hostile("lost")
def endless_loop(values, at):
    while True:
        pass


@hostile("lost")
def sleeps(values, at):
    sleep_on()


@hostile("lost")
def regex_holds_the_interpreter(values, at):
    re.match(r"(a+)+$", "a" * 64 + "b")


@hostile("lost")
def power_holds_the_interpreter(values, at):
    return with_value(values, at, float(7 ** (7**9) % 10))


@hostile("lost")
def every_signal_blocked(values, at):
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    sleep_on()


@hostile("lost")
def termination_ignored(values, at):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sleep_on()


@hostile("lost")
def awaits_for_ever(values, at):
    import asyncio

    return asyncio.sleep(LONG_S)


@hostile("lost")
def becomes_another_program(values, at):
    os.execv(sys.executable, SLEEPER)


@hostile("scored")
def just_under_the_limit(values, at):
    time.sleep(0.5)


@hostile("lost")
def exception_that_hangs_when_printed(values, at):
    class Slow(Exception):
        def __str__(self):
            sleep_on()
            return ""

    raise Slow


@hostile("lost")
def value_that_hangs_when_read(values, at):
    class Slow:
        def __float__(self):
            sleep_on()
            return 0.0

    return with_value(values, at, Slow())


# Processes


def daemon() -> None:
    """A grandchild in a session of its own, as daemons are made."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            sleep_on()
        os._exit(0)


@hostile("lost")
def daemon_and_hang(values, at):
    daemon()
    sleep_on()


@hostile("scored")
def daemon_and_return(values, at):
    daemon()


@hostile("lost")
def new_session_and_hang(values, at):
    subprocess.Popen(SLEEPER, start_new_session=True)
    sleep_on()


@hostile("scored")
def shell_in_the_background(values, at):
    subprocess.run(f"sleep {LONG_S} &", shell=True)


@hostile("lost")
def forty_daemons(values, at):
    for _ in range(40):
        daemon()
    sleep_on()


@hostile("lost")
def fork_tree(values, at):
    for _ in range(6):  # 64 processes
        os.fork()
    sleep_on()


@hostile("lost")
def always_another_process(values, at):
    """Each generation forks the next and ends: whoever kills by a list of processes comes late."""
    if os.fork() == 0:
        os.setsid()
        for _ in range(400):
            if os.fork():
                os._exit(0)
            time.sleep(0.001)
        sleep_on()
    sleep_on()


@hostile("scored")
def returns_twice(values, at):
    os.fork()


@hostile("scored")
def returns_again_later(values, at):
    if os.fork() == 0:
        time.sleep(0.2)


@hostile("lost")
def exits(values, at):
    os._exit(0)


@hostile("lost")
def exits_with_a_code(values, at):
    os._exit(3)


@hostile("lost")
def segfault(values, at):
    ctypes.string_at(0)


@hostile("lost")
def abort(values, at):
    os.abort()


@hostile("lost")
def kills_itself(values, at):
    os.kill(os.getpid(), signal.SIGKILL)


@hostile("lost")
def stops_itself(values, at):
    os.kill(os.getpid(), signal.SIGSTOP)


@hostile("lost")
def kills_its_group(values, at):
    os.killpg(0, signal.SIGKILL)


@hostile("lost")
def kills_its_parent(values, at):
    daemon()
    os.kill(os.getppid(), signal.SIGKILL)
    sleep_on()


@hostile("lost")
def survives_its_parent(values, at):
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # no signal when the parent dies
    os.kill(os.getppid(), signal.SIGKILL)
    sleep_on()


@hostile("scored")
def stops_its_parent(values, at):
    os.kill(os.getppid(), signal.SIGSTOP)


@hostile("scored")
def terminates_its_parent(values, at):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        os.kill(os.getppid(), number)


@hostile("scored")
def alarm_for_later(values, at):
    signal.setitimer(signal.ITIMER_REAL, 0.1)


# Memory


@hostile("lost")
def hog(values, at):
    hoard = []
    while True:
        hoard.append(bytearray(1 << 22))


@hostile("lost")
def one_large_array(values, at):
    np.ones(1 << 36)


@hostile("lost")
def hog_that_goes_on(values, at):
    hoard = []
    while True:
        try:
            hoard.append(bytearray(1 << 22))
        except MemoryError:
            time.sleep(0.05)


@hostile("scored", "lost")
def child_hog(values, at):
    subprocess.run([sys.executable, "-c", "hoard = []\nwhile True: hoard.append(bytearray(1 << 22))"])


@hostile("lost", "failed")
def recursion_without_limit(values, at):
    sys.setrecursionlimit(1 << 30)

    def deeper(n):
        return deeper(n + 1) + 1

    deeper(0)


@hostile("failed")
def recursion(values, at):
    def deeper(n):
        return deeper(n + 1) + 1

    deeper(0)


# Exceptions


@hostile("failed")
def raises(values, at):
    raise KeyError("what went wrong")


@hostile("failed")
def raises_ten_megabytes(values, at):
    raise ValueError("x" * 10_000_000)


@hostile("failed")
def raises_what_cannot_be_printed(values, at):
    raise ValueError("\ud800 \x1b[2J \0")


@hostile("failed")
def raises_an_exception_that_raises(values, at):
    class Broken(Exception):
        def __str__(self):
            raise RuntimeError

    raise Broken


@hostile("failed")
def raises_what_has_no_traceback(values, at):
    raise SyntaxError("where?", ("file", "line", "column", 5))


@hostile("failed")
def leaves_by_sys_exit(values, at):
    sys.exit(5)


@hostile("failed")
def interrupts(values, at):
    raise KeyboardInterrupt


@hostile("failed")
def ends_a_generator(values, at):
    raise GeneratorExit


# What is returned


@hostile("scored")
def generator(values, at):
    return (value for value in values)


@hostile("scored")
def array(values, at):
    return np.array(values)


@hostile("failed")
def endless_generator(values, at):
    return itertools.repeat(1.0)


@hostile("failed")
def too_few(values, at):
    return values[:-1]


@hostile("failed")
def too_many(values, at):
    return [*values, 1.0]


@hostile("failed")
def a_number(values, at):
    return 1.0


@hostile("failed")
def a_dict(values, at):
    return dict(enumerate(values))


@hostile("failed")
def another_mapping(values, at):
    return collections.UserDict(enumerate(values))


@hostile("failed")
def a_set(values, at):
    return set(values)


@hostile("failed")
def bytes_that_can_be_changed(values, at):
    return bytearray(len(values))


@hostile("failed")
def complex_number(values, at):
    return with_value(values, at, np.complex128(1j))


@hostile("failed")
def lists_in_a_list(values, at):
    return [[value] for value in values]


@hostile("failed")
def texts(values, at):
    return [str(value) for value in values]


@hostile("failed")
def infinity(values, at):
    return with_value(values, at, -math.inf)


@hostile("none")
def nan(values, at):
    return with_value(values, at, math.nan)


@hostile("failed")
def huge_integer(values, at):
    return with_value(values, at, 10**400)


@hostile("failed")
def object_that_cannot_be_shown(values, at):
    class Hidden:
        def __repr__(self):
            raise RuntimeError

    return with_value(values, at, Hidden())


# The pipes


@hostile("scored")
def prints_megabytes(values, at):
    sys.stdout.write("noise " * 200_000)
    os.write(1, b"\0" * 200_000)


@hostile("scored")
def replaces_stdout(values, at):
    sys.stdout = sys.stderr = sys.stdin = None
    os.close(0)
    os.close(1)


@hostile("lost")
def closes_everything(values, at):
    os.closerange(0, 256)


def write_to_pipes(data: bytes) -> None:
    for descriptor in range(3, 32):
        with contextlib.suppress(OSError):
            os.set_blocking(descriptor, False)
            os.write(descriptor, data)


@hostile("lost")
def writes_a_reply(values, at):
    payload = json.dumps({"values": [1.0] * len(values), "rows": {}}).encode()
    write_to_pipes(struct.pack("<QQ", 0, len(payload)) + payload)


@hostile("lost")
def writes_nonsense(values, at):
    write_to_pipes(b"\xff" * 100)


@hostile("lost")
def writes_an_endless_reply(values, at):
    write_to_pipes(struct.pack("<QQ", 0, 1 << 60))


def later(act: Callable[[], Any], *, daemon: bool = True) -> None:
    def wait_and_act() -> None:
        time.sleep(0.05)
        act()

    threading.Thread(target=wait_and_act, daemon=daemon).start()


@hostile("scored")
def writes_later(values, at):
    later(lambda: write_to_pipes(b"[" * 1000))


@hostile("scored")
def reads_the_next_request(values, at):
    def read_all() -> None:
        for descriptor in range(3, 32):
            with contextlib.suppress(OSError):
                os.read(descriptor, 1 << 20)

    later(read_all)


# What is left behind


@hostile("scored")
def thread_that_never_ends(values, at):
    later(endless, daemon=False)


def endless() -> None:
    while True:
        pass


@hostile("scored")
def thread_that_exits(values, at):
    later(lambda: os._exit(1))


@hostile("lost", "failed", "scored")
def patches_builtins(values, at):
    builtins.len = builtins.isinstance = builtins.float = lambda *_: 1 / 0


@hostile("lost", "failed", "scored")
def patches_modules(values, at):
    json.dumps = json.loads = struct.pack = os.write = os.read = math.isinf = lambda *_: 1 / 0


@hostile("scored")
def patches_another_reward(values, at):
    import r1fast.rewards.format as module
    from r1fast.rewards.registry import REWARDS

    REWARDS["format"] = module.format_reward = lambda completions, **_: [0.25] * len(completions)


@hostile("scored")
def deletes_its_file(values, at):
    os.unlink(__file__)


@hostile("scored")
def empties_the_environment(values, at):
    os.environ.clear()
    os.chdir("/")
    sys.path.clear()
    sys.modules.clear()


@hostile("scored")
def lowers_its_limits(values, at):
    os.nice(19)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
