"""Integers in few bits, packed and unpacked by NumPy: a table makes 8 integers of each byte at once."""

import numpy as np

from slra._backends.standard.bits import BYTE, PLANE, TOKENS, WHOLE
from slra._typing import Array, DType

__all__ = ["pack_tiles", "unpack_blocks"]


def _table() -> Array:
    """For each byte a word whose byte t is bit t of it."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.ascontiguousarray(bits).view(np.uint64)[:, 0]


# By the place of a plane; where it is the last one it is the sign, which fills what is above.
ONES = [_table() << np.uint64(place) for place in range(BYTE)]
SIGNS = [_table() * np.uint64(256 - (1 << place)) for place in range(BYTE)]
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
    planes, first = heap[: len(heap) // PLANE * PLANE].view(np.uint16), 0
    for top in range(0, n_blocks, step):
        rows = slice(top, min(top + step, n_blocks))
        first = _unpack(planes, first, widths[rows], out[:, :, rows])
    return out.reshape(n_heads, d, n_blocks * TOKENS).swapaxes(-1, -2)


def _unpack(planes: Array, first: int, widths: Array, out: Array) -> int:
    """Unpack from one plane of the heap on, and say which is the first of the next tile."""
    by_block = np.where(widths < WHOLE, widths, 0).reshape(len(widths), -1)
    ends = np.cumsum(by_block, dtype=np.int64).reshape(by_block.shape)
    end = first + int(ends[-1, -1])
    # In the order of the result, each coordinate by itself: it is then written in long runs.
    starts = (ends - by_block + first).T.reshape(-1)
    narrow = by_block.T.reshape(-1)
    order = np.argsort(narrow, kind="stable")
    bounds = np.cumsum(np.bincount(narrow, minlength=WHOLE))
    words = np.zeros((len(narrow), PLANE), dtype=np.uint64)
    wide = []
    for width in range(1, WHOLE):
        tiles = order[bounds[width - 1] : bounds[width]]
        if not len(tiles):
            continue
        low = _words(planes, starts[tiles], range(min(width, BYTE)), is_signed=width <= BYTE)
        if width <= BYTE:
            words[tiles] = low
        else:
            high = _words(planes, starts[tiles], range(BYTE, width), is_signed=True)
            codes = high.view(np.int8).astype(np.int16) << BYTE
            wide.append((tiles, codes | low.view(np.uint8)))
    np.copyto(out, words.view(np.int8).reshape(out.shape))
    for tiles, codes in wide:
        out[np.unravel_index(tiles, out.shape[:-1])] = codes
    return end


def _words(planes: Array, at: Array, some: range, *, is_signed: bool) -> Array:
    """Put planes of tiles, which begin ``at``, together: words (n, 2) of 8 integers of a byte."""
    words: Array = np.zeros(0)
    for i, plane in enumerate(some):
        table = SIGNS[i] if is_signed and i == len(some) - 1 else ONES[i]
        part = table[planes[at + plane].view(np.uint8)]
        words = np.bitwise_or(words, part, out=words) if i else part
    return words.reshape(-1, PLANE)
