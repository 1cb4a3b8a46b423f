"""Files of plain NumPy arrays, read without unpickling and whatever is wrong with them."""

import math
import zipfile
import zlib
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np

__all__ = ["read_npy", "read_npz"]

# What zipfile and NumPy raise on files that are cut off, damaged, encrypted, of another kind, or that hold objects.
_DAMAGE = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    EOFError,
    OSError,
    OverflowError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# Deflate makes no file smaller by more: zlib.net, "Maximum Compression Factor".
_DEFLATE_RATIO = 1032


def read_npz(
    path: str | PathLike[str], wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, np.ndarray[Any, Any]]:
    """Read the wanted arrays of an ``.npz`` file; ValueError says why where it is not one of plain arrays."""
    with Path(path).open("rb") as file:
        try:
            n_bytes = _size(file)
            with zipfile.ZipFile(file) as archive:
                members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
                return {
                    name: _read_member(archive, info, n_bytes)
                    for name, info in members.items()
                    if wanted(name)
                }
        except _DAMAGE as error:
            raise ValueError(str(error)) from error


def read_npy(path: str | PathLike[str]) -> np.ndarray[Any, Any]:
    """Read an ``.npy`` file; ValueError says why where it is not one of plain numbers."""
    with Path(path).open("rb") as file:
        try:
            return _read_array(file, _size(file))
        except _DAMAGE as error:
            raise ValueError(str(error)) from error


def _size(file: IO[bytes]) -> int:
    size = file.seek(0, 2)
    file.seek(0)
    return size


def _read_member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, n_bytes: int
) -> np.ndarray[Any, Any]:
    """Read an array of an archive of so many bytes, which the sizes that it states may not exceed."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename} must be stored or deflated, as numpy.savez does")
    limit = min(info.file_size, n_bytes * _DEFLATE_RATIO)
    with archive.open(info) as member:
        return _read_array(member, limit)


def _read_array(file: IO[bytes], size: int) -> np.ndarray[Any, Any]:
    """Read an array from a file of so many bytes; memory is asked for only where they can fill it."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"format {version} is not one of plain arrays")
    shape, _, dtype = _HEADERS[version](file)
    if min(shape, default=0) < 0:
        raise ValueError(f"its header claims the shape {shape}")
    claimed, left = math.prod(shape) * dtype.itemsize, size - file.tell()
    if claimed > left and not dtype.hasobject:
        raise ValueError(
            f"its header claims an array of shape {shape} and dtype {dtype}, {claimed} bytes, "
            f"and no more than {left} can follow"
        )
    file.seek(0)
    return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
