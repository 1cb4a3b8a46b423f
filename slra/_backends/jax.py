"""JAX: traced arrays have no values, and uncommitted ones no device of their own.

Needs: jax. Under jit, grad and vmap nothing here looks at a value.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.scipy.linalg

from slra._backends.agnostic import Primitives, ScoreOptions
from slra._backends.agnostic_sparse import index_dtype
from slra._backends.jax_attention import scanned_attention
from slra._typing import Array

__all__ = ["JaxPrimitives"]


@cache
def _register(kind: type, arrays: tuple[str, ...], static: tuple[str, ...]) -> None:
    jax.tree_util.register_dataclass(kind, data_fields=arrays, meta_fields=static)


class JaxPrimitives(Primitives):
    """Overrides for JAX."""

    def is_eager(self, x: Array) -> bool:
        """Tracers (jit, grad, vmap) cannot be read."""
        return not isinstance(x, jax.core.Tracer)

    def freezes_draws(self, x: Array) -> bool:
        """Say whether ``x`` is traced: a NumPy draw is not."""
        return isinstance(x, jax.core.Tracer)

    def device(self, x: Array) -> Any:
        """Only a committed array insists on where it is."""
        if isinstance(x, jax.core.Tracer) or not x.committed:
            return None
        return frozenset(x.devices())

    def creation_device(self, like: Array) -> Any:
        """Beside a traced or sharded array stay uncommitted: JAX then moves it where it is needed."""
        if isinstance(like, jax.core.Tracer) or len(like.devices()) > 1:
            return None
        return like.device

    def wide(self, like: Array) -> Any:
        """Stay in single precision unless double is enabled."""
        return super().wide(like) if jax.config.jax_enable_x64 else like.dtype

    def record(self, kind: type, arrays: dict[str, Array], static: dict[str, Any]) -> Any:
        """Make the dataclass a pytree, whose plain values are part of its structure."""
        _register(kind, tuple(arrays), tuple(static))
        return kind(**arrays, **static)

    def solve_triangular(self, a: Array, b: Array, *, lower: bool) -> Array:
        """Solve by substitution."""
        return jax.scipy.linalg.solve_triangular(a, b, lower=lower)

    def sum_abs(self, x: Array, axis: int | tuple[int, ...] | None) -> Array:
        """Sum x * sign(x): its gradient at 0 is 0, where that of ``jax.numpy.abs`` is 1."""
        if self.is_complex(x):
            return super().sum_abs(x, axis)
        return jax.numpy.sum(x * jax.lax.stop_gradient(jax.numpy.sign(x)), axis=axis)

    def attention(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
    ) -> tuple[Array, Array]:
        """Scan over the tiles: time to compile does not grow with the lengths."""
        out, lse = scanned_attention(q, k, v, mask, options=options)
        return out, lse

    def constant(self, x: Array) -> Array:
        """Stop the gradient."""
        return jax.lax.stop_gradient(x)

    def scan(
        self, advance: Callable[[Any], tuple[Any, tuple[Array, ...]]], state: Any, length: int
    ) -> tuple[Any, tuple[Array, ...]]:
        """One compiled loop, not unrolled."""
        final, shown = jax.lax.scan(lambda carry, _: advance(carry), state, length=length)
        return final, shown

    def largest_in_rows(self, x: Array, k: int) -> tuple[Array, Array]:
        """Select instead of sorting."""
        indices = jax.numpy.sort(jax.lax.top_k(jax.numpy.abs(x), k)[1], axis=-1)
        values = jax.numpy.take_along_axis(x, indices, axis=-1)
        return values, indices.astype(index_dtype(jax.numpy, x.shape[-1]))
