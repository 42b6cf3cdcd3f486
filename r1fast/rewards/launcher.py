"""Forks the programs of the `code` reward: `python -m r1fast.rewards.launcher LAYER..`, started by sandbox.py.

It has imported what programs import most, is confined (confine.py), and never reads a program, an input or an output:
these go through descriptors that it hands on, so there is nothing of others to be found in a program's memory.

    standard input, a SOCK_SEQPACKET socket
    once                               -> b"", or what this machine lacks
    (memory, seconds) + 3 descriptors  -> id of the process: job, standard input, where its output goes
    b"reap"                            -> its exit status; until then its id is nobody else's

The job is JSON: {"program": text, "function": name | null, "arguments": [..] | null, "setup": text}. Without a function
the text runs as a script, and its standard output is the output; with one, the value that the function returns is, as
JSON (as_json). Without arguments `function` is an expression, and its value is the output; `setup` runs before it.
"""

import atexit
import contextlib
import gc
import json
import os
import random
import resource
import socket
import struct
import sys
import threading
import types
from typing import Any, NoReturn

from r1fast.rewards import confine

START = struct.Struct("<QQ")  # bytes of address space, seconds of processor time
REAP = b"reap"
STATUS = struct.Struct("<Q")  # a process id, or the status that waitpid gives
_PRELOADED = (
    "array abc bisect calendar cmath collections contextlib copy dataclasses datetime decimal enum fractions functools "
    "hashlib heapq inspect io itertools json math numbers operator queue re statistics string textwrap time typing"
)
_OUTPUT = 3
# Bound now: a program may put other functions in their modules.
_exit, _dumps, _write, _run_exit_functions = os._exit, json.dumps, os.write, atexit._run_exitfuncs


def main(layers: list[str]) -> None:
    control = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    for name in _PRELOADED.split():
        __import__(name)
    _forget_r1fast()
    try:
        confine.confine_launcher(layers)
    except (confine.CannotConfine, OSError) as error:
        control.send(str(error).encode() or b"unknown")
        return
    control.send(b"")
    gc.collect()
    gc.freeze()  # what is shared with the programs stays shared
    launcher = os.getpid()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, START.size, 3)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            _run(launcher, START.unpack(message), null, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(STATUS.pack(pid))
        if not control.recv(len(REAP)):
            return  # the worker is gone; the program goes with us
        control.send(STATUS.pack(os.waitpid(pid, 0)[1]))


def _forget_r1fast() -> None:
    """Programs find the standard library and installed packages, as in a Python of their own."""
    root = os.environ.pop("PYTHONPATH", "")
    sys.path[:] = [entry for entry in sys.path if entry != root]
    for name in [name for name in sys.modules if name.partition(".")[0] == "r1fast"]:
        del sys.modules[name]


def _run(launcher: int, limits: tuple[int, int], null: int, descriptors: list[int]) -> NoReturn:
    """The job, with descriptors 0 to 2 and for a call _OUTPUT; sys.stdin and sys.stdout are unused until here."""
    job, given, output = descriptors
    status = 1
    try:
        confine.die_with(launcher)
        os.setsid()
        with open(job, "rb") as file:
            what = json.load(file)
        is_call = what["function"] is not None
        for source, target in ((given, 0), (null if is_call else output, 1), (null, 2), (output, _OUTPUT)):
            os.dup2(source, target)
        os.closerange(_OUTPUT + is_call, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        sys.set_int_max_str_digits(0)  # the time limit is there for that
        random.seed(0)  # a reward gives the same value again
        confine.confine_program(*limits)
    except BaseException as error:
        _write(output, f"{type(error).__name__}: {error}".encode())
        _exit(status)
    try:
        status = _script(what["program"]) if not is_call else _call(what)
    finally:
        _exit(status)


def _script(text: str) -> int:
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv[:] = ["program.py"]
    status = 0
    try:
        exec(compile(text, "program.py", "exec"), main.__dict__)
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        status = 1
    _run_exit_functions()  # some print there
    for stream in (sys.stdout, sys.__stdout__):
        with contextlib.suppress(ValueError):  # the program has closed it
            if stream is not None:
                stream.flush()
    return status & 0xFF


def _call(what: dict[str, Any]) -> int:
    """In a module that is not __main__, with the names which solutions expect where one function is asked for."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    exec("from typing import *; import collections, math", module.__dict__)
    exec(compile(what["program"], "program.py", "exec"), module.__dict__)
    if what["arguments"] is None:
        exec(compile(what["setup"], "setup.py", "exec"), module.__dict__)
        value = eval(compile(what["function"], "test.py", "eval"), module.__dict__)
    else:
        function = module.__dict__.get(what["function"])
        if function is None:
            function = getattr(module.__dict__["Solution"](), what["function"])
        value = function(*what["arguments"])
    left = memoryview(as_json(value).encode())
    while left:
        left = left[_write(_OUTPUT, left) :]
    return 0


def as_json(value: Any) -> str:
    """With arrays and numbers of NumPy as lists and numbers, and sets as {"set": [JSON of a member, ..]}, sorted."""
    return _dumps(value, default=_as_json)


def _as_json(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return {"set": sorted(map(as_json, value))}
    return value.tolist()


if __name__ == "__main__":
    main(sys.argv[1:])
