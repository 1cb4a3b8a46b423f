r"""Coordinates to round keys and values in: an error of one costs the same in each.

A score :math:`q \cdot k` changes by :math:`q' \cdot e` where coordinates of k change by e. Scaled by the second moment
of the queries, :math:`E[q' q'^T] = 1`, so that each coordinate may have the same step; rotated to the axes of the keys
themselves, a few of them take most of the bits. Values are rotated only, to axes in which a value counts by the square
of the attention it receives.

Errors in these units add up over the heads of a layer, so the heads may be rotated together: what they have in common
is stored once.
"""

import math
from typing import NamedTuple

import numpy as np

from slra._backends.standard.bits import TOKENS, bits_of_widths
from slra._typing import Array, Namespace
from slra.attn._estimators import (
    N_MOMENT_ROWS,
    RowSample,
    _of_key_heads,
    _pooled,
    _some_queries,
)
from slra.attn.problem import AttentionProblem, ungroup_heads
from slra.attn.rotary import turns_by
from slra.attn.rows import row_weights, sample_rows, shown, take_rows

__all__ = ["Coding", "bits_at", "fit_coding", "steps_for"]

# Rows of attention by which values are weighted. From 128 rows of a key head on the error hardly changes (SmolLM2:
# .382, .384 and .384 at 2.5 bits with 384, 768 and 3072).
N_ROWS = 384
# Distances from which a query is looked at where a rotation is still to come.
N_DISTANCES = 4
GOLDEN = (math.sqrt(5) - 1) / 2
# The least second moment of queries, of the largest: a direction that no query had may come up yet.
LEAST_MOMENT = 1e-6
# What is added to the weights of values, together: those that got no attention may get some yet.
LEAST_WEIGHT = 1e-2
# Steps that bits are counted at, in root mean squares of the coordinates of a head.
STEPS = 2.0 ** (3 - np.arange(33) / 2)
# Blocks of tokens that bits are counted on, at most.
N_BLOCKS = 256


class Coding(NamedTuple):
    r"""Maps to and from the coordinates, :math:`k' = (k - c) W_k` and :math:`v' = (v - \mu) W_v`.

    Attributes
    ----------
    wq, wk : array, shape (..., Hkv, D, D)
        :math:`W_q W_k^T = 1`, and :math:`q' = q W_q` have the second moment 1.
    wv : array, shape (..., Hkv, Dv, Dv)
        Orthogonal.
    c : array, shape (..., Hkv, 1, D)
    mu : array, shape (..., Hkv, 1, Dv)
    importance_k : array, shape (..., Hkv, D)
        :math:`E[q_j'^2] \operatorname{var}(k_j')`, in descending order.
    importance_v : array, shape (..., Hkv, Dv)
        :math:`\operatorname{var}(v_j')`.
    rate_k, rate_v : array, shape (..., Hkv, 33)
        Bits that a number of the fit took, rounded by steps of 8, 8 / sqrt 2, 4, ... times the root of the mean
        importance.
    rotary : array, shape (..., Hkv, F)
        Frequencies of the rotation that keys are still to go through, see `fit_attention`; F = 0: none.

    Notes
    -----
    Across heads there are Hkv D coordinates of the keys and Hkv Dv of the values, which all heads share:
    :math:`k' = \sum_h (k_h - c_h) W_{k,h}` and :math:`k_h = k' W_{q,h}^T + c_h`. The maps have shape
    (..., Hkv, D, Hkv D) and (..., Hkv, Dv, Hkv Dv); all from importance on has 1 in the place of Hkv. They are those of
    each head, in units of equal cost, followed by a rotation of all heads: an error is as long in k' as the errors of
    the heads are together, each in the units of its own queries, and no head is off by more than all of them.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> coding = slra.fit_attention(q, k, v, 8).coding
    >>> bool(np.allclose(coding.wq @ coding.wk.swapaxes(-1, -2), np.eye(8)))
    True
    """

    wq: Array
    wk: Array
    wv: Array
    c: Array
    mu: Array
    importance_k: Array
    importance_v: Array
    rate_k: Array
    rate_v: Array
    rotary: Array


def fit_coding(
    problem: AttentionProblem,
    *,
    pool_batch: bool,
    across_heads: bool,
    rotary: tuple[float, ...] | None = None,
) -> Coding:
    """Fit to the keys that get attention, and to the queries, of a problem whose leading axes are equal.

    A rotation by these frequencies is still to come.
    """
    backend, xp, k = problem.backend, problem.xp, problem.k
    q = _some_queries(problem, RowSample([]))
    if rotary is not None:
        q = _queries_from_afar(problem, rotary)
        problem = _rotated(problem, rotary)
    n_rows = -(-N_ROWS // problem.n_shared)
    sample = RowSample(sample_rows(problem.q.shape[-2], n_rows, None), pool_batch)
    rows = row_weights(problem, take_rows(problem.q, sample.rows, backend), problem.k, sample.rows)
    rows = _of_key_heads(rows, xp)
    seen = xp.astype(xp.max(rows, axis=-2) > 0, rows.dtype)[..., None]
    received = _pooled(xp.sum(rows * rows, axis=-2)[..., None], sample, xp)
    q, k, v, seen = (_pooled(x, sample, xp) for x in (q, k, problem.v, seen))
    seen, received = _shares(seen, xp), _shares(received, xp)
    received = _shares(received + LEAST_WEIGHT * seen, xp)
    wq, wk, c, k = _key_axes(q, k, seen, problem, across_heads=across_heads)
    wv, mu, v = _value_axes(v, received, problem, across_heads=across_heads)
    if across_heads:
        seen = xp.mean(seen, axis=-4, keepdims=True)
    has_heads = any(problem.with_heads)
    importance = [xp.sum(x * x * seen, axis=-2)[..., None, :] for x in (k, v)]
    # What no query sees is as good as not there: of padding a cache has no blocks.
    is_seen = np.any(backend.to_numpy(seen)[..., 0] > 0, axis=tuple(range(seen.ndim - 2)))
    at = backend.from_numpy(np.flatnonzero(is_seen | ~np.any(is_seen)), k, backend.place_dtype)
    rates = [
        _rates(xp.take(x, at, axis=-2), one, problem)
        for x, one in zip((k, v), importance, strict=True)
    ]
    named = [ungroup_heads(x, has_heads, backend) for x in (wq, wk, wv, c, mu)]
    frequencies = backend.from_numpy(np.asarray(rotary or (), dtype=np.float64), k)
    frequencies = frequencies + xp.zeros_like(rates[0][..., :1])
    rows_of_numbers = [
        ungroup_heads(x, has_heads, backend)[..., 0, :] for x in (*importance, *rates, frequencies)
    ]
    return Coding(*named, *rows_of_numbers)


def _rotated(problem: AttentionProblem, rotary: tuple[float, ...]) -> AttentionProblem:
    """Rotate queries and keys by their places."""
    backend, n_keys = problem.backend, problem.k.shape[-2]
    q, k = (
        backend.rotated(x, *turns_by(places, rotary, x, backend))
        for x, places in (
            (problem.q, np.arange(problem.q.shape[-2]) + _first_place(problem)),
            (problem.k, np.arange(n_keys)),
        )
    )
    return problem._replace(q=q, k=k)


def _queries_from_afar(problem: AttentionProblem, rotary: tuple[float, ...]) -> Array:
    """Take queries as keys see them: turned by the distance of N_DISTANCES of the keys that each query sees."""
    backend, xp, n_keys = problem.backend, problem.xp, problem.k.shape[-2]
    rows = sample_rows(problem.q.shape[-2], N_MOMENT_ROWS, None)
    q, places = take_rows(problem.q, rows, backend), np.asarray(rows) + _first_place(problem)
    seen = shown(problem, rows)
    is_seen = np.ones((1, 1), dtype=bool) if seen is None else backend.to_numpy(seen)
    n_before = np.cumsum(
        np.broadcast_to(is_seen, (*is_seen.shape[:-1], n_keys)), axis=-1, dtype=np.int32
    )
    turned = []
    for offset in np.arange(N_DISTANCES) / N_DISTANCES:
        # By the golden ratio, as rows are.
        shares = (np.arange(len(rows)) * GOLDEN + offset) % 1
        keys = np.sum(n_before <= shares[:, None] * n_before[..., -1:], axis=-1)
        turned.append(backend.rotated(q, *turns_by(places - keys, rotary, q, backend)))
    return _of_key_heads(xp.concat(turned, axis=-2), xp)


def _first_place(problem: AttentionProblem) -> int:
    """Place of the first query among the keys."""
    return problem.options.diagonal(problem.q.shape[-2], problem.k.shape[-2])


def _key_axes(
    q: Array, k: Array, seen: Array, problem: AttentionProblem, *, across_heads: bool
) -> tuple[Array, Array, Array, Array]:
    """Both maps, the mean, and the coordinates of the keys."""
    backend, xp = problem.backend, problem.xp
    # Squares are to stay in range.
    transposed, scale, scale_q = xp.matrix_transpose, _peak(k, xp), _peak(q, xp)
    q, k = q / scale_q, k / scale
    w, u = backend.small_eigh(transposed(q) @ q / q.shape[-2])
    largest = xp.max(w, axis=-1, keepdims=True)
    least = xp.where(largest > 0, largest * LEAST_MOMENT, xp.ones_like(largest))
    root = xp.sqrt(xp.maximum(w, least))[..., None, :]
    c = transposed(seen) @ k
    axes, small = _axes((k - c) @ (u * root), seen, (scale, scale_q), problem, across_heads)
    wq, wk = (u / root) @ axes / scale_q, (u * root) @ axes * scale_q
    return wq, wk, c * scale, small


def _value_axes(
    v: Array, weights: Array, problem: AttentionProblem, *, across_heads: bool
) -> tuple[Array, Array, Array]:
    """Orthogonal axes, the mean, and the coordinates of the values."""
    xp = problem.xp
    scale = _peak(v, xp)
    v = v / scale
    mu = xp.matrix_transpose(weights) @ v
    axes, small = _axes(v - mu, weights, (scale,), problem, across_heads)
    return axes, mu * scale, small


def _axes(
    x: Array,
    weights: Array,
    scales: tuple[Array, ...],
    problem: AttentionProblem,
    across_heads: bool,
) -> tuple[Array, Array]:
    """Principal axes of weighted rows (..., H, 1, n, d), which are to be scaled, and their coordinates in these.

    Across heads axes are (..., H, 1, d, H d), the part of each head, and coordinates (..., 1, 1, n, H d).
    """
    backend, xp = problem.backend, problem.xp
    shape = x.shape
    if across_heads:
        # A row that a head does not see tells nothing of it; which heads see it hardly ever differs.
        x = xp.where(weights > 0, x, xp.zeros_like(x))
        # Of scales of heads only the ratios matter; their products may leave the range.
        largest = tuple(xp.max(one, axis=-4, keepdims=True) for one in scales)
        for one, most in zip(scales, largest, strict=True):
            x = x * (one / most)
        x, scales = beside(x, xp), largest
        weights = xp.mean(weights, axis=-4, keepdims=True)
    _, axes = backend.small_eigh(xp.matrix_transpose(x * weights) @ x)
    axes = xp.flip(axes, axis=-1)
    small = x @ axes
    for scale in scales:
        small = small * scale
    return (xp.reshape(axes, (*shape[:-2], shape[-1], -1)) if across_heads else axes), small


def beside(x: Array, xp: Namespace) -> Array:
    """Lay what heads have of a token side by side, (..., H, 1, n, d) to (..., 1, 1, n, H d)."""
    *lead, h, _, n, d = x.shape
    axes = range(len(lead))
    x = xp.permute_dims(x, (*axes, len(lead) + 1, len(lead) + 2, len(lead), len(lead) + 3))
    return xp.reshape(x, (*lead, 1, 1, n, h * d))


def _peak(x: Array, xp: Namespace) -> Array:
    peak = xp.max(xp.abs(x), axis=(-2, -1), keepdims=True)
    return xp.where(peak > 0, peak, xp.ones_like(peak))


def _shares(weights: Array, xp: Namespace) -> Array:
    """Make weights along the second last axis sum to one; equal ones of zeros."""
    total = xp.sum(weights, axis=-2, keepdims=True)
    even = xp.ones_like(weights) / weights.shape[-2]
    return xp.where(total > 0, weights / xp.where(total > 0, total, xp.ones_like(total)), even)


def _rates(x: Array, importance: Array, problem: AttentionProblem) -> Array:
    """Count bits of a number, (..., H, 1, 1, steps), of coordinates (..., H, 1, n, d)."""
    backend, xp = problem.backend, problem.xp
    *lead, n, d = x.shape
    size = min(n, TOKENS)
    n_blocks = n // size
    blocks = xp.reshape(x[..., : n_blocks * size, :], (*lead, n_blocks, size, d))
    every = -(-n_blocks // N_BLOCKS)
    low, high = (backend.to_numpy(f(blocks[..., ::every, :, :], axis=-2)) for f in (xp.min, xp.max))
    rms = unit_of(backend.to_numpy(importance))[..., None]
    rates = [bits_at(low, high, step * rms) for step in STEPS]
    return backend.from_numpy(np.stack(rates, axis=-1)[..., None, :], x)


def unit_of(importance: Array) -> Array:
    """Root of the mean importance, 1 for zeros."""
    mean = np.mean(importance, axis=-1)
    return np.sqrt(np.where(mean > 0, mean, 1.0))


def bits_at(low: Array, high: Array, step: Array) -> Array:
    """Count bits of a number, (...,), in blocks of such extremes (..., blocks, d), rounded by a step (..., 1, 1)."""
    # The sizes of a block are those of its extremes, rounded.
    return np.mean(bits_of_widths(np.rint(low / step), np.rint(high / step), np), axis=(-2, -1))


def steps_for(bits: float, importance: Array, rates: Array) -> Array:
    """Choose the steps, (...,), at which numbers like those of the fit take so many bits."""
    steps = np.empty(rates.shape[:-1])
    for at in np.ndindex(*steps.shape):
        one = np.asarray(rates[at], dtype=np.float64)
        # From where on bits fall no more, all is zero. Beyond the last step each bit halves it.
        steps[at] = np.interp(bits, one, np.log2(STEPS)) - max(0.0, bits - one[-1])
    return unit_of(importance) * 2.0**steps
