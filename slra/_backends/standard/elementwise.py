"""Elementwise functions, thresholds, sums and order in the array API standard."""

import math

from slra._typing import Array, DType, Namespace

__all__ = ["Elementwise"]


class Elementwise:
    """Elementwise functions for one namespace, ``xp``."""

    xp: Namespace

    def is_complex(self, x: Array) -> bool:
        """Whether ``x`` has a complex dtype."""
        return bool(self.xp.isdtype(x.dtype, "complex floating"))

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

    def extrapolate(self, x: Array, move: Array, factor: Array | float) -> Array:
        """Go from ``x`` by ``factor`` times ``move``."""
        return x + factor * move

    def inner(self, x: Array, y: Array, axes: tuple[int, ...] | None = None) -> Array:
        """Real inner product of two arrays of one shape, over all axes or these."""
        xp = self.xp
        if self.is_complex(x):
            return xp.sum(xp.real(x) * xp.real(y) + xp.imag(x) * xp.imag(y), axis=axes)
        return xp.sum(x * y, axis=axes)

    def inner_numbers(self, pairs: list[tuple[Array, Array]]) -> list[float]:
        """Inner products over all axes as plain numbers."""
        return [float(self.inner(x, y)) for x, y in pairs]

    def group_norm(self, x: Array, axes: tuple[int, ...]) -> Array:
        """Euclidean norm along ``axes``, which are kept; scaled, because squares overflow."""
        unit, norm = self.scaled_group_norm(x, axes)
        return unit * norm

    def scaled_group_norm(self, x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
        """Largest modulus along ``axes`` (1 for zero and infinity) and the norm over it; their product may overflow."""
        xp = self.xp
        modulus = xp.abs(x)
        peak = xp.max(modulus, axis=axes, keepdims=True)
        unit = xp.where((peak == 0) | (peak == math.inf), 1.0, peak)
        scaled = modulus / unit
        return unit, xp.sqrt(xp.sum(scaled * scaled, axis=axes, keepdims=True))

    def group_threshold(self, x: Array, tau: Array | float, axes: tuple[int, ...]) -> Array:
        """Shorten each vector along ``axes`` by ``tau``, to no less than zero."""
        unit, norm = self.scaled_group_norm(x, axes)
        return x * (self.at_least(norm - tau / unit, 0.0) / self.xp.where(norm == 0, 1.0, norm))

    def sum_abs(self, x: Array, axis: int | tuple[int, ...] | None) -> Array:
        """Sum of moduli along ``axis``."""
        return self.xp.sum(self.xp.abs(x), axis=axis)

    def top_indices(self, x: Array, k: int) -> Array:
        """Find the ``k`` largest entries along the last axis."""
        return self.xp.argsort(x, axis=-1, descending=True)[..., :k]

    def kth_largest(self, x: Array, k: int) -> Array:
        """Find the ``k``-th largest entry along the last axis, (..., 1)."""
        place = x.shape[-1] - k
        return self.xp.sort(x, axis=-1)[..., place : place + 1]
