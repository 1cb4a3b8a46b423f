"""Singular value decompositions: accuracy against time, side by side with what else there is.

Run as ``python -m benchmarks.svd [section ...]``; sections are ``accuracy``, ``curve``, ``batches``, ``tolerance``,
``dask``, ``sparse``, and ``tall``, ``wide`` and ``torch`` followed by ``_1`` or ``_2``, the number of threads. Writes
``benchmarks/results/svd.json`` (section by section) and ``svd.png``, in about ten minutes.
"""

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import slra
from benchmarks.common import RESULTS, earlier, interleaved, save, table
from benchmarks.markdown import duration, scientific, significant, span
from slra.cli.bench.problems import matrix_with, sigma_error


def matrix(m: int, n: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Matrix with singular values 1, 1/2, 1/3, ... and random singular vectors."""
    U, sigma, Vh = matrix_with(1 / np.arange(1.0, n + 1), m, seed)
    return ((U * sigma) @ Vh).astype(dtype)


def compare(
    functions: dict[str, Callable[[], Any]], exact: np.ndarray, repeats: int = 5
) -> dict[str, Any]:
    """Time functions that return singular values, in turn, and say how wrong each is."""
    found: dict[str, Any] = {}

    def keeping(name: str) -> Callable[[], None]:
        def call() -> None:
            found[name] = functions[name]()

        return call

    seconds = interleaved({name: keeping(name) for name in functions}, repeats)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "sigma_error": sigma_error(np.asarray(found[name])[..., : exact.shape[-1]], exact),
        }
        for name in functions
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


def tall() -> dict[str, Any]:
    """1,000,000 x 100, rank 10, noise, float64."""
    from sklearn.decomposition import PCA

    a = np.random.default_rng(0).standard_normal((1_000_000, 100))
    return compare(
        {
            "slra": lambda: slra.randomized_svd(a, 10, rng=0).S,
            "PCA, covariance_eigh, centred, no U": lambda: (
                PCA(10, svd_solver="covariance_eigh").fit(a).singular_values_
            ),
        },
        np.linalg.eigvalsh(a.T @ a)[::-1][:10] ** 0.5,
        3,
    )


def wide() -> dict[str, Any]:
    """330 x 500,000, sparse, rank 100, float64."""
    import scipy.sparse as sp
    from scipy.sparse.linalg import svds

    a = sp.random(330, 500_000, density=0.003, random_state=0, format="csr")
    return compare(
        {
            "slra": lambda: slra.randomized_svd(a, 100, rng=0).S,
            "svds": lambda: np.sort(svds(a, 100, random_state=0)[1])[::-1],
            "svds propack": lambda: np.sort(svds(a, 100, solver="propack", random_state=0)[1])[
                ::-1
            ],
        },
        np.linalg.eigvalsh((a @ a.T).toarray())[::-1][:100] ** 0.5,
        1,
    )


def torch_batch() -> dict[str, Any]:
    """512 x 64 x 48 on torch, rank 16, noise, float32."""
    import torch

    a = torch.from_numpy(np.random.default_rng(0).standard_normal((512, 64, 48)).astype("float32"))
    return compare(
        {
            "slra": lambda: slra.randomized_svd(a, 16, rng=0).S,
            "slra subspace 2": lambda: (
                slra.randomized_svd(a, 16, method="subspace", n_iter=2, rng=0).S
            ),
            "torch.linalg.svd": lambda: torch.linalg.svd(a, full_matrices=False)[1],
            "torch.svd_lowrank, 8 more columns 2": lambda: torch.svd_lowrank(a, 24, niter=2)[1],
        },
        singular_values(a)[:, :16],
        9,
    )


def on_threads(section: Callable[[], dict[str, Any]], n_threads: int) -> dict[str, Any]:
    """Run a section with so many threads in every library."""
    import scipy.sparse.linalg  # noqa: F401  (limits hold for what is loaded)
    import sklearn.utils.extmath  # noqa: F401
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        with threadpool_limits(n_threads):
            return section()
    finally:
        torch.set_num_threads(before)


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
    "sparse": sparse,
    **{
        f"{name}_{n_threads}": partial(on_threads, section, n_threads)
        for name, section in (("tall", tall), ("wide", wide), ("torch", torch_batch))
        for n_threads in (1, 2)
    },
}


COMPARED = ("numpy", "scipy", "scikit-learn", "torch")
OTHERS = {
    "2000 x 1000, 1/i, rank 60, float32": ("accuracy", "float32", ("scikit-learn",)),
    "the same, float64": ("accuracy", "float64", ("scikit-learn",)),
    "3000 x 1500, 1/i, rank 200, float64": (
        "curve",
        None,
        ("slra krylov 3", "scikit-learn 2", "torch.svd_lowrank 6", "fbpca 2"),
    ),
    "96 x 2048 x 64, noise, rank 16, float32": ("batches", "96x2048x64", ()),
    "512 x 64 x 48, noise, rank 16, float32": ("batches", "512x64x48", ()),
    "sparse, 200,000 x 50,000, 10^7 entries, rank 50": ("sparse", None, ()),
}


SIZES = {
    "tall": "1,000,000 x 100, noise, rank 10, float64",
    "wide": "sparse, 330 x 500,000, rank 100, float64",
    "torch": "torch, 512 x 64 x 48, noise, rank 16, float32",
}


def tables(result: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for problem, (section, part, names) in OTHERS.items():
        runs = result[section] if part is None else result[section][part]
        ours = "slra krylov 4" if section == "curve" else "slra"
        for name in (ours, *(names or [name for name in runs if name != ours])):
            run, first = runs[name], runs[ours]
            title = problem if name == ours else ""
            times = significant(run["seconds"] / first["seconds"])
            error = scientific(run["sigma_error"], 2)
            rows.append((title, _label(name), duration(run["seconds"]), times, error))
    head = ["problem", "by", "time", "over slra", "largest error of a singular value"]
    return {"measured": table(head, rows, "llrrr"), "sizes": _sizes(result)}


def _sizes(result: dict[str, Any]) -> str:
    """Problems at one and two threads, those that were measured."""
    rows = []
    for problem, title in SIZES.items():
        for n_threads in (1, 2):
            runs = result.get(f"{problem}_{n_threads}", {})
            for name, run in runs.items():
                first = f"{title}, {n_threads} thread{'s'[: n_threads - 1]}"
                times = significant(run["seconds"] / runs["slra"]["seconds"])
                error = scientific(run["sigma_error"], 2)
                cells = (_label(name), duration(run["seconds"]), times, error)
                rows.append((first if name == "slra" else "", *cells))
    head = ["problem", "by", "time", "over slra", "largest error of a singular value"]
    return table(head, rows, "llrrr")


def _label(name: str) -> str:
    """Names that end in a number say how many iterations were asked for."""
    library, _, number = name.rpartition(" ")
    return f"{library}, `n_iter={number}`" if number.isdigit() else name


def losses(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Where another library is faster, or a rank would be."""
    found = [one["ratio"] for one in result["tolerance"].values()]
    rows = [("by `rtol`", "by a rank that is known", span(found))]
    for shape, one in result["batches"].items():
        theirs = one["torch.svd_lowrank"]
        beside = f"`torch.svd_lowrank`, off by {significant(theirs['sigma_error'])}"
        ratio = significant(one["slra on torch"]["seconds"] / theirs["seconds"])
        rows.append((f"batch of {shape.replace('x', ' x ')} on torch, exact here", beside, ratio))
    tall, batch = result["tall_1"], result["torch_1"]
    pca = tall["slra"]["seconds"] / tall["PCA, covariance_eigh, centred, no U"]["seconds"]
    rows.append(
        ("1,000,000 x 100, rank 10", "`PCA`, covariance_eigh, without `U`", significant(pca))
    )
    theirs = batch["torch.svd_lowrank, 8 more columns 2"]["seconds"]
    ratios = [significant(batch[name]["seconds"] / theirs) for name in ("slra", "slra subspace 2")]
    beside = "`torch.svd_lowrank`, 8 more columns, `niter=2`"
    return [
        *rows,
        ("512 x 64 x 48 on torch, one thread, exact here", beside, ratios[0]),
        ('the same, `method="subspace"`', beside, ratios[1]),
    ]


def says(result: dict[str, Any]) -> list[str]:
    memory = [
        f"{result['sparse'][name]['peak_over_(m+n)*l*itemsize']:.1f} times"
        for name in ("slra", "slra subspace")
    ]
    return [
        f"Extra memory there is {memory[0]} that of `rank + oversamples` vectors on both sides, "
        f'{memory[1]} with `method="subspace"`'
    ]


def main(names: list[str]) -> None:
    """Run sections and merge them into the file of results."""
    results = earlier("svd")
    for name in names or SECTIONS:
        results[name] = SECTIONS[name]()
        print(name, json.dumps(results[name], indent=1))
        save(
            "svd",
            results,
            tables,
            losses=losses,
            says=says,
            compared=COMPARED,
            parts=("accuracy", "curve", "batches", "tolerance", "sparse", "tall_1", "torch_1"),
        )
        if name == "curve":
            plot(results[name])


if __name__ == "__main__":
    main(sys.argv[1:])
