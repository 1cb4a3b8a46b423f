"""Bases in files: an .npz archive of plain arrays, read without unpickling."""

from os import PathLike
from typing import Any

import numpy as np

from slra._npz import read_npz
from slra._validate import resolve

__all__ = ["load_arrays", "save_arrays"]

NAMES = ("wq", "wk", "wv", "uv", "c", "mu", "error")


def save_arrays(path: str | PathLike[str], basis: Any) -> None:
    """Write the arrays and the ranks of a basis to exactly this path."""
    table = resolve(basis=basis.wq)
    arrays: dict[str, Any] = {name: table.to_numpy(getattr(basis, name)) for name in NAMES}
    with open(path, "wb") as file:
        np.savez(file, ranks=np.asarray(basis.ranks, dtype=np.int64), **arrays)


def load_arrays(path: str | PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Read them back; ValueError where the file is not what `save_arrays` writes."""
    try:
        arrays = read_npz(path)
        _check(arrays)
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        raise ValueError(
            f"path must be a file written by AttentionBasis.save, got {path}: {error}"
        ) from error
    return arrays


def _check(arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """Raise ValueError unless names, dtypes and shapes belong together, and all is finite."""
    if set(arrays) != {*NAMES, "ranks"}:
        raise ValueError(f"it holds {sorted(arrays)}")
    ranks = arrays["ranks"]
    floating = [arrays[name] for name in NAMES]
    if any(x.dtype != floating[0].dtype for x in floating) or floating[0].dtype.kind != "f":
        raise ValueError("its arrays are not of one real floating dtype")
    if not all(bool(np.all(np.isfinite(x))) for x in floating):
        raise ValueError("it holds NaN or infinity")
    wq, wk, wv = arrays["wq"], arrays["wk"], arrays["wv"]
    heads_q, heads_k = wq.shape[-3:-2], wk.shape[-3:-2]
    (width, rank), (width_v, rank_v), batch = wk.shape[-2:], wv.shape[-2:], wk.shape[:-3]
    expected = {
        "wq": (*batch, *heads_q, width, rank),
        "wv": (*batch, *heads_k, width_v, rank_v),
        "uv": (*batch, *heads_k, rank_v, width_v),
        "c": (*batch, *heads_k, 1, width),
        "mu": (*batch, *heads_k, 1, width_v),
        "error": (*batch, *heads_q),
        "ranks": ((heads_k or (1,))[0], 2),
    }
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise ValueError(f"its {name} has shape {arrays[name].shape}, not {shape}")
    if ranks.dtype.kind != "i" or np.any(ranks < 1) or np.any(ranks > (rank, rank_v)):
        raise ValueError(f"its ranks are not between 1 and {(rank, rank_v)}")
