"""Integers in few bits, packed and unpacked by NumPy: a table makes 8 integers of each byte at once."""

import numpy as np

from slra._backends.standard.bits import BYTE, PLANE, TOKENS, WHOLE
from slra._typing import Array, DType

__all__ = ["pack_tiles", "unpack_blocks"]


def _table() -> Array:
    """For each byte a word whose byte t is bit t of it."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.ascontiguousarray(bits).view(np.uint64)[:, 0]


ONES = _table()
# Numbers that are unpacked at once: what is between stays in a second-level cache of 1 MB.
BLOCKS_BYTES = 1 << 18


def pack_tiles(x: Array, widths: Array) -> Array:
    """Pack tiles of one width together, then bring them into their order."""
    narrow = np.where(widths < WHOLE, widths, 0).astype(np.int64)
    ends = PLANE * np.cumsum(narrow)
    heap = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    for width in range(1, WHOLE):
        (tiles,) = np.nonzero(narrow == width)
        if not len(tiles):
            continue
        codes = x[tiles].astype(np.int16)
        planes = np.stack([(codes >> plane) & 1 for plane in range(width)], axis=1)
        packed = np.packbits(planes.astype(bool).reshape(len(tiles), -1), axis=1, bitorder="little")
        at = (ends[tiles] - PLANE * width)[:, None] + np.arange(PLANE * width)
        heap[at] = packed
    return heap


def unpack_blocks(heap: Array, widths: Array, dtype: DType) -> Array:
    """Unpack tiles of one width together; features are contiguous, as `key_buffer` has them."""
    n_blocks, n_heads, d = widths.shape
    out = np.empty((n_heads, d, n_blocks, TOKENS), dtype=dtype)
    step = max(1, BLOCKS_BYTES // (n_heads * d * TOKENS))
    first = 0
    for top in range(0, n_blocks, step):
        some = widths[top : top + step]
        first = _unpack(heap, first, some, out[:, :, top : top + step])
    return out.reshape(n_heads, d, n_blocks * TOKENS).swapaxes(-1, -2)


def _unpack(heap: Array, first: int, widths: Array, out: Array) -> int:
    """Unpack from one place in the heap on, and say where the next tile begins."""
    n_blocks, n_heads, d = widths.shape
    flat = widths.reshape(-1)
    narrow = np.where(flat < WHOLE, flat, 0).astype(np.int64)
    ends = np.cumsum(narrow)
    planes = heap[first:].view(np.uint8)
    small = np.zeros((flat.size, PLANE), dtype=np.uint64)
    wide = []
    counts = np.bincount(narrow, minlength=WHOLE)
    for width in [width for width in range(1, WHOLE) if counts[width]]:
        (tiles,) = np.nonzero(narrow == width)
        at = PLANE * (ends[tiles] - width)
        low = _word(planes, at, range(min(width, BYTE)), is_signed=width <= BYTE)
        if width <= BYTE:
            small[tiles] = low.T
        else:
            high = _word(planes, at, range(BYTE, width), is_signed=True)
            codes = low.T.copy().view(np.uint8).astype(np.int16)
            codes |= high.T.copy().view(np.int8).astype(np.int16) << BYTE
            wide.append((tiles, codes))
    codes = small.view(np.int8).reshape(n_blocks, n_heads, d, TOKENS)
    np.copyto(out, codes.transpose(1, 2, 0, 3))
    for tiles, codes in wide:
        blocks, heads, features = np.unravel_index(tiles, widths.shape)
        out[heads, features, blocks] = codes
    return first + PLANE * int(ends[-1])


def _word(planes: Array, at: Array, some: range, *, is_signed: bool) -> Array:
    """Put planes of tiles, which begin ``at``, together: words (2, n) of 8 integers of a byte."""
    word = np.zeros((PLANE, len(at)), dtype=np.uint64)
    for i, plane in enumerate(some):
        table = ONES << np.uint64(i)
        if is_signed and i == len(some) - 1:
            # The last plane is the sign: it fills what is above.
            table = ONES * np.uint64(256 - (1 << i))
        for half in range(PLANE):
            word[half] |= table[planes[at + (PLANE * plane + half)]]
    return word
