"""Compression of a matrix to low rank plus a few entries, in every row or anywhere."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._backends.standard import matrix_h
from slra._backends.standard.sparse import index_dtype
from slra._typing import Array
from slra._validate import (
    check_choice,
    check_count,
    check_finite,
    check_matrix,
    check_positive,
    check_rank,
    promote,
    resolve,
)
from slra.decompose._sparse_low_rank_matrix import LowRankPlusSparse, size_in_bytes
from slra.svd import randomized_svd
from slra.svd._linear_map import brought_in_range, scaled_back
from slra.svd.truncated import thin_svd

__all__ = ["compress"]

# Alternations after which the two starts, and the ways to share the bytes, are compared; those that are close by more.
TRIAL, LONG_TRIAL = 4, 16
# A way to count entries whose error in the trials is more than this many times the least is given up.
CLOSE = 1.2
# Of the ways to share the bytes so many are tried first, evenly spaced; then the middles around the best.
N_COARSE = 6
# An alternation that lowers the error by less than this part of it is the last.
SETTLED = 1e-7
# One exact SVD ends the alternation where it takes no longer than a few of its steps: entries times the short side.
LAST_SVD = 256**3


class _Budget(NamedTuple):
    """What a result may consist of: the rank, and the sparse entries in each row or in the matrix."""

    rank: int
    n_entries: int
    per: str


@isolated
def compress(
    x: Array,
    rank: int,
    density: float | Literal["auto"] = "auto",
    *,
    per: Literal["row", "matrix"] | None = None,
    n_iter: int = 40,
) -> LowRankPlusSparse:
    r"""Approximate ``x`` by ``left @ right`` plus a fixed number of sparse entries.

    Parameters
    ----------
    x : array, shape (..., m, n)
        Real or complex floating; half precision is computed in float32.
    rank : int
        Rank of ``left @ right``, between 1 and ``min(m, n)``.
    density : float or "auto"
        Fraction of each row, or of the matrix, that is kept as sparse entries, between 0 and 1, rounded to a number of
        entries; 0 gives the truncated SVD. With "auto", ``rank`` says how many bytes there are, those of a truncated
        SVD of that rank, and they are shared between a lower rank and sparse entries as lowers the error most; sharing
        nothing is among the candidates, so the error is never above that of the truncated SVD. "auto" takes one matrix
        whose values can be looked at.
    per : {"row", "matrix"}, optional
        What ``density`` counts the entries by. A row is cheaper (an index takes a byte or two instead of four), the
        matrix can spend all on a few rows. By default "row", and with "auto" the one with the smaller error. Dask has
        no way to order the entries of a matrix: "row" only.
    n_iter : int
        Largest number of alternations, 0 or more; where values can be looked at, they end once they have settled.

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

    Warns
    -----
    UserWarning
        If the result takes more bytes than ``x``, where its values can be looked at.

    Notes
    -----
    .. math:: \min \|x - L - S\|_F \quad \text{subject to} \quad \operatorname{rank}(L) \le r, \
        S \text{ with } k \text{ entries}

    by alternating the best S for L (the largest entries of ``x - L``) with a better L for S: a step of subspace
    iteration on ``x - S`` from the rows of the last L, at a fraction of the price of an SVD. Neither half ever raises
    the error; the problem is not convex and the end is a partial optimum. It starts from the truncated SVD of ``x``
    or, where that gives the smaller error after a few steps, from the largest entries of ``x``. With "auto" the error
    is taken to have one minimum over the lower rank: a coarse search, then halving. Shapes depend on the arguments
    alone, except with "auto".

    References
    ----------
    T. Zhou, D. Tao, GoDec: randomized low-rank and sparse matrix decomposition in noisy case, ICML 2011, with the
    sparse entries counted by row rather than over the whole matrix, and a warm start in place of a random one.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> x = np.outer(np.ones(4), np.arange(5.0))
    >>> x[2, 0] = 7.0
    >>> small = slra.compress(x, 1, 0.2)
    >>> small.values.shape, bool(np.allclose(small.to_dense(), x))
    ((4, 1), True)
    >>> slra.compress(x, 1, 0.05, per="matrix").values.shape
    (1,)
    """
    backend = resolve(x=x)
    check_matrix(x, "x")
    rank = check_rank(rank, min(x.shape[-2:]), limit_is="min of the last two axes of x")
    n_iter = check_count(n_iter, "n_iter")
    if per is not None:
        check_choice(per, ("row", "matrix"), "per")
    if per == "matrix" and not hasattr(backend.xp, "take_along_axis"):
        raise ValueError("per must be 'row' for lazy arrays, whose entries cannot be ordered")
    promoted = promote(backend, x=x)
    is_auto = isinstance(density, str) and density == "auto"
    if is_auto and (x.ndim != 2 or not backend.is_eager(x)):
        raise ValueError(
            "density must be a number for a batch, in a traced function and for a lazy array: "
            '"auto" compares the errors of one matrix'
        )
    fraction = 0.0 if is_auto else check_positive(density, "density", allow_zero=True)
    if fraction > 1:
        raise ValueError(f"density must be between 0 and 1, or 'auto', got {density}")
    (work,) = promoted.arrays
    check_finite(backend, work, "x")
    work, exponent = brought_in_range(work, backend)
    if is_auto:
        best = _share(
            work, rank, per, n_iter, size_in_bytes(backend, x) // math.prod(x.shape), backend
        )
    else:
        n = x.shape[-1] * (x.shape[-2] if per == "matrix" else 1)
        budget = _Budget(rank, round(fraction * n), per or "row")
        best = _Alternation(work, budget, _leading_rows(work, budget, backend), backend).run(n_iter)
    left, values = (scaled_back(part, exponent, backend) for part in (best.left, best.values))
    left, right, values = promoted.cast_back(backend, left, best.right, values)
    result = LowRankPlusSparse(left, right, values, best.indices)
    if backend.is_eager(x) and result.nbytes > result.nbytes_exact:
        warnings.warn(
            f"the result takes {result.nbytes} bytes, more than the {result.nbytes_exact} of x: lower rank or density",
            UserWarning,
            stacklevel=3,  # 2 is `isolated`
        )
    return result


def _leading_rows(x: Array, budget: _Budget, backend: Backend) -> Array:
    """Rows that span what the leading right singular vectors do, (..., rank, n)."""
    # A start need not be exact; without sparse entries it is the result.
    if budget.n_entries and backend.is_eager(x) and 4 * budget.rank <= min(x.shape[-2:]):
        return randomized_svd(x, budget.rank, rng=0).Vh
    return thin_svd(x, backend)[2][..., : budget.rank, :]


class _Alternation:
    """The alternation for one budget: the parts that it has reached."""

    errors: Array

    def __init__(self, x: Array, budget: _Budget, rows: Array, backend: Backend) -> None:
        self.x, self.budget, self.backend = x, budget, backend
        self.is_eager = backend.is_eager(x)
        self.right = rows
        self.left = x @ matrix_h(rows, backend.xp)
        self.sparse = backend.xp.zeros_like(x)
        self.measure()
        self.n_iter = 0

    @property
    def error(self) -> float:
        """Norm of what is left of one matrix that can be looked at."""
        return float(self.errors)

    def run(self, n_iter: int) -> LowRankPlusSparse:
        """Alternate from the better start; end with an exact half step where that costs little."""
        if self.budget.n_entries and n_iter:
            other = self.from_largest_entries()
            for one in (self, other):
                one.advance(min(n_iter, TRIAL))
            self._take(other._parts(), other.errors < self.errors)
            self.advance(n_iter)
        return self.finished()

    def _parts(self) -> tuple[Array, ...]:
        return self.left, self.right, self.sparse, self.rest, self.errors

    def _take(self, parts: tuple[Array, ...], is_taken: Array) -> None:
        """Take the parts of another, matrix by matrix, unseen."""
        where = self.backend.xp.where
        errors = where(is_taken, parts[-1], self.errors)
        matrices = zip(parts[:-1], self._parts(), strict=False)
        self.left, self.right, self.sparse, self.rest = (
            where(is_taken[..., None, None], theirs, own) for theirs, own in matrices
        )
        self.errors = errors

    def from_largest_entries(self) -> "_Alternation":
        """Make the other start: the largest entries of ``x`` first, then the low-rank part of the rest."""
        other = _Alternation(self.x, self.budget, self.right, self.backend)
        other._fit_low_rank(other._fit_sparse(other.x))
        other.measure()
        return other

    def advance(self, n_iter: int) -> None:
        """Alternate until so many have been made; a matrix whose error has settled stays as it is."""
        is_settled = None
        while self.n_iter < n_iter:
            if is_settled is not None and self.is_eager and bool(self.backend.xp.all(is_settled)):
                self.n_iter = n_iter
                return
            before, self.n_iter = self._parts(), self.n_iter + 1
            self._fit_low_rank(self._fit_sparse(self.rest))
            self.measure()
            settles = self.errors >= (1 - SETTLED) * before[-1]
            if is_settled is not None:
                self._take(before, is_settled)
                settles = is_settled | settles
            is_settled = settles

    def finished(self) -> LowRankPlusSparse:
        x, rank = self.x - self.sparse, self.budget.rank
        if not self.budget.n_entries or math.prod(x.shape[-2:]) * min(x.shape[-2:]) <= LAST_SVD:
            U, S, Vh = thin_svd(x, self.backend)
            self.left, self.right = U[..., :rank] * S[..., None, :rank], Vh[..., :rank, :]
            self.measure()
        rows = self._by_budget(self.sparse)
        values, indices = self.backend.largest_in_rows(rows, self.budget.n_entries)
        if self.budget.per == "matrix":
            values, indices = values[..., 0, :], indices[..., 0, :]
        return LowRankPlusSparse(self.left, self.right, values, indices)

    def _fit_sparse(self, rest: Array) -> Array:
        kept = self.backend.keep_largest(self._by_budget(rest), self.budget.n_entries)
        self.sparse = self.backend.xp.reshape(kept, rest.shape)
        return self.x - self.sparse

    def _by_budget(self, x: Array) -> Array:
        """``x`` as it is, or as one row, where entries are counted over the matrix."""
        if self.budget.per == "row":
            return x
        return self.backend.xp.reshape(x, (*x.shape[:-2], 1, -1))

    def _fit_low_rank(self, rest: Array) -> None:
        """Project on the range of ``rest`` times the last rows: the best of this range, which the last one is in."""
        backend, xp = self.backend, self.backend.xp
        if self.budget.rank == 0:
            return
        Q, _ = backend.qr(rest @ matrix_h(self.right, xp))
        W, R = backend.qr(matrix_h(rest, xp) @ Q)
        self.left, self.right = Q @ matrix_h(R, xp), matrix_h(W, xp)

    def measure(self) -> None:
        """Note what the low-rank part leaves, and its norm beside the sparse part, matrix by matrix."""
        self.rest = self.x - self.left @ self.right
        self.errors = self.backend.xp.sqrt(self.backend.norm_squared(self.rest - self.sparse))


def _share(
    x: Array, rank: int, per: str | None, n_iter: int, entry: int, backend: Backend
) -> LowRankPlusSparse:
    """Share the bytes of a truncated SVD of this rank between a lower rank and sparse entries."""
    _, S, Vh = thin_svd(x, backend)
    budgets = [
        _equal_bytes(x, rank, way, entry, backend)
        for way in (("row", "matrix") if per is None else (per,))
    ]
    tried: dict[tuple[bool, _Budget], _Alternation] = {}

    def error(from_entries: bool, budget: _Budget, steps: int = TRIAL) -> float:
        if (from_entries, budget) not in tried:
            one = _Alternation(x, budget, Vh[: budget.rank, :], backend)
            tried[from_entries, budget] = one.from_largest_entries() if from_entries else one
        tried[from_entries, budget].advance(min(n_iter, steps))
        return tried[from_entries, budget].error

    # What entries are counted by, and which start is the better, is much the same however the bytes are shared.
    for ladder in filter(None, budgets):
        for place in {len(ladder) // 8, len(ladder) // 2}:
            for from_entries in (False, True):
                error(from_entries, ladder[place])
    plain = float(backend.xp.linalg.vector_norm(S[rank:])) if rank < S.shape[0] else 0.0
    if tried:
        best = _best_of(budgets, tried, error)
        best.advance(n_iter)
        result = best.finished()
        if best.error <= plain:
            return result
    nothing = _Budget(rank, 0, per or "row")
    return _Alternation(x, nothing, Vh[:rank, :], backend).run(0)


def _best_of(
    ladders: list[list[_Budget]],
    tried: dict[tuple[bool, _Budget], _Alternation],
    error: Callable[..., float],
) -> _Alternation:
    """Best of all budgets; ways of counting that the trials left far behind are not looked at again."""
    least = min(one.error for one in tried.values())
    found = []
    for ladder in filter(None, ladders):
        own = {key: one.error for key, one in tried.items() if key[1] in ladder}
        start, budget = min(own, key=own.__getitem__)
        if own[start, budget] <= CLOSE * least:
            found.append(tried[start, _lowest(ladder, partial(error, start))])
    return min(found, key=lambda one: one.error)


def _lowest(ladder: list[_Budget], error: Callable[..., float]) -> _Budget:
    """Budget of the smallest error: of some evenly spaced, then of the middles around the best."""
    last = len(ladder) - 1
    step = max(1, last // N_COARSE)
    best: int = min({*range(0, last, step), last}, key=lambda i: error(ladder[i]))
    while step > 1:
        step = (step + 1) // 2
        near = [i for i in (best - step, best, best + step) if 0 <= i <= last]
        best = min(near, key=lambda i: error(ladder[i], LONG_TRIAL))
    return ladder[best]


def _equal_bytes(x: Array, rank: int, per: str, entry: int, backend: Backend) -> list[_Budget]:
    """Lower ranks, and entries that take no more bytes than what they save, from the highest on."""
    m, n = x.shape
    n_lines, length = (m, n) if per == "row" else (1, m * n)
    bits = int(backend.xp.iinfo(index_dtype(backend.xp, length)).bits)
    sparse = n_lines * (entry + bits // 8)
    budgets: list[_Budget] = []
    for lower in range(rank - 1, -1, -1):
        n_entries = min(length, (rank - lower) * (m + n) * entry // sparse)
        # Of several ranks that leave room for as many entries the highest is the best.
        if n_entries > (budgets[-1].n_entries if budgets else 0):
            budgets.append(_Budget(lower, n_entries, per))
    return budgets
