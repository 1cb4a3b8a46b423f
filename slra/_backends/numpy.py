"""NumPy: results written in place, triangular solves by LAPACK.

Needs: numpy, scipy. Reads its input only, which may be read-only.
"""

import numpy as np
import scipy.linalg

from slra._backends.agnostic import Primitives
from slra._typing import Array

__all__ = ["NumpyPrimitives"]


class NumpyPrimitives(Primitives):
    """Overrides for NumPy."""

    def refusal(self, x: Array) -> str | None:
        """Refuse masked arrays: their arithmetic is not an array's."""
        if isinstance(x, np.ma.MaskedArray):
            return "a masked array, whose mask would be lost; fill it first"
        return None

    def gram(self, x: Array, y: Array | None = None) -> Array:
        """Widen a slab at a time, which stays in the cache."""
        return self.gram_by_slabs(x, y)

    def max_abs(self, x: Array) -> Array:
        """Take extremes, not moduli: nothing as large as ``x`` is allocated."""
        parts = [x.real, x.imag] if self.is_complex(x) else [x]
        extremes = [f(part, axis=(-2, -1)) for part in parts for f in (np.max, np.min)]
        return np.max(np.abs(extremes), axis=0)

    def solve_triangular(self, a: Array, b: Array, *, lower: bool) -> Array:
        """Solve by substitution (LAPACK trtrs)."""
        return scipy.linalg.solve_triangular(a, b, lower=lower, check_finite=False)

    def soft_threshold(self, x: Array, tau: Array | float) -> Array:
        """Clip and subtract, in one new array."""
        if self.is_complex(x):
            return super().soft_threshold(x, tau)
        out = np.clip(x, -tau, tau)
        return np.subtract(x, out, out=out)
