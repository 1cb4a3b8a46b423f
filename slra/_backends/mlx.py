"""MLX, Apple's arrays: its functions called as the standard calls them.

Needs: mlx. Arrays lie where MLX puts them, on its default device: they have no ``device``. Factorisations run on its
CPU stream, the only one that has them.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from slra._backends.other import OtherBackend
from slra._backends.registered import register_backend
from slra._typing import Array, DType

__all__ = ["MlxBackend"]


def _sum(
    x: Array, *, axis: Any = None, dtype: DType | None = None, keepdims: bool = False
) -> Array:
    return mx.sum(x if dtype is None else x.astype(dtype), axis=axis, keepdims=keepdims)


def _argsort(x: Array, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Array:
    """Sort stably, as MLX does; backwards by turning the array over and back."""
    if not descending:
        return mx.argsort(x, axis=axis)
    last = x.shape[axis] - 1
    return mx.flip(last - mx.argsort(mx.flip(x, axis=axis), axis=axis).astype(mx.int32), axis=axis)


def _sort(x: Array, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Array:
    found = mx.sort(x, axis=axis)
    return mx.flip(found, axis=axis) if descending else found


def _asarray(
    x: Any, *, dtype: DType | None = None, device: Any = None, copy: bool | None = None
) -> Array:
    if isinstance(x, np.ndarray | np.generic):
        # Not through single precision, to which MLX would bring NumPy's double.
        dtype = dtype or getattr(mx, "bool_" if x.dtype.name == "bool" else x.dtype.name)
    return mx.array(x, dtype=dtype) if dtype is not None else mx.array(x)


def _searchsorted(places: Array, values: Array, *, side: str = "left") -> Array:
    return mx.searchsorted(places, values, side=side).astype(mx.int32)


def _without_device(function: Callable[..., Array]) -> Callable[..., Array]:
    def call(*args: Any, device: Any = None, **kwargs: Any) -> Array:
        return function(*args, **kwargs)

    return call


def _svd(x: Array, *, full_matrices: bool = True) -> tuple[Array, Array, Array]:
    """Cut off what makes it thin: MLX gives all vectors of the longer side."""
    u, s, vh = mx.linalg.svd(x, stream=mx.cpu)
    if full_matrices:
        return u, s, vh
    k = min(x.shape[-2:])
    return u[..., :k], s, vh[..., :k, :]


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Array, *, mode: str = "reduced") -> Any:
        return function(x, stream=mx.cpu)

    return call


def _cumulative_sum(x: Array, *, axis: int = -1, dtype: DType | None = None) -> Array:
    return mx.cumsum(x if dtype is None else x.astype(dtype), axis=axis)


class MlxBackend(OtherBackend):
    """Functions whose arguments are not the standard's, and factorisations on the CPU."""

    functions: ClassVar[Mapping[str, Callable[..., Any]]] = {
        "sum": _sum,
        "argsort": _argsort,
        "sort": _sort,
        "asarray": _asarray,
        "searchsorted": _searchsorted,
        "cumulative_sum": _cumulative_sum,
        "astype": lambda x, dtype, *, copy=True, device=None: x.astype(dtype),
        "linalg.svd": _svd,
        **{
            name: _without_device(getattr(mx, name))
            for name in (
                "arange",
                "eye",
                "full",
                "full_like",
                "ones",
                "ones_like",
                "zeros",
                "zeros_like",
            )
        },
        **{
            f"linalg.{name}": _on_cpu(getattr(mx.linalg, name))
            for name in ("qr", "eigh", "eigvalsh", "cholesky", "inv")
        },
    }

    def accumulation_dtype(self, like: Array) -> DType:
        """Single precision: Apple's GPUs have no other."""
        return like.dtype if mx.finfo(like.dtype).bits >= 32 else mx.float32


register_backend("mlx.core", MlxBackend)
