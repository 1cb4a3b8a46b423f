"""Every primitive, written in the array API standard (2024.12, linalg extension) and nothing else.

This is the reference that each override is tested against, and what an unknown library runs on.
Arguments have been validated: matching namespaces, devices and a floating dtype of 32 or 64 bits.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from slra._backends.agnostic_attention import ScoreOptions, tiled_attention, tiled_attention_vjp
from slra._typing import Array, DType, Namespace

__all__ = ["Primitives", "ScoreOptions", "gaussian_blocks", "matrix_h"]

# Test matrices are drawn in blocks of rows, a stream each, so that a chunked array can draw its own.
TEST_MATRIX_ROWS = 4096


def matrix_h(x: Array, xp: Namespace) -> Array:
    """Conjugate transpose of the last two axes."""
    x = xp.matrix_transpose(x)
    return xp.conj(x) if xp.isdtype(x.dtype, "complex floating") else x


class Primitives:
    """Primitives for one namespace, ``xp``."""

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
        """Say why an array of this library cannot be used, or None."""
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

    def from_numpy(self, a: np.ndarray[Any, Any], like: Array, dtype: DType | None = None) -> Array:
        """Bring a small NumPy array to the library, device and (unless given) dtype of ``like``."""
        return self.xp.asarray(a, dtype=dtype or like.dtype, device=self.creation_device(like))

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """Bring an array to NumPy; lazy ones are computed."""
        return np.asarray(x)

    # Linear algebra

    def orthonormalize(self, y: Array) -> Array:
        """Orthonormal basis of the columns of ``y``, shape (..., m, l) with m >= l."""
        return self.qr(y)[0]

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

    def solve_triangular(self, a: Array, b: Array, *, lower: bool) -> Array:
        """Solve ``a @ x = b`` for triangular ``a``; only that triangle of ``a`` is read."""
        a = self.xp.tril(a) if lower else self.xp.triu(a)
        return self.xp.linalg.solve(a, b)

    def test_matrix(self, shape: tuple[int, ...], rng: np.random.Generator, like: Array) -> Array:
        """Draw a standard Gaussian matrix of the dtype of ``like``, the same on every backend."""
        blocks = [
            block.draw() for block in gaussian_blocks(shape, rng, is_complex=self.is_complex(like))
        ]
        whole = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=-2)
        return self.from_numpy(whole, like)

    def is_complex(self, x: Array) -> bool:
        """Whether ``x`` has a complex dtype."""
        return bool(self.xp.isdtype(x.dtype, "complex floating"))

    # Selection

    def top_indices(self, x: Array, k: int) -> Array:
        """Find the ``k`` largest entries along the last axis."""
        return self.xp.argsort(x, axis=-1, descending=True)[..., :k]

    def kth_largest(self, x: Array, k: int) -> Array:
        """Find the ``k``-th largest entry along the last axis, (..., 1)."""
        place = x.shape[-1] - k
        return self.xp.sort(x, axis=-1)[..., place : place + 1]

    def gather_rows(self, x: Array, indices: Array) -> Array:
        """Rows of ``x`` (..., n, d) at ``indices`` (..., m), whose leading axes broadcast; (..., m, d)."""
        return self.xp.take_along_axis(x, indices[..., None], axis=-2)

    # Elementwise

    def soft_threshold(self, x: Array, tau: Array | float) -> Array:
        """Shrink the modulus of each entry by ``tau``, to no less than zero."""
        xp = self.xp
        if not self.is_complex(x):
            return x - xp.minimum(xp.maximum(x, -tau), tau)
        modulus = xp.abs(x)
        shrunk = xp.maximum(modulus - tau, xp.zeros_like(modulus))
        return x * (shrunk / xp.where(modulus == 0, xp.ones_like(modulus), modulus))

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

    def constant(self, x: Array) -> Array:
        """Return ``x``, through which no gradient passes."""
        return x

    def recomputed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` such that a gradient recomputes its insides instead of keeping them."""
        return function


class GaussianBlock(NamedTuple):
    """A block of rows of a test matrix, drawn when and as often as asked: always the same numbers."""

    kind: type[np.random.BitGenerator]
    seed: Any
    shape: tuple[int, ...]
    is_complex: bool

    def draw(self) -> np.ndarray[Any, Any]:
        """Draw in double precision, with unit variance."""
        stream = np.random.Generator(self.kind(self.seed))
        block = stream.standard_normal(self.shape)
        if not self.is_complex:
            return block
        return (block + 1j * stream.standard_normal(self.shape)) / math.sqrt(2)


def gaussian_blocks(
    shape: tuple[int, ...], rng: np.random.Generator, *, is_complex: bool
) -> list[GaussianBlock]:
    """Return the blocks of rows that make up a test matrix of this shape, a stream each."""
    *batch, n_rows, n_columns = shape
    starts = range(0, n_rows, TEST_MATRIX_ROWS)
    return [
        GaussianBlock(
            type(stream),
            stream.seed_seq,
            (*batch, min(TEST_MATRIX_ROWS, n_rows - start), n_columns),
            is_complex,
        )
        for start, stream in zip(starts, rng.bit_generator.spawn(len(starts)), strict=True)
    ]
