"""Files of plain NumPy arrays, read without unpickling and whatever is wrong with them."""

import zipfile
import zlib
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_npy", "read_npz"]

# What zipfile and NumPy raise on files that are cut off, damaged, of another kind, or that hold objects.
_DAMAGE = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    EOFError,
    OSError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_npz(path: str | PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Read every array of an ``.npz`` file; ValueError says why where it is not one of plain arrays."""
    with Path(path).open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except _DAMAGE as error:
            raise ValueError(str(error)) from error


def read_npy(path: str | PathLike[str]) -> np.ndarray[Any, Any]:
    """Read an ``.npy`` file; ValueError says why where it is not one of plain numbers."""
    with Path(path).open("rb") as file:
        try:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
        except _DAMAGE as error:
            raise ValueError(str(error)) from error
