"""The smallest ranks that meet a tolerance, head by head."""

import numpy as np

from slra._typing import Array
from slra.attn._maps import Factors, cut
from slra.attn._predict import ExactRows, GroupedMaps, approximate_rows, exact_rows
from slra.attn._rows import Grouped

__all__ = ["choose_ranks", "mask_ranks"]

# Ranks of queries and keys that are tried at most; each costs as much as the rows that are looked at.
N_TRIALS = 64


def choose_ranks(
    data: Grouped,
    factors: Factors,
    rows: list[int],
    rtol: float,
    limits: tuple[int, int],
    *,
    pool_batch: bool,
) -> list[tuple[int, int]]:
    """Return for each key head the pair of ranks with the smallest sum whose error is within ``rtol``.

    The error is that of the worst query head and batch element, on these rows; where no pair meets the tolerance, the
    largest is taken.
    """
    limit_qk, limit_v = limits
    chosen = [limits] * factors.wk.shape[-3]
    exact = exact_rows(data, factors.mu, rows, pool_batch=pool_batch)
    step = -(-limit_qk // N_TRIALS)
    for rank_qk in sorted({limit_qk, *range(step, limit_qk, step)}):
        errors = _errors(data, factors, exact, rank_qk)[..., :limit_v]
        for head, rank_v in enumerate(_first_within(errors, rtol, data)):
            if rank_v and rank_qk + rank_v < sum(chosen[head]):
                chosen[head] = rank_qk, rank_v
    return chosen


def _errors(data: Grouped, factors: Factors, exact: ExactRows, rank_qk: int) -> Array:
    r"""Relative error at this rank of queries and keys and every rank of values, (..., H, G, p).

    With orthonormal columns :math:`w_j` its square at rank r is
    :math:`\sum_{j \le r} \|(\hat O - O) w_j\|^2 + \sum_{j > r} \|(O - \mu) w_j\|^2`, and what lies beyond all columns.
    """
    backend, xp = data.backend, data.backend.xp
    wq, wk, wv = cut(factors, rank_qk, factors.wv.shape[-1], backend)
    maps = GroupedMaps(wq, wk, wv, factors.c, factors.mu)
    columns = wv[..., None, :, :]
    wanted = exact.centred @ columns
    beyond = exact.centred - wanted @ xp.matrix_transpose(columns)
    beyond = xp.sum(beyond * beyond, axis=exact.axes)[..., None]
    lost = approximate_rows(data, maps, exact) - wanted
    across = exact.axes[:-1]
    lost, wanted = (xp.sum(x * x, axis=across) for x in (lost, wanted))
    kept = xp.cumulative_sum(lost, axis=-1)
    dropped = xp.flip(xp.cumulative_sum(xp.flip(wanted, axis=-1), axis=-1), axis=-1) - wanted
    return xp.sqrt(beyond + kept + dropped)


def _first_within(errors: Array, rtol: float, data: Grouped) -> list[int]:
    """Return for each key head the first rank at which all its errors are within ``rtol``; 0 if there is none."""
    xp = data.backend.xp
    within = xp.all(errors <= rtol, axis=(*range(errors.ndim - 3), -2))
    found = xp.where(
        xp.any(within, axis=-1), xp.argmax(xp.astype(within, xp.int64), axis=-1) + 1, 0
    )
    return [int(found[head]) for head in range(found.shape[0])]


def mask_ranks(factors: Factors, ranks: list[tuple[int, int]], data: Grouped) -> Factors:
    """Zero the columns of each head beyond its ranks."""
    xp, backend = data.backend.xp, data.backend

    def mask(x: Array, which: int) -> Array:
        numbers = backend.from_numpy(np.asarray([pair[which] for pair in ranks]), x, xp.int64)
        columns = xp.arange(x.shape[-1], device=backend.creation_device(x))
        return xp.astype(columns < numbers[:, None], x.dtype)[:, None, :]

    return factors._replace(
        left=factors.left * mask(factors.left, 0)[:, None, ...],
        wk=factors.wk * mask(factors.wk, 0),
        wv=factors.wv * mask(factors.wv, 1),
    )
