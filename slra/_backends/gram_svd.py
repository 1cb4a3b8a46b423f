"""Many small singular value decompositions by eigenvalue problems, for a library that has only those in batches."""

from collections.abc import Callable

from slra._backends.cholesky_qr import tall_qr, with_phases
from slra._backends.elements import redo
from slra._backends.standard import Backend, matrix_h
from slra._typing import Array

__all__ = ["gram_svd"]

Factors = tuple[Array, Array, Array]


def gram_svd(b: Array, backend: Backend, otherwise: Callable[[Array], Factors]) -> Factors:
    """Thin SVD of a batch of matrices (..., m, n), eager, as good as LAPACK's.

    With V the eigenvectors of ``B^H B`` and ``Q R = B V``, ``B = Q R V^H`` holds to rounding, whatever the Gram matrix
    has lost. What it costs shows in R, which should be diagonal: if what lies beside the diagonal has a Frobenius norm
    of at most ``n * eps * sigma_1``, leaving it out is an error of that size in ``B``, of the order that any SVD makes.
    All is done in the wide dtype. So single precision passes whatever its singular values. In double precision two of
    them below about 1e-2 of the largest fail unless they are zero, and those elements of the batch go to ``otherwise``.
    """
    xp = backend.xp
    if b.shape[-2] < b.shape[-1]:
        tall = gram_svd(
            matrix_h(b, xp), backend, lambda a: _adjoint(otherwise(matrix_h(a, xp)), backend)
        )
        return _adjoint(tall, backend)
    largest = xp.astype(backend.max_abs(b), backend.real_dtype(backend.accumulation_dtype(b)))[
        ..., None, None
    ]
    unit = xp.where(largest > 0, largest, xp.ones_like(largest))
    x = xp.astype(b, backend.accumulation_dtype(b)) / unit
    V = xp.flip(backend.small_eigh(backend.gram(x))[1], axis=-1)
    Q, R = tall_qr(x @ V, backend)
    S = xp.abs(xp.linalg.diagonal(R))
    order = xp.argsort(S, axis=-1, descending=True)
    S = xp.take_along_axis(S, order, axis=-1)
    U, V = (
        xp.take_along_axis(y, order[..., None, :], axis=-1) for y in (with_phases(Q, R, backend), V)
    )
    limit = b.shape[-1] * float(xp.finfo(b.dtype).eps) * S[..., 0]
    ok = backend.norm_squared(xp.triu(R, k=1)) <= limit * limit
    fast = (
        xp.astype(U, b.dtype),
        xp.astype(S * unit[..., 0], backend.real_dtype(b.dtype)),
        xp.astype(matrix_h(V, xp), b.dtype),
    )
    U, S, Vh = redo(ok, fast, otherwise, (b,), backend)
    return U, S, Vh


def _adjoint(factors: Factors, backend: Backend) -> Factors:
    """Factors of the conjugate transpose."""
    U, S, Vh = factors
    return matrix_h(Vh, backend.xp), S, matrix_h(U, backend.xp)
