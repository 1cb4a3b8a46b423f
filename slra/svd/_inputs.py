"""From what the caller has (array, sparse matrix, operator) to a `LinearMap`, and back to what they expect."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from slra._backends import Backend
from slra._backends.sparse import SparseEntries, SparseProducts, products_of, sparse_products
from slra._typing import Array
from slra._validate import (
    Promoted,
    check_callable,
    check_draws,
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

__all__ = ["NORM_IS_WRONG", "Problem", "check_source", "draw", "near_one", "read"]

# A wrong adjoint misses by the size of a product itself; a right one of an operator that works in lower precision than
# it says, or to the tolerance of an inner solver, by less than this. By the bits of a component.
_ADJOINT_TOLERANCE = {32: 1e-2, 64: 1e-4}
# Products that lose more than one decimal digit to the means are taken in double precision.
_CANCELS = 10

NORM_IS_WRONG = (
    "x.frobenius_norm must be the Frobenius norm of x, got a number that products with x contradict"
)


class Problem(NamedTuple):
    """A matrix in the dtype to compute in, scaled so that squares stay in range.

    ``A`` is the matrix times ``2**exponent`` (None: as it came), less the means of its columns where these are given;
    ``mean`` (..., n) is in the scale of the input. ``test_matrix`` is in the dtype of ``A``.
    """

    A: LinearMap
    exponent: Array | None
    test_matrix: Array | None
    promoted: Promoted
    mean: Array | None = None
    entries: SparseEntries | None = None

    def unscaled(self, S: Array) -> Array:
        """Bring singular values or norms, shape (..., k), back to the scale of the input."""
        if self.exponent is None:
            return S
        return power_of_two(S, -self.exponent[..., None], self.A.backend)


def read(
    x: Any,
    test_matrix: Array | None = None,
    *,
    center: bool = False,
    adjoint: Literal["own", "other", "unused"] = "other",
) -> Problem:
    """Validate ``x`` and wrap it, less the means of its columns where ``center`` says so.

    ``adjoint``: whether the product of an operator with its conjugate transpose is taken, and if so by its other
    function or, of a Hermitian one, by its own.
    """
    found, entries = sparse_products(x), None
    if found is not None or isinstance(x, MatrixOperator):
        A, promoted = _wrap(x, found, test_matrix)
        entries = found and found.entries
        largest = None
        if entries is not None:
            largest = _largest_entry(A, entries)
        elif A.is_eager:
            largest = _probe(A, adjoint)
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
    mean = None
    if center:
        A, mean = centered(A, entries, exponent)
        if exponent is not None:
            mean = power_of_two(mean, -exponent[..., None], A.backend)
    omega = promoted.arrays[1]
    if omega is not None:
        omega = near_one(omega, "test_matrix", A.backend)
    return Problem(A, exponent, omega, promoted, mean, entries)


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
    if found is None or found.entries is None:
        matmat, rmatmat = (
            _of_caller(getattr(x, name), f"x.{name}", n_rows, like, backend)
            for name, n_rows in (("matmat", m), ("rmatmat", n))
        )
    A = LinearMap(backend, (m, n), like, matmat, rmatmat, _norm(source, backend))
    return A, promoted


def _of_caller(
    product: Any, name: str, n_rows: int, like: Array, backend: Backend
) -> Callable[[Array], Array]:
    """Look at what a function of the caller's returns, and share no memory with it.

    It may hand out the same buffer each time, or what it was given, or write to that.
    """
    check_callable(product, name)

    def call(v: Array) -> Array:
        result = product(backend.copied(v))
        check_product(backend, result, (n_rows, v.shape[-1]), name, (like, v))
        result = backend.copied(result)
        if backend.is_eager(result):
            largest = backend.max_abs(result)
            if not bool(backend.xp.isfinite(largest)):
                raise ValueError(f"x must be finite, got NaN or infinity in what {name} returns")
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
    if source.entries is None:
        return None
    values = source.entries.values[None, :]
    if values.shape[-1] == 0:
        return lambda: xp.asarray(0.0, dtype=real, device=device)

    def norm() -> Array:
        largest = backend.max_abs(values)
        largest = xp.where(largest > 0, largest, xp.ones_like(largest))
        return xp.astype(largest, real) * xp.sqrt(backend.norm_squared(values / largest))

    return norm


def _largest_entry(A: LinearMap, entries: SparseEntries) -> Array:
    """Size of the entries of a sparse matrix, which must be finite."""
    backend = A.backend
    check_finite(backend, entries.values, "x")
    if entries.values.shape[0] == 0:
        return backend.xp.zeros((), dtype=backend.real_dtype(A.like.dtype))
    return backend.max_abs(entries.values[None, :])


def _probe(A: LinearMap, adjoint: str) -> Array:
    """Size of the product of an operator with one Gaussian vector; a second one tells whether its adjoint is one."""
    backend = A.backend
    xp = backend.xp
    v = backend.test_matrix((A.shape[-1], 1), 0, A.like)
    image = A.matmat(v)
    largest = backend.max_abs(image)
    if adjoint == "unused" or (adjoint == "own" and A.shape[-1] != A.shape[-2]):
        return largest
    u = backend.test_matrix((A.shape[-2], 1), 1, A.like)
    back = A.matmat(u) if adjoint == "own" else _with_adjoint(A, u)
    size = xp.maximum(largest, backend.max_abs(back))
    image, back = (backend.accumulated(y / xp.where(size > 0, size, 1.0)) for y in (image, back))
    difference = xp.sum(backend.conj(backend.accumulated(u)) * image) - xp.sum(
        backend.conj(back) * backend.accumulated(v)
    )
    # Either sum is about as large as these norms, whatever the matrix.
    scale = xp.sqrt(backend.norm_squared(image)) + xp.sqrt(backend.norm_squared(back))
    allowed = _ADJOINT_TOLERANCE[int(xp.finfo(A.like.dtype).bits)]
    if not bool(xp.abs(difference) <= allowed * scale):
        if adjoint == "own":
            raise ValueError(
                "x must be Hermitian, got an operator that is not: u^H (A v) and (A u)^H v differ"
            )
        raise ValueError(
            "x.rmatmat must multiply by the conjugate transpose of what x.matmat multiplies by, "
            "got another matrix: u^H (A v) and (A^H u)^H v differ"
        )
    return largest


def _with_adjoint(A: LinearMap, u: Array) -> Array:
    try:
        return A.rmatmat(u)
    except (NotImplementedError, AttributeError, TypeError) as error:
        if "what x.rmatmat returns" in str(error) or str(error).startswith("x.rmatmat must"):
            raise
        # SciPy says no more than "'NoneType' object is not callable" where rmatvec was not given.
        raise TypeError(
            "x must have a product with its conjugate transpose (rmatvec or rmatmat of a LinearOperator), "
            f"got {type(error).__name__} from x.rmatmat: {error}"
        ) from error


def centered(
    A: LinearMap, entries: SparseEntries | None, exponent: Array | None
) -> tuple[LinearMap, Array]:
    """Take ``1 mean^H`` from an array, in a copy; from a map, in every product. Also the means, (..., n)."""
    backend = A.backend
    xp, dtype = backend.xp, A.like.dtype
    if A.dense is not None:
        mean = backend.column_means(A.dense)
        return dense_map(backend.centered(A.dense, mean), backend), mean[..., 0, :]
    products, mean = _about_entries(A, entries, exponent) if entries else _about_products(A)
    working = products.like.dtype
    row = xp.astype(mean, working)[None, :]
    column = backend.conj(xp.matrix_transpose(row))

    def matmat(v: Array) -> Array:
        wide = xp.astype(v, xp.result_type(v, working), copy=False)
        return xp.astype(products.matmat(wide) - row @ wide, v.dtype, copy=False)

    def rmatmat(u: Array) -> Array:
        wide = xp.astype(u, xp.result_type(u, working), copy=False)
        total = xp.sum(u, axis=-2, keepdims=True, dtype=backend.accumulation_dtype(u))
        taken = column @ xp.astype(total, wide.dtype, copy=False)
        return xp.astype(products.rmatmat(wide) - taken, u.dtype, copy=False)

    about = replace(products, like=A.like, matmat=matmat, rmatmat=rmatmat)
    return about, xp.astype(mean, dtype, copy=False)


def _about_entries(
    A: LinearMap, entries: SparseEntries, exponent: Array | None
) -> tuple[LinearMap, Array]:
    """Products of a sparse matrix with its norm *about the means*, and the means, all from its stored entries.

    Where products will cancel, as means are large beside deviations, they are those in double precision.
    """
    assert A.norm is not None
    backend, whole, rows = A.backend, A.norm(), entries.widened()
    values = rows.data if exponent is None else power_of_two(rows.data, exponent, backend)
    mean, square = entries.moments(values)
    about = backend.xp.sqrt(square)
    # The rounding errors that grow are those of the dtype of the products.
    own, wide = (float(backend.xp.finfo(x.dtype).eps) for x in (A.like, rows.data))
    growth = _growth(whole, about, wide, backend)
    if bool(growth > _CANCELS):
        A = LinearMap(backend, A.shape, rows.data[:0], *products_of(rows))
        A = A if exponent is None else A.scaled(exponent)
        growth = growth * (wide / own)
    return replace(A, norm=lambda: about, lost=lambda: growth), mean


def _about_products(A: LinearMap) -> tuple[LinearMap, Array]:
    """Products of an operator with its norm *about the means*, and the means: the product with a column of ones.

    The norm is a difference of squares, as nothing else is known.
    """
    backend, m = A.backend, A.shape[-2]
    xp, whole = backend.xp, A.norm
    ones = xp.ones((m, 1), dtype=A.like.dtype, device=backend.creation_device(A.like))
    mean = backend.conj(backend.accumulated(A.rmatmat(ones))[:, 0]) / m
    if whole is None:
        return A, mean
    size, of_means = whole(), xp.sqrt(m * backend.norm_squared(mean[None, :]))
    eps = float(xp.finfo(A.like.dtype).eps)

    def norm() -> Array:
        if bool(of_means > (1 + 1000 * eps) * size):
            raise ValueError(NORM_IS_WRONG)
        square = (size - of_means) * (size + of_means)
        return xp.sqrt(xp.maximum(square, xp.zeros_like(square)))

    # The error of a square is eps times that of the whole norm.
    return replace(A, norm=norm, lost=lambda: _growth(size, norm(), eps**0.5, backend) ** 2), mean


def _growth(whole: Array, about: Array, least: float, backend: Backend) -> Array:
    """Norm of a matrix over that about the means, of which nothing is known below ``least`` of the former."""
    xp = backend.xp
    about = xp.maximum(about, least * whole)
    return whole / xp.where(about > 0, about, xp.ones_like(about))


def check_source(A: LinearMap, rng: Any) -> Any:
    """Return what to draw a test matrix from: a generator of the library's own as it is, anything else as elsewhere."""
    return rng if A.backend.is_own_generator(rng) else check_draws(A.backend, A.like, rng)


def draw(A: LinearMap, width: int, source: Any) -> Array:
    """Draw a test matrix for each element of the batch."""
    if source is None or (A.backend.freezes_draws(A.like) and not isinstance(source, int)):
        raise ValueError(
            "test_matrix must be given, or rng be an int, inside a traced function: "
            "anything else drawn there would become a constant of the compiled code"
        )
    return A.backend.test_matrix((*A.shape[:-2], A.shape[-1], width), source, A.like)
