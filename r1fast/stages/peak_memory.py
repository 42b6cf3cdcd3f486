"""The most memory that this process takes from one moment to another: of its GPU, or of the host on a CPU."""

from contextlib import suppress
from pathlib import Path

import torch

_PROC = Path("/proc/self")


def begin_peak(device: torch.device) -> None:
    """Forget the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # a system without it tells no peak below either
            (_PROC / "clear_refs").write_text("5")  # the peak begins anew; nothing else changes


def peak_bytes(device: torch.device) -> int | None:
    """The peak since begin_peak: of a GPU what tensors took; of a CPU the process as a whole. None: it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in (_PROC / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
