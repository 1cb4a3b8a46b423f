"""What is compared: a problem, who solves it, and how wrong a solution is. Each is made when its turn comes."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any, NamedTuple

import numpy as np

import slra
from slra.cli.bench.problems import (
    Array,
    attention_inputs,
    matrix_with,
    naive_attention,
    sigma_error,
    textbook_nuclear,
    textbook_soft_threshold,
)
from slra.cli.demo import relative_errors
from slra.cli.timing import REST, rounds

__all__ = ["COMPARISONS", "N_ROUNDS", "Comparison", "Row", "measure"]

N_ROUNDS = 5
# Rows of the output of attention that are checked against double precision.
N_CHECKED = 256

Call = Callable[[], Any]


class Comparison(NamedTuple):
    """A problem and the functions that solve it; the first is slra's."""

    name: str
    problem: str
    error_is: str
    calls: dict[str, Call | None]  # None where the library is not installed
    error: Callable[[Any], float]


class Row(NamedTuple):
    """One function on one problem; seconds is empty and error None where it is not installed."""

    name: str
    seconds: list[float]
    error: float | None

    @property
    def median(self) -> float | None:
        """Median seconds."""
        return median(self.seconds) if self.seconds else None


def measure(comparison: Comparison, advance: Callable[[], object] = lambda: None) -> list[Row]:
    """Run all in turn, once to warm up and to see the error, then N_ROUNDS times; `advance` after each round."""
    calls = {name: call for name, call in comparison.calls.items() if call is not None}
    errors = {name: comparison.error(call()) for name, call in calls.items()}
    advance()
    spent = rounds(list(calls.values()), N_ROUNDS, advance=advance, rest=REST)
    seconds = dict(zip(calls, spent, strict=True))
    return [Row(name, seconds.get(name, []), errors.get(name)) for name in comparison.calls]


def svd(m: int = 2000, n: int = 1000, rank: int = 60) -> Comparison:
    """One matrix with singular values 1, 1/2, 1/3, ..."""
    U, sigma, Vh = matrix_with(1 / np.arange(1.0, n + 1), m)
    x = ((U * sigma) @ Vh).astype(np.float32)
    sklearn = _installed("sklearn.utils.extmath")
    return Comparison(
        "randomized SVD",
        f"{m} x {n}, float32, sigma_i = 1/i, rank {rank}",
        "of a singular value, largest relative",
        {
            "slra.randomized_svd": lambda: slra.randomized_svd(x, rank, rng=0).S,
            "numpy.linalg.svd": lambda: np.linalg.svd(x, full_matrices=False)[1][:rank],
            "scikit-learn randomized_svd": sklearn
            and (lambda: sklearn.randomized_svd(x, rank, random_state=0)[1]),
        },
        lambda S: sigma_error(S, sigma[:rank]),
    )


def batched_svd(shape: tuple[int, int, int] = (96, 1024, 64), rank: int = 16) -> Comparison:
    """Many matrices of noise, with vectors."""
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    exact = np.linalg.svd(x.astype(np.float64), compute_uv=False)[:, :rank]
    sklearn, torch = _installed("sklearn.utils.extmath"), _installed("torch")
    t = torch and torch.from_numpy(x)
    return Comparison(
        "SVD of a batch",
        f"{' x '.join(map(str, shape))}, float32, noise, rank {rank}",
        "of a singular value, largest relative",
        {
            "slra.randomized_svd": lambda: slra.randomized_svd(x, rank, rng=0).S,
            "numpy.linalg.svd": lambda: np.linalg.svd(x, full_matrices=False)[1][:, :rank],
            "scikit-learn randomized_svd, in a loop": sklearn
            and (
                lambda: np.stack(
                    [sklearn.randomized_svd(one, rank, random_state=0)[1] for one in x]
                )
            ),
            "slra.randomized_svd on torch": torch
            and (lambda: slra.randomized_svd(t, rank, rng=0).S),
            "torch.svd_lowrank": torch and (lambda: torch.svd_lowrank(t, rank)[1]),
        },
        lambda S: sigma_error(S, exact),
    )


def soft_threshold(n: int = 4_000_000) -> Comparison:
    """Shrink many numbers towards zero."""
    x = np.random.default_rng(0).standard_normal(n, dtype=np.float32)
    exact = textbook_soft_threshold(x.astype(np.float64), 1.0)
    return Comparison(
        "soft threshold",
        f"{n} numbers, float32",
        "largest",
        {
            "slra.soft_threshold": lambda: slra.soft_threshold(x, 1.0),
            "sign(x) * max(|x| - tau, 0)": lambda: textbook_soft_threshold(x, 1.0),
        },
        lambda out: float(np.max(np.abs(out - exact))),
    )


def nuclear(m: int = 1000, n: int = 800, rank: int = 10) -> Comparison:
    """Shrink singular values of 500 and more over others of 1, which vanish."""
    values = np.concatenate([np.linspace(1000, 500, rank), np.ones(n - rank)])
    U, sigma, Vh = matrix_with(values, m)
    x, tau = (U * sigma) @ Vh, 100.0
    exact = (U * np.maximum(sigma - tau, 0)) @ Vh
    pyproximal = _installed("pyproximal")
    other = pyproximal and pyproximal.Nuclear((m, n), sigma=1.0)
    return Comparison(
        "prox of the nuclear norm",
        f"{m} x {n}, float64, {rank} singular values above the threshold",
        "relative, Frobenius",
        {
            "slra.prox.prox_nuclear": lambda: slra.prox.prox_nuclear(x, tau, rng=0),
            "by a full SVD, numpy": lambda: textbook_nuclear(x, tau),
            "pyproximal.Nuclear": pyproximal and (lambda: other.prox(x.ravel(), tau)),
        },
        lambda out: float(relative_errors(np.reshape(out, (m, n)), exact)),
    )


def exact_attention(n: int = 4096, heads: int = 4, d: int = 128) -> Comparison:
    """Attention on noise."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, heads, n, d), dtype=np.float32)
    return Comparison(
        "exact attention",
        f"{heads} heads, {n} tokens, d = {d}, float32",
        "relative, Frobenius, worst head",
        {
            "slra.attention": lambda: slra.attention(q, k, v),
            "the formula, numpy, in place": lambda: naive_attention(q, k, v),
            "torch scaled_dot_product_attention": _sdpa(q, k, v),
        },
        _output_error(q, k, v),
    )


def low_rank_attention(n: int = 8192, heads: int = 4, d: int = 128, rank: int = 32) -> Comparison:
    """Attention on queries, keys and values that are near a low rank."""
    q, k, v = attention_inputs(1 / np.arange(1.0, d + 1), n, heads)
    basis = slra.fit_attention(q, k, v, rank)
    torch = _installed("torch")
    tq, tk, tv = (torch and torch.from_numpy(x) for x in (q, k, v))
    return Comparison(
        "low-rank attention",
        f"{heads} heads, {n} tokens, d = {d}, float32, singular values as 1/i, rank {rank}",
        "relative, Frobenius, worst head",
        {
            "slra.low_rank_attention, fit included": lambda: slra.low_rank_attention(
                q, k, v, rank=rank
            ),
            "the same, basis fitted before": lambda: basis.attend(q, k, v),
            "slra.attention, exact": lambda: slra.attention(q, k, v),
            "slra.low_rank_attention on torch, fit included": torch
            and (lambda: slra.low_rank_attention(tq, tk, tv, rank)),
            "torch scaled_dot_product_attention, exact": _sdpa(q, k, v),
        },
        _output_error(q, k, v),
    )


COMPARISONS: tuple[Callable[[], Comparison], ...] = (
    svd,
    batched_svd,
    soft_threshold,
    nuclear,
    exact_attention,
    low_rank_attention,
)


def _installed(module: str) -> Any:
    """Return the module, or None where it cannot be imported."""
    try:
        return import_module(module)
    except ImportError:
        return None


def _sdpa(q: Array, k: Array, v: Array) -> Call | None:
    torch = _installed("torch")
    if torch is None:
        return None
    # With the batch axis, without which the fused kernel is not taken.
    tensors = [torch.from_numpy(x)[None] for x in (q, k, v)]
    return lambda: torch.nn.functional.scaled_dot_product_attention(*tensors)[0]


def _output_error(q: Array, k: Array, v: Array) -> Callable[[Any], float]:
    """Error of the worst head, on evenly spaced rows, against the formula in double precision."""
    rows = np.unique(np.linspace(0, q.shape[-2] - 1, N_CHECKED).astype(int))
    exact = naive_attention(*(x.astype(np.float64) for x in (q[:, rows], k, v)))
    return partial(_worst_head, rows=rows, exact=exact)


def _worst_head(out: Any, rows: Array, exact: Array) -> float:
    return float(relative_errors(np.asarray(out)[:, rows].astype(np.float64), exact).max())
