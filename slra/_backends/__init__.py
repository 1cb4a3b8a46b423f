"""The primitives, and the one place that knows which library they run on.

`backend_of` hands an algorithm the backend of its namespace. Every backend derives from `standard.Backend`,
written in the array API standard alone, and overrides what the library can do better. A library's backend
is imported only once an array of that library has been seen, so nothing here imports a framework.
"""

import functools
import sys
from types import ModuleType
from typing import Any

import array_api_compat as compat
import numpy as np

from slra._backends.registered import other_backend, register_backend
from slra._backends.standard import Backend
from slra._typing import Array, Namespace

__all__ = [
    "Backend",
    "backend_for",
    "backend_of",
    "known_backend",
    "namespace_of",
    "register_backend",
]

# Packages whose types of arrays have one namespace whatever is in them.
_ROOTS = ("numpy", "torch", "cupy", "jax", "jaxlib", "dask")
_by_type: dict[type, Backend] = {}


def known_backend(x: Any) -> Backend | None:
    """Return the backend of an array of a type that has been seen; None for all else.

    Asking an array for its namespace takes a third of the smallest functions. torch.compile, which follows no cache,
    would follow all that it takes to find it: a third of the time that it takes to trace an attention layer.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.compiler.is_compiling():
        return _by_type.get(type(x))
    if not isinstance(x, torch.Tensor):
        return None
    from slra._backends.torch import WHILE_COMPILING

    return WHILE_COMPILING


def backend_for(x: Array) -> Backend:
    """Return the backend of an array."""
    if (known := known_backend(x)) is not None:
        return known
    backend = backend_of(_namespace(x))
    # NumPy's scalars have a namespace, and are not arrays.
    if type(x).__module__.partition(".")[0] in _ROOTS and not isinstance(x, np.generic):
        _by_type[type(x)] = backend
    return backend


def namespace_of(x: Array) -> Any:
    """Return the namespace of an array, what it lacks made of what it has."""
    return backend_for(x).xp


def _namespace(x: Array) -> Namespace:
    xp = x.__array_namespace__() if hasattr(type(x), "__array_namespace__") else None
    # What array_api_compat asks of a namespace, not all have: to be a module, or to hash.
    return compat.array_namespace(x) if xp is None or isinstance(xp, ModuleType) else xp


def backend_of(xp: Namespace) -> Backend:
    """Return the backend of the namespace ``xp``."""
    # Those that are known are modules; anything else may not hash.
    found = _known(xp) if isinstance(xp, ModuleType) else None
    return other_backend(xp) if found is None else found


@functools.cache
def _known(xp: Namespace) -> Backend | None:
    if compat.is_numpy_namespace(xp):
        from slra._backends.numpy import NumpyBackend

        return NumpyBackend(xp)
    if compat.is_cupy_namespace(xp):
        from slra._backends.cupy import CupyBackend

        return CupyBackend(xp)
    if compat.is_torch_namespace(xp):
        from slra._backends.torch import TorchBackend

        return TorchBackend(xp)
    if compat.is_jax_namespace(xp):
        from slra._backends.jax import JaxBackend

        return JaxBackend(xp)
    if compat.is_dask_namespace(xp):
        from slra._backends.dask import DaskBackend

        return DaskBackend(xp)
    return None
