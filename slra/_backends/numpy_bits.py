"""Integers in few bits, packed and unpacked by NumPy, tiles of one width together."""

import numpy as np

from slra._backends.standard.bits import BYTE, NO_EXPONENT, PLANE, TOKENS, WHOLE
from slra._typing import Array, DType

__all__ = ["from_bytes", "pack_tiles", "unpack_blocks", "unpack_tokens"]


# Numbers that are unpacked at once: what is between takes some MB.
BLOCKS_BYTES = 1 << 21
TILE = np.dtype(f"V{TOKENS}")


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
    codes = np.zeros((len(narrow), TOKENS), dtype=np.int8)
    # NumPy moves a tile as one thing ten times faster than as 16 numbers.
    as_tiles = codes.view(TILE)
    wide = []
    for width in range(1, WHOLE):
        tiles = order[bounds[width - 1] : bounds[width]]
        if not len(tiles):
            continue
        at = planes, starts[tiles]
        if width <= BYTE:
            as_tiles[tiles] = _integers(*at, range(width), is_signed=True).view(TILE)
        else:
            low = _integers(*at, range(BYTE), is_signed=False).view(np.uint8)
            high = _integers(*at, range(BYTE, width), is_signed=True)
            wide.append((tiles, (high.astype(np.int16) << BYTE) | low))
    np.copyto(out, codes.reshape(out.shape))
    for tiles, both in wide:
        out[np.unravel_index(tiles, out.shape[:-1])] = both
    return end


def _integers(planes: Array, at: Array, some: range, *, is_signed: bool) -> Array:
    """Put planes of tiles, which begin ``at``, together: integers (n, TOKENS) of a byte each."""
    codes: Array = np.zeros(0)
    for plane in reversed(some):
        bits = np.unpackbits(planes[at + plane].view(np.uint8), bitorder="little").view(np.int8)
        if plane == some[-1]:
            codes = np.negative(bits, out=bits) if is_signed else bits
        else:
            codes += codes
            codes += bits
    return codes.reshape(-1, TOKENS)


def unpack_tokens(heap: Array, starts: Array, widths: Array, tokens: Array, dtype: DType) -> Array:
    """Read bits of tiles of one width together."""
    narrow = np.where(widths < WHOLE, widths, 0)
    ends = np.cumsum(narrow, axis=-1, dtype=np.int64)
    first = (starts[:, None] + ends - narrow).reshape(-1)
    places = np.repeat(tokens.astype(np.uint16), widths.shape[-1])
    narrow = narrow.reshape(-1)
    order = np.argsort(narrow, kind="stable")
    bounds = np.cumsum(np.bincount(narrow, minlength=WHOLE))
    planes = heap[: len(heap) // PLANE * PLANE].view("<u2")
    out = np.zeros(len(narrow), dtype=np.int16)
    for width in range(1, WHOLE):
        tiles = order[bounds[width - 1] : bounds[width]]
        if not len(tiles):
            continue
        at, shift, codes = first[tiles], places[tiles], np.zeros(len(tiles), dtype=np.int16)
        for plane in reversed(range(width)):
            bit = ((planes[at + plane] >> shift) & 1).view(np.int16)
            codes = -bit if plane == width - 1 else 2 * codes + bit
        out[tiles] = codes
    return out.reshape(widths.shape).astype(dtype)


def from_bytes(codes: Array, exponents: Array, dtype: DType) -> Array:
    """Multiply those rows that have an exponent: few do."""
    out = codes.astype(dtype)
    rows = np.nonzero(exponents[..., 0])
    if len(rows[0]):
        some = exponents[rows]
        out[rows] *= np.where(some == NO_EXPONENT, np.nan, np.exp2(some, dtype=dtype)).astype(dtype)
    return out
