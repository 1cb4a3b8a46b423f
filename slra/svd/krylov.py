"""Block Krylov iteration: every block is kept, and the best answer in all of them is taken."""

from dataclasses import dataclass, field

from slra._backends.cholesky_qr import orthonormal, precondition, tall_qr
from slra._backends.elements import redo
from slra._backends.standard import matrix_h
from slra._typing import Array
from slra.svd._linear_map import LinearMap
from slra.svd.gram import combine, spectrum, tall_svd
from slra.svd.truncated import by_triangle

__all__ = ["LAZY_ITER", "MAX_ITER", "MIN_ITER", "KrylovSpace", "krylov_svd"]

# Eager: stop once no wanted Ritz value moves by more than this, relatively. Convergence is faster than linear, so
# what is left is far less: at most a tenth of it on every spectrum in the tests but a flat one.
RITZ_TOLERANCE = 0.05
MIN_ITER, MAX_ITER, LAZY_ITER = 3, 6, 3


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
