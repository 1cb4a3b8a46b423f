"""Files: written whole or not at all, read only where they are files, and checked by a checksum.

One rule for all readers: OSError where there is no file to read (none, a folder, a pipe, no permission), ValueError
where there is one and anything is wrong with what it holds.
"""

import errno
import hashlib
import io
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from typing import IO, Any, TypeAlias

import numpy as np

__all__ = [
    "Arrays",
    "File",
    "checksum",
    "npz",
    "opened",
    "read_safetensors",
    "safetensors_content",
    "safetensors_metadata",
    "write_file",
    "write_safetensors",
]

Arrays: TypeAlias = dict[str, np.ndarray[Any, Any]]
File: TypeAlias = str | PathLike[str] | IO[bytes]


def write_file(target: File, content: bytes | memoryview) -> None:
    """Write a file so that at any moment the old one is there or the new one, whole.

    A file that is there keeps its mode, and a symbolic link stays one. What is not a path is a file opened for writing
    bytes, and gets them all.

    Raises
    ------
    OSError
        If they cannot be written, or the target is no regular file: it is then as it was, and nothing lies beside it.
        (A process that is killed may leave a file ``.slra-...`` there.)
    """
    if not isinstance(target, (str, PathLike)):
        _write_all(target, content)
        return
    path = os.fspath(target)
    partial = None
    try:
        mode = _mode_of(path)
        real = os.path.realpath(path)
        # A name of its own: the longest names leave no room for a suffix.
        partial = os.path.join(os.path.dirname(real), f".slra-{secrets.token_hex(8)}")
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None and mode != stat.S_IMODE(os.stat(partial).st_mode):
            os.chmod(partial, mode)
        os.replace(partial, real)
        partial = None
    except OSError as error:
        error.filename, error.filename2 = path, None
        raise
    finally:
        if partial is not None:
            _remove(partial)


def _write_all(target: IO[bytes], content: bytes | memoryview) -> None:
    """Write to an opened file, of which unbuffered ones may take less than they are given."""
    try:
        written = target.write(content)
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"path must be a path or a file opened for writing bytes, got {type(target).__name__}"
        ) from error
    rest = memoryview(content)[len(content) if written is None else written :]
    if rest:
        _write_all(target, rest)


def _mode_of(path: str) -> int | None:
    """Permission bits of a file that may be replaced; None where there is none."""
    try:
        state = os.stat(path)
    except FileNotFoundError:
        return None
    _check_regular(state.st_mode, path)
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    return stat.S_IMODE(state.st_mode)


def _check_regular(mode: int, path: str) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", path)


def _remove(path: str) -> None:
    # What is raised already says what went wrong.
    with suppress(OSError):
        os.unlink(path)


@contextmanager
def opened(source: File) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes from its start, or what is left of one that is open; OSError where it is none."""
    if not isinstance(source, (str, PathLike)):
        content = source.read() if hasattr(source, "read") else None
        if not isinstance(content, bytes):
            raise TypeError(
                f"path must be a path or a file opened for reading bytes, got {type(source).__name__}"
            )
        yield io.BytesIO(content)
        return
    path = os.fspath(source)
    # A pipe that nobody writes to would block here, and whoever opens it by its name is not told.
    with open(path, "rb", opener=_open_at_once) as file:
        _check_regular(os.fstat(file.fileno()).st_mode, path)
        yield file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def npz(arrays: Mapping[str, Any]) -> memoryview:
    """Content of an ``.npz`` archive of plain arrays; ZIP keeps a CRC of each."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getbuffer()


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("files of this kind need safetensors: pip install safetensors") from error
    return safetensors.numpy


def write_safetensors(target: File, arrays: Arrays, metadata: dict[str, str]) -> None:
    """Write arrays and metadata, and a checksum of both."""
    write_file(target, safetensors_content(arrays, metadata))


def safetensors_content(arrays: Arrays, metadata: dict[str, str]) -> bytes:
    """Return what `write_safetensors` writes."""
    library = _safetensors()
    arrays = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    metadata = metadata | {"checksum": checksum(arrays, metadata)}
    content: bytes = library.save(arrays, metadata)
    return content


def checksum(arrays: Arrays, metadata: Mapping[str, str]) -> str:
    """SHA-256 of metadata, names, shapes, dtypes and content."""
    stated = sorted((name, x) for name, x in metadata.items() if name != "checksum")
    digest = hashlib.sha256(repr(stated).encode())
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.shape} {x.dtype}".encode())
        digest.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def read_safetensors(
    source: File, written_as: str, damage: Callable[[Arrays], str] = lambda arrays: ""
) -> tuple[Arrays, dict[str, str]]:
    """Read what `write_safetensors` wrote with this ``format`` in the metadata.

    ``damage`` may say more of arrays whose checksum is wrong.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If anything is wrong with it.
    """
    library = _safetensors()
    with opened(source) as file:
        content = file.read()
    try:
        metadata = safetensors_metadata(content)
        if metadata.get("format") != written_as:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {written_as!r}")
        arrays: Arrays = library.load(content)
        del content
        if metadata.get("checksum") != checksum(arrays, metadata):
            raise ValueError(f"its checksum is not that of its content{damage(arrays)}")
    except Exception as error:  # of three parsers, none of which says what it may raise
        raise ValueError(str(error)) from error
    return arrays, metadata


def safetensors_metadata(content: bytes) -> dict[str, str]:
    """Metadata of a safetensors file: in the JSON header, whose length comes first."""
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return {str(name): str(value) for name, value in metadata.items()}
