"""What choosing needs of tokens in bits: their leading coordinates, a byte each, and where each tile is.

Decoded from the planes at each step, leading coordinates would take most of its time: on one core of an AMD EPYC 0.4 G
numbers a second are, and 2 G bytes become floats.
"""

from typing import NamedTuple

import numpy as np

from slra._backends.standard.bits import NIBBLE, NO_EXPONENT, PLANE, TOKENS, WHOLE
from slra._typing import Array, DType, Namespace
from slra.cache._layout import Layout

__all__ = ["Index"]

# Leading coordinates are integers up to this, times a power of two of each token, as a byte.
LARGEST = 127


class Index(NamedTuple):
    """Of complete blocks of keys, or of values."""

    codes: Array  # (B, H, n, r), int8
    exponents: Array  # (B, H, n, 1), uint8
    widths: Array  # (B, H, blocks, (d + 1) / 2), uint8: two a byte
    starts: (
        Array  # (B, H, blocks, 2): planes, and tiles that are not packed, before those of a head
    )

    @classmethod
    def empty(cls, layout: Layout, d: int, r: int, like: Array) -> "Index":
        """No block."""
        lead, xp, backend = (layout.n_batch, layout.n_heads, 0), layout.xp, layout.backend
        return cls(
            backend.key_buffer((*lead, r), xp.int8, like),
            layout.zeros((*lead, 1), like, xp.uint8),
            layout.zeros((*lead, -(-d // 2)), like, xp.uint8),
            layout.zeros((*lead, 2), like, backend.place_dtype),
        )

    def put(
        self,
        codes: Array,
        widths: Array,
        n_blocks: Array,
        before: Array,
        used: Array,
        layout: Layout,
    ) -> "Index":
        """Append blocks, so many of each sequence, (B,), after so many: integers (B, blocks, H, d, TOKENS).

        ``widths`` (B, blocks, H * d) and ``used`` (B, 2), bytes and tiles before these, are NumPy arrays.
        """
        xp, backend = layout.xp, layout.backend
        b, most, h, d, _ = codes.shape
        leading = codes[:, :, :, : self.codes.shape[-1], :]
        leading = xp.reshape(
            xp.permute_dims(leading, (0, 2, 1, 4, 3)), (b, h, most * TOKENS, leading.shape[3])
        )
        size = xp.max(xp.abs(leading), axis=-1, keepdims=True)
        is_finite = xp.isfinite(size)
        size = xp.where(is_finite, size, xp.ones_like(size)) / LARGEST
        exponent = xp.ceil(xp.log2(xp.maximum(size, xp.ones_like(size))))
        is_finite = is_finite & (exponent < NO_EXPONENT)
        leading = xp.where(is_finite, leading, xp.zeros_like(leading))
        leading = xp.clip(xp.round(leading * 2.0**-exponent), -LARGEST, LARGEST)
        exponent = xp.where(is_finite, exponent, xp.full_like(exponent, NO_EXPONENT))

        blocks = np.where(
            np.arange(most) < n_blocks[:, None], before[:, None] + np.arange(most), -1
        )
        tokens = TOKENS * blocks[:, :, None] + np.arange(TOKENS)
        tokens = np.where(blocks[:, :, None] >= 0, tokens, -1).reshape(b, -1)
        starts, pairs = _tables(widths.reshape(b, most, h, d), used)
        new = (
            leading,
            exponent,
            backend.from_numpy(pairs, codes, xp.uint8),
            backend.from_numpy(starts, codes, backend.place_dtype),
        )
        places = tokens, tokens, blocks, blocks
        return Index(
            *(
                _put(buffer, rows, at, layout)
                for buffer, rows, at in zip(self, new, places, strict=True)
            )
        )

    def trimmed(self, n_blocks: int, layout: Layout) -> "Index":
        """Give back the room that is left."""
        counts = n_blocks * TOKENS, n_blocks * TOKENS, n_blocks, n_blocks
        return Index(*(_copy(x, n, layout) for x, n in zip(self, counts, strict=True)))

    def finite(self, xp: Namespace) -> "Index":
        """Put zeros for what is not finite, whose integers are zeros."""
        exponents = self.exponents
        none = xp.zeros_like(exponents)
        return self._replace(exponents=xp.where(exponents == NO_EXPONENT, none, exponents))

    def bits_of_a_block(self) -> int:
        """Bits that a block of a head takes."""
        r, n_pairs = int(self.codes.shape[-1]), int(self.widths.shape[-1])
        return 8 * (TOKENS * (r + 1) + n_pairs) + 2 * 64

    def leading(self, rows: slice, dtype: DType, layout: Layout) -> Array:
        """Read leading coordinates (B, H, rows, r)."""
        codes, exponents = (x[:, :, rows, :] for x in self[:2])
        return layout.backend.from_bytes(codes, exponents, dtype)


def _tables(widths: Array, used: Array) -> tuple[Array, Array]:
    """Return what is before the tiles of each head, (B, H, blocks, 2), and widths by twos, (B, H, blocks, .)."""
    b, n_blocks, h, d = widths.shape
    is_whole = widths == WHOLE
    counts = np.stack([np.where(is_whole, 0, widths).sum(-1), is_whole.sum(-1)], axis=-1)
    counts = counts.astype(np.int64).reshape(b, n_blocks * h, 2)
    starts = np.cumsum(counts, axis=1) - counts + (used // (PLANE, 1))[:, None, :]
    padded = np.concatenate([widths, np.zeros((b, n_blocks, h, d % 2), widths.dtype)], axis=-1)
    pairs = padded[..., 0::2] | (padded[..., 1::2] << NIBBLE)
    starts, pairs = (
        x.reshape(b, n_blocks, h, -1).swapaxes(1, 2) for x in (starts, pairs.astype(np.uint8))
    )
    return starts, pairs


def _put(buffer: Array, rows: Array, places: Array, layout: Layout) -> Array:
    """Write rows (B, H, m, f), making room for a quarter more than is needed."""
    n = int(places.max(initial=-1)) + 1
    if n > buffer.shape[2]:
        buffer = _copy(buffer, max(n, buffer.shape[2] * 5 // 4), layout)
    return layout.backend.put_rows(buffer, rows, places)


def _copy(buffer: Array, n: int, layout: Layout) -> Array:
    """Copy the first rows to a buffer of so many."""
    held = min(n, int(buffer.shape[2]))
    places = np.broadcast_to(np.arange(held), (buffer.shape[0], held))
    new = layout.backend.rows_like(buffer, n)
    return layout.backend.put_rows(new, buffer[:, :, :held, :], places)
