"""As many singular triplets as a tolerance asks for: grow a Krylov space until it holds them, then verify."""

from collections.abc import Callable
from typing import TypeAlias

from slra._backends.standard import matrix_h
from slra._typing import Array
from slra.svd._cut import cut_at_tolerance, cut_values, keep_leading, ranks_for
from slra.svd._inputs import NORM_IS_WRONG
from slra.svd._linear_map import LinearMap
from slra.svd.gram import spectrum, tall_svd
from slra.svd.krylov import BLOCK, KrylovSpace, started
from slra.svd.truncated import thin_svd

__all__ = ["tolerance_svd"]

Found: TypeAlias = tuple[Array, Array, Array, Array]

# A space that fills this part of a dense matrix costs more than decomposing the matrix.
_EXACT_SHARE = 3
# The rank has settled once a space larger by the first factor lowers it by less than the second.
_GROWTH, _SETTLED = 1.1, 0.01
# With a cap on the rank, the space need not be larger than that of a call with this rank.
_CAPPED_DEPTH, _CAPPED_OVERSAMPLES = 3, 8
# The squared residual, as the difference of two sums, is known to some such multiple of eps.
_CANCELLATION = 1000


def tolerance_svd(
    A: LinearMap, sample: Callable[[int], Array], rtol: float, cap: int
) -> tuple[Array, Array, Array]:
    """Leading triplets ``U, S, V`` of ``A`` with relative residual ``rtol`` or, failing that, rank ``cap``.

    ``sample(width)`` draws a test matrix and multiplies. Values beyond the rank of an element of the batch are zero.

    Source: the stopping rule of W. Yu, Y. Gu, Y. Li, Efficient randomized algorithms for the fixed-precision low-rank
    matrix approximation, SIAM J. Matrix Anal. Appl. 39 (2018), 1339-1359, on a Krylov space.
    """
    assert A.norm is not None
    norm = A.norm()
    for attempt in (_by_krylov, _by_gram):
        found = attempt(A, sample, rtol, cap, norm)
        if found is None:
            continue
        U, S, V, ranks = found
        met = residual_norm(A, U, S, V, norm) <= rtol * norm
        if bool(A.backend.xp.all(met | (ranks == cap))):
            return U, S, V
    return _by_svd(A, rtol, cap)


def _by_krylov(
    A: LinearMap, sample: Callable[[int], Array], rtol: float, cap: int, norm: Array
) -> Found | None:
    cancels = rtol**2 <= _CANCELLATION * A.backend.xp.finfo(norm.dtype).eps
    if A.dense is not None and (cancels or min(A.shape[-2:]) <= _EXACT_SHARE * _width(A)):
        return None
    grown = _grow(A, sample, rtol, cap, norm)
    if grown is None:
        return None
    space, ranks = grown
    U, S, V = space.svd(int(A.backend.xp.max(ranks)))
    if A.shape[-2] < A.shape[-1]:
        U, V = V, U
    return U, keep_leading(S, ranks, A.backend), V, ranks


def _by_gram(
    A: LinearMap, sample: Callable[[int], Array], rtol: float, cap: int, norm: Array
) -> Found | None:
    """Cut the spectrum of the Gram matrix, unless its rounding errors are as large as ``rtol``."""
    if A.shape[-2] < A.shape[-1]:
        found = _by_gram(A.H, sample, rtol, cap, norm)
        return found and (found[2], found[1], found[0], found[3])
    backend, x = A.backend, A.materialize()
    gram = backend.gram(x)
    if A.dense is None:
        trace = backend.real_part(backend.xp.linalg.trace(gram))
        _check_norm(A, trace, norm**2, is_all=True)
    if rtol**2 <= 16 * x.shape[-1] * backend.xp.finfo(gram.dtype).eps:
        return None
    known = spectrum(gram, backend)
    ranks = cut_at_tolerance(known.values, rtol, cap, backend)
    U, S, V = tall_svd([x], known, int(backend.xp.max(ranks)), backend)
    return U, keep_leading(S, ranks, backend), V, ranks


def _by_svd(A: LinearMap, rtol: float, cap: int) -> tuple[Array, Array, Array]:
    backend = A.backend
    U, S, Vh = thin_svd(A.materialize(), backend)
    S, rank = cut_values(S, rtol, cap, backend)
    return U[..., :rank], S, matrix_h(Vh[..., :rank, :], backend.xp)


def _grow(
    A: LinearMap, sample: Callable[[int], Array], rtol: float, cap: int, norm: Array
) -> tuple[KrylovSpace, Array] | None:
    """Grow a space until the ranks it needs have settled; None where the exact way is cheaper."""
    backend, limit = A.backend, min(A.shape[-2:])
    xp = backend.xp
    width = _width(A)
    space = started(A, sample(width))
    widest = limit // _EXACT_SHARE if A.dense is not None else limit
    enough = min(widest, _CAPPED_DEPTH * (cap + _CAPPED_OVERSAMPLES))
    total, allowed = norm**2, (rtol * norm) ** 2
    before, looked_at = None, 0
    while space.dimension + width <= widest:
        space.grow()
        captured = backend.real_part(xp.linalg.trace(space.gram))
        if A.dense is None:
            _check_norm(A, captured, total)
        if space.dimension < enough and not bool(xp.all(total - captured <= allowed)):
            continue
        if space.dimension < _GROWTH * looked_at:
            continue
        squares = space.ritz_values() ** 2
        ranks = ranks_for(
            total[..., None] - xp.cumulative_sum(squares, axis=-1), allowed, cap, backend
        )
        if before is not None and bool(xp.all(before - ranks <= _SETTLED * ranks)):
            return space, ranks
        before, looked_at = ranks, space.dimension
    return None


def _width(A: LinearMap) -> int:
    """Columns of a block; of an operator that is not large a narrow one, which may not be decomposed instead."""
    wide = A.backend.tolerance_width
    return BLOCK if A.dense is None and min(A.shape[-2:]) < _EXACT_SHARE * wide else wide


def _check_norm(A: LinearMap, captured: Array, total: Array, *, is_all: bool = False) -> None:
    """See whether the norm that an operator came with is at least that of a part of it."""
    xp = A.backend.xp
    lost = 1.0 if A.lost is None else A.lost()
    slack = _CANCELLATION * float(xp.finfo(A.like.dtype).eps) * lost * captured
    wrong = captured - slack > total
    if is_all:
        wrong = wrong | (captured + slack < total)
    if bool(xp.any(wrong)):
        raise ValueError(NORM_IS_WRONG)


def residual_norm(A: LinearMap, U: Array, S: Array, V: Array, norm: Array) -> Array:
    """Frobenius norm of ``A - U S V^H``, in the real wide dtype; ``norm`` is that of ``A``.

    An array is subtracted from, tile by tile. Of a map only products are known: with orthonormal factors
    ``||A||^2 - 2 sum_j S_j Re(u_j^H A v_j) + sum_j S_j^2``, which loses half of the digits.
    """
    backend = A.backend
    xp = backend.xp
    if A.dense is None:
        S = xp.astype(S, norm.dtype)
        overlaps = backend.real_part(xp.sum(backend.conj(U) * A.matmat(V), axis=-2))
        square = norm**2 + xp.sum(S * (S - 2 * xp.astype(overlaps, norm.dtype)), axis=-1)
        return xp.sqrt(xp.maximum(square, xp.zeros_like(square)))
    scaled, vh = U * xp.astype(S, U.dtype)[..., None, :], matrix_h(V, xp)
    step = max(1, backend.n_at_once // A.shape[-1])
    tiles = [slice(i, min(i + step, A.shape[-2])) for i in range(0, A.shape[-2], step)]
    squares = [
        backend.norm_squared(A.dense[..., rows, :] - scaled[..., rows, :] @ vh) for rows in tiles
    ]
    return xp.sqrt(sum(squares[1:], squares[0]))
