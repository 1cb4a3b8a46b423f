"""Subspace iteration: one block, orthonormalised on both sides; the least memory."""

from slra._backends.cholesky_qr import orthonormal
from slra._typing import Array
from slra.svd._linear_map import LinearMap
from slra.svd.gram import by_qr, spectrum, tall_svd

__all__ = ["DEFAULT_ITER", "subspace_svd"]

DEFAULT_ITER = 4


def subspace_svd(A: LinearMap, sample: Array, rank: int, n_iter: int) -> tuple[Array, Array, Array]:
    """Leading triplets ``U, S, V`` of ``A``, from ``sample = A @ test_matrix``.

    References
    ----------
    N. Halko, P. G. Martinsson, J. A. Tropp, Finding structure with randomness, SIAM Review 53 (2011), 217-288,
    Algorithms 4.4 and 5.1.
    """
    table = A.table
    Q = orthonormal(sample, table)
    for _ in range(n_iter):
        Q = orthonormal(A.matmat(orthonormal(A.rmatmat(Q), table)), table)
    Z = A.rmatmat(Q)
    if A.is_eager:
        V, S, E = tall_svd([Z], spectrum(table.gram(Z), table), rank, table)
    else:
        V, S, E = by_qr([Z], rank, table)
    return Q @ E, S, V
