"""The page of a run at work: written at once and again, beside the run, whatever happens to it."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from r1fast.observe import live
from r1fast.observe.live import LivePage
from r1fast.observe.progress import ChainProgress


def until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_written_at_once_and_again(
    tmp_path: Path, write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "SHARE", 1.0)
    page = write_run(tmp_path, stop_in="dev2") / "report.html"
    with LivePage(tmp_path, seconds=0.01):
        until(page.is_file)
        first = page.stat().st_mtime_ns
        until(lambda: page.stat().st_mtime_ns > first)
        assert "data-reload" in page.read_text()
    last = page.stat().st_mtime_ns
    time.sleep(0.1)
    assert page.stat().st_mtime_ns == last and not (tmp_path / "report.html.partial").exists()


def test_other_ranks_write_nothing(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    with LivePage(write_run(tmp_path), is_main=False, seconds=0.01):
        time.sleep(0.05)
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries = []

    def fails(run_dir: Path, **options: bool) -> Path:
        tries.append(run_dir)
        raise OSError("no room")

    monkeypatch.setattr(live, "build_report", fails)
    with ChainProgress(["zero"]), LivePage(tmp_path, seconds=0.01):
        until(lambda: len(tries) > 2)
    assert capsys.readouterr().err == "report.html could not be written: OSError: no room\n"  # once


def test_a_slow_page_is_written_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most a fiftieth of the time goes into it."""
    tries = []

    def slow(run_dir: Path, **options: bool) -> Path:
        tries.append(run_dir)
        time.sleep(0.1)
        return run_dir

    monkeypatch.setattr(live, "build_report", slow)
    with LivePage(tmp_path, seconds=0.0):
        time.sleep(0.6)
    assert len(tries) == 1
