"""A sample of the rows of the attention matrix: what a fit looks at instead of all of it."""

import math

import numpy as np

from slra._backends import Backend
from slra._backends.standard.attention import capped, hide
from slra._typing import Array
from slra.attn.problem import AttentionProblem

__all__ = ["row_weights", "sample_rows", "take_rows"]


def sample_rows(
    n: int, n_rows: int, rng: np.random.Generator | None, *, offset: float = 0.0
) -> list[int]:
    """One row from each of ``n_rows`` equal strata, by a generator or, without one, by the golden ratio.

    A fixed stride would meet only one phase of a periodic sequence. Another ``offset`` gives other rows.
    """
    n_rows = min(n, n_rows)
    strata = np.arange(n_rows)
    place = (strata * (math.sqrt(5) - 1) / 2 + offset) % 1 if rng is None else rng.random(n_rows)
    return [int(row) for row in (strata + place) * n / n_rows]


def take_rows(x: Array, rows: list[int], backend: Backend) -> Array:
    """Cut rows out along the second last axis."""
    if len(rows) == x.shape[-2]:
        return x
    return backend.xp.take(x, _indices(rows, x, backend), axis=-2)


def _indices(rows: list[int], like: Array, backend: Backend) -> Array:
    return backend.from_numpy(np.asarray(rows), like, backend.xp.int64)


def row_weights(problem: AttentionProblem, q: Array, k: Array, rows: list[int]) -> Array:
    """Rows of the attention matrix, (..., H, G, S, Nk), under the mask and options of a problem; an empty row is 0.

    ``q`` (..., H, G, S, D) has these rows only; it and ``k`` (..., H, 1, Nk, D) may be projections of the problem's.
    """
    backend, xp, options, mask = problem.backend, problem.xp, problem.options, problem.mask
    n_keys, seen = k.shape[-2], None
    scores = capped(xp, (q * options.scale) @ xp.matrix_transpose(k), options.softcap)
    device = backend.creation_device(scores)
    places = _indices(rows, scores, backend)[:, None]
    keys = xp.arange(n_keys, device=device)[None, :]
    if options.alibi is not None:
        distances = xp.abs(places + options.position - keys)
        scores = scores - options.alibi * xp.astype(distances, scores.dtype)
    if mask is not None and mask.shape[-2] > 1:
        mask = take_rows(mask, rows, backend)
    if options.is_causal:
        seen = keys <= places + options.diagonal(problem.q.shape[-2], n_keys)
    if options.first is not None:
        is_late = keys >= places + options.first
        seen = is_late if seen is None else seen & is_late
    scores = hide(xp, scores, mask, seen)
    peak = xp.max(scores, axis=-1, keepdims=True)
    weights = xp.exp(scores - xp.where(peak == -math.inf, xp.zeros_like(peak), peak))
    total = xp.sum(weights, axis=-1, keepdims=True)
    if problem.sinks is not None:
        shift = xp.where(peak == -math.inf, xp.zeros_like(peak), peak)
        total = total + xp.exp(problem.sinks[..., None, None] - shift)
    return weights / xp.where(total == 0, xp.ones_like(total), total)
