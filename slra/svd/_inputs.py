"""From what the caller has (array, sparse matrix, operator) to a `LinearMap`, and back to what they expect."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from slra._backends import Backend
from slra._backends.sparse import SparseProducts, sparse_products
from slra._typing import Array
from slra._validate import (
    Promoted,
    check_callable,
    check_finite,
    check_matrix,
    check_operator,
    check_positive,
    check_product,
    promote,
    resolve,
)
from slra.svd._linear_map import (
    LinearMap,
    brought_in_range,
    dense_map,
    power_of_two,
    scaling_exponent,
)
from slra.svd.operator import MatrixOperator

__all__ = ["Problem", "draw", "near_one", "read"]


class Problem(NamedTuple):
    """A matrix in the dtype to compute in, scaled so that squares stay in range.

    ``A`` is the matrix times ``2**exponent`` (None: as it came); ``test_matrix`` is in the dtype of ``A``.
    """

    A: LinearMap
    exponent: Array | None
    test_matrix: Array | None
    promoted: Promoted

    def unscaled(self, S: Array) -> Array:
        """Bring singular values or norms, shape (..., k), back to the scale of the input."""
        if self.exponent is None:
            return S
        return power_of_two(S, -self.exponent[..., None], self.A.backend)


def read(x: Any, test_matrix: Array | None = None, *, center: bool = False) -> Problem:
    """Validate ``x`` and wrap it, less the means of its columns where ``center`` says so."""
    found = sparse_products(x)
    if found is not None or isinstance(x, MatrixOperator):
        A, promoted = _wrap(x, found, test_matrix)
        largest = _largest(A, found) if A.is_eager else None
    else:
        backend = resolve(x=x, optional={"test_matrix": test_matrix})
        check_matrix(x, "x")
        promoted = promote(backend, x=x, test_matrix=test_matrix)
        A = dense_map(promoted.arrays[0], backend)
        largest = backend.max_abs(A.dense) if A.is_eager else None
        if largest is not None:
            # NaN or infinite if any entry is.
            check_finite(backend, largest, "x")
    exponent = None if largest is None else scaling_exponent(largest, A.backend)
    if exponent is not None:
        A = A.scaled(exponent)
    if center:
        A = _centered(A)
    omega = promoted.arrays[1]
    if omega is not None:
        omega = near_one(omega, "test_matrix", A.backend)
    return Problem(A, exponent, omega, promoted)


def near_one(columns: Array, name: str, backend: Backend) -> Array:
    """Scale a matrix, of which only the span counts, so that squares stay in range; raise unless it is finite."""
    if columns.ndim < 2:
        return columns
    check_finite(backend, columns, name)
    return brought_in_range(columns, backend)[0]


def _wrap(
    x: Any, found: SparseProducts | None, test_matrix: Array | None
) -> tuple[LinearMap, Promoted]:
    """Wrap a sparse matrix or an operator."""
    source = x if found is None else found
    like = source.like
    named = {"x.like" if found is None else "x": like}
    backend = resolve(**named, optional={"test_matrix": test_matrix})
    check_operator(backend, x.shape, like)
    promoted = promote(backend, x=like, test_matrix=test_matrix)
    matmat, rmatmat, (m, n) = source.matmat, source.rmatmat, map(int, x.shape)
    if found is None:
        matmat, rmatmat = (
            _checked(getattr(x, name), f"x.{name}", n_rows, backend)
            for name, n_rows in (("matmat", m), ("rmatmat", n))
        )
    A = LinearMap(backend, (m, n), like, matmat, rmatmat, _norm(source, backend))
    return A, promoted


def _checked(product: Any, name: str, n_rows: int, backend: Backend) -> Callable[[Array], Array]:
    """Look at what a function of the caller's returns."""
    check_callable(product, name)

    def call(v: Array) -> Array:
        result = product(v)
        check_product(backend, result, (n_rows, v.shape[-1]), name)
        return result

    return call


def _norm(source: MatrixOperator | SparseProducts, backend: Backend) -> Callable[[], Array] | None:
    """Give a function for the Frobenius norm, if there is a way to know it."""
    xp, device = backend.xp, backend.creation_device(source.like)
    real = backend.real_dtype(backend.accumulation_dtype(source.like))
    if isinstance(source, MatrixOperator):
        if source.frobenius_norm is None:
            return None
        given = check_positive(source.frobenius_norm, "x.frobenius_norm", allow_zero=True)
        return lambda: xp.asarray(given, dtype=real, device=device)
    if source.values is None:
        return None
    values = source.values[None, :]
    if values.shape[-1] == 0:
        return lambda: xp.asarray(0.0, dtype=real, device=device)

    def norm() -> Array:
        largest = backend.max_abs(values)
        largest = xp.where(largest > 0, largest, xp.ones_like(largest))
        return xp.astype(largest, real) * xp.sqrt(backend.norm_squared(values / largest))

    return norm


def _largest(A: LinearMap, source: Any) -> Array:
    """Size of the entries; of an operator, that of its product with one Gaussian vector."""
    backend = A.backend
    values = source.values if isinstance(source, SparseProducts) else None
    if values is not None:
        check_finite(backend, values, "x")
        if values.shape[0] == 0:
            return backend.xp.zeros((), dtype=backend.real_dtype(A.like.dtype))
        return backend.max_abs(values[None, :])
    vector = backend.test_matrix((A.shape[-1], 1), 0, A.like)
    product = A.matmat(vector)
    if not bool(backend.xp.all(backend.xp.isfinite(product))):
        raise ValueError("x must be finite, got NaN or infinity in a product with it")
    return backend.max_abs(product)


def _centered(A: LinearMap) -> LinearMap:
    """Take ``1 mean^H`` from an array, in a copy; from a map, in every product."""
    backend = A.backend
    xp, m = backend.xp, A.shape[-2]
    if A.dense is not None:
        return dense_map(backend.centered(A.dense), backend)
    ones = xp.ones((m, 1), dtype=A.like.dtype, device=backend.creation_device(A.like))
    mean, whole = A.rmatmat(ones) / m, A.norm

    def norm() -> Array:
        assert whole is not None
        square = whole() ** 2 - m * backend.norm_squared(mean)
        return xp.sqrt(xp.maximum(square, xp.zeros_like(square)))

    return replace(
        A,
        matmat=lambda v: A.matmat(v) - backend.adjoint_product(mean, v),
        rmatmat=lambda u: A.rmatmat(u) - mean @ xp.sum(u, axis=-2, keepdims=True),
        norm=None if whole is None else norm,
    )


def draw(A: LinearMap, width: int, source: np.random.Generator | int | None) -> Array:
    """Draw a test matrix for each element of the batch."""
    if source is None or (
        A.backend.freezes_draws(A.like) and isinstance(source, np.random.Generator)
    ):
        raise ValueError(
            "test_matrix must be given, or rng be an int, inside a traced function: "
            "anything else drawn there would become a constant of the compiled code"
        )
    return A.backend.test_matrix((*A.shape[:-2], A.shape[-1], width), source, A.like)
