"""CuPy: kernels that read and write each array once.

Needs: cupy (``pip install "slra[cupy]"``) and, to allocate anything, a CUDA device.
"""

import math
from typing import Any

import cupy
import cupyx
import numpy as np

from slra._backends.agnostic import Primitives
from slra._backends.agnostic_attention import SoftmaxState, TileBounds
from slra._backends.cupy_kernels import kernel
from slra._backends.gram_svd import gram_svd
from slra._typing import Array

__all__ = ["CupyPrimitives"]

# One tile of scores over all matrices of a batch, and its width. Not tuned: that takes a GPU.
TILE_BYTES, TILE_WIDTH = 1 << 26, 4096
# Longest side of the matrices whose SVDs cuSOLVER computes in a batch.
LARGEST_IN_BATCH = 32


class CupyPrimitives(Primitives):
    """Overrides for CuPy."""

    takes_half = True

    def cholesky(self, g: Array) -> Array:
        """Wait for the device to say whether it failed, which CuPy does not unless told to."""
        with cupyx.errstate(linalg="raise"):
            return super().cholesky(g)

    def small_svd(self, b: Array) -> tuple[Array, Array, Array]:
        """Solve eigenvalue problems, which go in a batch, where CuPy would take the matrices one by one."""
        if math.prod(b.shape[:-2]) < 2 or max(b.shape[-2:]) <= LARGEST_IN_BATCH:
            return super().small_svd(b)
        return gram_svd(b, self, super().small_svd)

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

    def scaled_group_norm(self, x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
        """Read ``x`` twice, once for the largest modulus."""
        xp = self.xp
        peak = kernel("max_abs", x)(x, axis=axes, keepdims=True)
        unit = xp.where((peak == 0) | xp.isinf(peak), xp.ones_like(peak), peak)
        return unit, kernel("norm", x)(x, unit, axis=axes, keepdims=True)

    def group_threshold(self, x: Array, tau: Array | float, axes: tuple[int, ...]) -> Array:
        """Shorten in one pass, given the norms."""
        unit, norm = self.scaled_group_norm(x, axes)
        return kernel("group_threshold", x)(x, norm, tau / unit)

    def sum_abs(self, x: Array, axis: int | tuple[int, ...] | None) -> Array:
        """Add up moduli as they are read."""
        return kernel("sum_abs", x)(x, axis=axis)

    # Attention: products by cuBLAS, and kernels for all that lies between

    def tile_shape(self, n_matrices: int, like: Array) -> tuple[int, int]:
        """Fill the device with each launch, in memory that does not grow with the length."""
        row = max(1, n_matrices) * TILE_WIDTH * like.dtype.itemsize
        return max(64, TILE_BYTES // row), TILE_WIDTH

    def tile_scores(self, products: Array, bounds: TileBounds) -> Array:
        """Softcap, mask and causal bound in one pass, or none where there is nothing to do."""
        if bounds.mask is None and bounds.options.softcap is None and not bounds.is_cut:
            return products
        prefix, arguments = self._bounds(products, bounds)
        return kernel(f"{prefix}scores", products)(products, *arguments)

    def softmax_step(self, state: SoftmaxState, scores: Array, v: Array) -> SoftmaxState:
        """Read the scores once for maxima and sums, once to exponentiate; rescale and add in one pass."""
        xp = self.xp
        tile_peak = xp.empty(scores.shape[:-1], dtype=scores.dtype)
        tile_total = xp.empty_like(tile_peak)
        kernel("row_sums", scores)(scores, tile_peak, tile_total, axis=-1)
        peak, total, decay = kernel("join", scores)(state.peak, state.total, tile_peak, tile_total)
        weights = kernel("weights", scores)(scores, peak[..., None])
        out = kernel("rescale", scores)(state.out, decay[..., None], weights @ v)
        return SoftmaxState(peak, total, out)

    def tile_gradients(
        self, products: Array, grad_weights: Array, bounds: TileBounds, lse: Array, delta: Array
    ) -> tuple[Array, Array]:
        """Weights and gradient in one pass over the two products."""
        prefix, arguments = self._bounds(products, bounds)
        weights, gradient = kernel(f"{prefix}gradients", products)(
            products, grad_weights, *arguments, lse, delta
        )
        return weights, gradient

    def _bounds(
        self, products: Array, bounds: TileBounds
    ) -> tuple[str, tuple[Any, Any, Any, float]]:
        """Prefix of a kernel's name, and what it is told: mask, column, last column of the row, softcap."""
        xp = self.xp
        mask, options, tile, diagonal = bounds
        prefix, part, column, limit = "", True, 0, 0
        if bounds.is_cut:
            column = xp.arange(tile.left, tile.right, dtype=xp.int32)
            limit = xp.arange(tile.top + diagonal, tile.bottom + diagonal, dtype=xp.int32)[:, None]
        if mask is not None:
            part = tile.of(mask)
            if not xp.isdtype(mask.dtype, "bool"):
                prefix, part = "biased_", xp.astype(part, products.dtype)
        return prefix, (part, column, limit, options.softcap or 0.0)

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """Fetch the values from the device."""
        values: np.ndarray[Any, Any] = cupy.asnumpy(x)
        return values
