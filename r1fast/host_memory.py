"""Memory of this host that the process may take: the machine's, its container's (cgroup), its own limits (ulimit)."""

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Version 2, and 1: limit, what is taken, and the part of it that the kernel gives back (pages of files).
_NAMES = ("memory.max", "memory.current", "inactive_file")
_OLD_NAMES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def total() -> int:
    """Bytes of the machine, or of the container."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(limit for limit, _ in _cgroups())])


def available(num_processes: int = 1) -> int | None:
    """Bytes that each of so many processes here could take now; None where the system does not say."""
    shared = [limit - used for limit, used in _cgroups()]
    with suppress(OSError, KeyError):
        shared.append(_kilobytes("meminfo", "MemAvailable"))
    own = []
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        if (most := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY:
            own.append(most - _kilobytes("self/status", name))
    found = [room // num_processes for room in shared] + own
    return max(0, min(found)) if found else None


def _kilobytes(file: str, name: str) -> int:
    lines = (line.split() for line in (_PROC / file).read_text().splitlines())
    return {words[0]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}[f"{name}:"]


def _cgroups() -> Iterator[tuple[int, int]]:
    """(limit, bytes taken) of those that this process is in. In a container its own may be mounted as the root."""
    with suppress(OSError):
        for line in (_PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root, names = (_CGROUPS / "memory", _OLD_NAMES) if controllers else (_CGROUPS, _NAMES)
            inside = root / path.lstrip("/")
            for folder in (inside, *inside.parents):
                with suppress(OSError, ValueError, KeyError):  # no such file, or no limit: "max"
                    limit, used = (int((folder / name).read_text()) for name in names[:2])
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    yield limit, used - int(stat[names[2]])
                if folder == root:
                    break
