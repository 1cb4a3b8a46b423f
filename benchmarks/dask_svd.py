"""Randomized SVD on Dask beside ``da.linalg.svd_compressed``: passes over the data, error, time.

Run as ``python -m benchmarks.dask_svd``; writes ``benchmarks/results/dask_svd.json``, in about three minutes.
A cluster of two processes with a thread each; float32, singular values 1, 1/2, 1/3, ...; chunks that are made are
counted.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import slra
from benchmarks.common import interleaved, save, table
from benchmarks.cosine_matrix import count, lazily, singular_values
from benchmarks.markdown import duration, scientific, significant

SHAPE, CHUNKS, RANK, OVERSAMPLES = (20_000, 1000), (2000, 1000), 20, 10
REPEATS = 5


def ways(x: Any) -> dict[str, Callable[[int], Any]]:
    """Return functions of the seed that give lazy factors."""
    import dask.array as da

    def ours(n_iter: int) -> Callable[[int], Any]:
        return lambda seed: slra.randomized_svd(
            x, RANK, n_iter=n_iter, n_oversamples=OVERSAMPLES, rng=seed
        )

    def theirs(compute: bool) -> Callable[[int], Any]:
        return lambda seed: da.linalg.svd_compressed(
            x, RANK, n_power_iter=2, iterator="QR", seed=seed, compute=compute
        )

    return {f"slra, n_iter={q}": ours(q) for q in (1, 2, 3, 5)} | {
        "svd_compressed, compute=True": theirs(True),
        "svd_compressed, compute=False": theirs(False),
    }


def compare(client: Any, x: Any, log: Path) -> dict[str, Any]:
    """Passes, time and error of each way, another seed each time; all three factors are computed."""
    exact = singular_values(SHAPE[1])[:RANK]
    errors: dict[str, list[float]] = {name: [] for name in ways(x)}
    passes: dict[str, float] = {}

    def run(name: str, way: Callable[[int], Any]) -> None:
        before = count(log)
        S = client.gather(client.compute(list(way(len(errors[name])))))[1]
        passes[name] = (count(log) - before) / x.npartitions
        errors[name].append(float(np.max(np.abs(S / exact - 1))))

    runs = {name: lambda name=name, way=way: run(name, way) for name, way in ways(x).items()}
    seconds = interleaved(runs, REPEATS)
    return {
        name: {
            "passes": passes[name],
            "sigma_error": statistics.median(errors[name]),
            "seconds": statistics.median(seconds[name]),
            "all_seconds": seconds[name],
        }
        for name in runs
    }


COMPARED = ("dask", "distributed", "numpy")
NAMES = {
    "slra, n_iter=1": "`randomized_svd`, `n_iter=1`",
    "slra, n_iter=2": "`n_iter=2`",
    "slra, n_iter=3": "`n_iter=3`, the default",
    "slra, n_iter=5": "`n_iter=5`",
    "svd_compressed, compute=True": "`svd_compressed`, `compute=True`",
    "svd_compressed, compute=False": "`svd_compressed`, `compute=False`: holds the whole matrix",
}


def tables(result: dict[str, Any]) -> dict[str, Any]:
    generated, held = result["generated"], result["in memory"]
    rows = [
        (
            name,
            f"{generated[key]['passes']:g}",
            scientific(generated[key]["sigma_error"], 2),
            duration(generated[key]["seconds"]),
            duration(held[key]["seconds"], 3),
        )
        for key, name in NAMES.items()
    ]
    return {"beside": table(["", "passes", "sigma error", "generated", "in memory"], rows, "lrrrr")}


def losses(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """At the same number of passes, and where the matrix is held in memory."""
    generated, held = result["generated"], result["in memory"]
    six = (
        generated["slra, n_iter=5"]["seconds"]
        / generated["svd_compressed, compute=True"]["seconds"]
    )
    whole = held["slra, n_iter=3"]["seconds"] / held["svd_compressed, compute=False"]["seconds"]
    theirs = "Dask's `svd_compressed`"
    return [
        ("Dask, at the same number of passes (its error is larger)", theirs, significant(six)),
        ("Dask, a matrix held in memory", theirs, significant(whole)),
    ]


def main() -> None:
    from distributed import Client, LocalCluster

    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        log = Path(folder) / "log"
        x = lazily(SHAPE, CHUNKS, log)
        result = {"generated": compare(client, x, log)}
        result["in memory"] = compare(client, client.persist(x), log)
    save("dask_svd", result, tables, losses=losses, compared=COMPARED)


if __name__ == "__main__":
    main()
