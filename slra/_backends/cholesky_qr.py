"""Orthonormal bases of tall blocks: scaled, shifted Cholesky-QR, and Householder's QR where that fails."""

from slra._backends.agnostic import Primitives, matrix_h
from slra._backends.elements import redo
from slra._typing import Array

__all__ = ["flattened", "orthonormal", "tall_qr", "with_phases"]

_MAX_PASSES = 3
# An inverse factor may be as large as one over the square root of a shift.
_NEGLIGIBLE = 1e-10


def orthonormal(y: Array, table: Primitives) -> Array:
    """Orthonormal basis of the columns of ``y``, shape (..., m, l) with m >= l; see `tall_qr`."""
    return tall_qr(y, table)[0]


def tall_qr(y: Array, table: Primitives) -> tuple[Array, Array]:
    """Reduced QR of a tall ``y`` whose squares stay in range.

    Each pass scales the columns to unit norm and divides by the Cholesky factor of their Gram matrix. A pass whose
    input was nearly orthonormal ends it: its output is orthonormal to rounding, whatever came before. An element of
    the batch that gets there in no pass (dependent or zero columns) is done again by Householder's QR, which always
    gives orthonormal columns. So is everything lazy.

    References
    ----------
    T. Fukaya, R. Kannan, Y. Nakatsukasa, Y. Yamamoto, Y. Yanagisawa, Shifted Cholesky QR for computing the QR
    factorization of ill-conditioned matrices, SIAM J. Sci. Comput. 42 (2020), A477-A503.
    """
    if not table.is_eager(y):
        return table.qr(y)
    xp = table.xp
    Q, R = y, None
    for _ in range(_MAX_PASSES):
        gram = table.gram(Q)
        was_near = _is_near_identity(gram, table)
        # The last pass goes without a shift, which would show in its result.
        far = xp.astype(xp.logical_not(was_near), gram.dtype)[..., None, None]
        L, norms = _factor(gram, far * _shift(gram, table), y, table)
        Q = _divide(Q, L, norms, table)
        step = matrix_h(L, xp) * norms[..., None, :]
        R = step if R is None else step @ R
        if bool(xp.all(was_near)):
            break
    return redo(was_near, (Q, xp.astype(R, y.dtype)), table.qr, (y,), table)


def flattened(y: Array, gram: Array, table: Primitives) -> Array:
    """Basis of the columns of ``y``, well conditioned rather than orthonormal: one pass, given their Gram matrix."""
    if not table.is_eager(y):
        return table.qr(y)[0]
    xp = table.xp
    Q = _divide(y, *_factor(gram, _shift(gram, table), y, table), table)
    ok = xp.all(xp.isfinite(Q), axis=(-2, -1))
    return redo(ok, (Q,), lambda part: table.qr(part)[:1], (y,), table)[0]


def with_phases(Q: Array, R: Array, table: Primitives) -> Array:
    """Turn each column of ``Q`` by the phase of its entry on the diagonal of ``R``."""
    xp = table.xp
    diagonal = xp.linalg.diagonal(R)
    size = xp.abs(diagonal)
    one = xp.ones_like(diagonal)
    # Complex subnormals cannot be divided, and their phase changes nothing.
    has_phase = size > float(xp.finfo(R.dtype).smallest_normal)
    phase = xp.where(has_phase, diagonal / xp.where(has_phase, size, xp.ones_like(size)), one)
    return Q * phase[..., None, :]


def _factor(gram: Array, shift: Array | float, y: Array, table: Primitives) -> tuple[Array, Array]:
    """Cholesky factor of the Gram matrix of unit columns, plus a shift, and the norms of the columns of ``y``."""
    xp = table.xp
    squares = table.real_part(xp.linalg.diagonal(gram))
    # Shorter columns count as zero: what would bring them to unit length is out of the range of y, or their square
    # has lost digits.
    tiny, tiny_square = (float(xp.finfo(x.dtype).smallest_normal) for x in (y, gram))
    least = max((tiny / _NEGLIGIBLE) ** 2, tiny_square / _NEGLIGIBLE**2)
    norms = xp.sqrt(xp.where(squares > least, squares, xp.ones_like(squares)))
    norms = xp.astype(norms, gram.dtype)
    unit = gram / (norms[..., :, None] * norms[..., None, :])
    return table.cholesky(unit + shift * _eye(gram, table)), norms


def _shift(gram: Array, table: Primitives) -> float:
    """Bound what rounding takes from the eigenvalues of a Gram matrix of unit columns."""
    n_columns = int(gram.shape[-1])
    return 4 * n_columns * float(table.xp.finfo(gram.dtype).eps)


def _divide(y: Array, L: Array, norms: Array, table: Primitives) -> Array:
    """``y`` times the inverse of ``L^H diag(norms)``: a product with a small inverse runs faster than a solve."""
    xp = table.xp
    inverse = matrix_h(table.small_inverse(L), xp) / norms[..., :, None]
    return y @ xp.astype(inverse, y.dtype, copy=False)


def _is_near_identity(gram: Array, table: Primitives) -> Array:
    """Whether the columns of a Gram matrix are within 1/2 of orthonormal; false where it is NaN."""
    off = table.xp.max(table.xp.abs(gram - _eye(gram, table)), axis=(-2, -1))
    return off * gram.shape[-1] <= 0.5


def _eye(like: Array, table: Primitives) -> Array:
    device = table.creation_device(like)
    return table.xp.eye(like.shape[-1], dtype=like.dtype, device=device)
