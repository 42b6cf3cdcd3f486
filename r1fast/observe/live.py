"""report.html of a run at work: written anew every minute, from the run's files alone, in a thread beside the training.

A page is made in a fraction of a second; where it takes longer, it is made so much less often that at most a fiftieth
of the time goes into it.
"""

import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path

from r1fast.observe.page import RELOAD_SECONDS, build_report
from r1fast.observe.progress import active_progress

SHARE = 1 / 50  # of the time, at most


class LivePage(AbstractContextManager["LivePage"]):
    """with LivePage(run_dir, is_main=dist.is_main): the run. The page of its end is somebody else's."""

    def __init__(self, run_dir: Path, *, is_main: bool = True, seconds: float = RELOAD_SECONDS) -> None:
        self.run_dir, self.seconds = run_dir, seconds
        self.is_told = False  # of a page that could not be written
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write, name="report.html", daemon=True) if is_main else None

    def __enter__(self) -> "LivePage":
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _write(self) -> None:
        wait = 0.0
        while not self._ended.wait(wait):
            start = time.perf_counter()
            try:
                build_report(self.run_dir, live=True)
            except Exception as error:  # whatever is wrong with a page, the training goes on; the next one is tried
                if not self.is_told and (progress := active_progress()) is not None:
                    progress.message(f"report.html could not be written: {type(error).__name__}: {error}")
                    self.is_told = True
            wait = max(self.seconds, (time.perf_counter() - start) / SHARE)
