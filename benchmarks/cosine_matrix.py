"""A large matrix whose singular values and best approximations are known, made chunk by chunk.

``A = C diag(s) H`` with the orthonormal cosines ``C[i, j] = c_j cos(pi (2 i + 1) j / (2 m))`` (DCT-II) and the
reflection ``H = I - 2 w w^T``. Any rows of it can be had without the others.
"""

import functools
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["cosine_matrix", "count", "lazily", "optimal_error", "singular_values"]

# Rows made at once: their tables of cosines and sines stay in the cache.
STEP = 250


def singular_values(n: int) -> np.ndarray[Any, Any]:
    """1, 1/2, 1/3, ..."""
    return 1 / np.arange(1.0, n + 1)


def optimal_error(n: int, rank: int) -> float:
    """Frobenius norm of what the best approximation leaves out."""
    return float(np.linalg.norm(singular_values(n)[rank:]))


@functools.lru_cache(maxsize=4)
def _tables(m: int, n: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Angles of one row, and the columns' cosines and sines over the first rows, times ``c_j s_j``."""
    j = np.arange(n)
    theta = math.pi * j / (2 * m)
    scale = np.where(j == 0, 1.0, math.sqrt(2)) / math.sqrt(m) * singular_values(n)
    angles = (2 * np.arange(STEP)[:, None] + 1) * theta
    return theta, *((f(angles) * scale).astype(np.float32) for f in (np.cos, np.sin))


def cosine_matrix(
    shape: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> np.ndarray[Any, Any]:
    """Rows and columns of the matrix, float32."""
    m, n = shape
    w = np.random.default_rng(0).standard_normal(n)
    w = (w / np.linalg.norm(w)).astype(np.float32)
    out = np.empty((rows[1] - rows[0], columns[1] - columns[0]), dtype=np.float32)
    for top in range(*rows, STEP):
        height = min(STEP, rows[1] - top)
        # The reflection takes all columns, whichever are asked for.
        full = _rows(m, n, top, height)
        part = full[:, slice(*columns)] - np.outer(2 * (full @ w), w[slice(*columns)])
        out[top - rows[0] : top - rows[0] + height] = part
    return out


def _rows(m: int, n: int, top: int, height: int) -> np.ndarray[Any, Any]:
    """Rows of ``C diag(s)``, by the addition theorem."""
    theta, cosines, sines = _tables(m, n)
    ahead = 2 * top * theta
    c, s = np.cos(ahead).astype(np.float32), np.sin(ahead).astype(np.float32)
    return cosines[:height] * c - sines[:height] * s


def _chunk(
    shape: tuple[int, int], log: str | None, kill_at: int | None, block_info: Any = None
) -> Any:
    if log is not None:
        # One byte for each chunk, appended atomically by any process.
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, b".")
        # Appending has moved to the end of what this process wrote: no two see the same place.
        n_made = os.lseek(file, 0, os.SEEK_CUR)
        os.close(file)
        if n_made == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    rows, columns = block_info[None]["array-location"]
    return cosine_matrix(shape, rows, columns)


def lazily(
    shape: tuple[int, int],
    chunks: tuple[int, int],
    log: Path | None = None,
    kill_at: int | None = None,
) -> Any:
    """Return the matrix as a Dask array; every chunk that is made leaves a byte in the file ``log``.

    The process that begins chunk number ``kill_at`` is killed.
    """
    import dask.array as da

    return da.map_blocks(
        _chunk,
        shape,
        None if log is None else str(log),
        kill_at,
        chunks=da.core.normalize_chunks(chunks, shape, dtype=np.float32),
        dtype=np.float32,
        meta=np.empty((0, 0), dtype=np.float32),
    )


def count(log: Path) -> int:
    """Return the number of chunks made so far."""
    return log.stat().st_size if log.exists() else 0
