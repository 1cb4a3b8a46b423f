"""Noticing that new tokens do not fit the basis, and fitting another one to them."""

import numpy as np

from slra._backends import Backend
from slra._typing import Array
from slra.attn.cache.ask import fold, unfold
from slra.attn.cache.exact import ring_positions
from slra.attn.cache.segment import new_segment, store_tokens
from slra.attn.cache.settings import maps_of
from slra.attn.cache.state import Recent, Segment, SegmentMaps, Settings, State, with_rows
from slra.attn.fit import fit_attention

__all__ = ["follow", "remember"]


def remember(recent: Recent, q: Array, settings: Settings, backend: Backend) -> Recent:
    """Keep the last queries; count the tokens that came with them."""
    n_new, window = q.shape[-2], settings.window
    held = backend.xp.concat([recent.q, q], axis=-2)
    return Recent(held[..., -window:, :], recent.since_check + n_new)


def follow(state: State, settings: Settings, backend: Backend) -> State:
    """Once the window is full of tokens that were not looked at, measure, and refit where the bound is passed."""
    recent, exact, lengths = state.recent, state.exact, state.lengths
    if recent is None or exact is None or int(recent.since_check) < settings.window:
        return state
    if np.min(lengths) < settings.n_sink + settings.window:
        return state
    state = state._replace(recent=recent._replace(since_check=np.asarray(0)))
    k, v = (x[:, :, settings.n_sink :, :] for x in exact)
    if _residual(state.segments[-1].maps, recent.q, k, v, settings, backend) <= (
        settings.drift_bound or 0
    ):
        return state
    return _refitted(state, recent.q, k, v, settings, backend)


def _residual(
    maps: SegmentMaps, q: Array, k: Array, v: Array, settings: Settings, backend: Backend
) -> float:
    """Relative error that the maps make in the output of the last queries over the window; the largest of all heads."""
    xp, options = backend.xp, settings.options
    exact, _ = backend.attention(fold(q, settings, backend), k, v, None, options)
    back = maps.back(settings.n_shared, xp)
    low_k = (k - maps.c) @ maps.wk @ back + maps.c
    out, _ = backend.attention(
        fold(q, settings, backend), low_k, (v - maps.mu) @ maps.wv, None, options
    )
    out = out @ maps.uv + maps.mu
    error, whole = (
        xp.sqrt(xp.sum(unfold(x * x, q.shape[-2], backend), axis=(0, -2, -1)))
        for x in (out - exact, exact)
    )
    return float(xp.max(error / xp.where(whole == 0, xp.ones_like(whole), whole)))


def _refitted(
    state: State, q: Array, k: Array, v: Array, settings: Settings, backend: Backend
) -> State:
    """Fit to the window, and store it again: the new segment starts with it."""
    start = state.lengths - settings.window
    basis = fit_attention(
        _split(q, settings, backend),
        _split(k, settings, backend),
        _split(v, settings, backend),
        settings.rank,
        method=settings.method,
        pool_batch=settings.pool_batch,
        scale=settings.options.scale,
        softcap=settings.options.softcap,
        enable_gqa=True,
    )
    maps = maps_of(basis, settings.n_batch, backend)
    *older, last = state.segments
    segment = new_segment(maps, start, settings.window, settings, backend)
    places = ring_positions(state.lengths, settings, backend) - start[:, None]
    segment = store_tokens(segment, k, v, places, settings, backend)
    n_rows = int(np.max(start - last.start))
    kept = [_trimmed(last, n_rows, backend)] if n_rows > 0 else []
    return state._replace(segments=(*older, *kept, segment))


def _split(x: Array, settings: Settings, backend: Backend) -> Array:
    return backend.xp.reshape(x, (*settings.batch, *x.shape[1:]))


def _trimmed(segment: Segment, n_rows: int, backend: Backend) -> Segment:
    """Give back what a segment will not need: it is complete."""

    def cut(x: Array) -> Array:
        return with_rows(x[:, :, :n_rows, :], n_rows, backend)

    sparse = (
        None if tokens is None else type(tokens)(*map(cut, tokens))
        for tokens in (segment.sparse_k, segment.sparse_v)
    )
    return Segment(segment.maps, segment.start, cut(segment.k), cut(segment.v), *sparse)
