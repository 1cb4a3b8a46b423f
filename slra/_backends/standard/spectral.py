"""Derivatives of the soft threshold of singular values, right where values coincide or are zero.

Differentiating through an SVD divides by differences of singular values. The operator itself is smooth there: what
stands in its derivative is a difference quotient of ``f(s) = max(s - tau, 0)``, which has a limit.

Source: M. Michal, A. Lewis, and for rectangular matrices C. Ding, D. Sun, J. Sun, K.-C. Toh, Spectral operators of
matrices, Mathematical Programming 168 (2018), Theorem 3.
"""

from typing import Any, NamedTuple

from slra._typing import Array

__all__ = ["ShrunkSpectrum"]


class ShrunkSpectrum(NamedTuple):
    """Thin SVD of ``x``, (..., m, n), and ``tau``, (..., 1, 1), of whose soft threshold derivatives are asked."""

    U: Array
    S: Array
    Vh: Array
    tau: Array
    backend: Any

    @classmethod
    def of(cls, x: Array, tau: Array, backend: Any) -> "ShrunkSpectrum":
        """Decompose ``x``."""
        U, S, Vh = backend.xp.linalg.svd(x, full_matrices=False)
        return cls(U, S, Vh, tau, backend)

    def value(self) -> Array:
        """``U max(S - tau, 0) V^H``."""
        return (self.U * self._shrunk[..., None, :]) @ self.Vh

    def along(self, direction: Array) -> Array:
        """Return the derivative in a direction; as a map of the direction it is its own adjoint."""
        xp, S, f = self.backend.xp, self.S, self._shrunk
        U, Vh, Uh, V = self.U, self.Vh, self._h(self.U), self._h(self.Vh)
        # Nothing is taken off by a tau of 0, from values of 0 either.
        is_active = self._is_active | (self.tau[..., 0] == 0)
        one, other = is_active[..., :, None], is_active[..., None, :]
        # Of two values above tau the quotient is 1 without a division, of two below it is 0.
        gap = S[..., :, None] - S[..., None, :]
        mixed = xp.where(one == other, xp.ones_like(gap), gap)
        even = xp.where(one & other, 1.0, (f[..., :, None] - f[..., None, :]) / mixed)
        even = xp.where(one | other, even, xp.zeros_like(even))
        total = S[..., :, None] + S[..., None, :]
        odd = self._quotient(f[..., :, None] + f[..., None, :], total, self.tau)
        gain = self._quotient(f, S, self.tau[..., 0])
        rows, columns = Uh @ direction, direction @ V
        D = rows @ V
        skew = (D - self._h(D)) / 2
        core = self._like(even, D) * (D - skew) + self._like(odd, D) * skew
        gain = self._like(gain, D)
        across = gain[..., :, None] * (rows - D @ Vh)
        return U @ (core @ Vh + across) + ((columns - U @ D) * gain[..., None, :]) @ Vh

    def along_tau(self) -> Array:
        """Return the derivative in ``tau``."""
        is_active = self._like(self._is_active, self.U)
        return -((self.U * is_active[..., None, :]) @ self.Vh)

    @property
    def _is_active(self) -> Array:
        return self.tau[..., 0] < self.S

    @property
    def _shrunk(self) -> Array:
        return self.backend.nonneg_threshold(self.S, self.tau[..., 0])

    def _quotient(self, above: Array, below: Array, tau: Array) -> Array:
        """``above / below``; for 0/0 its limit, which is 1 where nothing is taken off and 0 elsewhere."""
        xp = self.backend.xp
        limit = xp.astype(tau == 0, below.dtype) * xp.ones_like(below)
        return xp.where(below == 0, limit, above / xp.where(below == 0, xp.ones_like(below), below))

    def _h(self, a: Array) -> Array:
        return self.backend.conj(self.backend.xp.matrix_transpose(a))

    def _like(self, a: Array, like: Array) -> Array:
        return self.backend.xp.astype(a, like.dtype)
