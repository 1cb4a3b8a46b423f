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
from typing import Any

import array_api_compat as compat
import array_api_compat.numpy
import numpy as np

__all__ = ["CompileError", "HostCupy", "cupy_on_host", "namespace", "why_not"]

C_TYPES = {
    "bool": "bool",
    "uint8": "unsigned char",
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

    def as_arrays(self, args: tuple[Any, ...]) -> list[Any]:
        """Numbers take the type of the parameter; arrays must have it, as in CuPy."""
        if len(args) != len(self.inputs):
            raise TypeError(f"{self.name} takes {len(self.inputs)} arguments, got {len(args)}")
        if not any(isinstance(a, np.ndarray | np.generic) for a in args):
            raise ValueError("loop size is undecided")
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
        names += [f"{p.c_type}& {p.name} = _{p.name}[i];" for p in self.outputs]
        return f"for (ptrdiff_t i = 0; i < n; i++) {{ {' '.join(names)} {self.operation}; }}"

    def __call__(self, *args: Any) -> Any:
        """Broadcast, allocate the outputs, run."""
        arrays = self.as_arrays(args)
        pairs = list(zip(arrays, self.inputs, strict=True))
        shape = np.broadcast_shapes(*(a.shape for a, p in pairs if not p.is_raw))
        arrays = [
            np.ascontiguousarray(a if p.is_raw else np.broadcast_to(a, shape)) for a, p in pairs
        ]
        results = [np.empty(shape, dtype=p.dtype) for p in self.outputs]
        self.run(results[0].size, 1, arrays + results)
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
        self.run(results[0].size, width, [*map(np.ascontiguousarray, arrays), *results])
        return np.expand_dims(results[0], axes) if keepdims else results[0]


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


class HostCupy(ModuleType):
    """In the place of ``cupy``; what it does not define is NumPy's."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.ndarray = type("ndarray", (), {})
        self.asnumpy = np.asarray
        self.library = Library()
        self.ElementwiseKernel = functools.partial(HostElementwise, self.library)
        self.ReductionKernel = functools.partial(HostReduction, self.library)
        self.cuda = SimpleNamespace(
            Device=HostDevice,
            runtime=SimpleNamespace(
                getDeviceCount=lambda: 1,
                getDeviceProperties=lambda _: {"name": b"none"},
                runtimeGetVersion=lambda: 0,
            ),
            get_current_stream=lambda: SimpleNamespace(synchronize=lambda: None),
        )
        self.get_default_memory_pool = lambda: SimpleNamespace(
            free_all_blocks=lambda: None, total_bytes=lambda: 0
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


class HostCupyx(ModuleType):
    """In the place of ``cupyx``: where CuPy only then raises what NumPy always does, and what asked it to."""

    def __init__(self) -> None:
        super().__init__("cupyx")
        self.asked: list[dict[str, str]] = []

    def errstate(self, **options: str) -> contextlib.AbstractContextManager[None]:
        """Note the options; NumPy raises by itself."""
        self.asked.append(options)
        return contextlib.nullcontext()


class _Namespace(ModuleType):
    """Looks like CuPy to whoever asks for its name, and computes with NumPy."""

    def __getattr__(self, name: str) -> Any:
        return getattr(array_api_compat.numpy, name)


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


@contextlib.contextmanager
def cupy_on_host() -> Iterator[Any]:
    """Let ``slra`` take every array for CuPy's, and load its CuPy backend over `HostCupy`."""
    before = _replace(_modules or {"cupy": HostCupy(), "cupyx": HostCupyx()})
    array_namespace = compat.array_namespace

    def as_cupy(*xs: Any, **options: Any) -> Any:
        found = array_namespace(*xs, **options)
        return namespace if compat.is_numpy_namespace(found) else found

    compat.array_namespace = as_cupy
    try:
        importlib.import_module(_PREFIX)
        yield namespace
    finally:
        compat.array_namespace = array_namespace
        _modules.update(_replace(before))
