"""400,000 x 2,000 float32 (3.2 GB) on a cluster of two processes limited to 1 GB each: memory, spilling, time, error.

Run as ``python -m benchmarks.dask_cluster [case ...]``; writes ``benchmarks/results/dask_cluster.json`` (case by case),
in about 15 minutes.
Cases: ``rows`` (chunks of rows, generated), ``zarr`` (the same, read), ``zarr, both axes`` (read, in chunks along both
axes), ``killed`` (generated, one worker killed in the second pass). Linux only.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import slra
from benchmarks.common import earlier, save, table
from benchmarks.cosine_matrix import count, lazily, optimal_error, singular_values
from benchmarks.markdown import scientific
from benchmarks.worker_memory import peak_bytes, spilled_bytes

SHAPE, RANK, LIMIT = (400_000, 2000), 20, 10**9
ROWS, BOTH_AXES = (10_000, 2000), (10_000, 500)


def kill_one(client: Any, log: Path, n_chunks: int) -> int:
    """Kill a worker in the middle of the second pass; say how many chunks had been made by then."""
    while count(log) < 1.5 * n_chunks:
        time.sleep(0.05)
    os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
    return count(log)


def measure(case: str, folder: Path) -> dict[str, Any]:
    """Decompose on a fresh cluster."""
    import dask.array as da
    from distributed import Client, LocalCluster, wait

    log = folder / "log"
    x = lazily(SHAPE, ROWS, log)
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=LIMIT, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        if case.startswith("zarr"):
            store = folder / "x.zarr"
            x.rechunk(ROWS if case == "zarr" else BOTH_AXES).to_zarr(store, compressors=None)
            client.restart()
            x = da.from_zarr(store)
        before, start = count(log), time.perf_counter()
        U, S, Vh = client.persist(list(slra.randomized_svd(x, RANK, rng=0)))
        killed_at = kill_one(client, log, x.npartitions) if case == "killed" else None
        wait([U, S, Vh])
        seconds = time.perf_counter() - start
        found = {
            "seconds": seconds,
            "bytes": x.nbytes,
            "chunks": x.chunksize,
            "worker_limit_bytes": LIMIT,
            "worker_peak_bytes": sorted(client.run(peak_bytes).values()),
            "worker_spilled_bytes": sorted(client.run(spilled_bytes).values()),
            "passes": None if case.startswith("zarr") else (count(log) - before) / x.npartitions,
            "killed_after_passes": killed_at and killed_at / x.npartitions,
        }
        # From the definition, chunk by chunk, in double precision.
        residual = (lazily(SHAPE, ROWS) - (U * S) @ Vh).astype("float64")
        error, S = client.gather(client.compute([da.linalg.norm(residual), S]))
    exact = singular_values(SHAPE[1])[:RANK]
    return found | {
        "error_over_optimal": float(error) / optimal_error(SHAPE[1], RANK),
        "sigma_error": float(np.max(np.abs(S / exact - 1))),
    }


COMPARED = ("dask", "distributed", "zarr", "numpy")
NAMES = {
    "rows": "rows, 10,000 x 2,000, generated",
    "zarr": "the same, from Zarr",
    "zarr, both axes": "both axes, 10,000 x 500, from Zarr",
    "killed": "rows, generated, a worker killed in the second pass",
}


def tables(result: dict[str, Any]) -> dict[str, Any]:
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


def main() -> None:
    result = earlier("dask_cluster")
    for case in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            result[case] = measure(case, Path(folder))
        print(case, json.dumps(result[case], indent=1), flush=True)
        save("dask_cluster", result, tables, compared=COMPARED, parts=NAMES)


if __name__ == "__main__":
    main()
