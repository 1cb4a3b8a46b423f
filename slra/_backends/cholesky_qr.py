"""Orthonormal bases of tall blocks: scaled, shifted Cholesky-QR, and Householder's QR where that fails."""

from collections.abc import Callable

from slra._backends.elements import redo
from slra._backends.standard import Backend, matrix_h
from slra._typing import Array

__all__ = ["orthonormal", "precondition", "tall_qr", "with_phases"]

_MAX_PASSES = 3
# An inverse factor may be as large as one over the square root of a shift.
_NEGLIGIBLE = 1e-10


def orthonormal(y: Array, backend: Backend) -> Array:
    """Orthonormal basis of the columns of ``y``, shape (..., m, l) with m >= l; see `tall_qr`."""
    return tall_qr(y, backend)[0]


def tall_qr(
    y: Array, backend: Backend, otherwise: Callable[[Array], tuple[Array, Array]] | None = None
) -> tuple[Array, Array]:
    """Reduced QR of a tall ``y`` whose squares stay in range.

    Each pass scales the columns to unit norm and divides by the Cholesky factor of their Gram matrix. A pass whose
    columns were then nearly orthonormal ends it: its output is orthonormal to rounding, whatever came before. An
    element of the batch that gets there in no pass (dependent or zero columns) is done again by Householder's QR, which
    always gives orthonormal columns (``backend.qr``, or ``otherwise``). So is everything lazy.

    References
    ----------
    T. Fukaya, R. Kannan, Y. Nakatsukasa, Y. Yamamoto, Y. Yanagisawa, Shifted Cholesky QR for computing the QR
    factorization of ill-conditioned matrices, SIAM J. Sci. Comput. 42 (2020), A477-A503.
    """
    otherwise = otherwise or backend.qr
    if not backend.is_eager(y):
        return otherwise(y)
    xp = backend.xp
    Q, R = y, None
    for _ in range(_MAX_PASSES):
        unit, norms = _of_unit_columns(backend.gram(Q), y, backend)
        was_near = _is_near_identity(unit, backend)
        # The last pass goes without a shift, which would show in its result.
        near = was_near[..., None, None]
        shift = xp.where(near, xp.zeros_like(unit[..., :1, :1]), _shift(unit, backend))
        L = backend.cholesky(backend.lifted(unit, shift))
        Q = _divide(Q, L, norms, backend)
        step = matrix_h(L, xp) * norms[..., None, :]
        R = step if R is None else step @ R
        if bool(xp.all(was_near)):
            return Q, xp.astype(R, y.dtype, copy=False)
    return redo(was_near, (Q, xp.astype(R, y.dtype, copy=False)), otherwise, (y,), backend)


def precondition(y: Array, gram: Array, backend: Backend) -> Array:
    """Basis of the columns of ``y``, well conditioned rather than orthonormal: one pass, given their Gram matrix."""
    if not backend.is_eager(y):
        return backend.qr(y)[0]
    xp = backend.xp
    unit, norms = _of_unit_columns(gram, y, backend)
    L = backend.cholesky(backend.lifted(unit, _shift(unit, backend)))
    Q = _divide(y, L, norms, backend)
    ok = xp.isfinite(backend.max_abs(Q))
    return redo(ok, (Q,), lambda part: backend.qr(part)[:1], (y,), backend)[0]


def with_phases(Q: Array, R: Array, backend: Backend) -> Array:
    """Turn each column of ``Q`` by the phase of its entry on the diagonal of ``R``."""
    return Q * backend.phases(backend.xp.linalg.diagonal(R))[..., None, :]


def _of_unit_columns(gram: Array, y: Array, backend: Backend) -> tuple[Array, Array]:
    """Gram matrix of the columns of ``y`` scaled to unit norm, and these norms (one for a column that is zero)."""
    # Shorter columns count as zero: what would bring them to unit length is out of the range of y, or their square
    # has lost digits.
    tiny, tiny_square = (float(backend.xp.finfo(x.dtype).smallest_normal) for x in (y, gram))
    return backend.unit_gram(gram, max((tiny / _NEGLIGIBLE) ** 2, tiny_square / _NEGLIGIBLE**2))


def _shift(gram: Array, backend: Backend) -> float:
    """Bound what rounding takes from the eigenvalues of a Gram matrix of unit columns."""
    n_columns = int(gram.shape[-1])
    return 4 * n_columns * float(backend.xp.finfo(gram.dtype).eps)


def _divide(y: Array, L: Array, norms: Array, backend: Backend) -> Array:
    """``y`` times the inverse of ``L^H diag(norms)``: a product with a small inverse runs faster than a solve."""
    xp = backend.xp
    inverse = matrix_h(backend.small_inverse(L), xp) / norms[..., :, None]
    return y @ xp.astype(inverse, y.dtype, copy=False)


def _is_near_identity(gram: Array, backend: Backend) -> Array:
    """Whether unit columns with this Gram matrix are within 1/2 of orthonormal; false where it is NaN."""
    off = backend.xp.max(backend.xp.abs(backend.lifted(gram, -1.0)), axis=(-2, -1))
    return off <= 0.5 / gram.shape[-1]
