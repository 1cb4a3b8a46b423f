"""A matrix, or a batch of them, known only by its products: what the algorithms here work on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from slra._backends import Primitives
from slra._backends.agnostic import matrix_h
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
    """

    table: Primitives
    shape: tuple[int, ...]
    like: Array
    matmat: Callable[[Array], Array]
    rmatmat: Callable[[Array], Array]
    norm: Callable[[], Array] | None = None
    dense: Array | None = None

    @property
    def H(self) -> "LinearMap":
        """Conjugate transpose."""
        dense = None if self.dense is None else matrix_h(self.dense, self.table.xp)
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return replace(self, shape=shape, matmat=self.rmatmat, rmatmat=self.matmat, dense=dense)

    @property
    def is_eager(self) -> bool:
        """Whether values of the products can be looked at."""
        return self.table.is_eager(self.like)

    def materialize(self) -> Array:
        """Return ``A`` as an array; for a short last axis."""
        if self.dense is not None:
            return self.dense
        device = self.table.creation_device(self.like)
        eye = self.table.xp.eye(self.shape[-1], dtype=self.like.dtype, device=device)
        return self.matmat(eye)

    def normal(self, v: Array) -> tuple[Array, Array]:
        """Return ``A v`` and a block that spans what ``A^H A v`` spans; an array may be read once for both."""
        if self.dense is not None:
            return self.table.normal_product(self.dense, v)
        image = self.matmat(v)
        return image, self.rmatmat(self.table.qr(image)[0])

    def scaled(self, exponent: Array) -> "LinearMap":
        """Return ``A * 2**exponent`` (one exponent for each matrix), exactly."""
        table, norm = self.table, self.norm
        factor = exponent[..., None, None]
        if self.dense is not None:
            return dense_map(power_of_two(self.dense, factor, table), table)
        return replace(
            self,
            matmat=lambda v: power_of_two(self.matmat(v), factor, table),
            rmatmat=lambda u: power_of_two(self.rmatmat(u), factor, table),
            norm=None if norm is None else lambda: power_of_two(norm(), exponent, table),
        )


def dense_map(x: Array, table: Primitives) -> LinearMap:
    """Wrap an array."""
    return LinearMap(
        table,
        tuple(x.shape),
        x,
        matmat=lambda v: table.product(x, v),
        rmatmat=lambda u: table.adjoint_product(x, u),
        norm=lambda: table.xp.sqrt(table.norm_squared(x)),
        dense=x,
    )


def scaling_exponent(largest: Array, table: Primitives) -> Array | None:
    """Return the exponents that bring entries of modulus ``largest`` near one; None where all are near."""
    xp = table.xp
    is_usual = (largest > 0) & xp.isfinite(largest)
    positive = xp.where(is_usual, largest, xp.ones_like(largest))
    exponent = -xp.floor(xp.log2(positive))
    return exponent if bool(xp.any(xp.abs(exponent) > _HARMLESS_EXPONENT)) else None


def brought_in_range(x: Array, table: Primitives) -> tuple[Array, Array | None]:
    """Scale each matrix of an eager ``x`` so that squares stay in range; also exponents (..., 1, 1), None if it is."""
    if not table.is_eager(x) or 0 in x.shape:
        return x, None
    exponent = scaling_exponent(table.max_abs(x), table)
    if exponent is None:
        return x, None
    exponent = exponent[..., None, None]
    return power_of_two(x, exponent, table), exponent


def scaled_back(x: Array, exponent: Array | None, table: Primitives) -> Array:
    """Undo `brought_in_range` on a result, which may be the same."""
    return x if exponent is None else power_of_two(x, -exponent, table)


def power_of_two(x: Array, exponent: Array, table: Primitives) -> Array:
    """Return ``x * 2**exponent``, in two steps so that neither factor leaves the range."""
    xp = table.xp
    half = xp.floor(exponent / 2)
    with table.quietly():
        for part in (half, exponent - half):
            x = x * xp.astype(xp.pow(xp.full_like(part, 2.0), part), x.dtype)
    return x
