"""Side-by-side timing, and the machine it was done on."""

import datetime
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["PACKAGES", "REST", "machine", "rounds"]

# The threads of a BLAS spin for some hundredths of a second after its last product, on the cores that the next call
# needs if that brings a BLAS of its own: SciPy's, NumPy's and torch's are three.
REST = 0.1

PACKAGES = (
    "slra",
    "numpy",
    "scipy",
    "torch",
    "jax",
    "dask",
    "distributed",
    "zarr",
    "scikit-learn",
    "array-api-compat",
)


def rounds(
    calls: Sequence[Callable[[], Any]],
    repeats: int,
    wait: Callable[[Any], object] = lambda result: None,
    advance: Callable[[], object] = lambda: None,
    rest: float = 0.0,
) -> list[list[float]]:
    """Seconds of each call in each round.

    A round makes every call once, so that a busy machine slows all of them alike.

    Parameters
    ----------
    calls : sequence of callables
        Without arguments; warm them up first.
    repeats : int
        Rounds.
    wait : callable
        Gets each result, and returns when it is computed.
    advance : callable
        Called after each round.
    rest : float
        Seconds to sleep before each call; `REST` where different libraries take turns.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, spent in zip(calls, seconds, strict=True):
            time.sleep(rest)
            start = time.perf_counter()
            wait(call())
            spent.append(time.perf_counter() - start)
        advance()
    return seconds


def machine() -> dict[str, Any]:
    """Date, processor, BLAS, and the versions of the libraries that are compared."""
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "cpu": _cpu_model(),
        "cores": _n_cores(),
        "python": platform.python_version(),
        "blas": _blas(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _n_cores() -> int:
    """Count the cores this process may use; all of them where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(models)) or platform.processor()


def _blas() -> list[str]:
    """Name, version and threads of each BLAS and OpenMP that is loaded; NumPy's is, by slra."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return ["unknown: threadpoolctl is not installed"]
    return sorted(
        {
            f"{lib['internal_api']} {lib['version']} ({lib['num_threads']})"
            for lib in threadpool_info()
        }
    )
