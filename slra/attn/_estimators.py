"""The three ways to find the linear maps: the formula, the best rank of the scores, the best rank of the output.

Each takes a problem whose leading axes are equal (`AttentionProblem.broadcast`) and returns `Factors`, whose columns
come in order of importance, so that a smaller rank is a prefix.
"""

from typing import NamedTuple

from slra._backends import Backend
from slra._typing import Array, Namespace
from slra.attn.maps import Maps
from slra.attn.problem import AttentionProblem, Seen
from slra.attn.rows import Rows, row_weights, sample_seen_rows, take_rows
from slra.svd.truncated import thin_svd

__all__ = ["METHODS", "Factors", "RowSample", "fit_output", "fit_scores", "fit_svd"]

# Query rows whose second moment stands for that of all of them: eight times the 64 or 128 dimensions of usual heads,
# for a Gram matrix that costs little beside the rows of attention.
N_MOMENT_ROWS = 1024


class RowSample(NamedTuple):
    """What a fit uses: rows of the attention matrix, and the keys that are not left to exact scores."""

    rows: Rows
    pool_batch: bool = False
    keep: Array | None = None  # (..., H, Nk): False for keys that stay exact
    seen: Seen = Seen(None, None)  # what takes part; the rest of the problem is zero


class Factors(NamedTuple):
    """Columns for all ranks: left (..., H, G or 1, D, p), wk (..., H, 1, D, p), wv (..., H, 1, Dv, p), c and mu.

    With ``is_formula`` columns of left are right singular vectors of the queries, which wq is yet to be made of;
    otherwise they are wq.
    """

    left: Array
    wk: Array
    wv: Array
    c: Array
    mu: Array
    is_formula: bool = False

    def maps(self, ranks: tuple[tuple[int, int], ...], xp: Namespace) -> Maps:
        """Return maps for ranks, a pair for each head, as wide as the largest of them."""
        widest_qk, widest_v = max(qk for qk, _ in ranks), max(v for _, v in ranks)
        transposed = xp.matrix_transpose
        left, wk = self.left[..., :widest_qk], self.wk[..., :widest_qk]
        wv = self.wv[..., :widest_v]
        wq = left @ (transposed(left) @ wk) if self.is_formula else left
        return Maps(wq, wk, wv, transposed(wv), self.c, self.mu, ranks)


def fit_svd(problem: AttentionProblem, sample: RowSample) -> Factors:
    """Right singular vectors of Q (per query head), K and V, uncentred: the formula to the letter."""
    backend, xp = problem.backend, problem.xp
    q, k, v = (_pooled(x, sample, xp) for x in (problem.q, problem.k, problem.v))
    left, wk, wv = (_right_vectors(x, backend) for x in (q, k, v))
    return Factors(left, wk, wv, xp.zeros_like(k[..., :1, :]), xp.zeros_like(v[..., :1, :]), True)


def fit_scores(problem: AttentionProblem, sample: RowSample) -> Factors:
    r"""Best low rank of :math:`Q (K - 1 c^T)^T`, with c the mean key, and principal components of V.

    With the triangular factors of Q and K the scores have the singular values of a small core; its right singular
    vectors Y give Wq = B Y and Wk = B^{-T} Y, where B B^T = (K - c)^T (K - c).
    """
    backend, xp = problem.backend, problem.xp
    q = _pooled(_of_key_heads(problem.q, xp), sample, xp)
    q = _triangle(q / _peak(q, xp), backend)
    (k, c), (v, mu) = (_centred(x, sample, xp) for x in (problem.k, problem.v))
    # Scales of Q and K do not matter: what one map is multiplied by, the other is divided by.
    _, S, Vh = backend.small_svd(_square(_triangle(k / _peak(k, xp), backend), backend))
    root = _floored(S, k.shape[-1] * xp.finfo(k.dtype).eps, xp)[..., None, :]
    V = xp.matrix_transpose(Vh)
    Y = _right_vectors(q @ (V * root), backend)
    wv = _right_vectors(v, backend)
    return Factors((V * root) @ Y, (V / root) @ Y, wv, c, mu)


def fit_output(problem: AttentionProblem, sample: RowSample) -> Factors:
    r"""Best low rank of the scores in the metric of the attention received, principal components of the output.

    A change dS of the scores changes the output by :math:`\sum_j P_{ij} dS_{ij} (v_j - o_i)`. So a key counts by the
    attention it receives, :math:`w_j = \sum_i P_{ij}` over the sampled rows, and the scores are approximated in
    :math:`\sum_{ij} w_j (dS_{ij})^2`; V only matters where the output, P V, goes.
    """
    backend, xp = problem.backend, problem.xp
    rows = row_weights(problem, take_rows(problem.q, sample.rows, backend), problem.k, sample.rows)
    if sample.seen.queries is not None and isinstance(sample.rows, list):
        # All rows: those that take no part may still see something.
        rows = rows * xp.astype(sample.seen.queries, rows.dtype)[..., None]
    rows = _of_key_heads(rows, xp)
    if sample.keep is not None:
        rows = rows * xp.astype(sample.keep, rows.dtype)[..., None, None, :]
    # The weights of the keys, w_j.
    received = xp.sum(rows, axis=-2)[..., None]
    if backend.is_eager(received) and not bool(xp.all(xp.isfinite(received))):
        # An eigensolver would not converge.
        raise ValueError("q, k and mask must have finite scores, got NaN or infinity in a product")
    k, out = _pooled(problem.k, sample, xp), _pooled(rows @ problem.v, sample, xp)
    mass = _pooled(xp.sum(rows, axis=-1, keepdims=True), sample, xp)
    received = _pooled(received, sample, xp)
    total = xp.sum(mass, axis=-2, keepdims=True)
    total = xp.where(total == 0, xp.ones_like(total), total)
    c = xp.matrix_transpose(received) @ k / total
    mu = xp.sum(out, axis=-2, keepdims=True) / total
    left, wk = _weighted_low_rank(
        _moment(_some_queries(problem, sample), backend),
        # Both are needed: where one key gets all the attention, the weights of the others are tiny.
        _moment((k - c) / _peak(k, xp) * xp.sqrt(received), backend),
        backend,
    )
    # Not from its Gram matrix: the output is smooth, and a high rank needs directions below sqrt(eps) of the largest.
    spread = out - mass * mu
    _, _, Vh = backend.small_svd(_square(_triangle(spread / _peak(spread, xp), backend), backend))
    return Factors(left, wk, xp.matrix_transpose(Vh), c, mu)


METHODS = {"svd": fit_svd, "scores": fit_scores, "output": fit_output}


def _of_key_heads(x: Array, xp: Namespace) -> Array:
    """(..., H, G, S, D) to (..., H, 1, G * S, D): the rows of all query heads that share a key head."""
    return xp.reshape(x, (*x.shape[:-3], 1, x.shape[-3] * x.shape[-2], x.shape[-1]))


def _pooled(x: Array, sample: RowSample, xp: Namespace) -> Array:
    """Make the axes before those of a head, (H, G or 1, N, D), into rows, where asked to pool."""
    n_batch = x.ndim - 4
    if not sample.pool_batch or n_batch == 0:
        return x
    x = xp.permute_dims(x, (n_batch, n_batch + 1, *range(n_batch), n_batch + 2, n_batch + 3))
    return xp.reshape(x, (*x.shape[:2], -1, x.shape[-1]))


def _centred(x: Array, sample: RowSample, xp: Namespace) -> tuple[Array, Array]:
    """Keys or values less their mean, over those that are seen, and the mean."""
    pooled = _pooled(x, sample, xp)
    if sample.seen.keys is None:
        mean = xp.mean(pooled, axis=-2, keepdims=True)
        return pooled - mean, mean
    seen = _pooled(xp.astype(sample.seen.keys, x.dtype)[..., None], sample, xp)
    mean = xp.sum(pooled, axis=-2, keepdims=True) / _positive(
        xp.sum(seen, axis=-2, keepdims=True), xp
    )
    return (pooled - mean) * seen, mean


def _some_queries(problem: AttentionProblem, sample: RowSample) -> Array:
    """Take queries that stand for all, (..., H, 1, rows, D)."""
    backend, n = problem.backend, problem.q.shape[-2]
    rows = sample_seen_rows(sample.seen.queries, n, N_MOMENT_ROWS, None, backend)
    q = _of_key_heads(take_rows(problem.q, rows, problem.backend), problem.xp)
    return _pooled(q, sample, problem.xp)


def _triangle(x: Array, backend: Backend) -> Array:
    """Return a matrix of at most D rows with the Gram matrix of ``x``."""
    return backend.triangular_factor(x) if x.shape[-2] > x.shape[-1] else x


def _right_vectors(x: Array, backend: Backend) -> Array:
    """All right singular vectors, as columns; the scale does not matter, but squares are to stay in range."""
    if _has_wider(x, backend):
        # Squares of single precision lose nothing in double, where a QR and an SVD take three to ten times as long.
        _, V = backend.small_eigh(backend.gram(x))
        return backend.xp.astype(backend.xp.flip(V, axis=-1), x.dtype)
    x = _square(x / _peak(x, backend.xp), backend)
    if backend.is_eager(x):
        return backend.xp.matrix_transpose(thin_svd(x, backend)[2])
    return backend.xp.matrix_transpose(backend.small_svd(backend.triangular_factor(x))[2])


def _has_wider(x: Array, backend: Backend) -> bool:
    """Whether sums over ``x`` are formed in a wider dtype, where values can be looked at."""
    return backend.is_eager(x) and backend.accumulation_dtype(x) != x.dtype


def _square(x: Array, backend: Backend) -> Array:
    """Append rows of zeros to a wide matrix: its singular value decomposition then has all right vectors."""
    n_missing = x.shape[-1] - x.shape[-2]
    if n_missing <= 0:
        return x
    shape, device = (*x.shape[:-2], n_missing, x.shape[-1]), backend.creation_device(x)
    return backend.xp.concat([x, backend.xp.zeros(shape, dtype=x.dtype, device=device)], axis=-2)


def _moment(x: Array, backend: Backend) -> Array:
    """Gram matrix of the columns over the square of the largest entry, which might overflow."""
    return _gram(x / _peak(x, backend.xp), backend.xp)


def _gram(x: Array, xp: Namespace) -> Array:
    return xp.matrix_transpose(x) @ x


def _peak(x: Array, xp: Namespace) -> Array:
    """Largest modulus of each matrix, 1 for zero."""
    highest, lowest = (f(x, axis=(-2, -1), keepdims=True) for f in (xp.max, xp.min))
    return _positive(xp.maximum(highest, -lowest), xp)


def _positive(x: Array, xp: Namespace) -> Array:
    return xp.where(x > 0, x, xp.ones_like(x))


def _floored(x: Array, relative: float, xp: Namespace) -> Array:
    """Lift values along the last axis to a fraction of the largest: directions without data stay invertible."""
    largest = _positive(xp.max(x, axis=-1, keepdims=True), xp)
    return xp.maximum(x, largest * relative)


def _weighted_low_rank(moment_q: Array, moment_k: Array, backend: Backend) -> tuple[Array, Array]:
    r"""Minimise :math:`\|A^{1/2} (I - W_q W_k^T) B^{1/2}\|_F` at every rank at once, for the moments A and B.

    With B = R R^T and Y the eigenvectors of R^T A R: Wq = R Y, Wk = R^{-T} Y.
    """
    xp = backend.xp
    w, U = backend.small_eigh(moment_k)
    root = xp.sqrt(_floored(w, w.shape[-1] * xp.finfo(w.dtype).eps, xp))[..., None, :]
    R = U * root
    _, Y = backend.small_eigh(xp.matrix_transpose(R) @ moment_q @ R)
    Y = xp.flip(Y, axis=-1)
    return R @ Y, (U / root) @ Y
