"""Products of batches of matrices by cuBLAS, of operands as they lie in memory.

``cupy.matmul`` copies operands that are not contiguous, such as transposed keys, and makes arrays of pointers where an
axis of the batch is broadcast. cuBLAS needs neither: it takes transposes, and steps from matrix to matrix.
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import cupy
import numpy as np

from slra._typing import Array

__all__ = ["product"]

# cudaDataType of what is multiplied.
DATA_TYPES = {"float16": 2, "float32": 0, "float64": 1, "complex64": 4, "complex128": 5}
# A batch that does not lie in one step takes a call for each part; beyond so many CuPy's copies cost less. Not tuned.
MOST_CALLS = 64


class Layout(NamedTuple):
    """How a matrix lies in memory: by rows, or by columns, so many entries from one to the next."""

    is_by_columns: bool
    leading: int


def address(x: Array) -> int:
    """Address of the first entry on the device."""
    return int(x.data.ptr)


@functools.lru_cache(64)
def _scalar(value: float, dtype: str) -> np.ndarray[Any, Any]:
    """Make what cuBLAS reads a factor from, on the host."""
    return np.asarray([value], dtype=dtype)


def product(a: Array, b: Array, factor: float = 1.0) -> Array:
    """Multiply batches (..., m, k) and (..., k, n) of one dtype, whose leading axes broadcast: ``factor * a @ b``.

    Half precision is multiplied on tensor cores, and gives single precision, which it is summed in.
    """
    is_batch = max(a.ndim, b.ndim) > 2 and min(a.ndim, b.ndim) >= 2
    is_known = a.dtype == b.dtype and a.dtype.name in DATA_TYPES
    if not is_batch or not is_known or 0 in (*a.shape, *b.shape):
        return _plainly(a, b, factor)
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    a, b = (x[(None,) * (len(shape) - x.ndim)] for x in (a, b))
    if b.shape[-3] == 1 < a.shape[-3] and _rows_follow(a):
        # The rows of heads that share keys, as rows of one matrix.
        rows = a.reshape(*a.shape[:-3], 1, -1, a.shape[-1])
        return product(rows, b, factor).reshape(shape)
    a, b = (x if _layout(x) else x.copy("C") for x in (a, b))
    steps = _steps(shape[:-2], _batch_strides(a, shape), _batch_strides(b, shape))
    if math.prod(steps.outer) > MOST_CALLS:
        return _plainly(a, b, factor)
    c = cupy.empty(shape, dtype=_result_dtype(a))
    _call(a, b, c, steps, factor)
    return c


def _plainly(a: Array, b: Array, factor: float) -> Array:
    """Leave it to CuPy."""
    a, b = (x.astype(_result_dtype(x), copy=False) for x in (a, b))
    return a @ b if factor == 1 else factor * (a @ b)


def _result_dtype(x: Array) -> Any:
    return np.dtype("float32") if x.dtype == np.float16 else x.dtype


def _rows_follow(a: Array) -> bool:
    """Whether the rows of the last axis but two follow each other as those within do."""
    return bool(a.shape[-2] == 1 or a.strides[-3] == a.shape[-2] * a.strides[-2])


def _layout(x: Array) -> Layout | None:
    """Layout of the matrices, or None where cuBLAS cannot take them as they are."""
    m, n = x.shape[-2:]
    down, across = (stride // x.itemsize for stride in x.strides[-2:])
    if (n == 1 or across == 1) and (m == 1 or down >= n):
        return Layout(False, n if m == 1 else down)
    if (m == 1 or down == 1) and (n == 1 or across >= m):
        return Layout(True, m if n == 1 else across)
    return None


def _batch_strides(x: Array, shape: tuple[int, ...]) -> list[int]:
    """Entries from one matrix to the next along each leading axis of ``shape``; none where it is broadcast."""
    lead = zip(x.shape[:-2], shape, x.strides, strict=False)
    return [0 if n == 1 < whole else stride // x.itemsize for n, whole, stride in lead]


class Steps(NamedTuple):
    """A batch in parts, a call for each: lengths and strides of the loops, and the batch of one call."""

    outer: tuple[int, ...]
    outer_strides: tuple[list[int], list[int]]
    n_matrices: int
    strides: tuple[int, int]


def _steps(lead: tuple[int, ...], a: list[int], b: list[int]) -> Steps:
    """Join as many axes, from the last, as one stride steps through."""
    axes = [axis for axis in range(len(lead)) if lead[axis] > 1]
    if not axes:
        return Steps((), ([], []), 1, (0, 0))
    last = axes.pop()
    count, strides = lead[last], (a[last], b[last])
    while axes and (a[axes[-1]], b[axes[-1]]) == (count * strides[0], count * strides[1]):
        count *= lead[axes.pop()]
    outer = tuple(lead[axis] for axis in axes)
    return Steps(outer, ([a[axis] for axis in axes], [b[axis] for axis in axes]), count, strides)


def _call(a: Array, b: Array, c: Array, steps: Steps, factor: float) -> None:
    """Write the product to ``c``, which is contiguous. cuBLAS counts by columns: it is told of ``c^T = b^T a^T``."""
    cublas, dtype = cupy.cuda.cublas, c.dtype.name
    is_double = dtype in ("float64", "complex128")
    compute = cublas.CUBLAS_COMPUTE_64F if is_double else cublas.CUBLAS_COMPUTE_32F
    kind, itemsize = DATA_TYPES[a.dtype.name], a.itemsize
    alpha, beta = (_scalar(value, dtype).ctypes.data for value in (factor, 0.0))
    (m, k), n = a.shape[-2:], b.shape[-1]
    of_b, of_a = _layout(b), _layout(a)
    assert of_b is not None
    assert of_a is not None
    ops = [cublas.CUBLAS_OP_T if x.is_by_columns else cublas.CUBLAS_OP_N for x in (of_b, of_a)]
    for i, place in enumerate(np.ndindex(steps.outer)):
        from_a, from_b = (sum(map(operator.mul, place, x)) for x in steps.outer_strides)
        cublas.gemmStridedBatchedEx(
            cupy.cuda.get_cublas_handle(), *ops, n, m, k, alpha,
            address(b) + from_b * itemsize, kind, of_b.leading, steps.strides[1],
            address(a) + from_a * itemsize, kind, of_a.leading, steps.strides[0],
            beta,
            address(c) + i * steps.n_matrices * m * n * c.itemsize, DATA_TYPES[dtype], n, m * n,
            steps.n_matrices, compute, cublas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip
