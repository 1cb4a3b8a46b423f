"""The door: every public function comes through here first, and every message is written here.

Arrays are resolved to one namespace (hence one backend), one device and one floating dtype; ranks,
tolerances and generators to plain values. Nothing after this file checks an argument again.
"""

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from slra._backends import Backend, backend_for, known_backend
from slra._backends.lacking import title
from slra._typing import Array, DType

__all__ = [
    "Promoted",
    "broadcasts_to",
    "check_axis",
    "check_bound",
    "check_callable",
    "check_choice",
    "check_count",
    "check_draws",
    "check_factors",
    "check_finite",
    "check_flag",
    "check_gradient",
    "check_hermitian",
    "check_known_weight",
    "check_l1",
    "check_mask",
    "check_matrix",
    "check_numbers",
    "check_operator",
    "check_positive",
    "check_positive_semidefinite",
    "check_product",
    "check_rank",
    "check_returned",
    "check_rng",
    "check_rtol",
    "check_scalar",
    "check_square",
    "check_sum_axis",
    "check_tau",
    "check_tol",
    "check_weight",
    "dtype_limits",
    "is_array",
    "is_kind",
    "on_host",
    "promote",
    "resolve",
    "shown",
]

_HALF_BITS, _WIDEST_BITS = 16, 64
_SINGLE_MAX = float(np.finfo(np.float32).max)


def resolve(*, optional: Mapping[str, Array | None] | None = None, **arrays: Array) -> Backend:
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
    given = arrays if optional is None else arrays | _present(optional)
    (first, one), *others = given.items()
    backend = _backend(one, first)
    # The most common case, in which nothing below could be wrong, and whose smallest functions take as long as that.
    if backend.takes_every_ndarray and all([type(x) is np.ndarray for x in given.values()]):  # noqa: C419, torch.compile follows no generator here
        return backend
    for name, x in others:
        # Not the backends: torch.compile makes a new one each time.
        if (other := _backend(x, name)).xp is not backend.xp:
            raise TypeError(
                f"{first} and {name} must come from one array library, "
                f"got {title(backend.xp)} and {title(other.xp)}"
            )
    if others:
        _check_one_device(backend, given)
    for name, x in given.items():
        if reason := backend.refusal(x):
            raise TypeError(f"{name} {reason}")
    return backend


def _present(arrays: Mapping[str, Array | None]) -> dict[str, Array]:
    return {name: x for name, x in arrays.items() if x is not None}


def _check_one_device(backend: Backend, given: Mapping[str, Array]) -> None:
    fixed = _present({name: backend.device(x) for name, x in given.items()})
    for name, device in fixed.items():
        first, found = next(iter(fixed.items()))
        if device != found:
            raise ValueError(
                f"{first} and {name} must be on one device, "
                f"got {_device_title(found)} and {_device_title(device)}"
            )


def _backend(x: Array, name: str) -> Backend:
    if (known := known_backend(x)) is not None:
        return known
    if not is_array(x):
        raise TypeError(
            f"{name} must be an array of a library that follows the array API standard, "
            f"got {type(x).__name__}"
        )
    return backend_for(x)


def is_array(value: Any) -> bool:
    """Whether a value is an array of some library, and not a number of NumPy's."""
    if known_backend(value) is not None:
        return True
    return not isinstance(value, np.generic) and bool(compat.is_array_api_obj(value))


def _device_title(device: Any) -> str:
    if isinstance(device, frozenset):
        return ", ".join(sorted(map(str, device)))
    return str(device)


class Promoted(NamedTuple):
    """Arrays in the dtype to compute in, and how to answer in the caller's."""

    arrays: list[Array]
    narrow: DType | None

    def cast_back(self, backend: Backend, *xs: Array) -> tuple[Array, ...]:
        """Cast results back to half precision, where that is what came."""
        # NumPy makes scalars of its own of 0-d arrays as soon as it computes with them.
        xs = tuple([backend.xp.asarray(x) if isinstance(x, np.generic) else x for x in xs])
        if self.narrow is None:
            return xs
        with backend.ignore_overflow():
            return tuple(backend.xp.astype(x, self.narrow) for x in xs)


def promote(
    backend: Backend,
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
    xp = backend.xp
    given = {name: x for name, x in arrays.items() if x is not None}
    dtype, is_common = next(iter(given.values())).dtype, True
    for i, (name, x) in enumerate(given.items()):
        if i == 0 or x.dtype != dtype:
            bits = _check_floating(backend, x, name, allow_complex=allow_complex)
            is_common = is_common and x.dtype == dtype
    if not is_common:
        try:
            dtype = backend.common_dtype(*given.values())
        except Exception as error:
            named = " and ".join(f"{name} ({x.dtype})" for name, x in given.items())
            raise TypeError(f"{named} must have a common floating dtype: {error}") from error
        bits = dtype_limits(xp, dtype).bits
    is_half = bits == _HALF_BITS and not keep_half
    work = xp.float32 if is_half else dtype
    cast = [x if x is None or x.dtype == work else xp.astype(x, work) for x in arrays.values()]
    return Promoted(cast, dtype if is_half else None)


def _check_floating(backend: Backend, x: Array, name: str, *, allow_complex: bool) -> int:
    """Return how many bits a component of ``x`` has."""
    found = backend.float_format(x.dtype)
    if found is None or (found.is_complex and not allow_complex):
        known = "floating" if allow_complex else "real floating"
        raise TypeError(f"{name} must have a {known} dtype, got {x.dtype}; convert it first")
    if not _HALF_BITS <= found.bits <= _WIDEST_BITS:
        raise TypeError(
            f"{name} must have {_HALF_BITS} to {_WIDEST_BITS} bits a component, got {x.dtype}"
        )
    return found.bits


def is_kind(xp: Any, dtype: DType, *kinds: str) -> bool:
    """Whether a dtype is of one of these kinds of the standard, or bfloat16; not so for others outside of it."""
    if _is_bfloat16(dtype):
        return "real floating" in kinds
    try:
        return bool(xp.isdtype(dtype, kinds))
    except TypeError:  # such as NumPy's strings and records
        return False


def _is_bfloat16(dtype: DType) -> bool:
    """Whether it is the dtype that ml_dtypes adds to NumPy's."""
    return isinstance(dtype, np.dtype) and dtype.name == "bfloat16"


def dtype_limits(xp: Any, dtype: DType) -> Any:
    """Return what ``finfo`` says, also of a dtype that NumPy's does not know."""
    if not _is_bfloat16(dtype):
        return xp.finfo(dtype)
    import ml_dtypes  # which the dtype comes from

    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


def check_matrix(x: Array, name: str, *, may_be_empty: bool = False) -> None:
    """Raise ValueError unless ``x`` has two axes or more and no empty one, or none but before the last."""
    if x.ndim < 2:
        raise ValueError(
            f"{name} must have at least 2 dimensions, (..., m, n), got shape {tuple(x.shape)}"
        )
    if 0 in (x.shape[-1:] if may_be_empty else x.shape):
        which = "a last axis that is not empty" if may_be_empty else "no empty axis"
        raise ValueError(f"{name} must have {which}, got shape {tuple(x.shape)}")


def check_operator(backend: Backend, shape: Any, like: Array, name: str = "x") -> None:
    """Raise unless a sparse matrix or operator has two axes, none empty, and 32 or 64 bits a component."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"{name}.shape must be a tuple (m, n), got {type(shape).__name__}")
    if len(shape) != 2 or min(_integer(n, f"{name}.shape") for n in shape) < 1:
        raise ValueError(
            f"{name} must have 2 dimensions, (m, n), and no empty axis, got shape {shown(shape)}"
        )
    if _check_floating(backend, like, name, allow_complex=True) == _HALF_BITS:
        raise TypeError(
            f"{name} must have 32 or 64 bits a component where it is not a dense array, got {like.dtype}"
        )


def check_product(
    backend: Backend, product: Array, shape: tuple[int, ...], name: str, factors: Sequence[Array]
) -> None:
    """Raise unless ``name``, a product with an operator, is an array of the library, shape and dtype it has to be.

    ``factors`` are what the operator says that it is like, and what it was given.
    """
    if resolve(**{name: product}).xp is not backend.xp:
        raise TypeError(f"{name} must return an array of {title(backend.xp)}, as x.like is")
    if tuple(product.shape) != shape:
        raise ValueError(
            f"{name} must return an array of shape {shape}, got {tuple(product.shape)}"
        )
    dtype = backend.xp.result_type(*factors)
    if product.dtype != dtype:
        raise TypeError(
            f"{name} must return an array of {dtype}, the dtype that x says it has, got {product.dtype}"
        )


def check_square(shape: tuple[int, ...], name: str = "x") -> None:
    """Raise ValueError unless a matrix is square."""
    if shape[-1] != shape[-2]:
        raise ValueError(f"{name} must be square in its last two axes, got shape {tuple(shape)}")


def check_hermitian(
    backend: Backend, skew: Array, largest: Array, dtype: DType, name: str = "x"
) -> None:
    """Raise ValueError unless a matrix is Hermitian to rounding in ``dtype``, in which it came.

    ``skew`` is the largest modulus in the matrix less its conjugate transpose, ``largest`` that in the matrix.
    """
    xp = backend.xp
    limits = dtype_limits(xp, dtype)
    # 100 eps of half precision would be most of an entry.
    allowed = (8 if limits.bits == _HALF_BITS else 100) * float(limits.eps) * largest
    if not bool(xp.all(skew <= allowed)):
        raise ValueError(
            f"{name} must be Hermitian, got a matrix that differs from its conjugate transpose by more than "
            f"rounding in {dtype} explains; if it is meant to be, pass (x + x^H) / 2"
        )


def check_positive_semidefinite(backend: Backend, factor: Array, name: str = "x") -> None:
    """Raise ValueError if a Cholesky factor of ``x`` on a subspace came out as NaN, where it can be looked at."""
    if backend.is_eager(factor) and not bool(backend.xp.all(backend.xp.isfinite(factor))):
        raise ValueError(
            f"{name} must be positive semidefinite for method='nystrom', got a matrix with a negative eigenvalue; "
            "use method='krylov'"
        )


def check_factors(
    backend: Backend, shape: tuple[int, ...], like: Array, approx: Any, name: str = "approx"
) -> list[Array]:
    """Return ``(U, S, Vh)`` or ``(left, right)`` as factors of a matrix of this shape, in the dtype of ``like``."""
    if not isinstance(approx, tuple) or len(approx) not in (2, 3):
        raise TypeError(
            f"{name} must be a tuple (U, S, Vh) or (left, right), got {type(approx).__name__}"
        )
    named = {f"{name}[{i}]": factor for i, factor in enumerate(approx)}
    resolve(x=like, **named)
    promote(backend, allow_complex=backend.is_complex(like), **named)
    *batch, m, n = shape
    k = approx[0].shape[-1] if approx[0].ndim else 0
    expected = [(*batch, m, k), (*batch, k), (*batch, k, n)]
    if len(approx) == 2:
        del expected[1]
    got = [tuple(factor.shape) for factor in approx]
    if got != expected:
        raise ValueError(f"{name} must have shapes {expected} to fit x, got {got}")
    return [backend.xp.astype(x, like.dtype, copy=False) for x in approx]


def check_finite(backend: Backend, x: Array, name: str) -> None:
    """Raise ValueError on NaN and infinities, where values can be looked at."""
    if not backend.is_eager(x):
        return
    # Extremes are NaN or infinite where any entry is, and take a fraction of the time that looking at each does.
    extremes = backend.max_abs(x) if x.ndim >= 2 and 0 not in x.shape else x
    if not bool(backend.xp.all(backend.xp.isfinite(extremes))):
        hint = "; slra.complete fills gaps that are marked by NaN" if name == "x" else ""
        raise ValueError(f"{name} must be finite, got NaN or infinity{hint}")


def check_gradient(backend: Backend, x: Array, grad: Array) -> Array:
    """Return a gradient at ``x`` in the dtype of ``x``; it must be real where ``x`` is."""
    if grad.dtype == x.dtype:
        return grad
    if backend.is_complex(grad) and not backend.is_complex(x):
        raise TypeError(
            f"value_and_grad must return a real gradient where x0 is real, got {grad.dtype}; "
            "start from a complex x0"
        )
    return backend.xp.astype(grad, x.dtype)


def check_rank(rank: Any, limit: int, name: str = "rank", limit_is: str = "") -> int:
    """Return ``rank`` as an int between 1 and ``limit``."""
    value = _integer(rank, name)
    if not 1 <= value <= limit:
        because = f" ({limit_is})" if limit_is else ""
        raise ValueError(f"{name} must be between 1 and {limit}{because}, got {shown(value)}")
    return value


def check_count(value: Any, name: str, *, most: int | None = None) -> int:
    """Return a non-negative count, which is at most so many, as an int."""
    count = _integer(value, name)
    if most is not None and count > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(count)}")
    if count < 0:
        raise ValueError(f"{name} must be 0 or more, got {shown(count)}")
    return count


def _integer(value: Any, name: str) -> int:
    if isinstance(value, (bool, np.bool_)) or "bool" in str(getattr(value, "dtype", "")):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    try:
        return operator.index(value)
    except (TypeError, ValueError):  # arrays of other sizes than one raise either
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None


def check_flag(value: Any, name: str) -> bool:
    """Return a bool, NumPy's own too, as Python's."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return bool(value)


def check_scalar(backend: Backend, value: Any, name: str) -> Any:
    """Return a real number as a float, or a 0-d array of the library of ``backend`` as it is."""
    if not is_array(value):
        return _real(value, name, "number or array")
    if resolve(**{name: value}).xp is not backend.xp:
        raise TypeError(f"{name} must come from {title(backend.xp)}, as the other arrays do")
    _check_floating(backend, value, name, allow_complex=False)
    if value.ndim:
        raise ValueError(f"{name} must have no dimensions, got shape {tuple(value.shape)}")
    return value


def check_returned(x: Any, name: str, shape: tuple[int, ...]) -> Array:
    """Return what a function of the caller's returned, if it is an array of this shape."""
    if not compat.is_array_api_obj(x):
        raise TypeError(f"{name} must return an array, got {type(x).__name__}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(
            f"{name} must return an array of shape {tuple(shape)}, got {tuple(x.shape)}"
        )
    return x


def check_callable(value: Any, name: str, *, optional: bool = False) -> None:
    """Raise TypeError unless ``value`` can be called, or is None where it may be left out."""
    if not (callable(value) or (optional and value is None)):
        raise TypeError(f"{name} must be callable, got {type(value).__name__}")


def check_positive(value: Any, name: str, *, allow_zero: bool = False, limits: Any = None) -> float:
    """Return a positive (or non-negative) finite number as a float.

    ``limits``: what ``finfo`` says of the dtype that it is computed in, whose range it must then be in.
    """
    number = _real(value, name)
    if not math.isfinite(number) or number < 0 or (number == 0 and not allow_zero):
        bound = "0 or more" if allow_zero else "greater than 0"
        raise ValueError(f"{name} must be finite and {bound}, got {shown(value)}")
    if limits is None:
        return number
    low, high = 0.0 if allow_zero else float(limits.smallest_normal), float(limits.max)
    if not low <= number <= high:
        raise ValueError(
            f"{name} must be from {low:.2g} to {high:.2g} in {limits.bits} bits, got {shown(value)}"
        )
    return number


def _real(value: Any, name: str, kind: str = "number") -> float:
    if type(value) is float:  # most often, and the next line takes a while
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real {kind}, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite in double precision, got {shown(value)}") from None


def check_numbers(value: Any, name: str, n: int, each: str) -> np.ndarray[Any, Any]:
    """Return ``n`` real numbers that can be looked at, one for ``each``, in double precision on the host."""
    found = on_host(value)
    if found is not None and found.dtype == object and found.ndim == 1:
        found = np.asarray([_real(one, name) for one in found])
    if found is None or found.dtype.kind not in "iuf":
        raise TypeError(
            f"{name} must be {n} real numbers, one for each {each}, got {type(value).__name__}"
        )
    if found.shape != (n,):
        raise ValueError(
            f"{name} must be {n} numbers, one for each {each}, got shape {found.shape}"
        )
    return found.astype(float)


def on_host(value: Any) -> np.ndarray[Any, Any] | None:
    """Return what NumPy makes of a value, or None where it makes nothing of it."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # traced, sparse, ragged, or on another device
        return None


def shown(value: Any) -> str:
    """Show what came, in so many words as fit a message."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return f"a {type(value).__name__} of too many digits to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_l1(
    l1: Any, limits: Sequence[Any] = (None, None, None), backend: Backend | None = None
) -> tuple[Any, Any, Any]:
    """Return the weights or thresholds of Q^, K^ and V^, given as one number or three; ``limits`` of each's dtype.

    They are floats; with a ``backend``, 0-d arrays of its library where they are traced or learned.
    """
    triple = l1 if isinstance(l1, (tuple, list)) else (l1, l1, l1)
    if len(triple) != 3:
        raise TypeError(f"l1 must be a number or a triple (l_q, l_k, l_v), got {shown(l1)}")
    l_q, l_k, l_v = [
        _check_weight(one, limit, backend) for one, limit in zip(triple, limits, strict=True)
    ]
    return l_q, l_k, l_v


def _check_weight(
    value: Any,
    limits: Any,
    backend: Backend | None,
    name: str = "l1",
    *,
    allow_zero: bool = True,
) -> Any:
    if backend is not None and is_array(value):
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value[()]  # a number, whatever the library of the other arrays
        else:
            value = check_scalar(backend, value, name)
            if not backend.is_eager(value):
                return value
            number = float(backend.to_numpy(value))
            check_positive(number, name, allow_zero=allow_zero, limits=limits)
            return value if backend.is_differentiated(value) else number
    return check_positive(value, name, allow_zero=allow_zero, limits=limits)


def check_weight(
    backend: Backend, x: Array, value: Any, name: str, *, allow_zero: bool = False
) -> Any:
    """Return a positive (or non-negative) number as a float; where it is traced or learned, as it is.

    It is then a 0-d array, in the real dtype that ``x`` is computed in.
    """
    dtype = _computed_in(backend, x)
    found = _check_weight(value, backend.xp.finfo(dtype), backend, name, allow_zero=allow_zero)
    return found if isinstance(found, float) else backend.xp.astype(found, dtype, copy=False)


def check_known_weight(backend: Backend, value: Any, name: str, **how: Any) -> float:
    """Return a positive number as a float, of which an iteration depends that no gradient passes through."""
    found = _check_weight(value, how.pop("limits", None), backend, name, **how)
    if not isinstance(found, float):
        raise ValueError(
            f"{name} must be a number that can be looked at, and through which no gradient has to pass, "
            f"got {shown(value)}"
        )
    return found


def check_rtol(
    backend: Backend,
    x: Array,
    rtol: Any,
    *,
    narrow: DType | None = None,
    by_products: bool = False,
    lost: float = 1.0,
) -> float:
    """Return a relative tolerance between what rounding allows in the dtype of ``x`` and 1.

    ``narrow``: half precision that the factors will be rounded to; what is returned leaves room for that.
    ``by_products``: the residual is known from products only, which loses half of the digits; their rounding errors
    are ``lost`` times as large as usual.
    """
    value = check_positive(rtol, "rtol")
    eps = float(backend.xp.finfo(x.dtype).eps)
    least = 16 * (math.sqrt(eps * max(1.0, lost)) if by_products else eps)
    # Both factors are off by half of eps, entry by entry, and so is their product by eps, in norm.
    rounding = 0.0 if narrow is None else float(dtype_limits(backend.xp, narrow).eps)
    least = max(least, 2 * rounding)
    if least >= 1:
        raise ValueError(
            "rtol must be None with center=True where the means of the columns are so much larger than what is left "
            f"that rounding in {x.dtype} hides it, got {rtol!r}; subtract them first"
        )
    if not least <= value < 1:
        raise ValueError(
            f"rtol must be at least {least:.1e} for {narrow or x.dtype} and less than 1, got {rtol!r}"
        )
    if not backend.is_eager(x):
        raise ValueError(
            "rtol must be None where values cannot be looked at (traced and lazy arrays): "
            "the rank of the result would depend on them; pass rank"
        )
    return value - rounding


def check_tol(backend: Backend, x: Array, tol: Any, narrow: DType | None) -> float:
    """Return a tolerance of singular triplets between what rounding allows and 1; ``narrow`` as in `check_rtol`."""
    value = check_positive(tol, "tol")
    rounding = 0.0 if narrow is None else float(dtype_limits(backend.xp, narrow).eps)
    least = max(100 * float(backend.xp.finfo(x.dtype).eps), 2 * rounding)
    if not least <= value < 1:
        raise ValueError(
            f"tol must be at least {least:.1e} for {narrow or x.dtype} and less than 1, got {tol!r}"
        )
    if not backend.is_eager(x):
        raise ValueError(
            "tol must be None where values cannot be looked at (traced and lazy arrays); pass n_iter"
        )
    return value - rounding


def check_choice(value: Any, choices: tuple[str, ...], name: str) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {known}, got {shown(value)}")


def broadcasts_to(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether an array of this shape broadcasts to ``target`` without enlarging it."""
    # Not by NumPy, which would make numbers of sizes that are symbols.
    n_new = len(target) - len(shape)
    pairs = zip(shape, target[max(0, n_new) :], strict=False)
    return n_new >= 0 and all(own == 1 or own == whole for own, whole in pairs)


def check_mask(backend: Backend, mask: Array, scores: tuple[int, ...], axes: str) -> None:
    """Raise unless a mask is boolean or real floating, and broadcasts to scores of this shape, with these ``axes``."""
    if not is_kind(backend.xp, mask.dtype, "bool", "real floating"):
        raise TypeError(f"mask must be boolean or real floating, got {mask.dtype}")
    if mask.ndim < 2 or not broadcasts_to(mask.shape, scores):
        raise ValueError(
            f"mask must have 2 or more dimensions and broadcast to {axes}, here {scores}, "
            f"got shape {tuple(mask.shape)}"
        )


def check_axis(x: Array, axis: Any, name: str = "axis") -> tuple[int, ...]:
    """Return one or several axes of ``x`` as a tuple, counted from the front; none of them may be empty."""
    axes = _axes(x, axis, name)
    if any(x.shape[a] == 0 for a in axes):
        raise ValueError(f"x must not be empty along {name} {axis}, got shape {tuple(x.shape)}")
    return axes


def check_sum_axis(x: Array, axis: Any, name: str = "axis") -> tuple[int, ...] | None:
    """Return axes of ``x`` to sum over as a tuple, counted from the front; None, which means all, as it is."""
    return None if axis is None else _axes(x, axis, name)


def _axes(x: Array, axis: Any, name: str) -> tuple[int, ...]:
    given = axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(_integer(a, name) for a in given)
    if not axes or any(not -x.ndim <= a < x.ndim for a in axes):
        raise ValueError(
            f"{name} must be among the {x.ndim} axes of x, of shape {tuple(x.shape)}, got {shown(axis)}"
        )
    axes = tuple(a % x.ndim for a in axes)
    if len(set(axes)) < len(axes):
        raise ValueError(f"{name} must name different axes, got {axis}")
    return axes


def check_tau(
    backend: Backend,
    x: Array,
    tau: Any,
    name: str = "tau",
    *,
    axes: tuple[int, ...] = (),
    allow_inf: bool = False,
) -> Any:
    """Return a threshold as a float, or as an array of the real dtype of ``x`` that broadcasts to it.

    An array has length one along ``axes``, those of the vectors or matrices that share one threshold. Where infinity
    is allowed it keeps what it belongs to at zero.
    """
    if type(tau) is float and 0 <= tau <= _SINGLE_MAX:  # most often: no precision is less
        return tau
    if isinstance(tau, float) or not is_array(tau):
        if allow_inf and isinstance(tau, numbers.Real) and tau == math.inf:
            return math.inf
        return check_positive(
            tau, name, allow_zero=True, limits=backend.xp.finfo(_computed_in(backend, x))
        )
    given, tau = tau, check_bound(backend, x, tau, name, axes=axes)
    if backend.is_eager(tau) and 0 not in tau.shape:
        xp = backend.xp
        # Of NaN the smallest is NaN, and no number reaches that.
        is_right = xp.min(tau) >= 0
        if not allow_inf:
            is_right = is_right & (xp.max(tau) < math.inf)
        elif given.dtype != tau.dtype:  # and a number has become infinite in the dtype of x
            is_right = is_right & xp.all(xp.isfinite(tau) | (given == math.inf))
        if not bool(is_right):
            kind = (
                "0 or more, finite in the dtype of x or infinite,"
                if allow_inf
                else "finite and 0 or more"
            )
            raise ValueError(f"{name} must be {kind} everywhere")
    return tau


def check_bound(
    backend: Backend, x: Array, bound: Any, name: str, *, axes: tuple[int, ...] = ()
) -> Any:
    """Return a real number as a float, or an array that broadcasts to ``x``, of the real dtype it is computed in."""
    if not is_array(bound):
        number = _real(bound, name, "number or array")
        # What lies beyond the largest number is no bound.
        largest = float(backend.xp.finfo(_computed_in(backend, x)).max)
        return math.copysign(math.inf, number) if abs(number) > largest else number
    resolve(x=x, **{name: bound})
    _check_floating(backend, bound, name, allow_complex=False)
    target = tuple(1 if axis in axes else n for axis, n in enumerate(x.shape))
    if not broadcasts_to(bound.shape, target):
        where = ""
        if axes:
            where = f", with length 1 along the axes of one vector or matrix: to {target}"
        raise ValueError(
            f"{name} must broadcast to x, whose shape is {tuple(x.shape)}{where}, "
            f"got {tuple(bound.shape)}"
        )
    real = _computed_in(backend, x)
    with backend.ignore_overflow():
        return bound if bound.dtype == real else backend.xp.astype(bound, real)


def _computed_in(backend: Backend, x: Array) -> DType:
    """Real dtype that ``x`` is computed in."""
    found = backend.float_format(x.dtype)
    if found is not None and found.bits == _HALF_BITS:
        return backend.xp.float32
    return backend.real_dtype(x.dtype) if found is None or found.is_complex else x.dtype


def check_draws(backend: Backend, like: Array, rng: Any) -> np.random.Generator | int | None:
    """Return what to draw from: a generator, or the seed where what is drawn becomes a constant of traced code."""
    if backend.freezes_draws(like):
        if rng is None:
            return None
        if isinstance(rng, (int, np.integer)) and not isinstance(rng, bool):
            return check_count(rng, "rng")
    return check_rng(rng)


def check_rng(rng: Any, name: str = "rng") -> np.random.Generator:
    """Return a NumPy generator for a seed, a generator or None, as SPEC 7 has it.

    Source: Scientific Python SPEC 7, Seeding pseudo-random number generation.
    """
    if isinstance(rng, (int, np.integer)) and not isinstance(rng, bool):
        return np.random.default_rng(check_count(rng, name))
    try:
        if isinstance(rng, (bool, np.bool_, float, np.random.RandomState)):
            raise TypeError
        return np.random.default_rng(rng)
    except (TypeError, ValueError):
        kind = type(rng).__name__
        if kind == "Generator":
            kind = f"a Generator of {type(rng).__module__.partition('.')[0]}"
        raise TypeError(
            f"{name} must be an int, a numpy.random.Generator or None, got {kind}"
        ) from None
