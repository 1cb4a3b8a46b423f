"""CuPy: kernels that read and write each array once.

Needs: cupy (``pip install "slra[cupy]"``) and, to allocate anything, a CUDA device.
"""

from slra._backends.agnostic import Primitives
from slra._backends.cupy_kernels import kernel
from slra._typing import Array

__all__ = ["CupyPrimitives"]


class CupyPrimitives(Primitives):
    """Overrides for CuPy."""

    def soft_threshold(self, x: Array, tau: Array | float) -> Array:
        """Shrink in one pass."""
        return kernel("soft_threshold", x)(x, tau)

    def soft_threshold_step(
        self, x: Array, grad: Array, step: Array | float, tau: Array | float
    ) -> Array:
        """Step and shrink in one pass: three accesses an entry instead of a dozen."""
        return kernel("soft_threshold_step", x)(x, grad, step, step * tau)

    def nonneg_threshold(self, x: Array, tau: Array | float) -> Array:
        """Subtract and cut off in one pass."""
        return kernel("nonneg_threshold", x)(x, tau)

    def elastic_threshold(self, x: Array, tau: Array | float, l2: float) -> Array:
        """Shrink and divide in one pass."""
        return kernel("elastic_threshold", x)(x, tau, 1 + tau * l2)

    def extrapolate(self, x: Array, move: Array, factor: Array | float) -> Array:
        """Scale and add in one pass."""
        return kernel("extrapolate", x)(x, move, factor)

    def sum_abs(self, x: Array, axis: int | tuple[int, ...] | None) -> Array:
        """Add up moduli as they are read."""
        return kernel("sum_abs", x)(x, axis=axis)
