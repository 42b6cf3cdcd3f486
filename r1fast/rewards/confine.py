"""What a program of the `code` reward may ask of the kernel, and what it cannot: one function for each layer.

  seccomp      a list of the system calls that a computation needs: memory, reading, its pipe, clocks, threads of its
               own. Everything else is EPERM: new processes, exec, sockets, signals, writing or changing any file,
               mounts, namespaces, ptrace, bpf, io_uring, keys, shared memory, and what kernels will add
  Landlock     files are read beneath `readable_folders` and nowhere else
  namespaces   a root of these folders alone, without /proc; no network interface, no others' IPC
  limits       address space, processor time, open files; no file may grow; no core

seccomp and the limits always hold. One of Landlock (Linux 5.13) and namespaces must, or nothing would keep a program
from reading the tests' outputs on disk; both are taken where both are to be had. This file imports nothing of r1fast.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from typing import NamedTuple

LAYERS = ("namespaces", "landlock")  # in the order in which they are entered
MAX_OPEN_FILES = 64
_libc = ctypes.CDLL(None, use_errno=True)

# linux/prctl.h, sched.h, sys/mount.h, landlock.h
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 38, 22
_SECCOMP_MODE_FILTER, _CAPABILITY_VERSION_3 = 2, 0x20080522
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x20000, 0x08000000, 0x10000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_HANDLED, _LANDLOCK_READ = 0x1FFF, 0b1100  # all of its first version; of them READ_FILE and READ_DIR
_SECCOMP_KILL, _SECCOMP_ERRNO, _SECCOMP_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_EPERM, _ENOTTY, _ENOSYS = 1, 25, 38


class CannotConfine(Exception):
    """What this machine lacks."""


def readable_folders() -> list[str]:
    """What Python and its extension modules read: the standard library, installed packages, shared libraries."""
    python = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    base = [os.path.join(prefix, "lib") for prefix in (sys.base_prefix, sys.base_exec_prefix)]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime"]
    return sorted({path for path in (*python, *base, *system) if os.path.exists(path)})


def confine_launcher(layers: Iterable[str] = LAYERS) -> None:
    """For this process, which must have one thread, and all that it forks: files are hidden, no rights can be gained.

    Raises CannotConfine where none of the layers is to be had.
    """
    folders = readable_folders()
    entered = [layer for layer in LAYERS if layer in layers and _ENTER[layer](folders)]
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _drop_capabilities()
    if not entered:
        what = "neither Landlock (Linux 5.13, in the kernel's list of LSMs) nor user namespaces with mounts"
        raise CannotConfine(f"{what}, so nothing would keep a program from reading your files")


def confine_program(memory_bytes: int, cpu_s: int) -> None:
    """For this process, forked from a confined launcher: the limits, then the filter. Raises OSError, CannotConfine."""
    for what, limit in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, limit))
    instructions = seccomp_filter(platform.machine())
    code = ctypes.create_string_buffer(b"".join(instructions))
    sock_fprog = struct.pack("HxxxxxxQ", len(instructions), ctypes.addressof(code))
    program = ctypes.create_string_buffer(sock_fprog)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))


def die_with(parent: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, 9)
    if os.getppid() != parent:  # it has died before the call
        os._exit(1)


def _prctl(option: int, *values: int) -> None:
    arguments = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *arguments) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


def _drop_capabilities() -> None:
    """Of root, or of the user namespace; without exec none can come back."""
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, bytes(24)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


# Landlock


def _enter_landlock(folders: list[str]) -> bool:
    attributes = struct.pack("Q", _LANDLOCK_HANDLED)
    ruleset = _libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    for folder in folders:
        allowed = _LANDLOCK_READ if os.path.isdir(folder) else _LANDLOCK_READ & ~0b1000
        descriptor = os.open(folder, os.O_PATH)
        rule = struct.pack("=Qi", allowed, descriptor)
        if _libc.syscall(_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0) != 0:
            raise OSError(ctypes.get_errno(), f"landlock_add_rule of {folder}")
        os.close(descriptor)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if _libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0:
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(ruleset)
    return True


# Namespaces


def _enter_namespaces(folders: list[str]) -> bool:
    """False where the system allows none, or none with mounts (a kernel may give the first and refuse the second)."""
    uid, gid = os.getuid(), os.getgid()
    if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWIPC) != 0:
        return False
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
        # A place where no Python is installed, and which the new root does not have.
        root = "/proc"
        _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV)
        for folder in sorted(folders, key=os.path.realpath):  # one within another comes with that
            _bring_in(folder, root)
        os.chroot(root)
        os.chdir("/")
    except OSError:
        return False
    return True


def _bring_in(folder: str, root: str) -> None:
    """At its place below root, and where it is reached by a link that too."""
    real = os.path.realpath(folder)
    place = root + real
    if not os.path.exists(place):
        if os.path.isdir(real):
            os.makedirs(place)
        else:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            open(place, "x").close()
        _mount(real, place, None, _MS_BIND | _MS_REC)
    if folder != real and not os.path.lexists(root + folder):
        os.makedirs(os.path.dirname(root + folder), exist_ok=True)
        os.symlink(real, root + folder)


def _mount(source: str, target: str, kind: str | None, flags: int) -> None:
    name = None if kind is None else kind.encode()
    if _libc.mount(source.encode(), target.encode(), name, ctypes.c_ulong(flags), None) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}")


_ENTER = {"landlock": _enter_landlock, "namespaces": _enter_namespaces}


# seccomp


class _Rule(NamedTuple):
    """Allowed where `argument & mask` is one of `values`; no argument: always. number: on x86_64 and on aarch64."""

    numbers: tuple[int | None, int | None]
    argument: int | None = None
    mask: int = 0xFFFFFFFF
    values: tuple[int, ...] = ()


_ANY = {
    # files that are open, and looking at others
    "read": (0, 63), "readv": (19, 65), "pread64": (17, 67), "write": (1, 64), "writev": (20, 66), "close": (3, 57),
    "lseek": (8, 62), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "fstat": (5, 80), "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "getcwd": (79, 17), "getdents64": (217, 61),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    # memory
    "brk": (12, 214), "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216),
    "madvise": (28, 233),
    # signals that it gets
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103),
    # clocks
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "times": (100, 153),
    # threads
    "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293), "gettid": (186, 178),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "membarrier": (324, 283),
    # what it is, where, and its end
    "getpid": (39, 172), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "uname": (63, 160), "sysinfo": (99, 179), "getrandom": (318, 278), "getrlimit": (97, 163),
    "getrusage": (98, 165), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
_WRITING = 0o3 | 0o100 | 0o1000 | 0o20000000  # O_ACCMODE, O_CREAT, O_TRUNC, O_TMPFILE
_THREAD, _NAMESPACES = 0x10000, 0x7E020000  # CLONE_THREAD; CLONE_NEW*
_BY_ARGUMENT = {
    "open": _Rule((2, None), 1, _WRITING, (0,)),
    "openat": _Rule((257, 56), 2, _WRITING, (0,)),
    "clone": _Rule((56, 220), 0, _THREAD | _NAMESPACES, (_THREAD,)),
    # DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC. Not SETOWN, which has the kernel send signals to anybody.
    "fcntl": _Rule((72, 25), 1, values=(0, 1, 2, 3, 4, 1030)),
    "prlimit64": _Rule((302, 261), 0, values=(0,)),  # its own, which it can only lower
}
# The C library has another way: it asks once and goes that.
_INSTEAD = {"clone3": ((435, 435), _ENOSYS), "ioctl": ((16, 29), _ENOTTY)}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUAL, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06  # linux/bpf_common.h: LD|W|ABS, JMP|JEQ|K, ALU|AND|K, RET|K


def seccomp_filter(machine: str) -> list[bytes]:
    """The instructions (struct sock_filter): for each system call a comparison and what follows, so jumps are short.

    Raises CannotConfine for a machine whose numbers are not known.
    """
    if machine not in _AUDIT_ARCH or sys.byteorder != "little":
        known = " and ".join(_AUDIT_ARCH)
        raise CannotConfine(f"a seccomp filter for {machine} (there are some for {known})")
    column = list(_AUDIT_ARCH).index(machine)
    program = [_instruction(_LOAD, 4), _instruction(_EQUAL, _AUDIT_ARCH[machine], 1, 0)]
    program += [_instruction(_RETURN, _SECCOMP_KILL), _instruction(_LOAD, 0)]  # else another ABI's numbers
    for number, body in _bodies(column):
        program += [_instruction(_EQUAL, number, 0, len(body)), *body]
    return [*program, _instruction(_RETURN, _SECCOMP_ERRNO | _EPERM)]


def _bodies(column: int) -> Iterator[tuple[int, list[bytes]]]:
    allow, deny = _instruction(_RETURN, _SECCOMP_ALLOW), _instruction(_RETURN, _SECCOMP_ERRNO | _EPERM)
    rules = [*(_Rule(numbers) for numbers in _ANY.values()), *_BY_ARGUMENT.values()]
    for rule in rules:
        if (number := rule.numbers[column]) is None:
            continue
        if rule.argument is None:
            yield number, [allow]
            continue
        # The kernel takes these arguments as int, so it reads the half that is looked at here.
        body = [_instruction(_LOAD, 16 + 8 * rule.argument), _instruction(_AND, rule.mask)]
        for value in rule.values:
            body += [_instruction(_EQUAL, value, 0, 1), allow]
        yield number, [*body, deny]
    for numbers, error in _INSTEAD.values():
        yield numbers[column], [_instruction(_RETURN, _SECCOMP_ERRNO | error)]


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)
