"""The primitives, and the one place that knows which library they run on.

`backend_of` hands an algorithm the backend of its namespace. Every backend derives from `standard.Backend`,
written in the array API standard alone, and overrides what the library can do better. A library's backend
is imported only once an array of that library has been seen, so nothing here imports a framework.
"""

import functools
from types import ModuleType
from typing import Any

import array_api_compat as compat
import numpy as np

from slra._backends.registered import other_backend, register_backend
from slra._backends.standard import Backend
from slra._typing import Array, Namespace

__all__ = ["Backend", "backend_for", "backend_of", "namespace_of", "register_backend"]


def backend_for(x: Array) -> Backend:
    """Return the backend of an array."""
    # NumPy's own type is known at once: asking for its namespace takes a tenth of the smallest functions.
    return _numpys() if type(x) is np.ndarray else backend_of(_namespace(x))


def namespace_of(x: Array) -> Any:
    """Return the namespace of an array, what it lacks made of what it has."""
    return backend_for(x).xp


@functools.cache
def _numpys() -> Backend:
    return backend_of(compat.array_namespace(np.empty(0)))


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
