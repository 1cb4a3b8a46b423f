"""A matrix given by two functions, for any array library."""

from collections.abc import Callable
from typing import NamedTuple

from slra._typing import Array

__all__ = ["MatrixOperator"]


class MatrixOperator(NamedTuple):
    """A matrix known by its products, in place of an array in `randomized_svd` and its relatives.

    Attributes
    ----------
    matmat : callable
        ``matmat(v)`` returns ``A @ v`` for an array of shape (n, k).
    rmatmat : callable
        ``rmatmat(u)`` returns ``A^H @ u``, with the *conjugate* transpose, for an array of shape (m, k).
    shape : tuple of int
        ``(m, n)``.
    like : array
        Any array of the library, on the device and of the dtype (32 or 64 bits) that the products take and give.
    frobenius_norm : float, optional
        ``||A||_F``. Needed by ``rtol``.

    Examples
    --------
    A rank-one matrix plus a diagonal, never formed:

    >>> import numpy as np
    >>> import slra
    >>> d, ones = np.zeros(100), np.ones((100, 1))
    >>> d[0] = 300.0
    >>> A = slra.MatrixOperator(
    ...     lambda v: d[:, None] * v + ones @ (ones.T @ v),
    ...     lambda u: d[:, None] * u + ones @ (ones.T @ u),
    ...     (100, 100),
    ...     like=d,
    ... )
    >>> exact = np.linalg.svd(np.diag(d) + 1, compute_uv=False)
    >>> bool(np.allclose(slra.randomized_svd(A, 2, rng=0).S, exact[:2]))
    True
    """

    matmat: Callable[[Array], Array]
    rmatmat: Callable[[Array], Array]
    shape: tuple[int, int]
    like: Array
    frobenius_norm: float | None = None
