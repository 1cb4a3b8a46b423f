"""NumPy: results written in place, triangular solves by LAPACK.

Needs: numpy, scipy. Reads its input only, which may be read-only.
"""

import numpy as np
import scipy.linalg

from slra._backends import numpy_attention
from slra._backends.agnostic import Primitives, ScoreOptions
from slra._typing import Array

__all__ = ["NumpyPrimitives"]


class NumpyPrimitives(Primitives):
    """Overrides for NumPy."""

    def refusal(self, x: Array) -> str | None:
        """Refuse masked arrays: their arithmetic is not an array's."""
        if isinstance(x, np.ma.MaskedArray):
            return "a masked array, whose mask would be lost; fill it first"
        return None

    def solve_triangular(self, a: Array, b: Array, *, lower: bool) -> Array:
        """Solve by substitution (LAPACK trtrs)."""
        return scipy.linalg.solve_triangular(a, b, lower=lower, check_finite=False)

    def soft_threshold(self, x: Array, tau: Array | float) -> Array:
        """Clip and subtract, in one new array."""
        if self.is_complex(x):
            return super().soft_threshold(x, tau)
        out = np.clip(x, -tau, tau)
        return np.subtract(x, out, out=out)

    def attention(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
    ) -> tuple[Array, Array]:
        """Tiles in place, on several threads."""
        return numpy_attention.attention(q, k, v, mask, options)

    def attention_vjp(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None,
        options: ScoreOptions,
        lse: Array,
        delta: Array,
        grad_out: Array,
    ) -> tuple[Array, Array, Array]:
        """Tiles in place, on several threads."""
        return numpy_attention.attention_vjp(q, k, v, mask, options, lse, delta, grad_out)
