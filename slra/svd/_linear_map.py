"""A matrix, or a batch of them, known only by its products: what the algorithms here work on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from slra._backends import Backend
from slra._backends.standard import matrix_h
from slra._typing import Array

__all__ = [
    "LinearMap",
    "brought_in_range",
    "dense_map",
    "power_of_two",
    "scaled_back",
    "scaling_exponent",
]

# Squares of entries within 2**-20 to 2**20 leave the range of no dtype, however many are summed.
_HARMLESS_EXPONENT = 20


@dataclass(frozen=True)
class LinearMap:
    """The products of a matrix ``A`` of shape (..., m, n).

    Attributes
    ----------
    shape
        Shape of ``A``, batch axes first.
    like
        An array of the library, device and dtype that products come in.
    matmat, rmatmat
        ``V -> A V`` and ``U -> A^H U``.
    norm
        Gives the Frobenius norm, in the real wide dtype; None where it is not known.
    dense
        ``A`` itself, where it is an array.
    lost
        Gives the factor by which rounding errors of the products, or of the norm, grew as means were taken from them.
    """

    backend: Backend
    shape: tuple[int, ...]
    like: Array
    matmat: Callable[[Array], Array]
    rmatmat: Callable[[Array], Array]
    norm: Callable[[], Array] | None = None
    dense: Array | None = None
    lost: Callable[[], Array] | None = None

    @property
    def H(self) -> "LinearMap":
        """Conjugate transpose."""
        dense = None if self.dense is None else matrix_h(self.dense, self.backend.xp)
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return replace(self, shape=shape, matmat=self.rmatmat, rmatmat=self.matmat, dense=dense)

    @property
    def is_eager(self) -> bool:
        """Whether values of the products can be looked at."""
        return self.backend.is_eager(self.like)

    def materialize(self) -> Array:
        """Return ``A`` as an array; for a short last axis."""
        if self.dense is not None:
            return self.dense
        device = self.backend.creation_device(self.like)
        eye = self.backend.xp.eye(self.shape[-1], dtype=self.like.dtype, device=device)
        return self.matmat(eye)

    def normal(self, v: Array) -> tuple[Array, Array]:
        """Return ``A v`` and a block that spans what ``A^H A v`` spans; an array may be read once for both."""
        if self.dense is not None:
            return self.backend.normal_product(self.dense, v)
        image = self.matmat(v)
        return image, self.rmatmat(self.backend.qr(image)[0])

    def scaled(self, exponent: Array) -> "LinearMap":
        """Return ``A * 2**exponent`` (one exponent for each matrix), exactly."""
        backend, norm = self.backend, self.norm
        factor = exponent[..., None, None]
        if self.dense is not None:
            return dense_map(power_of_two(self.dense, factor, backend), backend)
        return replace(
            self,
            matmat=lambda v: power_of_two(self.matmat(v), factor, backend),
            rmatmat=lambda u: power_of_two(self.rmatmat(u), factor, backend),
            norm=None if norm is None else lambda: power_of_two(norm(), exponent, backend),
        )


def dense_map(x: Array, backend: Backend) -> LinearMap:
    """Wrap an array."""
    return LinearMap(
        backend,
        tuple(x.shape),
        x,
        matmat=lambda v: backend.product(x, v),
        rmatmat=lambda u: backend.adjoint_product(x, u),
        norm=lambda: backend.xp.sqrt(backend.norm_squared(x)),
        dense=x,
    )


def scaling_exponent(largest: Array, backend: Backend) -> Array | None:
    """Return the exponents that bring entries of modulus ``largest`` near one; None where all are near."""
    # On the host, which has to know anyway.
    sizes = backend.to_numpy(largest)
    is_usual = (sizes > 0) & np.isfinite(sizes)
    exponent = 1 - np.frexp(np.where(is_usual, sizes, 1))[1]
    if not np.any(np.abs(exponent) > _HARMLESS_EXPONENT):
        return None
    return backend.from_numpy(exponent, largest)


def brought_in_range(x: Array, backend: Backend) -> tuple[Array, Array | None]:
    """Scale each matrix of an eager ``x`` so that squares stay in range; also exponents (..., 1, 1), None if it is."""
    if not backend.is_eager(x) or 0 in x.shape:
        return x, None
    exponent = scaling_exponent(backend.max_abs(x), backend)
    if exponent is None:
        return x, None
    exponent = exponent[..., None, None]
    return power_of_two(x, exponent, backend), exponent


def scaled_back(x: Array, exponent: Array | None, backend: Backend) -> Array:
    """Undo `brought_in_range` on a result, which may be the same."""
    return x if exponent is None else power_of_two(x, -exponent, backend)


def power_of_two(x: Array, exponent: Array, backend: Backend) -> Array:
    """Return ``x * 2**exponent``."""
    with backend.ignore_overflow():
        return backend.power_of_two(x, exponent)
