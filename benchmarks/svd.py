"""Singular value decompositions: accuracy against time, side by side with what else there is.

Run as ``python -m benchmarks.svd [section ...]``; sections are ``accuracy``, ``curve``, ``batches``, ``tolerance``,
``dask``, ``sparse`` and ``sizes``. Writes ``benchmarks/results/svd.json`` (section by section) and ``svd.png``, in
about four minutes.
"""

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import slra
from benchmarks.common import RESULTS, interleaved, save
from slra.cli.bench.problems import matrix_with, sigma_error


def matrix(m: int, n: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Matrix with singular values 1, 1/2, 1/3, ... and random singular vectors."""
    U, sigma, Vh = matrix_with(1 / np.arange(1.0, n + 1), m, seed)
    return ((U * sigma) @ Vh).astype(dtype)


def compare(
    functions: dict[str, Callable[[], Any]], exact: np.ndarray, repeats: int = 5
) -> dict[str, Any]:
    """Time functions that return singular values, in turn, and say how wrong each is."""
    seconds = interleaved(functions, repeats)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "sigma_error": sigma_error(np.asarray(function())[..., : exact.shape[-1]], exact),
        }
        for name, function in functions.items()
    }


def singular_values(x: Any) -> np.ndarray:
    """Singular values in double precision."""
    return np.linalg.svd(np.asarray(x, dtype=np.float64), compute_uv=False)


def accuracy() -> dict[str, Any]:
    """2000 x 1000, rank 60, default arguments."""
    from sklearn.utils.extmath import randomized_svd

    results = {}
    for dtype in ("float32", "float64"):
        a = matrix(2000, 1000, dtype)
        exact = singular_values(a)[:60]
        results[dtype] = compare(
            {
                "slra": lambda a=a: slra.randomized_svd(a, 60, rng=0).S,
                "scikit-learn": lambda a=a: randomized_svd(a, 60, random_state=0)[1],
            },
            exact,
            7,
        )
    return results


def curve() -> dict[str, Any]:
    """3000 x 1500, rank 200, float64: what each number of iterations buys."""
    import fbpca
    import torch
    from sklearn.utils.extmath import randomized_svd

    a = matrix(3000, 1500, "float64")
    t = torch.from_numpy(a)
    exact = singular_values(a)[:200]
    functions: dict[str, Callable[[], Any]] = {}
    for q in (1, 2, 3, 4):
        functions[f"slra krylov {q}"] = lambda q=q: (
            slra.randomized_svd(a, 200, n_iter=q, method="krylov", rng=0).S
        )
    for q in (2, 4):
        functions[f"slra subspace {q}"] = lambda q=q: (
            slra.randomized_svd(a, 200, n_iter=q, method="subspace", rng=0).S
        )
    for q in (2, 4, 7, 12):
        functions[f"scikit-learn {q}"] = lambda q=q: randomized_svd(
            a, 200, n_iter=q, random_state=0
        )[1]
    for q in (2, 6):
        functions[f"torch.svd_lowrank {q}"] = lambda q=q: torch.svd_lowrank(t, 210, niter=q)[1]
        functions[f"fbpca {q}"] = lambda q=q: fbpca.pca(a, 200, raw=True, n_iter=q)[1]
    return compare(functions, exact, 3)


def batches() -> dict[str, Any]:
    """Many small matrices of float32, rank 16, with vectors."""
    import torch
    from sklearn.utils.extmath import randomized_svd

    results = {}
    for shape in ((96, 2048, 64), (512, 64, 48)):
        a = np.random.default_rng(0).standard_normal(shape).astype("float32")
        t = torch.from_numpy(a)
        exact = singular_values(a)[:, :16]
        results["x".join(map(str, shape))] = compare(
            {
                "slra": lambda a=a: slra.randomized_svd(a, 16, rng=0).S,
                "numpy.linalg.svd": lambda a=a: np.linalg.svd(a, full_matrices=False)[1],
                "scikit-learn in a loop": lambda a=a: np.stack(
                    [randomized_svd(x, 16, random_state=0)[1] for x in a]
                ),
                "slra on torch": lambda t=t: slra.randomized_svd(t, 16, rng=0).S,
                "torch.svd_lowrank": lambda t=t: torch.svd_lowrank(t, 16)[1],
            },
            exact,
            3,
        )
    return results


def tolerance() -> dict[str, Any]:
    """Time by tolerance over time of a call told the rank; 2000 x 1000."""
    results = {}
    for dtype, rtol in (("float32", 0.3), ("float32", 0.1), ("float64", 0.1), ("float64", 0.05)):
        a = matrix(2000, 1000, dtype)
        rank = slra.randomized_svd(a, rtol=rtol, rng=0).S.shape[0]
        seconds = interleaved(
            {
                "by rtol": lambda a=a, rtol=rtol: slra.randomized_svd(a, rtol=rtol, rng=0),
                "told": lambda a=a, rank=rank: slra.randomized_svd(a, rank, rng=0),
            },
            5,
        )
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        results[f"{dtype} {rtol}"] = {
            "rank": rank,
            **medians,
            "ratio": medians["by rtol"] / medians["told"],
        }
    return results


def dask() -> dict[str, Any]:
    """4000 x 1000 in chunks of rows, rank 60, float32, on one process."""
    import dask as dask_package
    import dask.array as da

    a = matrix(4000, 1000, "float32")
    x = da.from_array(a, chunks=(1000, 1000))
    exact = singular_values(a)[:60]
    with dask_package.config.set(scheduler="threads"):
        return compare(
            {
                "slra": lambda: dask_package.compute(*slra.randomized_svd(x, 60, rng=0))[1],
                "svd_compressed 4 iterations": lambda: dask_package.compute(
                    *da.linalg.svd_compressed(x, 60, n_power_iter=4, compute=False)
                )[1],
            },
            exact,
            3,
        )


def planted(m: int = 200_000, n: int = 50_000, nnz: int = 10**7) -> Any:
    """Sparse matrix: 100 blocks of rank one with values 1, 1/2, 1/3, ..., and noise of 1e-5 an entry."""
    import scipy.sparse as sp

    rng = np.random.default_rng(0)
    row_order, column_order = rng.permutation(m), rng.permutation(n)
    height, width, n_blocks = 225, 400, 100
    rows, columns, values = [], [], []
    for j in range(n_blocks):
        u, v = rng.standard_normal(height), rng.standard_normal(width)
        rows.append(np.repeat(row_order[j * height : (j + 1) * height], width))
        columns.append(np.tile(column_order[j * width : (j + 1) * width], height))
        scale = (j + 1) * np.linalg.norm(u) * np.linalg.norm(v)
        values.append(np.outer(u, v).ravel() / scale)
    rest = nnz - n_blocks * height * width
    rows.append(rng.integers(0, m, rest))
    columns.append(rng.integers(0, n, rest))
    values.append(rng.standard_normal(rest) * 1e-5)
    places = np.concatenate(rows), np.concatenate(columns)
    return sp.csr_matrix((np.concatenate(values), places), shape=(m, n))


def sparse() -> dict[str, Any]:
    """200000 x 50000 with 10^7 entries, rank 50: time, error against svds, extra memory."""
    import tracemalloc

    from scipy.sparse.linalg import svds
    from sklearn.utils.extmath import randomized_svd

    a = planted()
    exact = np.sort(svds(a, 50, random_state=0)[1])[::-1]
    functions = {
        "slra": lambda: slra.randomized_svd(a, 50, rng=0).S,
        "slra krylov 2": lambda: slra.randomized_svd(a, 50, n_iter=2, rng=0).S,
        "slra subspace": lambda: slra.randomized_svd(a, 50, method="subspace", rng=0).S,
        "svds": lambda: np.sort(svds(a, 50, random_state=0)[1])[::-1],
        "svds propack": lambda: np.sort(svds(a, 50, solver="propack", random_state=0)[1])[::-1],
        "scikit-learn": lambda: randomized_svd(a, 50, random_state=0)[1],
    }
    results = compare(functions, exact, 1)
    unit = sum(a.shape) * 58 * 8
    for name in ("slra", "slra subspace"):
        tracemalloc.start()
        functions[name]()
        results[name]["peak_over_(m+n)*l*itemsize"] = tracemalloc.get_traced_memory()[1] / unit
        tracemalloc.stop()
    return results


def sizes() -> dict[str, Any]:
    """Tall, wide and small ones beside the best that others have for each, on one thread and two."""
    import scipy.sparse as sp
    import torch
    from scipy.sparse.linalg import svds
    from sklearn.decomposition import PCA
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    tall = rng.standard_normal((1_000_000, 100))
    wide = sp.random(330, 500_000, density=0.003, random_state=0, format="csr")
    batch = torch.from_numpy(rng.standard_normal((512, 64, 48)).astype("float32"))
    cases: dict[str, tuple[Any, int, dict[str, Callable[[], Any]]]] = {
        "1000000x100, rank 10": (
            np.linalg.eigvalsh(tall.T @ tall)[::-1][:10] ** 0.5,
            5,
            {
                "slra": lambda: slra.randomized_svd(tall, 10, rng=0).S,
                "PCA, covariance_eigh, centred, no U": lambda: (
                    PCA(10, svd_solver="covariance_eigh").fit(tall).singular_values_
                ),
            },
        ),
        "sparse 330x500000, rank 100": (
            np.linalg.eigvalsh((wide @ wide.T).toarray())[::-1][:100] ** 0.5,
            5,
            {
                "slra": lambda: slra.randomized_svd(wide, 100, rng=0).S,
                "svds": lambda: np.sort(svds(wide, 100, random_state=0)[1])[::-1],
                "svds propack": lambda: np.sort(
                    svds(wide, 100, solver="propack", random_state=0)[1]
                )[::-1],
            },
        ),
        "torch 512x64x48, rank 16": (
            singular_values(batch)[:, :16],
            5,
            {
                "slra": lambda: slra.randomized_svd(batch, 16, rng=0).S,
                "slra subspace 2": lambda: (
                    slra.randomized_svd(batch, 16, method="subspace", n_iter=2, rng=0).S
                ),
                "torch.linalg.svd": lambda: torch.linalg.svd(batch, full_matrices=False)[1],
                "torch.svd_lowrank": lambda: torch.svd_lowrank(batch, 24, niter=2)[1],
            },
        ),
    }
    results = {}
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            for name, (exact, repeats, functions) in cases.items():
                results[f"{name}, {threads} threads"] = compare(functions, exact, repeats)
    torch.set_num_threads(before)
    return results


def plot(points: dict[str, Any]) -> None:
    """Draw error against time, a line for each library."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines: dict[str, list[tuple[float, float]]] = {}
    for name, point in points.items():
        lines.setdefault(name.rsplit(" ", 1)[0], []).append(
            (point["seconds"], point["sigma_error"])
        )
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, line in lines.items():
        axes.loglog(*zip(*line, strict=True), "o-", label=name)
    axes.set(
        xlabel="seconds (median of 3)",
        ylabel="largest relative error of a singular value",
        title="3000 x 1500, float64, rank 200, sigma_i = 1/i",
    )
    axes.legend()
    figure.savefig(RESULTS / "svd.png", dpi=120)


SECTIONS = {
    "accuracy": accuracy,
    "curve": curve,
    "batches": batches,
    "tolerance": tolerance,
    "dask": dask,
    "sparse": sparse,
    "sizes": sizes,
}


def main(names: list[str]) -> None:
    """Run sections and merge them into the file of results."""
    path = RESULTS / "svd.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in names or SECTIONS:
        results[name] = SECTIONS[name]()
        print(name, json.dumps(results[name], indent=1))
        save("svd", {key: results[key] for key in SECTIONS if key in results})
        if name == "curve":
            plot(results[name])


if __name__ == "__main__":
    main(sys.argv[1:])
