"""Backends for other libraries, from outside or from a module of ours that is imported when needed."""

import importlib

from slra._backends.completed import Completed
from slra._backends.lacking import title
from slra._backends.other import OtherBackend
from slra._typing import Namespace

__all__ = ["other_backend", "register_backend"]

# Modules of ours, which register their backends, by the names of namespaces.
_OURS = {
    "cubed": "cubed",
    "cubed.array_api": "cubed",
    "mlx.core": "mlx",
    "ndonnx": "ndonnx",
    "sparse": "pydata_sparse",
}
# Those that have a backend of another kind, which no registration replaces.
_KNOWN = ("numpy", "cupy", "torch", "jax.numpy", "dask.array")

_registered: dict[str, type[OtherBackend]] = {}
# By identity, as a namespace may not hash; with the namespace, which it keeps alive.
_completed: dict[int, Completed] = {}
_made: dict[int, OtherBackend] = {}


def register_backend(namespace_name: str, Backend: type) -> None:
    """Give the primitives of a library that slra does not know.

    Any namespace of the array API standard works without it. A primitive is a step of an algorithm that a library may
    do better than the standard's functions: a QR, a small SVD, attention. See "Your library here" in the documentation.

    Parameters
    ----------
    namespace_name
        Name of the namespace, ``xp.__name__``, such as "mlx.core". A second registration replaces the first.
    Backend
        Class whose methods replace primitives of the same names; in them ``self.xp`` is the namespace, and ``super()``
        has the reference. Its attribute ``functions``, a dictionary, may have functions to call in place of the
        namespace's own where these differ from the standard: ``{"sum": ..., "linalg.qr": ...}``.

    Returns
    -------
    None
        From now on arrays of that namespace use it, also in objects that were made before.

    Raises
    ------
    TypeError
        Where the name is not a string, or the second argument not a class, or it has a public method that is not a
        primitive.
    ValueError
        Where slra has a backend of its own for the library: NumPy, CuPy, PyTorch, JAX, Dask.

    Examples
    --------
    >>> import slra
    >>> class Mine:
    ...     functions = {"sum": lambda x, *, axis=None, keepdims=False, dtype=None: ...}
    ...
    ...     def qr(self, y):
    ...         return self.xp.my_fast_qr(y)
    >>> slra.register_backend("mylibrary", Mine)
    """
    if not isinstance(namespace_name, str):
        raise TypeError(
            f"namespace_name must be a string, xp.__name__, got {type(namespace_name).__name__}"
        )
    if not isinstance(Backend, type):
        raise TypeError(f"Backend must be a class, got {type(Backend).__name__}")
    if namespace_name.removeprefix("array_api_compat.") in _KNOWN:
        raise ValueError(
            f"namespace_name must be of a library that slra does not know, got {namespace_name!r}"
        )
    unknown = sorted(name for name in _own(Backend) if not hasattr(OtherBackend, name))
    if unknown:
        raise TypeError(f"Backend must have methods that are primitives, got {', '.join(unknown)}")
    if not issubclass(Backend, OtherBackend):
        Backend = type(Backend.__name__, (Backend, OtherBackend), {})
    name = namespace_name.removeprefix("array_api_compat.")
    _registered[name] = Backend
    # Arrays that objects were made of belong to the same namespace as before, which is compared.
    for number in [i for i, xp in _completed.items() if xp.__name__ == name]:
        _made.pop(number, None)


def _own(kind: type) -> set[str]:
    """Public names that a class adds to what every object has."""
    names = {name for one in kind.__mro__ if one is not object for name in vars(one)}
    return {name for name in names if not name.startswith("_")}


def other_backend(xp: Namespace) -> OtherBackend:
    """Return the backend of a namespace that is not known here."""
    found = _made.get(id(xp))
    if found is None:
        name = title(xp)
        if name not in _registered and name in _OURS:
            importlib.import_module(f"slra._backends.{_OURS[name]}")
        kind = _registered.get(name, OtherBackend)
        whole = _completed.setdefault(id(xp), Completed(xp))
        found = _made[id(xp)] = kind(whole)
        whole.belongs_to(found)
    return found
