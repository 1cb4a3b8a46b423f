"""Block Krylov iteration: every block is kept, and the best answer in all of them is taken."""

from collections.abc import Callable
from dataclasses import dataclass, field

from slra._backends.cholesky_qr import orthonormal, precondition, tall_qr
from slra._backends.elements import redo
from slra._backends.standard import matrix_h
from slra._typing import Array
from slra.svd._linear_map import LinearMap
from slra.svd.gram import combine, spectrum, tall_svd
from slra.svd.truncated import by_triangle

__all__ = [
    "BLOCK",
    "LAZY_ITER",
    "MAX_ITER",
    "MIN_ITER",
    "KrylovSpace",
    "krylov_svd",
    "narrow_krylov_svd",
    "started",
]

# Eager: stop once no wanted Ritz value moves by more than this, relatively. Convergence is faster than linear, so
# what is left is far less: at most a tenth of it on every spectrum in the tests but a flat one.
RITZ_TOLERANCE = 0.05
MIN_ITER, MAX_ITER, LAZY_ITER = 3, 6, 3

# Columns of a narrow block: wide enough for fast products, narrow enough for a deep space. A step adds less, so it must
# move the values by less to count as the last.
BLOCK, _NARROW_TOLERANCE = 16, 0.01
# A look at the Ritz values each time the space has grown by this.
_GROWTH = 1.1
# So many Ritz values in a row as near as this, relatively, may have more of their kind than a block can tell apart.
_CLUSTER = 0.1


@dataclass
class KrylovSpace:
    """Orthonormal basis ``V`` of a block Krylov space of ``A^H A``, and ``W = A V``.

    ``A`` is tall: the basis, which has to be orthogonalised, is on the short side. ``gram`` is ``W^H W`` in the wide
    dtype (None when lazy).
    """

    A: LinearMap
    V: list[Array] = field(default_factory=list)
    W: list[Array] = field(default_factory=list)
    gram: Array | None = None

    @property
    def dimension(self) -> int:
        """Number of columns of the basis."""
        return sum(block.shape[-1] for block in self.V)

    def append(self, block: Array) -> None:
        """Add the part of ``block``, shape (..., n, l), that is orthogonal to the basis."""
        block = self._orthogonal_part(block)
        image = self.A.matmat(block)
        self.V.append(block)
        self.W.append(image)
        if self.A.is_eager:
            self._extend_gram()

    def grow(self) -> None:
        """Add ``A^H A`` times the last block."""
        if self.gram is None:
            # The image once more, with the product that follows: what was there is then never computed.
            self.W[-1], block = self.A.normal(self.V[-1])
        else:
            block = self.following()
        self.append(block)

    def following(self) -> Array:
        """Span of ``A^H A`` times the last block; eager only."""
        assert self.gram is not None
        image = self.W[-1]
        own = self.gram[..., -image.shape[-1] :, -image.shape[-1] :]
        return self.A.rmatmat(precondition(image, own, self.A.backend))

    def residual_block(self) -> Array:
        """Return the block to grow by, orthogonal to the space: what a restart has to keep."""
        return self._orthogonal_part(self.following())

    def _orthogonal_part(self, block: Array) -> Array:
        """Orthonormal basis of ``block`` less its part in the space; as many columns even where nothing is left."""
        backend, width = self.A.backend, block.shape[-1]
        xp = backend.xp
        if not self.V:
            return orthonormal(block, backend)

        def jointly(*blocks: Array) -> tuple[Array]:
            return (backend.qr(xp.concat(blocks, axis=-1))[0][..., -width:],)

        if not self.A.is_eager:
            return jointly(*self.V, block)[0]
        block = self._project(block)[0]
        block = precondition(block, backend.gram(block), backend)
        block, overlap = self._project(block)
        block, R = tall_qr(block, backend)
        # Twice is enough unless the first projection left nothing but rounding errors, or of some columns not even
        # those: what is orthogonal to the other columns is then not orthogonal to the space.
        left = xp.min(xp.abs(xp.linalg.diagonal(R)), axis=-1)
        ok = (overlap <= 0.01) & (left >= 0.1)
        return redo(ok, (block,), jointly, (*self.V, block), backend)[0]

    def _project(self, block: Array) -> tuple[Array, Array]:
        """Take from ``block`` its part in the space; also the largest modulus of its coordinates there."""
        backend = self.A.backend
        coordinates = [backend.adjoint_product(v, block) for v in self.V]
        overlap = backend.max_abs(backend.xp.concat(coordinates, axis=-2))
        for v, c in zip(self.V, coordinates, strict=True):
            block = block - v @ c
        return block, overlap

    def _extend_gram(self) -> None:
        backend, last = self.A.backend, self.W[-1]
        xp = backend.xp
        corner = backend.gram(last)
        if self.gram is None:
            self.gram = corner
            return
        side = xp.concat([backend.gram(block, last) for block in self.W[:-1]], axis=-2)
        top = xp.concat([self.gram, side], axis=-1)
        bottom = xp.concat([matrix_h(side, xp), corner], axis=-1)
        self.gram = xp.concat([top, bottom], axis=-2)

    def ritz_values(self) -> Array:
        """Singular values of ``A`` on the space, descending, in the real wide dtype; eager only."""
        xp = self.A.backend.xp
        squares = xp.flip(self.A.backend.small_eigvalsh(self.gram), axis=-1)
        return xp.sqrt(xp.maximum(squares, xp.zeros_like(squares)))

    def svd(self, rank: int) -> tuple[Array, Array, Array]:
        """Leading triplets ``U, S, V`` of ``A`` on the space."""
        backend = self.A.backend
        if self.gram is None:
            W = self.W[0] if len(self.W) == 1 else backend.xp.concat(self.W, axis=-1)
            U, S, E = by_triangle(W, lambda E: W @ E, rank, backend)
        else:
            U, S, E = tall_svd(self.W, spectrum(self.gram, backend), rank, backend)
        return U, S, combine(self.V, E, backend)


def krylov_svd(
    A: LinearMap, omega: Array, rank: int, n_iter: int | None
) -> tuple[Array, Array, Array]:
    """Leading triplets ``U, S, V`` of ``A``, from a test matrix ``omega``.

    The space is that of ``A^H A`` on the start ``A^H A omega``, ``n_iter >= 1`` blocks deep; None stops by itself. Of a
    wide ``A`` it is that of ``A A^H`` on ``A A^H A omega``.

    References
    ----------
    C. Musco, C. Musco, Randomized block Krylov methods for stronger and faster approximate singular value
    decomposition, NeurIPS 2015, Algorithm 2.
    """
    if A.shape[-2] < A.shape[-1]:
        V, S, U = _krylov_tall(A.H, orthonormal(A.matmat(omega), A.backend), rank, n_iter)
        return U, S, V
    return _krylov_tall(A, omega, rank, n_iter)


def _krylov_tall(
    A: LinearMap, start: Array, rank: int, n_iter: int | None
) -> tuple[Array, Array, Array]:
    space = KrylovSpace(A)
    if A.is_eager:
        space.append(A.rmatmat(orthonormal(A.matmat(start), A.backend)))
    else:
        space.append(A.normal(start)[1])
    fixed = n_iter if n_iter is not None or A.is_eager else LAZY_ITER
    if fixed is None:
        _grow_until_settled(space, rank)
    else:
        for _ in range(fixed - 1):
            space.grow()
    return space.svd(rank)


def _grow_until_settled(space: KrylovSpace, rank: int) -> None:
    """Grow until the leading Ritz values stop moving, the space is full, or the patience is at its end."""
    xp = space.A.backend.xp
    width = space.dimension
    deepest = min(MAX_ITER, space.A.shape[-1] // width)
    before = None
    # A first look at the second block, so that none ends before the third.
    for _ in range(MIN_ITER - 1, deepest + 1):
        space.grow()
        values = space.ritz_values()[..., :rank]
        if before is not None and bool(xp.all(values - before <= RITZ_TOLERANCE * values)):
            return
        before = values


def started(A: LinearMap, image: Array) -> KrylovSpace:
    """Return the space of the tall one of ``A`` and ``A^H`` with its first block, from ``A omega``; eager only."""
    space = KrylovSpace(A if A.shape[-2] >= A.shape[-1] else A.H)
    _restart(space, A, image)
    return space


def _restart(space: KrylovSpace, A: LinearMap, image: Array) -> None:
    """Append a block that comes from a new test matrix, given as ``A omega``: that itself if it has the short side."""
    is_wide = A.shape[-2] < A.shape[-1]
    space.append(image if is_wide else A.rmatmat(orthonormal(image, A.backend)))


def narrow_krylov_svd(
    A: LinearMap, sample: Callable[[int], Array], rank: int, width: int
) -> tuple[Array, Array, Array]:
    """Leading triplets ``U, S, V`` of ``A`` from blocks much narrower than ``rank``; eager only.

    ``sample(n)`` multiplies ``A`` by ``n`` new Gaussian vectors. To the same accuracy a space of narrow blocks needs
    fewer columns than one of blocks of ``width``, and is as large at most.

    Of a singular value that is repeated, a block finds no more copies than it has columns. Where as many leading Ritz
    values lie together, the space grows from a new sample until that changes nothing.

    References
    ----------
    T. Chen, E. N. Epperly, R. A. Meyer, C. Musco, A. Rao, Does block size matter in randomized block Krylov low-rank
    approximation?, arXiv:2508.06486 (2025).
    """
    space = started(A, sample(BLOCK))
    largest = min(MAX_ITER * width, space.A.shape[-1])
    _grow_narrow(space, rank, width, 2 * width, largest)
    while _may_be_repeated(space, rank) and space.dimension + MIN_ITER * BLOCK <= space.A.shape[-1]:
        before = space.ritz_values()[..., :rank]
        _restart(space, A, sample(BLOCK))
        for _ in range(MIN_ITER - 1):
            space.grow()
        if _settled(before, space, rank, width):
            break
        _grow_narrow(space, rank, width, space.dimension, max(largest, space.dimension))
    U, S, V = space.svd(rank)
    return (V, S, U) if A.shape[-2] < A.shape[-1] else (U, S, V)


def _grow_narrow(space: KrylovSpace, rank: int, width: int, least: int, largest: int) -> None:
    """Grow from ``least`` columns until the leading Ritz values stop moving, or to ``largest`` columns."""
    while space.dimension < least and space.dimension + BLOCK <= largest:
        space.grow()
    before, looked_at = space.ritz_values()[..., :rank], space.dimension
    while space.dimension + BLOCK <= largest:
        space.grow()
        if space.dimension < _GROWTH * looked_at:
            continue
        if _settled(before, space, rank, width):
            return
        before, looked_at = space.ritz_values()[..., :rank], space.dimension


def _settled(before: Array, space: KrylovSpace, rank: int, width: int) -> bool:
    xp, values = space.A.backend.xp, space.ritz_values()[..., :rank]
    settled = values - before <= _NARROW_TOLERANCE * values
    if space.dimension >= MIN_ITER * width:
        # What moves for rounding alone never settles.
        settled = settled | _is_rounding(values, space)
    return bool(xp.all(settled))


def _may_be_repeated(space: KrylovSpace, rank: int) -> bool:
    xp, values = space.A.backend.xp, space.ritz_values()[..., :rank]
    first, last = values[..., : rank - BLOCK + 1], values[..., BLOCK - 1 :]
    together = (last >= (1 - _CLUSTER) * first) & xp.logical_not(_is_rounding(first, space))
    return bool(xp.any(together))


def _is_rounding(values: Array, space: KrylovSpace) -> Array:
    """Whether the squares of Ritz values are rounding errors of the Gram matrix."""
    assert space.gram is not None
    eps = float(space.A.backend.xp.finfo(space.gram.dtype).eps)
    return values <= (space.dimension * eps) ** 0.5 * values[..., :1]
