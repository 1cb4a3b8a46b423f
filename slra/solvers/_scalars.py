"""Arithmetic of steps and residuals, written once for plain numbers and for arrays of them.

One problem whose values can be looked at has plain numbers: no launches on a device, no small arrays. A batch has an
array of them, a number a problem, and a traced or lazy problem an array of no dimensions.
"""

import math
import numbers
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from slra._backends import Backend
from slra._typing import Array
from slra._validate import check_positive, check_tau

__all__ = ["Scalars", "as_scalars", "check_steps", "norm", "scalars_of"]


class Scalars(NamedTuple):
    """Functions of numbers, or of arrays of numbers, and what joins them to the arrays that are solved for.

    Attributes
    ----------
    batch : tuple of int
        Leading axes of the arrays, which count problems.
    full : callable
        ``value -> number``, one for each problem.
    where, maximum, minimum, sqrt, isfinite : callable
        As the standard has them.
    negate : callable
        ``logical_not``.
    ratio : callable
        ``(a, b) -> a / b``, 0 where b is 0.
    spread : callable
        Number or numbers, such that they multiply the arrays that are solved for.
    pick : callable
        ``(condition, x, y)``: x for the problems where it holds, else y.
    """

    batch: tuple[int, ...]
    full: Callable[[float], Any]
    where: Callable[[Any, Any, Any], Any]
    maximum: Callable[[Any, Any], Any]
    minimum: Callable[[Any, Any], Any]
    sqrt: Callable[[Any], Any]
    isfinite: Callable[[Any], Any]
    negate: Callable[[Any], Any]
    ratio: Callable[[Any, Any], Any]
    spread: Callable[[Any], Any]
    pick: Callable[[Any, Array, Array], Array]

    @property
    def are_numbers(self) -> bool:
        """Whether they are plain numbers."""
        return self.full is float


NUMBERS = Scalars(
    batch=(),
    full=float,
    where=lambda condition, x, y: x if condition else y,
    maximum=max,
    minimum=min,
    sqrt=math.sqrt,
    isfinite=math.isfinite,
    negate=operator.not_,
    ratio=lambda x, y: x / y if y else 0.0,
    spread=lambda number: number,
    pick=lambda condition, x, y: x if condition else y,
)


def scalars_of(x: Array, batch: tuple[int, ...], backend: Backend, *, as_numbers: bool) -> Scalars:
    """Return the arithmetic for problems that share ``x``, whose leading axes ``batch`` tell them apart."""
    if as_numbers and not batch:
        return NUMBERS
    xp = backend.xp
    dtype, device = backend.real_dtype(x.dtype), backend.creation_device(x)

    def array(value: Any) -> Array:
        if isinstance(value, (bool, int, float)):
            return xp.full((), value, dtype=dtype, device=device)
        return value

    def where(condition: Any, a: Any, b: Any) -> Array:
        return xp.where(condition, array(a), array(b))

    def ratio(a: Any, b: Any) -> Array:
        b = array(b)
        return where(b == 0, 0.0, a / where(b == 0, 1.0, b))

    def spread(number: Any) -> Array:
        number = array(number)
        return xp.reshape(number, tuple(number.shape) + (1,) * (x.ndim - number.ndim))

    def pick(condition: Array, a: Array, b: Array) -> Array:
        shape = tuple(condition.shape) + (1,) * (a.ndim - condition.ndim)
        return xp.where(xp.reshape(condition, shape), a, b)

    return Scalars(
        batch=batch,
        full=lambda value: xp.full(batch, value, dtype=dtype, device=device),
        where=where,
        maximum=lambda a, b: xp.maximum(array(a), array(b)),
        minimum=lambda a, b: xp.minimum(array(a), array(b)),
        sqrt=xp.sqrt,
        isfinite=xp.isfinite,
        negate=xp.logical_not,
        ratio=ratio,
        spread=spread,
        pick=pick,
    )


def norm(x: Array, scalars: Scalars, backend: Backend) -> Any:
    """Euclidean norm of each problem's part of ``x``, whose squares may leave the range of the dtype."""
    axes = tuple(range(len(scalars.batch), x.ndim))
    with backend.ignore_overflow():
        if scalars.are_numbers:
            limits = backend.xp.finfo(x.dtype)
            square = float(backend.inner(x, x))
            if float(limits.smallest_normal) / float(limits.eps) < square < float(limits.max):
                return math.sqrt(square)
            if math.prod(x.shape) == 0:
                return 0.0
        if not axes:
            size = backend.xp.abs(x)
        elif not backend.is_eager(x):
            # One pass, and a fraction of the operations in a graph; nothing stops there for what a square underflows.
            return backend.xp.sqrt(backend.inner(x, x, axes))
        elif 0 in x.shape:
            return scalars.full(0.0)
        else:
            size = backend.group_norm(x, axes)
    size = backend.xp.reshape(size, scalars.batch)
    return float(size) if scalars.are_numbers else size


def check_steps(
    step: Any, x: Array, name: str, backend: Backend
) -> tuple[float | Array, tuple[int, ...]]:
    """Return a step, or one for each problem such that they broadcast to ``x``, and the axes that count problems.

    None is to be 0, in the dtype of ``x`` either.
    """
    xp = backend.xp
    if isinstance(step, numbers.Real):
        return check_positive(step, name, limits=xp.finfo(x.dtype)), ()
    shape = tuple(getattr(step, "shape", ()))
    if 0 < len(shape) < x.ndim and shape == tuple(x.shape[: len(shape)]):
        step = xp.reshape(step, shape + (1,) * (x.ndim - len(shape)))
    step = check_tau(backend, x, step, name, axes=() if x.ndim > 1 else tuple(range(x.ndim)))
    if isinstance(step, float):
        return step, ()
    if backend.is_eager(step) and bool(xp.any(step == 0)):
        raise ValueError(f"{name} must be finite and greater than 0, got 0")
    step = xp.reshape(step, (1,) * (x.ndim - step.ndim) + tuple(step.shape)) if step.ndim else step
    n_batch = max((axis + 1 for axis, n in enumerate(step.shape) if n != 1), default=0)
    return (step if n_batch else xp.reshape(step, ())), tuple(x.shape[:n_batch])


def as_scalars(step: float | Array, scalars: Scalars, backend: Backend) -> Any:
    """Return what `check_steps` did as a number for each problem."""
    if isinstance(step, float):
        return scalars.full(step)
    if scalars.are_numbers:
        return float(step)
    n_batch = len(scalars.batch)
    step = backend.xp.reshape(step, tuple(step.shape[:n_batch]))
    return backend.xp.broadcast_to(step, scalars.batch)
