"""Programs that do what no program of a model should, by name. CANARY stands for a file that holds the expected output.

REFUSED: single statements, each of which the kernel must refuse with an OSError. LIMITED: programs that end by a fault,
with a pattern for it. POINTLESS: programs that may end as they like; they must not pass, nor change what others find.
"""

import platform

_SYSCALLS = {  # x86_64: number, arguments
    "ptrace_the_parent": (101, 16, "os.getppid()", 0, 0),
    "read_the_parents_memory": (310, "os.getppid()", 0, 0, 0, 0, 0),
    "pidfd_of_the_parent": (434, "os.getppid()", 0),
    "dumpable": (157, 4, 1),
    "another_seccomp_filter": (317, 1, 0, 0),
    "unshare_user": (272, 0x10000000),
    "setns": (308, 0, 0),
    "clone_with_namespaces": (56, 0x10000000 | 17, 0, 0, 0, 0),
    "clone_as_thread_with_a_network": (56, 0x40000000 | 0x10000, 0, 0, 0, 0),
    "vfork": (58,),
    "mount_tmpfs": (165, "b'none'", "b'/tmp'", "b'tmpfs'", 0, 0),
    "pivot_root": (155, "b'/'", "b'/'"),
    "bpf": (321, 0, 0, 0),
    "perf_events": (298, 0, 0, -1, -1, 0),
    "io_uring": (425, 1, 0),
    "userfaultfd": (323, 0),
    "keyring": (248, "b'user'", "b'x'", "b'x'", 1, -3),
    "memory_file": (319, "b'x'", 0),
    "exec_of_a_descriptor": (322, 0, "b''", 0, 0, 0x1000),
    "shared_memory_segment": (29, 0, 4096, 0o1600),
    "semaphores": (64, 0, 1, 0o1600),
    "message_queue": (68, 0, 0o1600),
    "posix_message_queue": (240, "b'x'", 0o102, 0o600, 0),
    "timer_that_signals_others": (222, 0, 0, 0),
    "host_name": (170, "b'x'", 1),
    "clock": (227, 0, 0),
    "personality": (135, 0x0400000),
    "kernel_log": (103, 3, 0, 0),
    "modules": (313, 0, 0, 0),
    "x32_system_call": (0x40000000 | 57,),
    "swap": (167, "b'x'", 0),
    "handle_of_a_file": (304, 0, 0, 0),
    "quota": (179, 0, 0, 0, 0),
    "splice": (275, 0, 0, 1, 0, 1, 0),
    "watch_files": (294, 0),
    "another_working_directory": (80, "b'/'"),
    "truncate_by_path": (76, "b'CANARY'", 0),
    "queue_a_signal": (129, "os.getppid()", 9, 0),
    "signal_a_thread": (200, "os.getppid()", 9),
    "limits_of_the_parent": (302, "os.getppid()", 7, "ctypes.create_string_buffer(16)", 0),
    "priority_of_the_parent": (141, 0, "os.getppid()", 19),
}

REFUSED = {
    "fork": "os.fork()",
    "fork_bomb": "while True: os.fork()",
    "daemon": "os.setsid(); os.fork()",
    "forked_only": "os.forkpty()",
    "subprocess_": "subprocess.run([sys.executable, '-c', 'pass'])",
    "posix_spawn": "os.posix_spawn(sys.executable, [sys.executable], {})",
    "exec_": "os.execv(sys.executable, [sys.executable])",
    "preloaded_exec": "os.execve('/bin/sh', ['sh'], {'LD_PRELOAD': 'CANARY'})",
    "multiprocessing_": "multiprocessing.Process(target=print).start()",
    "passwd": "open('/etc/passwd')",
    "canary": "open('CANARY')",
    "canarys_folder": "os.listdir(os.path.dirname('CANARY'))",
    "canary_by_descriptor": "os.read(os.open('CANARY', os.O_PATH), 9)",
    "root_folder_of_proc": "os.listdir('/proc')",
    "own_memory_file": "open('/proc/self/mem', 'rb')",
    "environment_of_the_parent": "open(f'/proc/{os.getppid()}/environ')",
    "memory_of_the_parent": "open(f'/proc/{os.getppid()}/mem', 'r+b')",
    "descriptors_of_the_parent": "os.listdir(f'/proc/{os.getppid()}/fd')",
    "write_the_canary": "open('CANARY', 'w')",
    "append_to_the_canary": "open('CANARY', 'a')",
    "read_and_truncate": "os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
    "unlink": "os.unlink('CANARY')",
    "rename": "os.rename('CANARY', 'CANARY.2')",
    "chmod": "os.chmod('CANARY', 0)",
    "chown": "os.chown('CANARY', 0, 0)",
    "utime": "os.utime('CANARY')",
    "extended_attribute": "os.setxattr('CANARY', 'user.x', b'x')",
    "symlink": "os.symlink('CANARY', 'link')",
    "hard_link": "os.link('CANARY', 'CANARY.2')",
    "folder": "os.mkdir('CANARY.d')",
    "remove_the_working_directory": "os.rmdir('.')",
    "temporary_file": "tempfile.TemporaryFile()",
    "nameless_file": "os.open('/tmp', os.O_RDWR | os.O_TMPFILE)",
    "file_here": "open('file', 'w')",
    "many_files": "[open(f'file{i}', 'w') for i in range(10**6)]",
    "poisoned_library": "open(os.__file__, 'a')",
    "poisoned_bytecode": "os.remove(json.__cached__)",
    "shared_memory": "shared_memory.SharedMemory(create=True, size=4096)",
    "device": "os.mknod('device', 0o60600, os.makedev(8, 0))",
    "fifo": "os.mkfifo('fifo')",
    "tcp": "socket.create_connection(('127.0.0.1', 80))",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "unix_socket": "socket.socket(socket.AF_UNIX)",
    "socket_pair": "socket.socketpair()",
    "server": "socket.create_server(('127.0.0.1', 0))",
    "resolver": "socket.getaddrinfo('example.com', 80)",
    "url": "urllib.request.urlopen('http://127.0.0.1/')",
    "kill_all": "os.kill(-1, 9)",
    "kill_the_parent": "os.kill(os.getppid(), 9)",
    "stop_the_parent": "os.kill(os.getppid(), 19)",
    "kill_the_group": "os.killpg(0, 9)",
    "signals_through_a_pipes_owner": "fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
    "terminal_input": "fcntl.ioctl(0, 0x5412, b'x')",
    "chroot": "os.chroot('/')",
    "setuid": "os.setuid(65534)",
    "setgroups": "os.setgroups([0])",
    "session": "os.setsid()",
    "nice": "os.nice(1)",
    "affinity": "os.sched_setaffinity(0, {0})",
    "scheduler": "os.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0))",
    "priority": "os.setpriority(os.PRIO_USER, 0, 19)",
    "sync": "os.sendfile(1, 0, 0, 1)",
}
if platform.machine() == "x86_64":
    REFUSED |= {name: f"system_call({', '.join(map(str, call))})" for name, call in _SYSCALLS.items()}

_STATEMENT = """
import ctypes, fcntl, json, multiprocessing, os, socket, subprocess, sys, tempfile, urllib.request
from multiprocessing import shared_memory

libc = ctypes.CDLL(None, use_errno=True)

def system_call(*arguments):
    if libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)) == -1:
        raise OSError(ctypes.get_errno(), "system call")

try:
    {}
except OSError:
    print("refused")
else:
    print("ESCAPED")
"""


def refused(name: str) -> str:
    return _STATEMENT.replace("{}", REFUSED[name])


_TIME, _MEMORY = "more than .* s", "exit code 1|signal (6|9|11)"
LIMITED = {
    "loop": (_TIME, "while True: pass"),
    "sleep": (_TIME, "import time; time.sleep(1000)"),
    "signals_ignored": (
        _TIME,
        "import signal\nfor n in (1, 2, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
    ),
    "signals_blocked": (
        _TIME,
        "import signal; signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())\nwhile True: pass",
    ),
    "alarms": (
        _TIME,
        "import signal\nsignal.signal(14, lambda *_: None); signal.setitimer(0, 1e-4, 1e-4)\nwhile True: pass",
    ),
    "interrupts_swallowed": (_TIME, "while True:\n try:\n  while True: pass\n except BaseException: pass"),
    "regex": (_TIME, "import re; re.match(r'(a+)+$', 'a' * 64 + 'b')"),
    "power": (_TIME, "print(7 ** (7 ** 12))"),
    "long_number": (_TIME, "print(len(str(1 << (1 << 26))))"),
    "hangs_in_an_exit_function": (_TIME, "import atexit, time; atexit.register(time.sleep, 1000)"),
    "hangs_in_a_thread": (_TIME, "import threading, time; threading.Thread(target=time.sleep, args=[1000]).start()"),
    "hangs_when_flushed": (
        _TIME,
        "import sys, time\nclass Out:\n def write(self, text): pass\n def flush(self): time.sleep(1000)\n"
        "sys.stdout = Out()",
    ),
    "output_closed_and_goes_on": (_TIME, "import os, time; os.close(1); time.sleep(1000)"),
    "errors_flood": (_TIME, "import sys\nwhile True: sys.stderr.write('x' * 65536)"),
    "output_flood": ("bytes of output", "import sys\nwhile True: sys.stdout.write('x' * 65536)"),
    "output_flood_by_descriptor": ("bytes of output", "import os\nwhile True: os.write(1, b'x' * 65536)"),
    "memory": (_MEMORY, "x = [bytes(1 << 24) for _ in range(1 << 12)]"),
    "memory_at_once": (_MEMORY, "x = bytearray(1 << 40)"),
    "shared_memory_map": (_MEMORY, "import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(1 << 10)]"),
    "memory_of_integers": (f"{_TIME}|{_MEMORY}", "x = 1\nwhile True: x = x << (1 << 26) | 1"),
    "memory_of_a_string": (_MEMORY, "print('x' * (1 << 36))"),
    "decompression": (
        f"{_TIME}|{_MEMORY}",
        "import zlib\nx = zlib.compress(bytes(1 << 24))\ny = [zlib.decompress(x) for _ in range(1 << 12)]",
    ),
    "own_limit_raised": (
        "exit code 1",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    ),
    "threads": (
        "threads|exit code 1",
        "import threading, time\nthreading.stack_size(1 << 15)\n"
        "while True: threading.Thread(target=time.sleep, args=[1000], daemon=True).start()",
    ),
    "descriptors": ("exit code 1", "import os\nx = [os.dup(0) for _ in range(1 << 16)]"),
    "pipes": ("exit code 1", "import os\nx = [os.pipe() for _ in range(1 << 16)]"),
    "recursion": (
        f"{_TIME}|{_MEMORY}",
        "import sys; sys.setrecursionlimit(1 << 30)\n"
        "class A:\n def __getattr__(self, n): return getattr(self, n + 'x')\nA().x",
    ),
    "recursion_in_c": (
        f"{_TIME}|{_MEMORY}",
        "import sys; sys.setrecursionlimit(1 << 30)\nx = []\nfor _ in range(1 << 20): x = [x]\nrepr(x)",
    ),
    "compiler_overflow": (f"{_TIME}|{_MEMORY}", "eval('(' * 100000 + ')' * 100000)"),
    "segfault": ("signal 11", "import ctypes; ctypes.string_at(0)"),
    "abort": ("signal", "import os; os.abort()"),
    "jump_into_nothing": ("signal", "import ctypes; ctypes.CFUNCTYPE(None)(16)()"),
    "deleters": (_TIME, "class A:\n def __del__(self):\n  A()\n  while True: pass\nA()"),
    "exits_with_a_code": ("exit code 3", "import sys; sys.exit(3)"),
    "exits_from_an_exit_function": ("exit code 7", "import atexit, os; atexit.register(os._exit, 7)"),
    "main_thread_gone": (
        f"{_TIME}|signal 9",
        "import ctypes, threading, time\nthreading.Thread(target=time.sleep, args=[1000]).start()\n"
        "ctypes.CDLL(None).syscall(60 if __import__('platform').machine() == 'x86_64' else 93, 0)",
    ),
}
if platform.machine() == "x86_64":
    # mov eax, 2; int 0x80: fork by the numbers of another ABI
    LIMITED["system_call_of_32_bits"] = (
        "signal (11|31)",
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(b'\\xb8\\x02\\0\\0\\0\\xcd\\x80\\xc3')\n"
        "print('ESCAPED', ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))())",
    )

POINTLESS = {
    "nothing": "",
    "says_that_it_passed": "print('PASSED'); print('{\"passed\": true}'); print(1.0)",
    "leaves_at_once": "import os; os._exit(0)",
    "raises_its_exit": "raise SystemExit(0)",
    "not_python": "this is no program",
    "null_bytes": "print(1)\0",
    "coding_line": "# -*- coding: nonsense -*-\nprint(1)",
    "no_utf8": "import os; os.write(1, bytes(range(128, 256)))",
    "lone_surrogates": "print('\\ud800')",
    "a_pickle": "import os; os.write(1, b'cos\\nsystem\\n(S\"touch CANARY.2\"\\ntR.')",
    "reads_without_end": "import sys\nwhile True:\n if not sys.stdin.read(): break",
    "reads_more_than_there_is": "while True: input()",
    "closes_everything": "import os\nfor i in range(64):\n try: os.close(i)\n except OSError: pass",
    "descriptors_left_open": (
        "import os\nfor i in range(3, 1024):\n try: print('ESCAPED', i, os.fstat(i))\n except OSError: pass"
    ),
    "writes_to_the_input": "import os\ntry: os.write(0, b'x'); print('ESCAPED')\nexcept OSError: pass",
    "looks_into_frames": (
        "import sys\nf = sys._getframe()\n"
        "while f:\n print(f.f_code.co_filename, sorted(f.f_locals), f.f_locals)\n f = f.f_back"
    ),
    "looks_through_memory": (
        "import gc\nfor x in gc.get_objects():\n try:\n  if 'tuptuo-detcepxe'[::-1] in str(x): print('ESCAPED', x)\n"
        " except BaseException: pass"
    ),
    "environment": (
        "import os, ctypes\nenviron = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')\n"
        "print(dict(os.environ), [environ[i] for i in range(5)])"
    ),
    "imports_the_trainer": (
        "try:\n from r1fast.rewards import pool\n print('ESCAPED')\nexcept (ImportError, OSError): print('refused')"
    ),
    "poisons_modules": (
        "import builtins, sys, os, json\n"
        "for name in list(sys.modules):\n if name != 'builtins': sys.modules[name] = None\n"
        "builtins.print = builtins.exec = builtins.compile = None"
    ),
    "returns_from_exit": "import os\nos._exit = lambda code: None\nraise SystemExit(0)",
    "own_exit_functions": "import atexit; atexit._clear(); atexit.register(print, 'bye')",
    "exception_that_exits": "class E(BaseException):\n def __str__(self): import os; os._exit(0)\nraise E",
    "exit_code_that_lies": "class C(int):\n def __and__(self, other): return 0\nraise SystemExit(C(5))",
    "traces": "import sys, threading; sys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)",
    "stdout_replaced": "import sys, io; sys.stdout = sys.__stdout__ = io.StringIO(); print('x')",
    "reads_devices": (
        "import os\nfor d in ('kmsg', 'mem', 'vda', 'tty', 'ptmx', 'random'):\n"
        " try: print('ESCAPED', os.open('/dev/' + d, 0))\n except OSError: pass"
    ),
    "mangled_signals": (
        "import signal\nfor n in signal.valid_signals():\n try: signal.signal(n, lambda *_: None)\n"
        " except OSError: pass"
    ),
}
