"""What a Dask worker says of its memory; called in its process by ``client.run``. Linux only."""

from pathlib import Path
from typing import Any

__all__ = ["peak_bytes", "spilled_bytes"]


def peak_bytes() -> int:
    """Largest resident set of this process so far, as the kernel has counted it."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def spilled_bytes(dask_worker: Any) -> int:
    """Bytes that this worker has ever written to disk for want of memory."""
    return int(dask_worker.data.cumulative_metrics.get(("disk-write", "bytes"), 0))
