"""Host memory of this process, as the kernel counts it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def _status(key: str) -> int | None:
    """A size from /proc/self/status in bytes; None where there is no such file (anything but Linux)."""
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def peak_bytes() -> int:
    """The largest resident size that this process ever had.

    On Linux VmHWM rather than getrusage, whose figure is inherited from a larger parent process.
    """
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int:
    """The resident size now; where only the peak is known, that."""
    resident = _status("VmRSS")
    return peak_bytes() if resident is None else resident
