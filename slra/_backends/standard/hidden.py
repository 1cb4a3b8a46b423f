"""What a mask and causality hide: it takes no part in attention, whatever it holds.

A weight of zero does not do it, as 0 * NaN is NaN. So NaN and infinities are taken out of queries, keys and values,
and put back where a query sees them. Shapes as in `attention`; an additive mask hides by -inf.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from slra._backends.standard.attention import (
    Attention,
    ScoreOptions,
    Tile,
    TileBounds,
    broadcast_shapes,
)
from slra._typing import Array

__all__ = [
    "Attend",
    "any_to",
    "finite_gradients",
    "finite_parts",
    "heeded",
    "hides",
    "is_same_for_all",
    "marks",
    "seen_keys",
    "seen_queries",
    "without_unseen",
]

# A function of q, k, v, mask and options that returns the output, and the log-sum-exp or None.
Attend = Callable[..., tuple[Array, Any]]
# Entries of a mask that are looked at together, and tiles of one at most: under jit each is traced.
TILE_SIZE, N_TILES = 1 << 22, 16


def hides(mask: Array | None, options: ScoreOptions, n_queries: int, n_keys: int) -> bool:
    """Whether anything may be hidden from a query."""
    return mask is not None or not options.sees_all(n_queries, n_keys)


def heeded(
    backend: Any,
    attend: Attend,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    options: ScoreOptions,
) -> tuple[Array, Any]:
    """Attend, and once more where NaN or infinities came out that may be of hidden ones.

    Where values cannot be looked at, finite parts are attended to at once; under a mask with rows and columns, where to
    put NaN back takes as long as attention does, so that only what is hidden from all is zeroed.
    """
    arrays = (q, k, v)
    if not hides(mask, options, q.shape[-2], k.shape[-2]):
        return attend(*arrays, mask, options)
    if not all(map(backend.is_eager, arrays)):
        if not is_same_for_all(mask):
            return attend(*without_unseen(backend, *arrays, mask, options), mask, options)
        out, lse = attend(*finite_parts(backend, *arrays), mask, options)
        q, k, v = map(backend.stop_gradient, arrays)
        mark, mark_lse = marks(backend, q, k, v, mask, options)
        return out + mark, None if lse is None else lse + mark_lse
    # Where a gradient follows, what is hidden matters to it even if the output is finite.
    looked_at = arrays if any(map(backend.is_differentiated, arrays)) else ()
    if all(_is_finite(backend, x) for x in looked_at):
        out, lse = attend(*arrays, mask, options)
        if _is_finite(backend, out):
            return out, lse
    finite = without_unseen(backend, *finite_parts(backend, *arrays), mask, options)
    out, lse = attend(*finite, mask, options)
    if not _is_finite(backend, out):
        # Scores of keys that others see may be infinite even so: a kernel that adds its mask makes NaN of them.
        # In single precision, where a backend attends in half.
        single = backend.xp.float32
        q, k, v = (backend.xp.astype(x, single) if _is_half(backend, x) else x for x in finite)
        out, lse = Attention.attention(backend, q, k, v, mask, options)
        out = backend.xp.astype(out, arrays[0].dtype, copy=False)
    mark, mark_lse = marks(backend, *arrays, mask, options)
    return out + mark, None if lse is None else lse + mark_lse


def _is_finite(backend: Any, x: Array) -> bool:
    """Look at the sum, in one pass; where only that overflows, all is done twice."""
    xp = backend.xp
    total = xp.sum(x, dtype=xp.float32) if _is_half(backend, x) else xp.sum(x)
    return bool(xp.isfinite(total))


def _is_half(backend: Any, x: Array) -> bool:
    found = backend.float_format(x.dtype)
    return found is not None and found.bits == 16


def finite_parts(backend: Any, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Put zero for NaN and infinities."""
    xp = backend.xp
    q, k, v = (xp.where(xp.isfinite(x), x, xp.zeros_like(x)) for x in (q, k, v))
    return q, k, v


def finite_gradients(
    backend: Any,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    options: ScoreOptions,
    lse: Array,
    delta: Array,
    grad_out: Array,
) -> tuple[Array, Array, Array]:
    """Gradients as of `attention_vjp`, to which what is hidden does not matter either."""
    given, pull_back = (q, k, v, mask, options, lse, delta, grad_out), backend.attention_vjp
    grads: tuple[Array, Array, Array]
    if not hides(mask, options, q.shape[-2], k.shape[-2]):
        grads = pull_back(*given)
        return grads
    if all(map(backend.is_eager, (q, k, v, lse, grad_out))):
        grads = pull_back(*given)
        if all(_is_finite(backend, x) for x in grads):
            return grads
    # The output of a query that sees nothing is constant.
    xp, is_empty = backend.xp, lse == -math.inf
    delta = xp.where(is_empty, xp.zeros_like(delta), delta)
    grad_out = xp.where(is_empty[..., None], xp.zeros_like(grad_out), grad_out)
    q, k, v = without_unseen(backend, *finite_parts(backend, q, k, v), mask, options)
    grads = pull_back(q, k, v, mask, options, lse, delta, grad_out)
    return grads


def without_unseen(
    backend: Any, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
) -> tuple[Array, Array, Array]:
    """Zero queries that see nothing, and keys and values that no query sees."""
    shape = q.shape[-2], k.shape[-2]
    queries, keys = (find(backend, q, mask, options, *shape) for find in (seen_queries, seen_keys))

    def kept(x: Array, seen: Array | None) -> Array:
        if seen is None:
            return x
        seen = any_to(backend, seen, x.shape[:-1])[..., None]
        return backend.xp.where(seen, x, backend.xp.zeros_like(x))

    return kept(q, queries), kept(k, keys), kept(v, keys)


def any_to(backend: Any, seen: Array, shape: tuple[int, ...]) -> Array:
    """Whether any is True along the axes that an array of this shape does not have, or has only once."""
    xp, n_missing = backend.xp, max(0, seen.ndim - len(shape))
    seen = xp.any(seen, axis=tuple(range(n_missing))) if n_missing else seen
    own = shape[len(shape) - seen.ndim :]
    axes = tuple(a for a, n in enumerate(own) if n == 1 and seen.shape[a] != 1)
    return xp.any(seen, axis=axes, keepdims=True) if axes else seen


def seen_queries(
    backend: Any,
    like: Array,
    mask: Array | None,
    options: ScoreOptions,
    n_queries: int,
    n_keys: int,
) -> Array | None:
    """Which queries see a key, (..., Nq); None where all do, as far as can be known without a look at values."""
    is_before = options.is_causal and options.diagonal(n_queries, n_keys) < 0
    is_after = options.first is not None and n_queries - 1 + options.first >= n_keys
    if mask is None and not (is_before or is_after):
        return None
    xp = backend.xp
    ones = xp.ones((n_keys, 1), dtype=xp.bool, device=backend.creation_device(like))
    return _sees(backend, ones, like, mask, options, n_queries)[..., 0]


def seen_keys(
    backend: Any,
    like: Array,
    mask: Array | None,
    options: ScoreOptions,
    n_queries: int,
    n_keys: int,
    among: Array | None = None,
) -> Array | None:
    """Which keys a query sees, or one of those ``among``, (..., Nq), sees; (..., Nk), None where all are seen."""
    xp, diagonal = backend.xp, options.diagonal(n_queries, n_keys)
    is_cut = options.is_causal and n_queries - 1 + diagonal < n_keys - 1
    is_cut = is_cut or (options.first is not None and options.first > 0)
    if mask is None and among is None and not is_cut:
        return None
    if not is_same_for_all(mask):
        tiles = (
            xp.any(seen if part is None else seen & part, axis=-2)
            for part, seen in _tiles(backend, among, mask, options, n_queries, n_keys)
        )
        found = next(tiles)
        for each in tiles:
            found = found | each
        return found
    if among is None:
        among = xp.ones((n_queries,), dtype=xp.bool, device=backend.creation_device(like))
    if mask is not None:
        shown = _shows(mask, xp)
        if mask.shape[-1] == 1:
            among = among & shown[..., 0]
    # Key j is seen by the queries from j - diagonal on, up to j - first.
    keys = np.arange(n_keys)
    start = keys - diagonal if options.is_causal else np.zeros(n_keys, dtype=int)
    end = np.full(n_keys, n_queries) if options.first is None else keys - options.first + 1
    # Counted in whole numbers: half precision has few of them.
    counts = _between(backend, xp.astype(among[..., None], backend.place_dtype), start, end)
    found = counts[..., 0] > 0
    return found if mask is None or mask.shape[-1] == 1 else found & shown[..., 0, :]


def marks(
    backend: Any, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
) -> tuple[Array, Array]:
    """Return what to add to the output, (..., Nq, Dv), and log-sum-exp, (..., Nq), that came of finite parts.

    It is NaN where a query, or a key that it sees, is not finite; NaN or an infinity where a value is that it sees.
    """
    xp, width = backend.xp, v.shape[-1]
    lead = broadcast_shapes(k.shape[:-2], v.shape[:-2])
    any_key = xp.ones_like(k[..., :1], dtype=xp.bool)
    bad = ~xp.all(xp.isfinite(k), axis=-1, keepdims=True)
    kinds = [any_key, bad, xp.isnan(v), v == math.inf, v == -math.inf]
    parts = xp.concat([xp.broadcast_to(x, (*lead, *x.shape[-2:])) for x in kinds], axis=-1)
    seen = _sees(backend, parts, v, mask, options, q.shape[-2])
    values = seen[..., 2:]
    is_nan, is_up, is_down = (values[..., i * width : (i + 1) * width] for i in range(3))
    is_lost = seen[..., 1] | (seen[..., 0] & ~xp.all(xp.isfinite(q), axis=-1))

    def where(here: Array, value: float, other: Array) -> Array:
        return xp.where(here, xp.full_like(other, value), other)

    shape = broadcast_shapes(is_lost.shape, is_nan.shape[:-1])
    like = {"dtype": v.dtype, "device": backend.creation_device(v)}
    mark = where(is_up, math.inf, xp.zeros((*shape, width), **like))
    mark = where(is_down, -math.inf, mark)
    mark = where(is_nan | (is_up & is_down) | is_lost[..., None], math.nan, mark)
    return mark, where(is_lost, math.nan, xp.zeros(shape, **like))


def is_same_for_all(mask: Array | None) -> bool:
    """Whether a mask hides the same keys from each query, or the same queries from each key."""
    return mask is None or 1 in mask.shape[-2:]


def _sees(
    backend: Any,
    x: Array,
    like: Array,
    mask: Array | None,
    options: ScoreOptions,
    n_queries: int,
) -> Array:
    """Whether queries see a key for which something is True, (..., Nk, w); (..., Nq, w)."""
    xp, n_keys = backend.xp, x.shape[-2]
    if not is_same_for_all(mask):
        x = xp.astype(x, like.dtype)
        tiles = _tiles(backend, None, mask, options, n_queries, n_keys)
        return xp.concat([xp.astype(seen, x.dtype) @ x > 0 for _, seen in tiles], axis=-2)
    if mask is not None:
        shown = _shows(mask, xp)
        if mask.shape[-2] == 1:
            x = x & xp.matrix_transpose(shown)
    if options.first is None:
        found = _sees_from_the_first(backend, x, like, options, n_queries)
    else:
        start, end = np.arange(n_queries) + options.first, np.full(n_queries, n_keys)
        if options.is_causal:
            end = np.arange(n_queries) + options.diagonal(n_queries, n_keys) + 1
        found = _between(backend, xp.astype(x, backend.place_dtype), start, end) > 0
    return found if mask is None or mask.shape[-2] == 1 else found & shown


def _sees_from_the_first(
    backend: Any, x: Array, like: Array, options: ScoreOptions, n_queries: int
) -> Array:
    """Whether queries that see all keys up to their last see one for which something is True."""
    xp, n_keys = backend.xp, x.shape[-2]
    device = {"dtype": backend.place_dtype, "device": backend.creation_device(like)}
    keys = xp.arange(n_keys, **device)[:, None]
    # The first such key tells: whoever sees a key sees all before it.
    first = xp.min(xp.where(x, keys, xp.full_like(keys, n_keys)), axis=-2, keepdims=True)
    last = xp.full((n_queries, 1), n_keys - 1, **device)
    if options.is_causal:
        diagonal = options.diagonal(n_queries, n_keys)
        last = xp.minimum(last, xp.arange(diagonal, diagonal + n_queries, **device)[:, None])
    return first <= last


def _between(backend: Any, x: Array, start: Any, end: Any) -> Array:
    """Sum the rows of ``x`` (..., n, w) from ``start`` up to ``end``, for each pair of them."""
    xp, n = backend.xp, x.shape[-2]
    start, end = (np.clip(places, 0, n) for places in (start, end))
    end = np.maximum(start, end)
    if np.all(start == 0) and np.all(end == n):
        total = xp.sum(x, axis=-2, keepdims=True)
        return xp.broadcast_to(total, (*total.shape[:-2], len(end), total.shape[-1]))
    zero = xp.zeros_like(x[..., :1, :])
    sums = xp.concat([zero, xp.cumulative_sum(x, axis=-2)], axis=-2)
    low, high = (
        xp.take(sums, backend.from_numpy(places, x, backend.place_dtype), axis=-2)
        for places in (start, end)
    )
    return high - low


def _tiles(
    backend: Any,
    among: Array | None,
    mask: Any,
    options: ScoreOptions,
    n_queries: int,
    n_keys: int,
) -> Iterator[tuple[Any, Array]]:
    """Go down a mask that has rows: those ``among``, (..., S, 1), with what they show, (..., S, Nk)."""
    xp = backend.xp
    device, diagonal = backend.creation_device(mask), options.diagonal(n_queries, n_keys)
    for top, bottom in _heights(backend, mask, n_queries, n_keys):
        tile = Tile(top, bottom, 0, n_keys)
        seen = _shows(tile.of(mask), xp)
        within = TileBounds(None, options, tile, diagonal).seen(xp, device)
        seen = seen if within is None else seen & within
        yield None if among is None else among[..., top:bottom, None], seen


def _heights(backend: Any, mask: Any, n_queries: int, n_keys: int) -> Iterator[tuple[int, int]]:
    """Where tiles of a mask begin and end; there is one where nobody can say how many a symbol makes."""
    if not backend.is_known(n_queries):
        yield 0, n_queries
        return
    height = max(1, TILE_SIZE // max(1, math.prod(mask.shape[:-2]) * n_keys))
    height = max(height, -(-n_queries // N_TILES))
    for top in range(0, n_queries, height):
        yield top, min(top + height, n_queries)


def _shows(mask: Array, xp: Any) -> Array:
    return mask if mask.dtype == xp.bool else mask != -math.inf
