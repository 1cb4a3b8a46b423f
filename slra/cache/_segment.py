"""Tokens in r dimensions: how they are stored, read, and attended to."""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from slra._backends.standard.bits import TOKENS
from slra._typing import Array, DType
from slra._validate import promote
from slra.attn.basis import AttentionBasis
from slra.attn.chosen import choose, tile_of_queries
from slra.attn.maps import Maps
from slra.cache._bits import (
    LEAST_FOR_STEPS,
    ROUNDINGS,
    BitRows,
    ByteRows,
    coding_maps,
    fitted_steps,
    scaled_maps,
)
from slra.cache._layout import Layout, map_arrays, on_host
from slra.cache._queries import Queries
from slra.cache._rotary import rotate, turns_at

__all__ = [
    "CHUNK_ROWS",
    "FloatRows",
    "Segment",
    "SparseEntries",
    "empty_rows",
    "laid_out",
    "maps_of",
]

# Rows that are brought to the dtype and the dimensions they are computed in at once.
CHUNK_ROWS = 4096
# Buffers grow by this factor: at most so much is allocated in vain, and a row is copied five times at most, on average.
GROWTH = 1.25
LEAST_ROWS = 16


class SparseEntries(NamedTuple):
    """The largest entries of what the low rank leaves of each row, (B, H, n, s)."""

    values: Array
    indices: Array


class FloatRows(NamedTuple):
    """Storage of a segment: coordinates k' and v' of each token as floats, and corrections of what they stand for.

    A segment knows no more of its storage than the methods: another way to store coordinates replaces this class.
    """

    layout: Layout
    k: Array  # (B, H, n, r), and where the layout says so a column of ones, to be read as it is
    v: Array  # (B, H, n, r_v)
    sparse_k: SparseEntries | None = None
    sparse_v: SparseEntries | None = None
    # Where queries choose, ``k`` and ``v`` are the leading coordinates, read of all tokens, and these are the others.
    # Where a query also chooses coordinates, ``k`` are all of them by feature, and ``rest_k`` the same by token.
    rest_k: Array | None = None
    rest_v: Array | None = None

    @classmethod
    def empty(cls, layout: Layout, n_rows: int, like: Array, dtype: DType) -> "FloatRows":
        """Room for so many tokens."""
        backend, (rank_qk, rank_v) = layout.backend, layout.n_leading
        lead = (layout.n_batch, layout.n_heads, n_rows)
        has_ones = layout.carries_shift and not layout.chooses
        if layout.chooses and layout.reads_by_query:
            by_feature = (*lead[:2], rank_qk, n_rows)
            k = layout.xp.matrix_transpose(layout.zeros(by_feature, like, dtype))
        else:
            k = backend.key_buffer((*lead, rank_qk + has_ones), dtype, like)
        v = layout.zeros((*lead, rank_v), like, dtype)
        if layout.chooses:
            n_twice = rank_qk if layout.reads_by_query else 0
            widths = layout.rank[0] - rank_qk + n_twice, layout.rank[1] - rank_v
            rest = (layout.zeros((*lead, width), like, dtype) for width in widths)
            return cls(layout, k, v, None, None, *rest)
        if not layout.n_sparse:
            return cls(layout, k, v)
        shape, sparse = (*lead, layout.n_sparse), []
        for width in (layout.width, layout.width_v):
            # The backend chooses the dtype of indices.
            _, indices = backend.largest_in_rows(layout.zeros((1, width), like), 1)
            values = layout.zeros(shape, like, dtype)
            sparse.append(SparseEntries(values, layout.zeros(shape, like, indices.dtype)))
        return cls(layout, k, v, *sparse)

    @property
    def n_rows(self) -> int:
        """Tokens that there is room for."""
        return int(self.k.shape[-2])

    @property
    def dtype(self) -> DType:
        """What floats are stored in."""
        return self.k.dtype

    def rounded(self, x: Array) -> Array:
        """Coordinates as they will be read again."""
        return self.layout.xp.astype(x, self.dtype, copy=False)

    def put(
        self, k: Array, v: Array, rest: tuple[Array, Array] | None, places: Array
    ) -> "FloatRows":
        """Write coordinates (B, H, m, .) at places (B, m), and the largest entries of what they leave of each row."""
        xp, backend = self.layout.xp, self.layout.backend
        held = self if not on_host(places) else self.with_room(int(places.max()) + 1)
        if self.layout.chooses:
            n_k, n_v = self.layout.n_leading
            rest_k = k if self.layout.reads_by_query else k[..., n_k:]
            leading, rest_of_each = (k[..., :n_k], v[..., :n_v]), (rest_k, v[..., n_v:])
            new = FloatRows(self.layout, *leading, None, None, *rest_of_each)
            return held._written(new, places)
        if self.layout.carries_shift:
            k = xp.concat([k, xp.ones_like(k[..., :1])], axis=-1)
        sparse: list[SparseEntries | None] = [None, None]
        if rest is not None:
            largest = [backend.largest_in_rows(x, self.layout.n_sparse) for x in rest]
            sparse = [SparseEntries(self.rounded(values), at) for values, at in largest]
        return held._written(FloatRows(self.layout, k, v, *sparse), places)

    @property
    def is_bare(self) -> bool:
        """Whether what is stored of a token is two rows of coordinates, and nothing else."""
        has_ones = self.layout.carries_shift
        return self.sparse_k is None and self.rest_k is None and not has_ones

    def put_mapped(self, k: Array, v: Array, maps: Maps, places: Array) -> "FloatRows":
        """Project tokens (B, H, m, .) and write them at places (B, m), where that `is_bare`."""
        held = self if not on_host(places) else self.with_room(int(places.max()) + 1)
        put = self.layout.backend.put_mapped
        return held._replace(
            k=put(held.k, k, maps.c, maps.wk, places), v=put(held.v, v, maps.mu, maps.wv, places)
        )

    def coordinates(self, rows: slice, dtype: DType) -> tuple[Array, Array]:
        """Read k', with its column of ones, and v'."""
        xp = self.layout.xp
        k, v = self.leading(rows, dtype)
        if self.rest_k is not None and self.rest_v is not None:
            rest_k, rest_v = (
                xp.astype(x[:, :, rows, :], dtype) for x in (self.rest_k, self.rest_v)
            )
            ones = [xp.ones_like(k[..., :1])] if self.layout.carries_shift else []
            rest = [] if self.layout.reads_by_query else [rest_k]
            k, v = xp.concat([k, *rest, *ones], axis=-1), xp.concat([v, rest_v], axis=-1)
        return k, v

    def of_heads(self, b: slice, h: slice) -> "FloatRows":
        """See some sequences and heads, to choose from."""
        return map_arrays(lambda x: x[b, h, ...], self)

    def leading(self, rows: slice, dtype: DType) -> tuple[Array, Array]:
        """Read those coordinates of k' and v' that stand by themselves."""
        astype = self.layout.xp.astype
        k, v = (astype(x[:, :, rows, :], dtype, copy=False) for x in (self.k, self.v))
        return k, v

    def chosen_by(self, rows: slice, dtype: DType) -> tuple[Array, Array]:
        """Read what queries choose by, which may be narrower, and the values that are not chosen."""
        astype = self.layout.xp.astype
        return self.k[:, :, rows, :], astype(self.v[:, :, rows, :], dtype, copy=False)

    def others(self, places: Array, dtype: DType) -> tuple[Array, Array]:
        """Read the other coordinates of k' and v' at places (B, H, M, t); (B, H, M, t, .)."""
        xp, (*lead, n_queries, n) = self.layout.xp, places.shape
        at = xp.reshape(places, (*lead, n_queries * n))

        def read(x: Array) -> Array:
            found = xp.astype(self.layout.backend.gather_rows(x, at), dtype, copy=False)
            return xp.reshape(found, (*lead, n_queries, n, x.shape[-1]))

        return read(self.rest_k), read(self.rest_v)

    def all_others(self, rows: slice, dtype: DType) -> tuple[Array, Array]:
        """Read the other coordinates of rows as `others` does; (B, H, 1, rows, .)."""

        def read(x: Array) -> Array:
            return self.layout.xp.astype(x[:, :, None, rows, :], dtype, copy=False)

        rest_k, rest_v = read(self.rest_k), read(self.rest_v)
        return rest_k[..., :0] if self.layout.reads_by_query else rest_k, rest_v

    def corrections(self, rows: slice, dtype: DType) -> tuple[Array, Array] | None:
        """Read what is to be added to the keys (B, H, rows, D) and to the values that coordinates stand for."""
        if self.sparse_k is None or self.sparse_v is None:
            return None
        widths, dense = (self.layout.width, self.layout.width_v), []
        for (values, indices), width in zip((self.sparse_k, self.sparse_v), widths, strict=True):
            values = self.layout.xp.astype(values[:, :, rows, :], dtype, copy=False)
            at = indices[:, :, rows, :]
            dense.append(self.layout.backend.scatter_rows(values, at, width))
        return dense[0], dense[1]

    def is_read_as_is(self, dtype: DType) -> bool:
        """Whether reading makes no new array, however many rows."""
        return self.sparse_k is None and self.rest_k is None and bool(self.dtype == dtype)

    def astype(self, dtype: DType) -> "FloatRows":
        """Store floats in another dtype."""
        xp = self.layout.xp
        return map_arrays(
            lambda x: x if xp.isdtype(x.dtype, "integral") else xp.astype(x, dtype, copy=False),
            self,
        )

    def with_room(self, n_rows: int) -> "FloatRows":
        """Make room for so many tokens, and for some more."""
        held = self.n_rows
        if n_rows <= held:
            return self
        n_rows = max(n_rows, math.ceil(held * GROWTH), LEAST_ROWS)
        return self._like(n_rows).filled(self)

    def first(self, n_rows: int) -> "FloatRows":
        """See the first rows only."""
        return map_arrays(lambda x: x[:, :, :n_rows, :], self)

    def trimmed(self, n_rows: int) -> "FloatRows":
        """Keep the first rows only, and give the room back."""
        return self._like(n_rows).filled(self.first(n_rows))

    def filled(self, rows: "FloatRows") -> "FloatRows":
        """Write rows, no more than there is room for, to the beginning."""
        places = np.broadcast_to(np.arange(rows.n_rows), (self.layout.n_batch, rows.n_rows))
        return self._written(rows, places)

    def _written(self, rows: "FloatRows", places: Array) -> "FloatRows":
        put_rows = self.layout.backend.put_rows
        return map_arrays(lambda x, new: put_rows(x, new, places), self, rows)

    def _like(self, n_rows: int) -> "FloatRows":
        return map_arrays(lambda x: self.layout.backend.rows_like(x, n_rows), self)


def empty_rows(
    layout: Layout, n_rows: int, like: Array, dtype: DType
) -> FloatRows | BitRows | ByteRows:
    """Room for so many tokens, stored as the layout says."""
    if not layout.is_coded:
        return FloatRows.empty(layout, n_rows, like, dtype)
    if layout.is_static:
        return ByteRows.empty(layout, n_rows, like)
    return BitRows.empty(layout, like)


def maps_of(basis: AttentionBasis, layout: Layout) -> Maps:
    """Lay the maps of a basis out with one batch axis, of length one where all elements share them."""
    return coding_maps(basis, layout) if layout.is_coded else laid_out(basis, layout)


def laid_out(basis: AttentionBasis, layout: Layout) -> Maps:
    """Lay its own maps out, whatever is stored."""
    xp, lead = layout.xp, 1 if layout.pool_batch else layout.n_batch
    named = {name: getattr(basis, name) for name in Maps._fields[:-1]}
    wq, *others = promote(layout.backend, allow_complex=False, **named).arrays
    wq = xp.reshape(wq, (lead, layout.n_heads, layout.n_shared, *wq.shape[-2:]))
    others = [xp.reshape(x, (lead, layout.n_heads, 1, *x.shape[-2:])) for x in others]
    # Ranks are in the layout: here they would be traced.
    wk, wv, uv, c, mu = others
    if layout.reads_by_query:
        # Keys as they came: positions that are rotated in make few of a query's own features large, not of a basis'.
        eye = xp.eye(layout.width, dtype=wk.dtype, device=layout.backend.creation_device(wk))
        wq = wk = eye + layout.zeros((lead, layout.n_heads, 1, layout.width, layout.width), wk)
    return Maps(wq, wk, wv, uv, c, mu, ranks=())


class Segment(NamedTuple):
    """Tokens that were stored under one basis: row j of element b is token ``start[b] + j``."""

    layout: Layout
    maps: Maps
    start: Array
    rows: FloatRows | BitRows | ByteRows

    @classmethod
    def empty(
        cls, layout: Layout, maps: Maps, start: Array, n_rows: int, dtype: DType
    ) -> "Segment":
        """Room for ``n_rows`` tokens from ``start`` on."""
        return cls(layout, maps, start, empty_rows(layout, n_rows, maps.wk, dtype))

    def put(self, k: Array, v: Array, places: Array) -> "Segment":
        """Write tokens (B, H, m, .) at places (B, m), counted from the start; negative ones are left out."""
        if not isinstance(self.rows, FloatRows):
            return self._put_bits(self.rows, k, v, places)
        maps, rest, matmul = self._key_head_maps(), None, self.layout.backend.matmul
        if self.rows.is_bare:
            return self._replace(rows=self.rows.put_mapped(k, v, maps, places))
        small_k = self.rows.rounded(matmul(k, maps.wk) - matmul(maps.c, maps.wk))
        small_v = self.rows.rounded(matmul(v, maps.wv) - matmul(maps.mu, maps.wv))
        if self.layout.n_sparse:
            astype = self.layout.xp.astype
            hat_k = self._decoded_keys(astype(small_k, k.dtype))
            rest = (k - hat_k, v - (astype(small_v, v.dtype) @ maps.uv + maps.mu))
        return self._replace(rows=self.rows.put(small_k, small_v, rest, places))

    def _put_bits(self, rows: BitRows | ByteRows, k: Array, v: Array, places: Array) -> "Segment":
        """Write tokens in bits; the first ones may fix the steps."""
        maps, bits = self._key_head_maps(), self.layout.bits
        beside, xp = self.layout.beside, self.layout.xp
        # Shifted first: a difference of large products would be off by more than a step.
        k, v = beside(k) - maps.c, beside(v) - maps.mu
        small = k @ maps.wk, v @ maps.wv
        far = (
            xp.max(
                xp.where(xp.isfinite(x), xp.abs(x), xp.zeros_like(x)),
                axis=(-2, -1),
            )
            for x in map(self.layout.by_head, (k, v))
        )
        far_k, far_v = (
            xp.maximum(x, held) for x, held in zip(far, (rows.far_k, rows.far_v), strict=True)
        )
        rows = rows._replace(far_k=far_k, far_v=far_v)
        if isinstance(rows, ByteRows):
            return self._replace(rows=rows.put(*small, None, places))
        # The sinks, which are left out, come first.
        used = slice(int(np.sum(places[0] < 0)), None)
        n_used = min(np.sum(row >= 0) if np.all(row[used] >= 0) else 0 for row in places)
        if bits is None or rows.filled.any() or n_used < LEAST_FOR_STEPS:
            return self._replace(rows=rows.put(*small, None, places))
        first = (x[:, :, used, :] for x in small)
        steps = [fitted_steps(x, n, self.layout) for x, n in zip(first, bits, strict=True)]
        scaled = self._replace(maps=scaled_maps(self.maps, steps, self.layout))
        maps = scaled._key_head_maps()
        small = k @ maps.wk, v @ maps.wv
        return scaled._replace(rows=rows.put(*small, None, places))

    def read(self, rows: slice) -> tuple[Array, Array]:
        """Keys and values (B, H, rows, .) that the segment stands for, as they were appended."""
        dtype = self.maps.wk.dtype
        k, v = self.rows.coordinates(rows, dtype)
        k, v = self._decoded_keys(k), self._decoded_values(v)
        if corrections := self.rows.corrections(rows, dtype):
            k, v = k + corrections[0], v + corrections[1]
        return k, v

    def _decoded_keys(self, small: Array) -> Array:
        """Keys that coordinates stand for: what the query heads see of them, on average."""
        xp = self.layout.xp
        wq = self.maps.wq
        wq = wq[:, :, 0, ...] if wq.shape[2] == 1 else xp.mean(wq, axis=2)
        small = small[..., : self.layout.rank[0]]
        product = self.layout.backend.matmul(small, xp.matrix_transpose(wq))
        return self.layout.by_head(product + self.maps.c[:, :, 0, ...])

    def _decoded_values(self, small: Array) -> Array:
        """Values that coordinates stand for."""
        maps = self._key_head_maps()
        return self.layout.by_head(small @ maps.uv + maps.mu)

    def _key_head_maps(self) -> Maps:
        """Leave out the axis of the query heads that share a key head, but for their own map."""
        return self.maps.each(lambda x: x[:, :, 0, ...])._replace(wq=self.maps.wq)

    def attend(
        self, queries: Queries, end: Array, turns: tuple[Array, Array] | None
    ) -> list[tuple[Array, Array]]:
        """Attention to the tokens before ``end``, and its log-sum-exp, chunk by chunk where rows must be made first."""
        n_rows = self._n_rows(end)
        is_whole = turns is None and self.rows.is_read_as_is(queries.q.dtype)
        step = max(1, n_rows if is_whole else CHUNK_ROWS)
        first = queries.first_row(self.start, n_rows)
        firsts = range(first - first % TOKENS, n_rows, step)  # bits are read by whole blocks
        chunks = [slice(first, min(first + step, n_rows)) for first in firsts]
        return [self._attend(queries, end, rows, turns) for rows in chunks]

    def _attend(
        self, queries: Queries, end: Array, rows: slice, turns: tuple[Array, Array] | None
    ) -> tuple[Array, Array]:
        layout, maps, rank_v = self.layout, self._key_head_maps(), self.layout.rank[1]
        mask, shift, dtype = self._mask(queries, end, rows), None, queries.q.dtype
        k, v = self.rows.coordinates(rows, dtype)
        corrections = self.rows.corrections(rows, dtype)
        if layout.across_heads:
            v = self._decoded_values(v)
            if turns is None:
                q, k = layout.stack_heads(queries.q), self._decoded_keys(k)
            else:
                q, k = self._rotated(queries, k, None, rows, turns)
            out, lse = layout.attend(q, k, v, mask)
            return layout.unstack_heads(out), layout.unstack_heads(lse)
        if turns is None:
            q, k, shift = self._features(queries, k, maps.c, corrections)
        else:
            q, k = self._rotated(queries, k, corrections, rows, turns)
        if corrections is None:
            through = layout.backend.attention_through
            whole, lse = through(q, k, v, mask, layout.score_options, maps.uv, maps.mu, shift)
            return layout.unstack_heads(whole), layout.unstack_heads(lse)
        xp, v = layout.xp, layout.xp.concat([v, corrections[1]], axis=-1)
        out, lse = layout.attend(q, k, v, mask)
        whole = layout.backend.matmul(out[..., :rank_v], maps.uv) + maps.mu + out[..., rank_v:]
        whole = xp.where(lse[..., None] == -math.inf, xp.zeros_like(whole), whole)
        if shift is not None:
            lse = lse + layout.score_options.scale * shift[..., 0]
        return layout.unstack_heads(whole), layout.unstack_heads(lse)

    def _n_rows(self, end: Array) -> int:
        """Rows that hold tokens before ``end``, as far as that is known."""
        n_rows = self.rows.n_rows
        return min(n_rows, int(np.max(end - self.start))) if on_host(self.start) else n_rows

    def has_more_than(self, n_top: int, end: Array) -> bool:
        """Whether so many chosen tokens before ``end`` might not be all."""
        is_fewer = self.layout.top_p is not None and self._n_rows(end) > 0
        return is_fewer or self._n_rows(end) > n_top

    def _mask(self, queries: Queries, end: Array, rows: slice) -> Array | None:
        """Which of these rows each query sees; None where it is known to be all."""
        if queries.see_all(self.start, end, rows):
            return None
        positions = self.start[:, None] + self.layout.arange(rows.start, rows.stop, self.start)
        return queries.mask_for(positions, self.start[:, None], end[:, None])

    def complete(self, end: Array) -> Array:
        """Where the tokens that queries may choose from end: in bits with the last complete block."""
        rows = self.rows
        return np.minimum(end, self.start + rows.n_complete) if isinstance(rows, BitRows) else end

    def attend_waiting(self, queries: Queries, end: Array) -> tuple[Array, Array] | None:
        """Attention to the tokens before ``end`` that wait for their block to be full; None where there are none."""
        rows, layout, maps = self.rows, self.layout, self._key_head_maps()
        first = self.complete(end)
        if not isinstance(rows, BitRows) or np.all(first >= end):
            return None
        positions = (self.start + rows.n_complete)[:, None] + np.arange(TOKENS)
        mask = queries.mask_for(positions, first[:, None], end[:, None])
        k, v = rows.waiting(queries.q.dtype)
        q, k, shift = self._features(queries, k, maps.c, None)
        out, lse = layout.attend(q, k, v, mask)
        whole = layout.backend.matmul(out, maps.uv) + maps.mu
        if shift is not None:
            lse = lse + layout.score_options.scale * shift[..., 0]
        return layout.unstack_heads(whole), layout.unstack_heads(lse)

    def attend_chosen(
        self, queries: Queries, end: Array, others: Array | None
    ) -> tuple[Array, Array, Array]:
        """Attention to the tokens before ``end``, its log-sum-exp, and the share in it of what was not chosen.

        ``others`` is the log-sum-exp of the tokens elsewhere. Some queries at once, so that memory stays in bounds.
        """
        n_queries = queries.q.shape[-2]
        layout, n_rows = self.layout, self.rows.n_rows
        n_heads, n_top = layout.n_batch * layout.n_heads, min(n_rows, max(layout.n_tops))
        width = layout.width + layout.width_v
        size = tile_of_queries(n_heads * layout.n_shared * n_rows, n_heads * n_top * width)
        tiles = [slice(i, min(i + size, n_queries)) for i in range(0, n_queries, size)]
        parts = [
            self._attend_chosen(queries.part(x), end, None if others is None else others[..., x])
            for x in tiles
        ]
        out, lse, left = zip(*parts, strict=True)
        concat = self.layout.xp.concat
        return concat(out, axis=2), concat(lse, axis=2), concat(left, axis=2)

    def _attend_chosen(
        self, queries: Queries, end: Array, others: Array | None
    ) -> tuple[Array, Array, Array]:
        layout, maps, dtype = self.layout, self._key_head_maps(), queries.q.dtype
        held, n_rows, uv = self.rows, self._n_rows(end), maps.uv
        rows = slice(queries.first_row(self.start, n_rows), n_rows)
        index = layout.rank_index[0] if layout.rank_index and layout.reads_by_query else None
        q, shift = self._projected(queries, maps.c)
        if isinstance(held, BitRows):
            # The index has leading coordinates nearly: chosen tokens get what it lacks of them, too.
            n_k, n_v = layout.n_leading
            q = layout.xp.concat([q[..., :n_k], q], axis=-1)
            uv = layout.xp.concat([uv[..., :n_v, :], uv], axis=-2)
        if others is not None:
            others = layout.stack_heads(others[..., None])[..., 0]
        mask = self._mask(queries, end, rows)

        parts = []
        for n_top, found in itertools.groupby(range(layout.n_heads), layout.n_tops.__getitem__):
            heads = list(found)

            def run(b: slice, h: slice, n_top: int = n_top, top: int = heads[0]) -> Any:
                h = slice(h.start + top, h.stop + top)

                def at(x: Array) -> Array:
                    one, other = (
                        part if x.shape[i] > 1 else slice(None) for i, part in enumerate((b, h))
                    )
                    return x[one, other, ...]

                part = held.of_heads(b, h)
                k, v = part.chosen_by(rows, dtype)
                hidden, beside = (None if x is None else at(x) for x in (mask, others))
                given = at(q), at(shift), k, hidden, beside
                chosen = choose(layout, n_top, *given, rank_index=index)
                if chosen.places is None:
                    return chosen.attend(v, *part.all_others(rows, dtype))
                return chosen.attend(v, *part.others(chosen.places + rows.start, dtype))

            shape = (layout.n_batch, len(heads))
            width = (layout.n_leading[0] if index is None else index) + layout.n_leading[1]
            parts.append(layout.backend.by_head(run, shape, q.shape[-2] * n_rows, width))
        out, lse, left = (layout.xp.concat(x, axis=1) for x in zip(*parts, strict=True))
        if not layout.carries_shift:
            lse = lse + layout.score_options.scale * shift[..., 0]
        whole = out @ uv + maps.mu
        out, lse, left = (layout.unstack_heads(x) for x in (whole, lse, left))
        return out, lse, left

    def _features(
        self, queries: Queries, k: Array, c: Array, corrections: tuple[Array, Array] | None
    ) -> tuple[Array, Array, Array | None]:
        """Make queries and keys whose products are the scores under the maps, but for a shift of each query.

        With sparse entries there are more features: q'k' + q s = (q', q) (k', s).
        """
        xp = self.layout.xp
        q, shift = self._projected(queries, c)
        if self.layout.carries_shift:
            q = xp.concat([q, shift], axis=-1)
        if corrections is not None:
            whole = self.layout.stack_heads(queries.q)
            q, k = xp.concat([q, whole], axis=-1), xp.concat([k, corrections[0]], axis=-1)
        return q, k, None if self.layout.carries_shift else shift

    def _projected(self, queries: Queries, c: Array) -> tuple[Array, Array]:
        """Make the queries q', stacked, and what the shift of the keys has in each of their scores."""
        if self.layout.reads_by_query:
            whole = self.layout.stack_heads(queries.q)
            return whole, self.layout.backend.matmul(whole, self.layout.xp.matrix_transpose(c))
        return self.layout.backend.mapped_queries(queries.q, self.maps.wq, c)

    def _rotated(
        self,
        queries: Queries,
        k: Array,
        corrections: tuple[Array, Array] | None,
        rows: slice,
        turns: tuple[Array, Array],
    ) -> tuple[Array, Array]:
        """Make queries and keys in all dimensions, rotated.

        Products depend on the distance of two positions only, so both are counted from the first of the rows: one table
        serves all chunks and all elements of the batch, and angles stay small.
        """
        k = self._decoded_keys(k)
        k = k if corrections is None else k + corrections[0]
        cos, sin = (x[..., : rows.stop - rows.start, :] for x in turns)
        since = queries.positions - self.start[:, None] - rows.start
        q = rotate(queries.q, turns_at(since, queries.q, self.layout), self.layout)
        return self.layout.stack_heads(q), rotate(k, (cos, sin), self.layout)

    def drift(self, q: Array, k: Array, v: Array) -> float:
        """Relative error that the maps make in the output of queries over keys and values; the largest of all heads."""
        maps, layout, q = self._key_head_maps(), self.layout, self.layout.stack_heads(q)
        exact, _ = layout.attend(q, k, v, None)
        k, v = (layout.beside(k) - maps.c) @ maps.wk, (layout.beside(v) - maps.mu) @ maps.wv
        if layout.is_coded:
            k, v = layout.xp.round(k), layout.xp.round(v)
        out, _ = layout.attend(q, self._decoded_keys(k), self._decoded_values(v), None)
        outs = (layout.unstack_heads(x) for x in (out, exact))
        return float(layout.xp.max(layout.relative_error(*outs)))

    def error_bound(self) -> tuple[Array, Array]:
        """How far a key and a value may be from what came, (B, H), in Euclidean norm."""
        rows = self.rows
        assert not isinstance(rows, FloatRows)
        xp, maps, bounds = self.layout.xp, self._key_head_maps(), []
        back_k = xp.matrix_transpose(xp.mean(maps.wq, axis=2))
        backs = (back_k, maps.wk, maps.c), (maps.uv, maps.wv, maps.mu)
        eps = float(xp.finfo(maps.wk.dtype).eps)
        far = rows.far_k, rows.far_v
        for half, size, (back, to, shift) in zip(rows.half_steps(), far, backs, strict=True):
            d = back.shape[-2]
            # Coordinates are sums of products no larger than these, and so is what they stand for.
            size = xp.max(self.layout.beside(size[..., None, None]), axis=-1, keepdims=True)
            size = size + xp.max(xp.abs(shift), axis=(-2, -1), keepdims=True)
            sums = size * xp.sum(xp.abs(to), axis=-2, keepdims=True)
            # Of all coordinates to those of each head.
            back = self.layout.by_head(back)
            sums = sums @ xp.abs(back) + size
            rounding = 2 * ROUNDINGS * (d**0.5) * eps * xp.sqrt(xp.sum(sums * sums, axis=(-2, -1)))
            largest = xp.max(self.layout.backend.singular_values(back), axis=-1)
            bounds.append(half * largest * d**0.5 + rounding)
        shape = (self.layout.n_batch, self.layout.n_heads)
        keys, values = (xp.broadcast_to(x, shape) for x in bounds)
        return keys, values

    def cropped(self, lengths: Array) -> "Segment":
        """Keep tokens before these lengths; rows of floats beyond them are written again."""
        if not isinstance(self.rows, BitRows):
            return self
        return self._replace(rows=self.rows.cropped(lengths - self.start))

    def trimmed(self, n_rows: int) -> "Segment":
        """Give back what it will not need: it is complete."""
        return self._replace(rows=self.rows.trimmed(n_rows))
