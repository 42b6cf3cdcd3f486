"""Starts processes without the seconds of importing torch: everything is imported once, then each is forked.

    python -m tests.fork_server MODULE...     these and what they import are there before the first fork

Standard input: one JSON object a line, {"module", "argv", "cwd", "log", "out", "ranks"}: MODULE.main(argv) on each
rank, which appends what it says to the files `log` (standard error) and `out` (null: nowhere). Standard output:
{"pids": [...]} when they run and {"codes": [...]} when all have ended (negative: by that signal). Several ranks get the
environment that torchrun would give them, and what it does when one of them fails: the others are told to end, and
killed after a while.
"""

import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
from typing import Any

PATIENCE_S = 30.0  # torchrun's


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def become(request: dict[str, Any], rank: int, port: int) -> None:
    """In the child; does not return."""
    os.chdir(request["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, path in ((1, request["out"] or os.devnull), (2, request["log"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), target)
    if request["ranks"] > 1:
        size = str(request["ranks"])
        names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.update(names, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 70
    try:
        code = int(importlib.import_module(request["module"]).main(request["argv"]) or 0)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(pids: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    failed_at = 0.0
    while len(codes) < len(pids):
        for pid in pids:
            # Not reaped yet: until the next request nobody else gets a process id that a test may want to kill.
            if pid not in codes and (ended := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
                codes[pid] = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                if codes[pid] != 0 and not failed_at:
                    failed_at = time.monotonic()
                    signal_all([other for other in pids if other not in codes], signal.SIGTERM)
        if failed_at and time.monotonic() - failed_at > PATIENCE_S:
            signal_all([other for other in pids if other not in codes], signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def signal_all(pids: list[int], signum: int) -> None:
    for pid in pids:
        os.kill(pid, signum)


def serve(modules: list[str]) -> None:
    # None of them may start a thread: a fork copies only the one that forks.
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # no child looks through them again
    print(json.dumps({"ready": os.getpid()}), flush=True)
    pids: list[int] = []
    for line in sys.stdin:
        request = json.loads(line)
        for pid in pids:
            os.waitpid(pid, 0)
        port, pids = free_port(), []
        for rank in range(request["ranks"]):
            pid = os.fork()
            if pid == 0:
                become(request, rank, port)
            pids.append(pid)
        print(json.dumps({"pids": pids}), flush=True)
        print(json.dumps({"codes": wait_for(pids)}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
