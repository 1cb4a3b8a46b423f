"""Integers in few bits, packed by blocks, in the array API standard alone.

A *tile* is one coordinate of TOKENS tokens: integers in two's complement, as wide as the largest of them needs, stored
as bit planes of one bit a token. Tiles follow each other in a *heap* of bytes, two for each plane. Widths are headers
of 3 bits: by how much the width of a coordinate changes from block to block (`slra.cache._headers`).

Source: the frame of reference of column stores, see M. Zukowski et al., Super-scalar RAM-CPU cache compression,
ICDE 2006.
"""

from typing import Any

import numpy as np

from slra._typing import Array, DType, Namespace

__all__ = [
    "HEADER",
    "NIBBLE",
    "NO_EXPONENT",
    "TOKENS",
    "WHOLE",
    "Bits",
    "bits_of_widths",
    "widths_of",
]

TOKENS = 16
HEADER = 3
# The width that says: not packed. A tile that would be this wide, or is not finite, is kept in floats.
WHOLE = 15
# Of a byte each, the exponent of integers of which one is not finite.
NO_EXPONENT = 255
# Bits of a token in the bytes of a plane, and bytes of a plane.
BYTE, PLANE = 8, TOKENS // 8
# Bits of the width of a tile, where widths of two are a byte.
NIBBLE = 4


def widths_of(low: Array, high: Array, xp: Namespace) -> Array:
    """Bits that integers from ``low`` to ``high``, floats, need in two's complement: 0 for zeros, at most WHOLE."""
    largest = xp.maximum(high, -low - 1)
    width = xp.astype((low != 0) | (high != 0), xp.uint8)
    for plane in range(WHOLE - 1):
        width = width + xp.astype(largest >= 2**plane, xp.uint8)
    # NaN compares as false.
    is_in_range = largest < 2 ** (WHOLE - 2)
    return xp.where(is_in_range, width, xp.full_like(width, WHOLE))


def bits_of_widths(low: Array, high: Array, xp: Namespace) -> Array:
    """Bits that a number takes in tiles of such integers, header and all."""
    widths = xp.astype(widths_of(low, high, xp), xp.float32)
    return xp.where(widths == WHOLE, 0 * widths + 32, widths) + HEADER / TOKENS


class Bits:
    """What a library's backend can do better with packed integers."""

    xp: Any
    gather_rows: Any

    def creation_device(self, like: Array) -> Any:
        """Device to create an array on that is to meet ``like``."""
        raise NotImplementedError

    def from_numpy(self, a: np.ndarray[Any, Any], like: Array, dtype: DType | None = None) -> Array:
        """Bring a small NumPy array to the library, device and (unless given) dtype of ``like``."""
        raise NotImplementedError

    @property
    def place_dtype(self) -> DType:
        """Dtype of places in an array, wide enough for any."""
        raise NotImplementedError

    def pack_tiles(self, x: Array, widths: np.ndarray[Any, Any]) -> Array:
        """Pack integers, floats (n, TOKENS), in so many bits each tile, (n,); none in WHOLE. Returns bytes, (m,)."""
        xp = self.xp
        most = int(np.max(widths[widths < WHOLE], initial=0))
        widths = np.where(widths < WHOLE, widths, 0)
        is_used = np.arange(most) < widths[:, None]
        # Tiles that are not packed may hold anything.
        x = xp.where(self.from_numpy(widths > 0, x, xp.bool)[:, None], x, xp.zeros_like(x))
        codes = xp.reshape(xp.astype(x, xp.int32), (-1, PLANE, BYTE))
        planes = [
            xp.sum(((codes >> plane) & 1) << self._places(codes), axis=-1) for plane in range(most)
        ]
        if not planes or not is_used.any():
            return xp.zeros((0,), dtype=xp.uint8, device=self.creation_device(x))
        stacked = xp.reshape(xp.stack(planes, axis=1), (-1, PLANE))
        (kept,) = np.nonzero(is_used.reshape(-1))
        taken = xp.take(stacked, self.from_numpy(kept, x, self.place_dtype), axis=0)
        return xp.astype(xp.reshape(taken, (-1,)), xp.uint8)

    def unpack_blocks(self, heap: Array, widths: np.ndarray[Any, Any], dtype: DType) -> Array:
        """Undo `pack_tiles` from the beginning of ``heap``, by widths (blocks, H, d): integers as floats (H, n, d).

        Tiles that were not packed are zeros.
        """
        xp, (n_blocks, n_heads, d) = self.xp, widths.shape
        narrow = np.where(widths < WHOLE, widths, 0).reshape(-1).astype(np.int64)
        starts = PLANE * (np.cumsum(narrow) - narrow)
        codes = xp.zeros(
            (narrow.size, PLANE, BYTE), dtype=xp.int32, device=self.creation_device(heap)
        )
        for plane in range(int(np.max(narrow, initial=0))):
            is_used = plane < narrow
            at = np.where(is_used, starts + PLANE * plane, 0)[:, None] + np.arange(PLANE)
            read = xp.take(heap, self.from_numpy(at.reshape(-1), heap, self.place_dtype), axis=0)
            read = xp.reshape(xp.astype(read, xp.int32), (-1, PLANE, 1))
            # The last plane is the sign.
            worth = np.where(is_used, 2**plane, 0) * np.where(plane == narrow - 1, -1, 1)
            worth = self.from_numpy(worth[:, None, None], heap, xp.int32)
            codes = codes + ((read >> self._places(read)) & 1) * worth
        tiles = xp.reshape(xp.astype(codes, dtype), (n_blocks, n_heads, d, TOKENS))
        tiles = xp.permute_dims(tiles, (1, 0, 3, 2))
        return xp.reshape(tiles, (n_heads, n_blocks * TOKENS, d))

    def from_bytes(self, codes: Array, exponents: Array, dtype: DType) -> Array:
        """Integers (..., r) of a byte, times two to the exponents (..., 1); NaN where that is `NO_EXPONENT`."""
        xp = self.xp
        factor = 2.0 ** xp.astype(exponents, dtype)
        factor = xp.where(exponents == NO_EXPONENT, xp.full_like(factor, xp.nan), factor)
        return xp.astype(codes, dtype) * factor

    def unpack_tokens(
        self, heap: Array, starts: Array, widths: Array, tokens: Array, dtype: DType
    ) -> Array:
        """Read single tokens of tiles: integers as floats (m, d).

        ``starts`` (m,) are the planes in ``heap`` before the first of the d tiles of each row, whose widths (m, d)
        follow each other; ``tokens`` (m,) are places in a block. Tiles that were not packed are zeros.
        """
        xp = self.xp
        narrow = xp.astype(widths, self.place_dtype)
        narrow = xp.where(narrow < WHOLE, narrow, xp.zeros_like(narrow))
        first = starts[:, None] + xp.cumulative_sum(narrow, axis=-1) - narrow
        places = xp.astype(tokens, self.place_dtype)[:, None]
        codes = xp.zeros_like(narrow)
        if heap.shape[0] == 0:
            return xp.astype(codes, dtype)
        for plane in range(WHOLE - 1):
            is_used = narrow > plane
            at = xp.where(is_used, PLANE * (first + plane) + places // BYTE, xp.zeros_like(first))
            read = xp.reshape(xp.take(heap, xp.reshape(at, (-1,)), axis=0), at.shape)
            bit = (xp.astype(read, codes.dtype) >> places % BYTE) & 1
            # The last plane is the sign.
            worth = xp.where(narrow == plane + 1, xp.full_like(bit, -1), xp.ones_like(bit))
            codes = codes + xp.where(is_used, bit * worth * 2**plane, xp.zeros_like(bit))
        return xp.astype(codes, dtype)

    def chosen_tokens(
        self,
        heap: Array,
        whole: Array,
        index: tuple[Array, Array, Array, Array],
        at: Array,
        d: int,
        dtype: DType,
    ) -> Array:
        """Read tokens (B, H, m) of packed tiles, less what an index has of their leading coordinates: (B, H, m, d).

        ``heap`` is (B, 1, bytes, 1), an even number of them, ``whole`` (B, 1, tiles, TOKENS) holds the tiles that are
        not packed, the index is that of `slra.cache._index`.
        """
        xp, (codes, exponents, pairs, starts) = self.xp, index
        pairs, starts = (self.gather_rows(x, at // TOKENS) for x in (pairs, starts))
        widths = xp.stack([pairs & WHOLE, pairs >> NIBBLE], axis=-1)
        widths = xp.reshape(widths, (*at.shape, 2 * pairs.shape[-1]))[..., :d]
        element = self.from_numpy(np.arange(at.shape[0])[:, None, None], at)
        read = self.unpack_tokens(
            xp.reshape(heap, (-1,)),
            xp.reshape(starts[..., 0] + int(heap.shape[2]) // PLANE * element, (-1,)),
            xp.reshape(widths, (-1, d)),
            xp.reshape(at % TOKENS, (-1,)),
            dtype,
        )
        read = xp.reshape(read, (*at.shape, d))
        if whole.shape[2]:
            is_whole = widths == WHOLE
            among = xp.cumulative_sum(xp.astype(is_whole, at.dtype), axis=-1) - 1
            tile = starts[..., 1:] + among + int(whole.shape[2]) * element[..., None]
            places = xp.where(is_whole, TOKENS * tile + (at % TOKENS)[..., None], 0 * tile)
            numbers = xp.take(xp.reshape(whole, (-1,)), xp.reshape(places, (-1,)), axis=0)
            numbers = xp.astype(xp.reshape(numbers, places.shape), dtype)
            read = xp.where(is_whole, numbers, read)
        codes, exponents = (self.gather_rows(x, at) for x in (codes, exponents))
        known = self.from_bytes(codes, exponents, dtype)
        # What is not finite is NaN by the index alone.
        known = xp.where(xp.isnan(known), xp.zeros_like(known), known)
        r = known.shape[-1]
        return xp.concat([read[..., :r] - known, read[..., r:]], axis=-1)

    def _places(self, like: Array) -> Array:
        return self.from_numpy(np.arange(BYTE), like, self.xp.int32)
