"""A library with what the standard of 2022.12 guarantees and nothing more: no module, no NumPy protocol, no linalg.

Its dtypes and devices are objects that compare equal to themselves, and do not hash. Functions refuse Python numbers
where that version does. ``namespace.asked`` notes what was looked up.
"""

import types
from typing import Any

import numpy as np

__all__ = ["asarray", "namespace", "to_numpy"]


class DType:
    """A dtype of which nothing is known."""

    __hash__ = None

    def __init__(self, name: str) -> None:
        self._name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DType) and self._name == other._name

    def __repr__(self) -> str:
        return f"minimal.{self._name}"


class Device:
    """The only device."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device)


DEVICE = Device()
NAMES = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float32 float64 complex64 complex128"
)
DTYPES = {name: DType(name) for name in NAMES.split()}


class Array:
    """An array."""

    __hash__ = None

    def __init__(self, a: Any) -> None:
        self._a = np.asarray(a)

    shape = property(lambda self: self._a.shape)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    dtype = property(lambda self: DTYPES[self._a.dtype.name])
    device = property(lambda self: DEVICE)

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        return namespace

    def __getitem__(self, key: Any) -> "Array":
        # Indexing by arrays came with 2024.12, by one boolean array it is optional.
        parts = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(p, int | slice | type(...) | None) for p in parts):
            raise TypeError("only integers, slices, None and ... index")
        return Array(self._a[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._a[key] = _read(value)

    def __bool__(self) -> bool:
        return bool(self._a)

    def __int__(self) -> int:
        return int(self._a)

    def __float__(self) -> float:
        if self._a.dtype.kind == "c":
            raise TypeError("complex")
        return float(self._a)

    def __complex__(self) -> complex:
        return complex(self._a)

    def __abs__(self) -> "Array":
        return Array(abs(self._a))

    def __neg__(self) -> "Array":
        return Array(-self._a)

    def __invert__(self) -> "Array":
        return Array(~self._a)


def _operator(name: str) -> Any:
    def call(self: Array, other: Any) -> Any:
        if not isinstance(other, Array | bool | int | float | complex):
            return NotImplemented
        found = getattr(self._a, name)(_read(other))
        return found if found is NotImplemented else Array(found)

    return call


ARITHMETIC = "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul"
COMPARISONS = "eq ne lt le gt ge"
CREATION = "arange empty eye full linspace ones zeros"
for _name in ARITHMETIC.split():
    setattr(Array, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(Array, f"__r{_name}__", _operator(f"__r{_name}__"))
for _name in COMPARISONS.split():
    setattr(Array, f"__{_name}__", _operator(f"__{_name}__"))
Array.__hash__ = None  # type: ignore[assignment]


def _read(x: Any) -> Any:
    if isinstance(x, Array):
        return x._a
    if isinstance(x, DType):
        return np.dtype(x._name)
    return type(x)(map(_read, x)) if isinstance(x, list | tuple) else x


def _function(name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Array:
        given = args[0] if name in ("concat", "stack", "result_type") else args
        if not all(isinstance(x, Array) for x in given[: OPERANDS.get(name, 1)]):
            raise TypeError(f"{name} takes arrays, got {args}")
        kwargs = {option: _read(x) for option, x in kwargs.items() if option != "device"}
        return Array(getattr(np, name)(*map(_read, args), **kwargs))

    return call


def _creation(name: str) -> Any:
    def call(*args: Any, device: Any = None, **kwargs: Any) -> Array:
        if not (device is None or device == DEVICE):
            raise ValueError("no such device")
        return Array(
            getattr(np, name)(*map(_read, args), **{o: _read(x) for o, x in kwargs.items()})
        )

    return call


def asarray(x: Any, /, *, dtype: Any = None, device: Any = None, copy: bool | None = None) -> Array:
    """Bring Python's numbers and sequences of them, and arrays of its own; NumPy's only for the tests."""
    return Array(np.array(_read(x), dtype=_read(dtype)))


def _of_python(x: Any, /, **options: Any) -> Array:
    if isinstance(x, np.ndarray):
        raise TypeError("NumPy's arrays are not known here")
    return asarray(x, **options)


def to_numpy(x: Array) -> np.ndarray[Any, Any]:
    """Bring an array to NumPy; the library itself has no way."""
    return x._a


def _sort(x: Array, /, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Array:
    found = np.sort(x._a, axis=axis, stable=True)
    return Array(np.flip(found, axis) if descending else found)


def _argsort(
    x: Array, /, *, axis: int = -1, descending: bool = False, stable: bool = True
) -> Array:
    if not descending:
        return Array(np.argsort(x._a, axis=axis, stable=True))
    flipped = np.argsort(np.flip(x._a, axis), axis=axis, stable=True)
    return Array(np.flip(x.shape[axis] - 1 - flipped, axis))


def _finfo(dtype: DType, /) -> Any:
    own = np.finfo(_read(dtype))
    named = {name: float(getattr(own, name)) for name in ("eps", "max", "min", "smallest_normal")}
    return types.SimpleNamespace(bits=own.bits, dtype=dtype, **named)


OPERANDS = {"where": 3, "pow": 2, "logaddexp": 2, "matmul": 2, "vecdot": 2, "atan2": 2}
FUNCTIONS = """abs all any argmax argmin atan2 broadcast_to ceil concat conj cos exp expand_dims expm1 flip floor imag
isfinite isinf isnan log log1p log2 logaddexp logical_and logical_not logical_or matmul matrix_transpose max mean min
permute_dims pow prod real reshape roll round sign sin sinh sqrt square squeeze stack std sum take tan tanh tensordot
tril triu var vecdot where zeros_like ones_like full_like empty_like"""


class Namespace:
    """Not a module, and has no name."""

    __hash__ = None

    def __init__(self, found: dict[str, Any]) -> None:
        self._found, self.asked = found, set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._found:
            raise AttributeError(name)
        self.asked.add(name)
        return self._found[name]


namespace = Namespace(
    {
        **{name: _function(name) for name in FUNCTIONS.split()},
        **{name: _creation(name) for name in CREATION.split()},
        **DTYPES,
        "asarray": _of_python,
        "astype": lambda x, dtype, /, *, copy=True: Array(x._a.astype(_read(dtype), copy=copy)),
        "sort": _sort,
        "argsort": _argsort,
        "isdtype": lambda dtype, kind: np.isdtype(_read(dtype), _read(kind)),
        "finfo": _finfo,
        "iinfo": lambda dtype, /: np.iinfo(_read(dtype)),
        "result_type": lambda *xs: DTYPES[np.result_type(*map(_read, xs)).name],
        "inf": np.inf,
        "nan": np.nan,
        "pi": np.pi,
    }
)
