"""What all benchmarks share: interleaved timing, the machine they ran on, and where results go."""

import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
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


def interleaved(
    functions: dict[str, Callable[[], Any]], repeats: int = 7
) -> dict[str, list[float]]:
    """Time functions in turn, ``repeats`` times each after one call to warm up; seconds."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def machine() -> dict[str, Any]:
    """Describe the machine, its BLAS and the versions of the libraries compared."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "blas": _blas(),
        "versions": versions,
    }


def save(topic: str, result: dict[str, Any]) -> Path:
    """Write results, with the machine, to ``benchmarks/results/<topic>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{topic}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    return path


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(models)) or platform.processor()


def _blas() -> list[str]:
    import numpy  # noqa: F401  so that its BLAS is loaded
    from threadpoolctl import threadpool_info

    return sorted(
        {
            f"{lib['internal_api']} {lib['version']} ({lib['num_threads']})"
            for lib in threadpool_info()
        }
    )
