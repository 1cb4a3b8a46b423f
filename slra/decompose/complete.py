"""Matrix completion: a low-rank matrix from some of its entries."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._backends.sparse import sparse_products
from slra._backends.standard import matrix_h
from slra._typing import RNG, Array
from slra._validate import (
    Promoted,
    check_count,
    check_finite,
    check_flag,
    check_known_weight,
    check_matrix,
    check_positive,
    check_rank,
    check_rng,
    is_kind,
    promote,
    resolve,
)
from slra.svd import randomized_svd

__all__ = ["CompletionResult", "complete"]

# Share of the observed entries that the rank is chosen and the error is predicted by.
HELD_OUT = 0.05
# A smaller rank is taken where it costs the held-out entries no more than this: their error is itself an estimate.
SLACK = 1.002
# Ranks that are tried where none is given: an iteration takes time in proportion to the square.
MOST = 64
# Rows for each column that ranks are tried on, where there are more: columns are then known well enough.
ROWS_A_COLUMN = 20
# Numbers of the r x r matrices that are held at once: 64 MB in float32.
SLAB = 1 << 24


class CompletionResult(NamedTuple):
    """What a matrix is where it was not observed: ``left @ right + mean``.

    Attributes
    ----------
    left : array, shape (..., m, rank)
        Columns are orthogonal, in the order of their norms, which are the singular values.
    right : array, shape (..., rank, n)
        Rows are orthonormal.
    mean : array, shape (..., 1, n)
        Means of the columns; zero without ``center``.
    error : float
        Relative error to expect where nothing was observed: that on a twentieth of the entries, held out of a first
        fit, their noise included, over the norm of these ``x - mean``. NaN where too few were there to hold any out.
    n_iter : int
        Iterations of the last fit, to all observed entries.
    converged : bool
        Whether the last iteration changed the matrix by no more than ``tol``.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> x = np.outer(np.arange(1.0, 31.0), np.arange(1.0, 21.0))
    >>> x[3, 4] = np.nan
    >>> result = slra.complete(x, 1, rng=0)
    >>> bool(np.isclose(result.to_dense()[3, 4], 20.0)), bool(np.isfinite(result.fill(x)).all())
    (True, True)
    """

    left: Array
    right: Array
    mean: Array
    error: float
    n_iter: int
    converged: bool

    @property
    def rank(self) -> int:
        """Number of components."""
        return int(self.right.shape[-2])

    def to_dense(self) -> Array:
        """Return the low-rank matrix in all entries, (..., m, n)."""
        return self.left @ self.right + self.mean

    def fill(self, x: Array, mask: Array | None = None) -> Array:
        """Return ``x`` where it was observed (``mask``, or no NaN), and the low-rank matrix elsewhere."""
        backend = resolve(left=self.left, x=x, optional={"mask": mask})
        shape = (*self.left.shape[:-1], int(self.right.shape[-1]))
        if tuple(x.shape) != shape:
            raise ValueError(
                f"x must have the shape that was completed, {shape}, got {tuple(x.shape)}"
            )
        promote(backend, left=self.left, x=x)
        observed = backend.xp.logical_not(backend.xp.isnan(x))
        if mask is not None:
            observed = _broadcast(mask, x, backend)
        return backend.xp.where(observed, x, self.to_dense())

    def at(self, rows: Array, columns: Array) -> Array:
        """Return entries of one matrix, of the shape of ``rows`` and ``columns``, integers of its library.

        They are from 0 on, of one shape, and are looked at unless they are lazy.
        """
        backend = resolve(left=self.left, rows=rows, columns=columns)
        xp = backend.xp
        if self.left.ndim != 2:
            raise ValueError("left must be of one matrix, whose entries rows and columns number")
        for name, places, n in (
            ("rows", rows, self.left.shape[0]),
            ("columns", columns, self.right.shape[1]),
        ):
            if not is_kind(xp, places.dtype, "integral"):
                raise TypeError(f"{name} must be integers, got {places.dtype}")
            if tuple(places.shape) != tuple(rows.shape):
                raise ValueError(
                    f"{name} must have the shape of rows, {tuple(rows.shape)}, got {tuple(places.shape)}"
                )
            if backend.is_eager(places) and bool(xp.any((places < 0) | (places >= n))):
                raise ValueError(f"{name} must be from 0 to {n - 1}")
        shape, flat = tuple(rows.shape), (xp.reshape(a, (-1,)) for a in (rows, columns))
        row, column = (xp.astype(a, backend.place_dtype) for a in flat)
        right = xp.take(xp.matrix_transpose(self.right), column, axis=0)
        products = xp.sum(xp.take(self.left, row, axis=0) * right, axis=-1)
        return xp.reshape(products + xp.take(self.mean[0, :], column, axis=0), shape)


@isolated
def complete(
    x: Any,
    rank: int | None = None,
    *,
    rtol: float | None = None,
    l1: float | None = None,
    mask: Array | None = None,
    center: bool = False,
    tol: float = 1e-4,
    max_iter: int = 200,
    rng: RNG = None,
) -> CompletionResult:
    r"""Fill the gaps of a matrix by one of low rank.

    Parameters
    ----------
    x : array, shape (..., m, n), or sparse matrix, shape (m, n)
        Real or complex floating; half precision is computed in float32. NaN is a gap. Of a SciPy sparse matrix the
        stored entries are the observed ones, zeros among them. Of one Dask matrix 20 rows for each column (1000 at
        least) are read into memory, columns and means are those of these rows, and ``left`` is a graph that solves for
        all rows block by block. Not for traced arrays, whose values cannot be looked at.
    rank : int, optional
        By default the one that predicts held-out entries best, up to 64. A batch has one rank.
    rtol : float, optional
        Take the smallest rank whose relative error on held-out entries is no more, and no more than ``rank``. Where
        none reaches it, that with the least error is taken: see ``error``.
    l1 : float or 0-d array, optional
        Weight of sparse outliers: residuals beyond ``l1`` count linearly, not squared (Huber). None: no outliers.
    mask : boolean array, broadcastable to the shape of x, optional
        True where ``x`` was observed; anything may stand elsewhere.
    center : bool
        Whether to estimate the means of the columns too, as PCA does.
    tol : float
        Relative change of the matrix to stop at; taken to be at least 30 times the spacing of numbers at 1.
    max_iter : int
        Most iterations of each fit.
    rng : int, numpy.random.Generator or None
        Which entries are held out, and where the starts are drawn from.

    Returns
    -------
    CompletionResult
        In the dtype and on the device of ``x``; of a sparse matrix, NumPy arrays (CuPy's of CuPy's). Where ``x`` is
        Dask's, columns of ``left`` are orthogonal in the rows that were read.

    Raises
    ------
    TypeError
        If ``x`` is not floating, ``mask`` not boolean, or an option of a wrong type.
    ValueError
        If ``x`` is empty, infinite or nowhere observed, has values that cannot be looked at, or ``rank`` is out of
        range.

    Notes
    -----
    Alternating least squares as Bayes has them: rows :math:`a_i` and columns :math:`b_j` of the factors are normal,

    .. math::
        x_{ij} = \mu_j + a_i^T b_j + \varepsilon_{ij}, \quad a_i \sim N(0, I), \quad
        b_j \sim N(0, \operatorname{diag}(s)), \quad \varepsilon_{ij} \sim N(0, \sigma^2)

    and each half step solves for the means *and covariances* of all :math:`a_i`, or all :math:`b_j`, given the others';
    ``s`` and :math:`\sigma^2` are estimated on the way. Rows with few entries are then shrunk as much as the noise asks
    for: there is no weight to choose, and too large a rank does little harm. One iteration takes
    ``(entries observed, or m n where dense) * rank**2`` operations. After each the factors are turned to principal
    axes, without which many more are needed. Of a tall matrix 20 rows for each column serve to choose the rank.

    Entries are assumed to be missing for no reason of their own: that large ones are missing more often is not seen.

    References
    ----------
    A. Ilin, T. Raiko, Practical approaches to principal component analysis in the presence of missing values, Journal
    of Machine Learning Research 11 (2010), Section 4 (the model and its variational fit) and 4.2 (the rotation).

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> rng = np.random.default_rng(0)
    >>> exact = rng.standard_normal((200, 3)) @ rng.standard_normal((3, 40))
    >>> x = np.where(rng.random(exact.shape) < 0.2, np.nan, exact + 0.01 * rng.standard_normal(exact.shape))
    >>> result = slra.complete(x, rng=0)
    >>> result.rank, bool(np.linalg.norm(result.to_dense() - exact) < 0.01 * np.linalg.norm(exact))
    (3, True)
    """
    check_flag(center, "center")
    generator = check_rng(rng)
    limit = check_count(max_iter, "max_iter")
    if limit == 0:
        raise ValueError("max_iter must be 1 or more, got 0")
    tall = _Tall.of(x, mask)
    if tall is not None:
        x, mask = tall.sample(generator), None
    entries, unit, promoted = _read(x, mask)
    backend = entries.backend
    finfo = backend.xp.finfo(entries.like.dtype)
    cap = min(*entries.shape[-2:], MOST)
    if rank is not None:
        cap = check_rank(rank, min(entries.shape[-2:]))
    target = None if rtol is None else check_positive(rtol, "rtol")
    threshold = None
    if l1 is not None:
        known = check_known_weight(backend, l1, "l1", limits=finfo, allow_zero=False)
        threshold = known / unit
    tol = max(check_positive(tol, "tol"), 30 * float(finfo.eps))
    fit = _Fit(center, threshold, tol, limit, generator, backend)
    with backend.ignore_overflow():
        entries, offset = entries.centered() if center else (entries, None)
        state, error = _choose(
            entries, fit, cap, target, is_given=rank is not None and rtol is None
        )
        state = fit.run(entries, state)
        left, right = _in_order(state, backend)
        mean = state.mean if offset is None else state.mean + offset
        parts = promoted.cast_back(backend, left * unit, right, mean * unit)
    if tall is not None:
        parts = tall.completed(fit, state, offset, unit, parts)
    left, right, mean = parts
    return CompletionResult(left, right, mean, error, state.n_iter, state.change <= tol)


class _State(NamedTuple):
    """The factors, and how sure they are; ``x ~ left @ right.T + mean``."""

    left: Array  # (..., m, r), means of the a_i
    right: Array  # (..., n, r), means of the b_j
    spread: Array  # (..., n, r, r), covariances of the b_j, conjugated
    scales: Array  # (..., 1, r), s
    noise: Array  # (..., 1, 1), sigma^2
    mean: Array  # (..., 1, n)
    n_iter: int = 0
    change: float = math.inf


class _Slab(NamedTuple):
    """Some rows: their entries, zero in gaps, and what is 1 where there is one; both also transposed."""

    x: Any
    weights: Any
    x_t: Any
    weights_t: Any


class _Dense:
    """Entries of an array, zero where they are not observed."""

    def __init__(self, x: Array, observed: Array, backend: Backend) -> None:
        self.x, self.observed, self.backend = x, observed, backend
        self.like, self.shape = x, tuple(x.shape)
        self.weights = backend.xp.astype(observed, x.dtype)
        self.n_observed = int(backend.xp.count_nonzero(observed))

    def slabs(self, n_rows: int) -> Iterator[_Slab]:
        """So many rows at a time."""
        m = self.shape[-2]
        for first in range(0, m, n_rows):
            rows = slice(first, min(first + n_rows, m))
            x, weights = (a[..., rows, :] for a in (self.x, self.weights))
            yield _Slab(x, weights, *map(self.backend.xp.matrix_transpose, (x, weights)))

    def centered(self) -> "tuple[_Dense, Array]":
        """Take the means of the columns off."""
        sums, counts = self.column_sums()
        mean = sums / self.backend.at_least(counts, 1.0)
        return self.minus(mean), mean

    def column_sums(self) -> tuple[Array, Array]:
        """Sum each column, and count what was observed of it, (..., 1, n)."""
        sums, counts = (
            self.backend.xp.sum(x, axis=-2, keepdims=True) for x in (self.x, self.weights)
        )
        return sums, self.backend.real_part(counts)

    def minus(self, other: Array) -> "_Dense":
        """Subtract from what was observed."""
        x = self.backend.xp.where(self.observed, self.x - other, 0.0)
        return _Dense(x, self.observed, self.backend)

    def residual(self, state: _State) -> "_Dense":
        """Subtract what is explained."""
        return self.minus(state.left @ self.backend.xp.matrix_transpose(state.right) + state.mean)

    def outliers(self, threshold: float) -> Array:
        """Return what exceeds a threshold."""
        return self.backend.soft_threshold(self.x, threshold)

    def squares(self) -> Array:
        """Sum the squares of each matrix, (..., 1, 1)."""
        return self.backend.norm_squared(self.x)[..., None, None]

    def svd(self, rank: int, rng: np.random.Generator) -> Any:
        """Return leading singular triplets; gaps are zero."""
        return randomized_svd(self.x, rank, rng=rng)

    def sample(self, rng: np.random.Generator) -> "_Dense":
        """Draw rows that are enough to choose a rank by."""
        rows = _some_rows(self.shape, rng)
        if rows is None:
            return self
        at = self.backend.from_numpy(rows, self.x, self.backend.place_dtype)
        x, observed = (self.backend.xp.take(a, at, axis=-2) for a in (self.x, self.observed))
        return _Dense(x, observed, self.backend)

    def split(self, rng: np.random.Generator) -> "tuple[_Dense, _Dense]":
        """Hold some entries out: the others, and they."""
        xp, backend = self.backend.xp, self.backend
        drawn = backend.from_numpy(rng.random(self.shape, dtype=np.float32), self.x, xp.float32)
        held = drawn < HELD_OUT
        halves = (xp.logical_and(self.observed, part) for part in (xp.logical_not(held), held))
        kept, held = (_Dense(xp.where(part, self.x, 0.0), part, backend) for part in halves)
        return kept, held


class _Tall(NamedTuple):
    """A lazy array whose rows can be had in memory, some at a time; NaN is a gap."""

    x: Array
    backend: Backend

    @classmethod
    def of(cls, x: Any, mask: Array | None) -> "_Tall | None":
        """Read ``x`` so, or return None where it is another array."""
        if sparse_products(x) is not None:
            return None
        backend = resolve(x=x, optional={"mask": mask})
        if not backend.reads_rows:
            return None
        check_matrix(x, "x")
        if x.ndim != 2:
            raise ValueError(f"x must be one matrix where it is lazy, got shape {tuple(x.shape)}")
        promote(backend, x=x)
        if mask is not None:
            x = backend.xp.where(_broadcast(mask, x, backend), x, math.nan)
        return cls(x, backend)

    def sample(self, rng: np.random.Generator) -> Array:
        """Read rows that tell the columns, in one pass."""
        rows = _some_rows(self.x.shape, rng)
        return self.backend.read_rows(self.x, np.arange(self.x.shape[0]) if rows is None else rows)

    def completed(
        self,
        fit: "_Fit",
        state: _State,
        offset: Array | None,
        unit: float,
        parts: tuple[Array, ...],
    ) -> tuple[Array, ...]:
        """Return ``left`` of all rows, lazily, ``right`` and ``mean``."""
        _, right, mean = parts
        wide = state.right.dtype
        turn = unit * (state.right.T @ fit.backend.conj(right.T.astype(wide)))

        def rows(x: Array) -> Array:
            observed = ~np.isnan(x)
            entries = _Dense(
                _filled(x.astype(wide), observed, fit.backend) / unit, observed, fit.backend
            )
            if offset is not None:
                entries = entries.minus(offset)
            return (fit.rows(entries, state) @ turn).astype(right.dtype)

        left = self.backend.map_rows(rows, self.x, right.shape[0], right.dtype)
        return left, *(self.backend.from_numpy(a, self.x, a.dtype) for a in (right, mean))


class _Sparse:
    """The stored entries of a sparse matrix, by rows."""

    def __init__(self, x: Any, backend: Backend) -> None:
        self.x, self.backend = x, backend
        self.like, self.shape, self.n_observed = x.data, tuple(map(int, x.shape)), int(x.nnz)
        self.weights = self._with(backend.xp.ones_like(x.data))

    def _with(self, data: Array) -> Any:
        return type(self.x)((data, self.x.indices, self.x.indptr), shape=self.shape)

    def slabs(self, n_rows: int) -> Iterator[_Slab]:
        """So many rows at a time."""
        for first in range(0, self.shape[0], n_rows):
            x, weights = (a[first : first + n_rows] for a in (self.x, self.weights))
            yield _Slab(x, weights, x.T, weights.T)

    def centered(self) -> "tuple[_Sparse, Array]":
        """Take the means of the columns off."""
        sums, counts = self.column_sums()
        mean = sums / self.backend.at_least(counts, 1.0)
        return self.minus(mean[0, self.x.indices]), mean

    def column_sums(self) -> tuple[Array, Array]:
        """Sum each column, and count what was observed of it, (1, n)."""
        sums, counts = (
            self.backend.xp.asarray(x.sum(axis=0)).reshape(1, -1) for x in (self.x, self.weights)
        )
        return sums, self.backend.real_part(counts)

    def minus(self, other: Array) -> "_Sparse":
        """Subtract from what was observed."""
        return _Sparse(self._with(self.x.data - other), self.backend)

    def residual(self, state: _State) -> "_Sparse":
        """Subtract what is explained."""
        rows, columns = self.x.tocoo().row, self.x.indices
        explained = state.mean[0, columns]
        step = max(1, SLAB // max(1, state.left.shape[-1]))
        for first in range(0, self.n_observed, step):
            part = slice(first, first + step)
            products = state.left[rows[part]] * state.right[columns[part]]
            explained[part] += products.sum(axis=-1)
        return self.minus(explained)

    def outliers(self, threshold: float) -> Array:
        """Return what exceeds a threshold."""
        return self.backend.soft_threshold(self.x.data, threshold)

    def squares(self) -> Array:
        """Sum the squares, (1, 1)."""
        return self.backend.norm_squared(self.x.data[None, :])[..., None, None]

    def svd(self, rank: int, rng: np.random.Generator) -> Any:
        """Return leading singular triplets; gaps are zero."""
        return randomized_svd(self.x, rank, rng=rng)

    def sample(self, rng: np.random.Generator) -> "_Sparse":
        """Draw rows that are enough to choose a rank by."""
        rows = _some_rows(self.shape, rng)
        return self if rows is None else _Sparse(self.x[rows], self.backend)

    def split(self, rng: np.random.Generator) -> "tuple[_Sparse, _Sparse]":
        """Hold some entries out: the others, and they."""
        entries = self.x.tocoo()
        held = self.backend.xp.asarray(rng.random(self.n_observed, dtype=np.float32) < HELD_OUT)
        kept, held = (
            type(self.x)((entries.data[at], (entries.row[at], entries.col[at])), shape=self.shape)
            for at in (~held, held)
        )
        return _Sparse(kept, self.backend), _Sparse(held, self.backend)


Entries = _Dense | _Sparse


def _some_rows(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, Any] | None:
    """Draw `ROWS_A_COLUMN` rows for each column, or None where there are not twice as many."""
    m, n = shape[-2:]
    size = max(ROWS_A_COLUMN * n, 1000)
    return np.sort(rng.choice(m, size, replace=False)) if m >= 2 * size else None


def _read(x: Any, mask: Array | None) -> tuple[Entries, float, Promoted]:
    """Check what is given; return entries of modulus 1 at most, and their unit."""
    found = sparse_products(x)
    if found is not None:
        if found.entries is None:
            raise TypeError(
                "x must be an array or a sparse matrix, whose entries are known, got a linear operator"
            )
        if len(x.shape) != 2:
            raise ValueError(f"x must have 2 dimensions where it is sparse, got shape {x.shape}")
        if mask is not None:
            raise ValueError(
                "mask must be None for a sparse matrix: its stored entries are the observed ones"
            )
        return _read_sparse(found.entries.matrix)
    backend = resolve(x=x, optional={"mask": mask})
    check_matrix(x, "x")
    if not backend.can_iterate(x):
        raise ValueError(
            "x must have values that can be looked at: complete iterates until they say so, "
            "which a traced function cannot follow"
        )
    xp, promoted = backend.xp, promote(backend, x=x)
    (work,) = promoted.arrays
    observed = xp.logical_not(xp.isnan(work)) if mask is None else _broadcast(mask, x, backend)
    if not bool(xp.any(observed)):
        raise ValueError("x must be observed somewhere, got NaN, or a mask of False, throughout")
    work = _filled(work, observed, backend)
    unit = float(xp.max(xp.abs(work))) or 1.0
    return _Dense(work / unit, observed, backend), unit, promoted


def _filled(x: Array, observed: Array, backend: Backend) -> Array:
    """Set gaps to zero; nothing else may be NaN or infinite."""
    x = backend.xp.where(observed, x, 0.0)
    check_finite(backend, x, "x")
    return x


def _read_sparse(x: Any) -> tuple[_Sparse, float, Promoted]:
    backend = resolve(**{"x.data": x.data})
    promoted = promote(backend, x=x.data)
    csr = x.tocsr(copy=True)
    csr.sum_duplicates()
    if csr.nnz == 0:
        raise ValueError("x must have a stored entry, got none")
    data = csr.data.astype(promoted.arrays[0].dtype)
    check_finite(backend, data, "x")
    unit = float(backend.xp.max(backend.xp.abs(data))) or 1.0
    csr = type(csr)((data / unit, csr.indices, csr.indptr), shape=csr.shape)
    return _Sparse(csr, backend), unit, promoted


def _broadcast(mask: Array, x: Array, backend: Backend) -> Array:
    if not is_kind(backend.xp, mask.dtype, "bool"):
        raise TypeError(f"mask must be boolean, True where x was observed, got {mask.dtype}")
    try:
        fits = np.broadcast_shapes(mask.shape, x.shape) == tuple(x.shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask must broadcast to the shape of x, {tuple(x.shape)}, got {tuple(mask.shape)}"
        )
    return backend.xp.broadcast_to(mask, x.shape)


def _choose(
    entries: Entries, fit: "_Fit", cap: int, target: float | None, *, is_given: bool
) -> tuple[_State, float]:
    """Fit without some of the entries, at growing ranks until the others are predicted no better, and cut.

    The error is that of the others.
    """
    some = entries if is_given else entries.sample(fit.rng)
    train, held = some.split(fit.rng)
    if held.n_observed == 0:
        if not is_given:
            raise ValueError(
                f"rank must be given where so few entries are observed, {entries.n_observed}"
            )
        return fit.start(entries, cap, None), math.nan
    rank, state = cap if is_given else min(cap, 4), None
    while True:
        state = fit.run(train, fit.start(train, rank, state), loosely=not is_given)
        errors = _errors(held, state, fit.backend)
        if is_given:
            return state, errors[-1]
        is_within = target is not None and min(errors) <= target
        wanted = target if is_within and target is not None else SLACK * min(errors)
        best = next(k for k, error in enumerate(errors) if error <= wanted)
        # Where the last components help nothing, others would not.
        if is_within or best <= 0.75 * rank or rank == cap:
            state = _cut(state, max(1, best))
            if some is not entries:  # the other rows follow from the columns
                state = state._replace(
                    left=_zeros(entries, fit.backend, entries.shape[-2], max(1, best))
                )
            return state, errors[max(1, best)]
        rank = min(cap, 2 * rank)


def _errors(held: Entries, state: _State, backend: Backend) -> list[float]:
    """Relative errors of the first 0, 1, 2, ... components on entries that were held out."""

    def norm(entries: Entries) -> float:
        return math.sqrt(float(backend.xp.sum(entries.squares())))

    left, right = state.left[..., :0], state.right[..., :0]
    rest = held.residual(state._replace(left=left, right=right))
    whole, found = norm(rest), [1.0]
    zero = backend.xp.zeros_like(state.mean)
    for k in range(state.left.shape[-1]):
        one = state.left[..., k : k + 1], state.right[..., k : k + 1]
        rest = rest.residual(state._replace(left=one[0], right=one[1], mean=zero))
        found.append(norm(rest) / whole if whole else 0.0)
    return found


def _cut(state: _State, rank: int) -> _State:
    """Keep the first components, which are in the order of their norms."""
    return state._replace(
        left=state.left[..., :rank],
        right=state.right[..., :rank],
        spread=state.spread[..., :rank, :rank],
        scales=state.scales[..., :rank],
    )


def _zeros(entries: Entries, backend: Backend, *shape: int) -> Array:
    like = entries.like
    lead, device = entries.shape[:-2], backend.creation_device(like)
    return backend.xp.zeros((*lead, *shape), dtype=like.dtype, device=device)


class _Fit(NamedTuple):
    """How factors are fitted to entries."""

    center: bool
    threshold: float | None
    tol: float
    max_iter: int
    rng: np.random.Generator
    backend: Backend

    def start(self, entries: Entries, rank: int, state: _State | None) -> _State:
        """Add leading singular vectors of what is not explained to the components that there are."""
        backend, xp, (m, n) = self.backend, self.backend.xp, entries.shape[-2:]
        zeros = partial(_zeros, entries, backend)
        if state is None:
            none = zeros(1, 0)
            state = _State(zeros(m, 0), zeros(n, 0), zeros(n, 0, 0), none, none, zeros(1, n))
        rest = entries.residual(state)
        U, S, Vh = rest.svd(rank - state.left.shape[-1], self.rng)
        # Gaps count as zero there, so singular values are too small by the share of what was observed. Columns of
        # ``left`` have the norm that whitening gives them.
        S = S[..., None, :] * (math.prod(entries.shape) / entries.n_observed / math.sqrt(m))
        left = xp.concat([state.left, math.sqrt(m) * U], axis=-1)
        right = xp.concat([state.right, xp.matrix_transpose(Vh) * S], axis=-1)
        scales = xp.mean(backend.real_part(right * backend.conj(right)), axis=-2, keepdims=True)
        noise = rest.squares() / xp.sum(entries.column_sums()[1], axis=-1, keepdims=True)
        noise = xp.astype(noise, scales.dtype)
        # Of a matrix of zeros both are zero, and would be divided by.
        least = 1e3 * float(xp.finfo(scales.dtype).smallest_normal)
        scales, noise = (backend.at_least(x, least) for x in (scales, noise))
        return _State(left, right, zeros(n, rank, rank), scales, noise, state.mean)

    def run(self, entries: Entries, state: _State, *, loosely: bool = False) -> _State:
        """Iterate until the matrix stands still."""
        tol = max(self.tol, 1e-2) if loosely else self.tol
        for n_iter in range(1, self.max_iter + 1):
            regular = self._regular(entries, state)
            new = _sweep(regular, state, self.backend, moves_mean=self.center)
            change = _change(new, state, self.backend)
            state = new._replace(n_iter=n_iter, change=change)
            if change <= tol:
                break
        return state

    def _regular(self, entries: Entries, state: _State) -> Entries:
        """Take off what is beyond the threshold."""
        if self.threshold is None:
            return entries
        return entries.minus(entries.residual(state).outliers(self.threshold))

    def rows(self, entries: _Dense, state: _State) -> Array:
        """Solve for rows that the columns were not fitted to."""
        backend, xp = self.backend, self.backend.xp
        regular: Entries = entries
        old = None
        for _ in range(1 if self.threshold is None else self.max_iter):
            parts = _rows(regular, state, backend, moves_mean=self.center)
            left = xp.concat([part for _, part, _ in parts], axis=-2)
            moved = left if old is None else left - old
            sizes = (xp.linalg.vector_norm(a, axis=-1) for a in (moved, self.tol * left))
            if bool(xp.all(xp.less_equal(*sizes))):
                break
            old, state = left, state._replace(left=left)
            regular = self._regular(entries, state)
        return left


def _sweep(entries: Entries, state: _State, backend: Backend, *, moves_mean: bool) -> _State:
    """Solve for all rows, then for all columns, and turn both to principal axes."""
    xp, real, rank = backend.xp, backend.real_part, state.right.shape[-1]
    *lead, m, n = entries.shape
    right, noise, column = state.right, state.noise, xp.matrix_transpose(state.mean)
    lefts, of_left, target, left_sums, moment = [], 0, 0, 0, 0
    for slab, left, spread in _rows(entries, state, backend, moves_mean=moves_mean):
        second = _second_moments(left, spread, backend)
        moment = moment + xp.sum(second, axis=-3)
        # Sums over rows, which the columns are solved from.
        of_left = of_left + slab.weights_t @ xp.reshape(second, (*lead, -1, rank**2))
        target = target + slab.x_t @ backend.conj(left)
        if moves_mean:
            left_sums = left_sums + slab.weights_t @ left
        lefts.append(left)
    left = xp.concat(lefts, axis=-2)
    if moves_mean:
        target = target - column * backend.conj(left_sums)
    of_left = xp.reshape(of_left, (*lead, n, rank, rank))
    right, spread = _solve(of_left, target, state.scales, noise, backend)
    second = _second_moments(right, spread, backend)
    # sigma^2 = E |x - mu - a.b|^2 over what was observed, from the sums: no pass over the entries.
    sums, counts = entries.column_sums()
    whole, n_observed = entries.squares(), xp.sum(counts, axis=-1, keepdims=True)
    if moves_mean:
        moved = real(backend.conj(state.mean) * (counts * state.mean - 2 * sums))
        whole = whole + xp.sum(moved, axis=-1, keepdims=True)
    crossed = xp.sum(real(right * backend.conj(target)), axis=(-2, -1))[..., None, None]
    explained = xp.sum(real(of_left * second), axis=(-3, -2, -1))[..., None, None]
    finfo = xp.finfo(noise.dtype)
    least = 10 * float(finfo.eps) * whole / n_observed + 1e3 * float(finfo.smallest_normal)
    noise = xp.maximum((whole - 2 * crossed + explained) / n_observed, least)
    mean = state.mean
    if moves_mean:
        rest = sums - xp.matrix_transpose(xp.sum(right * left_sums, axis=-1, keepdims=True))
        mean = rest / backend.at_least(counts, 1.0)
    turned = _turned(left, right, spread, moment / m, xp.mean(second, axis=-3), backend)
    return _State(*turned, xp.astype(noise, state.noise.dtype), mean)


def _rows(
    entries: Entries, state: _State, backend: Backend, *, moves_mean: bool
) -> Iterator[tuple[_Slab, Array, Array]]:
    """Solve for some rows at a time: their entries, the means of the a_i and their covariances, conjugated."""
    xp, rank = backend.xp, state.right.shape[-1]
    *lead, _, n = entries.shape
    conj = backend.conj(state.right)
    of_right = xp.reshape(_second_moments(state.right, state.spread, backend), (*lead, n, rank**2))
    for slab in entries.slabs(max(1, SLAB // (rank**2 * math.prod(lead)))):
        precision = xp.reshape(slab.weights @ of_right, (*lead, -1, rank, rank))
        product = slab.x @ conj
        if moves_mean:
            product = product - slab.weights @ (xp.matrix_transpose(state.mean) * conj)
        yield slab, *_solve(precision, product, None, state.noise, backend)


def _second_moments(x: Array, spread: Array, backend: Backend) -> Array:
    """E conj(x_k) x_l for each row, (..., n, r, r)."""
    return backend.conj(x)[..., :, None] * x[..., None, :] + spread


def _solve(
    precision: Array, target: Array, scales: Array | None, noise: Array, backend: Backend
) -> tuple[Array, Array]:
    """Means of rows whose prior has variances ``scales`` (1 for None), and their covariances, conjugated."""
    xp = backend.xp
    eye = xp.eye(precision.shape[-1], dtype=precision.dtype, device=backend.creation_device(noise))
    prior = eye if scales is None else eye / scales[..., None]
    scaled = precision + noise[..., None] * prior
    # On the scale of its diagonal, which spans the squares of all singular values, it is well conditioned.
    root = xp.sqrt(xp.sum(backend.real_part(scaled * eye), axis=-1))
    scaled = scaled / (root[..., :, None] * root[..., None, :])
    inverse = backend.small_inverse(scaled) / (root[..., :, None] * root[..., None, :])
    mean = (inverse @ target[..., None])[..., 0]
    return mean, backend.conj(noise[..., None] * inverse)


def _turned(
    left: Array, right: Array, spread: Array, of_left: Array, of_right: Array, backend: Backend
) -> tuple[Array, Array, Array, Array]:
    """Turn and scale both factors, their product unchanged, so that E a a^H = I and E b b^H is diagonal, and falls."""
    xp = backend.xp
    values, V = backend.small_eigh(of_left)
    largest = xp.max(values, axis=-1, keepdims=True)
    finfo = xp.finfo(values.dtype)
    values = xp.sqrt(xp.maximum(values, float(finfo.eps) * largest + float(finfo.smallest_normal)))
    whiten = values[..., :, None] * matrix_h(V, xp)
    scales, W = backend.small_eigh(backend.conj(whiten) @ of_right @ xp.matrix_transpose(whiten))
    scales, W = xp.flip(scales, axis=-1), xp.flip(W, axis=-1)
    turn = xp.matrix_transpose(whiten) @ W
    left = left @ ((V / values[..., None, :]) @ backend.conj(W))
    spread = matrix_h(turn, xp)[..., None, :, :] @ spread @ turn[..., None, :, :]
    # A component that nothing asks for is not left with a scale of zero.
    least = float(finfo.eps) ** 2 * scales[..., :1] + float(finfo.smallest_normal) * 1e3
    return left, right @ turn, spread, xp.maximum(scales, least)[..., None, :]


def _change(new: _State, old: _State, backend: Backend) -> float:
    """Relative change of the matrix, from products of the factors alone; the largest of a batch."""
    xp, gram, real = backend.xp, backend.gram, backend.real_part

    def product(one: _State, other: _State) -> Array:
        terms = gram(one.left, other.left) * gram(one.right, other.right)
        return xp.sum(real(terms), axis=(-2, -1))

    whole = product(new, new)
    square = whole - 2 * product(new, old) + product(old, old)
    share = square / xp.where(whole == 0, 1.0, whole)
    return math.sqrt(max(0.0, float(xp.max(share))))


def _in_order(state: _State, backend: Backend) -> tuple[Array, Array]:
    """Left and right factors as of a singular value decomposition."""
    xp = backend.xp
    (Q, R), (P, T) = backend.qr(state.left), backend.qr(state.right)
    U, S, Vh = backend.small_svd(R @ xp.matrix_transpose(T))
    return (Q @ U) * S[..., None, :], Vh @ xp.matrix_transpose(P)
