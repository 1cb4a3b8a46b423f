"""Subspace iteration: one block, orthonormalised on both sides; the least memory."""

from slra._backends.cholesky_qr import orthonormal
from slra._typing import Array
from slra.svd._linear_map import LinearMap
from slra.svd.gram import spectrum, tall_svd
from slra.svd.truncated import by_triangle

__all__ = ["DEFAULT_ITER", "subspace_svd"]

DEFAULT_ITER = 4


def subspace_svd(A: LinearMap, omega: Array, rank: int, n_iter: int) -> tuple[Array, Array, Array]:
    """Leading triplets ``U, S, V`` of ``A``, from a test matrix ``omega``.

    References
    ----------
    N. Halko, P. G. Martinsson, J. A. Tropp, Finding structure with randomness, SIAM Review 53 (2011), 217-288,
    Algorithms 4.4 and 5.1.
    """
    backend = A.backend
    Q = _range(A, omega, n_iter) if A.is_eager else _range_by_normal_products(A, omega, n_iter)
    Z = A.rmatmat(Q)
    if A.is_eager:
        V, S, E = tall_svd([Z], spectrum(backend.gram(Z), backend), rank, backend)
    else:
        V, S, E = by_triangle(Z, lambda v: Z @ v, rank, backend)
    return Q @ E, S, V


def _range(A: LinearMap, omega: Array, n_iter: int) -> Array:
    """Orthonormal basis of ``(A A^H)^n_iter A omega``."""
    backend = A.backend
    Q = orthonormal(A.matmat(omega), backend)
    for _ in range(n_iter):
        Q = orthonormal(A.matmat(orthonormal(A.rmatmat(Q), backend)), backend)
    return Q


def _range_by_normal_products(A: LinearMap, omega: Array, n_iter: int) -> Array:
    """Find the same basis by products that may read ``A`` once instead of twice; they work on its short side."""
    backend = A.backend
    if A.shape[-2] < A.shape[-1]:
        Q = orthonormal(A.matmat(omega), backend)
        for _ in range(n_iter):
            Q = orthonormal(A.H.normal(Q)[1], backend)
        return Q
    V = omega
    for _ in range(n_iter):
        V = orthonormal(A.normal(V)[1], backend)
    return orthonormal(A.matmat(V), backend)
