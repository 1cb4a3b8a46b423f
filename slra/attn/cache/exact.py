"""Tokens kept as they came: the first ones, and a ring of the last ones."""

from slra._backends import Backend
from slra._typing import Array
from slra.attn.cache.ask import Ask, fold, part_mask, unfold
from slra.attn.cache.rotary import rotate
from slra.attn.cache.state import Exact, Settings, arange_like, namespace_of

__all__ = ["attend_exact", "exact_places", "keep_exact", "ring_positions"]


def keep_exact(
    exact: Exact,
    k: Array,
    v: Array,
    tokens: tuple[Array, Array, Array],
    settings: Settings,
    backend: Backend,
) -> Exact:
    """Write those of the new tokens that stay exact; ``tokens``: positions, which of them count, lengths after."""
    positions, counts, lengths = tokens
    n_sink, window = settings.n_sink, settings.window
    ns = namespace_of(lengths)
    is_sink = positions < n_sink
    is_last = (positions >= lengths[:, None] - window) & ~is_sink
    ring = n_sink + (positions - n_sink) % max(1, window)
    places = ns.where(is_sink, positions, ring)
    places = ns.where(counts & (is_sink | is_last), places, 0 * places - 1)
    return Exact(backend.put_rows(exact.k, k, places), backend.put_rows(exact.v, v, places))


def ring_positions(lengths: Array, settings: Settings, backend: Backend) -> Array:
    """Which token each row of the ring holds, (B, window); one before the sinks' end where none is."""
    n_sink, window = settings.n_sink, settings.window
    each = arange_like(lengths, 0, window, backend)
    turns = (lengths[:, None] - n_sink - 1 - each) // max(1, window)
    return n_sink + turns * window + each


def exact_places(
    lengths: Array, settings: Settings, backend: Backend
) -> tuple[Array, Array, Array]:
    """Positions of all rows (B, n_sink + window), the least that a row may hold, and the end."""
    ns = namespace_of(lengths)
    ring = ring_positions(lengths, settings, backend)
    sinks = arange_like(lengths, 0, settings.n_sink, backend) + 0 * lengths[:, None]
    positions = ns.concat([sinks, ring], axis=-1)
    row = arange_like(lengths, 0, positions.shape[-1], backend)
    low = ns.where(row < settings.n_sink, 0 * row, 0 * row + settings.n_sink)
    return positions, low, lengths[:, None]


def attend_exact(
    exact: Exact, lengths: Array, asked: Ask, settings: Settings, backend: Backend
) -> tuple[Array, Array]:
    """Attention to the exact tokens, and its log-sum-exp."""
    places = exact_places(lengths, settings, backend)
    mask = part_mask(asked, places, settings, backend)
    q, k = asked.q, exact.k
    if settings.rotary is not None:
        q = rotate(q, asked.positions, settings.rotary, backend)
        k = rotate(k, places[0], settings.rotary, backend)
    out, lse = backend.attention(fold(q, settings, backend), k, exact.v, mask, settings.options)
    return unfold(out, q.shape[-2], backend), unfold(lse, q.shape[-2], backend)
