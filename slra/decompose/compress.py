"""Compression of a matrix to low rank plus a few entries in every row."""

import math
from typing import Literal

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._backends.standard.sparse import index_dtype
from slra._typing import Array
from slra._validate import (
    check_count,
    check_finite,
    check_matrix,
    check_positive,
    check_rank,
    promote,
    resolve,
)
from slra.decompose._sparse_low_rank_matrix import LowRankPlusSparse, size_in_bytes
from slra.svd._linear_map import brought_in_range, scaled_back
from slra.svd.truncated import thin_svd

__all__ = ["compress"]


@isolated
def compress(
    x: Array, rank: int, density: float | Literal["auto"], *, n_iter: int = 20
) -> LowRankPlusSparse:
    r"""Approximate ``x`` by ``left @ right`` plus a fixed number of sparse entries in every row.

    Parameters
    ----------
    x : array, shape (..., m, n)
        Real or complex floating; half precision is computed in float32.
    rank : int
        Rank of ``left @ right``, between 1 and ``min(m, n)``.
    density : float or "auto"
        Fraction of each row that is kept as sparse entries, between 0 and 1, rounded to a number of entries; 0 gives
        the truncated SVD. With "auto", ``rank`` says how many bytes there are, those of a truncated SVD of that rank,
        and they are shared between a lower rank and sparse entries as lowers the error most; sharing nothing is among
        the candidates, so the error is never above that of the truncated SVD. "auto" takes one matrix whose values can
        be looked at.
    n_iter : int
        Alternations, 0 or more, each one SVD.

    Returns
    -------
    LowRankPlusSparse
        In the dtype and on the device of ``x``.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or an option is of a wrong type.
    ValueError
        If ``x`` has fewer than two axes, an empty axis, or NaN or infinity where values can be looked at; if an
        option is out of range, or ``density`` is "auto" for a batch or for values that cannot be looked at.

    Notes
    -----
    .. math:: \min \|x - L - S\|_F \quad \text{subject to} \quad \operatorname{rank}(L) \le r, \
        S \text{ with } k \text{ entries a row}

    by alternating the best L for S (truncated SVD of ``x - S``) with the best S for L (the k largest entries of
    ``x - L`` in each row), from S = 0. Each half step is exact, so the error never rises; the problem is not convex
    and the end is a partial optimum. Shapes depend on the arguments alone, except with "auto".

    References
    ----------
    T. Zhou, D. Tao, GoDec: randomized low-rank and sparse matrix decomposition in noisy case, ICML 2011, with the
    sparse entries counted by row rather than over the whole matrix, and an exact SVD.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> x = np.outer(np.ones(4), np.arange(5.0))
    >>> x[2, 0] = 7.0
    >>> small = slra.compress(x, 1, 0.2)
    >>> small.values.shape, bool(np.allclose(small.to_dense(), x))
    ((4, 1), True)
    """
    backend = resolve(x=x)
    check_matrix(x, "x")
    rank = check_rank(rank, min(x.shape[-2:]), limit_is="min of the last two axes of x")
    n_iter = check_count(n_iter, "n_iter")
    promoted = promote(backend, x=x)
    if isinstance(density, str) and density == "auto":
        if x.ndim != 2 or not backend.is_eager(x):
            raise ValueError(
                "density must be a number for a batch, in a traced function and for a lazy array: "
                '"auto" compares the errors of one matrix'
            )
        splits = _equal_bytes(x, rank, backend)
    else:
        fraction = check_positive(density, "density", allow_zero=True)
        if fraction > 1:
            raise ValueError(f"density must be between 0 and 1, or 'auto', got {density}")
        splits = [(rank, round(fraction * x.shape[-1]))]
    (work,) = promoted.arrays
    check_finite(backend, work, "x")
    work, exponent = brought_in_range(work, backend)
    found = [_alternate(work, r, k, n_iter, backend) for r, k in splits]
    best = (found[0] if len(found) == 1 else min(found, key=_by_error))[1]
    left, values = (scaled_back(part, exponent, backend) for part in (best.left, best.values))
    left, right, values = promoted.cast_back(backend, left, best.right, values)
    return LowRankPlusSparse(left, right, values, best.indices)


def _by_error(candidate: tuple[float, LowRankPlusSparse]) -> float:
    return candidate[0]


def _equal_bytes(x: Array, rank: int, backend: Backend) -> list[tuple[int, int]]:
    """Ranks and entries per row that take no more bytes than rank ``rank`` alone; that one first."""
    m, n = x.shape
    entry = size_in_bytes(backend, x) // (m * n)
    sparse = m * (entry + int(backend.xp.iinfo(index_dtype(backend.xp, n)).bits) // 8)
    splits = {rank: 0}
    for lower in range(rank - 1, -1, -1):
        n_entries = min(n, (rank - lower) * (m + n) * entry // sparse)
        # Of several ranks that leave room for as many entries the highest is the best.
        if n_entries > 0 and n_entries not in splits.values():
            splits[lower] = n_entries
    return list(splits.items())


def _alternate(
    x: Array, rank: int, n_entries: int, n_iter: int, backend: Backend
) -> tuple[float, LowRankPlusSparse]:
    """Alternate the best low-rank part and the best sparse one; also the error, where it can be known."""
    xp, n = backend.xp, x.shape[-1]
    values, indices = backend.largest_in_rows(xp.zeros_like(x), n_entries)
    sparse = xp.zeros_like(x)
    for _ in range(n_iter if n_entries else 0):
        left, right = _low_rank(x - sparse, rank, backend)
        values, indices = backend.largest_in_rows(x - left @ right, n_entries)
        sparse = backend.scatter_rows(values, indices, n)
    left, right = _low_rank(x - sparse, rank, backend)
    error = math.nan
    if backend.is_eager(x):
        error = float(xp.linalg.vector_norm(x - left @ right - sparse))
    return error, LowRankPlusSparse(left, right, values, indices)


def _low_rank(x: Array, rank: int, backend: Backend) -> tuple[Array, Array]:
    U, S, Vh = thin_svd(x, backend)
    return U[..., :rank] * S[..., None, :rank], Vh[..., :rank, :]
