"""What a call would cost on a GPU, counted on the stand-in by CuPy's rules and not by the clock.

The rules are those of its source (15.0.0a1: ``_routines_linalg.pyx``, ``_reduction.pyx``, ``_cub_reduction.pyx`` and
``linalg/``), whose parts in Python are the same in 14.2; its compiled parts cannot be read.

`counting` gives a `Bill`, which every operation on `priced` arrays writes itself into:

- A ufunc, and any other function of NumPy's, is one launch that reads its arguments as they lie in memory (an axis
  along which they are broadcast once) and writes its results. Views are free, and so is memory that is not filled.
- One of our kernels is the same; a reduction kernel says how many blocks of threads it runs on (`blocks`).
- ``cupy.matmul`` of more than two axes copies operands that are not contiguous in C's order, and makes three arrays of
  pointers, a kernel for each axis of the batch, where one is broadcast. Of two axes it takes transposes as they are.
- ``cublas.gemmStridedBatchedEx`` is one launch.
- QR and SVD of a batch call cuSOLVER once a matrix (SVD in a batch up to 32 by 32); Cholesky and eigenvalues once. The
  latter by Jacobi's method (``syevjBatched``), and for a matrix of two axes by divide and conquer (``Xsyevd``).
- What a plain number is made of, or goes to NumPy, is a host read: it waits for the device.

- Rows are sorted by merging (``cupy_thrust.cu``), in passes over entries, their rows and, by ``argsort``, their places,
  from runs of 2048 on (a guess: CUB's tiles). That is one launch here.

Not modelled: what cuBLAS and cuSOLVER launch inside, sorts and cumulative sums of several kernels, caches, and time.

With ``is_dry`` nothing is computed: arrays are memory that is never touched, so that sizes may be those of a GPU.
"""

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = [
    "CREATIONS",
    "Bill",
    "Priced",
    "blocks",
    "counting",
    "creation",
    "current",
    "priced",
    "product",
    "virtual",
]

# Threads of a block in CuPy's reductions, and entries that a block of CUB's takes of a sum over everything.
BLOCK, CUB_BLOCK = 512, 2048
# Shorter sums CuPy does not give to CUB.
CUB_LEAST = 128
LARGEST_SVD_IN_BATCH = 32
# Entries that a block of CUB's merge sort sorts by itself.
MERGED = 2048


@dataclass
class Bill:
    """What a call costs; bytes are those read and written together."""

    is_dry: bool = False
    launches: int = 0
    n_bytes: int = 0
    reads: int = 0
    operand_copies: int = 0
    pointer_kernels: int = 0
    solver_calls: int = 0
    largest: int = 0  # bytes of the largest array that was made
    reductions: list[tuple[int, int]] = field(default_factory=list)  # blocks, entries
    names: Counter[str] = field(default_factory=Counter)

    def launch(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Note one kernel."""
        self.launches += 1
        self.names[name] += 1
        self.n_bytes += sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
        self.largest = max(self.largest, *(a.nbytes for a in outputs), 0)

    def fewest_blocks(self, least: int) -> int:
        """Fewest blocks of a reduction of at least so many entries."""
        return min((n for n, entries in self.reductions if entries >= least), default=least)


_bills: list[Bill] = []


def current() -> Bill | None:
    """Bill that is being written, if any."""
    return _bills[-1] if _bills else None


@contextlib.contextmanager
def counting(*, is_dry: bool = False) -> Iterator[Bill]:
    """Count what is done with priced arrays."""
    bill = Bill(is_dry)
    _bills.append(bill)
    try:
        yield bill
    finally:
        _bills.remove(bill)


def priced(a: Any) -> "Priced":
    """Let operations on an array be counted."""
    return np.asarray(a).view(Priced)


def virtual(shape: Any, dtype: Any) -> "Priced":
    """Make an array that takes no memory as long as nobody looks at it."""
    return np.empty(shape, dtype=dtype).view(Priced)


def _bytes(a: Any) -> int:
    """Bytes of the memory that an array lies in: axes along which it was broadcast count once."""
    if not isinstance(a, np.ndarray):
        return 0
    lengths = (n for n, stride in zip(a.shape, a.strides, strict=True) if stride)
    return int(a.itemsize * math.prod(lengths)) if a.size else 0


def _plain(x: Any) -> Any:
    if isinstance(x, Priced):
        return x.view(np.ndarray)
    if isinstance(x, list | tuple) and not hasattr(x, "_fields"):
        return type(x)(map(_plain, x))
    return x


def _arrays(x: Any) -> list[Any]:
    if isinstance(x, list | tuple):
        return [a for part in x for a in _arrays(part)]
    if isinstance(x, dict):
        return _arrays(list(x.values()))
    return [x] if isinstance(x, np.ndarray) else []


def _back(x: Any) -> Any:
    """Make what a function gave priced; CuPy has arrays where NumPy has numbers."""
    if isinstance(x, np.ndarray | np.generic):
        return np.asarray(x).view(Priced)
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(_back, x))
    return type(x)(map(_back, x)) if isinstance(x, list | tuple) else x


def blocks(inputs: Sequence[Any], axes: Sequence[int], n_outputs: int = 1) -> int:
    """Blocks that CuPy's reduction along ``axes`` of arrays of one shape runs on (`_get_block_specs`, and CUB)."""
    shape = inputs[0].shape
    kept = [a for a in range(len(shape)) if a not in axes]
    n_results = math.prod(shape[a] for a in kept)
    length = math.prod(shape[a] for a in axes)
    if n_results == 0 or length == 0:
        return 0
    if len(inputs) == n_outputs == 1 and length >= CUB_LEAST and inputs[0].flags.c_contiguous:
        if not kept:
            return -(-length // CUB_BLOCK)
        if list(kept) == list(range(len(kept))):
            return n_results
    run = 1
    for a in inputs:
        own = 1
        for axis in reversed(kept):
            if shape[axis] > 1 and a.strides[axis] != own * a.itemsize:
                break
            own *= shape[axis]
        run = max(run, own)
    stride = max(min(run, 32), BLOCK // length)
    stride = 1 << (stride.bit_length() - 1)
    return -(-n_results // stride)


def _axes(axis: Any, ndim: int) -> tuple[int, ...]:
    return tuple(
        np.lib.array_utils.normalize_axis_tuple(range(ndim) if axis is None else axis, ndim)
    )


def _dummies(args: Any) -> Any:
    """Arguments of one entry each, to find out dtypes."""
    if isinstance(args, np.ndarray):
        # Integers may be places.
        return np.full((1,) * args.ndim, args.dtype.kind not in "iu", dtype=args.dtype)
    return type(args)(map(_dummies, args)) if isinstance(args, list | tuple) else args


class Priced(np.ndarray):
    """A NumPy array that stands for one of CuPy's: what is done with it is written into the `current` bill."""

    def __array_finalize__(self, _: Any) -> None:
        """Nothing: views and copies are priced as they are."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Price an elementwise function, a product of matrices or a reduction."""
        bill, given = current(), [_plain(x) for x in inputs]
        out = options.pop("out", None)
        if out is not None:
            options["out"] = tuple(map(_plain, out))
        if bill is None:
            return _back(getattr(ufunc, method)(*given, **options))
        if ufunc is np.matmul:
            return _matmul(bill, *given)
        if method == "reduce":
            return _reduce(bill, ufunc.__name__, ufunc.reduce, given, options)
        if bill.is_dry and method == "__call__":
            shape = np.broadcast_shapes(*(np.shape(x) for x in given))
            small = np.asarray(ufunc(*map(_dummies, given)))
            result: Any = virtual(shape, small.dtype) if out is None else out[0]
        else:
            result = getattr(ufunc, method)(*given, **options)
        bill.launch(ufunc.__name__, given, _arrays(_back(result)))
        return _back(result)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Price any other function by its name."""
        args, kwargs = _plain(args), {key: _plain(x) for key, x in kwargs.items()}
        bill, name = current(), func.__name__
        if bill is None or name in FREE:
            result = func(*args, **kwargs)
            given = _arrays(args)
            if bill is not None and name in MAY_COPY and not np.may_share_memory(result, given[0]):
                bill.launch(name, given, [result])
            return _back(result)
        if name in REDUCTIONS:
            kwargs.pop("out", None)
            return _reduce(bill, name, func, [args[0]], {**_named(name, args), **kwargs})
        if name in RULES:
            return _back(RULES[name](bill, func, args, kwargs))
        if not bill.is_dry:
            result = func(*args, **kwargs)
        elif name in SHAPES:
            named = {"axis": kwargs["axis"]} if "axis" in kwargs else {}
            small = np.result_type(func(*_dummies(args), **kwargs))
            result = virtual(SHAPES[name](*args, **named), small)
        else:
            raise NotImplementedError(f"{name} of arrays that are not there")
        outputs = [] if name in UNFILLED else _arrays(result)
        if name not in UNFILLED:
            given = [] if name.endswith("_like") else _arrays([args, kwargs])
            # Of what is gathered from, no more is read than there is of it in the end.
            given = [*given[1:], *outputs] if name in GATHERS else given
            bill.launch(name, given, outputs)
        return _back(result)

    # What leaves the device

    def _read(self) -> Any:
        bill = current()
        if bill is not None:
            bill.reads += 1
            if bill.is_dry:
                return np.ones((), dtype=self.dtype)
        return self.view(np.ndarray)

    def __bool__(self) -> bool:
        return bool(self._read())

    def __float__(self) -> float:
        return float(self._read())

    def __int__(self) -> int:
        return int(self._read())

    def __index__(self) -> int:
        return self._read().__index__()

    def __complex__(self) -> complex:
        return complex(self._read())

    def item(self, *args: Any) -> Any:
        return self._read().item(*args)

    def tolist(self) -> Any:
        return self._read().tolist()

    # Methods that do not go through a ufunc or a function

    def astype(self, dtype: Any, *args: Any, copy: bool = True, **options: Any) -> Any:
        if not copy and self.dtype == dtype:
            return self
        return self._filled("astype", lambda x: x.astype(dtype, *args, **options), dtype)

    def copy(self, order: str = "C") -> Any:
        return self._filled("copy", lambda x: x.copy(order), self.dtype)

    def _filled(self, name: str, function: Callable[[Any], Any], dtype: Any) -> Any:
        bill = current()
        is_dry = bill is not None and bill.is_dry
        result = virtual(self.shape, dtype) if is_dry else function(self.view(np.ndarray))
        if bill is not None:
            bill.launch(name, [self], [result])
        return _back(result)

    def reshape(self, *shape: Any, **options: Any) -> Any:
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        return np.reshape(self, shape, **options)

    def sum(self, axis: Any = None, **options: Any) -> Any:
        return np.sum(self, axis=axis, **options)

    def max(self, axis: Any = None, **options: Any) -> Any:
        return np.max(self, axis=axis, **options)

    def min(self, axis: Any = None, **options: Any) -> Any:
        return np.min(self, axis=axis, **options)

    def any(self, axis: Any = None, **options: Any) -> Any:
        return np.any(self, axis=axis, **options)

    def all(self, axis: Any = None, **options: Any) -> Any:
        return np.all(self, axis=axis, **options)

    def __getitem__(self, key: Any) -> Any:
        parts = key if isinstance(key, tuple) else (key,)
        plain = self.view(np.ndarray)
        if all(part is None or isinstance(part, int | slice | type(...)) for part in parts):
            view = plain[(*parts, ...)] if ... not in parts else plain[parts]
            return np.asarray(view).view(Priced)
        bill = current()
        result = plain[tuple(map(_plain, parts))]
        if bill is not None:
            bill.launch("getitem", [result], [result])
            bill.reads += any(getattr(part, "dtype", None) == np.bool_ for part in parts)
        return _back(result)

    def __setitem__(self, key: Any, value: Any) -> None:
        bill, plain = current(), self.view(np.ndarray)
        parts = tuple(map(_plain, key)) if isinstance(key, tuple) else _plain(key)
        if bill is None or not bill.is_dry:
            plain[parts] = _plain(value)
        if bill is not None:
            bill.launch("setitem", [value], [plain[parts]])


def _named(name: str, args: tuple[Any, ...]) -> dict[str, Any]:
    return {"axis": args[1]} if len(args) > 1 else {}


def _reduce(bill: Bill, name: str, function: Any, given: list[Any], options: dict[str, Any]) -> Any:
    x = np.asarray(given[0])
    options = {key: value for key, value in options.items() if value is not np._NoValue}
    default = 0 if name in UFUNCS_THAT_REDUCE and "axis" not in options else None
    axes = _axes(options.get("axis", default), x.ndim)
    if bill.is_dry:
        keepdims = options.get("keepdims", False)
        shape = [1 if a in axes else n for a, n in enumerate(x.shape) if keepdims or a not in axes]
        small = function(_dummies(x), **options)
        result: Any = virtual(tuple(shape), np.result_type(small))
    else:
        result = function(x, **options)
    bill.launch(name, [x], [np.asarray(result)])
    if axes:
        bill.reductions.append((blocks([x], axes), x.size))
    return _back(result)


def _matmul(bill: Bill, a: Any, b: Any) -> Any:
    """``cupy.matmul``."""
    ndim = max(a.ndim, b.ndim)
    if bill.is_dry:
        lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        result: Any = virtual((*lead, a.shape[-2], b.shape[-1]), np.result_type(a, b))
    else:
        result = np.asarray(a @ b)
    for x in (a, b):
        contiguous = x.flags.c_contiguous or (ndim <= 2 and x.flags.f_contiguous)
        if ndim <= 2 and x.ndim == 2:
            contiguous = contiguous or x.itemsize in x.strides
        if not contiguous:
            bill.launch("operand copy", [x], [np.empty(x.shape, x.dtype)])
            bill.operand_copies += 1
    if ndim > 2:
        lead = result.shape[: ndim - 2]
        padded = [((1,) * (ndim - x.ndim) + x.shape)[: ndim - 2] for x in (a, b)]
        if any(shape != lead for shape in padded):
            for _ in range(3 * (ndim - 2)):
                bill.launch("pointers", [], [])
                bill.pointer_kernels += 1
    bill.launch("matmul", [a, b], [result])
    return _back(result)


def product(bill: Bill, operands: Sequence[tuple[int, int]], result: int, adds: bool) -> None:
    """Note one ``gemmStridedBatchedEx``: bytes of each operand and of the result."""
    bill.launches += 1
    bill.names["gemm"] += 1
    bill.n_bytes += sum(a * b for a, b in operands) + (2 if adds else 1) * result


def _solver(calls: Callable[[int, Any], int]) -> Callable[..., Any]:
    """Price a decomposition: calls of cuSOLVER for a batch of so many matrices, beside a copy of what is given."""

    def rule(bill: Bill, func: Any, args: Any, kwargs: Any) -> Any:
        x = args[0]
        result = func(*args, **kwargs)
        n = calls(math.prod(x.shape[:-2]), x)
        bill.launch(func.__name__, [x], _arrays(result))
        bill.launches += n
        bill.solver_calls += n
        return result

    return rule


def _qr_calls(n: int, x: Any) -> int:
    return 2 * n


def _svd_calls(n: int, x: Any) -> int:
    return 1 if max(x.shape[-2:]) <= LARGEST_SVD_IN_BATCH else n


def _qr(bill: Bill, func: Any, args: Any, kwargs: Any) -> Any:
    mode = kwargs.get("mode", args[1] if len(args) > 1 else "reduced")
    calls = (lambda n, x: n) if mode == "r" else _qr_calls
    return _solver(calls)(bill, func, args, kwargs)


def _sorted(bill: Bill, func: Any, args: Any, kwargs: Any) -> Any:
    x, result = args[0], func(*args, **kwargs)
    moved = x.size * (x.itemsize + 8 + (8 if func.__name__ == "argsort" else 0))
    n_passes = max(0, math.ceil(math.log2(max(1, x.size) / MERGED)))
    bill.launch(func.__name__, [x], [result])
    bill.n_bytes += 2 * n_passes * moved if x.ndim > 1 else 0
    return result


def _eigenvalues(bill: Bill, func: Any, args: Any, kwargs: Any) -> Any:
    bill.names["syevjBatched" if args[0].ndim > 2 else "Xsyevd"] += 1
    return _solver(lambda n, x: 1)(bill, func, args, kwargs)


def _trace(bill: Bill, func: Any, args: Any, kwargs: Any) -> Any:
    result = func(*args, **kwargs)
    bill.launch("trace", [args[0][..., 0, :]], _arrays(_back(result)))
    return result


RULES: dict[str, Any] = {
    "qr": _qr,
    "svd": _solver(_svd_calls),
    "eigh": _eigenvalues,
    "eigvalsh": _eigenvalues,
    "cholesky": _solver(lambda n, x: 1),
    "inv": _solver(lambda n, x: 2),
    "solve": _solver(lambda n, x: 2),
    "trace": _trace,
    "sort": _sorted,
    "argsort": _sorted,
}
FREE = {
    "reshape", "transpose", "permute_dims", "swapaxes", "moveaxis", "expand_dims", "squeeze", "broadcast_to",
    "broadcast_arrays", "flip", "matrix_transpose", "diagonal", "real", "imag", "shape", "ndim", "size",
    "result_type", "can_cast", "iscomplexobj", "isrealobj", "may_share_memory", "shares_memory", "ravel",
}  # fmt: skip
MAY_COPY = {"reshape", "ravel"}
UNFILLED = {"empty_like"}
GATHERS = {"take", "take_along_axis"}
REDUCTIONS = {
    "sum", "prod", "max", "amax", "min", "amin", "any", "all", "mean", "argmax", "argmin", "count_nonzero",
}  # fmt: skip
UFUNCS_THAT_REDUCE = {"add", "multiply", "maximum", "minimum", "logical_and", "logical_or"}


def _concatenated(arrays: Any, axis: int = 0) -> tuple[int, ...]:
    shape = list(arrays[0].shape)
    shape[axis] = sum(a.shape[axis] for a in arrays)
    return tuple(shape)


def _first(x: Any, *_: Any, **options: Any) -> tuple[int, ...]:
    return tuple(x.shape)


SHAPES: dict[str, Callable[..., tuple[int, ...]]] = {
    "where": lambda *args: np.broadcast_shapes(*map(np.shape, args)),
    "concatenate": _concatenated,
    "take_along_axis": lambda x, places, *_, **options: places.shape,
    **dict.fromkeys(["zeros_like", "ones_like", "full_like", "empty_like", "nan_to_num"], _first),
}


def creation(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Price a function that makes arrays of numbers; one of NumPy's arrays is sent to the device."""

    @functools.wraps(function)
    def make(*args: Any, **options: Any) -> Any:
        bill = current()
        if bill is None:
            return function(*args, **options)
        if bill.is_dry and name in ("zeros", "ones", "full", "empty"):
            dtype = options.get("dtype") or np.float64
            result: Any = virtual(args[0], dtype)
        else:
            result = function(*map(_plain, args), **options)
        if name == "asarray" and isinstance(args[0], Priced):
            return _back(result)
        if name != "empty":
            bill.launch(name, [], [result])
        return _back(result)

    return make


CREATIONS = {"zeros", "ones", "full", "empty", "arange", "eye", "linspace", "asarray"}
