"""A sample of the rows of the attention matrix: what a fit looks at instead of all of it."""

import math
from typing import TypeAlias

import numpy as np

from slra._backends import Backend
from slra._backends.standard.attention import capped, hide
from slra._typing import Array
from slra.attn.problem import AttentionProblem

__all__ = ["Rows", "row_weights", "sample_rows", "sample_seen_rows", "shown", "take_rows"]

# Numbers of rows: the same for all heads, or an array (..., S), whose leading axes broadcast.
Rows: TypeAlias = "list[int] | Array"


def sample_rows(
    n: int, n_rows: int, rng: np.random.Generator | None, *, offset: float = 0.0
) -> list[int]:
    """One row from each of ``n_rows`` equal strata, by a generator or, without one, by the golden ratio.

    A fixed stride would meet only one phase of a periodic sequence. Another ``offset`` gives other rows.
    """
    if not isinstance(n, (int, np.integer)):
        raise ValueError(
            'method must be "svd" where the length of a sequence is a symbol, as in a graph for all lengths: '
            "the others fit to rows chosen by the length; or give a basis, fitted before"
        )
    n_rows = min(n, n_rows)
    return [int(row) for row in _places(n_rows, rng, offset) * n / n_rows]


def _places(n_rows: int, rng: np.random.Generator | None, offset: float) -> Array:
    strata = np.arange(n_rows)
    within = (strata * (math.sqrt(5) - 1) / 2 + offset) % 1 if rng is None else rng.random(n_rows)
    return strata + within


def sample_seen_rows(
    seen: Array | None,
    n: int,
    n_rows: int,
    rng: np.random.Generator | None,
    backend: Backend,
    *,
    offset: float = 0.0,
) -> Rows:
    """Sample as `sample_rows` from the queries that see something, (..., n), or all, each head from its own.

    Where there are fewer of them than rows, some are taken more than once; where there is none, the last query is.
    """
    if seen is None or n_rows >= n:
        return sample_rows(n, n_rows, rng, offset=offset)
    xp = backend.xp
    counts = xp.cumulative_sum(xp.astype(seen, xp.float32), axis=-1)
    # Each head has as many before a row as the share of its own.
    shares = backend.from_numpy(_places(n_rows, rng, offset) / n_rows, counts)
    # The row with t seen ones before it is the number of rows up to which no more than t are seen.
    before = xp.floor(shares * counts[..., -1:])
    rows = xp.sum(xp.astype(counts[..., None, :] <= before[..., None], xp.float32), axis=-1)
    return xp.astype(xp.minimum(rows, xp.full_like(rows, n - 1)), backend.place_dtype)


def take_rows(x: Array, rows: Rows, backend: Backend) -> Array:
    """Cut rows out along the second last axis."""
    if not isinstance(rows, list):
        missing = max(0, rows.ndim + 1 - x.ndim)
        return backend.gather_rows(backend.xp.reshape(x, (1,) * missing + tuple(x.shape)), rows)
    if len(rows) == x.shape[-2]:
        return x
    return backend.xp.take(x, _indices(rows, x, backend), axis=-2)


def _indices(rows: list[int], like: Array, backend: Backend) -> Array:
    return backend.from_numpy(np.asarray(rows), like, backend.place_dtype)


def shown(problem: AttentionProblem, rows: Rows) -> Array | None:
    """Say which keys these queries see, (..., S or 1, Nk or 1); None where they see all.

    An additive mask hides by -inf.
    """
    backend, xp, options, mask = problem.backend, problem.xp, problem.options, problem.mask
    n_queries, n_keys = problem.q.shape[-2], problem.k.shape[-2]
    seen = None
    if mask is not None:
        seen = take_rows(mask, rows, backend) if mask.shape[-2] > 1 else mask
        if mask.dtype != xp.bool:
            seen = seen != -math.inf
    if options.sees_all(n_queries, n_keys):
        return seen
    places, keys = _place_pair(problem, rows)
    if options.is_causal:
        before = keys <= places + options.diagonal(n_queries, n_keys)
        seen = before if seen is None else seen & before
    if options.first is not None:
        after = keys >= places + options.first
        seen = after if seen is None else seen & after
    return seen


def _place_pair(problem: AttentionProblem, rows: Rows) -> tuple[Array, Array]:
    """Places of these queries, (..., S, 1), and of all keys."""
    backend = problem.backend
    places = _indices(rows, problem.q, backend) if isinstance(rows, list) else rows
    like = {"dtype": backend.place_dtype, "device": backend.creation_device(problem.q)}
    return places[..., None], backend.xp.arange(problem.k.shape[-2], **like)


def row_weights(problem: AttentionProblem, q: Array, k: Array, rows: Rows) -> Array:
    """Rows of the attention matrix, (..., H, G, S, Nk), under the mask and options of a problem; an empty row is 0.

    ``q`` (..., H, G, S, D) has these rows only; it and ``k`` (..., H, 1, Nk, D) may be projections of the problem's.
    """
    backend, xp, options, mask = problem.backend, problem.xp, problem.options, problem.mask
    scores = capped(xp, (q * options.scale) @ xp.matrix_transpose(k), options.softcap)
    if options.alibi is not None:
        places, keys = _place_pair(problem, rows)
        distances = xp.abs(places + options.position - keys)
        scores = scores - options.alibi * xp.astype(distances, scores.dtype)
    added = None
    if mask is not None and mask.dtype != xp.bool:
        added = take_rows(mask, rows, backend) if mask.shape[-2] > 1 else mask
    scores = hide(xp, scores, added, shown(problem, rows))
    peak = xp.max(scores, axis=-1, keepdims=True)
    shift = xp.where(peak == -math.inf, xp.zeros_like(peak), peak)
    weights = xp.exp(scores - shift)
    total = xp.sum(weights, axis=-1, keepdims=True)
    if problem.sinks is not None:
        total = total + xp.exp(problem.sinks[..., None, None] - shift)
    return weights / xp.where(total == 0, xp.ones_like(total), total)
