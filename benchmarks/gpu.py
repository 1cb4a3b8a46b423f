"""On a GPU: kernels against copy bandwidth and unfused CuPy, SVD and attention against cuSOLVER and PyTorch, memory.

Run as ``python -m benchmarks.gpu`` on a machine with CuPy, and PyTorch with CUDA for the comparisons with it. All is
timed side by side in one process, each sample between two synchronisations, as medians.
"""

import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import slra
from benchmarks.common import interleaved, save
from slra._backends import primitives


class Sizes(NamedTuple):
    """How large the problems are; calls to a sample, so that one is long beside a launch."""

    n_entries: int = 1 << 26
    svd: tuple[int, int, int] = (512, 2048, 64)
    rank: int = 16
    sparse: tuple[int, int, int] = (20000, 5000, 10)
    heads: int = 8
    n: int = 16384
    d: int = 128
    calls: int = 20


def synchronize(cp: Any) -> None:
    """Wait for the device."""
    cp.cuda.get_current_stream().synchronize()


def medians(
    cp: Any,
    functions: dict[str, Callable[[], Any]],
    calls: int,
    wait: Callable[[], Any] | None = None,
) -> dict[str, float]:
    """Median seconds of one call of each function, in turn; ``wait`` is for work of another library."""

    def sample(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            for _ in range(calls):
                function()
            synchronize(cp)
            if wait is not None:
                wait()

        return run

    seconds = interleaved({name: sample(f) for name, f in functions.items()})
    return {name: statistics.median(times) / calls for name, times in seconds.items()}


def elementwise(cp: Any, xp: Any, sizes: Sizes) -> dict[str, Any]:
    """Soft threshold against copying, and the fused proximal-gradient step against CuPy's own expression."""
    rng = cp.random.default_rng(0)
    x, grad = (rng.standard_normal(sizes.n_entries, dtype=cp.float32) for _ in range(2))
    target = cp.empty_like(x)
    table = primitives(xp)
    step, tau = 0.1, 0.5

    def unfused() -> Any:
        moved = x - step * grad
        return cp.sign(moved) * cp.maximum(cp.abs(moved) - step * tau, 0)

    seconds = medians(
        cp,
        {
            "copy": lambda: cp.copyto(target, x),
            "soft_threshold": lambda: slra.soft_threshold(x, tau),
            "fused step": lambda: table.soft_threshold_step(x, grad, step, tau),
            "unfused step": unfused,
        },
        sizes.calls,
    )
    return {
        "entries": sizes.n_entries,
        "dtype": "float32",
        "seconds": seconds,
        "copy_bytes_per_second": 2 * x.nbytes / seconds["copy"],
        "soft_threshold_over_copy_bandwidth": seconds["copy"] / seconds["soft_threshold"],
        "unfused_over_fused": seconds["unfused step"] / seconds["fused step"],
    }


def batched_svd(cp: Any, torch: Any, sizes: Sizes) -> dict[str, Any]:
    """A batch of tall matrices at a low rank, with the error of each method beside its time."""
    batch, m, n = sizes.svd
    rng = cp.random.default_rng(0)
    x = rng.standard_normal((batch, m, n), dtype=cp.float32)
    x *= cp.asarray([0.8**i for i in range(n)], dtype=cp.float32)
    functions: dict[str, Callable[[], Any]] = {
        "slra.randomized_svd": lambda: slra.randomized_svd(x, sizes.rank, rng=0),
        "cupy.linalg.svd": lambda: cp.linalg.svd(x, full_matrices=False),
    }
    wait = None
    if torch is not None:
        t = torch.from_dlpack(x)
        functions["torch.svd_lowrank"] = lambda: torch.svd_lowrank(t, q=sizes.rank)
        wait = torch.cuda.synchronize
    seconds = medians(cp, functions, 1, wait)
    errors = {name: product_error(cp, x, f(), sizes.rank) for name, f in functions.items()}
    return {
        "shape": sizes.svd,
        "rank": sizes.rank,
        "seconds": seconds,
        "relative_error": errors,
        "over_slra": ratios(seconds, "slra.randomized_svd"),
    }


def product_error(cp: Any, x: Any, factors: Any, rank: int) -> float:
    """Relative Frobenius error of the product of the leading factors (``torch.svd_lowrank`` returns V, not V^H)."""
    u, s, last = (cp.asarray(factor) for factor in factors)
    vh = last if last.shape[-1] == x.shape[-1] else cp.swapaxes(last, -1, -2)
    product = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
    return float(cp.linalg.norm(x - product) / cp.linalg.norm(x))


def sparse_svd(cp: Any, sizes: Sizes) -> dict[str, Any]:
    """A sparse matrix against cupyx.scipy.sparse.linalg.svds."""
    import cupyx.scipy.sparse
    import cupyx.scipy.sparse.linalg

    m, n, per_row = sizes.sparse
    x = cupyx.scipy.sparse.random(m, n, density=per_row / n, format="csr", dtype=cp.float32)
    seconds = medians(
        cp,
        {
            "slra.randomized_svd": lambda: slra.randomized_svd(x, sizes.rank, rng=0),
            "cupyx svds": lambda: cupyx.scipy.sparse.linalg.svds(x, sizes.rank),
        },
        1,
    )
    return {"shape": (m, n), "nnz": int(x.nnz), "seconds": seconds}


def attention(cp: Any, torch: Any, sizes: Sizes) -> dict[str, Any]:
    """Attention at a quarter of the dimensions, exact attention, and PyTorch's; memory of ours."""
    rng = cp.random.default_rng(0)
    shape = (sizes.heads, sizes.n, sizes.d)
    q, k, v = (rng.standard_normal(shape, dtype=cp.float32) for _ in range(3))
    rank = sizes.d // 4
    functions: dict[str, Callable[[], Any]] = {
        "slra, rank d/4, fit included": lambda: slra.low_rank_attention(q, k, v, rank),
        "slra, exact in d/4 dimensions": lambda: slra.attention(
            *(x[..., :rank] for x in (q, k, v))
        ),
        "slra, exact": lambda: slra.attention(q, k, v),
    }
    wait = None
    if torch is not None:
        tensors = [torch.from_dlpack(x)[None] for x in (q, k, v)]
        sdpa = torch.nn.functional.scaled_dot_product_attention
        functions["torch SDPA, full d"] = lambda: sdpa(*tensors)
        wait = torch.cuda.synchronize
    seconds = medians(cp, functions, 1, wait)
    return {
        "shape": shape,
        "dtype": "float32",
        "seconds": seconds,
        "over_slra_rank_d/4": ratios(seconds, "slra, rank d/4, fit included"),
        "bytes_held": {
            name: bytes_held(cp, f) for name, f in functions.items() if name.startswith("slra")
        },
        "bytes_of_scores_and_weights": 2 * sizes.heads * sizes.n**2 * q.dtype.itemsize,
    }


def bytes_held(cp: Any, function: Callable[[], Any]) -> int:
    """Growth of the memory pool in one call."""
    pool = cp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    function()
    return int(pool.total_bytes() - before)


def ratios(seconds: dict[str, float], ours: str) -> dict[str, float]:
    """Time of each other function over ours."""
    return {name: value / seconds[ours] for name, value in seconds.items() if name != ours}


def with_cuda() -> Any:
    """PyTorch, where it sees a GPU; None elsewhere."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def main() -> int:
    """Measure all and write the results, or say why not."""
    try:
        import cupy as cp
    except ImportError:
        print("CuPy is not installed: pip install 'slra[cupy]'")
        return 1
    if not cp.is_available():
        print("no usable CUDA device: nothing measured, nothing written")
        return 1
    import array_api_compat.cupy as xp

    sizes, torch = Sizes(), with_cuda()
    properties = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)
    path = save(
        "gpu",
        {
            "card": properties["name"].decode(),
            "cupy": cp.__version__,
            "cuda_runtime": cp.cuda.runtime.runtimeGetVersion(),
            "torch": None if torch is None else torch.__version__,
            "elementwise": elementwise(cp, xp, sizes),
            "batched_svd": batched_svd(cp, torch, sizes),
            "sparse_svd": sparse_svd(cp, sizes),
            "attention": attention(cp, torch, sizes),
        },
    )
    print(path.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
