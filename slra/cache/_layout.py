"""What never changes about a cache, and what all its parts have in common.

Positions and lengths count tokens. They are NumPy arrays where buffers may grow, and arrays of the caller's library
where the capacity is static, so that they can be traced.

Axes throughout: B batch (all leading axes as one), H key heads, M queries, n keys.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from slra._backends import Backend, backend_of
from slra._backends.standard import ScoreOptions
from slra._typing import Array, DType, Namespace

__all__ = ["ALL", "Layout", "map_arrays", "named_arrays", "on_host", "register", "with_arrays"]

T = TypeVar("T")
# So many chosen tokens are all of them.
ALL = 2**31 - 1


@dataclass(frozen=True)
class Layout:
    """Shapes and options; hashable, as it is part of the structure of a pytree."""

    xp: Namespace
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
    bits: tuple[float, float] | None  # average of a number of the keys, and of the values
    rtol: float | None
    across_heads: bool  # whether all heads share the coordinates that bits are of
    n_top: (
        int | tuple[int, ...] | None
    )  # keys that a query reads in all coordinates, of each key head
    top_p: float | None  # or as few as hold this share of the softmax
    # By so many coordinates of the keys, where it chooses; values that are not chosen count in so many.
    rank_index: tuple[int, int] | None
    index: str  # which of the keys: the "leading" ones, or those largest in the "query"
    score_options: ScoreOptions
    rotary: tuple[float, ...] | None
    drift_bound: float | None
    method: str

    @functools.cached_property
    def backend(self) -> Backend:
        """The backend of the library."""
        return backend_of(self.xp)

    @property
    def n_batch(self) -> int:
        """Product of the leading axes."""
        return math.prod(self.batch)

    @property
    def n_query_heads(self) -> int:
        """Query heads of all key heads."""
        return self.n_heads * self.n_shared

    @property
    def n_coded(self) -> int:
        """Sets of coordinates that a token has in bits: one for each key head, or one for all of them."""
        return 1 if self.across_heads else self.n_heads

    @property
    def n_exact(self) -> int:
        """Tokens kept as they came."""
        return self.n_sink + self.window

    @property
    def is_static(self) -> bool:
        """Whether shapes and dtypes never change, and positions may be traced."""
        return self.capacity is not None and self.backend.is_functional

    @property
    def is_coded(self) -> bool:
        """Whether coordinates are stored in bits."""
        return self.bits is not None or self.rtol is not None

    @property
    def chooses(self) -> bool:
        """Whether each query reads but a few keys in all coordinates that are stored, and has others to choose by."""
        return self.rank_index is not None and any(
            index < rank for index, rank in zip(self.rank_index, self.rank, strict=True)
        )

    @property
    def reads_by_query(self) -> bool:
        """Whether it also chooses by which coordinates of the keys."""
        return self.index == "query"

    @property
    def n_tops(self) -> tuple[int, ...]:
        """The most that a query chooses, for each key head."""
        if isinstance(self.n_top, tuple):
            return self.n_top
        return (ALL if self.n_top is None else self.n_top,) * self.n_heads

    @property
    def n_leading(self) -> tuple[int, int]:
        """Coordinates that stand by themselves: of the keys where these choose, and of the values not chosen."""
        if self.rank_index is None:
            return self.rank
        rank_qk, rank_v = (min(pair) for pair in zip(self.rank_index, self.rank, strict=True))
        return self.rank[0] if self.index == "query" else rank_qk, rank_v

    @property
    def carries_shift(self) -> bool:
        """Whether k' has one more column, of ones: a softcap sees the shift of the keys."""
        is_seen = self.score_options.softcap is not None and self.rotary is None
        return is_seen and not self.across_heads

    def zeros(self, shape: tuple[int, ...], like: Array, dtype: DType = None) -> Array:
        """Zeros beside ``like``."""
        dtype = like.dtype if dtype is None else dtype
        return self.xp.zeros(shape, dtype=dtype, device=self.backend.creation_device(like))

    def arange(self, start: int, stop: int, like: Array) -> Array:
        """Consecutive positions (1, stop - start), of the kind that ``like`` is."""
        if on_host(like):
            return np.arange(start, stop)[None, :]
        device = self.backend.creation_device(like)
        return self.xp.arange(start, stop, dtype=like.dtype, device=device)[None, :]

    def batched(self, x: Array) -> Array:
        """Make the leading axes of an array (..., H, n, f) one."""
        return self.xp.reshape(x, (self.n_batch, *x.shape[-3:]))

    def unbatched(self, x: Array) -> Array:
        """Undo `batched`."""
        return self.xp.reshape(x, (*self.batch, *x.shape[1:]))

    def beside(self, x: Array) -> Array:
        """Lay what heads have of a token side by side, (B, H, n, f) to (B, 1, n, H f), where they share coordinates."""
        if not self.across_heads:
            return x
        x = self.xp.permute_dims(x, (0, 2, 1, 3))
        return self.xp.reshape(x, (x.shape[0], 1, x.shape[1], -1))

    def by_head(self, x: Array) -> Array:
        """Undo `beside`."""
        if not self.across_heads:
            return x
        x = self.xp.reshape(x, (x.shape[0], x.shape[2], self.n_heads, -1))
        return self.xp.permute_dims(x, (0, 2, 1, 3))

    def stack_heads(self, x: Array) -> Array:
        """Make the query heads that share a key head rows of one matrix, (B, H, shared * M, f).

        One product with the keys then serves them all.
        """
        rows = self.n_shared * x.shape[-2]
        return self.xp.reshape(x, (x.shape[0], self.n_heads, rows, x.shape[-1]))

    def unstack_heads(self, x: Array) -> Array:
        """Undo `stack_heads` on an output (B, H, shared * M, f) or a log-sum-exp (B, H, shared * M)."""
        n_rows = x.shape[2] // self.n_shared
        return self.xp.reshape(x, (x.shape[0], self.n_query_heads, n_rows, *x.shape[3:]))

    def attend(self, q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array]:
        """Exact attention of stacked queries and its log-sum-exp, all with axes (B, H, ., .)."""
        return self.backend.attention(q, k, v, mask, self.score_options)

    def relative_error(self, out: Array, exact: Array) -> Array:
        """Frobenius error of outputs (B, H, M, .), relative to the exact ones; (H,)."""
        xp, axes = self.xp, (0, -2, -1)
        error, whole = (xp.sqrt(xp.sum(x * x, axis=axes)) for x in (out - exact, exact))
        return error / xp.where(whole == 0, xp.ones_like(whole), whole)


def on_host(positions: Array) -> bool:
    """Whether positions are known while Python runs."""
    return isinstance(positions, np.ndarray)


def register(backend: Backend) -> None:
    """Let transformations see that a layout holds no arrays; the parts of a cache are tuples, which they know."""
    backend.make_pytree(Layout, _no_arrays, _layout_itself)


def _no_arrays(layout: Layout) -> tuple[tuple[()], Layout]:
    return (), layout


def _layout_itself(layout: Layout, _: tuple[()]) -> Layout:
    return layout


def map_arrays(
    function: Callable[..., Array], x: T, *others: Any, layout: Layout | None = None
) -> T:
    """Apply a function to each array in nested tuples, and to the same ones of others; they may get another layout."""
    given: Any = x
    mapped: Any = given
    if isinstance(given, Layout):
        mapped = layout or given
    elif isinstance(given, tuple):
        same = zip(given, *others, strict=True)
        parts = [map_arrays(function, *one, layout=layout) for one in same]
        mapped = type(given)(*parts) if hasattr(given, "_fields") else tuple(parts)
    elif given is not None:
        mapped = function(given, *others)
    answer: T = mapped
    return answer


def named_arrays(x: Any, name: str = "") -> dict[str, Array]:
    """All arrays in nested tuples, by their paths."""
    if x is None or isinstance(x, Layout):
        return {}
    if not isinstance(x, tuple):
        return {name: x}
    fields, named = getattr(x, "_fields", range(len(x))), dict[str, Array]()
    for field, part in zip(fields, x, strict=True):
        named |= named_arrays(part, f"{name}.{field}".lstrip("."))
    return named


def with_arrays(x: T, named: dict[str, Array], layout: Layout) -> T:
    """Make the same nested tuples of other arrays, by their paths, and of another layout."""
    arrays = iter([named[path] for path in named_arrays(x)])
    return map_arrays(lambda _: next(arrays), x, layout=layout)
