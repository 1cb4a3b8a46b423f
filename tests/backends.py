"""The backends that every test runs on: how each is entered, and what is watched while it runs.

A test takes the fixture ``xp`` and calls ``slra.name(...)``. Around the same call, ``jax-jit`` compiles, ``dask``
counts computes, and ``numpy-readonly`` freezes the arguments: no test body knows.
"""

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import array_api_compat as compat
import numpy as np
import pytest

from tests.cuda_host import host


def _plain(function: Callable[..., Any], request: Any) -> Callable[..., Any]:
    return function


@dataclass(frozen=True)
class Backend:
    """One way of running a test."""

    name: str
    module: str
    enter: Callable[[], contextlib.AbstractContextManager[Any]]
    wrap: Callable[[Callable[..., Any], Any], Callable[..., Any]] = _plain
    lacks: dict[str, str] = field(default_factory=dict)

    def missing(self) -> str | None:
        """Why this backend cannot run here, or None."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        if self.module == "cupy":
            import cupy

            return None if cupy.is_available() else "no usable CUDA device"
        return host.why_not() if self.enter is host.cupy_on_host else None


@contextlib.contextmanager
def _numpy() -> Iterator[Any]:
    import array_api_compat.numpy as xp

    yield xp


@contextlib.contextmanager
def _cupy() -> Iterator[Any]:
    import array_api_compat.cupy as xp

    yield xp


@contextlib.contextmanager
def _strict() -> Iterator[Any]:
    import array_api_strict as xp

    with xp.ArrayAPIStrictFlags(
        api_version="2024.12",
        boolean_indexing=False,
        data_dependent_shapes=False,
        enabled_extensions=("linalg",),
    ):
        yield xp


@contextlib.contextmanager
def _torch(default: str) -> Iterator[Any]:
    import array_api_compat.torch as xp
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, default))
    try:
        yield xp
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _jax() -> Iterator[Any]:
    import jax.numpy as xp

    yield xp


@contextlib.contextmanager
def _dask() -> Iterator[Any]:
    import array_api_compat.dask.array as xp
    import dask

    # One thread: the order of a sum, and so its rounding, is then the same each time.
    with dask.config.set(scheduler="synchronous"):
        yield xp


def _jitted(function: Callable[..., Any], request: Any) -> Callable[..., Any]:
    """Compile each call: JAX arrays are traced, every other argument is static."""
    import jax

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        traced = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        if not traced:
            return function(*args, **kwargs)

        @jax.jit
        def compiled(arrays: list[Any]) -> Any:
            stream = iter(arrays)
            filled = [next(stream) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
            args, kwargs = jax.tree.unflatten(tree, filled)
            return function(*args, **kwargs)

        return compiled(traced)

    return call


def _counted(function: Callable[..., Any], request: Any) -> Callable[..., Any]:
    """Fail the test if the call computes a graph more often than its marker allows."""
    import dask

    marker = request.node.get_closest_marker("dask_computes")
    allowed = marker.args[0] if marker else 0

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        computes = 0

        def scheduler(graph: Any, keys: Any, **options: Any) -> Any:
            nonlocal computes
            computes += 1
            return dask.get(graph, keys, **options)

        with dask.config.set(scheduler=scheduler):
            result = function(*args, **kwargs)
        assert computes <= allowed, f"{function.__name__} computed {computes} times"
        return result

    return call


def _frozen(function: Callable[..., Any], request: Any) -> Callable[..., Any]:
    """Pass read-only views, so that writing to an argument is an error."""

    def freeze(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        view = x.view()
        view.flags.writeable = False
        return view

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(freeze, args), **{name: freeze(x) for name, x in kwargs.items()})

    return call


_LAZY = {"eager": "values cannot be looked at here"}

BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("numpy", "numpy", _numpy),
        Backend("numpy-readonly", "numpy", _numpy, _frozen),
        Backend("array-api-strict", "array_api_strict", _strict),
        Backend("torch-float32", "torch", functools.partial(_torch, "float32")),
        Backend("torch-float64", "torch", functools.partial(_torch, "float64")),
        Backend("jax", "jax", _jax),
        Backend("jax-jit", "jax", _jax, _jitted, _LAZY),
        Backend("dask", "dask", _dask, _counted, _LAZY),
        Backend("cupy", "cupy", _cupy),
        # The CuPy path without a GPU: NumPy's arrays, and the kernels compiled by g++.
        Backend(
            "cupy-on-host",
            "numpy",
            host.cupy_on_host,
            lacks={"own arrays": "its arrays are NumPy's, which is what the test tells apart"},
        ),
    )
}


def to_xp(xp: Any, a: np.ndarray[Any, Any], device: Any = None, chunks: Any = None) -> Any:
    """Bring a NumPy array to a namespace; on Dask in two chunks along each of the last two axes."""
    if not compat.is_dask_namespace(xp):
        return xp.asarray(a, device=device)
    if chunks is None:
        chunks = tuple(
            n if axis < a.ndim - 2 else max(1, -(-n // 2)) for axis, n in enumerate(a.shape)
        )
    return xp.asarray(a, chunks=chunks)


def structure_to_xp(xp: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options of attention, those among them that are arrays brought to ``xp``."""
    return {name: to_xp(xp, x) if isinstance(x, np.ndarray) else x for name, x in options.items()}


def to_numpy(x: Any) -> np.ndarray[Any, Any]:
    """Bring an array of any backend to NumPy, computing it if it is lazy."""
    if compat.is_cupy_array(x):
        return x.get()
    if compat.is_torch_array(x):
        return x.detach().cpu().numpy()
    if compat.is_array_api_strict_namespace(compat.array_namespace(x)):
        import array_api_strict

        x = array_api_strict.asarray(x, device=array_api_strict.Device("CPU_DEVICE"))
    return np.asarray(x)


def brought(xp: Any, x: Any) -> Any:
    """NumPy arrays, also in tuples and lists, to the namespace, where it has their dtype."""
    if isinstance(x, (tuple, list)) and type(x) in (tuple, list):
        return type(x)(brought(xp, one) for one in x)
    if type(x) is not np.ndarray or compat.is_numpy_namespace(xp):
        return x
    if x.dtype.kind not in "biufc" or not hasattr(xp, x.dtype.name):
        return x
    return to_xp(xp, x.astype(x.dtype.newbyteorder("=")).copy())


def fetched(x: Any) -> Any:
    """Arrays of any library to NumPy's."""
    if isinstance(x, tuple):
        return type(x)(*map(fetched, x)) if hasattr(x, "_fields") else tuple(map(fetched, x))
    if isinstance(x, (np.ndarray, np.generic)) or not compat.is_array_api_obj(x):
        return x
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return to_numpy(x)


def other_device(xp: Any, stack: contextlib.ExitStack) -> Any:
    """Return a device that arrays are not created on by default; skip where there is only one."""
    if compat.is_array_api_strict_namespace(xp):
        return xp.Device("device1")
    if compat.is_torch_namespace(xp):
        import torch

        # With "meta" as the default, anything created without naming its device has no values.
        stack.enter_context(torch.device("meta"))
        return torch.device("cpu")
    if compat.is_jax_namespace(xp):
        import jax

        return jax.devices()[1]
    if compat.is_cupy_namespace(xp):
        import cupy

        if cupy.cuda.runtime.getDeviceCount() > 1:
            return cupy.cuda.Device(1)
    pytest.skip("only one device")
