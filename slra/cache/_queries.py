"""What is asked of a cache: queries, and which tokens each of them sees."""

from typing import NamedTuple

import numpy as np

from slra._typing import Array
from slra.cache._layout import Layout, on_host

__all__ = ["Queries"]


class Queries(NamedTuple):
    """Queries with their places."""

    layout: Layout
    q: Array  # (B, H * shared, M, D)
    positions: Array  # (B, M): the token each query belongs to
    last_seen: Array  # (B, M): the last token it sees, -1 for none
    first_seen: Array | None = None  # (B, M): the first token it sees, where there is a window
    sinks: Array | None = None  # (B or 1, H * shared): one more score, of a key whose value is 0
    slopes: Array | None = None  # (B or 1, H, shared): what a score loses for each token between
    mask: Array | None = None  # (B or 1, H or 1, shared or 1, M or 1, N or 1), N counts tokens

    @classmethod
    def at_the_end(
        cls,
        layout: Layout,
        q: Array,
        lengths: Array,
        counts: Array | None,
        *,
        is_causal: bool,
        window: tuple[int | None, int | None] | None = None,
    ) -> "Queries":
        """Place queries at the end of their sequences; those beyond ``counts`` see nothing."""
        xp = layout.xp if not on_host(lengths) else np
        each = layout.arange(0, q.shape[-2], lengths)
        used = lengths[:, None] * 0 + q.shape[-2] if counts is None else counts[:, None]
        positions = lengths[:, None] - used + each
        left, right = window or (None, None)
        last_seen = positions if is_causal else lengths[:, None] - 1 + 0 * each
        if right is not None:
            last_seen = xp.minimum(last_seen, positions + right)
        last_seen = xp.where(each < used, last_seen, 0 * last_seen - 1)
        return cls(layout, q, positions, last_seen, None if left is None else positions - left)

    def hides(self, lengths: Array) -> bool:
        """Whether a token of sequences of these lengths, which are on the host, may be hidden from a query."""
        is_cut = self.mask is not None or self.first_seen is not None
        return is_cut or bool(np.any(self.last_seen < lengths[:, None] - 1))

    def part(self, rows: slice) -> "Queries":
        """Take some of the queries."""
        mask, first = self.mask, self.first_seen
        return self._replace(
            q=self.q[:, :, rows, :],
            positions=self.positions[:, rows],
            last_seen=self.last_seen[:, rows],
            first_seen=None if first is None else first[:, rows],
            mask=mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :],
        )

    def see_all(self, start: Array, end: Array, rows: slice) -> bool:
        """Whether it is known that these rows from ``start`` on all hold tokens, and every query sees them."""
        if not on_host(start) or self.mask is not None or self.slopes is not None:
            return False
        if self.first_seen is not None and np.any(self.first_seen > (start + rows.start)[:, None]):
            return False
        is_full = np.all(end - start >= rows.stop)
        return bool(is_full and np.all(self.last_seen >= (start + rows.stop - 1)[:, None]))

    def first_row(self, start: Array, n_rows: int) -> int:
        """How many of the first rows from ``start`` on no query sees, as far as that is known; one row is left."""
        if self.first_seen is None or not on_host(start):
            return 0
        first = int(np.min(self.first_seen - start[:, None]))
        return max(0, min(first, n_rows - 1))

    def mask_for(self, positions: Array, low: Array, high: Array) -> Array | None:
        """Which keys each query sees, laid out as stacked queries: keys at positions (B, n) from low to below high."""
        xp, mask = self.layout.xp, self.mask
        seen = (positions >= low) & (positions < high)
        seen = seen[:, None, :] & (positions[:, None, :] <= self.last_seen[:, :, None])
        if self.first_seen is not None:
            seen = seen & (positions[:, None, :] >= self.first_seen[:, :, None])
        if on_host(seen):
            seen = None if seen.all() else self.layout.backend.from_numpy(seen, self.q, xp.bool)
        if mask is not None and mask.shape[-1] > 1:
            mask = self._columns(mask, positions)
        if self.slopes is not None:
            mask = self._with_slopes(mask, positions)
        if seen is not None:
            seen = seen[:, None, None, :, :]
            if mask is None:
                mask = seen
            elif xp.isdtype(mask.dtype, "bool"):
                mask = xp.logical_and(mask, seen)
            else:
                mask = xp.where(seen, mask, xp.full_like(mask, -xp.inf))
        if mask is None or mask.shape[1:4] == (1, 1, 1):
            return None if mask is None else mask[:, 0, ...]
        *lead, _, _, n = mask.shape
        rows = (self.layout.n_shared, self.q.shape[-2])
        mask = xp.broadcast_to(mask, (*lead, *rows, n))
        return xp.reshape(mask, (*lead, rows[0] * rows[1], n))

    def _with_slopes(self, mask: Array | None, positions: Array) -> Array:
        """Make the mask additive, and take off what the distances cost."""
        xp = self.layout.xp
        distances = abs(self.positions[:, :, None] - positions[:, None, :])
        if on_host(distances):
            distances = self.layout.backend.from_numpy(distances, self.q)
        distances = xp.astype(distances, self.q.dtype)[:, None, None, :, :]
        slopes: Array = self.slopes
        bias = -slopes[..., None, None] * distances
        if mask is None:
            return bias
        if xp.isdtype(mask.dtype, "bool"):
            return xp.where(mask, bias, xp.full_like(bias, -xp.inf))
        return mask + bias

    def _columns(self, mask: Array, positions: Array) -> Array:
        """Columns of a mask at these positions, any of them where no token is."""
        xp, backend, last = self.layout.xp, self.layout.backend, mask.shape[-1] - 1
        inside = np.clip(positions, 0, last) if on_host(positions) else xp.clip(positions, 0, last)
        if on_host(inside):
            inside = backend.from_numpy(inside, mask, backend.place_dtype)
        mask = xp.broadcast_to(mask, (positions.shape[0], *mask.shape[1:]))
        return xp.take_along_axis(mask, inside[:, None, None, None, :], axis=-1)
