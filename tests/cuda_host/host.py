"""A module in the place of ``cupy``: NumPy's arrays, and kernels compiled by g++.

With it the whole CuPy path runs on a machine without a GPU: dispatch, loops, and the very text of the kernels. What it
cannot show is what only the device does: fused multiply-add, flushed denormals, its own exp and tanh, and cuBLAS.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import array_api_compat as compat
import array_api_compat.numpy
import numpy as np

from tests.cuda_host import prices

__all__ = ["CompileError", "HostCupy", "cupy_on_host", "namespace", "why_not"]

C_TYPES = {
    "bool": "bool",
    "uint8": "unsigned char",
    "int8": "signed char",
    "int32": "int",
    "int64": "long long",
    "float16": "float16",
    "float32": "float",
    "float64": "double",
    "complex64": "complex<float>",
    "complex128": "complex<double>",
}
COMPILER = "g++"
# No contraction to fused multiply-add: the results are then NumPy's to the bit.
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared"]

# Threads that share one result of a reduction; CuPy takes 512.
LANES = 8


class CompileError(Exception):
    """The compiler refused a kernel."""


class Parameter:
    """One parameter of a kernel, written as CuPy has it: a type and a name."""

    def __init__(self, text: str) -> None:
        *raw, type_name, self.name = text.split()
        # Not broadcast: the kernel reads it where it likes.
        self.is_raw = raw == ["raw"]
        self.dtype = np.dtype(type_name)
        self.c_type = C_TYPES[type_name]


class HostKernel:
    """What elementwise and reduction kernels share: typed parameters, a name, a C function."""

    def __init__(
        self, library: "Library", inputs: str, outputs: str, name: str, preamble: str
    ) -> None:
        self.inputs = [Parameter(text) for text in inputs.split(",")]
        self.outputs = [Parameter(text) for text in outputs.split(",")]
        self.name, self.preamble, self.library = name, preamble, library
        library.pending.append(self)

    @functools.cached_property
    def symbol(self) -> str:
        """A name of its own for each text, the same in each process."""
        text = self.preamble + self.body()
        return f"{self.name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def body(self) -> str:
        """Statements of the C function."""
        raise NotImplementedError

    def source(self) -> str:
        """A C function that runs this kernel, in a C++ namespace of its own."""
        parameters = [f"const {p.c_type}* _{p.name}" for p in self.inputs]
        parameters += [f"{p.c_type}* _{p.name}" for p in self.outputs]
        return f"""
namespace in_{self.symbol} {{
{self.preamble}
extern "C" void {self.symbol}(ptrdiff_t n, ptrdiff_t width, {", ".join(parameters)}) {{
{self.body()}
}}
}}
"""

    def run(self, n: int, width: int, arrays: list[Any]) -> None:
        """Call the C function for ``n`` results, each from ``width`` entries."""
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
        sizes = ctypes.c_ssize_t(n), ctypes.c_ssize_t(width)
        self.library.function(self)(*sizes, *pointers)

    @property
    def is_dry(self) -> bool:
        """Whether nothing is to be computed."""
        bill = prices.current()
        return bill is not None and bill.is_dry

    def is_priced(self, given: list[Any], results: list[Any], n: int) -> bool:
        """Write the kernel into the bill, where there is one; whether that is all. ``n`` threads have work."""
        bill = prices.current()
        if bill is not None:
            # No thread writes more than an entry to where it likes.
            pairs = zip(results, self.outputs, strict=True)
            written = [a.reshape(-1)[:n] if p.is_raw and a.size > n else a for a, p in pairs]
            bill.launch(self.name, [a for a in given if a.ndim], written)
        return self.is_dry

    def as_arrays(self, args: tuple[Any, ...]) -> list[Any]:
        """Numbers take the type of the parameter; arrays must have it, as in CuPy."""
        if len(args) != len(self.inputs):
            raise TypeError(f"{self.name} takes {len(self.inputs)} arguments, got {len(args)}")
        for a, p in zip(args, self.inputs, strict=True):
            if isinstance(a, np.ndarray) and a.dtype != p.dtype:
                raise TypeError(f"{self.name}: {p.name} must be {p.dtype}, got {a.dtype}")
        return [np.asarray(a, dtype=p.dtype) for a, p in zip(args, self.inputs, strict=True)]


class HostElementwise(HostKernel):
    """`cupy.ElementwiseKernel` over NumPy arrays, for parameters of stated types."""

    def __init__(
        self,
        library: "Library",
        inputs: str,
        outputs: str,
        operation: str,
        name: str,
        preamble: str,
    ) -> None:
        super().__init__(library, inputs, outputs, name, preamble)
        self.operation = operation

    def body(self) -> str:
        names = [
            f"const {p.c_type}* {p.name} = _{p.name};"
            if p.is_raw
            else f"const {p.c_type}& {p.name} = _{p.name}[i];"
            for p in self.inputs
        ]
        names += [
            f"{p.c_type}* {p.name} = _{p.name};"
            if p.is_raw
            else f"{p.c_type}& {p.name} = _{p.name}[i];"
            for p in self.outputs
        ]
        return f"for (ptrdiff_t i = 0; i < n; i++) {{ {' '.join(names)} {self.operation}; }}"

    def __call__(self, *args: Any) -> Any:
        """Broadcast, allocate the outputs that do not follow the inputs, run."""
        given, results = self.as_arrays(args[: len(self.inputs)]), args[len(self.inputs) :]
        assert len(results) in (0, len(self.outputs))
        pairs = list(zip(given, self.inputs, strict=True))
        if not any(isinstance(x, np.ndarray | np.generic) for x in args):
            raise ValueError("loop size is undecided")
        written = list(zip(results, self.outputs, strict=False))
        shape = np.broadcast_shapes(*(a.shape for a, p in pairs + written if not p.is_raw))
        for x, p in written:
            if x.dtype != p.dtype:
                raise TypeError(f"{self.name}: {p.name} must be {p.dtype}, got {x.dtype}")
            if not p.is_raw and x.shape != shape:
                raise ValueError(f"{self.name}: {p.name} must have shape {shape}, got {x.shape}")
            assert not p.is_raw or x.flags.c_contiguous
        arrays = [a if p.is_raw else np.broadcast_to(a, shape) for a, p in pairs]
        if not self.is_dry:
            arrays = list(map(np.ascontiguousarray, arrays))
        results = list(results) or [np.empty(shape, dtype=p.dtype) for p in self.outputs]
        n = math.prod(shape)
        if not self.is_priced(given, results, n):
            # What it is given to write to may be a view.
            made = [np.ascontiguousarray(x) for x in results]
            self.run(n, 1, arrays + made)
            for result, values in zip(results, made, strict=True):
                if not np.may_share_memory(result, values):
                    np.asarray(result)[...] = values
        results = [prices.priced(x) for x in results] if prices.current() else results
        return results[0] if len(results) == 1 else tuple(results)


class HostReduction(HostKernel):
    """`cupy.ReductionKernel` over NumPy arrays, in the order of a block of threads, some with nothing to do."""

    def __init__(
        self,
        library: "Library",
        inputs: str,
        outputs: str,
        map_expr: str,
        reduce_expr: str,
        post_map_expr: str,
        identity: str,
        name: str,
        reduce_type: str | None,
        preamble: str,
    ) -> None:
        super().__init__(library, inputs, outputs, name, preamble)
        self.map_expr, self.reduce_expr = map_expr, reduce_expr
        self.post_map_expr, self.identity = post_map_expr, identity
        self.reduce_type = reduce_type or self.outputs[0].c_type

    def body(self) -> str:
        inputs = [f"const {p.c_type}& {p.name} = _{p.name}[i * width + j];" for p in self.inputs]
        outputs = [f"{p.c_type}& {p.name} = _{p.name}[i];" for p in self.outputs]
        kind, combined = self.reduce_type, self.reduce_expr
        return f"""
for (ptrdiff_t i = 0; i < n; i++) {{
    {kind} lanes[{LANES}];
    for (int t = 0; t < {LANES}; t++) lanes[t] = {self.identity};
    for (ptrdiff_t j = 0; j < width; j++) {{
        {" ".join(inputs)}
        const {kind} a = lanes[j % {LANES}], b = {self.map_expr};
        lanes[j % {LANES}] = {combined};
    }}
    for (int block = {LANES} / 2; block > 0; block /= 2) {{
        for (int t = 0; t < block; t++) {{
            const {kind} a = lanes[t], b = lanes[t + block];
            lanes[t] = {combined};
        }}
    }}
    const {kind} a = lanes[0];
    {" ".join(outputs)}
    {self.post_map_expr};
}}"""

    def __call__(self, *args: Any, axis: Any = None, keepdims: bool = False) -> Any:
        """Broadcast, bring the reduced axes to the end, run; outputs may follow the inputs."""
        arrays = self.as_arrays(args[: len(self.inputs)])
        shape = np.broadcast_shapes(*(a.shape for a in arrays))
        axes = np.lib.array_utils.normalize_axis_tuple(
            range(len(shape)) if axis is None else axis, len(shape)
        )
        kept = [a for a in range(len(shape)) if a not in axes]
        arrays = [np.transpose(np.broadcast_to(a, shape), (*kept, *axes)) for a in arrays]
        lengths = [shape[a] for a in kept]
        results = list(args[len(self.inputs) :])
        results = results or [np.empty(lengths, dtype=p.dtype) for p in self.outputs]
        for result, p in zip(results, self.outputs, strict=True):
            if result.dtype != p.dtype or list(result.shape) != lengths:
                raise ValueError(f"{self.name}: {p.name} must be {p.dtype} of shape {lengths}")
        width = math.prod(shape[a] for a in axes)
        if bill := prices.current():
            whole = [np.broadcast_to(a, shape) for a in self.as_arrays(args[: len(self.inputs)])]
            entries = math.prod(shape)
            bill.reductions.append((prices.blocks(whole, axes, len(results)), entries))
        if not self.is_priced(arrays, results, math.prod(shape)):
            # What it is given to write to may be a view.
            made = [np.empty(lengths, dtype=p.dtype) for p in self.outputs]
            self.run(made[0].size, width, [*map(np.ascontiguousarray, arrays), *made])
            for result, values in zip(results, made, strict=True):
                np.asarray(result)[...] = values
        result = prices.priced(results[0]) if prices.current() else results[0]
        return np.expand_dims(result, axes) if keepdims else result


class Library:
    """Kernels that are compiled together, when the first of them is called."""

    def __init__(self) -> None:
        self.pending: list[HostKernel] = []
        self.compiled: dict[HostKernel, Any] = {}

    def compile(self) -> None:
        """Compile all that wait to be."""
        if self.pending:
            batch, self.pending = self.pending, []
            self._compile(batch)

    def function(self, kernel: HostKernel) -> Any:
        """Return the C function of a kernel, compiled if need be."""
        self.compile()
        if kernel not in self.compiled:
            # It was in a batch that was refused.
            self._compile([kernel])
        return getattr(self.compiled[kernel], kernel.symbol)

    def _compile(self, batch: list[HostKernel]) -> None:
        shim = (Path(__file__).parent / "shim.h").read_text()
        handle = _compiled(shim + "".join(kernel.source() for kernel in batch))
        self.compiled |= dict.fromkeys(batch, handle)


# Where compiled kernels are kept, for all processes of a run of tests; None: for this process alone.
shared_folder: Path | None = None


@functools.cache
def _own_folder() -> Path:
    """Make a folder that goes with the process."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return Path(folder)


def _compiled(source: str) -> Any:
    """Load what a C++ compiler makes of a text, compiled by whichever process comes first."""
    # Not at the top: Windows has none, and is where these tests are skipped.
    import fcntl

    folder = shared_folder or _own_folder()
    stem = folder / f"kernels-{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    text, library = stem.with_suffix(".cpp"), stem.with_suffix(".so")
    with stem.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            text.write_text(source)
            result = subprocess.run(
                [COMPILER, *FLAGS, str(text), "-o", str(library)],
                capture_output=True,
                text=True,
                check=False,
            )
            if result.returncode:
                raise CompileError(result.stderr)
    return ctypes.CDLL(str(library))


class HostDevice(str):
    """The device of a NumPy array, as ``cupy.cuda.Device``."""

    __slots__ = ()
    id = 0

    def __new__(cls) -> "HostDevice":
        """Make the only one."""
        return super().__new__(cls, "cpu")


def _asnumpy(x: Any) -> Any:
    if (bill := prices.current()) is not None:
        bill.reads += 1
    return np.asarray(x)


class HostCublas:
    """In the place of ``cupy.cuda.cublas``: one product of a batch, of matrices at addresses, by columns."""

    CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
    CUBLAS_GEMM_DEFAULT = -1
    CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F = 68, 70
    TYPES: ClassVar = {0: "float32", 1: "float64", 2: "float16", 4: "complex64", 5: "complex128"}

    def gemmStridedBatchedEx(
        self,
        handle: int,
        op_a: int,
        op_b: int,
        m: int,
        n: int,
        k: int,
        alpha: int,
        a: int,
        type_a: int,
        lda: int,
        stride_a: int,
        b: int,
        type_b: int,
        ldb: int,
        stride_b: int,
        beta: int,
        c: int,
        type_c: int,
        ldc: int,
        stride_c: int,
        count: int,
        compute: int,
        algorithm: int,
    ) -> None:
        """Compute ``C = alpha op(A) op(B) + beta C`` for each matrix of the batch."""
        dtype = self.TYPES[type_c]
        is_double = dtype in ("float64", "complex128")
        assert compute == (self.CUBLAS_COMPUTE_64F if is_double else self.CUBLAS_COMPUTE_32F)
        scalar = np.dtype("complex128" if dtype == "complex128" else dtype)
        adds = _at(beta, scalar, (1,), (0,))[0] != 0
        if (bill := prices.current()) is not None:
            sides = ((m * k, type_a, stride_a), (k * n, type_b, stride_b))
            sizes = [
                (size * np.dtype(self.TYPES[t]).itemsize, count if stride else 1)
                for size, t, stride in sides
            ]
            result = m * n * count * np.dtype(dtype).itemsize
            prices.product(bill, sizes, result, bool(adds))
            if bill.is_dry:
                return
        # Leading dimensions are those of columns.
        assert lda >= (m if op_a == 0 else k)
        assert ldb >= (k if op_b == 0 else n)
        assert ldc >= m
        x = _at(a, self.TYPES[type_a], *_columns(op_a, (m, k), lda, stride_a, count))
        y = _at(b, self.TYPES[type_b], *_columns(op_b, (k, n), ldb, stride_b, count))
        z = _at(c, dtype, *_columns(0, (m, n), ldc, stride_c, count))
        before = _at(beta, scalar, (1,), (0,))[0] * z if adds else 0
        x, y = (side if side.dtype == scalar else side.astype(scalar) for side in (x, y))
        with np.errstate(all="ignore"):
            # As the products of NumPy's arrays would be made: by rows.
            product = np.swapaxes(np.swapaxes(y, -1, -2) @ np.swapaxes(x, -1, -2), -1, -2)
            z[...] = _at(alpha, scalar, (1,), (0,))[0] * product + before


def _columns(
    op: int, shape: tuple[int, int], ld: int, stride: int, count: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape, and strides in entries, of a batch of op(A) of this shape."""
    return (count, *shape), (stride, *((1, ld) if op == 0 else (ld, 1)))


def _at(address: int, dtype: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """Make an array of what lies at an address."""
    dtype = np.dtype(dtype)
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * ((last + 1) * dtype.itemsize)).from_address(address)
    flat = np.frombuffer(memory, dtype=dtype)
    strides = tuple(stride * dtype.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(flat, shape, strides)


class HostGenerator:
    """In the place of ``cupy.random.Generator``: its own numbers, drawn where arrays are."""

    def __init__(self, seed: Any = None) -> None:
        # Not those that NumPy draws from the seed.
        self.drawn = np.random.Generator(np.random.SFC64(seed))

    def standard_normal(self, size: Any = None, dtype: Any = np.float64) -> Any:
        """Draw in single or double precision."""
        bill = prices.current()
        if bill is not None and bill.is_dry:
            x: Any = prices.virtual(size, dtype)
        else:
            x = self.drawn.standard_normal(size, dtype=dtype)
        if bill is None:
            return x
        bill.launch("standard_normal", [], [x])
        return prices.priced(x)


class HostCupy(ModuleType):
    """In the place of ``cupy``; what it does not define is NumPy's."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.ndarray = type("ndarray", (), {})
        self.asnumpy = _asnumpy
        self.library = Library()
        self.ElementwiseKernel = functools.partial(HostElementwise, self.library)
        self.ReductionKernel = functools.partial(HostReduction, self.library)
        self.cuda = SimpleNamespace(
            Device=HostDevice,
            get_cublas_handle=lambda: 0,
            cublas=HostCublas(),
            runtime=SimpleNamespace(
                getDeviceCount=lambda: 1,
                getDeviceProperties=lambda _: {"name": b"none"},
                runtimeGetVersion=lambda: 0,
            ),
            get_current_stream=lambda: SimpleNamespace(synchronize=lambda: None),
        )
        self.random = SimpleNamespace(Generator=HostGenerator, default_rng=HostGenerator)
        self.get_default_memory_pool = lambda: SimpleNamespace(
            free_all_blocks=lambda: None, total_bytes=lambda: 0
        )

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        return prices.creation(name, found) if name in prices.CREATIONS else found


class HostCupyx(ModuleType):
    """In the place of ``cupyx``: where CuPy only then raises what NumPy always does, and what asked it to."""

    def __init__(self) -> None:
        super().__init__("cupyx")
        self.asked: list[dict[str, str]] = []

    def errstate(self, **options: str) -> contextlib.AbstractContextManager[None]:
        """Note the options; NumPy raises by itself."""
        self.asked.append(options)
        return contextlib.nullcontext()


class _Linalg(ModuleType):
    """Linear algebra of NumPy's that does not say when it fails, unless told to, as CuPy's does not."""

    def __getattr__(self, name: str) -> Any:
        return getattr(array_api_compat.numpy.linalg, name)

    def cholesky(self, x: Any) -> Any:
        """Leave something in the place of a factor that there is not."""
        try:
            return array_api_compat.numpy.linalg.cholesky(x)
        except np.linalg.LinAlgError:
            if x.ndim == 2:
                return np.tril(x)
            return np.stack([self.cholesky(each) for each in x])


class _Namespace(ModuleType):
    """Looks like CuPy to whoever asks for its name, and computes with NumPy."""

    linalg = _Linalg("array_api_compat.cupy.linalg")

    def __getattr__(self, name: str) -> Any:
        found = getattr(array_api_compat.numpy, name)
        return prices.creation(name, found) if name in prices.CREATIONS else found


namespace = _Namespace("array_api_compat.cupy")
_ROOTS = {"cupy", "cupyx"}
_PREFIX = "slra._backends.cupy"
_modules: dict[str, ModuleType] = {}


def _replace(modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
    """Put these in the place of CuPy and the modules that use it; return what was there."""
    before = {n: m for n, m in sys.modules.items() if n in _ROOTS or n.startswith(_PREFIX)}
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules)
    package = importlib.import_module("slra._backends")
    for name in {*before, *modules} - _ROOTS:
        child = name.rpartition(".")[2]
        if name in modules:
            setattr(package, child, modules[name])
        else:
            delattr(package, child)
    return before


def why_not() -> str | None:
    """Why kernels cannot be run on this machine, or None."""
    if importlib.util.find_spec("fcntl") is None:
        return "no fcntl here"
    return None if shutil.which(COMPILER) else f"{COMPILER} is not installed"


def _address(x: Any) -> int:
    return int(x.ctypes.data)


@contextlib.contextmanager
def cupy_on_host() -> Iterator[Any]:
    """Let ``slra`` take every array for CuPy's, and load its CuPy backend over `HostCupy`."""
    before = _replace(_modules or {"cupy": HostCupy(), "cupyx": HostCupyx()})
    array_namespace = compat.array_namespace

    def as_cupy(*xs: Any, **options: Any) -> Any:
        found = array_namespace(*xs, **options)
        return namespace if compat.is_numpy_namespace(found) else found

    backends = importlib.import_module("slra._backends")
    by_type = dict(backends._by_type)
    backends._by_type.clear()
    compat.array_namespace = as_cupy
    try:
        importlib.import_module(_PREFIX)
        # NumPy's arrays say in another way than CuPy's where they are.
        products: Any = importlib.import_module(f"{_PREFIX}_products")
        products.address = _address
        assert type(backends.backend_for(np.empty(0))).__name__ == "CupyBackend"
        yield namespace
    finally:
        compat.array_namespace = array_namespace
        backends._by_type.clear()
        backends._by_type.update(by_type)
        _modules.update(_replace(before))
