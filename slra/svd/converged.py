"""Singular triplets converged to a tolerance each: a block Krylov space that is restarted until they are."""

from collections.abc import Callable

from slra._backends.cholesky_qr import orthonormal
from slra._typing import Array
from slra.svd._linear_map import LinearMap
from slra.svd.gram import combine, spectrum, tall_svd
from slra.svd.krylov import KrylovSpace
from slra.svd.truncated import thin_svd

__all__ = ["converged_svd"]

# Columns of the space, as a multiple of those of a block, at which it is restarted with as many as a block has.
_LARGEST = 5
# Blocks after which a spectrum without gaps, or an operator that is not as exact as its dtype, is given up.
_MAX_BLOCKS = 300
# The residual is computed this often at least, whatever the Ritz values say.
_LOOK_EVERY = 8


def converged_svd(
    A: LinearMap, sample: Callable[[int], Array], rank: int, width: int, tol: float
) -> tuple[Array, Array, Array]:
    """Leading triplets ``U, S, V`` of ``A`` with ``||A v - s u||`` and ``||A^H u - s v||`` of at most ``tol * s_1``.

    The first is zero to rounding for any vector of the space, as ``A V`` is kept; the second is computed where the Ritz
    values, whose errors are squares of it, say that it may be small enough. A block has ``width >= rank`` columns: in a
    narrower one only as many copies of a repeated value are seen.

    References
    ----------
    J. Baglama, L. Reichel, Augmented implicitly restarted Lanczos bidiagonalization methods, SIAM J. Sci. Comput. 27
    (2005), 19-42: the restart with Ritz vectors. Here of blocks, which find repeated values.
    """
    if A.shape[-2] < A.shape[-1]:
        V, S, U = converged_svd(A.H, lambda width: A.matmat(sample(width)), rank, width, tol)
        return U, S, V
    space = KrylovSpace(A)
    space.append(A.rmatmat(orthonormal(A.matmat(sample(width)), A.backend)))
    largest = _LARGEST * width
    if largest >= A.shape[-1]:
        return _exact(A, rank)
    before = None
    for n_blocks in range(_MAX_BLOCKS):
        if space.dimension + width > largest:
            space = _restarted(space, width)
        space.grow()
        values = space.ritz_values()[..., :rank]
        looks = n_blocks % _LOOK_EVERY == _LOOK_EVERY - 1
        if looks or (before is not None and _may_be_close(before, values, tol, A)):
            U, S, V = space.svd(rank)
            if is_converged(A, U, S, V, tol):
                return U, S, V
        before = values
    raise ValueError(
        f"tol must be larger for this x, or rank end at a gap: {rank} singular triplets have not converged to {tol} "
        f"after {_MAX_BLOCKS} products with {width} columns"
    )


def _exact(A: LinearMap, rank: int) -> tuple[Array, Array, Array]:
    """Decompose all of a matrix whose space would fill it."""
    backend = A.backend
    U, S, Vh = thin_svd(A.materialize(), backend)
    V = backend.conj(backend.xp.matrix_transpose(Vh))
    return U[..., :rank], S[..., :rank], V[..., :rank]


def _may_be_close(before: Array, values: Array, tol: float, A: LinearMap) -> bool:
    """Whether no Ritz value moved by more than errors of this size would have it."""
    moved = A.backend.xp.max(values - before, axis=-1)
    eps = float(A.backend.xp.finfo(A.like.dtype).eps)
    return bool(A.backend.xp.all(moved <= max(tol**2, 100 * eps) * values[..., 0]))


def is_converged(A: LinearMap, U: Array, S: Array, V: Array, tol: float) -> bool:
    """Multiply to see whether each triplet is one to ``tol``."""
    backend = A.backend
    xp = backend.xp
    for left, right, product in ((U, V, A.matmat), (V, U, A.rmatmat)):
        residual = backend.accumulated(
            product(right) - left * xp.astype(S, left.dtype)[..., None, :]
        )
        norms = xp.sqrt(xp.sum(backend.real_part(residual * backend.conj(residual)), axis=-2))
        if not bool(xp.all(norms <= tol * S[..., :1])):
            return False
    return True


def _restarted(space: KrylovSpace, width: int) -> KrylovSpace:
    """Keep the best vectors of a space, and the block that it would have grown by."""
    A, backend = space.A, space.A.backend
    # Orthogonal to what is dropped, too: only this direction has the residuals of the vectors that are kept.
    following = space.residual_block()
    E = tall_svd(space.W, spectrum(space.gram, backend), width, backend)[2]
    W = combine(space.W, E, backend)
    fresh = KrylovSpace(A, [combine(space.V, E, backend)], [W], backend.gram(W))
    fresh.append(following)
    return fresh
