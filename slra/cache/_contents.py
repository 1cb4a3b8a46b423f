"""All that a cache holds: stored when tokens come, attended to when asked, decoded when wanted back."""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from slra._backends import namespace_of
from slra._backends.standard.hidden import marks
from slra._typing import Array, DType
from slra._validate import dtype_limits
from slra.attn.exact import merge_attention
from slra.attn.fit import fit_attention
from slra.attn.maps import Maps
from slra.attn.problem import add_sinks
from slra.cache._bits import BitRows
from slra.cache._exact_tokens import ExactTokens, RecentQueries
from slra.cache._layout import Layout, map_arrays, named_arrays, on_host, with_arrays
from slra.cache._queries import Queries
from slra.cache._rotary import turns_at
from slra.cache._segment import CHUNK_ROWS, Segment, maps_of

__all__ = ["Contents"]


class Contents(NamedTuple):
    """Tokens of all sequences; its methods return other ones, which share buffers where these can be written to."""

    layout: Layout
    lengths: Array  # (B,)
    segments: tuple[Segment, ...]
    exact: ExactTokens
    recent: RecentQueries | None
    error: Array | None
    turns: (
        tuple[Array, Array] | None
    )  # cosine and sine (1, 1, rows, F) of the first rows of a chunk

    @classmethod
    def empty(cls, layout: Layout, maps: Maps, error: Array | None) -> "Contents":
        """No token, and room for those that are foreseen."""
        lengths: Array = np.zeros(layout.n_batch, dtype=np.int64)
        if layout.is_static:
            lengths = layout.backend.from_numpy(lengths, maps.wk, layout.xp.int32)
        n_rows = 0 if layout.capacity is None else layout.capacity - layout.n_sink
        dtype = maps.wk.dtype if layout.dtype is None else getattr(layout.xp, layout.dtype)
        segment = Segment.empty(layout, maps, lengths + layout.n_sink, n_rows, dtype)
        recent = None
        if layout.drift_bound is not None:
            q = layout.zeros((layout.n_batch, layout.n_query_heads, 0, layout.width), maps.wk)
            recent = RecentQueries(layout, q, np.asarray(0))
        exact = ExactTokens.empty(layout, maps.wk)
        return cls(layout, lengths, (segment,), exact, recent, error, None).with_turns()

    @property
    def like(self) -> Array:
        """An array of the library and device, and of the dtype computed in."""
        return self.segments[0].maps.wk

    @property
    def n_tokens(self) -> int:
        """Length of the longest sequence, or the static capacity."""
        return int(self.lengths.max()) if on_host(self.lengths) else self.layout.capacity or 0

    def with_turns(self) -> "Contents":
        """Extend the table of rotations to what the longest segment needs: no row is computed twice."""
        held = 0 if self.turns is None else self.turns[0].shape[-2]
        n_rows = min(CHUNK_ROWS, max(segment.rows.n_rows for segment in self.segments))
        if self.layout.rotary is None or (self.turns is not None and n_rows <= held):
            return self
        new = turns_at(np.arange(held, n_rows)[None, :], self.like, self.layout)
        if self.turns is not None:
            cos, sin = (
                self.layout.xp.concat(x, axis=-2) for x in zip(self.turns, new, strict=True)
            )
            new = cos, sin
        return self._replace(turns=new)

    def append(
        self, k: Array, v: Array, counts: Array | None, q: Array | None, dtype: DType
    ) -> "Contents":
        """Put tokens (B, H, m, .) at the end of each sequence, or the first ``counts`` (B,) of them.

        Every token but the sinks goes to the segment at once, also those in the window: attention leaves them out until
        they have left it. They came in ``dtype``.
        """
        held = self._storing(dtype)
        xp, lengths = namespace_of(self.lengths), self.lengths
        each = self.layout.arange(0, k.shape[-2], lengths)
        counts = 0 * lengths + k.shape[-2] if counts is None else counts
        positions, is_used = lengths[:, None] + each, each < counts[:, None]
        lengths = lengths + counts
        *older, last = held.segments
        places = positions - last.start[:, None]
        last = last.put(k, v, xp.where(is_used & (places >= 0), places, 0 * places - 1))
        exact = held.exact.append(k, v, positions, is_used, lengths)
        held = held._replace(lengths=lengths, segments=(*older, last), exact=exact).with_turns()
        if held.recent is None or q is None:
            return held
        return held._replace(recent=held.recent.append(q))._refit_if_drifted()

    def _storing(self, dtype: DType) -> "Contents":
        """Store no narrower than what comes, up to what is computed in, and the first tokens no wider either."""
        if self.layout.is_static:
            return self
        xp, (*older, last) = self.layout.xp, self.segments
        if dtype_limits(xp, dtype).bits >= xp.finfo(self.like.dtype).bits:
            dtype = self.like.dtype
        elif np.any(self.lengths):
            dtype = xp.result_type(dtype, self.exact.k.dtype)
        if dtype == self.exact.k.dtype:
            return self
        if self.layout.dtype is None:
            last = last._replace(rows=last.rows.astype(dtype))
        return self._replace(segments=(*older, last), exact=self.exact.astype(dtype))

    def _refit_if_drifted(self) -> "Contents":
        """Once the window is full of tokens that were not looked at, measure, and refit where the bound is passed."""
        layout, recent, bound = self.layout, self.recent, self.layout.drift_bound
        if recent is None or bound is None or int(recent.since_check) < layout.window:
            return self
        if np.min(self.lengths) < layout.n_exact:
            return self
        held = self._replace(recent=recent._replace(since_check=np.asarray(0)))
        exact = self.exact.astype(self.like.dtype)
        k, v = (x[:, :, layout.n_sink :, :] for x in (exact.k, exact.v))
        *older, last = self.segments
        if last.drift(recent.q, k, v) <= bound:
            return held
        # The tokens of the window are stored again: the new segment starts with them.
        start = self.lengths - layout.window
        basis = fit_attention(
            layout.unbatched(recent.q),
            layout.unbatched(k),
            layout.unbatched(v),
            # In bits all dimensions are stored, whatever the rank.
            1 if layout.is_coded else layout.rank,
            method=layout.method,
            pool_batch=layout.pool_batch,
            scale=layout.score_options.scale,
            softcap=layout.score_options.softcap,
            enable_gqa=True,
            across_heads=layout.across_heads,
            rotary=layout.rotary,
        )
        maps, dtype = maps_of(basis, layout), last.rows.dtype
        segment = Segment.empty(layout, maps, start, layout.window, dtype)
        segment = segment.put(k, v, self.exact.window_positions(self.lengths) - start[:, None])
        n_rows = int(np.max(start - last.start))
        kept = [last.trimmed(n_rows)] if n_rows > 0 else []
        return held._replace(segments=(*older, *kept, segment))

    def _ends(self) -> list[Array]:
        """Where each segment ends: where the next one or the window begins."""
        xp = namespace_of(self.lengths)
        starts = [segment.start for segment in self.segments]
        ends = [*starts[1:], xp.maximum(starts[-1], self.lengths - self.layout.window)]
        return [xp.minimum(end, ends[-1]) for end in ends]

    def attend(self, queries: Queries) -> tuple[Array, Array, Array | None]:
        """Attention to all tokens, and its log-sum-exp, (B, H * shared, M, .).

        Where queries choose, also the share that keys not chosen have. What is hidden from a query takes no part,
        whatever it holds, where values can be looked at.
        """
        found, xp = self._attend(queries), self.layout.xp
        if not on_host(self.lengths) or not queries.hides(self.lengths):
            return found
        if not self.layout.backend.is_eager(found[0]) or bool(xp.all(xp.isfinite(found[0]))):
            return found
        return self._attend_to_finite(queries)

    def _attend_to_finite(self, queries: Queries) -> tuple[Array, Array, Array | None]:
        """Attend without NaN and infinities, and put them back where a query sees them."""
        layout, xp, backend = self.layout, self.layout.xp, self.layout.backend

        def finite(x: Array) -> Array:
            is_float = (
                np.issubdtype(x.dtype, np.floating)
                if on_host(x)
                else xp.isdtype(x.dtype, "real floating")
            )
            return xp.where(xp.isfinite(x), x, xp.zeros_like(x)) if is_float else x

        def finite_rows(segment: Segment) -> Segment:
            rows = map_arrays(finite, segment.rows)
            rows = rows.with_finite_index() if isinstance(rows, BitRows) else rows
            return segment._replace(rows=rows)

        held = self._replace(
            exact=map_arrays(finite, self.exact), segments=tuple(map(finite_rows, self.segments))
        )
        out, lse, left = held._attend(queries._replace(q=finite(queries.q)))
        positions = np.broadcast_to(np.arange(self.n_tokens), (layout.n_batch, self.n_tokens))
        mask = queries.mask_for(positions, 0 * self.lengths[:, None], self.lengths[:, None])
        given = layout.stack_heads(queries.q), *self.decode(), mask, layout.score_options
        mark, mark_lse = (layout.unstack_heads(x) for x in marks(backend, *given))
        return out + mark, lse + mark_lse, None if left is None else left + mark_lse

    def _attend(self, queries: Queries) -> tuple[Array, Array, Array | None]:
        xp, q = self.layout.xp, queries.q
        if on_host(self.lengths) and not np.any(self.lengths):
            out = self.layout.zeros((*q.shape[:-1], self.layout.width_v), q)
            parts, left = [(out, xp.full_like(out[..., 0], -xp.inf))], None
        else:
            parts, left = self._parts(queries)
        if len(parts) > 1:
            out, lse = merge_attention(*zip(*parts, strict=True))
        else:
            ((out, lse),) = parts
            if left is not None:
                out = xp.where(lse[..., None] == -xp.inf, xp.zeros_like(out), out)
        if queries.sinks is not None:
            out, lse = add_sinks(xp, out, lse, queries.sinks)
        if left is not None:
            whole = xp.where(lse == -xp.inf, xp.zeros_like(lse), lse)
            left = left * xp.exp(parts[0][1] - whole)
        if self.layout.capacity is None or on_host(self.lengths):
            return out, lse, left
        # Tokens beyond a static capacity are lost: no number may look as if they were not.
        is_over = (self.lengths > self.layout.capacity)[:, None, None]
        nan = xp.asarray(xp.nan, dtype=out.dtype)
        left = None if left is None else xp.where(is_over, nan, left)
        return xp.where(is_over[..., None], nan, out), xp.where(is_over, nan, lse), left

    def _parts(self, queries: Queries) -> tuple[list[tuple[Array, Array]], Array | None]:
        """Attention to parts of the tokens; where queries choose, first to those they choose from, and what is left."""
        ends, first = self._ends(), self.segments[0]
        exact = [self.exact.attend(queries, self.lengths)] if self.layout.n_exact else []
        if self.layout.chooses and first.has_more_than(
            min(self.layout.n_tops), first.complete(ends[0])
        ):
            waiting = first.attend_waiting(queries, ends[0])
            exact += [] if waiting is None else [waiting]
            others = [lse for _, lse in exact]
            if queries.sinks is not None:
                others.append(
                    queries.sinks[..., None] + self.layout.xp.zeros_like(queries.q[..., 0])
                )
            elsewhere = functools.reduce(self.layout.xp.logaddexp, others) if others else None
            out, lse, left = first.attend_chosen(queries, first.complete(ends[0]), elsewhere)
            return [(out, lse), *exact], left
        parts: list[tuple[Array, Array]] = []
        for segment, end in zip(self.segments, ends, strict=True):
            parts += segment.attend(queries, end, self.turns)
        return parts + exact, None

    def decode(self) -> tuple[Array, Array]:
        """Keys and values of all tokens, (B, H, n, .), zero beyond the length of a sequence."""
        layout, n_tokens = self.layout, self.n_tokens
        xp, put_rows = namespace_of(self.lengths), layout.backend.put_rows
        lead = (layout.n_batch, layout.n_heads, n_tokens)
        k, v = (layout.zeros((*lead, width), self.like) for width in (layout.width, layout.width_v))
        for segment, end in zip(self.segments, self._ends(), strict=True):
            n_rows = min(segment.rows.n_rows, n_tokens)
            places = segment.start[:, None] + layout.arange(0, n_rows, segment.start)
            places = xp.where(places < end[:, None], places, 0 * places - 1)
            low_k, low_v = segment.read(slice(0, n_rows))
            k, v = put_rows(k, low_k, places), put_rows(v, low_v, places)
        if layout.n_exact:
            places, low, high = self.exact.positions(self.lengths)
            places = xp.where((places >= low) & (places < high), places, 0 * places - 1)
            k, v = put_rows(k, self.exact.k, places), put_rows(v, self.exact.v, places)
        return k, v

    def crop(self, lengths: Array) -> "Contents":
        """Keep the first tokens, (B,), of each sequence.

        Tokens that come into the window again, as the window moves back, are what the cache stands for.
        """
        layout, xp = self.layout, namespace_of(self.lengths)
        if on_host(self.lengths) and np.all(lengths >= self.lengths):
            return self
        lengths = xp.minimum(lengths, self.lengths)
        exact = self.exact
        if layout.window and self.n_tokens and (not on_host(lengths) or np.any(lengths)):
            # The ring as it is to be: rows from the old one or, where that has lost them, decoded.
            k, v = self.decode()
            positions = exact.window_positions(lengths)
            is_known = (positions >= layout.n_sink) & (positions < lengths[:, None])
            places = xp.where(is_known, positions, 0 * positions)
            each = layout.arange(layout.n_sink, layout.n_exact, lengths) + 0 * places
            each = xp.where(is_known, each, 0 * each - 1)
            if on_host(places):
                places = layout.backend.from_numpy(places, k, layout.backend.place_dtype)
            k, v = (layout.backend.gather_rows(x, places[:, None, :]) for x in (k, v))
            put_rows = layout.backend.put_rows
            exact = exact._replace(k=put_rows(exact.k, k, each), v=put_rows(exact.v, v, each))
        segments = [segment.cropped(lengths) for segment in self.segments]
        while len(segments) > 1 and bool(np.all(segments[-1].start >= lengths)):
            segments.pop()
        recent = self.recent
        if recent is not None:
            q = recent.q[..., : max(0, recent.q.shape[-2] - int(np.max(self.lengths - lengths))), :]
            recent = recent._replace(q=q, since_check=np.asarray(0))
        return self._replace(lengths=lengths, exact=exact, segments=tuple(segments), recent=recent)

    def select(self, indices: np.ndarray[Any, Any]) -> "Contents":
        """Take elements of the one batch axis."""
        layout, taken = self.layout, named_arrays(self)
        for name, x in taken.items():
            is_pooled = (".maps." in name and layout.pool_batch) or (
                name == "error" and x.ndim == 1
            )
            if is_pooled or name.startswith("turns") or x.ndim == 0:
                continue
            if on_host(x):
                taken[name] = x[indices]
            else:
                at = layout.backend.from_numpy(indices, x, layout.backend.place_dtype)
                taken[name] = layout.xp.take(x, at, axis=0)
        layout = dataclasses.replace(layout, batch=(len(indices),))
        return with_arrays(self, taken, layout)
