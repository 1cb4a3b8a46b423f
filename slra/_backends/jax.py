"""JAX: traced arrays have no values, and uncommitted ones no device of their own.

Needs: jax. Under jit, grad and vmap nothing here looks at a value.
"""

import functools
from collections.abc import Callable
from functools import cache
from typing import Any

import jax

from slra._backends.jax_attention import scanned_attention
from slra._backends.standard import Backend, ScoreOptions
from slra._backends.standard.hidden import Attend, finite_parts, is_same_for_all, marks
from slra._backends.standard.sparse import index_dtype
from slra._backends.standard.spectral import ShrunkSpectrum
from slra._typing import Array

__all__ = ["JaxBackend"]


@cache
def _register_node(kind: type, take: Callable[[Any], Any], make: Callable[..., Any]) -> None:
    jax.tree_util.register_pytree_node(kind, take, make)


@cache
def _register(kind: type, arrays: tuple[str, ...], static: tuple[str, ...]) -> None:
    jax.tree_util.register_dataclass(kind, data_fields=arrays, meta_fields=static)


_reshape = jax.jit(jax.numpy.reshape, static_argnums=1)


@jax.custom_batching.custom_vmap  # type: ignore[untyped-decorator]
def _all_finite(arrays: tuple[Array, ...]) -> Array:
    found = [jax.numpy.all(jax.numpy.isfinite(x)) for x in arrays]
    return functools.reduce(jax.numpy.logical_and, found)


@_all_finite.def_vmap  # type: ignore[untyped-decorator]
def _all_finite_in_batch(
    size: int, is_batched: Any, arrays: tuple[Array, ...]
) -> tuple[Array, bool]:
    """One answer for the batch: of one for each, jax.vmap would make both branches of a condition."""
    return _all_finite(arrays), False


class JaxBackend(Backend):
    """Overrides for JAX."""

    is_functional = True

    def is_eager(self, x: Array) -> bool:
        """Tracers (jit, grad, vmap) cannot be read."""
        return not isinstance(x, jax.core.Tracer)

    def freezes_draws(self, x: Array) -> bool:
        """Say whether ``x`` is traced: a NumPy draw is not."""
        return isinstance(x, jax.core.Tracer)

    def copied(self, x: Array) -> Array:
        """Return ``x``: nothing writes to an array of JAX."""
        return x

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

    def accumulation_dtype(self, like: Array) -> Any:
        """Stay in single precision unless double is enabled."""
        return super().accumulation_dtype(like) if jax.config.jax_enable_x64 else like.dtype

    def make_dataclass(self, kind: type, arrays: dict[str, Array], static: dict[str, Any]) -> Any:
        """Make the dataclass a pytree, whose plain values are part of its structure."""
        _register(kind, tuple(arrays), tuple(static))
        return kind(**arrays, **static)

    def make_pytree(self, kind: type, take: Callable[[Any], Any], make: Callable[..., Any]) -> None:
        """Register the class, once."""
        _register_node(kind, take, make)

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Compile: outside of a compiled function JAX takes four times as long to start a reshape."""
        return jax.numpy.reshape(x, shape) if self.freezes_draws(x) else _reshape(x, shape)

    def put_rows(self, buffer: Array, rows: Array, places: Array) -> Array:
        """Scatter; in place where a compiled function owns the buffer."""
        places = jax.numpy.asarray(places)
        # A negative index would count from the end; one beyond it is dropped.
        places = jax.numpy.where(places < 0, buffer.shape[-2], places)
        element = jax.numpy.arange(buffer.shape[0])[:, None]
        rows = jax.numpy.swapaxes(rows, 1, 2).astype(buffer.dtype)
        return buffer.at[element, :, places, :].set(rows, mode="drop")

    def add_in_rows(self, x: Array, indices: Array, values: Array) -> Array:
        """Scatter."""
        sums = jax.numpy.take_along_axis(x, indices, axis=-1) + values
        return jax.numpy.put_along_axis(x, indices, sums, axis=-1, inplace=False)

    def modulus(self, x: Array) -> Array:
        """Multiply by the sign: its gradient at 0 is 0, where that of ``jax.numpy.abs`` is 1."""
        if self.is_complex(x):
            return super().modulus(x)
        return x * jax.lax.stop_gradient(jax.numpy.sign(x))

    def sum_abs(self, x: Array, axis: int | tuple[int, ...] | None) -> Array:
        """Sum moduli with that gradient."""
        return self.total(self.modulus(x), axis)

    def singular_values(self, x: Array) -> Array:
        """Without a QR, whose derivative needs full rank; this one needs no vectors."""
        return jax.numpy.linalg.svd(x, compute_uv=False)

    def is_differentiated(self, x: Array) -> bool:
        """Any tracer may be one of a derivative."""
        return isinstance(x, jax.core.Tracer)

    def shrink_spectrum(
        self, x: Array, tau: Array, function: Callable[[Array, Array], Array]
    ) -> Array:
        """Give it a rule of its own for tangents, which JAX transposes."""
        shrink = jax.custom_jvp(function)

        def rule(primals: Any, tangents: Any) -> Any:
            spectrum = ShrunkSpectrum.of(primals[0], primals[1], self)
            move, step = tangents
            return spectrum.value(), spectrum.along(move) + step * spectrum.along_tau()

        shrink.defjvp(rule)
        return shrink(x, tau)

    @property
    def place_dtype(self) -> Any:
        """Without 64-bit numbers, 32 bits."""
        return jax.numpy.int64 if jax.config.jax_enable_x64 else jax.numpy.int32

    def heeded(
        self,
        attend: Attend,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None,
        options: ScoreOptions,
    ) -> tuple[Array, Any]:
        """Traced under a mask with rows and columns, look for NaN where not all is finite."""
        arrays = (q, k, v)
        if is_same_for_all(mask) or all(map(self.is_eager, arrays)):
            return super().heeded(attend, q, k, v, mask, options)
        out, lse = attend(*finite_parts(self, *arrays), mask, options)
        q, k, v, mask = jax.tree.map(jax.lax.stop_gradient, (*arrays, mask))

        def mark() -> tuple[Array, Array]:
            return marks(self, q, k, v, mask, options)

        def leave() -> tuple[Array, Array]:
            out, lse = (jax.numpy.zeros(x.shape, x.dtype) for x in jax.eval_shape(mark))
            return out, lse

        added, added_lse = jax.lax.cond(_all_finite((q, k, v)), leave, mark)
        return out + added, None if lse is None else lse + added_lse

    def attention(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
    ) -> tuple[Array, Array]:
        """Scan over the tiles: time to compile does not grow with the lengths."""
        out, lse = scanned_attention(q, k, v, mask, options=options)
        return out, lse

    def stop_gradient(self, x: Array) -> Array:
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
