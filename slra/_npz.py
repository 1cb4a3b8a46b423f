"""Files of plain NumPy arrays, read without unpickling and whatever is wrong with them.

What a file says of itself is checked before anything is unpacked, and what is unpacked before it is used: an array
fills its file or member to the last byte, and a member has the CRC that its archive states.
"""

import io
import math
import zipfile
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np

from slra._files import Arrays, File, opened

__all__ = ["read_npy", "read_npz"]

_HEADERS = {
    (1, 0): (2, np.lib.format.read_array_header_1_0),
    (2, 0): (4, np.lib.format.read_array_header_2_0),
}
# NumPy's own bound, which it looks at only after it has read the header.
_LONGEST_HEADER = 10_000
# Deflate makes no file smaller by more: zlib.net, "Maximum Compression Factor".
_DEFLATE_RATIO = 1032
_CHUNK = 2**20


def read_npz(
    source: File,
    wanted: Callable[[str], bool] = lambda name: True,
    check: Callable[[Arrays], None] = lambda stated: None,
) -> Arrays:
    """Read the wanted arrays of an ``.npz`` file.

    ``check`` may raise ValueError on their names, shapes and dtypes before they are unpacked: it gets arrays that have
    these and no memory.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        Says why, where it is not one of plain arrays.
    """
    with opened(source) as file:
        try:
            n_bytes = _size(file)
            with zipfile.ZipFile(file) as archive:
                members = _members(archive, wanted)
                stated: Arrays = {}
                for name, info in members.items():
                    with archive.open(info) as member:
                        stated[name] = _read_header(member, _limit(info, n_bytes)).stated()
                check(stated)
                arrays: Arrays = {}
                for name, info in members.items():
                    with archive.open(info) as member:
                        arrays[name] = _read_array(member, _limit(info, n_bytes))
                return arrays
        except Exception as error:  # as in read_npy
            raise ValueError(_said(error)) from error


def read_npy(source: File) -> np.ndarray[Any, Any]:
    """Read an ``.npy`` file; OSError where there is none, ValueError says why where it is not one of plain numbers."""
    with opened(source) as file:
        try:
            return _read_array(file, _size(file))
        # A damaged header makes NumPy raise whatever Python's own parser does, and zipfile what struct and zlib do.
        except Exception as error:
            raise ValueError(_said(error)) from error


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _size(file: IO[bytes]) -> int:
    size = file.seek(0, 2)
    file.seek(0)
    return size


def _members(archive: zipfile.ZipFile, wanted: Callable[[str], bool]) -> dict[str, zipfile.ZipInfo]:
    """Members of an archive by the names of their arrays."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if not wanted(name):
            continue
        if name in members:
            raise ValueError(f"it holds {name} twice")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{info.filename} must be stored or deflated, as numpy.savez does")
        members[name] = info
    return members


def _limit(info: zipfile.ZipInfo, n_bytes: int) -> int:
    """Most bytes that a member of an archive of so many bytes can hold, whatever it states."""
    ratio = 1 if info.compress_type == zipfile.ZIP_STORED else _DEFLATE_RATIO
    return min(info.file_size, min(info.compress_size, n_bytes) * ratio)


class _Header(NamedTuple):
    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[Any]

    def stated(self) -> np.ndarray[Any, Any]:
        """Return an array of this shape and dtype that takes no memory."""
        return np.broadcast_to(np.zeros((), self.dtype), self.shape)


def _read_header(file: IO[bytes], size: int) -> _Header:
    """Read what stands before the numbers, in a file of so many bytes; they must be able to hold what it claims."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"format {version} is not one of plain arrays")
    n_digits, parse = _HEADERS[version]
    digits = file.read(n_digits)
    length = int.from_bytes(digits, "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header claims to be {length} bytes long")
    header = _Header(*parse(io.BytesIO(digits + file.read(length))))
    shape, _, dtype = header
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded: that would run what is pickled in them")
    if min(shape, default=0) < 0 or dtype.itemsize == 0:
        raise ValueError(f"its header claims the shape {shape} and dtype {dtype}")
    claimed, left = math.prod(shape) * dtype.itemsize, size - file.tell()
    if claimed > left:
        raise ValueError(
            f"its header claims an array of shape {shape} and dtype {dtype}, {claimed} bytes, "
            f"and no more than {left} can follow"
        )
    return header


def _read_array(file: IO[bytes], size: int) -> np.ndarray[Any, Any]:
    """Read an array that fills a file of so many bytes; memory is asked for only where they can fill it."""
    shape, is_fortran, dtype = _read_header(file, size)
    content = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    start = 0
    while start < content.size:
        # In pieces, as zipfile makes a copy of what it reads.
        n_read = file.readinto(content[start : start + _CHUNK])  # type: ignore[attr-defined]
        if not n_read:
            raise ValueError(f"it ends {content.size - start} bytes before its array does")
        start += n_read
    # zipfile compares the CRC when it meets the end.
    if file.read(1):
        raise ValueError(f"more bytes follow than an array of shape {shape} and dtype {dtype} has")
    x: np.ndarray[Any, Any] = content.view(dtype)
    return x.reshape(shape[::-1]).T if is_fortran else x.reshape(shape)
