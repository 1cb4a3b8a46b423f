"""What error a basis will make, and the smallest ranks that meet a tolerance, from rows of the attention matrix."""

from typing import NamedTuple

import numpy as np

from slra._typing import Array, Namespace
from slra.attn._estimators import Factors
from slra.attn.maps import Maps, carry_shift
from slra.attn.problem import AttentionProblem
from slra.attn.rows import Rows, row_weights, take_rows

__all__ = ["Ranks", "choose_ranks", "mask_ranks", "output_error"]

Ranks = tuple[tuple[int, int], ...]

# Ranks of queries and keys that are tried at most; each costs as much as the sampled rows.
N_TRIALS = 64


class ExactRows(NamedTuple):
    """Sampled rows, with what their errors are relative to."""

    rows: Rows
    q: Array  # (..., H, G, S, D)
    centred: Array  # output less mu, over the norm of the output, (..., H, G, S, Dv)
    norm: Array  # (..., H, G, 1, 1)
    axes: tuple[int, ...]  # over which errors are summed


def output_error(
    problem: AttentionProblem,
    maps: Maps,
    rows: Rows,
    counted: Array | None = None,
    *,
    pool_batch: bool,
) -> Array:
    """Relative Frobenius error of these rows of the output, or of those ``counted`` (..., H, G, S), (..., H, G)."""
    exact = _exact_rows(problem, maps.mu, rows, counted, pool_batch=pool_batch)
    error = _approximate_rows(problem, maps, exact) @ maps.uv
    if counted is not None:
        error = error * problem.xp.astype(counted, error.dtype)[..., None]
    error = error - exact.centred
    return problem.xp.sqrt(problem.xp.sum(error * error, axis=exact.axes))


def choose_ranks(
    problem: AttentionProblem,
    factors: Factors,
    rows: Rows,
    rtol: float,
    limits: tuple[int, int],
    *,
    pool_batch: bool,
) -> Ranks:
    """Return for each key head the pair of ranks with the smallest sum whose error is within ``rtol``.

    The error is that of the worst query head and batch element, on these rows; where no pair meets the tolerance, the
    largest is taken.
    """
    limit_qk, limit_v = limits
    chosen = [limits] * factors.wk.shape[-4]
    exact = _exact_rows(problem, factors.mu, rows, pool_batch=pool_batch)
    step = -(-limit_qk // N_TRIALS)
    for rank_qk in sorted({limit_qk, *range(step, limit_qk, step)}):
        errors = _errors(problem, factors, exact, rank_qk)[..., :limit_v]
        for head, rank_v in enumerate(_first_within(errors, rtol, problem.xp)):
            if rank_v and rank_qk + rank_v < sum(chosen[head]):
                chosen[head] = rank_qk, rank_v
    return tuple(chosen)


def mask_ranks(factors: Factors, ranks: Ranks, problem: AttentionProblem) -> Factors:
    """Zero the columns of each head beyond its ranks."""
    xp, backend = problem.xp, problem.backend

    def mask(x: Array, which: int) -> Array:
        numbers = backend.from_numpy(
            np.asarray([pair[which] for pair in ranks]), x, backend.place_dtype
        )
        columns = xp.arange(x.shape[-1], device=backend.creation_device(x))
        return x * xp.astype(columns < numbers[:, None], x.dtype)[:, None, None, :]

    return factors._replace(
        left=mask(factors.left, 0), wk=mask(factors.wk, 0), wv=mask(factors.wv, 1)
    )


def _exact_rows(
    problem: AttentionProblem,
    mu: Array,
    rows: Rows,
    counted: Array | None = None,
    *,
    pool_batch: bool,
) -> ExactRows:
    """Compute some rows of the output; pooled over the batch, the error is that of the whole batch."""
    q = take_rows(problem.q, rows, problem.backend)
    weights = row_weights(problem, q, problem.k, rows)
    if counted is not None:
        weights = weights * problem.xp.astype(counted, weights.dtype)[..., None]
    axes = (*range(q.ndim - 4), -2, -1) if pool_batch else (-2, -1)
    norm = _norm(weights @ problem.v, axes, problem.xp)
    centred = weights @ (problem.v - mu) / norm
    return ExactRows(rows, q, centred, norm, axes)


def _approximate_rows(problem: AttentionProblem, maps: Maps, exact: ExactRows) -> Array:
    """Compute the same rows under the maps, over the same norm, in the coordinates of ``wv``."""
    q, k = exact.q @ maps.wq, (problem.k - maps.c) @ maps.wk
    if problem.options.softcap is not None:
        q, k = carry_shift(maps, exact.q, q, k, problem.xp)
    v = (problem.v - maps.mu) @ maps.wv
    return row_weights(problem, q, k, exact.rows) @ v / exact.norm


def _errors(problem: AttentionProblem, factors: Factors, exact: ExactRows, rank_qk: int) -> Array:
    r"""Relative error at this rank of queries and keys and every rank of values, (..., H, G, p).

    With orthonormal columns :math:`w_j` its square at rank r is
    :math:`\sum_{j \le r} \|(\hat O - O) w_j\|^2 + \sum_{j > r} \|(O - \mu) w_j\|^2`, and what lies beyond all columns.
    """
    xp = problem.xp
    maps = factors.maps(((rank_qk, factors.wv.shape[-1]),), xp)
    wanted = exact.centred @ maps.wv
    beyond = exact.centred - wanted @ maps.uv
    beyond = xp.sum(beyond * beyond, axis=exact.axes)[..., None]
    lost = _approximate_rows(problem, maps, exact) - wanted
    across = exact.axes[:-1]
    lost, wanted = xp.sum(lost * lost, axis=across), xp.sum(wanted * wanted, axis=across)
    kept = xp.cumulative_sum(lost, axis=-1)
    dropped = xp.flip(xp.cumulative_sum(xp.flip(wanted, axis=-1), axis=-1), axis=-1) - wanted
    return xp.sqrt(beyond + kept + dropped)


def _first_within(errors: Array, rtol: float, xp: Namespace) -> list[int]:
    """Return for each key head the first rank at which all its errors are within ``rtol``; 0 if there is none."""
    within = xp.all(errors <= rtol, axis=(*range(errors.ndim - 3), -2))
    first = xp.argmax(xp.astype(within, xp.int32), axis=-1) + 1
    first = xp.where(xp.any(within, axis=-1), first, 0)
    return [int(first[head]) for head in range(first.shape[0])]


def _norm(x: Array, axes: tuple[int, ...], xp: Namespace) -> Array:
    """Frobenius norm without overflow; 1 for zero."""
    peak = xp.max(xp.abs(x), axis=axes, keepdims=True)
    scaled = x / _nonzero(peak, xp)
    return _nonzero(xp.sqrt(xp.sum(scaled * scaled, axis=axes, keepdims=True)) * peak, xp)


def _nonzero(x: Array, xp: Namespace) -> Array:
    return xp.where(x == 0, xp.ones_like(x), x)
