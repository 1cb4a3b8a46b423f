"""Projections on the l0 ball and on an affine set."""

from slra._backends.ambient import isolated
from slra._backends.standard import matrix_h
from slra._typing import Array
from slra._validate import check_axis, check_count, promote, resolve

__all__ = ["project_affine", "project_l0_ball"]


@isolated
def project_l0_ball(x: Array, n_nonzero: int = 1, *, axis: int | tuple[int, ...] = -1) -> Array:
    r"""Keep the largest entries of each vector: a nearest point with so many nonzero entries at most.

    Parameters
    ----------
    x : array
        Real or complex floating, finite.
    n_nonzero : int
        Number of entries to keep, 0 or more.
    axis : int or tuple of int
        The axes that make up one vector; the others are a batch.

    Returns
    -------
    array
        The shape, dtype and device of ``x``: entries are kept as they are or set to zero.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or ``n_nonzero`` or ``axis`` not ints.
    ValueError
        If ``n_nonzero`` is negative, or ``axis`` out of range or empty.

    Notes
    -----
    The set is not convex: of entries of one modulus at the border, any are kept.

    References
    ----------
    T. Blumensath, M. E. Davies, Iterative hard thresholding for compressed sensing, Applied and Computational Harmonic
    Analysis 27 (2009), 265-274.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.project_l0_ball(np.asarray([-3.0, 0.5, 2.0]), 2).tolist()
    [-3.0, 0.0, 2.0]
    """
    backend = resolve(x=x)
    promoted = promote(backend, x=x)
    (x,) = promoted.arrays
    axes = check_axis(x, axis)
    flat, restore = backend.as_vectors(x, axes)
    kept = min(check_count(n_nonzero, "n_nonzero"), flat.shape[-1])
    # A matrix of vectors, whatever the batch: what selects needs two axes.
    rows = backend.xp.reshape(flat, (-1, flat.shape[-1]))
    rows = backend.keep_largest(rows, kept)
    return promoted.cast_back(backend, restore(backend.xp.reshape(rows, flat.shape)))[0]


@isolated
def project_affine(x: Array, A: Array, b: Array) -> Array:
    r"""Nearest point that solves ``A y = b``.

    Parameters
    ----------
    x : array, shape (..., n)
        Real or complex floating.
    A : array, shape (p, n)
        Of full row rank, ``p <= n``; real where ``x`` is.
    b : array, shape (p,) or (..., p)
        What ``A`` must make of the answer.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN spreads over its vector.

    Raises
    ------
    TypeError
        If one is not a floating array, or two come from different libraries.
    ValueError
        If the shapes do not fit, or ``A`` has dependent rows where values can be looked at.

    Notes
    -----
    With ``A^H = Q R``

    .. math:: P(x) = x - Q (Q^H x - R^{-H} b)

    References
    ----------
    N. Parikh, S. Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1 (2014), section 6.2.2.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> sum_to_one = np.ones((1, 3)), np.ones(1)
    >>> prox.project_affine(np.asarray([0.0, 1.0, 3.0]), *sum_to_one).round(12).tolist()
    [-1.0, 0.0, 2.0]
    """
    backend = resolve(x=x, A=A, b=b)
    promoted = promote(backend, x=x, A=A, b=b)
    work, A, b = promoted.arrays
    n = x.shape[-1] if x.ndim else 0
    if A.ndim != 2 or A.shape[1] != n or not 1 <= A.shape[0] <= n:
        raise ValueError(f"A must have shape (p, {n}) with p from 1 to {n}, got {tuple(A.shape)}")
    p = A.shape[0]
    if tuple(b.shape) not in ((p,), (*x.shape[:-1], p)):
        raise ValueError(f"b must have shape ({p},) or (..., {p}) as x has, got {tuple(b.shape)}")
    xp = backend.xp
    Q, R = backend.qr(matrix_h(A, xp))
    if backend.is_eager(R):
        sizes = xp.abs(xp.linalg.diagonal(R))
        limit = n * xp.finfo(work.dtype).eps * xp.max(sizes)
        if bool(xp.any(sizes <= limit)):
            raise ValueError("A must have full row rank, got rows that depend on each other")
    with backend.ignore_overflow():
        aim = (matrix_h(backend.small_inverse(R), xp) @ b[..., None])[..., 0]
        excess = (matrix_h(Q, xp) @ work[..., None])[..., 0] - aim
        return promoted.cast_back(backend, work - (Q @ excess[..., None])[..., 0])[0]
