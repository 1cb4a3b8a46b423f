"""Singular values of a tall matrix from its Gram matrix, made safe.

A bare Gram matrix squares the condition number: singular values below sqrt(eps) * sigma_1 are lost, and left vectors
miss orthogonality long before. Three things repair that: single precision is accumulated in double; the left vectors
are orthonormalised again, and in double precision the small factor that falls out is decomposed once more; where
the wanted values are too small even for this, QR takes over, for the elements of the batch that need it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from slra._backends import Backend
from slra._backends.cholesky_qr import tall_qr, with_phases
from slra._backends.elements import redo
from slra._backends.standard import matrix_h
from slra._typing import Array, Namespace
from slra.svd._costs import direct_is_faster
from slra.svd._linear_map import LinearMap
from slra.svd.truncated import by_triangle, thin_svd

__all__ = ["Spectrum", "combine", "exact_svd", "map_svd", "spectrum", "tall_svd"]


# Rows of a slab: enough for a product at full speed, few enough for the joined blocks to stay small.
_SLAB_ROWS = 1 << 13


class Spectrum(NamedTuple):
    """Singular values and right vectors of a tall matrix, descending, in the wide dtype."""

    values: Array
    vectors: Array


def spectrum(gram: Array, backend: Backend) -> Spectrum:
    """Spectrum of a matrix whose Gram matrix this is."""
    xp = backend.xp
    squares, vectors = backend.small_eigh(gram)
    squares = xp.flip(squares, axis=-1)
    values = xp.sqrt(xp.maximum(squares, xp.zeros_like(squares)))
    return Spectrum(values, xp.flip(vectors, axis=-1))


def tall_svd(
    blocks: Sequence[Array], known: Spectrum, rank: int, backend: Backend
) -> tuple[Array, Array, Array]:
    """Leading ``rank`` singular triplets of ``[W_1, W_2, ...]``, a tall matrix in blocks of columns.

    Returns ``U`` (..., m, rank), ``S`` (..., rank) and ``V`` (..., n, rank), not its transpose.

    Where the Gram matrix could not be accumulated in a wider dtype, it is off by eps * sigma_1^2, and so is the square
    of the k-th value if others crowd around it (far less if not). The eps * sigma_1^2 / sigma_k that this makes of
    sigma_k is kept below 1e-12 * sigma_1 in double and 10 * eps * sigma_1 in single precision; beyond that QR is used.
    """
    fast, ok = _from_spectrum(
        lambda V: combine(blocks, V, backend), blocks[0], known, rank, backend
    )
    return redo(ok, fast, lambda *parts: _by_qr(parts, rank, backend), tuple(blocks), backend)


def map_svd(A: LinearMap, gram: Array, rank: int) -> tuple[Array, Array, Array] | None:
    """Leading triplets ``U, S, V`` of a map whose Gram matrix on its short side is known; None where that lost them."""
    if A.shape[-2] < A.shape[-1]:
        found = map_svd(A.H, gram, rank)
        return found and (found[2], found[1], found[0])
    factors, ok = _from_spectrum(A.matmat, A.like, spectrum(gram, A.backend), rank, A.backend)
    return factors if bool(A.backend.xp.all(ok)) else None


def _from_spectrum(
    product: Callable[[Array], Array], like: Array, known: Spectrum, rank: int, backend: Backend
) -> tuple[tuple[Array, Array, Array], Array]:
    """Triplets ``U, S, V`` of ``W`` from ``product(V) = W V``, and whether they are as good as QR's."""
    xp = backend.xp
    values, vectors = known.values[..., :rank], known.vectors[..., :rank]
    V = xp.astype(vectors, like.dtype, copy=False)
    Q, R = tall_qr(product(V), backend)
    if backend.accumulation_dtype(like) != like.dtype:
        # R is diagonal to working precision, and the values are better than it could give.
        S = xp.astype(values, backend.real_dtype(like.dtype))
        return (with_phases(Q, R, backend), S, V), S[..., 0] == S[..., 0]
    U, S, Vh = backend.small_svd(R)
    limit = 1e-3 if xp.finfo(like.dtype).bits == 64 else 0.1
    ok = (values[..., -1] > limit * values[..., 0]) | (values[..., 0] == 0)
    return (Q @ U, S, V @ matrix_h(Vh, xp)), ok


def exact_svd(A: LinearMap, rank: int) -> tuple[Array, Array, Array]:
    """Leading triplets ``U, S, V`` of a map whose short side is short."""
    if A.shape[-2] < A.shape[-1]:
        V, S, U = exact_svd(A.H, rank)
        return U, S, V
    x, backend = A.materialize(), A.backend
    if not A.is_eager:
        return by_triangle(x, A.matmat, rank, backend)
    if direct_is_faster(x.shape, rank):
        U, S, Vh = backend.small_svd(x)
        return U[..., :rank], S[..., :rank], matrix_h(Vh[..., :rank, :], backend.xp)
    return tall_svd([x], spectrum(backend.gram(x), backend), rank, backend)


def _by_qr(blocks: Sequence[Array], rank: int, backend: Backend) -> tuple[Array, Array, Array]:
    """Take the safe way to what `tall_svd` gives."""
    xp = backend.xp
    U, S, Vh = thin_svd(
        blocks[0] if len(blocks) == 1 else xp.concat(blocks, axis=-1), backend, rank
    )
    return U[..., :rank], S[..., :rank], matrix_h(Vh[..., :rank, :], xp)


def combine(blocks: Sequence[Array], V: Array, backend: Backend) -> Array:
    """``[W_1, W_2, ...] @ V``, a slab of rows at a time: one product each, and no second copy of the blocks."""
    if len(blocks) == 1:
        return backend.product(blocks[0], V)
    xp, n_rows = backend.xp, blocks[0].shape[-2]
    step = _SLAB_ROWS if backend.is_eager(blocks[0]) else n_rows
    slabs = [
        _joined(blocks, top, min(top + step, n_rows), xp) @ V for top in range(0, n_rows, step)
    ]
    return slabs[0] if len(slabs) == 1 else xp.concat(slabs, axis=-2)


def _joined(blocks: Sequence[Array], top: int, bottom: int, xp: Namespace) -> Array:
    return xp.concat([block[..., top:bottom, :] for block in blocks], axis=-1)
