"""Processes of tests that need their own, without the seconds that each would import (fork_server.py)."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Forks:
    """One fork server, which starts with the first process and has `modules` and this environment; `with`."""

    def __init__(self, *modules: str, **environment: str) -> None:
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, given)])
        self.modules = modules
        self.environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
        self.server: subprocess.Popen[str] | None = None
        self.begun = False

    def _reply(self) -> Any:
        assert self.server is not None and self.server.stdout is not None
        return json.loads(self.server.stdout.readline())

    def begin(
        self, module: str, *argv: object, log: Path, out: Path | None = None, cwd: Path = ROOT, ranks: int = 1
    ) -> list[int]:
        """Start MODULE.main(argv) on some ranks, with standard error in `log` and output in `out`; returns the pids."""
        if self.server is None:
            command = [sys.executable, "-m", "tests.fork_server", *self.modules]
            pipe = subprocess.PIPE
            self.server = subprocess.Popen(command, env=self.environment, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
            self._reply()
        if self.begun:  # a test that failed before it asked
            self.end()
        request = {"module": module, "argv": [str(a) for a in argv], "ranks": ranks}
        request |= {"cwd": str(cwd), "log": str(log), "out": str(out) if out else None}
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        self.begun = True
        return self._reply()["pids"]

    def end(self) -> list[int]:
        """Wait for what was begun; returns the exit codes of its ranks."""
        self.begun = False
        return self._reply()["codes"]

    def run(self, module: str, *argv: object, ranks: int = 1) -> None:
        """MODULE.main(argv), which must end well on every rank."""
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            self.begin(module, *argv, log=log, ranks=ranks)
            assert self.end() == [0] * ranks, log.read_text(errors="replace")[-4000:]

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *error: object) -> None:
        if self.server is not None:
            assert self.server.stdin is not None
            self.server.stdin.close()
            self.server.wait(timeout=60)
