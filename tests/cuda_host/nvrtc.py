"""CuPy's kernels through NVRTC to PTX, which needs no driver: all calls into CuPy's private parts are here."""

import importlib.util
from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = ["ptx", "why_not"]

# Argument kinds of cupy._core._kernel._ArgInfo.
NDARRAY, INDEXER, SCALAR = 1, 2, 3


def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    for module in ("cupy", "nvidia.cu13"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{module} is not installed"
    return None


def _wheel() -> str:
    """Where the wheels of CUDA 13 unpack their files."""
    spec = importlib.util.find_spec("nvidia.cu13")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return next(iter(spec.submodule_search_locations))


def _array(dtype: Any, ndim: int) -> Any:
    import cupy
    from cupy._core import _kernel

    return _kernel._ArgInfo(NDARRAY, cupy.ndarray, dtype, ndim, ndim == 1, True)


def _indexer(ndim: int) -> Any:
    from cupy._core import _carray, _kernel

    return _kernel._ArgInfo(INDEXER, _carray.Indexer, None, ndim, True, True)


def _number(dtype: Any) -> Any:
    from cupy._core import _kernel, _scalar

    return _kernel._ArgInfo(SCALAR, _scalar.CScalar, dtype, 0, True, True)


def generated(kernel: Any, *, scalars: bool, ndim: int) -> str:
    """Text that CuPy generates for a kernel: arrays of ``ndim`` axes, or numbers after the first array."""
    import cupy
    from cupy._core import _kernel, _reduction

    inputs = [p.dtype for p in kernel.in_params]
    outputs = [_array(p.dtype, ndim) for p in kernel.out_params]
    # What a kernel reads where it likes is never a number.
    are_numbers = [scalars and i > 0 and not p.raw for i, p in enumerate(kernel.in_params)]
    infos = [
        _number(t) if is_number else _array(t, ndim)
        for t, is_number in zip(inputs, are_numbers, strict=True)
    ]
    infos += outputs
    if isinstance(kernel, cupy.ElementwiseKernel):
        _, _, type_map = kernel._decide_params_type(tuple(inputs), ())
        return _kernel._get_elementwise_kernel_code(
            (*infos, _indexer(ndim)),
            type_map,
            kernel.params,
            kernel.operation,
            kernel.name,
            kernel.preamble,
        )
    infos += [_indexer(ndim), _indexer(ndim), _number(np.dtype("int32"))]
    return _reduction._ReductionKernel_get_cached_function_code(
        kernel.nin,
        kernel.nout,
        kernel._params,
        tuple(infos),
        _kernel._TypeMap((("IndexT", np.dtype("int32")),)),
        kernel.name,
        512,
        kernel.reduce_type,
        kernel.identity,
        kernel.map_expr,
        kernel.reduce_expr,
        kernel.post_map_expr,
        kernel.preamble,
        kernel.options,
    )


def _program(headers: list[str], texts: dict[str, str]) -> str:
    """One program of many kernels, whose types, templates and macros do not meet: a namespace for each."""
    includes, rest = [f"#include <{name}>" for name in headers], []
    for name, text in texts.items():
        lines = text.splitlines()
        includes += [line for line in lines if line.startswith("#include")]
        body = [line for line in lines if not line.startswith("#include")]
        undefined = [f"#undef {macro}" for macro in ("REDUCE", "POST_MAP", "_REDUCE")]
        rest += [f"namespace in_{name} {{", *body, "}", *undefined]
    return "\n".join([*includes, *rest])


def ptx(kernels: Iterable[Any], architecture: int, *, scalars: bool = False, ndim: int = 1) -> str:
    """Compile kernels, as one program, for ``compute_<architecture>``; the log of the compiler is in the error."""
    from cupy._core import core
    from cupy_backends.cuda.libs import nvrtc

    texts = {kernel.name: generated(kernel, scalars=scalars, ndim=ndim) for kernel in kernels}
    source = _program(core._cupy_header_list, texts)
    options = [
        f"-arch=compute_{architecture}",
        "-ftz=true",
        "--std=c++17",
        "--device-as-default-execution-space",
        f"-I{core._get_header_dir_path()}",
        # Half precision takes cuda_fp16.h, from nvidia-cuda-runtime.
        f"-I{_wheel()}/include",
        *core._get_cccl_include_options(),
    ]
    program = nvrtc.createProgram(source, "kernels.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getPTX(program).decode()
    except nvrtc.NVRTCError as error:
        raise RuntimeError(nvrtc.getProgramLog(program)) from error
    finally:
        nvrtc.destroyProgram(program)
