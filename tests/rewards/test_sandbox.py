"""What programs cannot do, whatever they try; and that they can do what honest ones need."""

import os
import re
import signal
import struct
import subprocess
import sys
import time
import zoneinfo
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1fast.rewards.code_tests import CodeTest, passes
from r1fast.rewards.confine import LAYERS, CannotConfine, seccomp_filter
from r1fast.rewards.sandbox import Ended, Program, Sandbox, SandboxError
from tests.rewards.hostile_programs import LIMITED, POINTLESS, REFUSED, refused

SECRET = "expected-output-4711"
ALONE = ["landlock", "namespaces"]
# One of each kind: processor time, time on the clock, memory, output, threads, a crash.
QUICK = ["loop", "sleep", "memory", "output_flood", "threads", "segfault"]
LIMITS = {"timeout_s": 0.4, "memory_bytes": 1 << 28}


@pytest.fixture(scope="module", params=["all", *ALONE])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    os.environ["R1FAST_TEST_SECRET"] = SECRET
    try:
        box = Sandbox(LAYERS if request.param == "all" else [request.param])
    except SandboxError as error:
        pytest.skip(str(error))
    yield box
    box.close()
    del os.environ["R1FAST_TEST_SECRET"]


def contained(sandbox: Sandbox, text: str, folder: Path) -> Ended:
    """How the program ends, after a look at everything that it must leave as it was."""
    canary = folder / "canary"
    canary.write_text(SECRET)
    before = (state(), canary.stat())
    start = time.monotonic()
    ended = sandbox.run(Program(text.replace("CANARY", str(canary))), b"input\n", **LIMITS)
    assert time.monotonic() - start < 10.0
    honest = sandbox.run(Program("print(input()[::-1])"), b"abc\n", **LIMITS)
    assert honest == Ended(b"cba\n", ""), "the next program is as if nothing had been"
    after = (state(), canary.stat())
    assert [*before[1]][:7] == [*after[1]][:7] and before[1].st_mtime_ns == after[1].st_mtime_ns
    assert before[0] == after[0]
    assert os.listdir(folder) == ["canary"] and canary.read_text() == SECRET
    assert b"ESCAPED" not in ended.output and SECRET.encode() not in ended.output
    assert not (ended.fault == "" and passes(CodeTest(None, "", SECRET), ended.output))
    return ended


def state() -> tuple[list[str], list[int]]:
    """Descriptors of this process, and processes below it."""
    below = [os.getpid()]
    parents = {int(path.name): parent for path in Path("/proc").glob("[0-9]*") if (parent := parent_of(path))}
    for pid in below:  # it grows
        below += [child for child, parent in parents.items() if parent == pid]
    return sorted(os.listdir("/proc/self/fd")), sorted(below)


def parent_of(path: Path) -> int:
    try:
        return int((path / "stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


@pytest.mark.parametrize("name", REFUSED)
def test_refused(sandbox: Sandbox, name: str, tmp_path: Path) -> None:
    assert contained(sandbox, refused(name), tmp_path) == Ended(b"refused\n", "")


@pytest.mark.parametrize("name", POINTLESS)
def test_pointless(sandbox: Sandbox, name: str, tmp_path: Path) -> None:
    contained(sandbox, POINTLESS[name], tmp_path)


@pytest.mark.parametrize("name", QUICK)
def test_one_of_each_limit(name: str, tmp_path: Path) -> None:
    box = Sandbox()
    check_limited(box, name, tmp_path)
    box.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", LIMITED)
def test_limited(sandbox: Sandbox, name: str, tmp_path: Path) -> None:
    assert len(LIMITED) + len(REFUSED) + len(POINTLESS) >= 100
    check_limited(sandbox, name, tmp_path)


def check_limited(sandbox: Sandbox, name: str, folder: Path) -> None:
    fault, text = LIMITED[name]
    ended = contained(sandbox, text, folder)
    assert re.search(fault, ended.fault), ended


TIME_ZONES = str(any(os.path.exists(f"{path}/UTC") for path in zoneinfo.TZPATH))
HONEST = {
    "sums": ("print(sum(map(int, input().split())))", "3"),
    "reads_all": ("import sys; print(len(sys.stdin.read().split()))", "2"),
    "reads_by_descriptor": ("import os; print(os.read(0, os.fstat(0).st_size).decode())", "1 2"),
    "reads_lines": ("for line in open(0): print(line.strip())", "1 2"),
    "writes_bytes": ("import sys; sys.stdout.buffer.write(b'a\\n')", "a"),
    "prints_at_exit": ("import atexit; atexit.register(print, 'a')", "a"),
    "exits": ("import sys\nprint('a')\nsys.exit()", "a"),
    "closes_its_output": ("import sys; print('a'); sys.stdout.close()", "a"),
    "thread_with_a_stack": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 27)\n"
        "def f(n): return n and f(n - 1)\nt = threading.Thread(target=lambda: print(f(10**4)))\nt.start()",
        "0",
    ),
    "raises_its_stack": ("import resource; resource.setrlimit(resource.RLIMIT_STACK, (2**29, -1)); print(1)", "1"),
    "long_integers": ("print(len(str(3 ** 20000)))", "9543"),
    "imports": (
        "import asyncio, bisect, csv, ctypes, decimal, heapq, random, sqlite3, typing, unittest, zoneinfo\n"
        "print(zoneinfo.ZoneInfo('UTC'), decimal.Decimal(1) / 8)",
        "UTC 0.125",
    ),
    "numpy": ("import numpy; print(int(numpy.arange(4).sum()))", "6"),
    "main": ("def main(): print(1)\nif __name__ == '__main__': main()", "1"),
    "a_clock": ("import time; time.sleep(0.01); print(time.perf_counter() > 0)", "True"),
    "time_zones": ("import os, zoneinfo; print(any(os.path.exists(p + '/UTC') for p in zoneinfo.TZPATH))", TIME_ZONES),
    "the_same_order": ("print(list({'a', 'b', 'c', 'd'}), __import__('random').random())", None),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest(sandbox: Sandbox, name: str) -> None:
    text, expected = HONEST[name]
    ended = sandbox.run(Program(text), b"1 2", timeout_s=5.0, memory_bytes=1 << 30)
    assert ended.fault == ""
    if expected is None:
        assert ended.output == sandbox.run(Program(text), b"", timeout_s=5.0, memory_bytes=1 << 30).output
    else:
        assert ended.output.decode().strip() == expected


def test_functions(sandbox: Sandbox) -> None:
    def call(text: str, *arguments: object) -> Ended:
        return sandbox.run(Program(text, "f", arguments), **LIMITS)

    assert call("def f(a, b): return a + b", [1], [2]) == Ended(b"[1, 2]", "")
    assert call("class Solution:\n def f(self, n: List[int]) -> Optional[int]: return n", None) == Ended(b"null", "")
    assert call("print('noise')\ndef f(): return 'a'\nif __name__ == '__main__': input()").output == b'"a"'
    for text in (
        "def g(): pass",
        "def f(): return object()",
        "def f(): return {1, 2}",
        "import sys\ndef f(): sys.exit(0)",
        "import os\ndef f(): os._exit(0)",
        "def f():\n x = []\n for _ in range(10**5): x = [x]\n return x",
        "class E:\n __eq__ = lambda s, o: True\ndef f(): return E()",
        "import builtins\nbuiltins.str.__eq__ = None\ndef f(): return 1",
    ):
        ended = call(text)
        assert not (ended.fault == "" and passes(CodeTest("f", [], "expected"), ended.output)), text


def test_without_a_way_to_hide_files_nothing_runs() -> None:
    before = state()
    with pytest.raises(SandboxError, match=r"cannot be confined on this machine: neither Landlock.*runs none"):
        Sandbox([])
    assert state() == before


ALLOW, EPERM, ENOTTY, ENOSYS, KILL = 0x7FFF0000, 0x50001, 0x50019, 0x50026, 0x80000000
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def verdict(machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """What the filter says to a system call: linux/filter.h, interpreted."""
    words = [number, arch or ARCH[machine], 0, 0]
    for argument in (*arguments, 0, 0, 0, 0, 0, 0)[:6]:
        words += [argument & 0xFFFFFFFF, argument >> 32]
    program = [struct.unpack("HBBI", instruction) for instruction in seccomp_filter(machine)]
    at = register = 0
    while True:
        code, if_true, if_false, value = program[at]
        at += 1
        if code == 0x20:
            register = words[value // 4]
        elif code == 0x54:
            register &= value
        elif code == 0x15:
            at += if_true if register == value else if_false
        else:
            assert code == 0x06
            return value


@pytest.mark.parametrize(
    ("machine", "names"),
    [
        ("x86_64", {"read": 0, "write": 1, "openat": 257, "clone": 56, "fcntl": 72, "prlimit64": 302, "ioctl": 16}),
        ("aarch64", {"read": 63, "write": 64, "openat": 56, "clone": 220, "fcntl": 25, "prlimit64": 261, "ioctl": 29}),
    ],
)
def test_filter(machine: str, names: dict[str, int]) -> None:
    assert verdict(machine, names["read"]) == verdict(machine, names["write"]) == ALLOW
    assert verdict(machine, names["ioctl"], 0, 0x5412) == ENOTTY and verdict(machine, 435) == ENOSYS
    assert verdict(machine, names["read"], arch=0x40000003) == KILL
    for flags, says in ((os.O_RDONLY, ALLOW), (os.O_CLOEXEC | os.O_DIRECTORY, ALLOW), (os.O_WRONLY, EPERM)):
        assert verdict(machine, names["openat"], 0, 0, flags) == says
    for flags in (os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_TMPFILE | os.O_RDWR, 3):
        assert verdict(machine, names["openat"], 0, 0, flags) == EPERM
    thread = 0x3D0F00  # what the C library asks for
    assert verdict(machine, names["clone"], thread) == ALLOW
    for flags in (17, thread & ~0x10000, thread | 0x10000000, thread | 0x40000000):
        assert verdict(machine, names["clone"], flags) == EPERM
    assert [verdict(machine, names["fcntl"], 1, command) for command in (3, 8, 10)] == [ALLOW, EPERM, EPERM]
    assert [verdict(machine, names["prlimit64"], pid) for pid in (0, 1, 1 << 32 | 1)] == [ALLOW, EPERM, EPERM]
    allowed = [number for number in range(600) if verdict(machine, number) != EPERM]
    assert len(allowed) < 90 and verdict(machine, 0x40000000) == EPERM


def test_other_processors_are_refused() -> None:
    with pytest.raises(CannotConfine, match="a seccomp filter for riscv64"):
        seccomp_filter("riscv64")


def test_memory_and_descriptors_do_not_grow(sandbox: Sandbox) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    large = Program("print('x' * (1 << 20))")
    sandbox.run(large, **LIMITS)
    before = (state(), resident())
    for _ in range(30):
        assert len(sandbox.run(large, b"x" * (1 << 20), **LIMITS).output) == (1 << 20) + 1
    assert state() == before[0] and resident() < before[1] + (16 << 20)


def test_a_launcher_that_is_gone_is_an_error() -> None:
    box = Sandbox()
    box._launcher.kill()
    with pytest.raises(SandboxError, match="gone"):
        box.run(Program(""), **LIMITS)
    with pytest.raises(SandboxError, match="gone"):
        box.run(Program(""), **LIMITS)


WORKER = """
import sys
from r1fast.rewards.sandbox import Program, Sandbox
box = Sandbox()
print("ready", flush=True)
box.run(Program("import time; time.sleep(1000)"), timeout_s=100.0, memory_bytes=1 << 29)
"""


def test_nothing_outlives_a_killed_worker() -> None:
    before = {*state()[1]}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    worker = subprocess.Popen([sys.executable, "-c", WORKER], env=environment, stdout=subprocess.PIPE)
    try:
        assert worker.stdout is not None and worker.stdout.readline()
        wait_until(lambda: len({*state()[1]} - before) == 3)  # the worker, a launcher, a program
        started = {*state()[1]} - before - {worker.pid}
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
    wait_until(lambda: not any(map(running, started)))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def wait_until(condition) -> None:
    end = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)
