"""The door: every public function comes through here first, and every message is written here.

Arrays are resolved to one namespace (hence one table of primitives), one device and one floating dtype; ranks,
tolerances and generators to plain values. Nothing after this file checks an argument again.
"""

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from slra._backends import Primitives, primitives
from slra._typing import Array, DType

__all__ = [
    "Promoted",
    "broadcasts_to",
    "check_axis",
    "check_bound",
    "check_choice",
    "check_count",
    "check_finite",
    "check_matrix",
    "check_positive",
    "check_rank",
    "check_rng",
    "check_tau",
    "promote",
    "real_dtype",
    "resolve",
]

_HALF_BITS, _WIDEST_BITS = 16, 64


def resolve(*, optional: Mapping[str, Array | None] | None = None, **arrays: Array) -> Primitives:
    """Return the primitives for the one library and device that all these arrays share.

    Parameters
    ----------
    optional
        Arrays, by their argument names, that may be None.
    **arrays
        The arrays that must be given, by their argument names.

    Raises
    ------
    TypeError
        Where one is not an array, or two come from different libraries.
    ValueError
        Where two are on different devices.
    """
    given = arrays | {name: x for name, x in (optional or {}).items() if x is not None}
    namespaces = {name: _namespace(x, name) for name, x in given.items()}
    (first, xp), *others = namespaces.items()
    for name, other in others:
        if other is not xp:
            raise TypeError(
                f"{first} and {name} must come from one array library, "
                f"got {_title(xp)} and {_title(other)}"
            )
    table = primitives(xp)
    devices = {name: table.device(x) for name, x in given.items()}
    fixed = [(name, device) for name, device in devices.items() if device is not None]
    for name, device in fixed[1:]:
        if device != fixed[0][1]:
            raise ValueError(
                f"{fixed[0][0]} and {name} must be on one device, "
                f"got {_device_title(fixed[0][1])} and {_device_title(device)}"
            )
    for name, x in given.items():
        if reason := table.refusal(x):
            raise TypeError(f"{name} must be a dense array, got {reason}")
    return table


def _namespace(x: Array, name: str) -> Any:
    if not compat.is_array_api_obj(x) or np.isscalar(x):
        raise TypeError(
            f"{name} must be an array of a library that follows the array API standard, "
            f"got {type(x).__name__}"
        )
    return compat.array_namespace(x)


def _title(xp: Any) -> str:
    return str(xp.__name__).removeprefix("array_api_compat.")


def _device_title(device: Any) -> str:
    if isinstance(device, frozenset):
        return ", ".join(sorted(map(str, device)))
    return str(device)


class Promoted(NamedTuple):
    """Arrays in the dtype to compute in, and how to answer in the caller's."""

    arrays: list[Array]
    narrow: DType | None

    def answer(self, table: Primitives, *xs: Array) -> tuple[Array, ...]:
        """Cast results back to half precision, where that is what came."""
        if self.narrow is None:
            return xs
        return tuple(table.xp.astype(x, self.narrow) for x in xs)


def promote(
    table: Primitives,
    *,
    allow_complex: bool = True,
    keep_half: bool = False,
    **arrays: Array | None,
) -> Promoted:
    """Bring arrays to their common floating dtype; half precision is computed in single.

    With ``keep_half`` it is left for the primitives to convert.

    Raises
    ------
    TypeError
        For integers and booleans, for complex numbers where ``allow_complex`` is false, for dtypes narrower than 16
        or wider than 64 bits a component, and where the library has no common dtype.
    """
    xp = table.xp
    given = {name: x for name, x in arrays.items() if x is not None}
    for name, x in given.items():
        _check_floating(xp, x, name, allow_complex=allow_complex)
    try:
        dtype = xp.result_type(*given.values())
    except Exception as error:
        named = " and ".join(f"{name} ({x.dtype})" for name, x in given.items())
        raise TypeError(f"{named} must have a common floating dtype: {error}") from error
    is_half = xp.finfo(dtype).bits == _HALF_BITS and not keep_half
    work = xp.float32 if is_half else dtype
    cast = [x if x is None or x.dtype == work else xp.astype(x, work) for x in arrays.values()]
    return Promoted(cast, dtype if is_half else None)


def _check_floating(xp: Any, x: Array, name: str, *, allow_complex: bool) -> None:
    kinds = ("real floating", "complex floating") if allow_complex else ("real floating",)
    known = "floating" if allow_complex else "real floating"
    if not _is_kind(xp, x.dtype, kinds):
        raise TypeError(f"{name} must have a {known} dtype, got {x.dtype}; convert it first")
    bits = xp.finfo(x.dtype).bits
    if not _HALF_BITS <= bits <= _WIDEST_BITS:
        raise TypeError(
            f"{name} must have {_HALF_BITS} to {_WIDEST_BITS} bits a component, got {x.dtype}"
        )


def _is_kind(xp: Any, dtype: DType, kinds: tuple[str, ...]) -> bool:
    try:
        return bool(xp.isdtype(dtype, kinds))
    except TypeError:  # a dtype outside the standard, such as NumPy's strings and records
        return False


def check_matrix(x: Array, name: str) -> None:
    """Raise ValueError unless ``x`` has two axes or more and none of them is empty."""
    if x.ndim < 2:
        raise ValueError(
            f"{name} must have at least 2 dimensions, (..., m, n), got shape {tuple(x.shape)}"
        )
    if 0 in x.shape:
        raise ValueError(f"{name} must have no empty axis, got shape {tuple(x.shape)}")


def check_finite(table: Primitives, x: Array, name: str) -> None:
    """Raise ValueError on NaN and infinities, where values can be looked at."""
    if table.is_eager(x) and not bool(table.xp.all(table.xp.isfinite(x))):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def check_rank(rank: Any, limit: int, name: str = "rank", limit_is: str = "") -> int:
    """Return ``rank`` as an int between 1 and ``limit``."""
    value = _integer(rank, name)
    if not 1 <= value <= limit:
        because = f" ({limit_is})" if limit_is else ""
        raise ValueError(f"{name} must be between 1 and {limit}{because}, got {value}")
    return value


def check_count(value: Any, name: str) -> int:
    """Return a non-negative count as an int."""
    count = _integer(value, name)
    if count < 0:
        raise ValueError(f"{name} must be 0 or more, got {count}")
    return count


def _integer(value: Any, name: str) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None


def check_positive(value: Any, name: str, *, allow_zero: bool = False) -> float:
    """Return a positive (or non-negative) finite number as a float."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and not allow_zero):
        bound = "0 or more" if allow_zero else "greater than 0"
        raise ValueError(f"{name} must be finite and {bound}, got {value!r}")
    return number


def check_choice(value: Any, choices: tuple[str, ...], name: str) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


def broadcasts_to(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether an array of this shape broadcasts to ``target`` without enlarging it."""
    try:
        return np.broadcast_shapes(tuple(shape), tuple(target)) == tuple(target)
    except ValueError:
        return False


def check_axis(x: Array, axis: Any, name: str = "axis") -> tuple[int, ...]:
    """Return one or several axes of ``x`` as a tuple, counted from the front; none of them may be empty."""
    given = axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(_integer(a, name) for a in given)
    if not axes or any(not -x.ndim <= a < x.ndim for a in axes):
        raise ValueError(
            f"{name} must be among the {x.ndim} axes of x, of shape {tuple(x.shape)}, got {axis}"
        )
    axes = tuple(a % x.ndim for a in axes)
    if len(set(axes)) < len(axes):
        raise ValueError(f"{name} must name different axes, got {axis}")
    if any(x.shape[a] == 0 for a in axes):
        raise ValueError(f"x must not be empty along {name} {axis}, got shape {tuple(x.shape)}")
    return axes


def check_tau(
    table: Primitives, x: Array, tau: Any, name: str = "tau", *, axes: tuple[int, ...] = ()
) -> Any:
    """Return a threshold as a float, or as an array of the real dtype of ``x`` that broadcasts to it.

    An array has length one along ``axes``, those of the vectors or matrices that share one threshold.
    """
    if not compat.is_array_api_obj(tau) or np.isscalar(tau):
        return check_positive(tau, name, allow_zero=True)
    tau = check_bound(table, x, tau, name, axes=axes)
    if table.is_eager(tau) and not bool(table.xp.all((tau >= 0) & table.xp.isfinite(tau))):
        raise ValueError(f"{name} must be finite and 0 or more everywhere")
    return tau


def check_bound(
    table: Primitives, x: Array, bound: Any, name: str, *, axes: tuple[int, ...] = ()
) -> Any:
    """Return a real number as a float, or an array of the real dtype of ``x`` that broadcasts to it."""
    if not compat.is_array_api_obj(bound) or np.isscalar(bound):
        if isinstance(bound, (bool, np.bool_)) or not isinstance(bound, numbers.Real):
            raise TypeError(f"{name} must be a real number or array, got {type(bound).__name__}")
        return float(bound)
    resolve(x=x, **{name: bound})
    _check_floating(table.xp, bound, name, allow_complex=False)
    target = tuple(1 if axis in axes else n for axis, n in enumerate(x.shape))
    if not broadcasts_to(bound.shape, target):
        where = ""
        if axes:
            where = f", with length 1 along the axes of one vector or matrix: to {target}"
        raise ValueError(
            f"{name} must broadcast to x, whose shape is {tuple(x.shape)}{where}, "
            f"got {tuple(bound.shape)}"
        )
    real = real_dtype(table, x)
    return bound if bound.dtype == real else table.xp.astype(bound, real)


def real_dtype(table: Primitives, x: Array) -> DType:
    """Return the dtype that the real and imaginary parts of ``x`` are computed in."""
    bits = table.xp.finfo(x.dtype).bits
    if not table.is_complex(x) and bits != _HALF_BITS:
        return x.dtype
    return table.xp.float64 if bits == _WIDEST_BITS else table.xp.float32


def check_rng(rng: Any, name: str = "rng") -> np.random.Generator:
    """Return a NumPy generator for a seed, a generator or None, as SPEC 7 has it.

    Source: Scientific Python SPEC 7, Seeding pseudo-random number generation.
    """
    if isinstance(rng, (bool, float, np.random.RandomState)):
        raise TypeError(
            f"{name} must be an int, a numpy.random.Generator or None, got {type(rng).__name__}"
        )
    try:
        return np.random.default_rng(rng)
    except TypeError:
        raise TypeError(
            f"{name} must be an int, a numpy.random.Generator or None, got {type(rng).__name__}"
        ) from None
