"""What happens to tokens: stored when they come, attended to when asked, decoded when wanted back."""

from typing import Any

import numpy as np

from slra._backends import Backend
from slra._typing import Array
from slra.attn.cache.ask import Ask
from slra.attn.cache.exact import attend_exact, exact_places, keep_exact
from slra.attn.cache.segment import (
    attend_segment,
    new_segment,
    read_keys,
    read_values,
    store_tokens,
)
from slra.attn.cache.state import (
    Exact,
    Recent,
    Segment,
    SegmentMaps,
    Settings,
    State,
    arange_like,
    is_host,
    namespace_of,
    zeros,
)
from slra.attn.exact import merge_attention

__all__ = ["attend_state", "empty_state", "read_state", "select_state", "store"]


def empty_state(
    maps: SegmentMaps, error: Array | None, settings: Settings, backend: Backend
) -> State:
    """Return a state without tokens, with room for those that are foreseen."""
    lengths: Array = np.zeros(settings.n_batch, dtype=np.int64)
    if backend.is_functional and settings.capacity is not None:
        lengths = backend.from_numpy(lengths, maps.wk, backend.xp.int32)
    n_rows = 0 if settings.capacity is None else settings.capacity - settings.n_sink
    lead = (settings.n_batch, settings.n_heads)
    exact = recent = None
    if n_exact := settings.n_sink + settings.window:
        k, v = (
            zeros((*lead, n_exact, width), maps.wk, backend)
            for width in (settings.width, settings.width_v)
        )
        exact = Exact(k, v)
    if settings.update == "drift":
        n_queries = settings.n_heads * settings.n_shared
        q = zeros((settings.n_batch, n_queries, 0, settings.width), maps.wk, backend)
        recent = Recent(q, np.asarray(0))
    segment = new_segment(maps, lengths + settings.n_sink, n_rows, settings, backend)
    return State(lengths, (segment,), exact, recent, error)


def store(
    state: State, k: Array, v: Array, counts: Array | None, settings: Settings, backend: Backend
) -> State:
    """Put tokens (B, H, m, .) at the end of each sequence, or the first ``counts`` (B,) of them.

    Every token but the sinks goes to the segment at once, also those in the window: attention leaves them out until
    they have left it.
    """
    lengths, n_new = state.lengths, k.shape[-2]
    ns = namespace_of(lengths)
    each = arange_like(lengths, 0, n_new, backend)
    counts = 0 * lengths + n_new if counts is None else counts
    positions, is_used = lengths[:, None] + each, each < counts[:, None]
    lengths = lengths + counts
    *older, last = state.segments
    places = positions - last.start[:, None]
    is_stored = is_used & (places >= 0)
    places = ns.where(is_stored, places, 0 * places - 1)
    last = store_tokens(last, k, v, places, settings, backend)
    exact = state.exact
    if exact is not None:
        exact = keep_exact(exact, k, v, (positions, is_used, lengths), settings, backend)
    return state._replace(lengths=lengths, segments=(*older, last), exact=exact)


def _ends(state: State, settings: Settings, backend: Backend) -> list[Array]:
    """Where each segment ends: where the next one or the window begins."""
    ns = namespace_of(state.lengths)
    starts = [segment.start for segment in state.segments]
    ends = [*starts[1:], ns.maximum(starts[-1], state.lengths - settings.window)]
    return [ns.minimum(end, ends[-1]) for end in ends]


def attend_state(
    state: State, asked: Ask, settings: Settings, backend: Backend
) -> tuple[Array, Array]:
    """Attention to all tokens, and its log-sum-exp, (B, H * shared, M, .)."""
    parts: list[tuple[Array, Array]] = []
    if is_host(state.lengths) and not np.any(state.lengths):
        out = zeros((*asked.q.shape[:-1], settings.width_v), asked.q, backend)
        return out, backend.xp.full_like(out[..., 0], -backend.xp.inf)
    for segment, end in zip(state.segments, _ends(state, settings, backend), strict=True):
        parts += attend_segment(segment, end, asked, settings, backend)
    if state.exact is not None:
        parts.append(attend_exact(state.exact, state.lengths, asked, settings, backend))
    if len(parts) > 1:
        out, lse = merge_attention(*zip(*parts, strict=True))
    else:
        ((out, lse),) = parts
        out = backend.xp.where(lse[..., None] == -backend.xp.inf, backend.xp.zeros_like(out), out)
    if settings.capacity is None or is_host(state.lengths):
        return out, lse
    # Tokens beyond a static capacity are lost: no number may look as if they were not.
    is_over = (state.lengths > settings.capacity)[:, None, None]
    nan = backend.xp.asarray(backend.xp.nan, dtype=out.dtype)
    return backend.xp.where(is_over[..., None], nan, out), backend.xp.where(is_over, nan, lse)


def read_state(state: State, settings: Settings, backend: Backend) -> tuple[Array, Array]:
    """Decode keys and values of all tokens, (B, H, n, .), zero beyond the length of a sequence."""
    n_tokens = int(state.lengths.max()) if is_host(state.lengths) else settings.capacity or 0
    ns = namespace_of(state.lengths)
    like = state.segments[0].maps.wk
    lead = (settings.n_batch, settings.n_heads, n_tokens)
    k, v = (zeros((*lead, width), like, backend) for width in (settings.width, settings.width_v))
    for segment, end in zip(state.segments, _ends(state, settings, backend), strict=True):
        n_rows = min(segment.k.shape[-2], n_tokens)
        rows = slice(0, n_rows)
        places = segment.start[:, None] + arange_like(segment.start, 0, n_rows, backend)
        places = ns.where(places < end[:, None], places, 0 * places - 1)
        k = backend.put_rows(k, read_keys(segment, rows, settings, backend), places)
        v = backend.put_rows(v, read_values(segment, rows, settings, backend), places)
    if state.exact is not None:
        places, low, high = exact_places(state.lengths, settings, backend)
        places = ns.where((places >= low) & (places < high), places, 0 * places - 1)
        k, v = (
            backend.put_rows(k, state.exact.k, places),
            backend.put_rows(v, state.exact.v, places),
        )
    return k, v


def select_state(
    state: State, indices: np.ndarray[Any, Any], settings: Settings, backend: Backend
) -> State:
    """Take elements of the batch."""

    def take(x: Any) -> Any:
        if x is None:
            return None
        if isinstance(x, tuple):
            return type(x)(*map(take, x))
        if isinstance(x, np.ndarray):
            return x[indices]
        return backend.xp.take(x, backend.from_numpy(indices, x, backend.xp.int64), axis=0)

    segments = []
    for segment in state.segments:
        maps = segment.maps if settings.pool_batch else take(segment.maps)
        segments.append(Segment(maps, *map(take, segment[1:])))
    recent = state.recent and state.recent._replace(q=take(state.recent.q))
    error = state.error
    if error is not None and error.ndim > 1:
        error = take(error)
    return State(take(state.lengths), tuple(segments), take(state.exact), recent, error)
