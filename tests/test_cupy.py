"""The CuPy path on a machine without a GPU: kernels compiled, kernels run, primitives dispatched, and mutants caught.

- NVRTC compiles every kernel for every dtype to PTX, for each supported generation of GPUs.
- g++ compiles the same text, and what it computes is compared with the array API reference.
- A CuPy namespace gets the CuPy table, whose overrides run.
- Deliberately broken kernels fail each of these checks that should see them.

Beyond this file, every test that takes ``xp`` runs on the backend ``cupy-on-host``.
"""

from typing import NamedTuple

import array_api_compat.numpy as np_xp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import slra
from slra._backends import Primitives, primitives
from slra._backends.agnostic_attention import ScoreOptions, SoftmaxState, Tile
from tests.cuda_host import host, nvrtc

ARCHITECTURES = [75, 80, 90, 100]
needs_compiler = pytest.mark.skipif(host.why_not() is not None, reason=str(host.why_not()))
needs_nvrtc = pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))


class Rounded:
    """NumPy's namespace with the nearest numbers to exp and tanh; its own are up to 3 ulp off."""

    def __getattr__(self, name):
        return getattr(np_xp, name)

    def exp(self, x):
        return np.exp(x.astype(np.longdouble)).astype(x.dtype)

    def tanh(self, x):
        return np.tanh(x.astype(np.longdouble)).astype(x.dtype)


REFERENCE = Primitives(Rounded())


def defined():
    """Names and dtypes of all kernels, found without CuPy."""
    with host.cupy_on_host():
        from slra._backends.cupy_kernels import KERNELS

        return list(KERNELS)


def specials(dtype):
    """Numbers at which a kernel may go wrong, besides those that hypothesis thinks of."""
    info = np.finfo(dtype)
    tiny, huge = float(info.smallest_subnormal), float(info.max)
    return [0.0, -0.0, 0.5, -0.5, tiny, -tiny, huge, -huge, np.nan, np.inf, -np.inf]


def real_numbers(dtype, low=None, high=None):
    width = np.dtype(dtype).itemsize * 8
    drawn = st.floats(low, high, width=width)
    return drawn if high is not None else drawn | st.sampled_from(specials(dtype))


def arrays(dtype, low=None, high=None, shape=(7, 5)):
    """Arrays of NaN, infinities, zeros of both signs, denormals and what lies between."""
    real = np.finfo(dtype).dtype
    parts = hnp.arrays(real, shape, elements=real_numbers(real, low, high))
    if np.dtype(dtype).kind == "f":
        return parts
    return hnp.arrays(
        dtype, shape, elements=st.builds(complex, *[real_numbers(real, low, high)] * 2)
    )


def thresholds(dtype):
    """A number, or an array that broadcasts: finite and not negative, as the door lets through."""
    real = np.finfo(dtype).dtype
    numbers = st.sampled_from([0.0, 0.5, 1e-3]) | st.floats(0, 1e3)
    return numbers | arrays(real, 0.0, 1024.0, shape=(7, 1))


SIZE, TILE = 12, Tile(3, 10, 2, 7)


def masks(dtype):
    """No mask, or a boolean or additive one of the whole matrix of scores, or one row for all queries."""
    shapes = st.sampled_from([(SIZE, SIZE), (2, 1, SIZE), (SIZE, 1)])
    booleans = shapes.flatmap(lambda shape: hnp.arrays(np.bool_, shape))
    biases = st.sampled_from([0.0, -1.5, -np.inf])
    floats = shapes.flatmap(lambda shape: hnp.arrays(dtype, shape, elements=biases))
    return st.none() | booleans | floats


def bounds(dtype):
    """Mask, options, tile and diagonal; the diagonal cuts the tile or does not."""
    options = st.builds(
        ScoreOptions,
        scale=st.just(1.0),
        is_causal=st.booleans(),
        softcap=st.none() | st.sampled_from([0.5, 30.0]),
    )
    return masks(dtype), options, st.just(TILE), st.sampled_from([-9, -2, 0, 4])


def states(dtype):
    peaks = arrays(dtype, -30.0, 30.0, shape=(2, 7)) | st.just(np.full((2, 7), -np.inf, dtype))
    totals = arrays(dtype, 0.0, 64.0, shape=(2, 7))
    return st.builds(SoftmaxState, peaks, totals, arrays(dtype, -8.0, 8.0, shape=(2, 7, 3)))


def moderate(dtype, shape=(2, 7, 5)):
    """Numbers whose exponential is finite, and some that have none."""
    real = st.floats(-30.0, 30.0, width=np.dtype(dtype).itemsize * 8)
    return hnp.arrays(dtype, shape, elements=real | st.sampled_from([np.nan, -np.inf, -0.0]))


def gradient_arguments(dtype):
    lse = moderate(dtype, (2, 7, 1))
    return st.tuples(
        moderate(dtype),
        arrays(dtype, -8.0, 8.0, (2, 7, 5)),
        *bounds(dtype),
        lse,
        arrays(dtype, -8.0, 8.0, (2, 7, 1)),
    )


FLOATING = ["float32", "float64", "complex64", "complex128"]
REAL = FLOATING[:2]
# What each primitive with kernels is given: dtypes, and a strategy for its arguments.
ARGUMENTS = {
    "soft_threshold": (FLOATING, lambda t: st.tuples(arrays(t), thresholds(t))),
    "soft_threshold_step": (
        FLOATING,
        lambda t: st.tuples(arrays(t), arrays(t), st.sampled_from([0.0, 0.5, 1e-3]), thresholds(t)),
    ),
    "nonneg_threshold": (REAL, lambda t: st.tuples(arrays(t), thresholds(t))),
    "elastic_threshold": (
        FLOATING,
        lambda t: st.tuples(arrays(t), thresholds(t), st.floats(0, 100)),
    ),
    "extrapolate": (FLOATING, lambda t: st.tuples(arrays(t), arrays(t), st.floats(0, 1))),
    "sum_abs": (FLOATING, lambda t: st.tuples(arrays(t), st.sampled_from([None, 0, 1, (0, 1)]))),
    "tile_scores": (REAL, lambda t: st.tuples(arrays(t, shape=(2, 7, 5)), *bounds(t))),
    "softmax_step": (
        REAL,
        lambda t: st.tuples(states(t), moderate(t), arrays(t, -8.0, 8.0, shape=(2, 5, 3))),
    ),
    "tile_gradients": (REAL, gradient_arguments),
}


# NVRTC


def check_compiles(kernel, architecture, **options):
    text = nvrtc.ptx(kernel, architecture, **options)
    assert f".entry {kernel.name}(" in text
    assert f".target sm_{architecture}" in text


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("name", "dtype"), defined())
def test_nvrtc_compiles(name, dtype, architecture):
    from slra._backends.cupy_kernels import KERNELS

    check_compiles(KERNELS[name, dtype], architecture)


@needs_nvrtc
@pytest.mark.parametrize(("name", "dtype"), defined())
def test_nvrtc_compiles_what_other_arguments_make_of_a_kernel(name, dtype):
    from slra._backends.cupy_kernels import KERNELS

    check_compiles(KERNELS[name, dtype], ARCHITECTURES[0], ndim=4)
    check_compiles(KERNELS[name, dtype], ARCHITECTURES[0], scalars=True)


# g++


@pytest.fixture
def cupy_table():
    """The CuPy table over NumPy's arrays, with kernels compiled by g++."""
    with host.cupy_on_host() as xp:
        yield primitives(xp)


def slack(name, args, results):
    """Difference that rounding explains, for each result; none where the operations are the same."""
    result = results[0]
    info = np.finfo(result.dtype)
    eps = info.eps
    if name == "sum_abs":
        x, axis = args
        return (2 * x.size * eps * np.sum(np.abs(x), axis=axis),)
    if name == "tile_scores":
        # glibc's tanh is good to 2 ulp; a product and a sum follow.
        return (4 * eps * (args[2].softcap or 0.0),)
    if name == "softmax_step":
        # Each exponential is good to 1 ulp, and 5 + 1 terms are added in whichever order.
        state, _, v = args
        total = state.total + 5
        out = np.abs(state.out) + np.sum(np.abs(v), axis=-2, keepdims=True)
        return 0.0, 8 * eps * total, 8 * eps * out
    if name == "tile_gradients":
        grad_weights, cap, delta = args[1], args[3].softcap or 0.0, args[-1]
        # The error of a score is a relative one of its exponential.
        weights = (4 * cap + 2) * eps * results[0] + info.smallest_subnormal
        return weights, (weights + 8 * eps * results[0]) * (np.abs(grad_weights) + np.abs(delta))
    if result.dtype.kind == "f" or name == "extrapolate":
        return (0.0,)
    # A modulus is good to 2 ulp on either side, and its error comes back multiplied by x / |x|.
    size = sum(np.abs(a) for a in args if isinstance(a, np.ndarray) and a.shape == result.shape)
    return (8 * eps * size + 8 * info.smallest_subnormal,)


def check_close(ours, reference, bound):
    """Equal up to ``bound``; NaN and infinities where the reference has them."""
    assert ours.dtype == reference.dtype
    assert ours.shape == reference.shape
    finite = np.isfinite(reference)
    np.testing.assert_array_equal(np.isfinite(ours), finite)
    if ours.dtype.kind == "f":
        np.testing.assert_array_equal(ours[~finite], reference[~finite])
    assert np.all((np.abs(ours - reference) <= bound) | ~finite)


def check_values(table, name, dtype, phases=(Phase.generate, Phase.shrink)):
    """Compare a primitive with its reference over many arguments."""

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
    )
    @given(ARGUMENTS[name][1](dtype))
    def check(args):
        with np.errstate(all="ignore"):
            ours, reference = getattr(table, name)(*args), getattr(REFERENCE, name)(*args)
            if not isinstance(reference, tuple):
                ours, reference = (ours,), (reference,)
            bound = slack(name, args, reference)
            for each in zip(ours, reference, bound, strict=True):
                check_close(*each)

    check()


@needs_compiler
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, t) for name, (dtypes, _) in ARGUMENTS.items() for t in dtypes]
)
def test_values_are_the_reference_s(cupy_table, name, dtype):
    check_values(cupy_table, name, dtype)


# Dispatch

X = np.linspace(-2.0, 2.0, 24).reshape(4, 6)


def attend(**options):
    return slra.attention(X, X, X, **options)


# A public call, and the kernels that must run in it.
CALLS = {
    "soft_threshold": (lambda: slra.soft_threshold(X, 0.5), {"soft_threshold"}),
    "soft_threshold, complex": (lambda: slra.soft_threshold(X + 1j, 0.5), {"soft_threshold"}),
    "soft_threshold, array tau": (lambda: slra.soft_threshold(X, abs(X)), {"soft_threshold"}),
    "attention": (attend, {"weights", "rescale"}),
    "attention, causal": (lambda: attend(is_causal=True), {"scores", "weights", "rescale"}),
    "attention, softcap": (lambda: attend(softcap=2.0), {"scores", "weights", "rescale"}),
    "attention, mask": (
        lambda: attend(mask=np.eye(4, dtype=bool)),
        {"scores", "weights", "rescale"},
    ),
    "attention, added mask": (
        lambda: attend(mask=np.eye(4)),
        {"biased_scores", "weights", "rescale"},
    ),
}


def check_dispatch(call, expected, monkeypatch):
    """Run a public call on CuPy's stand-in, and note which kernels are asked for."""
    from slra._backends.cupy_kernels import KERNELS

    used = set()

    def noting(name, kernel):
        return lambda *args, **options: used.add(name) or kernel(*args, **options)

    for (name, dtype), kernel in list(KERNELS.items()):
        monkeypatch.setitem(KERNELS, (name, dtype), noting(name, kernel))
    call()
    assert used == expected


@needs_compiler
@pytest.mark.parametrize("name", CALLS)
def test_dispatch(cupy_table, monkeypatch, name):
    check_dispatch(*CALLS[name], monkeypatch)


def test_a_cupy_namespace_gets_the_cupy_table(cupy_table):
    assert type(cupy_table).__name__ == "CupyPrimitives"
    assert type(primitives(np_xp)).__name__ == "NumpyPrimitives"


def test_every_kernel_is_compared_with_a_reference_and_reached_by_a_public_call():
    names = {name for name, _ in defined()}
    assert names == set().union(*(kernels for _, kernels in CALLS.values()))


# Mutants


class Mutant(NamedTuple):
    """A kernel with one piece of its text replaced."""

    name: str
    dtype: str
    old: str
    new: str
    # The primitive whose values it spoils, where that has another name.
    primitive: str = ""
    # Whether a compiler must refuse it; if not, its values must be wrong.
    is_refused: bool = False

    def build(self, monkeypatch):
        """Make the kernel, on whichever CuPy is in place."""
        from slra._backends import cupy_kernels

        definition = cupy_kernels.DEFINITIONS[self.name]
        text, source = definition[-1], cupy_kernels.SOURCE
        if self.old in text:
            text = text.replace(self.old, self.new)
        else:
            assert source.count(self.old) == 1
            source = source.replace(self.old, self.new)
        changed = definition._replace(**{definition._fields[-1]: text})
        monkeypatch.setitem(cupy_kernels.DEFINITIONS, self.name, changed)
        return cupy_kernels.build(self.name, self.dtype, source)


CLIP = "x - (x < -tau ? -tau : x > tau ? tau : x)"
PHASE = "x * (shrunk / (modulus == R(0) ? R(1) : modulus))"
BOUND = "column <= limit ?"
MUTANTS = {
    "sign flipped": Mutant("soft_threshold", "float32", "x - (x <", "x + (x <"),
    "clipped to one sign": Mutant("soft_threshold", "float64", "x < -tau ? -tau", "x < -tau ? tau"),
    "NaN dropped": Mutant(
        "soft_threshold", "float32", CLIP, "copysign(fmax(abs(x) - tau, R(0)), x)"
    ),
    "copysign on complex": Mutant(
        "soft_threshold", "complex64", PHASE, "copysign(shrunk, x)", is_refused=True
    ),
    "conjugated": Mutant("soft_threshold", "complex128", "return x * (", "return conj(x) * ("),
    "0/0": Mutant("soft_threshold", "complex64", PHASE, "x * (shrunk / modulus)"),
    "uphill": Mutant("soft_threshold_step", "float32", "x - step * grad", "x + step * grad"),
    "uphill, complex": Mutant("soft_threshold_step", "complex128", "x - step", "x + step"),
    "excess below": Mutant("nonneg_threshold", "float64", "x <= tau ?", "x <= -tau ?"),
    "NaN cut off": Mutant(
        "nonneg_threshold", "float32", "x <= tau ? R(0) : x - tau", "x > tau ? x - tau : R(0)"
    ),
    "multiplied": Mutant("elastic_threshold", "complex64", "/ divisor", "* divisor"),
    "backwards": Mutant("extrapolate", "float64", "x + factor", "x - factor"),
    "sum without moduli": Mutant("sum_abs", "float32", "abs(x)", "x"),
    "sum of real parts": Mutant("sum_abs", "complex64", "abs(x)", "abs(x.real())"),
    "mask inverted": Mutant("scores", "float32", "attends ?", "!attends ?", "tile_scores"),
    "mask subtracted": Mutant(
        "biased_scores", "float64", "score + bias", "score - bias", "tile_scores"
    ),
    "own key lost": Mutant("scores", "float64", BOUND, "column < limit ?", "tile_scores"),
    "softcap not multiplied back": Mutant(
        "scores", "float32", "softcap * tanh", "tanh", "tile_scores"
    ),
    "exp(-inf - -inf)": Mutant(
        "weights", "float32", "(peak == -R(CUDART_INF) ? R(0) : peak)", "peak", "softmax_step"
    ),
    "peak added": Mutant("weights", "float64", "exp(score - (", "exp(score + (", "softmax_step"),
    "decay forgotten": Mutant(
        "rescale", "float32", "total * decay + part", "total + part", "softmax_step"
    ),
    "delta added": Mutant("gradients", "float64", "- delta", "+ delta", "tile_gradients"),
    "slope of softcap": Mutant(
        "gradients", "float32", "R(1) - ratio * ratio", "R(1) - ratio", "tile_gradients"
    ),
    "mask dropped": Mutant(
        "biased_gradients", "float32", "score + bias", "score", "tile_gradients"
    ),
}


@needs_compiler
@pytest.mark.parametrize("which", MUTANTS)
def test_a_mutant_has_wrong_values_or_no_compiler_takes_it(cupy_table, monkeypatch, which):
    from slra._backends.cupy_kernels import KERNELS

    mutant = MUTANTS[which]
    monkeypatch.setitem(KERNELS, (mutant.name, mutant.dtype), mutant.build(monkeypatch))
    with pytest.raises(host.CompileError if mutant.is_refused else AssertionError):
        check_values(
            cupy_table, mutant.primitive or mutant.name, mutant.dtype, phases=[Phase.generate]
        )


@needs_nvrtc
@pytest.mark.parametrize("which", MUTANTS)
def test_nvrtc_refuses_the_mutants_that_are_not_c(monkeypatch, which):
    mutant = MUTANTS[which]
    kernel = mutant.build(monkeypatch)
    if mutant.is_refused:
        with pytest.raises(RuntimeError, match="copysign"):
            check_compiles(kernel, ARCHITECTURES[0])
    else:
        check_compiles(kernel, ARCHITECTURES[0])


@needs_compiler
def test_dispatch_misses_an_override_that_is_gone(cupy_table, monkeypatch):
    monkeypatch.delattr(type(cupy_table), "soft_threshold")
    with pytest.raises(AssertionError):
        check_dispatch(*CALLS["soft_threshold"], monkeypatch)
