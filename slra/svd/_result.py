"""The result of a singular value decomposition, and the rule that makes it unique."""

from typing import NamedTuple

from slra._backends import Backend
from slra._typing import Array

__all__ = ["SVDResult", "fix_signs"]


class SVDResult(NamedTuple):
    """Truncated singular value decomposition, ``x ~ (U * S) @ Vh``.

    Attributes
    ----------
    U : array, shape (..., m, k)
        Left singular vectors, orthonormal columns.
    S : array, shape (..., k)
        Singular values, real, descending.
    Vh : array, shape (..., k, n)
        Conjugate transpose of the right singular vectors, orthonormal rows.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> result = slra.truncated_svd(np.diag([3.0, 2.0, 1.0]), 2)
    >>> U, S, Vh = result
    >>> S.tolist(), result.S is S
    ([3.0, 2.0], True)
    """

    U: Array
    S: Array
    Vh: Array


def fix_signs(U: Array, S: Array, Vh: Array, backend: Backend) -> SVDResult:
    """Make the entry of largest modulus in each column of ``U`` real and positive, lowest index of those that tie."""
    xp, n_rows = backend.xp, U.shape[-2]
    rows = xp.arange(n_rows, device=backend.creation_device(U))[:, None]
    size = xp.abs(U)
    # Moduli that tie do so to rounding, which is not the same in two libraries: eps over the gap to the next value.
    near = float(xp.finfo(size.dtype).eps) ** 0.5
    ties = size >= (1 - near) * xp.max(size, axis=-2, keepdims=True)
    first = xp.min(xp.where(ties, rows, xp.full_like(rows, n_rows)), axis=-2, keepdims=True)
    pivot = xp.sum(xp.where(rows == first, U, xp.zeros_like(U)), axis=-2)
    size = xp.abs(pivot)
    phase = pivot / xp.where(size == 0, xp.ones_like(size), size)
    phase = xp.where(size == 0, xp.ones_like(phase), phase)
    turn = xp.conj(phase) if backend.is_complex(U) else phase
    return SVDResult(U * turn[..., None, :], S, Vh * phase[..., :, None])
