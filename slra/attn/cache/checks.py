"""The arguments of `KVCache.append` and `KVCache.attend`, checked and laid out with one batch axis."""

from typing import Any

import array_api_compat as compat
import numpy as np

from slra._backends import Backend
from slra._typing import Array
from slra._validate import check_flag, check_mask, promote, resolve
from slra.attn.cache.state import Settings, State, is_host

__all__ = [
    "check_can_grow",
    "check_lengths",
    "check_queries",
    "check_room",
    "check_selection",
    "check_tokens",
]


def check_can_grow(state: State, settings: Settings) -> None:
    """Raise ValueError in a traced function without a static capacity."""
    if settings.capacity is None and not is_host(state.lengths):
        raise ValueError(
            "capacity must be given to append under a transformation: shapes are static"
        )


def check_tokens(
    k: Array, v: Array, q: Array | None, state: State, settings: Settings, backend: Backend
) -> tuple[Array, Array, Array | None]:
    """Return keys, values and, where they are needed, queries, (B, H, m, .) in the dtype to compute in."""
    if state.recent is None:
        q = None
    elif q is None:
        raise ValueError("q must be given with update='drift': the basis is refitted to it")
    resolve(basis=state.segments[0].maps.wk, k=k, v=v, optional={"q": q})
    promote(backend, allow_complex=False, k=k, v=v, q=q)
    n_new = k.shape[-2] if k.ndim > 1 else 0
    _check_shape(k, "k", settings, settings.n_heads, n_new, settings.width)
    _check_shape(v, "v", settings, settings.n_heads, n_new, settings.width_v)
    k, v = (_prepared(x, state, settings, backend) for x in (k, v))
    if q is None:
        return k, v, None
    _check_shape(q, "q", settings, settings.n_heads * settings.n_shared, n_new, settings.width)
    return k, v, _prepared(q, state, settings, backend)


def _check_shape(
    x: Array, name: str, settings: Settings, n_heads: int, n_rows: int, width: int
) -> None:
    right = (*settings.batch, n_heads, n_rows, width)
    if tuple(x.shape) != right:
        raise ValueError(f"{name} must have shape {right}, got {tuple(x.shape)}")


def _prepared(x: Array, state: State, settings: Settings, backend: Backend) -> Array:
    x = backend.stop_gradient(backend.xp.astype(x, state.segments[0].maps.wk.dtype, copy=False))
    return backend.xp.reshape(x, (settings.n_batch, *x.shape[-3:]))


def check_queries(
    q: Array,
    mask: Array | None,
    is_causal: Any,
    state: State,
    settings: Settings,
    backend: Backend,
) -> tuple[Array, Array | None]:
    """Return queries (B, H * shared, M, D) in the dtype to compute in, and the mask with four axes."""
    resolve(basis=state.segments[0].maps.wk, q=q, optional={"mask": mask})
    promote(backend, allow_complex=False, q=q)
    check_flag(is_causal, "is_causal")
    n_rows = q.shape[-2] if q.ndim > 1 else 0
    n_heads = settings.n_heads * settings.n_shared
    _check_shape(q, "q", settings, n_heads, n_rows, settings.width)
    if n_rows == 0:
        raise ValueError(f"q must have no empty axis, got shape {tuple(q.shape)}")
    work = backend.xp.astype(q, state.segments[0].maps.wk.dtype, copy=False)
    work = backend.xp.reshape(work, (settings.n_batch, *q.shape[-3:]))
    return work, None if mask is None else _check_mask(mask, q, state, settings, backend)


def _check_mask(mask: Array, q: Array, state: State, settings: Settings, backend: Backend) -> Array:
    xp = backend.xp
    n_tokens = int(state.lengths.max()) if is_host(state.lengths) else settings.capacity
    scores = (*q.shape[:-1], n_tokens)
    check_mask(backend, mask, scores, "(..., Hq, m, n)")
    core = ((1,) * max(0, 3 - mask.ndim) + tuple(mask.shape))[-3:]
    if mask.ndim <= 3:
        return xp.reshape(mask, (1, *core))
    return xp.reshape(xp.broadcast_to(mask, (*settings.batch, *core)), (settings.n_batch, *core))


def check_lengths(
    lengths: Array | None, n_rows: int, state: State, settings: Settings, backend: Backend
) -> Array | None:
    """Return how many rows of each sequence count, (B,), beside the lengths of the cache; None for all."""
    if lengths is None:
        return None
    if state.recent is not None:
        raise ValueError("lengths must be None with update='drift'")
    if not is_host(state.lengths):
        return _check_traced(lengths, n_rows, state, settings, backend)
    counts = _host_integers(lengths, "lengths", backend)
    if counts.shape != settings.batch or np.any(counts < 0) or np.any(counts > n_rows):
        raise ValueError(
            f"lengths must have shape {settings.batch} and be between 0 and {n_rows}, got {counts.tolist()}"
        )
    return counts.reshape(-1).astype(np.int64)


def _check_traced(
    lengths: Array, n_rows: int, state: State, settings: Settings, backend: Backend
) -> Array:
    """Values cannot be looked at: they are clipped to what is possible."""
    xp = backend.xp
    counts = lengths if compat.is_array_api_obj(lengths) else np.asarray(lengths)
    if isinstance(counts, np.ndarray):
        counts = backend.from_numpy(counts, state.lengths, counts.dtype)
    if not xp.isdtype(counts.dtype, "integral"):
        raise TypeError(f"lengths must be integers, got {counts.dtype}")
    if tuple(counts.shape) != settings.batch:
        raise ValueError(f"lengths must have shape {settings.batch}, got {tuple(counts.shape)}")
    return xp.clip(xp.astype(xp.reshape(counts, (-1,)), state.lengths.dtype), 0, n_rows)


def check_selection(indices: Any, settings: Settings, backend: Backend) -> np.ndarray[Any, Any]:
    """Return which elements of the batch are wanted."""
    chosen = _host_integers(indices, "indices", backend)
    if len(settings.batch) != 1:
        raise ValueError(
            f"a cache must have one batch axis to select from, got batch {settings.batch}"
        )
    (n,) = settings.batch
    if chosen.ndim != 1 or not chosen.size or np.any((chosen < 0) | (chosen >= n)):
        raise ValueError(f"indices must be one or more from 0 to {n - 1}, got {chosen.tolist()}")
    return chosen


def _host_integers(x: Any, name: str, backend: Backend) -> np.ndarray[Any, Any]:
    is_foreign = compat.is_array_api_obj(x) and not isinstance(x, (np.ndarray, np.generic))
    if is_foreign:
        # Of the library of the cache, or of any other whose values can be looked at.
        x = resolve(**{name: x}).to_numpy(x)
    try:
        values = np.asarray(x)
    except (TypeError, ValueError):  # ragged lists
        raise TypeError(f"{name} must be integers, got {type(x).__name__}") from None
    if values.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {values.dtype}")
    return values


def check_room(state: State, n_new: int, counts: Array | None, settings: Settings) -> None:
    """Raise ValueError where the tokens would not fit, where that can be known."""
    if settings.capacity is None or not is_host(state.lengths):
        return
    needed = int(np.max(state.lengths + (n_new if counts is None else counts)))
    if needed > settings.capacity:
        raise ValueError(
            f"capacity must be at least {needed} to append these tokens, got {settings.capacity}"
        )
