"""The largest entries of long rows on CuPy: the k-th largest modulus digit by digit, then all that reach it.

``cupy.argsort`` of rows sorts pairs of row and entry by merging, which moves each entry, its row and its place some ten
times. A modulus is ordered as its bits are, so its place among others needs no order of these: of each digit of eight
bits, from the first, the entries that agree so far are counted, and the counts say the digit of the k-th largest.
"""

from typing import Any

import cupy

from slra._backends.cupy_kernels import KERNELS, kernel
from slra._typing import Array

__all__ = ["MOST_ENTRIES", "largest"]

DIGIT = 8
# Counters that the threads of few rows share out among them, as they would wait for each other. Not tuned.
COPIES, ENOUGH_COUNTERS = 64, 1 << 9
# Entries that one thread writes the largest of.
CHUNK = 64
# Two counts of entries fit into 64 bits.
MOST_ENTRIES = (1 << 31) - 1


def largest(x: Array, k: int) -> tuple[Array, Array]:
    """Values (rows, k) and columns of the ``k`` entries of largest modulus in each row, the first of those that tie."""
    n_rows, n = x.shape
    threshold, n_ties = _threshold(x, k)
    n_chunks = -(-n // CHUNK)
    found = cupy.empty((n_rows, n_chunks), dtype=cupy.int64)
    kernel("chunk_counts", x)(x, threshold, CHUNK, n_chunks, n, found)
    sums = cupy.cumsum(found.reshape(-1))
    values = cupy.empty((n_rows, k), dtype=x.dtype)
    columns = cupy.empty((n_rows, k), dtype=cupy.int32)
    sizes = CHUNK, n_chunks, n, k
    kernel("write_largest", x)(x, sums, found, threshold, n_ties, *sizes, values, columns)
    return values, columns


def _threshold(x: Array, k: int) -> tuple[Array, Array]:
    """Bits of the k-th largest modulus of each row, (rows, 1), and how many of those that tie with it are taken."""
    n_rows, n = x.shape
    copies = max(1, min(COPIES, ENOUGH_COUNTERS // n_rows))
    n_bits = 8 * x.real.dtype.itemsize
    bits: Array = cupy.zeros((n_rows, 1), dtype=cupy.int64)
    left: Any = cupy.full((n_rows, 1), k, dtype=cupy.int64)
    shifts = range(n_bits - DIGIT, -1, -DIGIT)
    counters = cupy.zeros((len(shifts), n_rows, copies, 1 << DIGIT), dtype=cupy.int32)
    for shift, counts in zip(shifts, counters, strict=True):
        kernel("digit_counts", x)(x, bits, shift, n, copies, counts)
        counts = counts[:, 0, :] if copies == 1 else cupy.sum(counts, axis=1, dtype=cupy.int32)
        bits, left = KERNELS["digit_chosen", "int32"](counts, bits, left, shift)
    return bits, left
