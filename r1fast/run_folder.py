"""How a run folder is written: files and folders whole or not at all, records with a checksum, one process at a time.

Whatever exists once (the recipe, the summary, rows, a model) is written beside its place under `NAME.partial`, synced,
and renamed: a kill or a full disk at any moment leaves the old content or the new one. All here raise OSError.
"""

import fcntl
import json
import os
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from r1fast.config import ConfigError

LOCK = "run.lock"
PARTIAL = ".partial"
_REPLACED = ".replaced.partial"  # a folder on its way out, while the one that replaces it moves in


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole, or leave what was there."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        write_synced(partial, content)
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `target` at the end, or leaves it as it was."""
    partial, replaced = target.with_name(target.name + PARTIAL), target.with_name(target.name + _REPLACED)
    remove(partial)
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        if target.exists():  # a folder cannot be renamed onto another: remove_leftovers ends this after a kill
            os.rename(target, replaced)
        os.rename(partial, target)
        sync(target.parent)
    except BaseException:
        with suppress(OSError):
            remove(partial)
            _put_back(replaced)
        raise
    remove(replaced)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(run_dir: Path) -> None:
    """Delete what a killed run left half-written. Only under the lock."""
    for pattern in ("*", "*/*", "*/samples/*"):
        for path in run_dir.glob(pattern + PARTIAL):
            if path.name.endswith(_REPLACED):
                _put_back(path)
            remove(path)


def holds_nothing(run_dir: Path) -> bool:
    """Whether no run ever began here: a kill before its first file leaves the lock, and half a file at most."""
    return all(path.name == LOCK or path.name.endswith(PARTIAL) for path in run_dir.iterdir())


def _put_back(replaced: Path) -> None:
    target = replaced.with_name(replaced.name.removesuffix(_REPLACED))
    if replaced.exists() and not target.exists():
        os.rename(replaced, target)


def remove(path: Path) -> None:
    """A file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# Records: JSON objects with a checksum of their own, so that a flipped bit is damage and no other value.


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Replace path by `content` as JSON, with its crc32."""
    replace_file(path, sealed(content))


def sealed(content: dict[str, Any]) -> bytes:
    content = json.loads(json.dumps(content))  # as a reader will see it: keys are strings
    return (json.dumps({**content, "crc32": _crc32(content)}, indent=1, ensure_ascii=False) + "\n").encode()


def read_record(path: Path) -> dict[str, Any]:
    """What write_record wrote. ValueError that says what is wrong, for any damage."""
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path.name} is no file" if os.path.lexists(path) else f"{path.name} is missing")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is unreadable ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.pop("crc32", None) != _crc32(content):
        raise ValueError(f"{path.name} has another crc32 than when it was written")
    return content


def _crc32(content: dict[str, Any]) -> int:
    # ASCII: a lone surrogate of a user's text has no UTF-8.
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder, or raise ConfigError naming who does.

    The kernel frees an flock when its process ends, however it ends, so no stale lock is left to clear. On NFS an flock
    is a lock of the server (Linux 2.6.12 and newer), which all hosts see unless the folder is mounted with
    local_lock=flock or nolock: then only processes of one host exclude each other. The file is deleted at the end;
    one that got the lock of a deleted file therefore tries again.
    """
    path = run_dir / LOCK
    try:
        file = _lock(path)
    except BlockingIOError as error:
        problem = f"{error.strerror} is at work in it; wait for that run, stop it, or choose another"
        raise ConfigError(f"--output-dir {run_dir}: {problem}") from None
    except OSError as error:
        raise ConfigError(f"--output-dir {run_dir}: cannot be locked for writing ({error.strerror})") from None
    with file:
        try:
            yield
        finally:
            with suppress(OSError):  # a folder that is gone or read-only: without a holder the file locks nothing
                path.unlink(missing_ok=True)


def _lock(path: Path) -> FileIO:
    """The file, locked; BlockingIOError naming who holds it."""
    while True:
        with ExitStack() as unless_locked:
            file = unless_locked.enter_context(FileIO(path, "a+"))  # not inherited by programs that are started
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(file.fileno(), 200, 0).decode(errors="replace") or "another process"
                raise BlockingIOError(error.errno, holder) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                    unless_locked.pop_all()
                    return file
