"""Coordinates of tokens in bits, in the place of `FloatRows`: integers in units of the step, by blocks of 16 tokens."""

import math
from typing import NamedTuple

import numpy as np

from slra._backends.standard.bits import HEADER, PLANE, TOKENS, WHOLE, widths_of
from slra._typing import Array, DType, Namespace
from slra.attn.basis import AttentionBasis
from slra.attn.coding import Coding, bits_at, steps_for, unit_of
from slra.attn.maps import Maps
from slra.cache._headers import (
    FIRST_WIDTH,
    changes_of_widths,
    header_bytes,
    read_headers,
    widths_after,
    write_headers,
)
from slra.cache._index import Index
from slra.cache._layout import Layout, map_arrays

__all__ = [
    "LEAST_FOR_STEPS",
    "ROUNDINGS",
    "BitRows",
    "ByteRows",
    "HeadsInBits",
    "coding_maps",
    "fitted_steps",
    "scaled_maps",
    "unscaled_maps",
]

GROWTH = 1.25
# The first append fixes the steps, where it brings as many tokens as this; otherwise the fit does.
LEAST_FOR_STEPS = 256
# A sum of d products is off by sqrt(d) units in the last place of the sum of their moduli, times this, with
# probability 0.9997 (N. Higham and T. Mary, A new approach to probabilistic rounding error analysis, SIAM J. Sci.
# Comput. 41, 2019).
ROUNDINGS = 4


class Packed(NamedTuple):
    """Coordinates of the keys, or of the values: complete blocks packed, the last one exact."""

    waiting: Array  # (B, H, TOKENS, d), floats
    heap: Array  # (B, 1, bytes, 1), planes of all tiles, in the order block, head, coordinate
    whole: Array  # (B, 1, tiles, TOKENS), the tiles that are not packed
    headers: Array  # (B, blocks, bytes), NumPy: changes of the widths
    widest: Array  # (B, H * d), NumPy: what the next changes are counted from
    used: Array  # (B, 2), NumPy: bytes of the heap, and tiles of ``whole``
    lead: Index | None = None  # where queries choose

    @classmethod
    def empty(cls, layout: Layout, d: int, n_leading: int, like: Array) -> "Packed":
        """No block; so many leading coordinates choose, if any do."""
        lead, (b, h) = (layout.n_batch, 1, 0), (layout.n_batch, layout.n_coded)
        return cls(
            layout.zeros((b, h, TOKENS, d), like),
            layout.zeros((*lead, 1), like, layout.xp.uint8),
            layout.zeros((*lead, TOKENS), like),
            np.zeros((b, 0, header_bytes(h * d)), dtype=np.uint8),
            np.full((b, h * d), FIRST_WIDTH),
            np.zeros((b, 2), dtype=np.int64),
            Index.empty(layout, d, n_leading, like) if layout.chooses else None,
        )

    @property
    def d(self) -> int:
        """Coordinates of a head."""
        return int(self.waiting.shape[-1])

    def widths(self, b: int, blocks: slice) -> Array:
        """Widths (blocks, H, d) of one sequence."""
        widths = read_headers(self.headers[b, : blocks.stop], self.widest.shape[1])[blocks.start :]
        return widths.reshape(len(widths), self.waiting.shape[1], self.d)

    def put(self, x: Array, places: Array, filled: Array, layout: Layout) -> "Packed":
        """Write coordinates (B, H, m, d) at places (B, m), which follow the tokens held; negative ones are left out."""
        xp, put_rows = layout.xp, layout.backend.put_rows
        offset = filled % TOKENS
        places = np.where(places >= 0, places - (filled - offset)[:, None], -1)
        totals = np.maximum(offset, places.max(axis=1, initial=-1) + 1)
        n_blocks = totals // TOKENS
        most = int(n_blocks.max())
        if most == 0:
            return self._replace(waiting=put_rows(self.waiting, x, places))
        b, h, _, d = self.waiting.shape
        rest = layout.zeros((b, h, most * TOKENS, d), x)
        whole = put_rows(xp.concat([self.waiting, rest], axis=2), x, places)
        held = self._coded(whole[:, :, : most * TOKENS, :], n_blocks, filled // TOKENS, layout)
        if np.all(n_blocks == most):
            waiting = xp.asarray(whole[:, :, most * TOKENS :, :], copy=True)
        else:
            parts = [
                whole[i : i + 1, :, int(n) * TOKENS : (int(n) + 1) * TOKENS, :]
                for i, n in enumerate(n_blocks)
            ]
            waiting = xp.concat(parts, axis=0)
        return held._replace(waiting=waiting)

    def _coded(self, x: Array, n_blocks: Array, before: Array, layout: Layout) -> "Packed":
        """Append blocks, (B, H, blocks * TOKENS, d), so many of each sequence."""
        xp, backend = layout.xp, layout.backend
        b, h, n, d = x.shape
        most = n // TOKENS
        tiles = xp.permute_dims(xp.reshape(x, (b, h, most, TOKENS, d)), (0, 2, 1, 4, 3))
        codes = xp.round(tiles)
        low, high = xp.min(codes, axis=-1), xp.max(codes, axis=-1)
        needed = backend.to_numpy(widths_of(low, high, xp)).reshape(b, most, h * d)
        is_used = np.arange(most) < n_blocks[:, None]
        widths, changes, widest = changes_of_widths(needed, is_used, self.widest)
        narrow = np.where(widths < WHOLE, widths, 0)
        stream = backend.pack_tiles(xp.reshape(codes, (-1, TOKENS)), widths.reshape(-1))
        lengths = PLANE * narrow.reshape(b, -1).sum(axis=1, dtype=np.int64)
        heap = self._appended(self.heap, stream[:, None], lengths, 0, layout)
        (at,) = np.nonzero(widths.reshape(-1) == WHOLE)
        whole, counts = self.whole, np.sum(widths.reshape(b, -1) == WHOLE, axis=1)
        if len(at):
            kept = backend.from_numpy(at, x, backend.place_dtype)
            kept = xp.take(xp.reshape(tiles, (-1, TOKENS)), kept, axis=0)
            whole = self._appended(whole, kept, counts, 1, layout)
        headers = self._with_headers(write_headers(changes), n_blocks, before)
        used = self.used + np.stack([lengths, counts], axis=1)
        new = self._replace(heap=heap, whole=whole, headers=headers, widest=widest, used=used)
        if self.lead is None:
            return new
        placed = codes, widths, n_blocks, before, self.used, layout
        return new._replace(lead=self.lead.put(*placed))

    def _appended(
        self, buffer: Array, rows: Array, counts: Array, which: int, layout: Layout
    ) -> Array:
        """Append rows (m, f), so many to each sequence one after the other, to a buffer (B, 1, n, f)."""
        xp, backend, used = layout.xp, layout.backend, self.used[:, which]
        buffer = _grown(buffer, int((used + counts).max()), layout)
        most = int(counts.max())
        if most == 0:
            return buffer
        each = np.arange(most)
        source = np.minimum((np.cumsum(counts) - counts)[:, None] + each, max(0, rows.shape[0] - 1))
        is_used = each < counts[:, None]
        if len(counts) == 1:
            stacked = rows[None, None, :, :]
        else:
            at = backend.from_numpy(source.reshape(-1), rows, backend.place_dtype)
            stacked = xp.reshape(xp.take(rows, at, axis=0), (len(counts), 1, most, rows.shape[-1]))
        return backend.put_rows(buffer, stacked, np.where(is_used, used[:, None] + each, -1))

    def _with_headers(self, new: Array, n_blocks: Array, before: Array) -> Array:
        headers, n_rows, b = self.headers, int((before + n_blocks).max()), len(new)
        if n_rows > headers.shape[1]:
            room = max(n_rows, math.ceil(headers.shape[1] * GROWTH))
            more = np.zeros((b, room - headers.shape[1], headers.shape[2]), dtype=np.uint8)
            headers = np.concatenate([headers, more], axis=1)
        for i in range(b):
            headers[i, before[i] : before[i] + n_blocks[i]] = new[i, : n_blocks[i]]
        return headers

    def read(self, rows: slice, filled: Array, dtype: DType, layout: Layout) -> Array:
        """Coordinates (B, H, rows, d); what is beyond the tokens held is anything."""
        xp, backend = layout.xp, layout.backend
        first, n_rows = rows.start // TOKENS, rows.stop - rows.start
        parts = []
        for b, count in enumerate(filled):
            last = max(first, min(int(count) // TOKENS, -(-rows.stop // TOKENS)))
            parts.append(self._blocks(b, slice(first, last), dtype, layout))
        shape = (len(parts), layout.n_coded, n_rows, self.d)
        if len(parts) == 1 and parts[0].shape[1] >= n_rows:
            return parts[0][None, :, :n_rows, :]
        out = backend.key_buffer(shape, dtype, self.waiting)
        for b, part in enumerate(parts):
            n = min(part.shape[1], n_rows)
            places = np.full((len(parts), n), -1)
            places[b] = np.arange(n)
            spread = xp.broadcast_to(part[None, :, :n, :], (len(parts), *part[:, :n, :].shape))
            out = backend.put_rows(out, spread, places)
        places = (filled // TOKENS * TOKENS - rows.start)[:, None] + np.arange(TOKENS)
        is_waiting = (np.arange(TOKENS) < (filled % TOKENS)[:, None]) & (places >= 0)
        return backend.put_rows(
            out, self.waiting, np.where(is_waiting & (places < n_rows), places, -1)
        )

    def _blocks(self, b: int, blocks: slice, dtype: DType, layout: Layout) -> Array:
        """Coordinates of complete blocks of one sequence, (H, n, d)."""
        xp, backend = layout.xp, layout.backend
        before, widths = self.widths(b, slice(0, blocks.start)), self.widths(b, blocks)
        start = PLANE * int(np.sum(before, where=before < WHOLE, dtype=np.int64))
        out = backend.unpack_blocks(self.heap[b, 0, start:, 0], widths, dtype)
        if (widths == WHOLE).any():
            skipped = int(np.sum(before == WHOLE))
            i, h, j = np.nonzero(widths == WHOLE)
            exact = xp.astype(self.whole[b, 0, skipped : skipped + len(i), :], dtype, copy=False)
            at = (i * TOKENS)[:, None] + np.arange(TOKENS)
            flat = ((h[:, None] * out.shape[1] + at) * out.shape[2] + j[:, None]).reshape(-1)
            # Rows of one number: the backend writes them where its arrays can be written to.
            rows = xp.reshape(xp.asarray(out, copy=True), (1, 1, -1, 1))
            rows = backend.put_rows(rows, xp.reshape(exact, (1, 1, -1, 1)), flat[None])
            out = xp.reshape(rows, out.shape)
        return out

    def indexed(self, n_leading: int, filled: Array, layout: Layout) -> "Packed":
        """Make the index of what is held anew."""
        xp, n_blocks = layout.xp, filled // TOKENS
        b, h, most = layout.n_batch, layout.n_heads, int(n_blocks.max())
        index = Index.empty(layout, self.d, n_leading, self.waiting)
        if most == 0:
            return self._replace(lead=index)
        codes = self.read(slice(0, most * TOKENS), filled, self.waiting.dtype, layout)
        codes = xp.permute_dims(xp.reshape(codes, (b, h, most, TOKENS, self.d)), (0, 2, 1, 4, 3))
        widths = np.zeros((b, most, h * self.d), dtype=np.uint8)
        for i, n in enumerate(n_blocks):
            widths[i, :n] = self.widths(i, slice(0, int(n))).reshape(int(n), h * self.d)
        placed = codes, widths, n_blocks, 0 * n_blocks, 0 * self.used, layout
        return self._replace(lead=index.put(*placed))

    def trimmed(self, layout: Layout, filled: Array) -> "Packed":
        """Give back the room that is left."""
        n_bytes, n_whole = (int(n) for n in self.used.max(axis=0))
        n_blocks, index = int(filled.max()) // TOKENS, self.lead
        return self._replace(
            lead=None if index is None else index.trimmed(n_blocks, layout),
            heap=_grown(self.heap[:, :, :n_bytes, :], n_bytes, layout, is_copy=True),
            whole=_grown(self.whole[:, :, :n_whole, :], n_whole, layout, is_copy=True),
            headers=self.headers[:, :n_blocks].copy(),
        )

    def cropped(self, filled: Array, before: Array, layout: Layout) -> "Packed":
        """Drop what comes after the first tokens of each sequence; a block that is cut waits, as it was rounded."""
        xp, dtype = layout.xp, self.waiting.dtype
        used, widest, parts = self.used.copy(), self.widest.copy(), []
        for b, count in enumerate(filled):
            n = int(count) // TOKENS
            left = self.widths(b, slice(0, n))
            used[b] = (
                PLANE * int(np.sum(left, where=left < WHOLE, dtype=np.int64)),
                np.sum(left == WHOLE),
            )
            widest[b] = widths_after(self.headers[b, :n], self.widest.shape[1])
            is_cut = count % TOKENS and n < before[b] // TOKENS
            parts.append(
                self._blocks(b, slice(n, n + 1), dtype, layout)[None, ...] if is_cut else None
            )
        waiting = [
            self.waiting[b : b + 1, ...] if part is None else part for b, part in enumerate(parts)
        ]
        return self._replace(used=used, widest=widest, waiting=xp.concat(waiting, axis=0))

    def check(self, filled: Array) -> None:
        """Raise ValueError where parts, which come from a file, do not belong together."""
        for b, count in enumerate(filled):
            n = int(count) // TOKENS
            if n > self.headers.shape[1]:
                raise ValueError("its headers are fewer than its blocks")
            widths = self.widths(b, slice(0, n))
            n_whole = int(np.sum(widths == WHOLE))
            n_bytes = PLANE * int(np.sum(widths, where=widths < WHOLE, dtype=np.int64))
            is_right = np.array_equal(self.used[b], (n_bytes, n_whole)) and np.array_equal(
                self.widest[b], widths_after(self.headers[b, :n], self.widest.shape[1])
            )
            is_right &= self.heap.shape[2] % PLANE == 0
            if not is_right or n_bytes > self.heap.shape[2] or n_whole > self.whole.shape[2]:
                raise ValueError("its packed integers are not those of its headers")


class BitRows(NamedTuple):
    """Storage of a segment in bits; its methods are those of `FloatRows`."""

    layout: Layout
    k: Packed
    v: Packed
    filled: Array  # (B,), NumPy: tokens held
    far_k: Array  # (B, H): how far a number of a key was from the shift
    far_v: Array
    half_k: Array  # (B, H or 1): how far off a coordinate may be, half a step but where it was rounded twice
    half_v: Array

    @classmethod
    def empty(cls, layout: Layout, like: Array) -> "BitRows":
        """No token."""
        k, v = (
            Packed.empty(layout, *sizes, like)
            for sizes in zip(layout.rank, layout.n_leading, strict=True)
        )
        far = layout.zeros((layout.n_batch, layout.n_heads), like)
        filled, half = np.zeros(layout.n_batch, dtype=np.int64), far[:, : layout.n_coded] + 0.5
        return cls(layout, k, v, filled, far, far, half, half)

    @property
    def n_rows(self) -> int:
        """Tokens that there is room for."""
        return TOKENS * (int(self.k.headers.shape[1]) + 1)

    @property
    def dtype(self) -> DType:
        """What the tokens that wait are stored in."""
        return self.k.waiting.dtype

    def rounded(self, x: Array) -> Array:
        """Coordinates as they came: they are rounded by blocks."""
        return x

    def put(self, k: Array, v: Array, rest: None, places: Array) -> "BitRows":
        """Write coordinates (B, H, m, .) at places (B, m)."""
        new_k, new_v = (
            one.put(x, places, self.filled, self.layout) for one, x in ((self.k, k), (self.v, v))
        )
        filled = np.maximum(self.filled, places.max(axis=1, initial=-1) + 1)
        return self._replace(k=new_k, v=new_v, filled=filled)

    def coordinates(self, rows: slice, dtype: DType) -> tuple[Array, Array]:
        """Read k', with its column of ones where the layout says so, and v'."""
        k, v = (one.read(rows, self.filled, dtype, self.layout) for one in (self.k, self.v))
        if self.layout.carries_shift:
            k = self.layout.xp.concat([k, self.layout.xp.ones_like(k[..., :1])], axis=-1)
        return k, v

    @property
    def n_complete(self) -> Array:
        """Tokens of complete blocks, (B,)."""
        return self.filled // TOKENS * TOKENS

    def with_finite_index(self) -> "BitRows":
        """Let tokens that are not finite be zeros in the index, as they are elsewhere then."""
        k, v = (
            x if x.lead is None else x._replace(lead=x.lead.finite(self.layout.xp))
            for x in (self.k, self.v)
        )
        return self._replace(k=k, v=v)

    def of_heads(self, b: slice, h: slice) -> "HeadsInBits":
        """See some sequences and heads, to choose from."""
        return HeadsInBits(self, b, h)

    def waiting(self, dtype: DType) -> tuple[Array, Array]:
        """Read k' and v' of the tokens after the complete blocks, as `coordinates` does."""
        xp = self.layout.xp
        k, v = (xp.astype(one.waiting, dtype, copy=False) for one in (self.k, self.v))
        if self.layout.carries_shift:
            k = xp.concat([k, xp.ones_like(k[..., :1])], axis=-1)
        return k, v

    def indexed(self) -> "BitRows":
        """Make anew what queries choose by, which files do not hold."""
        if not self.layout.chooses:
            return self
        k, v = (
            one.indexed(n, self.filled, self.layout)
            for one, n in zip((self.k, self.v), self.layout.n_leading, strict=True)
        )
        return self._replace(k=k, v=v)

    def without_index(self) -> "BitRows":
        """Leave out what can be made anew."""
        return self._replace(k=self.k._replace(lead=None), v=self.v._replace(lead=None))

    def corrections(self, rows: slice, dtype: DType) -> None:
        """There are none."""

    def is_read_as_is(self, dtype: DType) -> bool:
        """Say no: reading makes new arrays."""
        return False

    def astype(self, dtype: DType) -> "BitRows":
        """Do nothing: what waits is as exact as it is computed."""
        return self

    def trimmed(self, n_rows: int) -> "BitRows":
        """Give back what will not be needed."""
        k, v = (one.trimmed(self.layout, self.filled) for one in (self.k, self.v))
        return self._replace(k=k, v=v)

    def first(self, n_rows: int) -> "BitRows":
        """Cut off the room that is left."""
        return self.trimmed(n_rows)

    def cropped(self, filled: Array) -> "BitRows":
        """Keep the first tokens of each sequence."""
        filled = np.minimum(self.filled, np.maximum(filled, 0))
        k, v = (one.cropped(filled, self.filled, self.layout) for one in (self.k, self.v))
        return self._replace(k=k, v=v, filled=filled)

    def half_steps(self) -> tuple[Array, Array]:
        """Say how far off a coordinate may be, (B, H), but for rounding where it is computed."""
        return self.half_k, self.half_v

    def check(self) -> None:
        """Raise ValueError where parts do not belong together."""
        for one in (self.k, self.v):
            one.check(self.filled)

    def counted(self) -> tuple[int, int]:
        """Bits of the complete blocks, and numbers in them."""
        n_blocks, bits, numbers = self.filled // TOKENS, 0, 0
        float_bits = self.layout.xp.finfo(self.dtype).bits
        for one in (self.k, self.v):
            tiles = int(n_blocks.sum()) * self.layout.n_coded * one.d
            numbers += tiles * TOKENS
            used = one.used.sum(axis=0)
            bits += HEADER * tiles + 8 * int(used[0]) + TOKENS * float_bits * int(used[1])
            if one.lead is not None:
                bits += int(n_blocks.sum()) * self.layout.n_heads * one.lead.bits_of_a_block()
        return bits, numbers


class HeadsInBits(NamedTuple):
    """Complete blocks of some sequences and heads; methods are those by which `FloatRows` are chosen from."""

    rows: BitRows
    b: slice
    h: slice

    def chosen_by(self, rows: slice, dtype: DType) -> tuple[Array, Array]:
        """Read the leading coordinates of k' and v', which are those of the index."""
        k, v = (
            index.leading(rows, dtype, self.rows.layout)
            for index in map(self._index_of, (self.rows.k, self.rows.v))
        )
        return k, v

    def others(self, places: Array, dtype: DType) -> tuple[Array, Array]:
        """Read all coordinates of k' and v' at places (B, H, M, t), less those of the index; (B, H, M, t, .)."""
        layout, (*lead, n_queries, n) = self.rows.layout, places.shape
        at = layout.xp.reshape(places, (*lead, n_queries * n))

        def read(one: Packed) -> Array:
            held = one.heap[self.b, ...], one.whole[self.b, ...], self._index_of(one)
            rest = layout.backend.chosen_tokens(*held, at, one.d, dtype)
            return layout.xp.reshape(rest, (*lead, n_queries, n, one.d))

        return read(self.rows.k), read(self.rows.v)

    def all_others(self, rows: slice, dtype: DType) -> tuple[Array, Array]:
        """Read as `others` does all of some rows; (B, H, 1, rows, .)."""
        layout, waiting = self.rows.layout, self.rows.k.waiting
        lead = waiting[self.b, self.h, ...].shape[:2]
        places = np.tile(np.arange(rows.start, rows.stop), (*lead, 1, 1))
        return self.others(
            layout.backend.from_numpy(places, waiting, layout.backend.place_dtype), dtype
        )

    def _index_of(self, one: Packed) -> Index:
        assert one.lead is not None
        return Index(*(x[self.b, self.h, ...] for x in one.lead))


class ByteRows(NamedTuple):
    """Storage in a byte a number, where shapes are static: each token has its own step, at least the one asked for."""

    layout: Layout
    k: Array  # (B, H, n, D), int8
    v: Array
    step_k: Array  # (B, H, n, 1), in the units of the coordinates
    step_v: Array
    far_k: Array  # (B, H): how far a number of a key was from the shift
    far_v: Array

    @classmethod
    def empty(cls, layout: Layout, n_rows: int, like: Array) -> "ByteRows":
        """Room for so many tokens."""
        lead, int8 = (layout.n_batch, layout.n_coded, n_rows), layout.xp.int8
        k, v = (layout.zeros((*lead, d), like, int8) for d in layout.rank)
        step = layout.zeros((*lead, 1), like)
        far = layout.zeros((layout.n_batch, layout.n_heads), like)
        return cls(layout, k, v, step, step, far, far)

    @property
    def n_rows(self) -> int:
        """Tokens that there is room for."""
        return int(self.k.shape[-2])

    @property
    def dtype(self) -> DType:
        """What steps are stored in."""
        return self.step_k.dtype

    def put(self, k: Array, v: Array, rest: None, places: Array) -> "ByteRows":
        """Write coordinates (B, H, m, .) at places (B, m)."""
        xp, put_rows = self.layout.xp, self.layout.backend.put_rows
        new = []
        for held, steps, x in ((self.k, self.step_k, k), (self.v, self.step_v, v)):
            largest = xp.max(xp.abs(x), axis=-1, keepdims=True)
            step = xp.maximum(largest / 127, xp.ones_like(largest))
            codes = xp.astype(xp.round(x / step), xp.int8)
            new.append((put_rows(held, codes, places), put_rows(steps, step, places)))
        (k, step_k), (v, step_v) = new
        return self._replace(k=k, v=v, step_k=step_k, step_v=step_v)

    def coordinates(self, rows: slice, dtype: DType) -> tuple[Array, Array]:
        """Read k', with its column of ones where the layout says so, and v'."""
        xp = self.layout.xp
        k, v = self._read(self.k[:, :, rows, :], self.v[:, :, rows, :], rows, dtype)
        return (
            xp.concat([k, xp.ones_like(k[..., :1])], axis=-1) if self.layout.carries_shift else k
        ), v

    def of_heads(self, b: slice, h: slice) -> "ByteRows":
        """See some sequences and heads, to choose from."""
        return map_arrays(lambda x: x[b, h, ...], self)

    def chosen_by(self, rows: slice, dtype: DType) -> tuple[Array, Array]:
        """Read the leading coordinates of k' and v'."""
        n_k, n_v = self.layout.n_leading
        return self._read(self.k[:, :, rows, :n_k], self.v[:, :, rows, :n_v], rows, dtype)

    def others(self, places: Array, dtype: DType) -> tuple[Array, Array]:
        """Read the other coordinates of k' and v' at places (B, H, M, t); (B, H, M, t, .)."""
        xp, gather, (*lead, n_queries, n) = (
            self.layout.xp,
            self.layout.backend.gather_rows,
            places.shape,
        )
        at, found = xp.reshape(places, (*lead, n_queries * n)), []
        rows = (self.k, self.step_k), (self.v, self.step_v)
        for (x, step), first in zip(rows, self.layout.n_leading, strict=True):
            read = xp.astype(gather(x[..., first:], at), dtype) * gather(step, at)
            found.append(xp.reshape(read, (*lead, n_queries, n, x.shape[-1] - first)))
        return found[0], found[1]

    def all_others(self, rows: slice, dtype: DType) -> tuple[Array, Array]:
        """Read as `others` does all of some rows; (B, H, 1, rows, .)."""
        n_k, n_v = self.layout.n_leading
        k, v = self._read(self.k[:, :, rows, n_k:], self.v[:, :, rows, n_v:], rows, dtype)
        return k[:, :, None, ...], v[:, :, None, ...]

    def _read(self, k: Array, v: Array, rows: slice, dtype: DType) -> tuple[Array, Array]:
        k, v = (
            self.layout.xp.astype(x, dtype) * step[:, :, rows, :]
            for x, step in ((k, self.step_k), (v, self.step_v))
        )
        return k, v

    def corrections(self, rows: slice, dtype: DType) -> None:
        """There are none."""

    def is_read_as_is(self, dtype: DType) -> bool:
        """Say no: reading makes new arrays."""
        return False

    def astype(self, dtype: DType) -> "ByteRows":
        """Do nothing: steps are as exact as they are computed."""
        return self

    def trimmed(self, n_rows: int) -> "ByteRows":
        """Keep the room, which never changes."""
        return self

    def first(self, n_rows: int) -> "ByteRows":
        """Keep the room."""
        return self

    def half_steps(self) -> tuple[Array, Array]:
        """Say how far off a coordinate may be, (B, H), but for rounding where it is computed."""
        xp = self.layout.xp
        k, v = (xp.max(step[..., 0], axis=-1) / 2 for step in (self.step_k, self.step_v))
        return k, v

    def counted(self) -> tuple[int, int]:
        """Bits and numbers of the room there is."""
        numbers = self.n_rows * sum(self.layout.rank)
        return 8 * numbers + 2 * self.n_rows * self.layout.xp.finfo(self.dtype).bits, numbers


def _grown(buffer: Array, n_rows: int, layout: Layout, *, is_copy: bool = False) -> Array:
    """Make room for so many rows in a buffer (B, 1, n, f), and for some more."""
    held = int(buffer.shape[2])
    if n_rows <= held and not is_copy:
        return buffer
    # An even number of bytes: planes are two.
    room = n_rows if is_copy else max(n_rows, 2 * math.ceil(held * GROWTH / 2))
    backend, places = layout.backend, np.broadcast_to(np.arange(held), (buffer.shape[0], held))
    return backend.put_rows(backend.rows_like(buffer, room), buffer, places)


def coding_maps(basis: AttentionBasis, layout: Layout) -> Maps:
    """Lay the maps to the coordinates of a coding out as those of a basis, in units of the steps asked for."""
    assert basis.coding is not None
    maps = unscaled_maps(basis.coding, layout.xp)
    steps = _steps(basis.coding, layout)
    return scaled_maps(maps, [x.reshape(maps.wk.shape[:2]) for x in steps], layout)


def unscaled_maps(coding: Coding, xp: Namespace) -> Maps:
    """Lay the maps to the coordinates of a coding out, (lead, H, 1, ., .).

    Across heads they are those of one head, as wide as all of them.
    """
    lead, n_coded = math.prod(coding.wk.shape[:-3]), coding.importance_k.shape[-2]
    shape = (lead, n_coded, 1)
    wq, wk, wv = (xp.reshape(x, (*shape, -1, x.shape[-1])) for x in coding[:3])
    c, mu = (xp.reshape(x, (*shape, 1, -1)) for x in coding[3:5])
    return Maps(wq, wk, wv, xp.matrix_transpose(wv), c, mu, ranks=())


def _steps(coding: Coding, layout: Layout) -> list[Array]:
    to_numpy = layout.backend.to_numpy
    steps = []
    for which in range(2):
        importance = to_numpy(coding[5 + which])
        if layout.rtol is None:
            assert layout.bits is not None
            steps.append(steps_for(layout.bits[which], importance, to_numpy(coding[7 + which])))
        else:
            # Half a step in each of d coordinates is rtol of the length of a token, in the root mean square.
            steps.append(2 * layout.rtol * unit_of(importance))
    return steps


def scaled_maps(maps: Maps, steps: list[Array], layout: Layout) -> Maps:
    """Coordinates in units of other steps, (lead, H or 1) of keys and of values."""
    by_k, by_v = (
        layout.backend.from_numpy(np.asarray(step)[:, :, None, None, None], maps.wk)
        for step in steps
    )
    return maps._replace(wq=maps.wq * by_k, wk=maps.wk / by_k, wv=maps.wv / by_v, uv=maps.uv * by_v)


def fitted_steps(x: Array, bits: float, layout: Layout) -> Array:
    """Choose steps (lead, H), in units of those now, at which coordinates (B, H, n, d) take so many bits."""
    b, h, n, d = x.shape
    n_blocks = n // TOKENS
    xp, to_numpy = layout.xp, layout.backend.to_numpy
    blocks = xp.reshape(x[:, :, : n_blocks * TOKENS, :], (b, h, n_blocks, TOKENS, d))
    low, high = (to_numpy(f(blocks, axis=-2)) for f in (xp.min, xp.max))
    if layout.pool_batch:
        low, high = (np.moveaxis(a, 0, 1).reshape(1, h, -1, d) for a in (low, high))
    # Bits fall by one where the step doubles, nearly: 2^-12 is where a step of 2^12 would be too fine by 12 bits.
    fine, coarse = np.full(low.shape[:2], -12.0), np.full(low.shape[:2], 12.0)
    for _ in range(20):
        middle = (fine + coarse) / 2
        is_more = bits_at(low, high, 2.0 ** middle[..., None, None]) > bits
        fine, coarse = np.where(is_more, middle, fine), np.where(is_more, coarse, middle)
    return 2.0**coarse
