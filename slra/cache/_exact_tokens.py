"""Tokens kept as they came: the first ones, and a ring of the last ones."""

from typing import NamedTuple

from slra._backends import namespace_of
from slra._typing import Array, DType
from slra.cache._layout import Layout
from slra.cache._queries import Queries
from slra.cache._rotary import rotate, turns_at

__all__ = ["ExactTokens", "RecentQueries"]


class ExactTokens(NamedTuple):
    """Keys and values (B, H, n_sink + window, .) in the dtype that they came in: the sinks, then the ring."""

    layout: Layout
    k: Array
    v: Array

    @classmethod
    def empty(cls, layout: Layout, like: Array) -> "ExactTokens":
        """Room for them, beside ``like``."""
        lead = (layout.n_batch, layout.n_heads, layout.n_exact)
        k, v = (layout.zeros((*lead, width), like) for width in (layout.width, layout.width_v))
        return cls(layout, k, v)

    def astype(self, dtype: DType) -> "ExactTokens":
        """Keep them in another dtype."""
        k, v = (self.layout.xp.astype(x, dtype, copy=False) for x in (self.k, self.v))
        return self._replace(k=k, v=v)

    def append(
        self, k: Array, v: Array, positions: Array, is_used: Array, lengths: Array
    ) -> "ExactTokens":
        """Write those of the new tokens that stay exact; which of them count, and the lengths after them."""
        n_sink, window = self.layout.n_sink, self.layout.window
        if not self.layout.n_exact:
            return self
        is_sink = positions < n_sink
        is_last = (positions >= lengths[:, None] - window) & ~is_sink
        where = namespace_of(lengths).where
        places = where(is_sink, positions, n_sink + (positions - n_sink) % max(1, window))
        places = where(is_used & (is_sink | is_last), places, 0 * places - 1)
        k, v = self.layout.backend.put_both((self.k, self.v), (k, v), places)
        return self._replace(k=k, v=v)

    def window_positions(self, lengths: Array) -> Array:
        """Which token each row of the ring holds, (B, window); one before the end of the sinks where none is."""
        n_sink, window = self.layout.n_sink, self.layout.window
        each = self.layout.arange(0, window, lengths)
        turns = (lengths[:, None] - n_sink - 1 - each) // max(1, window)
        return n_sink + turns * window + each

    def positions(self, lengths: Array) -> tuple[Array, Array, Array]:
        """Which token each row holds (B, n_sink + window), the least that it may hold, and the end."""
        xp, n_sink = namespace_of(lengths), self.layout.n_sink
        sinks = self.layout.arange(0, n_sink, lengths) + 0 * lengths[:, None]
        positions = xp.concat([sinks, self.window_positions(lengths)], axis=-1)
        row = self.layout.arange(0, positions.shape[-1], lengths)
        low = xp.where(row < n_sink, 0 * row, 0 * row + n_sink)
        return positions, low, lengths[:, None]

    def attend(self, queries: Queries, lengths: Array) -> tuple[Array, Array]:
        """Attention to them, and its log-sum-exp."""
        layout, q = self.layout, queries.q
        positions, low, high = self.positions(lengths)
        mask = queries.mask_for(positions, low, high)
        k, v = (layout.xp.astype(x, q.dtype, copy=False) for x in (self.k, self.v))
        if layout.rotary is not None:
            q = rotate(q, turns_at(queries.positions, q, layout), layout)
            k = rotate(k, turns_at(positions, k, layout), layout)
        out, lse = layout.attend(layout.stack_heads(q), k, v, mask)
        return layout.unstack_heads(out), layout.unstack_heads(lse)


class RecentQueries(NamedTuple):
    """Queries of the tokens in the window (B, H * shared, window, D), and how many tokens came since the last check."""

    layout: Layout
    q: Array
    since_check: Array

    def append(self, q: Array) -> "RecentQueries":
        """Keep the last queries; count the tokens that came with them."""
        held = self.layout.xp.concat([self.q, q], axis=-2)
        since_check = self.since_check + q.shape[-2]
        return self._replace(q=held[..., -self.layout.window :, :], since_check=since_check)
