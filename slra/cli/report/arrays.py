"""Queries, keys and values from the user's files, checked."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slra._files import opened
from slra._npz import read_npy, read_npz

__all__ = ["Layer", "Stored", "checked_layer", "notes", "read_layers"]

Arrays = dict[str, NDArray[Any]]

_NAMES = ("q", "k", "v")
_SHAPES = (
    "q (..., Hq, Nq, D), k (..., Hkv, Nk, D) and v (..., Hkv, Nk, Dv), with Hq a multiple of Hkv "
    "and no axis empty"
)
_NUMBERS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class Layer(NamedTuple):
    """Attention inputs of one layer, in the dtype to compute in.

    Attributes
    ----------
    name : str
        Of the arrays' folder or of the file.
    q : numpy.ndarray, float32 or float64, shape (..., Hq, Nq, D)
    k : numpy.ndarray, shape (..., Hkv, Nk, D)
    v : numpy.ndarray, shape (..., Hkv, Nk, Dv)
    dtype : str
        Of K as it is stored.
    itemsizes : tuple of (int, int)
        Bytes of a number of K and of V as they are stored.
    options : mapping
        What else `slra.attention` takes: ``is_causal``, ``scale``, ``softcap``, ``mask``.
    """

    name: str
    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    dtype: str
    itemsizes: tuple[int, int]
    options: Mapping[str, Any] = MappingProxyType({})


class Stored(NamedTuple):
    """An array, and its dtype in the file: bfloat16 is not one of NumPy's."""

    array: NDArray[Any]
    dtype: str
    itemsize: int


def read_layers(paths: Sequence[Path]) -> list[Layer]:
    """Read one archive, one ``.npy`` file of Q, K and V together, or three of one each.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If it is damaged, holds objects, or its arrays are missing, of a wrong dtype or shape, or not finite.
    """
    suffixes = {path.suffix for path in paths}
    if len(paths) == 3 and suffixes == {".npy"}:
        stored = {name: _read_npy(path) for name, path in zip(_NAMES, paths, strict=True)}
        return [checked_layer(paths[1].stem, stored, ", ".join(map(str, paths)))]
    if len(paths) != 1 or not suffixes <= {".npy", ".npz", ".safetensors"}:
        raise ValueError(
            "FILE must be one .npy, .npz or .safetensors file, or three .npy files in the order "
            f"q k v, got {' '.join(map(str, paths))}"
        )
    (path,) = paths
    if path.suffix == ".npy":
        return [checked_layer(path.stem, _split(_read_npy(path), path), str(path))]
    read = _read_npz if path.suffix == ".npz" else _read_safetensors
    grouped = _by_layer(_clearly(read, path), path)
    return [checked_layer(name or path.stem, stored, str(path)) for name, stored in grouped.items()]


def _clearly(read: Callable[[Path], Any], path: Path) -> Any:
    """Read a file; a ValueError says which."""
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read_npy(path: Path) -> Stored:
    return _of_numpy(_clearly(read_npy, path))


def _read_npz(path: Path) -> dict[str, Stored]:
    return {name: _of_numpy(x) for name, x in read_npz(path, _is_wanted).items()}


def _of_numpy(x: NDArray[Any]) -> Stored:
    return Stored(x, str(x.dtype), x.dtype.itemsize)


def _read_safetensors(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, deserialize

    with opened(path) as file:
        content = file.read()
    try:
        tensors = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return {name: _of_tensor(**tensor) for name, tensor in tensors if _is_wanted(name)}


def _of_tensor(dtype: str, shape: list[int], data: bytes) -> Stored:
    """Tensors other than floating ones come back as bytes, of a dtype that is refused later."""
    numbers = _NUMBERS.get(dtype)
    if numbers is None:
        return Stored(np.frombuffer(data, np.uint8), dtype, 1)
    x = np.frombuffer(data, np.dtype(numbers).newbyteorder("<")).reshape(shape)
    if dtype != "BF16":
        return _of_numpy(x)
    # The upper half of a float32.
    return Stored((x.astype(np.uint32) << 16).view(np.float32), "bfloat16", 2)


def _split(stored: Stored, path: Path) -> dict[str, Stored]:
    x = stored.array
    if x.ndim < 3 or x.shape[0] != 3:
        raise ValueError(
            f"{path} must have shape (3, ..., H, N, D), Q, K and V along the first axis, got {x.shape}; "
            "where their shapes differ, give three files in the order q k v"
        )
    return {name: stored._replace(array=part) for name, part in zip(_NAMES, x, strict=True)}


def _parts(name: str) -> tuple[str, str]:
    """Split "layer0/q" or "layer0.q" into the layer and the array."""
    at = max(name.rfind("/"), name.rfind("."))
    return name[: max(at, 0)], name[at + 1 :]


def _is_wanted(name: str) -> bool:
    return _parts(name)[1] in _NAMES


def _by_layer(arrays: dict[str, Stored], path: Path) -> dict[str, dict[str, Stored]]:
    layers: dict[str, dict[str, Stored]] = {}
    for full, stored in arrays.items():
        layer, name = _parts(full)
        if name in _NAMES:
            layers.setdefault(layer, {})[name] = stored
    if not layers:
        raise ValueError(
            f"{path} must hold arrays named q, k and v, or layer0/q, layer0/k, layer0/v and so on, "
            "and holds none of them"
        )
    for layer, found in layers.items():
        if missing := [name for name in _NAMES if name not in found]:
            where = f" for layer {layer}" if layer else ""
            raise ValueError(f"{path} must hold q, k and v, lacks {', '.join(missing)}{where}")
    return dict(sorted(layers.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer10 comes after layer9."""
    digits = "".join(c if c.isdigit() else f" {c} " for c in name).split()
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in digits]


def checked_layer(name: str, stored: dict[str, Stored], source: str) -> Layer:
    """Make a layer of its three arrays; ValueError, which names their source, where they are none."""
    arrays = {key: _check_numbers(key, stored[key], name, source) for key in _NAMES}
    dtype = np.result_type(*arrays.values())
    q, k, v = (arrays[key].astype(dtype) for key in _NAMES)
    if wrong := _misfit(q.shape, k.shape, v.shape):
        raise ValueError(
            f"{source}: layer {name} must have shapes {_SHAPES}, got {q.shape}, {k.shape} and {v.shape}: {wrong}"
        )
    sizes = stored["k"].itemsize, stored["v"].itemsize
    # A matrix is a head.
    q, k, v = (x[None] if x.ndim == 2 else x for x in (q, k, v))
    return Layer(name, q, k, v, stored["k"].dtype, sizes)


def _misfit(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> str | None:
    """Say which axes do not fit, or None."""
    if min(map(len, (q, k, v))) < 2 or len({len(q), len(k), len(v)}) > 1:
        return "they must have equally many axes, at least 2"
    pairs = (
        ("D, the last axis of q and k", q[-1], k[-1]),
        ("Nk, the second last axis of k and v", k[-2], v[-2]),
        ("Hkv, the third last axis of k and v", k[-3:-2], v[-3:-2]),
        ("the leading axes of q and k", q[:-3], k[:-3]),
        ("the leading axes of k and v", k[:-3], v[:-3]),
    )
    for axis, one, other in pairs:
        if one != other:
            return f"{axis}, must agree"
    for key, shape in (("q", q), ("k", k), ("v", v)):
        if 0 in shape:
            return f"axis {shape.index(0)} of {key} is empty"
    if len(q) > 2 and q[-3] % k[-3]:
        return f"the {q[-3]} heads of q are no multiple of the {k[-3]} of k"
    return None


def notes(layers: Sequence[Layer]) -> list[str]:
    """Point out shapes that may have been meant otherwise: tokens before heads."""
    return [
        f"{layer.name}: read as {layer.k.shape[-3]} heads of {layer.k.shape[-2]} tokens. "
        "Heads come before tokens, (..., heads, tokens, D): swap these axes if they are the other way round."
        for layer in layers
        if layer.k.shape[-3] > layer.k.shape[-2]
    ]


def _check_numbers(key: str, stored: Stored, layer: str, source: str) -> NDArray[Any]:
    """Widen real floating numbers to float32 or float64; refuse all else, NaN and infinity included."""
    x = stored.array
    if x.dtype.kind != "f":
        raise ValueError(
            f"{source}: {key} of layer {layer} must be real floating, got dtype {stored.dtype} "
            "(bfloat16 is read from .safetensors only)"
        )
    if not np.isfinite(x).all():
        raise ValueError(f"{source}: {key} of layer {layer} must be finite, holds NaN or infinity")
    return x.astype(np.float32 if x.dtype.itemsize <= 4 else np.float64)
