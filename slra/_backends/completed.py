"""Any namespace of the array API, with what it lacks made of what it has.

A library may be of an older standard, without the linalg extension, or without a few functions. What is missing is
then written in others of its functions; linear algebra and sorting of arrays that are small and concrete go to NumPy on
the host. Anything else is a `LackingError`, which says what the library does not have. Nothing is known of its dtypes
and devices but that they compare equal to themselves.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from slra._backends.lacking import LackingError, title
from slra._typing import Array, DType, Namespace

__all__ = ["HOST_ENTRIES", "Completed", "brought", "device_of", "fetched"]

# Of a library without linear algebra or sorting, arrays of up to so many entries go to NumPy on the host.
HOST_ENTRIES = 1 << 20
# Of arrays that offer neither a buffer nor DLPack, so many entries are read one by one.
FEW_ENTRIES = 1 << 12

# Version of the standard that a function came with; from 2024.12 on they take Python numbers beside arrays.
SINCE = {
    "isdtype": "2022.12",
    "take": "2022.12",
    "maximum": "2023.12",
    "minimum": "2023.12",
    "clip": "2023.12",
    "cumulative_sum": "2023.12",
    "searchsorted": "2023.12",
    "moveaxis": "2023.12",
    "repeat": "2023.12",
    "take_along_axis": "2024.12",
    # Always written here: what comes out has the default integer dtype, which a device may not have.
    "count_nonzero": "9999.12",
    "diff": "2024.12",
}
NUMBERS_SINCE = "2024.12"
SUMS = ("sum", "cumulative_sum")
# The operands that may be numbers come first, but in `where`, whose first is a condition.
TAKE_NUMBERS = ("where", "maximum", "minimum", "clip", "pow", "logaddexp", "copysign", "hypot")
LIKE = ("empty_like", "full_like", "ones_like", "zeros_like")
CREATE = ("asarray", "arange", "empty", "eye", "full", "linspace", "ones", "zeros", *LIKE)
ON_HOST = ("sort", "argsort", "searchsorted", "cumulative_sum")
FACTORISATIONS = ("qr", "svd", "eigh", "eigvalsh", "cholesky", "inv")


def device_of(x: Array) -> Any:
    """Device of an array; None where the library has no such thing."""
    try:
        return compat.device(x)
    except AttributeError:
        return None


def fetched(x: Array, xp: Namespace) -> np.ndarray[Any, Any]:
    """Bring an array to NumPy, by whatever it offers.

    Raises
    ------
    LackingError
        Where it offers nothing, such as an array whose values are not known yet.
    """
    reasons = []
    ways: tuple[Callable[[Any], Any], ...] = (
        np.asarray,
        np.from_dlpack,
        functools.partial(_from_default_device, xp=xp),
        _entries,
    )
    for way in ways:
        try:
            found = way(x)
        except Exception as error:  # whatever a library raises: the next way may do
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if found.dtype != object and found.shape == tuple(x.shape):
            return np.asarray(found)
    why = reasons[-1] if reasons else "NumPy makes nothing of it"
    raise LackingError("an array that NumPy can read", xp, f" ({why})")


def _from_default_device(x: Array, xp: Namespace) -> np.ndarray[Any, Any]:
    info = xp.__array_namespace_info__()
    return np.asarray(compat.to_device(x, info.default_device()))


def _entries(x: Array) -> np.ndarray[Any, Any]:
    if math.prod(x.shape) > FEW_ENTRIES:
        raise ValueError(f"more than {FEW_ENTRIES} entries, which would be read one by one")
    flat = [_number(x[index] if index else x) for index in np.ndindex(*x.shape)]
    return np.asarray(flat).reshape(tuple(x.shape))


def _number(x: Array) -> Any:
    try:
        return float(x)
    except TypeError:
        return complex(x)


def brought(a: np.ndarray[Any, Any], dtype: DType, device: Any, xp: Namespace) -> Array:
    """Bring an array of NumPy's to a library."""
    like = {"dtype": dtype} if device is None else {"dtype": dtype, "device": device}
    try:
        found = xp.asarray(a, **like)
        if tuple(found.shape) == a.shape:
            return found
    except (TypeError, ValueError, NotImplementedError):
        pass  # not every library reads NumPy's arrays, but each reads Python's numbers
    flat = xp.asarray(a.reshape(-1).tolist(), **like)
    return xp.reshape(flat, a.shape)


class FloatLimits(NamedTuple):
    """What ``finfo`` says, in Python's numbers: libraries of NumPy's kind give scalars, which not all of them take."""

    bits: int
    eps: float
    max: float
    min: float
    smallest_normal: float
    dtype: DType


class IntegerLimits(NamedTuple):
    """What ``iinfo`` says."""

    bits: int
    max: int
    min: int
    dtype: DType


class Completed:
    """A namespace that has what the core asks for."""

    def __init__(self, xp: Namespace) -> None:
        self._xp = xp
        self._functions: Mapping[str, Callable[..., Any]] = {}
        self._backend: Any = None
        self.__name__ = title(xp)
        self.linalg = _Linalg(self)

    def belongs_to(self, backend: Any) -> None:
        """Call the functions of a backend in place of the library's own, and fetch and bring arrays as it does."""
        self._functions, self._backend = backend.functions, backend

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            return getattr(self._xp, name)
        if name in self._functions:
            return self._functions[name]
        version = self._version()
        is_later = (version or "9999") < SINCE.get(name, "")
        found = None if is_later else getattr(self._xp, name, None)
        if found is None:
            if name in _WRITTEN:
                return functools.partial(_WRITTEN[name], self)
            if name in ON_HOST:
                return functools.partial(_on_host, self, name)
            raise LackingError(f"{name}", self._xp)
        if name in CREATE:
            return functools.partial(_create, found)
        if name in SUMS:
            return functools.partial(_sum, self, found)
        if name in TAKE_NUMBERS and (version is None or version < NUMBERS_SINCE):
            return functools.partial(_with_arrays, self, found, name == "where")
        return found

    def _version(self) -> str | None:
        """Return the standard that the library says it keeps; it may be told to change that while it runs."""
        own = getattr(self._xp, "__array_api_version__", None)
        return own if isinstance(own, str) else None

    def finfo(self, dtype: DType) -> FloatLimits:
        """Range and precision of a floating dtype."""
        own = self._xp.finfo(dtype)
        eps, most = float(own.eps), float(own.max)
        # The exponents of IEEE 754 are as far below 1 as above.
        least = float(getattr(own, "smallest_normal", math.ldexp(1, 2 - math.frexp(most)[1])))
        bits = getattr(own, "bits", None) or (64 if eps < 1e-10 else 32 if eps < 1e-5 else 16)
        return FloatLimits(int(bits), eps, most, float(own.min), least, dtype)

    def iinfo(self, dtype: DType) -> IntegerLimits:
        """Range of an integer dtype."""
        own = self._xp.iinfo(dtype)
        low, high = int(own.min), int(own.max)
        return IntegerLimits((high - low).bit_length(), high, low, dtype)

    @property
    def place_dtype(self) -> DType:
        """Dtype of places in an array, and of counts."""
        return self.int64 if self._backend is None else self._backend.place_dtype

    @property
    def bool(self) -> DType:
        """Named as NumPy did before it could be called ``bool``, where it is."""
        xp = self._xp
        return xp.bool if hasattr(xp, "bool") else xp.bool_

    def with_device(self, x: Array) -> dict[str, Any]:
        """Where to create an array that is to meet ``x``."""
        device = device_of(x)
        return {} if device is None else {"device": device}


class _Linalg:
    """The linalg extension."""

    def __init__(self, whole: Completed) -> None:
        self._whole = whole

    def __getattr__(self, name: str) -> Any:
        whole = self._whole
        if (full := f"linalg.{name}") in whole._functions:
            return whole._functions[full]
        extension = getattr(whole._xp, "linalg", None)
        found = getattr(extension, name, None)
        if found is not None:
            is_factorisation = name in FACTORISATIONS
            return functools.partial(_tried, whole, full, found) if is_factorisation else found
        if full in _WRITTEN:
            return functools.partial(_WRITTEN[full], whole)
        if name in FACTORISATIONS:
            return functools.partial(_on_host, whole, full)
        raise LackingError("the linalg extension" if extension is None else full, whole._xp)


# Calls that are not as the standard has them


def _create(function: Callable[..., Array], *args: Any, **kwargs: Any) -> Array:
    """Call without a device where there is none: some libraries know no such argument."""
    if "device" in kwargs and kwargs["device"] is None:
        del kwargs["device"]
    return function(*args, **kwargs)


def _sum(
    xp: Completed, function: Callable[..., Array], x: Array, *, dtype: Any = None, **options: Any
) -> Array:
    """Say in which dtype to add: before 2023.12 float32 became the default dtype, and integers still do."""
    if dtype is None:
        is_integer = xp.isdtype(x.dtype, "integral")
        dtype = xp.place_dtype if is_integer else x.dtype
    return function(x, dtype=dtype, **options)


def _with_arrays(
    xp: Completed, function: Callable[..., Array], has_condition: bool, *args: Any, **kwargs: Any
) -> Array:
    """Make 0-d arrays of Python's numbers."""
    head, operands = args[:has_condition], args[has_condition:]
    arrays = [x for x in operands if not isinstance(x, int | float | complex | None)]
    if not arrays:
        return function(*args, **kwargs)
    like = {"dtype": arrays[0].dtype, **xp.with_device(arrays[0])}
    operands = tuple(
        xp.asarray(x, **like) if isinstance(x, int | float | complex) else x for x in operands
    )
    return function(*head, *operands, **kwargs)


def _tried(
    xp: Completed, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call a function that may be there in name only."""
    try:
        return function(*args, **kwargs)
    except NotImplementedError:
        return _on_host(xp, name, *args, **kwargs)


def _on_host(xp: Completed, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call NumPy's function of this name, and bring the results back."""
    what = "the linalg extension" if name.startswith("linalg.") else name
    if name.startswith("linalg.") and hasattr(xp._xp, "linalg"):
        what = name
    x = args[0]
    size = max(math.prod(a.shape) for a in args)
    if size > HOST_ENTRIES:
        raise LackingError(
            what, xp._xp, f"; NumPy stands in for up to {HOST_ENTRIES} entries, here {size}"
        )
    try:
        arrays = [xp._backend.to_numpy(a) for a in args]
    except LackingError as error:
        raise LackingError(
            what, xp._xp, "; NumPy can stand in only where it can read the values"
        ) from error
    results = _HOST[name](*arrays, **kwargs)
    several = isinstance(results, tuple)
    back = [
        xp._backend.from_numpy(np.ascontiguousarray(r), x, _dtype_for(xp, r, x))
        for r in (results if several else (results,))
    ]
    return tuple(back) if several else back[0]


def _dtype_for(xp: Completed, result: np.ndarray[Any, Any], x: Array) -> DType:
    """Dtype of the library for what NumPy made of ``x``."""
    if result.dtype.kind in "iu":
        return xp.place_dtype
    is_complex = bool(xp.isdtype(x.dtype, "complex floating"))
    if result.dtype.kind == "c" or not is_complex:
        return x.dtype
    return xp.float32 if xp.finfo(x.dtype).bits == 32 else xp.float64


def _host_argsort(x: Any, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Any:
    if descending:
        flipped = np.argsort(np.flip(x, axis=axis), axis=axis, stable=True)
        return np.flip(x.shape[axis] - 1 - flipped, axis=axis)
    return np.argsort(x, axis=axis, stable=True)


def _host_sort(x: Any, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Any:
    found = np.sort(x, axis=axis, stable=True)
    return np.flip(found, axis=axis) if descending else found


_HOST: dict[str, Callable[..., Any]] = {
    "sort": _host_sort,
    "argsort": _host_argsort,
    "searchsorted": np.searchsorted,
    "cumulative_sum": lambda x, *, axis=None, dtype=None: np.cumsum(
        x, axis=0 if axis is None else axis
    ),
    "linalg.qr": lambda x, *, mode="reduced": tuple(np.linalg.qr(x, mode=mode)),
    "linalg.svd": lambda x, *, full_matrices=True: tuple(
        np.linalg.svd(x, full_matrices=full_matrices)
    ),
    "linalg.eigh": lambda x: tuple(np.linalg.eigh(x)),
    "linalg.eigvalsh": np.linalg.eigvalsh,
    "linalg.cholesky": np.linalg.cholesky,
    "linalg.inv": np.linalg.inv,
}


# Functions written in others


def _isdtype(xp: Completed, dtype: DType, kind: Any) -> bool:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = [name for one in kinds if isinstance(one, str) for name in _KINDS[one]]
    known = [getattr(xp._xp, name) for name in names if hasattr(xp._xp, name)]
    return any(dtype == one for one in [*known, *(k for k in kinds if not isinstance(k, str))])


_INTEGERS = {
    "signed integer": ("int8", "int16", "int32", "int64"),
    "unsigned integer": ("uint8", "uint16", "uint32", "uint64"),
}
_FLOATS = {
    "real floating": ("float16", "bfloat16", "float32", "float64"),
    "complex floating": ("complex64", "complex128"),
}
_KINDS = {
    "bool": ("bool",),
    **_INTEGERS,
    **_FLOATS,
    "integral": sum(_INTEGERS.values(), ()),
    "numeric": sum((*_INTEGERS.values(), *_FLOATS.values()), ()),
}


def _maximum(xp: Completed, x: Any, y: Any) -> Array:
    # NaN compares as false, and has to come out from either side.
    x, y = _pair(xp, x, y)
    return xp.where((x >= y) | (x != x), x, y)


def _minimum(xp: Completed, x: Any, y: Any) -> Array:
    x, y = _pair(xp, x, y)
    return xp.where((x <= y) | (x != x), x, y)


def _pair(xp: Completed, x: Any, y: Any) -> tuple[Array, Array]:
    like = y if isinstance(x, int | float) else x
    made = {"dtype": like.dtype, **xp.with_device(like)}
    x, y = (xp.asarray(a, **made) if isinstance(a, int | float) else a for a in (x, y))
    return x, y


def _clip(xp: Completed, x: Array, low: Any = None, high: Any = None) -> Array:
    x = x if low is None else xp.maximum(x, low)
    return x if high is None else xp.minimum(x, high)


def _moveaxis(xp: Completed, x: Array, source: int, destination: int) -> Array:
    order = [a for a in range(x.ndim) if a != source % x.ndim]
    order.insert(destination % x.ndim, source % x.ndim)
    return xp.permute_dims(x, tuple(order))


def _repeat(xp: Completed, x: Array, repeats: int, *, axis: int) -> Array:
    axis = axis % x.ndim
    shape = tuple(x.shape)
    x = xp.reshape(x, (*shape[: axis + 1], 1, *shape[axis + 1 :]))
    x = xp.broadcast_to(x, (*shape[: axis + 1], repeats, *shape[axis + 1 :]))
    return xp.reshape(x, (*shape[:axis], shape[axis] * repeats, *shape[axis + 1 :]))


def _take(xp: Completed, x: Array, indices: Array, *, axis: int) -> Array:
    parts = [slice(None)] * x.ndim
    places = [int(indices[i]) for i in range(indices.shape[0])]
    axis = axis % x.ndim
    taken = [x[(*parts[:axis], slice(i, i + 1), *parts[axis + 1 :])] for i in places]
    return xp.concat(taken, axis=axis) if taken else x[(*parts[:axis], slice(0, 0), ...)]


def _take_along_axis(xp: Completed, x: Array, indices: Array, *, axis: int = -1) -> Array:
    """Take from the flattened array, at places that are counted."""
    x, indices = xp.moveaxis(x, axis, -1), xp.moveaxis(indices, axis, -1)
    lead = np.broadcast_shapes(tuple(x.shape[:-1]), tuple(indices.shape[:-1]))
    x = xp.broadcast_to(x, (*lead, x.shape[-1]))
    indices = xp.broadcast_to(indices, (*lead, indices.shape[-1]))
    indices = xp.astype(indices, xp.place_dtype)
    n, n_rows = x.shape[-1], math.prod(lead)
    rows = xp.arange(n_rows, dtype=xp.place_dtype, **xp.with_device(x)) * n
    places = xp.where(indices < 0, indices + n, indices) + xp.reshape(rows, (*lead, 1))
    taken = xp.take(xp.reshape(x, (-1,)), xp.reshape(places, (-1,)), axis=0)
    return xp.moveaxis(xp.reshape(taken, tuple(indices.shape)), -1, axis)


def _cumulative_sum(
    xp: Completed, x: Array, *, axis: int = -1, dtype: DType | None = None
) -> Array:
    """Add the array to itself, moved by 1, 2, 4, ...: as many steps as its length has bits."""
    x = x if dtype is None else xp.astype(x, dtype)
    axis = axis % x.ndim
    parts, step = [slice(None)] * axis, 1
    while step < x.shape[axis]:
        moved = x[(*parts, slice(0, x.shape[axis] - step), ...)]
        ahead = xp.zeros_like(x[(*parts, slice(0, step), ...)])
        x, step = x + xp.concat([ahead, moved], axis=axis), 2 * step
    return x


def _searchsorted(xp: Completed, places: Array, values: Array, *, side: str = "left") -> Array:
    """Compare each with each."""
    column = xp.reshape(values, (*values.shape, 1))
    before = places < column if side == "left" else places <= column
    return xp.sum(xp.astype(before, xp.int8), axis=-1)


def _count_nonzero(xp: Completed, x: Array, *, axis: Any = None, keepdims: bool = False) -> Array:
    is_counted = x if x.dtype == xp.bool else x != 0
    return xp.sum(xp.astype(is_counted, xp.int8), axis=axis, keepdims=keepdims)


def _diff(xp: Completed, x: Array, *, axis: int = -1) -> Array:
    parts = [slice(None)] * (axis % x.ndim)
    return x[(*parts, slice(1, None), ...)] - x[(*parts, slice(0, -1), ...)]


def _argsort(xp: Completed, x: Array, **options: Any) -> Array:
    return _on_host(xp, "argsort", x, **options)


def _sort(
    xp: Completed, x: Array, *, axis: int = -1, descending: bool = False, stable: bool = True
) -> Array:
    """Sort by the order, where the library tells that."""
    if getattr(xp._xp, "argsort", None) is None:
        return _on_host(xp, "sort", x, axis=axis, descending=descending, stable=stable)
    order = xp.argsort(x, axis=axis, descending=descending, stable=stable)
    return xp.take_along_axis(x, order, axis=axis)


def _triu(xp: Completed, x: Array, *, k: int = 0) -> Array:
    rows = xp.arange(x.shape[-2], **xp.with_device(x))[:, None]
    columns = xp.arange(x.shape[-1], **xp.with_device(x))[None, :]
    return xp.where(columns - rows >= k, x, xp.zeros_like(x))


def _diagonal(xp: Completed, x: Array, *, offset: int = 0) -> Array:
    n = min(x.shape[-2:])
    eye = xp.eye(n, dtype=xp.bool, **xp.with_device(x))
    square = x[..., :n, :n]
    return xp.sum(xp.where(eye, square, xp.zeros_like(square)), axis=-1)


def _trace(xp: Completed, x: Array) -> Array:
    return xp.sum(_diagonal(xp, x), axis=-1)


def _vector_norm(
    xp: Completed, x: Array, *, axis: Any = None, keepdims: bool = False, ord: float = 2
) -> Array:
    if ord != 2:
        raise LackingError("linalg.vector_norm", xp._xp)
    size = xp.abs(x)
    return xp.sqrt(xp.sum(size * size, axis=axis, keepdims=keepdims))


def _vecdot(xp: Completed, x: Array, y: Array, *, axis: int = -1) -> Array:
    conj = xp.conj(x) if xp.isdtype(x.dtype, "complex floating") else x
    return xp.sum(conj * y, axis=axis)


_WRITTEN: dict[str, Callable[..., Any]] = {
    "isdtype": _isdtype,
    "maximum": _maximum,
    "minimum": _minimum,
    "clip": _clip,
    "moveaxis": _moveaxis,
    "repeat": _repeat,
    "take": _take,
    "take_along_axis": _take_along_axis,
    "cumulative_sum": _cumulative_sum,
    "searchsorted": _searchsorted,
    "count_nonzero": _count_nonzero,
    "diff": _diff,
    "sort": _sort,
    "argsort": _argsort,
    "triu": _triu,
    "linalg.diagonal": _diagonal,
    "linalg.trace": _trace,
    "linalg.vector_norm": _vector_norm,
    "linalg.vecdot": _vecdot,
}
