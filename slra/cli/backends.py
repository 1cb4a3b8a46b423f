"""Array libraries the command line can be asked for. Imports one only when it is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Backend", "BackendUnavailableError", "open_backend"]


class BackendUnavailableError(Exception):
    """The array library is not installed, or has no device to run on."""


class Backend(NamedTuple):
    """What the demo needs of an array library, beyond the array API."""

    name: str
    from_numpy: Callable[[NDArray[Any]], Any]
    to_numpy: Callable[[Any], NDArray[Any]]
    wait: Callable[[Any], object]  # returns when the array is computed: timings need it


def open_backend(name: str) -> Backend:
    """Import the array library called `name`.

    Raises
    ------
    BackendUnavailableError
        If it is not installed or cannot run here; the message says what to do.
    """
    openers = {"numpy": _numpy, "torch": _torch, "jax": _jax, "cupy": _cupy}
    try:
        return openers[name]()
    except ImportError as error:
        raise BackendUnavailableError(
            f'backend {name} cannot be imported ({error}): pip install ".[{name}]" in a clone of slra'
        ) from error


def _numpy() -> Backend:
    return Backend("numpy", np.asarray, np.asarray, lambda x: None)


def _torch() -> Backend:
    import torch

    return Backend("torch", torch.asarray, np.asarray, lambda x: None)


def _jax() -> Backend:
    import jax

    return Backend("jax", jax.numpy.asarray, np.asarray, jax.block_until_ready)


def _cupy() -> Backend:
    import cupy

    # The import works without a GPU; only the first allocation would fail.
    if not cupy.is_available():
        raise BackendUnavailableError("backend cupy needs a CUDA device, and none is usable here")
    return Backend(
        "cupy", cupy.asarray, cupy.asnumpy, lambda x: cupy.cuda.get_current_stream().synchronize()
    )
