"""On a GPU: kernels against copy bandwidth and CuPy's own operations, SVD and attention against cuSOLVER and PyTorch.

Run as ``python -m benchmarks.gpu`` on a machine with CuPy, and PyTorch with CUDA for the comparisons with it. All is
timed side by side in one process, each sample between two synchronisations, as medians. With ``--dry-run`` everything
runs once on a machine without a GPU, tiny and on NumPy in the place of CuPy; nothing is written.
"""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import slra
from benchmarks.common import interleaved, save
from slra._backends import Backend, backend_of
from slra._backends.standard.attention import SoftmaxState


class Libraries(NamedTuple):
    """CuPy, its array API namespace and its sparse matrices; PyTorch or None, and how to wait for it."""

    cp: Any
    xp: Any
    sparse: Any
    torch: Any
    wait_for_torch: Callable[[], Any]


class Sizes(NamedTuple):
    """How large the problems are; calls to a sample, so that one is long beside a launch."""

    n_entries: int = 1 << 26
    groups: tuple[int, int] = (1 << 16, 1 << 10)
    scores: tuple[int, int, int] = (8, 1024, 4096)
    svd: tuple[int, int, int] = (512, 2048, 64)
    rank: int = 16
    sparse: tuple[int, int, int] = (20000, 5000, 10)
    heads: int = 8
    n: int = 16384
    d: int = 128
    calls: int = 20
    repeats: int = 7


TINY = Sizes(64, (8, 4), (2, 4, 8), (3, 50, 40), 4, (30, 20, 5), 2, 16, 8, 1, 1)


def medians(
    libraries: Libraries, functions: dict[str, Callable[[], Any]], calls: int, repeats: int
) -> dict[str, float]:
    """Median seconds of one call of each function, in turn."""

    def sample(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            for _ in range(calls):
                function()
            libraries.cp.cuda.get_current_stream().synchronize()
            libraries.wait_for_torch()

        return run

    seconds = interleaved({name: sample(f) for name, f in functions.items()}, repeats)
    return {name: statistics.median(times) / calls for name, times in seconds.items()}


def bytes_held(cp: Any, functions: dict[str, Callable[[], Any]]) -> dict[str, int]:
    """Growth of CuPy's memory pool in one call of each of our functions."""
    pool, grown = cp.get_default_memory_pool(), {}
    for name, function in functions.items():
        if name.startswith("slra"):
            pool.free_all_blocks()
            before = pool.total_bytes()
            function()
            grown[name] = int(pool.total_bytes() - before)
    return grown


def ratios(seconds: dict[str, float], ours: str) -> dict[str, float]:
    """Time of each other function over ours."""
    return {name: value / seconds[ours] for name, value in seconds.items() if name != ours}


def elementwise(libraries: Libraries, sizes: Sizes) -> dict[str, Any]:
    """Soft threshold against copying, and the fused proximal-gradient step against CuPy's own expression."""
    # Not at the top: it takes CuPy, or what stands for it.
    from slra._backends.cupy_kernels import kernel

    cp = libraries.cp
    rng = cp.random.default_rng(0)
    x, grad = (rng.standard_normal(sizes.n_entries, dtype=cp.float32) for _ in range(2))
    target = cp.empty_like(x)
    table = backend_of(libraries.xp)
    step, tau = 0.1, 0.5

    def unfused() -> Any:
        moved = x - step * grad
        return cp.sign(moved) * cp.maximum(cp.abs(moved) - step * tau, 0)

    functions: dict[str, Callable[[], Any]] = {
        "copy": lambda: cp.copyto(target, x),
        "slra, soft_threshold": lambda: slra.soft_threshold(x, tau),
        "slra, fused step": lambda: table.soft_threshold_step(x, grad, step, tau),
        "unfused step": unfused,
        "slra, norm_l1": lambda: slra.prox.norm_l1(x),
        "sum of abs": lambda: cp.sum(cp.abs(x)),
        # One block of threads, unless CUB takes it.
        "norm_l1 as one reduction": lambda: kernel("sum_abs", x)(x),
    }
    seconds = medians(libraries, functions, sizes.calls, sizes.repeats)
    return {
        "entries": sizes.n_entries,
        "dtype": "float32",
        "seconds": seconds,
        "copy_bytes_per_second": 2 * x.nbytes / seconds["copy"],
        "soft_threshold_over_copy_bandwidth": seconds["copy"] / seconds["slra, soft_threshold"],
        "unfused_over_fused": seconds["unfused step"] / seconds["slra, fused step"],
        "bytes_held": bytes_held(cp, functions),
    }


def steps(libraries: Libraries, sizes: Sizes) -> dict[str, Any]:
    """Fused steps of the three operators that are known by name, against CuPy's own expressions; a loop of FISTA."""
    cp, table = libraries.cp, backend_of(libraries.xp)
    rng = cp.random.default_rng(0)
    x, grad = (rng.standard_normal(sizes.n_entries, dtype=cp.float32) for _ in range(2))
    step, tau, l2 = 0.1, 0.5, 2.0

    def unfused_elastic() -> Any:
        moved = x - step * grad
        shrunk = cp.sign(moved) * cp.maximum(cp.abs(moved) - step * tau, 0)
        return shrunk / (1 + step * tau * l2)

    def fista(prox: Callable[..., Any], **options: Any) -> Callable[[], Any]:
        def smooth(y: Any) -> tuple[float, Any]:
            return 0.0, y - grad

        return lambda: slra.proximal_gradient(
            x, smooth, prox, step=step, tol=None, max_iter=10, **options
        )

    functions: dict[str, Callable[[], Any]] = {
        "slra, nonneg": lambda: table.nonneg_threshold_step(x, grad, step, tau),
        "unfused nonneg": lambda: cp.maximum(x - step * grad - step * tau, 0),
        "slra, elastic net": lambda: table.elastic_threshold_step(x, grad, step, tau, l2),
        "unfused elastic net": unfused_elastic,
        "slra, 10 iterations, prox_l1": fista(slra.prox.prox_l1, weight=tau),
        "slra, 10 iterations, any callable": fista(lambda y, t: slra.prox.prox_l1(y, tau * t)),
    }
    seconds = medians(libraries, functions, max(1, sizes.calls // 10), sizes.repeats)
    return {
        "entries": sizes.n_entries,
        "dtype": "float32",
        "seconds": seconds,
        "unfused_over_fused": {
            name: seconds[f"unfused {name}"] / seconds[f"slra, {name}"]
            for name in ("nonneg", "elastic net")
        },
        "bytes_held": bytes_held(cp, functions),
    }


def half(libraries: Libraries, sizes: Sizes) -> dict[str, Any]:
    """What half precision saves: as many entries as in `elementwise`, in half the bytes."""
    cp = libraries.cp
    rng = cp.random.default_rng(0)
    x = rng.standard_normal(sizes.n_entries, dtype=cp.float32).astype(cp.float16)
    target = cp.empty_like(x)
    functions: dict[str, Callable[[], Any]] = {
        "copy": lambda: cp.copyto(target, x),
        "slra, soft_threshold": lambda: slra.soft_threshold(x, 0.5),
        "by way of float32": lambda: slra.soft_threshold(x.astype(cp.float32), 0.5).astype(x.dtype),
        "slra, norm_l1": lambda: slra.prox.norm_l1(x),
    }
    seconds = medians(libraries, functions, sizes.calls, sizes.repeats)
    return {
        "entries": sizes.n_entries,
        "dtype": "float16",
        "seconds": seconds,
        "soft_threshold_over_copy_bandwidth": seconds["copy"] / seconds["slra, soft_threshold"],
        "bytes_held": bytes_held(cp, functions),
    }


def groups(libraries: Libraries, sizes: Sizes) -> dict[str, Any]:
    """Thresholds of rows by their norms, against the array API reference, which is CuPy's own operations."""
    cp = libraries.cp
    x = cp.random.default_rng(0).standard_normal(sizes.groups, dtype=cp.float32)
    reference = Backend(libraries.xp)
    functions: dict[str, Callable[[], Any]] = {
        "slra, prox_l21": lambda: slra.prox.prox_l21(x, 1.0, axis=-1),
        "reference": lambda: reference.group_threshold(x, 1.0, (1,)),
    }
    seconds = medians(libraries, functions, sizes.calls, sizes.repeats)
    over = ratios(seconds, "slra, prox_l21")
    held = bytes_held(cp, functions)
    return {"shape": sizes.groups, "seconds": seconds, "over_slra": over, "bytes_held": held}


def softmax(libraries: Libraries, sizes: Sizes) -> dict[str, Any]:
    """One tile of the online softmax, against the reference: CUB's maxima and sums, and four operations more."""
    cp, rng = libraries.cp, libraries.cp.random.default_rng(0)
    scores = rng.standard_normal(sizes.scores, dtype=cp.float32)
    v = rng.standard_normal((sizes.scores[0], sizes.scores[2], sizes.d), dtype=cp.float32)
    zeros = cp.zeros_like(scores[..., 0])
    state = SoftmaxState(zeros, zeros, cp.zeros_like(scores @ v))
    ours, reference = backend_of(libraries.xp), Backend(libraries.xp)
    functions: dict[str, Callable[[], Any]] = {
        "slra": lambda: ours.softmax_step(state, scores, v),
        "reference": lambda: reference.softmax_step(state, scores, v),
    }
    seconds = medians(libraries, functions, sizes.calls, sizes.repeats)
    return {"shape": sizes.scores, "seconds": seconds, "over_slra": ratios(seconds, "slra")}


def batched_svd(libraries: Libraries, sizes: Sizes) -> dict[str, Any]:
    """A batch of tall matrices at a low rank, with the error of each method beside its time."""
    cp, torch = libraries.cp, libraries.torch
    batch, m, n = sizes.svd
    rng = cp.random.default_rng(0)
    x = rng.standard_normal((batch, m, n), dtype=cp.float32)
    x *= cp.asarray([0.8**i for i in range(n)], dtype=cp.float32)
    functions: dict[str, Callable[[], Any]] = {
        "slra.randomized_svd": lambda: slra.randomized_svd(x, sizes.rank, rng=0),
        "slra.truncated_svd": lambda: slra.truncated_svd(x, sizes.rank),
        "cupy.linalg.svd": lambda: cp.linalg.svd(x, full_matrices=False),
    }
    if torch is not None:
        t = torch.from_dlpack(x)
        functions["torch.svd_lowrank"] = lambda: torch.svd_lowrank(t, q=sizes.rank)
    seconds = medians(libraries, functions, 1, sizes.repeats)
    errors = {name: product_error(cp, x, f(), sizes.rank) for name, f in functions.items()}
    return {
        "shape": sizes.svd,
        "rank": sizes.rank,
        "dtype": "float32",
        "seconds": seconds,
        "relative_error": errors,
        "over_slra": ratios(seconds, "slra.randomized_svd"),
        "bytes_held": bytes_held(cp, functions),
    }


def product_error(cp: Any, x: Any, factors: Any, rank: int) -> float:
    """Relative Frobenius error of the product of the leading factors (``torch.svd_lowrank`` returns V, not V^H)."""
    u, s, last = (cp.asarray(factor) for factor in factors)
    vh = last if last.shape[-1] == x.shape[-1] else cp.swapaxes(last, -1, -2)
    product = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
    return float(cp.linalg.norm(x - product) / cp.linalg.norm(x))


def small_svd(libraries: Libraries, sizes: Sizes, dtype: str) -> dict[str, Any]:
    """All singular triplets of a batch of square matrices, by eigenvalue problems and by CuPy's loop."""
    cp = libraries.cp
    batch, _, n = sizes.svd
    x = cp.random.default_rng(0).standard_normal((batch, n, n), dtype=cp.float64).astype(dtype)
    table = backend_of(libraries.xp)
    functions: dict[str, Callable[[], Any]] = {
        "slra": lambda: table.small_svd(x),
        "cupy.linalg.svd": lambda: cp.linalg.svd(x, full_matrices=False),
    }
    seconds = medians(libraries, functions, 1, sizes.repeats)
    return {
        "shape": (batch, n, n),
        "seconds": seconds,
        "relative_error": {name: product_error(cp, x, f(), n) for name, f in functions.items()},
        "over_slra": ratios(seconds, "slra"),
        "bytes_held": bytes_held(cp, functions),
    }


def sparse_svd(libraries: Libraries, sizes: Sizes) -> dict[str, Any]:
    """A sparse matrix against cupyx.scipy.sparse.linalg.svds."""
    cp, sparse = libraries.cp, libraries.sparse
    m, n, per_row = sizes.sparse
    x = sparse.random(m, n, density=per_row / n, format="csr", dtype=cp.float32)
    functions: dict[str, Callable[[], Any]] = {
        "slra.randomized_svd": lambda: slra.randomized_svd(x, sizes.rank, rng=0),
        "cupyx svds": lambda: sparse.linalg.svds(x, sizes.rank),
    }
    seconds = medians(libraries, functions, 1, sizes.repeats)
    return {
        "shape": (m, n),
        "nnz": int(x.nnz),
        "seconds": seconds,
        "leading_value": {name: float(cp.max(f()[1])) for name, f in functions.items()},
        "over_slra": ratios(seconds, "slra.randomized_svd"),
        "bytes_held": bytes_held(cp, functions),
    }


def attention(libraries: Libraries, sizes: Sizes, dtype: str) -> dict[str, Any]:
    """Attention at a quarter of the dimensions, exact attention, and PyTorch's; memory of ours."""
    cp, torch = libraries.cp, libraries.torch
    rng = cp.random.default_rng(0)
    shape = (sizes.heads, sizes.n, sizes.d)
    q, k, v = (rng.standard_normal(shape, dtype=cp.float32).astype(dtype) for _ in range(3))
    rank = sizes.d // 4
    basis = slra.fit_attention(q, k, v, rank, rng=0)
    functions: dict[str, Callable[[], Any]] = {
        "slra, rank d/4, fit included": lambda: slra.low_rank_attention(q, k, v, rank),
        "slra, rank d/4, basis given": lambda: basis.attend(q, k, v),
        "slra, exact": lambda: slra.attention(q, k, v),
    }
    if torch is not None:
        tensors = [torch.from_dlpack(x)[None] for x in (q, k, v)]
        sdpa = torch.nn.functional.scaled_dot_product_attention
        functions["torch SDPA, full d"] = lambda: sdpa(*tensors)
    seconds = medians(libraries, functions, 1, sizes.repeats)
    return {
        "shape": shape,
        "dtype": dtype,
        "seconds": seconds,
        "over_slra_fit_included": ratios(seconds, "slra, rank d/4, fit included"),
        "over_slra_basis_given": ratios(seconds, "slra, rank d/4, basis given"),
        "bytes_held": bytes_held(cp, functions),
        "bytes_of_scores_and_weights": 2 * sizes.heads * sizes.n**2 * 4,
    }


def measure(libraries: Libraries, sizes: Sizes) -> dict[str, Any]:
    """Measure all, with the card and versions."""
    cp, torch = libraries.cp, libraries.torch
    card = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)["name"].decode()
    result: dict[str, Any] = {
        "card": card,
        "cupy": cp.__version__,
        "cuda_runtime": cp.cuda.runtime.runtimeGetVersion(),
        "torch": None if torch is None else torch.__version__,
        "elementwise": elementwise(libraries, sizes),
        "steps": steps(libraries, sizes),
        "half": half(libraries, sizes),
        "groups": groups(libraries, sizes),
        "softmax": softmax(libraries, sizes),
        "batched_svd": batched_svd(libraries, sizes),
        "small_svd": {t: small_svd(libraries, sizes, t) for t in ("float32", "float64")},
        "sparse_svd": sparse_svd(libraries, sizes),
        "attention": {t: attention(libraries, sizes, t) for t in ("float32", "float16")},
    }
    return {**result, "asked": asked(result)}


def asked(result: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """What was hoped for beside what came; None where PyTorch sees no GPU."""
    kernels, svd = result["elementwise"], result["batched_svd"]["over_slra"]
    sdpa = result["attention"]["float32"]["over_slra_fit_included"].get("torch SDPA, full d")
    pairs = {
        "soft threshold over copy bandwidth": (0.85, kernels["soft_threshold_over_copy_bandwidth"]),
        "unfused over fused proximal-gradient step": (2.5, kernels["unfused_over_fused"]),
        "torch.svd_lowrank over batched randomized_svd": (10.0, svd.get("torch.svd_lowrank")),
        "torch SDPA at d over attention at rank d/4, fit included": (1.0, sdpa),
    }
    return {name: {"at_least": least, "measured": value} for name, (least, value) in pairs.items()}


def on_gpu() -> Libraries | str:
    """CuPy and whatever else sees a GPU, or why nothing does."""
    try:
        import cupy
    except ImportError:
        return 'CuPy is not installed: pip install ".[cupy]" in a clone'
    if not cupy.is_available():
        return "no usable CUDA device"
    import array_api_compat.cupy as xp
    import cupyx.scipy.sparse
    import cupyx.scipy.sparse.linalg

    torch = _torch()
    if torch is None or not torch.cuda.is_available():
        return Libraries(cupy, xp, cupyx.scipy.sparse, None, lambda: None)
    return Libraries(cupy, xp, cupyx.scipy.sparse, torch, torch.cuda.synchronize)


@contextlib.contextmanager
def on_host() -> Iterator[Libraries]:
    """NumPy and SciPy in the place of CuPy, kernels compiled by g++, PyTorch on the CPU."""
    import scipy.sparse
    import scipy.sparse.linalg

    from tests.cuda_host.host import cupy_on_host

    with cupy_on_host() as xp:
        import cupy

        yield Libraries(cupy, xp, scipy.sparse, _torch(), lambda: None)


def _torch() -> Any:
    """PyTorch, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return torch


def main(arguments: list[str]) -> int:
    """Measure all and write the results, or say why not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="run everything, without a GPU")
    if parser.parse_args(arguments).dry_run:
        with on_host() as libraries:
            json.dumps(measure(libraries, TINY))
        print("dry run: everything ran; nothing measured, nothing written")
        return 0
    libraries = on_gpu()
    if isinstance(libraries, str):
        print(f"{libraries}: nothing measured, nothing written")
        return 1
    measured = measure(libraries, Sizes())
    print(save("gpu", measured, keep=measured).read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
