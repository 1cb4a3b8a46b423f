"""The measurements of ``python -m slra demo``: error, size and time of low-rank attention."""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import slra
from slra.cli.backends import Backend
from slra.cli.timing import rounds
from slra.data import AttentionSample

__all__ = [
    "MAP_HEAD",
    "MAP_RANK",
    "MAP_TOKENS",
    "METHODS",
    "N_ROUNDS",
    "RANKS",
    "Comparison",
    "Row",
    "compare",
    "count_calls",
    "factor_bytes",
    "interleaved_medians",
    "relative_errors",
]

METHODS = ("svd", "scores", "output")
RANKS = (4, 8, 16, 24, 32)
N_ROUNDS = 5
# The map is drawn for the middle rank and, as the heads go from easy to hard, the middle head.
MAP_RANK = 16
MAP_HEAD = 3
# A sentence or two: few enough tokens for their names to be read.
MAP_TOKENS = 32

Call = Callable[[], Any]


class Row(NamedTuple):
    """Low-rank attention by one method at one rank."""

    method: str
    rank: int
    errors: NDArray[np.float64]  # per head, relative Frobenius
    kv_bytes: int
    seconds: float

    @property
    def median_error(self) -> float:
        """Median over the heads."""
        return float(np.median(self.errors))

    @property
    def worst_error(self) -> float:
        """Maximum over the heads."""
        return float(self.errors.max())


class Comparison(NamedTuple):
    """All rows, and exact attention to hold them against."""

    backend: str
    shape: tuple[int, int, int]  # heads, tokens, d
    rows: list[Row]
    exact_kv_bytes: int
    exact_seconds: float
    exact_map: NDArray[np.float32]  # softmax weights of head MAP_HEAD, its first MAP_TOKENS
    low_rank_map: NDArray[np.float32]  # the same by the last method at rank MAP_RANK


def count_calls() -> int:
    """How often `compare` calls `advance`."""
    return N_ROUNDS + 1


def compare(backend: Backend, sample: AttentionSample, advance: Callable[[], object]) -> Comparison:
    """Measure every method at every rank against exact attention.

    Parameters
    ----------
    backend : Backend
        The array library that computes.
    sample : AttentionSample
        Float32 heads; they move to the backend once, outside the timings.
    advance : callable
        Called without arguments as the work goes on, `count_calls` times.
    """
    q, k, v = (backend.from_numpy(x) for x in sample[:3])
    cases = [(method, rank) for method in METHODS for rank in RANKS]
    calls: list[Call] = [partial(slra.attention, q, k, v)]
    calls += [
        partial(slra.low_rank_attention, q, k, v, rank, method=method) for method, rank in cases
    ]
    # These calls also compile and warm up what the timings should not see.
    exact, *outs = (backend.to_numpy(call()).astype(np.float64) for call in calls)
    advance()
    exact_seconds, *seconds = interleaved_medians(calls, backend.wait, advance)

    shape = sample.k.shape
    rows = [
        Row(method, rank, relative_errors(out, exact), 2 * factor_bytes(shape, rank, method), spent)
        for (method, rank), out, spent in zip(cases, outs, seconds, strict=True)
    ]
    maps = attention_maps(backend, q[MAP_HEAD : MAP_HEAD + 1], k[MAP_HEAD : MAP_HEAD + 1])
    kv_bytes = sample.k.nbytes + sample.v.nbytes
    return Comparison(backend.name, shape, rows, kv_bytes, exact_seconds, *maps)


def interleaved_medians(
    calls: list[Call], wait: Callable[[Any], object], advance: Callable[[], object]
) -> list[float]:
    """Median seconds of each call over N_ROUNDS rounds."""
    return [median(spent) for spent in rounds(calls, N_ROUNDS, wait, advance)]


def relative_errors(out: NDArray[Any], exact: NDArray[Any]) -> NDArray[np.float64]:
    """Relative Frobenius error of each head, (..., tokens, d) to (...); absolute where the output is 0."""
    difference = np.linalg.norm(out - exact, axis=(-2, -1))
    norm = np.linalg.norm(exact, axis=(-2, -1))
    return np.asarray(difference / np.where(norm == 0, 1, norm))


def factor_bytes(shape: tuple[int, int, int], rank: int, method: str, itemsize: int = 4) -> int:
    """Bytes of rank-`rank` factors of K or V: n x r coordinates, a d x r basis and a shift."""
    n_heads, n_tokens, d = shape
    n_shift = 0 if method == "svd" else d
    return n_heads * ((n_tokens + d) * rank + n_shift) * itemsize


def attention_maps(backend: Backend, q: Any, k: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Softmax weights of one head (1, tokens, d) on the first keys, exact and of low rank.

    Attention returns the weights themselves where V holds columns of the identity, at full rank,
    so the map is that of the very function the table measures.
    """
    columns = backend.from_numpy(np.eye(k.shape[-2], MAP_TOKENS, dtype=np.float32)[None])
    exact = slra.attention(q, k, columns)
    low_rank = slra.low_rank_attention(q, k, columns, (MAP_RANK, MAP_TOKENS), method=METHODS[-1])
    return backend.to_numpy(exact)[0, :MAP_TOKENS], backend.to_numpy(low_rank)[0, :MAP_TOKENS]
