"""Singular value decompositions."""

from typing import Any

from benchmarks.markdown import duration, scientific, significant, table

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


def tables(result: dict[str, Any]) -> dict[str, str]:
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


def statements(result: dict[str, Any]) -> dict[str, list[str]]:
    sparse, batches = result["sparse"], result["batches"]
    memory = {
        name: f"{sparse[name]['peak_over_(m+n)*l*itemsize']:.1f} times"
        for name in ("slra", "slra subspace")
    }
    ratios = [one["ratio"] for one in result["tolerance"].values()]
    by_tolerance = f"{min(ratios):.1f} to {max(ratios):.1f} times"
    over_svds = [
        significant(sparse["svds"]["seconds"] / sparse[name]["seconds"])
        for name in ("slra", "slra krylov 2")
    ]
    over_torch = [
        significant(one["slra on torch"]["seconds"] / one["torch.svd_lowrank"]["seconds"])
        for one in batches.values()
    ]
    of_torch = [significant(one["torch.svd_lowrank"]["sigma_error"]) for one in batches.values()]
    tall, torch_batch = result["tall_1"], result["torch_1"]
    behind = {
        "tall": (tall["slra"], tall["PCA, covariance_eigh, centred, no U"]),
        "auto": (torch_batch["slra"], torch_batch["torch.svd_lowrank, 8 more columns 2"]),
        "subspace": (
            torch_batch["slra subspace 2"],
            torch_batch["torch.svd_lowrank, 8 more columns 2"],
        ),
    }
    over = {
        name: significant(ours["seconds"] / theirs["seconds"])
        for name, (ours, theirs) in behind.items()
    }
    return {
        "docs/svd.md": [
            f"Extra memory there is {memory['slra']} that of `rank + oversamples` vectors on both sides, "
            f'{memory["slra subspace"]} with `method="subspace"`',
            f"By tolerance a call takes {by_tolerance} one that is told the rank",
        ],
        "docs/performance.md": [
            f"1,000,000 x 100, rank 10, takes {over['tall']} times as long as scikit-learn's PCA",
            f"512 matrices of 64 x 48 on torch, rank 16, take {over['auto']} times as long as",
            f'`method="subspace"` {over["subspace"]} times',
            f"{over_svds[0]} times as fast as SciPy's `svds` with default arguments and {over_svds[1]} times with",
            f"take {over_torch[0]} and {over_torch[1]} times as long as `torch.svd_lowrank`, whose singular values "
            f"are off by up to {of_torch[0]} and {of_torch[1]}",
            f"takes {by_tolerance} as long as one that is told the rank",
        ],
    }
