"""What is asked of a cache: queries, and which tokens each of them sees."""

from typing import NamedTuple

import numpy as np

from slra._backends import Backend
from slra._typing import Array
from slra.attn.cache.state import Settings, arange_like, is_host, namespace_of

__all__ = ["Ask", "ask", "fold", "part_mask", "sees_all", "unfold"]


class Ask(NamedTuple):
    """Queries with their places."""

    q: Array  # (B, H * shared, M, D)
    positions: Array  # (B, M): the token each query belongs to
    limit: Array  # (B, M): the last token it sees, -1 for none
    mask: Array | None  # (B or 1, H * shared or 1, M or 1, N or 1), N counts tokens


def ask(
    q: Array,
    mask: Array | None,
    counts: Array | None,
    lengths: Array,
    *,
    is_causal: bool,
    backend: Backend,
) -> Ask:
    """Place the queries at the end of their sequences; those beyond ``counts`` see nothing."""
    ns, n_queries = namespace_of(lengths), q.shape[-2]
    each = arange_like(lengths, 0, n_queries, backend)
    used = lengths[:, None] * 0 + n_queries if counts is None else counts[:, None]
    positions = lengths[:, None] - used + each
    limit = positions if is_causal else lengths[:, None] - 1 + 0 * each
    return Ask(q, positions, ns.where(each < used, limit, 0 * limit - 1), mask)


def fold(x: Array, settings: Settings, backend: Backend) -> Array:
    """Make the query heads that share a key head rows of one matrix: (B, H * shared, M, f) to (B, H, shared * M, f)."""
    shape = (x.shape[0], settings.n_heads, settings.n_shared * x.shape[-2], x.shape[-1])
    return backend.xp.reshape(x, shape)


def unfold(x: Array, n_queries: int, backend: Backend) -> Array:
    """Undo `fold` on an output (B, H, shared * M, f) or a log-sum-exp (B, H, shared * M)."""
    return backend.xp.reshape(x, (x.shape[0], -1, n_queries, *x.shape[3:]))


def sees_all(asked: Ask, start: Array, end: Array, rows: slice) -> bool:
    """Whether it is known that these rows of a segment all hold tokens, and that every query sees them."""
    if not is_host(start) or asked.mask is not None:
        return False
    is_full = np.all(end - start >= rows.stop)
    return bool(is_full and np.all(asked.limit >= (start + rows.stop - 1)[:, None]))


def part_mask(
    asked: Ask, places: tuple[Array, Array, Array], settings: Settings, backend: Backend
) -> Array | None:
    """Which keys, at given positions (B, n) and within bounds that broadcast to them, each query sees."""
    xp = backend.xp
    positions, low, high = places
    seen = (positions >= low) & (positions < high)
    seen = seen[:, None, :] & (positions[:, None, :] <= asked.limit[:, :, None])
    mask = None if asked.mask is None else _columns(asked.mask, positions, backend)
    if is_host(seen):
        seen = None if np.all(seen) else backend.from_numpy(seen, asked.q, xp.bool)
    if seen is not None:
        seen = seen[:, None, :, :]
        if mask is None:
            mask = seen
        elif xp.isdtype(mask.dtype, "bool"):
            mask = xp.logical_and(mask, seen)
        else:
            mask = xp.where(seen, mask, xp.full_like(mask, -xp.inf))
    return mask if mask is None else _folded(mask, asked.q.shape[-2], settings, backend)


def _columns(mask: Array, positions: Array, backend: Backend) -> Array:
    """Columns of a mask at these positions, whichever they are where nothing is."""
    xp, n_tokens = backend.xp, mask.shape[-1]
    if n_tokens == 1:
        return mask
    if is_host(positions):
        inside = backend.from_numpy(np.clip(positions, 0, n_tokens - 1), mask, xp.int64)
    else:
        inside = xp.clip(positions, 0, n_tokens - 1)
    mask = xp.broadcast_to(mask, (positions.shape[0], *mask.shape[1:]))
    return xp.take_along_axis(mask, inside[:, None, None, :], axis=-1)


def _folded(mask: Array, n_queries: int, settings: Settings, backend: Backend) -> Array:
    """Lay a mask out as `fold` does queries."""
    xp, (n_batch, heads, rows, n_keys) = backend.xp, mask.shape
    if heads == 1 and rows == 1:
        return mask
    if heads == 1:
        mask = xp.broadcast_to(
            mask[:, :, None, :, :], (n_batch, 1, settings.n_shared, rows, n_keys)
        )
        return xp.reshape(mask, (n_batch, 1, settings.n_shared * rows, n_keys))
    mask = xp.broadcast_to(mask, (n_batch, heads, n_queries, n_keys))
    return xp.reshape(mask, (n_batch, settings.n_heads, settings.n_shared * n_queries, n_keys))
