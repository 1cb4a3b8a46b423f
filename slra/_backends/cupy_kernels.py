"""CUDA kernels, each one pass over its arrays; compiled by CuPy when first called.

A kernel is written once, as templates in ``SOURCE`` and a line that calls them, and made for each dtype it is for.
The types of its parameters are spelled out, so that Python numbers may stand for arrays. The same text is compiled by a
C++ compiler in the tests, which is why it holds nothing that needs a GPU.
"""

from typing import Any, NamedTuple

import cupy

from slra._typing import Array

__all__ = ["DEFINITIONS", "KERNELS", "SOURCE", "build", "kernel"]

# The dtypes that a kernel can be made for, and the real dtype that each is computed in.
HALF = {"float16": "float32"}
REAL = {"float32": "float32", "float64": "float64"}
COMPLEX = {"complex64": "float32", "complex128": "float64"}

SOURCE = r"""
// NaN takes neither branch, and x - x is NaN again.
template <typename R> __device__ R slra_shrink(R x, R tau) {
    return x - (x < -tau ? -tau : x > tau ? tau : x);
}

template <typename R> __device__ complex<R> slra_shrink(complex<R> x, R tau) {
    const R modulus = abs(x);
    // Written so that NaN stays.
    const R shrunk = modulus <= tau ? R(0) : modulus - tau;
    return x * (shrunk / (modulus == R(0) ? R(1) : modulus));
}

// NaN takes the second branch, and stays.
template <typename R> __device__ R slra_excess(R x, R tau) {
    return x <= tau ? R(0) : x - tau;
}

template <typename R> __device__ R slra_cap(R product, R softcap) {
    return softcap == R(0) ? product : softcap * tanh(product / softcap);
}

template <typename R> __device__ R slra_mask(R score, bool attends) {
    return attends ? score : -R(CUDART_INF);
}

template <typename R> __device__ R slra_mask(R score, R bias) {
    return score + bias;
}

template <typename R, typename M>
__device__ R slra_score(R capped, M mask, int column, int limit) {
    return column <= limit ? slra_mask(capped, mask) : -R(CUDART_INF);
}

// exp(-inf - -inf) would be NaN: a row that has met no key keeps weights of zero.
template <typename R> __device__ R slra_weight(R score, R peak) {
    return exp(score - (peak == -R(CUDART_INF) ? R(0) : peak));
}

template <typename R> __device__ R slra_slope(R weight, R capped, R softcap) {
    const R ratio = softcap == R(0) ? R(0) : capped / softcap;
    return weight * (R(1) - ratio * ratio);
}
"""

# One tile of attention: a softcap of 0 is none, and limit 0 for column 0 no causal bound.
_TILE = "int32 column, int32 limit, {T} softcap"
_SCORE = "score = slra_score(slra_cap(product, softcap), mask, column, limit)"
_GRADIENTS = """
    const auto capped = slra_cap(product, softcap);
    const auto p = slra_weight(slra_score(capped, mask, column, limit), lse);
    weight = p;
    grad_score = slra_slope(p, capped, softcap) * (grad_weight - delta)
"""


class Elementwise(NamedTuple):
    """A kernel over arrays that broadcast.

    T stands for the dtype, R for the real one it is computed in, X for ``x`` as it enters the computation.
    """

    dtypes: dict[str, str]
    inputs: str
    outputs: str
    operation: str


class Reduction(NamedTuple):
    """A kernel that adds up a function of each entry.

    Where CuPy hands it to CUB, it renames the parameters by replacing their names in the text, inside words too.
    """

    dtypes: dict[str, str]
    inputs: str
    outputs: str
    summand: str


DEFINITIONS: dict[str, Elementwise | Reduction] = {
    "soft_threshold": Elementwise(
        HALF | REAL | COMPLEX, "{T} x, {R} tau", "{T} y", "y = slra_shrink({X}, tau)"
    ),
    "soft_threshold_step": Elementwise(
        REAL | COMPLEX,
        "{T} x, {T} grad, {R} step, {R} tau",
        "{T} y",
        "y = slra_shrink(x - step * grad, tau)",
    ),
    "nonneg_threshold": Elementwise(
        HALF | REAL, "{T} x, {R} tau", "{T} y", "y = slra_excess({X}, tau)"
    ),
    "elastic_threshold": Elementwise(
        HALF | REAL | COMPLEX,
        "{T} x, {R} tau, {R} divisor",
        "{T} y",
        "y = slra_shrink({X}, tau) / divisor",
    ),
    "extrapolate": Elementwise(
        REAL | COMPLEX, "{T} x, {T} move, {R} factor", "{T} y", "y = x + factor * move"
    ),
    "sum_abs": Reduction(HALF | REAL | COMPLEX, "{T} x", "{R} total", "abs({X})"),
    "scores": Elementwise(REAL, "{T} product, bool mask, " + _TILE, "{T} score", _SCORE),
    "biased_scores": Elementwise(REAL, "{T} product, {T} mask, " + _TILE, "{T} score", _SCORE),
    "weights": Elementwise(
        REAL, "{T} score, {T} peak", "{T} weight", "weight = slra_weight(score, peak)"
    ),
    "rescale": Elementwise(
        REAL, "{T} total, {T} decay, {T} part", "{T} sum", "sum = total * decay + part"
    ),
    "gradients": Elementwise(
        REAL,
        "{T} product, {T} grad_weight, bool mask, " + _TILE + ", {T} lse, {T} delta",
        "{T} weight, {T} grad_score",
        _GRADIENTS,
    ),
    "biased_gradients": Elementwise(
        REAL,
        "{T} product, {T} grad_weight, {T} mask, " + _TILE + ", {T} lse, {T} delta",
        "{T} weight, {T} grad_score",
        _GRADIENTS,
    ),
}


def build(name: str, dtype: str, source: str = SOURCE) -> Any:
    """Make one kernel; nothing is compiled yet."""
    definition = DEFINITIONS[name]
    words = {
        "T": dtype,
        "R": definition.dtypes[dtype],
        "X": "static_cast<float>(x)" if dtype in HALF else "x",
    }
    inputs, outputs, text = (part.format(**words) for part in definition[1:])
    options = {"name": f"slra_{name}_{dtype}", "preamble": source}
    if isinstance(definition, Elementwise):
        return cupy.ElementwiseKernel(inputs, outputs, text, **options)
    total = outputs.split()[-1]
    return cupy.ReductionKernel(inputs, outputs, text, "a + b", f"{total} = a", "0", **options)


KERNELS = {
    (name, dtype): build(name, dtype)
    for name, definition in DEFINITIONS.items()
    for dtype in definition.dtypes
}


def kernel(name: str, like: Array) -> Any:
    """Return the kernel of this name for the dtype of ``like``."""
    return KERNELS[name, like.dtype.name]
