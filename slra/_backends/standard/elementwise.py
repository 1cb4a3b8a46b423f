"""Elementwise functions, thresholds, sums and order in the array API standard."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from slra._typing import Array, DType, Namespace

__all__ = ["Elementwise", "FloatFormat"]

# Of more numbers than this, one after the other in single precision, rounding may take four digits of seven.
MANY = 1 << 12


class FloatFormat(NamedTuple):
    """What decides whether, and in which dtype, numbers are computed with."""

    is_complex: bool
    bits: int  # of a component


class Elementwise:
    """Elementwise functions for one namespace, ``xp``."""

    xp: Namespace

    def is_complex(self, x: Array) -> bool:
        """Whether ``x`` has a complex dtype."""
        return bool(self.xp.isdtype(x.dtype, "complex floating"))

    def float_format(self, dtype: DType) -> FloatFormat | None:
        """Format of a floating dtype; None for others, those outside of the standard too."""
        xp = self.xp
        try:
            is_complex = bool(xp.isdtype(dtype, "complex floating"))
            if not is_complex and not xp.isdtype(dtype, "real floating"):
                return None
        except TypeError:  # such as NumPy's strings and records
            return None
        return FloatFormat(is_complex, xp.finfo(dtype).bits)

    def real_dtype(self, dtype: DType) -> DType:
        """Real dtype of the same precision."""
        xp = self.xp
        # By comparison: a NumPy dtype and its scalar type are equal, but do not hash alike.
        if dtype == xp.complex64:
            return xp.float32
        return xp.float64 if dtype == xp.complex128 else dtype

    def at_least(self, x: Array, low: Array | float) -> Array:
        """Maximum of ``x`` and an array or a number."""
        return self.xp.maximum(x, low)

    def at_most(self, x: Array, high: Array | float) -> Array:
        """Minimum of ``x`` and an array or a number."""
        return self.xp.minimum(x, high)

    def real_part(self, x: Array) -> Array:
        """Real part, of a real array too."""
        return self.xp.real(x) if self.is_complex(x) else x

    def conj(self, x: Array) -> Array:
        """Complex conjugate, of a real array too."""
        return self.xp.conj(x) if self.is_complex(x) else x

    def modulus(self, x: Array) -> Array:
        """Modulus of each entry, whose gradient at 0 is 0."""
        return self.xp.abs(x)

    def stop_gradient(self, x: Array) -> Array:
        """``x`` as a constant, to libraries that differentiate."""
        return x

    def soft_threshold(self, x: Array, tau: Array | float) -> Array:
        """Shrink the modulus of each entry by ``tau``, to no less than zero."""
        xp = self.xp
        if not self.is_complex(x):
            return x - xp.minimum(xp.maximum(x, -tau), tau)
        modulus = xp.abs(x)
        shrunk = xp.maximum(modulus - tau, xp.zeros_like(modulus))
        return x * (shrunk / xp.where(modulus == 0, xp.ones_like(modulus), modulus))

    def soft_threshold_step(
        self, x: Array, grad: Array, step: Array | float, tau: Array | float
    ) -> Array:
        """Step against a gradient, then soft-threshold by ``step * tau``."""
        return self.soft_threshold(x - step * grad, step * tau)

    def nonneg_threshold(self, x: Array, tau: Array | float) -> Array:
        """Take ``tau`` off each entry, down to no less than zero."""
        return self.at_least(x - tau, 0.0)

    def elastic_threshold(self, x: Array, tau: Array | float, l2: float) -> Array:
        """Soft-threshold by ``tau``, then divide by ``1 + tau * l2``."""
        return self.soft_threshold(x, tau) / (1 + tau * l2)

    def nonneg_threshold_step(
        self, x: Array, grad: Array, step: Array | float, tau: Array | float
    ) -> Array:
        """Step against a gradient, then take off ``step * tau``, down to no less than zero."""
        return self.nonneg_threshold(x - step * grad, step * tau)

    def elastic_threshold_step(
        self, x: Array, grad: Array, step: Array | float, tau: Array | float, l2: float
    ) -> Array:
        """Step against a gradient, then `elastic_threshold` by ``step * tau``."""
        return self.elastic_threshold(x - step * grad, step * tau, l2)

    def power_of_two(self, x: Array, exponent: Array) -> Array:
        """``x * 2**exponent`` for whole exponents, in two steps so that neither factor leaves the range."""
        xp, half = self.xp, self.xp.floor(exponent / 2)
        for part in (half, exponent - half):
            x = x * xp.astype(xp.pow(xp.full_like(part, 2.0), part), x.dtype)
        return x

    def extrapolate(self, x: Array, move: Array, factor: Array | float) -> Array:
        """Go from ``x`` by ``factor`` times ``move``."""
        return x + factor * move

    def as_vectors(self, x: Array, axes: tuple[int, ...]) -> tuple[Array, Callable[[Array], Array]]:
        """``x`` with ``axes`` as one axis, the last, and what puts them back."""
        xp = self.xp
        order = tuple(a for a in range(x.ndim) if a not in axes) + axes
        moved = xp.permute_dims(x, order)
        back = tuple(sorted(range(x.ndim), key=order.__getitem__))
        length = math.prod(x.shape[a] for a in axes)
        flat = xp.reshape(moved, (*moved.shape[: x.ndim - len(axes)], length))
        return flat, lambda y: xp.permute_dims(xp.reshape(y, moved.shape), back)

    def take_places(self, x: Array, places: np.ndarray[Any, Any]) -> Array:
        """Entries along the last axis at places that are known on the host."""
        return self.xp.take(x, self.xp.asarray(places, device=self.creation_device(x)), axis=-1)

    def creation_device(self, like: Array) -> Any:
        """Device to create an array on that is to meet ``like``."""
        raise NotImplementedError

    def inner(self, x: Array, y: Array, axes: tuple[int, ...] | None = None) -> Array:
        """Real inner product of two arrays of one shape, over all axes or these."""
        xp = self.xp
        if self.is_complex(x):
            return xp.sum(xp.real(x) * xp.real(y) + xp.imag(x) * xp.imag(y), axis=axes)
        return xp.sum(x * y, axis=axes)

    def inner_numbers(self, pairs: list[tuple[Array, Array]]) -> list[float]:
        """Inner products over all axes as plain numbers."""
        return [float(self.inner(x, y)) for x, y in pairs]

    def step_products(
        self, y: Array, slope: Array, new: Array, grad: Array, move: Array, factor: float
    ) -> list[float]:
        """Squared norms, and two products, by which a step from ``y`` to ``new`` is judged.

        With ``d = new - y``, ``turn = grad - slope`` and ``r = turn + factor * d``: the squares of ``d``, ``turn``,
        ``r``, ``grad`` and ``new``, and the products of ``d`` with ``turn`` and with ``move``.
        """
        d, turn = new - y, grad - slope
        r = self.extrapolate(turn, d, factor)
        pairs = [(d, d), (turn, turn), (r, r), (grad, grad), (new, new), (d, turn), (d, move)]
        return self.inner_numbers(pairs)

    def group_norm(self, x: Array, axes: tuple[int, ...]) -> Array:
        """Euclidean norm along ``axes``, which are kept; scaled, because squares overflow."""
        unit, norm = self.scaled_group_norm(x, axes)
        return unit * norm

    def scaled_group_norm(self, x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
        """Largest modulus along ``axes`` (1 for zero and infinity) and the norm over it; their product may overflow."""
        xp = self.xp
        modulus = xp.abs(x)
        peak = self.stop_gradient(xp.max(modulus, axis=axes, keepdims=True))
        is_zero = peak == 0
        unit = xp.where(is_zero | (peak == math.inf), 1.0, peak)
        scaled = modulus / unit
        square = self.total(scaled * scaled, axes, keepdims=True)
        # The root has no derivative at 0, and what autodiff makes of it survives a choice of the result: choose before.
        norm = xp.sqrt(xp.where(is_zero, xp.ones_like(square), square))
        return unit, xp.where(is_zero, xp.zeros_like(norm), norm)

    def group_threshold(self, x: Array, tau: Array | float, axes: tuple[int, ...]) -> Array:
        """Shorten each vector along ``axes`` by ``tau``, to no less than zero."""
        unit, norm = self.scaled_group_norm(x, axes)
        # A vector of zeros stays as it is; by the gain that is the limit, for the derivative.
        gain = self.at_least(norm - tau / unit, 0.0) / self.xp.where(norm == 0, 1.0, norm)
        if isinstance(tau, float):
            return x * (gain if tau else self.xp.where(norm == 0, 1.0, gain))
        return x * self.xp.where((norm == 0) & (tau == 0), 1.0, gain)

    def sum_abs(self, x: Array, axis: int | tuple[int, ...] | None) -> Array:
        """Sum of moduli along ``axis``."""
        return self.total(self.xp.abs(x), axis)

    def total(
        self, x: Array, axis: int | tuple[int, ...] | None, *, keepdims: bool = False
    ) -> Array:
        """Sum in the dtype of ``x``; of many numbers, whose roundings would add up, by way of a wider one."""
        wide = self.sum_dtype(x, axis)
        return self.xp.astype(
            self.xp.sum(x, axis=axis, keepdims=keepdims, dtype=wide), x.dtype, copy=False
        )

    def sum_dtype(self, x: Array, axis: int | tuple[int, ...] | None) -> Any:
        """Dtype to add real numbers along ``axis`` up in."""
        axes = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
        # A list: torch.compile follows no generator into math.prod.
        is_many = math.prod([x.shape[a] for a in axes]) > MANY
        return self.accumulation_dtype(x) if is_many else x.dtype

    def accumulation_dtype(self, like: Array) -> Any:
        """Dtype to accumulate sums over ``like`` in."""
        raise NotImplementedError

    def top_indices(self, x: Array, k: int) -> Array:
        """Find the ``k`` largest entries along the last axis."""
        return self.xp.argsort(x, axis=-1, descending=True)[..., :k]

    def kth_largest(self, x: Array, k: int) -> Array:
        """Find the ``k``-th largest entry along the last axis, (..., 1)."""
        place = x.shape[-1] - k
        return self.xp.sort(x, axis=-1)[..., place : place + 1]
