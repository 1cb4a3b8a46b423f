"""Linear algebra in the array API standard: factorisations of small matrices, products and norms of large ones."""

import functools
import math
from collections.abc import Callable
from operator import add

from slra._backends.standard.elementwise import Elementwise
from slra._typing import Array, DType, Namespace

__all__ = ["LinearAlgebra", "matrix_h"]

# Entries widened to double precision at once: 2 MB, which stays in the second-level cache.
SLAB = 1 << 18


def matrix_h(x: Array, xp: Namespace) -> Array:
    """Conjugate transpose of the last two axes."""
    x = xp.matrix_transpose(x)
    return xp.conj(x) if xp.isdtype(x.dtype, "complex floating") else x


class LinearAlgebra(Elementwise):
    """Linear algebra for one namespace, ``xp``."""

    slab = SLAB

    def qr(self, y: Array) -> tuple[Array, Array]:
        """Reduced QR of ``y``, shape (..., m, l) with m >= l."""
        q, r = self.xp.linalg.qr(y, mode="reduced")
        return q, r

    def small_svd(self, b: Array) -> tuple[Array, Array, Array]:
        """Thin SVD of a matrix small enough for one core."""
        u, s, vh = self.xp.linalg.svd(b, full_matrices=False)
        return u, s, vh

    def singular_values(self, x: Array) -> Array:
        """Singular values of a matrix of any size."""
        tall = self.xp.matrix_transpose(x) if x.shape[-2] < x.shape[-1] else x
        return self.small_svd(self.triangular_factor(tall))[1]

    def is_differentiated(self, x: Array) -> bool:
        """Whether a derivative may be asked of what is made of ``x``."""
        return False

    def shrink_spectrum(
        self, x: Array, tau: Array, function: Callable[[Array, Array], Array]
    ) -> Array:
        """``function(x, tau)``, the soft threshold of the singular values, with the derivative of `ShrunkSpectrum`."""
        return function(x, tau)

    def small_eigh(self, g: Array) -> tuple[Array, Array]:
        """Eigenvalues (ascending) and eigenvectors of a small Hermitian matrix."""
        w, v = self.xp.linalg.eigh(g)
        return w, v

    def small_eigvalsh(self, g: Array) -> Array:
        """Eigenvalues (ascending) of a small Hermitian matrix."""
        return self.xp.linalg.eigvalsh(g)

    def cholesky(self, g: Array) -> Array:
        """Lower Cholesky factor of a Hermitian matrix; NaN for each matrix that has none."""
        try:
            return self.xp.linalg.cholesky(g)
        except Exception as error:
            if "LinAlgError" not in type(error).__name__:
                raise
        if g.ndim == 2:
            return self.xp.full_like(g, math.nan)
        return self.xp.stack([self.cholesky(g[i, ...]) for i in range(g.shape[0])])

    def small_inverse(self, g: Array) -> Array:
        """Inverse of a small matrix."""
        return self.xp.linalg.inv(g)

    def unit_gram(self, gram: Array, least: float) -> tuple[Array, Array]:
        """Gram matrix of columns scaled to unit norm, and their norms: one where the square is at most ``least``."""
        xp = self.xp
        squares = self.real_part(xp.linalg.diagonal(gram))
        norms = xp.sqrt(xp.where(squares > least, squares, xp.ones_like(squares)))
        norms = xp.astype(norms, gram.dtype)
        return gram / (norms[..., :, None] * norms[..., None, :]), norms

    def lifted(self, g: Array, shift: Array | float) -> Array:
        """``g + shift I``; the shift a number, or one for each matrix, (..., 1, 1)."""
        n, device = g.shape[-1], self.creation_device(g)
        return g + shift * self.xp.eye(n, dtype=g.dtype, device=device)

    def phases(self, x: Array) -> Array:
        """``x / |x|``, a sign where ``x`` is real; one where it is zero or so small that it cannot be divided."""
        xp = self.xp
        size, one = xp.abs(x), xp.ones_like(x)
        has_phase = size > float(xp.finfo(x.dtype).smallest_normal)
        return xp.where(has_phase, x / xp.where(has_phase, size, xp.ones_like(size)), one)

    def accumulation_dtype(self, like: Array) -> DType:
        """Dtype to accumulate sums over ``like`` in: double precision where the library has it."""
        return self.xp.complex128 if self.is_complex(like) else self.xp.float64

    def gram(self, x: Array, y: Array | None = None) -> Array:
        """``x^H y`` (``x^H x`` without ``y``), accumulated in the `accumulation_dtype` dtype."""
        wide = self.accumulation_dtype(x)
        x = self.xp.astype(x, wide, copy=False)
        y = x if y is None else self.xp.astype(y, wide, copy=False)
        return self.matmul(matrix_h(x, self.xp), y)

    def matmul(self, a: Array, b: Array) -> Array:
        """Multiply operands that may be views: ``a @ b``."""
        raise NotImplementedError

    def gram_by_slabs(self, x: Array, y: Array | None = None) -> Array:
        """`gram` without a wide copy of ``x``: a slab of rows, or a few matrices of a batch, at a time."""
        if x.dtype == self.accumulation_dtype(x) or math.prod(x.shape) <= self.slab:
            return LinearAlgebra.gram(self, x, y)
        if x.ndim > 2:
            step = self.slab // math.prod(x.shape[1:])
            if step < 2:
                rest = (None if y is None else y[i, ...] for i in range(x.shape[0]))
                return self.xp.stack([self.gram_by_slabs(x[i, ...], b) for i, b in enumerate(rest)])
        else:
            # A slab at least half as large as the result: else adding to that is most of the work.
            step = max(self.slab // x.shape[1], (x if y is None else y).shape[1] // 2, 1)
        slabs = (slice(i, i + step) for i in range(0, x.shape[0], step))
        parts = (
            LinearAlgebra.gram(self, x[s, ...], None if y is None else y[s, ...]) for s in slabs
        )
        # One at a time: a tall matrix has more slabs than memory has room for their products.
        return self.xp.concat(list(parts), axis=0) if x.ndim > 2 else functools.reduce(add, parts)

    def adjoint_product(self, x: Array, y: Array) -> Array:
        """``x^H y`` for a large ``x``, which is not copied to be conjugated."""
        return self.conj(self.matmul(self.xp.matrix_transpose(x), self.conj(y)))

    def accumulated(self, x: Array) -> Array:
        """``x`` in the `accumulation_dtype` dtype."""
        return self.xp.astype(x, self.accumulation_dtype(x), copy=False)

    def column_means(self, x: Array) -> Array:
        """Mean of each column, (..., 1, n), in the `accumulation_dtype` dtype."""
        wide, m = self.accumulation_dtype(x), x.shape[-2]
        mean = self.xp.sum(x, axis=-2, keepdims=True, dtype=wide) / m
        if self.xp.finfo(wide).bits == 64:
            return mean
        # Without double precision, once more about the mean that was found: what it misses is small.
        return mean + self.xp.mean(x - mean, axis=-2, keepdims=True)

    def centered(self, x: Array, mean: Array) -> Array:
        """``x`` less the mean of each column, rounded once although the mean may be wider than ``x``."""
        if mean.dtype == x.dtype:
            return x - mean
        near = self.xp.astype(mean, x.dtype)
        rest = self.xp.astype(mean - self.xp.astype(near, mean.dtype), x.dtype)
        return (x - near) - rest

    def product(self, x: Array, v: Array) -> Array:
        """``x v`` for a large ``x`` that the caller gave."""
        return x @ v

    def normal_product(self, x: Array, v: Array) -> tuple[Array, Array]:
        """``x v``, and a block that spans what ``x^H x v`` spans, for tall matrices.

        The second is ``x^H`` times an orthonormal basis of the first, or whatever serves as well.
        """
        image = self.product(x, v)
        return image, self.adjoint_product(x, self.qr(image)[0])

    def triangular_factor(self, x: Array) -> Array:
        """Triangular factor of the QR of a tall ``x``, shape (..., n, n), where nobody asks for the other one."""
        return self.qr(x)[1]

    def norm_squared(self, x: Array) -> Array:
        """Squared Frobenius norm of each matrix, accumulated in the real `accumulation_dtype` dtype."""
        xp = self.xp
        wide = xp.astype(x, self.accumulation_dtype(x), copy=False)
        return xp.sum(self.real_part(wide * self.conj(wide)), axis=(-2, -1))

    def max_abs(self, x: Array) -> Array:
        """Largest modulus in each matrix (of a complex number, the larger of its two parts)."""
        xp = self.xp
        parts = [xp.real(x), xp.imag(x)] if self.is_complex(x) else [x]
        sizes = [xp.max(xp.abs(part), axis=(-2, -1)) for part in parts]
        return sizes[0] if len(sizes) == 1 else xp.maximum(*sizes)

    def pivots(self, x: Array) -> Array:
        """Entry of largest modulus in each column, the lowest index of those that tie; (..., n) for (..., m, n).

        Moduli that tie do so to rounding, which is not the same in two libraries: eps over the gap to the next value.
        """
        xp, n_rows = self.xp, x.shape[-2]
        rows = xp.arange(n_rows, device=self.creation_device(x))[:, None]
        size = xp.abs(x)
        near = float(xp.finfo(size.dtype).eps) ** 0.5
        ties = size >= (1 - near) * xp.max(size, axis=-2, keepdims=True)
        first = xp.min(xp.where(ties, rows, xp.full_like(rows, n_rows)), axis=-2, keepdims=True)
        return xp.sum(xp.where(rows == first, x, xp.zeros_like(x)), axis=-2)
