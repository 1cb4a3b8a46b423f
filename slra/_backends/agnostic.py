"""Every primitive, written in the array API standard (2024.12, linalg extension) and nothing else.

This is the reference that each override is tested against, and what an unknown library runs on.
Arguments have been validated: matching namespaces, devices and a floating dtype of 32 or 64 bits.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import array_api_compat as compat
import numpy as np

from slra._backends.agnostic_attention import (
    ScoreOptions,
    SoftmaxState,
    TileBounds,
    masked_scores,
    tiled_attention,
    tiled_attention_vjp,
    weights_and_gradients,
)
from slra._backends.agnostic_rows import Rows
from slra._backends.agnostic_sparse import SparseRows
from slra._backends.gaussian import gaussian
from slra._typing import Array, DType, Namespace

__all__ = ["Primitives", "ScoreOptions", "matrix_h"]

# Entries widened to double precision at once: 2 MB, which stays in the second-level cache.
SLAB = 1 << 18


def matrix_h(x: Array, xp: Namespace) -> Array:
    """Conjugate transpose of the last two axes."""
    x = xp.matrix_transpose(x)
    return xp.conj(x) if xp.isdtype(x.dtype, "complex floating") else x


class Primitives(SparseRows, Rows):
    """Primitives for one namespace, ``xp``."""

    # Whether an array cannot be written to: a function then returns a new one.
    is_functional = False
    # Whether the thresholds and sums of moduli take half precision as it is, and convert as they read.
    takes_half = False

    def __init__(self, xp: Namespace) -> None:
        self.xp = xp

    # What kind of array is this?

    def is_eager(self, x: Array) -> bool:
        """Whether the values of ``x`` can be looked at."""
        return True

    def freezes_draws(self, x: Array) -> bool:
        """Whether numbers drawn by NumPy beside ``x`` become constants of a compiled function."""
        return False

    def refusal(self, x: Array) -> str | None:
        """Say what an array of this library must be and is not, or None."""
        return None

    def device(self, x: Array) -> Any:
        """Device of ``x`` as a comparable value; None where it can be used beside any other."""
        return compat.device(x)

    def creation_device(self, like: Array) -> Any:
        """Device to create an array on that is to meet ``like``; None where the library finds out."""
        return compat.device(like)

    def record(self, kind: type, arrays: dict[str, Array], static: dict[str, Any]) -> Any:
        """Make a dataclass of arrays and of plain values that a transformation must keep as they are."""
        return kind(**arrays, **static)

    def make_pytree(self, kind: type, take: Callable[[Any], Any], make: Callable[..., Any]) -> None:
        """Let transformations take objects of a class apart, and make them again."""

    def from_numpy(self, a: np.ndarray[Any, Any], like: Array, dtype: DType | None = None) -> Array:
        """Bring a small NumPy array to the library, device and (unless given) dtype of ``like``."""
        return self.xp.asarray(a, dtype=dtype or like.dtype, device=self.creation_device(like))

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """Bring an array to NumPy; lazy ones are computed."""
        return np.asarray(x)

    def quietly(self) -> contextlib.AbstractContextManager[Any]:
        """Let numbers leave the range of their dtype without NumPy's warnings, which other libraries do not have."""
        return np.errstate(all="ignore")

    # Linear algebra

    def qr(self, y: Array) -> tuple[Array, Array]:
        """Reduced QR of ``y``, shape (..., m, l) with m >= l."""
        q, r = self.xp.linalg.qr(y, mode="reduced")
        return q, r

    def small_svd(self, b: Array) -> tuple[Array, Array, Array]:
        """Thin SVD of a matrix small enough for one core."""
        u, s, vh = self.xp.linalg.svd(b, full_matrices=False)
        return u, s, vh

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

    def wide(self, like: Array) -> DType:
        """Dtype to accumulate sums over ``like`` in: double precision where the library has it."""
        return self.xp.complex128 if self.is_complex(like) else self.xp.float64

    def gram(self, x: Array, y: Array | None = None) -> Array:
        """``x^H y`` (``x^H x`` without ``y``), accumulated in the `wide` dtype."""
        wide = self.wide(x)
        x = self.xp.astype(x, wide, copy=False)
        y = x if y is None else self.xp.astype(y, wide, copy=False)
        return matrix_h(x, self.xp) @ y

    def gram_by_slabs(self, x: Array, y: Array | None = None) -> Array:
        """`gram` without a wide copy of ``x``: a slab of rows, or a few matrices of a batch, at a time."""
        if x.dtype == self.wide(x) or math.prod(x.shape) <= SLAB:
            return Primitives.gram(self, x, y)
        step = SLAB // math.prod(x.shape[1:])
        if x.ndim > 2 and step < 2:
            rest = (None if y is None else y[i, ...] for i in range(x.shape[0]))
            return self.xp.stack([self.gram_by_slabs(x[i, ...], b) for i, b in enumerate(rest)])
        step = max(1, step)
        slabs = [slice(i, i + step) for i in range(0, x.shape[0], step)]
        parts = [Primitives.gram(self, x[s, ...], None if y is None else y[s, ...]) for s in slabs]
        return self.xp.concat(parts, axis=0) if x.ndim > 2 else sum(parts[1:], parts[0])

    def adjoint_product(self, x: Array, y: Array) -> Array:
        """``x^H y`` for a large ``x``, which is not copied to be conjugated."""
        return self.conj(self.xp.matrix_transpose(x) @ self.conj(y))

    def centered(self, x: Array) -> Array:
        """``x`` less the mean of each column."""
        return x - self.xp.mean(x, axis=-2, keepdims=True)

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
        """Squared Frobenius norm of each matrix, accumulated in the real `wide` dtype."""
        xp = self.xp
        wide = xp.astype(x, self.wide(x), copy=False)
        return xp.sum(self.real_part(wide * self.conj(wide)), axis=(-2, -1))

    def max_abs(self, x: Array) -> Array:
        """Largest modulus in each matrix (of a complex number, the larger of its two parts)."""
        xp = self.xp
        parts = [xp.real(x), xp.imag(x)] if self.is_complex(x) else [x]
        sizes = [xp.max(xp.abs(part), axis=(-2, -1)) for part in parts]
        return sizes[0] if len(sizes) == 1 else xp.maximum(*sizes)

    def test_matrix(
        self, shape: tuple[int, ...], rng: np.random.Generator | int, like: Array
    ) -> Array:
        """Draw a standard Gaussian matrix of the dtype of ``like``, the same on every backend."""
        return self.from_numpy(gaussian(shape, rng, is_complex=self.is_complex(like)), like)

    def is_complex(self, x: Array) -> bool:
        """Whether ``x`` has a complex dtype."""
        return bool(self.xp.isdtype(x.dtype, "complex floating"))

    def real_dtype(self, dtype: DType) -> DType:
        """Real dtype of the same precision."""
        xp = self.xp
        # By comparison: a NumPy dtype and its scalar type are equal, but do not hash alike.
        if dtype == xp.complex64:
            return xp.float32
        return xp.float64 if dtype == xp.complex128 else dtype

    # Selection

    def top_indices(self, x: Array, k: int) -> Array:
        """Find the ``k`` largest entries along the last axis."""
        return self.xp.argsort(x, axis=-1, descending=True)[..., :k]

    def kth_largest(self, x: Array, k: int) -> Array:
        """Find the ``k``-th largest entry along the last axis, (..., 1)."""
        place = x.shape[-1] - k
        return self.xp.sort(x, axis=-1)[..., place : place + 1]

    # Elementwise

    def at_least(self, x: Array, low: Array | float) -> Array:
        """Maximum of ``x`` and an array or a number."""
        return self.xp.maximum(x, low)

    def at_most(self, x: Array, high: Array | float) -> Array:
        """Minimum of ``x`` and an array or a number."""
        return self.xp.minimum(x, high)

    def real_part(self, x: Array) -> Array:
        """Real part, of a real array too."""
        return self.xp.real(x) if self.is_complex(x) else x

    def conj(self, x: Array) -> Array:
        """Complex conjugate, of a real array too."""
        return self.xp.conj(x) if self.is_complex(x) else x

    def soft_threshold(self, x: Array, tau: Array | float) -> Array:
        """Shrink the modulus of each entry by ``tau``, to no less than zero."""
        xp = self.xp
        if not self.is_complex(x):
            return x - xp.minimum(xp.maximum(x, -tau), tau)
        modulus = xp.abs(x)
        shrunk = xp.maximum(modulus - tau, xp.zeros_like(modulus))
        return x * (shrunk / xp.where(modulus == 0, xp.ones_like(modulus), modulus))

    def soft_threshold_step(
        self, x: Array, grad: Array, step: Array | float, tau: Array | float
    ) -> Array:
        """Step against a gradient, then soft-threshold by ``step * tau``."""
        return self.soft_threshold(x - step * grad, step * tau)

    def nonneg_threshold(self, x: Array, tau: Array | float) -> Array:
        """Take ``tau`` off each entry, down to no less than zero."""
        return self.at_least(x - tau, 0.0)

    def elastic_threshold(self, x: Array, tau: Array | float, l2: float) -> Array:
        """Soft-threshold by ``tau``, then divide by ``1 + tau * l2``."""
        return self.soft_threshold(x, tau) / (1 + tau * l2)

    def nonneg_threshold_step(
        self, x: Array, grad: Array, step: Array | float, tau: Array | float
    ) -> Array:
        """Step against a gradient, then take off ``step * tau``, down to no less than zero."""
        return self.nonneg_threshold(x - step * grad, step * tau)

    def elastic_threshold_step(
        self, x: Array, grad: Array, step: Array | float, tau: Array | float, l2: float
    ) -> Array:
        """Step against a gradient, then `elastic_threshold` by ``step * tau``."""
        return self.elastic_threshold(x - step * grad, step * tau, l2)

    def extrapolate(self, x: Array, move: Array, factor: Array | float) -> Array:
        """Go from ``x`` by ``factor`` times ``move``."""
        return x + factor * move

    def group_norm(self, x: Array, axes: tuple[int, ...]) -> Array:
        """Euclidean norm along ``axes``, which are kept; scaled, because squares overflow."""
        unit, norm = self.scaled_group_norm(x, axes)
        return unit * norm

    def scaled_group_norm(self, x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
        """Largest modulus along ``axes`` (1 for zero and infinity) and the norm over it; their product may overflow."""
        xp = self.xp
        modulus = xp.abs(x)
        peak = xp.max(modulus, axis=axes, keepdims=True)
        unit = xp.where((peak == 0) | (peak == math.inf), 1.0, peak)
        scaled = modulus / unit
        return unit, xp.sqrt(xp.sum(scaled * scaled, axis=axes, keepdims=True))

    def group_threshold(self, x: Array, tau: Array | float, axes: tuple[int, ...]) -> Array:
        """Shorten each vector along ``axes`` by ``tau``, to no less than zero."""
        unit, norm = self.scaled_group_norm(x, axes)
        return x * (self.at_least(norm - tau / unit, 0.0) / self.xp.where(norm == 0, 1.0, norm))

    def sum_abs(self, x: Array, axis: int | tuple[int, ...] | None) -> Array:
        """Sum of moduli along ``axis``."""
        return self.xp.sum(self.xp.abs(x), axis=axis)

    # Control flow

    def scan(
        self, advance: Callable[[Any], tuple[Any, tuple[Array, ...]]], state: Any, length: int
    ) -> tuple[Any, tuple[Array, ...]]:
        """Advance ``state`` a fixed number of times; stack what each call gives beside it."""
        given = []
        for _ in range(length):
            state, shown = advance(state)
            given.append(shown)
        return state, tuple(self.xp.stack(each) for each in zip(*given, strict=True))

    # Attention

    def attention(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
    ) -> tuple[Array, Array]:
        """Exact attention and its log-sum-exp, in memory linear in the lengths."""
        return tiled_attention(self, q, k, v, mask, options)

    def attention_output(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
    ) -> Array:
        """Exact attention, where nobody asks for the log-sum-exp."""
        return self.attention(q, k, v, mask, options)[0]

    def attention_vjp(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None,
        options: ScoreOptions,
        lse: Array,
        delta: Array,
        grad_out: Array,
    ) -> tuple[Array, Array, Array]:
        """Gradients of attention; ``delta`` is rowsum(grad_out * out) - grad_lse."""
        return tiled_attention_vjp(self, q, k, v, mask, options, lse, delta, grad_out)

    def tile_shape(self, n_matrices: int, like: Array) -> tuple[int, int]:
        """Height and width of a tile of scores, which is held for ``n_matrices`` pairs of q and k at once."""
        # 2 MB in float32 for each, which stays in the second-level cache.
        return 512, 1024

    def tile_scores(self, products: Array, bounds: TileBounds) -> Array:
        """Scores of one tile, after softcap and mask, from the products of scaled queries and keys."""
        return masked_scores(self, products, bounds)

    def softmax_step(self, state: SoftmaxState, scores: Array, v: Array) -> SoftmaxState:
        """Take one tile of scores, and the values that belong to it, into the online softmax."""
        return state.add(self, scores, v)

    def tile_gradients(
        self, products: Array, grad_weights: Array, bounds: TileBounds, lse: Array, delta: Array
    ) -> tuple[Array, Array]:
        """Softmax weights of one tile, and the gradient with respect to its products."""
        return weights_and_gradients(self, products, grad_weights, bounds, lse, delta)

    def constant(self, x: Array) -> Array:
        """Return ``x``, through which no gradient passes."""
        return x

    def recomputed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` such that a gradient recomputes its insides instead of keeping them."""
        return function
