"""What a cache is made of: plain values that never change, and arrays.

Positions and lengths count tokens. They are NumPy arrays where buffers may grow, and arrays of the caller's library
where capacity is static, so that they can be traced.

Axes throughout: B batch (all leading axes as one), H key heads, M queries, n keys.
"""

import math
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from slra._backends import Backend
from slra._backends.standard import ScoreOptions
from slra._typing import Array, DType, Namespace

__all__ = [
    "Exact",
    "Recent",
    "Segment",
    "SegmentMaps",
    "Settings",
    "SparseTokens",
    "State",
    "arange_like",
    "arrays_of",
    "copied",
    "grown",
    "is_host",
    "namespace_of",
    "with_rows",
    "zeros",
]

# Buffers grow by this factor: at most so much is allocated in vain, and a row is copied five times at most, on average.
GROWTH = 1.25
LEAST_ROWS = 16


class Settings(NamedTuple):
    """What never changes; hashable, as it is part of the structure of a pytree."""

    batch: tuple[int, ...]
    n_heads: int
    n_shared: int  # query heads to a key head
    width: int
    width_v: int
    rank: tuple[int, int]
    pool_batch: bool
    window: int
    n_sink: int
    n_sparse: int
    capacity: int | None
    dtype: str | None
    options: ScoreOptions
    rotary: tuple[float, ...] | None
    update: str
    drift_bound: float | None
    method: str

    @property
    def n_batch(self) -> int:
        """Product of the leading axes."""
        return math.prod(self.batch)

    @property
    def carries_shift(self) -> bool:
        """Whether k' has one more column, of ones: a softcap sees the shift of the keys."""
        return self.options.softcap is not None and self.rotary is None

    def storage_dtype(self, backend: Backend, work: DType) -> DType:
        """Dtype of k' and v'."""
        return work if self.dtype is None else getattr(backend.xp, self.dtype)


class SegmentMaps(NamedTuple):
    """Maps of a basis: wq (B or 1, H * shared, D, r), wk, wv, uv, c, mu (B or 1, H, ., .)."""

    wq: Array
    wk: Array
    wv: Array
    uv: Array
    c: Array
    mu: Array

    def back(self, n_shared: int, xp: Namespace) -> Array:
        """Map of k' back to keys, (B or 1, H, r, D): what the query heads see of a key, on average."""
        wq = self.wq
        wq = xp.reshape(wq, (wq.shape[0], -1, n_shared, *wq.shape[-2:]))
        return xp.matrix_transpose(xp.mean(wq, axis=2))


class SparseTokens(NamedTuple):
    """The largest entries of what the low rank leaves of each row, (B, H, n, s)."""

    values: Array
    indices: Array


class Segment(NamedTuple):
    """Tokens that were stored under one basis: row j of element b is token ``start[b] + j``."""

    maps: SegmentMaps
    start: Array
    k: Array
    v: Array
    sparse_k: SparseTokens | None
    sparse_v: SparseTokens | None


class Exact(NamedTuple):
    """Tokens kept as they came, (B, H, n_sink + window, .): the first ones, then a ring of the last ones."""

    k: Array
    v: Array


class Recent(NamedTuple):
    """Queries of the tokens in the window (B, H * shared, window, D), and how many tokens came since the last check."""

    q: Array
    since_check: Array


class State(NamedTuple):
    """All arrays of a cache."""

    lengths: Array  # (B,)
    segments: tuple[Segment, ...]
    exact: Exact | None
    recent: Recent | None
    error: Array | None


def is_host(lengths: Array) -> bool:
    """Whether positions are known while Python runs."""
    return isinstance(lengths, np.ndarray)


def namespace_of(lengths: Array) -> Namespace:
    """Namespace to compute positions in."""
    return compat.array_namespace(lengths)


def arange_like(lengths: Array, start: int, stop: int, backend: Backend) -> Array:
    """Return consecutive positions, (1, stop - start)."""
    if is_host(lengths):
        return np.arange(start, stop)[None, :]
    device = backend.creation_device(lengths)
    return backend.xp.arange(start, stop, dtype=lengths.dtype, device=device)[None, :]


def zeros(shape: tuple[int, ...], like: Array, backend: Backend, dtype: DType = None) -> Array:
    """Zeros beside ``like``."""
    dtype = like.dtype if dtype is None else dtype
    return backend.xp.zeros(shape, dtype=dtype, device=backend.creation_device(like))


def grown(buffer: Array, n_rows: int, backend: Backend) -> Array:
    """Make room for so many rows along the second last axis, and for some more."""
    held = buffer.shape[-2]
    if n_rows <= held:
        return buffer
    return with_rows(buffer, max(n_rows, math.ceil(held * GROWTH), LEAST_ROWS), backend)


def with_rows(buffer: Array, n_rows: int, backend: Backend) -> Array:
    """Copy to a buffer with so many rows, no fewer than it has."""
    return copied(buffer, backend.rows_like(buffer, n_rows), backend)


def copied(rows: Array, buffer: Array, backend: Backend) -> Array:
    """Write rows to the beginning of a buffer."""
    n_batch, n_rows = rows.shape[0], rows.shape[-2]
    return backend.put_rows(buffer, rows, np.broadcast_to(np.arange(n_rows), (n_batch, n_rows)))


def arrays_of(state: Any) -> list[Array]:
    """All arrays in a nest of tuples."""
    if state is None:
        return []
    if isinstance(state, tuple):
        return [x for part in state for x in arrays_of(part)]
    return [state]
