"""Bases in files, one or one for each layer: an .npz archive of plain arrays, read without unpickling."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from slra._npz import read_npz
from slra._validate import resolve

__all__ = ["MAPS", "NAMES", "read_bases", "shapes_of", "write_bases"]

Arrays: TypeAlias = dict[str, np.ndarray[Any, Any]]

MAPS = ("wq", "wk", "wv", "uv", "c", "mu")
NAMES = (*MAPS, "error")


def write_bases(path: str | PathLike[str], bases: Mapping[str, Any], *, layered: bool) -> None:
    """Write the arrays and ranks of bases, by the names of their layers, to exactly this path."""
    stored: dict[str, Any] = {
        f"{layer}/{name}" if layered else name: x
        for layer, basis in bases.items()
        for name, x in _arrays_of(basis).items()
    }
    with Path(path).open("wb") as file:
        np.savez(file, **stored)


def _arrays_of(basis: Any) -> Arrays:
    backend = resolve(basis=basis.wq)
    arrays: Arrays = {name: backend.to_numpy(getattr(basis, name)) for name in NAMES}
    return {**arrays, "ranks": np.asarray(basis.ranks, dtype=np.int64)}


def read_bases(path: str | PathLike[str], writer: str, *, layered: bool) -> dict[str, Arrays]:
    """Read and check a file, by layer; without layers all is under the empty name.

    ValueError, which names the ``writer`` of such files, where this is not one of them.
    """
    layers: dict[str, Arrays] = {}
    try:
        for key, x in read_npz(path).items():
            layer, _, name = key.rpartition("/") if layered else ("", "", key)
            layers.setdefault(layer, {})[name] = x
        for arrays in layers.values() if layered else [layers.get("", {})]:
            _check(arrays)
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        raise ValueError(f"path must be a file written by {writer}, got {path}: {error}") from error
    return layers


def _check(arrays: Arrays) -> None:
    """Raise ValueError unless names, dtypes and shapes belong together, and all is finite."""
    if set(arrays) != {*NAMES, "ranks"}:
        raise ValueError(f"it holds {sorted(arrays)}")
    ranks = arrays["ranks"]
    floating = [arrays[name] for name in NAMES]
    if any(x.dtype != floating[0].dtype for x in floating) or floating[0].dtype.kind != "f":
        raise ValueError("its arrays are not of one real floating dtype")
    if not all(bool(np.all(np.isfinite(x))) for x in floating):
        raise ValueError("it holds NaN or infinity")
    expected = shapes_of(arrays["wq"], arrays["wk"], arrays["wv"])
    expected["ranks"] = (*expected.pop("ranks"), 2)
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise ValueError(f"its {name} has shape {arrays[name].shape}, not {shape}")
    most = arrays["wk"].shape[-1], arrays["wv"].shape[-1]
    if ranks.dtype.kind != "i" or np.any(ranks < 1) or np.any(ranks > most):
        raise ValueError(f"its ranks are not between 1 and {most}")


def shapes_of(wq: Any, wk: Any, wv: Any) -> dict[str, tuple[int, ...]]:
    """Shapes that the parts of a basis must have to belong together, as its three maps say; of ranks, how many."""
    for name, x in (("wq", wq), ("wk", wk), ("wv", wv)):
        if x.ndim < 2:
            raise ValueError(f"{name} must have 2 dimensions or more, got shape {tuple(x.shape)}")
    heads_q, heads_k = tuple(wq.shape[-3:-2]), tuple(wk.shape[-3:-2])
    (width, rank), (width_v, rank_v), batch = wk.shape[-2:], wv.shape[-2:], tuple(wk.shape[:-3])
    return {
        "wq": (*batch, *heads_q, width, rank),
        "wk": (*batch, *heads_k, width, rank),
        "wv": (*batch, *heads_k, width_v, rank_v),
        "uv": (*batch, *heads_k, rank_v, width_v),
        "c": (*batch, *heads_k, 1, width),
        "mu": (*batch, *heads_k, 1, width_v),
        "error": (*batch, *heads_q),
        "ranks": (heads_k or (1,)),
    }
