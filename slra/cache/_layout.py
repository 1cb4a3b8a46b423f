"""What never changes about a cache, and what all its parts have in common.

Positions and lengths count tokens. They are NumPy arrays where buffers may grow, and arrays of the caller's library
where the capacity is static, so that they can be traced.

Axes throughout: B batch (all leading axes as one), H key heads, M queries, n keys.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from slra._backends import Backend, backend_of
from slra._backends.standard import ScoreOptions
from slra._typing import Array, DType, Namespace

__all__ = ["Layout", "Part", "named_arrays", "on_host", "register", "with_arrays"]


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
    def n_exact(self) -> int:
        """Tokens kept as they came."""
        return self.n_sink + self.window

    @property
    def is_static(self) -> bool:
        """Whether shapes and dtypes never change, and positions may be traced."""
        return self.capacity is not None and self.backend.is_functional

    @property
    def carries_shift(self) -> bool:
        """Whether k' has one more column, of ones: a softcap sees the shift of the keys."""
        return self.score_options.softcap is not None and self.rotary is None

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


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a cache: arrays and other parts, beside the layout of the whole. It never changes, its arrays may."""

    layout: Layout

    def replace(self, **changes: Any) -> Self:
        """Make another one of the same kind."""
        return dataclasses.replace(self, **changes)

    def fields(self) -> dict[str, Any]:
        """All but the layout."""
        names = [field.name for field in dataclasses.fields(self)][1:]
        return {name: getattr(self, name) for name in names}

    def take_apart(self) -> tuple[tuple[Any, ...], Layout]:
        """Give a transformation what varies and what does not."""
        return tuple(self.fields().values()), self.layout

    @classmethod
    def put_together(cls, layout: Layout, fields: tuple[Any, ...]) -> Self:
        """Undo `take_apart`."""
        return cls(layout, *fields)


def register(backend: Backend) -> None:
    """Let transformations see through the parts."""
    for kind in Part.__subclasses__():
        backend.make_pytree(kind, kind.take_apart, kind.put_together)


def named_arrays(x: Any, name: str = "") -> dict[str, Array]:
    """All arrays of nested parts and tuples, by their paths."""
    if x is None:
        return {}
    if not isinstance(x, (Part, tuple)):
        return {name: x}
    named: dict[str, Array] = {}
    for path, inner in _inside(x, name):
        named |= named_arrays(inner, path)
    return named


def with_arrays(x: Any, named: dict[str, Array], layout: Layout, name: str = "") -> Any:
    """Make the same parts of other arrays, by their paths, and of another layout."""
    if x is None:
        return None
    if not isinstance(x, (Part, tuple)):
        return named[name]
    inner = [with_arrays(inner, named, layout, path) for path, inner in _inside(x, name)]
    if isinstance(x, Part):
        return type(x)(layout, *inner)
    return type(x)(*inner) if hasattr(x, "_fields") else tuple(inner)


def _inside(x: Any, name: str) -> list[tuple[str, Any]]:
    fields = x.fields() if isinstance(x, Part) else dict(enumerate(x))
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        fields = dict(zip(x._fields, x, strict=True))
    return [(f"{name}.{field}".lstrip("."), inner) for field, inner in fields.items()]
