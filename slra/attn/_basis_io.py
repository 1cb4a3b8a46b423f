"""Bases in files, one or one for each layer: an .npz archive of plain arrays, read without unpickling."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from slra._files import Arrays, File, npz, write_file
from slra._npz import read_npz
from slra._validate import resolve
from slra.attn.coding import STEPS, Coding
from slra.attn.maps import NAMES_OF_MAPS

__all__ = ["CODING", "NAMES", "read_bases", "shapes_of", "write_bases"]

NAMES = (*NAMES_OF_MAPS, "error")
# The parts of `slra.attn.coding.Coding`, which a basis may lack.
CODING = tuple(f"coding_{name}" for name in Coding._fields)


def write_bases(path: File, bases: Mapping[str, Any], *, layered: bool) -> None:
    """Write the arrays and ranks of bases, by the names of their layers, to exactly this path."""
    stored: dict[str, Any] = {
        f"{layer}/{name}" if layered else name: x
        for layer, basis in bases.items()
        for name, x in _arrays_of(basis).items()
    }
    write_file(path, npz(stored))


def _arrays_of(basis: Any) -> Arrays:
    backend = resolve(basis=basis.wq)
    arrays: Arrays = {name: backend.to_numpy(getattr(basis, name)) for name in NAMES}
    if basis.coding is not None:
        coded = zip(CODING, basis.coding, strict=True)
        arrays |= {name: backend.to_numpy(x) for name, x in coded}
    ranks = np.asarray(basis.ranks, dtype=np.int64)
    return {**arrays, "ranks": ranks, "is_held_out": np.asarray(bool(basis.is_held_out))}


def read_bases(path: File, writer: str, *, layered: bool) -> dict[str, Arrays]:
    """Read and check a file, by layer; without layers all is under the empty name.

    OSError where there is no such file, ValueError, which names the ``writer`` of such files, where this is not one.
    """

    def check(stated: Arrays) -> None:
        for arrays in _by_layer(stated, layered=layered).values():
            _check_shapes(arrays)

    try:
        layers = _by_layer(read_npz(path, check=check), layered=layered)
        for arrays in layers.values():
            _check_values(arrays)
    except ValueError as error:
        raise ValueError(f"path must be a file written by {writer}, got {path}: {error}") from error
    return layers


def _by_layer(arrays: Arrays, *, layered: bool) -> dict[str, Arrays]:
    if not layered:
        return {"": arrays}
    layers: dict[str, Arrays] = {}
    for key, x in arrays.items():
        layer, _, name = key.rpartition("/")
        layers.setdefault(layer, {})[name] = x
    return layers


def _check_shapes(arrays: Arrays) -> None:
    """Raise ValueError unless names, dtypes and shapes belong together."""
    coded = CODING if any(name in arrays for name in CODING) else ()
    if coded and set(coded) - set(arrays) == {"coding_rotary"}:
        raise ValueError("it is of an older version, whose coding has no frequencies: fit again")
    if set(arrays) != {*NAMES, *coded, "ranks", "is_held_out"}:
        raise ValueError(f"it holds {sorted(arrays)}")
    floating = [arrays[name] for name in (*NAMES, *coded)]
    if any(x.dtype != floating[0].dtype for x in floating) or floating[0].dtype.kind != "f":
        raise ValueError("its arrays are not of one real floating dtype")
    expected = shapes_of(arrays["wq"], arrays["wk"], arrays["wv"])
    expected["ranks"], expected["is_held_out"] = (*expected.pop("ranks"), 2), ()
    if coded:
        across_heads = arrays["coding_rate_k"].shape != (*arrays["wk"].shape[:-2], len(STEPS))
        expected |= _shapes_of_coding(arrays["wk"], arrays["wv"], across_heads=across_heads)
        expected["coding_rotary"] += arrays["coding_rotary"].shape[-1:]
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise ValueError(f"its {name} has shape {arrays[name].shape}, not {shape}")
    if arrays["ranks"].dtype.kind != "i":
        raise ValueError(f"its ranks are {arrays['ranks'].dtype}, not integers")
    if arrays["is_held_out"].dtype.kind != "b":
        raise ValueError(f"its is_held_out is {arrays['is_held_out'].dtype}, not boolean")


def _shapes_of_coding(wk: Any, wv: Any, *, across_heads: bool) -> dict[str, tuple[int, ...]]:
    lead, d, d_v = tuple(wk.shape[:-2]), wk.shape[-2], wv.shape[-2]
    n_heads = lead[-1] if across_heads and lead else 1
    all_k, all_v = n_heads * d, n_heads * d_v
    maps = ((d, all_k), (d, all_k), (d_v, all_v), (1, d), (1, d_v))
    numbers = ((all_k,), (all_v,), (len(STEPS),), (len(STEPS),), ())
    of_numbers = (*lead[:-1], 1) if across_heads and lead else lead
    shapes = [*((*lead, *last) for last in maps), *((*of_numbers, *last) for last in numbers)]
    return dict(zip(CODING, shapes, strict=True))


def _check_values(arrays: Arrays) -> None:
    """Raise ValueError unless all is finite, and no rank beyond the width of its map."""
    named = [x for name, x in arrays.items() if name not in ("ranks", "is_held_out")]
    if not all(bool(np.all(np.isfinite(x))) for x in named):
        raise ValueError("it holds NaN or infinity")
    ranks, most = arrays["ranks"], (arrays["wk"].shape[-1], arrays["wv"].shape[-1])
    if np.any(ranks < 1) or np.any(ranks > most):
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
