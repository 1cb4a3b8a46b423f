"""The primitives, and the one place that knows which library they run on.

`backend_of` hands an algorithm the backend of its namespace. Every backend derives from `standard.Backend`,
written in the array API standard alone, and overrides what the library can do better. A library's backend
is imported only once an array of that library has been seen, so nothing here imports a framework.
"""

import functools
import sys
from typing import Any

import array_api_compat as compat

from slra._backends.standard import Backend
from slra._typing import Namespace

__all__ = ["Backend", "backend_of", "backend_while_compiling"]


@functools.cache
def backend_of(xp: Namespace) -> Backend:
    """Return the backend of the namespace ``xp``."""
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
    return Backend(xp)


def backend_while_compiling(x: Any) -> Backend | None:
    """Return the backend of a tensor while torch.compile traces; None elsewhere.

    It follows no cache, and so would follow all that it takes to find a namespace and a backend: a third of the time
    that it takes to trace an attention layer.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.compiler.is_compiling() or not isinstance(x, torch.Tensor):
        return None
    from slra._backends.torch import WHILE_COMPILING

    return WHILE_COMPILING
