"""Every primitive, written in the array API standard (2024.12, linalg extension) and nothing else.

This is the reference that each override is tested against, and what an unknown library runs on.
Arguments have been validated: matching namespaces, devices and a floating dtype of 32 or 64 bits.
"""

import math
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from slra._typing import Array, CausalAlign, DType, Namespace

__all__ = ["Primitives", "ScoreOptions", "gaussian_blocks", "matrix_h"]

# One tile of scores is 512 x 1024: 2 MB in float32, which stays in the second-level cache.
QUERY_TILE, KEY_TILE = 512, 1024
# Test matrices are drawn in blocks of rows, a stream each, so that a chunked array can draw its own.
TEST_MATRIX_ROWS = 4096


class ScoreOptions(NamedTuple):
    """What is done to a score between the product of query and key and the softmax."""

    scale: float
    is_causal: bool = False
    causal_align: CausalAlign = "bottom_right"
    softcap: float | None = None

    def diagonal(self, n_queries: int, n_keys: int) -> int:
        """Query i may attend to keys up to and including i + this."""
        return n_keys - n_queries if self.causal_align == "bottom_right" else 0


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

    def constant(self, x: Array) -> Array:
        """Return ``x`` without the gradient it carries."""
        return x

    def record(self, kind: type, arrays: dict[str, Array], static: dict[str, Any]) -> Any:
        """Make a dataclass of arrays and of plain values that a transformation must keep as they are."""
        return kind(**arrays, **static)

    def from_numpy(self, a: np.ndarray[Any, Any], like: Array, dtype: DType | None = None) -> Array:
        """Bring a small NumPy array to the library, device and (unless given) dtype of ``like``."""
        return self.xp.asarray(a, dtype=dtype or like.dtype, device=self.creation_device(like))

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
        """Exact attention and its log-sum-exp, tile by tile; leading axes broadcast.

        Shapes: q (..., Nq, D), k (..., Nk, D), v (..., Nk, Dv), mask broadcastable to (..., Nq, Nk);
        returns (..., Nq, Dv) and (..., Nq).
        """
        rows = [
            self._attention_rows(q, k, v, mask, options, start)
            for start in range(0, q.shape[-2], QUERY_TILE)
        ]
        if len(rows) == 1:
            return rows[0]
        outs, lses = zip(*rows, strict=True)
        return self.xp.concat(outs, axis=-2), self.xp.concat(lses, axis=-1)

    def _attention_rows(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions, top: int
    ) -> tuple[Array, Array]:
        """Attention of one tile of queries, by online softmax over the tiles of keys.

        Source: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867;
        Dao et al., FlashAttention, arXiv:2205.14135, Algorithm 1.
        """
        xp = self.xp
        n_keys = k.shape[-2]
        diagonal = options.diagonal(q.shape[-2], n_keys)
        bottom = min(top + QUERY_TILE, q.shape[-2])
        if options.is_causal:
            n_keys = max(0, min(n_keys, bottom + diagonal))
        q = q[..., top:bottom, :] * options.scale
        shape = (*scores_batch_shape(q, k, v, mask), bottom - top)
        like = {"dtype": q.dtype, "device": self.creation_device(q)}
        peak, total = xp.full(shape, -math.inf, **like), xp.zeros(shape, **like)
        out = xp.zeros((*shape, v.shape[-1]), **like)
        for left in range(0, n_keys, KEY_TILE):
            tile = Tile(top, bottom, left, min(left + KEY_TILE, n_keys))
            keys = slice(tile.left, tile.right)
            scores = self._scores(q, k[..., keys, :], mask, options, tile, diagonal)
            new_peak = xp.maximum(peak, xp.max(scores, axis=-1))
            # A row that has met no key yet has the peak -inf, and exp(-inf - -inf) would be NaN.
            shift = xp.where(new_peak == -math.inf, xp.zeros_like(new_peak), new_peak)
            weights = xp.exp(scores - shift[..., None])
            decay = xp.exp(peak - shift)
            total = total * decay + xp.sum(weights, axis=-1)
            out = out * decay[..., None] + weights @ v[..., keys, :]
            peak = new_peak
        empty = total == 0
        total = xp.where(empty, xp.ones_like(total), total)
        return out / total[..., None], xp.where(empty, peak, peak + xp.log(total))

    def _scores(
        self,
        q: Array,
        k: Array,
        mask: Array | None,
        options: ScoreOptions,
        tile: "Tile",
        diagonal: int,
    ) -> Array:
        """Scores of one tile, after softcap and mask; ``q`` is scaled already."""
        xp = self.xp
        scores = q @ xp.matrix_transpose(k)
        if options.softcap is not None:
            scores = options.softcap * xp.tanh(scores / options.softcap)
        if mask is not None:
            part = tile.of(mask)
            if xp.isdtype(mask.dtype, "bool"):
                scores = xp.where(part, scores, xp.full_like(scores, -math.inf))
            else:
                scores = scores + xp.astype(part, scores.dtype)
        if options.is_causal and tile.right - 1 > tile.top + diagonal:
            device = self.creation_device(scores)
            rows = xp.arange(tile.top, tile.bottom, device=device)[:, None]
            columns = xp.arange(tile.left, tile.right, device=device)[None, :]
            scores = xp.where(columns <= rows + diagonal, scores, xp.full_like(scores, -math.inf))
        return scores


class Tile(NamedTuple):
    """A rectangle of the matrix of scores."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, mask: Array) -> Array:
        """Cut this tile out of a mask, whose axes of length one stay as they are."""
        if mask.shape[-2] > 1:
            mask = mask[..., self.top : self.bottom, :]
        return mask[..., self.left : self.right] if mask.shape[-1] > 1 else mask


def scores_batch_shape(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[int, ...]:
    """Shape of the leading axes of the result of attention."""
    shapes = [x.shape[:-2] for x in (q, k, v, mask) if x is not None]
    return np.broadcast_shapes(*shapes)


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
