"""A matrix larger than the memory of the workers."""

from typing import Any

from benchmarks.markdown import scientific, table

COMPARED = ("dask", "distributed", "zarr", "numpy")
NAMES = {
    "rows": "rows, 10,000 x 2,000, generated",
    "zarr": "the same, from Zarr",
    "zarr, both axes": "both axes, 10,000 x 500, from Zarr",
    "killed": "rows, generated, a worker killed in the second pass",
}


def tables(result: dict[str, Any]) -> dict[str, str]:
    rows = [
        (
            name,
            "4, of the graph" if found["passes"] is None else f"{found['passes']:g}",
            f"{max(found['worker_peak_bytes']) / 1e6:.0f} MB",
            max(found["worker_spilled_bytes"]),
            f"1 + {scientific(found['error_over_optimal'] - 1)}",
            scientific(found["sigma_error"]),
            f"{found['seconds']:.0f} s",
        )
        for name, found in ((name, result[case]) for case, name in NAMES.items())
    ]
    head = ["chunks", "passes", "peak of a worker", "spilled", "error over best", "sigma error"]
    return {"memory": table([*head, "time"], rows, "lrrrrrr")}
