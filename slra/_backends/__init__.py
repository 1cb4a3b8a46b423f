"""The primitives, and the one place that knows which library they run on.

`primitives` hands an algorithm the table for its namespace. Every table derives from `agnostic.Primitives`,
written in the array API standard alone, and overrides what the library can do better. A library's table
is imported only once an array of that library has been seen, so nothing here imports a framework.
"""

import array_api_compat as compat

from slra._backends.agnostic import Primitives
from slra._typing import Namespace

__all__ = ["Primitives", "primitives"]


def primitives(xp: Namespace) -> Primitives:
    """Return the table of primitives for the namespace ``xp``."""
    if compat.is_numpy_namespace(xp):
        from slra._backends.numpy import NumpyPrimitives

        return NumpyPrimitives(xp)
    if compat.is_cupy_namespace(xp):
        from slra._backends.cupy import CupyPrimitives

        return CupyPrimitives(xp)
    if compat.is_torch_namespace(xp):
        from slra._backends.torch import TorchPrimitives

        return TorchPrimitives(xp)
    if compat.is_jax_namespace(xp):
        from slra._backends.jax import JaxPrimitives

        return JaxPrimitives(xp)
    if compat.is_dask_namespace(xp):
        from slra._backends.dask import DaskPrimitives

        return DaskPrimitives(xp)
    return Primitives(xp)
