"""What the CuPy backend is tested with: arguments of each primitive with kernels, and how far off results may be."""

import array_api_compat.numpy as np_xp
import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slra._backends import Backend
from slra._backends.standard.attention import ScoreOptions, SoftmaxState, Tile, TileBounds

__all__ = ["OPERANDS", "check_values", "device_slack", "primitives_and_dtypes"]


class Rounded:
    """NumPy's namespace with the nearest numbers to exp and tanh; its own are up to 3 ulp off."""

    def __getattr__(self, name):
        return getattr(np_xp, name)

    def exp(self, x):
        return np.exp(x.astype(np.longdouble)).astype(x.dtype)

    def log(self, x):
        return np.log(x.astype(np.longdouble)).astype(x.dtype)

    def tanh(self, x):
        return np.tanh(x.astype(np.longdouble)).astype(x.dtype)


REFERENCE = Backend(Rounded())


def specials(dtype):
    """Numbers at which a kernel may go wrong, besides those that hypothesis thinks of."""
    info = np.finfo(dtype)
    tiny, huge = float(info.smallest_subnormal), float(info.max)
    return [0.0, -0.0, 0.5, -0.5, tiny, -tiny, huge, -huge, np.nan, np.inf, -np.inf]


def real_numbers(dtype, low=None, high=None):
    width = np.dtype(dtype).itemsize * 8
    drawn = st.floats(low, high, width=width)
    return drawn if high is not None else drawn | st.sampled_from(specials(dtype))


def arrays(dtype, low=None, high=None, shape=(4, 3)):
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
    real = np.result_type(np.finfo(dtype).dtype, np.float32)
    numbers = st.sampled_from([0.0, 0.5, 1e-3]) | st.floats(0, 1e3)
    return numbers | arrays(real, 0.0, 1024.0, shape=(4, 1))


def step_arguments(dtype):
    """A point, a gradient there, a step and a threshold."""
    steps = st.sampled_from([0.0, 0.5, 1e-3])
    return arrays(dtype), arrays(dtype), steps, thresholds(dtype)


def groups(dtype):
    """Rows, columns or everything of an array, and a threshold for each."""
    real = np.result_type(np.finfo(dtype).dtype, np.float32)
    numbers = st.sampled_from([0.0, 0.5]) | st.floats(0, 1e3)
    rows = arrays(real, 0.0, 1024.0, shape=(4, 1))
    return st.one_of(
        st.tuples(arrays(dtype), numbers | rows, st.just((1,))),
        st.tuples(arrays(dtype, -8.0, 8.0), numbers, st.sampled_from([(0,), (0, 1)])),
    )


SIZE, TILE = 12, Tile(3, 10, 2, 7)


def masks(dtype):
    """No mask, or a boolean or additive one of the whole matrix of scores, or one row for all queries."""
    shapes = st.sampled_from([(SIZE, SIZE), (2, 1, SIZE), (SIZE, 1)])
    booleans = shapes.flatmap(lambda shape: hnp.arrays(np.bool_, shape))
    biases = st.sampled_from([0.0, -1.5, -np.inf])
    floats = shapes.flatmap(lambda shape: hnp.arrays(dtype, shape, elements=biases))
    return st.none() | booleans | floats


def bounds(dtype):
    """The diagonal cuts the tile, or does not; so does the left end of a window, where there is one."""
    options = st.builds(
        ScoreOptions,
        scale=st.just(1.0),
        is_causal=st.booleans(),
        causal_align=st.just("bottom_right"),
        softcap=st.none() | st.sampled_from([0.5, 30.0]),
        first=st.none() | st.sampled_from([-9, -2, 2]),
        alibi=st.none() | arrays(dtype, 0.0, 2.0, shape=(2, 1, 1)),
    )
    diagonals = st.sampled_from([-9, -2, 0, 4])
    return st.builds(TileBounds, masks(dtype), options, st.just(TILE), diagonals)


def states(dtype):
    """States that can come about: a row that has met no key has sums of zero."""
    started = st.builds(
        SoftmaxState,
        arrays(dtype, -30.0, 30.0, shape=(2, 7)),
        arrays(dtype, 0.0, 64.0, shape=(2, 7)),
        arrays(dtype, -8.0, 8.0, shape=(2, 7, 3)),
    )
    zeros = np.zeros((2, 7), dtype), np.zeros((2, 7, 3), dtype)
    return started | st.just(SoftmaxState(np.full((2, 7), -np.inf, dtype), *zeros))


def moderate(dtype, shape=(2, 7, 5)):
    """Numbers whose exponential is finite, and some that have none; or minus infinity throughout."""
    real = st.floats(-30.0, 30.0, width=np.dtype(dtype).itemsize * 8)
    mixed = hnp.arrays(dtype, shape, elements=real | st.sampled_from([np.nan, -np.inf, -0.0]))
    return mixed | st.just(np.full(shape, -np.inf, dtype))


def gradient_arguments(dtype):
    lse = moderate(dtype, (2, 7, 1))
    return st.tuples(
        moderate(dtype),
        arrays(dtype, -8.0, 8.0, (2, 7, 5)),
        bounds(dtype),
        lse,
        arrays(dtype, -8.0, 8.0, (2, 7, 1)),
    )


def factored(dtype):
    """Positive definite matrices of any size, some made indefinite or singular."""
    side = st.integers(-4, 4)
    real = hnp.arrays(np.finfo(dtype).dtype, (2, 3, 3), elements=side)
    scales = st.sampled_from([1.0, 2.0**-40, 2.0**40])
    spoilt = st.sampled_from([1.0, 1.0, 0.0, -1.0])

    def make(a, b, scale, factor):
        lower = np.tril(a, -1) + (1j * np.tril(b, -1) if np.dtype(dtype).kind == "c" else 0)
        lower = lower + (np.eye(3) + abs(a) * np.eye(3))
        g = scale * (lower @ np.conj(lower).swapaxes(-1, -2))
        g[0, 2, 2] *= factor
        return (g.astype(dtype),)

    return st.builds(make, real, real, scales, spoilt)


EXPONENTS = np.asarray([[0.0], [20.0], [-61.0], [63.0]])
COLUMNS = np.asarray([[[0, 5], [2, 3], [1, 2]], [[0, 1], [4, 5], [0, 3]]], dtype="int8")


def repeated(dtype):
    """Rows of few different numbers, so that moduli tie."""
    return hnp.arrays(dtype, (2, 3, 6), elements=st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, 0.5]))


def packed(dtype):
    """Planes that hold anything, widths of 2 blocks of 3 tiles, and the dtype to answer in."""
    widths = hnp.arrays(np.uint8, (2, 1, 3), elements=st.integers(0, 15))
    heaps = hnp.arrays(np.uint8, 2 * 14 * 6, elements=st.integers(0, 255))
    return st.tuples(heaps, widths, st.just(np.dtype(dtype)))


def chosen(dtype):
    """Tokens of two sequences, in two heads and blocks of three tiles, of any widths; the index has two coordinates."""
    widths = hnp.arrays(np.uint8, (2, 2, 2, 3), elements=st.integers(0, 15))
    heaps = hnp.arrays(np.uint8, (2, 1, 2 * 14 * 12, 1), elements=st.integers(0, 255))
    codes = hnp.arrays(np.int8, (2, 2, 32, 2), elements=st.integers(-127, 127))
    exponents = hnp.arrays(np.uint8, (2, 2, 32, 1), elements=st.sampled_from([0, 0, 1, 5, 255]))
    at = hnp.arrays(np.int64, (2, 2, 4), elements=st.integers(0, 31))

    def given(parts):
        widths, heap, codes, exponents, at = parts
        is_whole = widths == 15
        counts = np.stack([np.where(is_whole, 0, widths).sum(-1), is_whole.sum(-1)], axis=-1)
        # Blocks lie before heads.
        counts = counts.astype(np.int64).swapaxes(1, 2).reshape(2, 4, 2)
        starts = (np.cumsum(counts, axis=1) - counts).reshape(2, 2, 2, 2).swapaxes(1, 2).copy()
        pairs = np.stack([widths[..., 0] | (widths[..., 1] << 4), widths[..., 2]], axis=-1)
        n_whole = int(counts[..., 1].sum(1).max())
        whole = np.arange(2 * n_whole * 16, dtype=dtype).reshape(2, 1, n_whole, 16) / 4
        return heap, whole, (codes, exponents, pairs, starts), at, 3, np.dtype(dtype)

    return st.tuples(widths, heaps, codes, exponents, at).map(given)


def places(n_elements, n_places, n_rows):
    """Places of rows of each element of a batch: the same run for all, or different ones and some that are left out."""
    runs = st.integers(0, n_rows - n_places).map(
        lambda first: np.broadcast_to(first + np.arange(n_places), (n_elements, n_places))
    )
    each = st.lists(st.integers(-1, n_rows - 1), min_size=n_places, max_size=n_places, unique=True)
    ragged = st.lists(each, min_size=n_elements, max_size=n_elements).map(np.asarray)
    return runs | ragged


def some(dtype, *shape):
    """Moderate numbers, some of them whole."""
    width = np.dtype(dtype).itemsize * 8
    return hnp.arrays(dtype, shape, elements=st.floats(-8, 8, width=width) | st.integers(-8, 8))


def wide(dtype):
    return "float32" if dtype == "float16" else dtype


def of_maps(make):
    """Arguments whose maps are those of all elements of the batch, or of each."""
    return st.sampled_from([1, 2]).flatmap(make)


def put_mapped(dtype):
    real = wide(dtype)
    return of_maps(
        lambda n: st.tuples(
            some(dtype, 2, 3, 6, 4),
            some(real, 2, 3, 2, 5),
            some(real, n, 3, 1, 5),
            some(real, n, 3, 5, 4),
            places(2, 2, 6),
        )
    )


def queries_and_maps(dtype):
    shared = st.sampled_from([1, 2])
    return st.tuples(of_maps(st.just), shared).flatmap(
        lambda n: st.tuples(
            some(dtype, 2, 4, 2, 5), some(dtype, n[0], 2, n[1], 5, 3), some(dtype, n[0], 2, 1, 5)
        )
    )


def attention_through(dtype):
    masks = st.none() | hnp.arrays(np.bool_, st.sampled_from([(2, 1, 3, 6), (2, 2, 3, 6)]))
    options = st.sampled_from([ScoreOptions(0.125), ScoreOptions(0.125, softcap=0.5)])
    qkv = [some(dtype, 2, 2, n, d) for n, d in ((3, 4), (6, 4), (6, 5))]
    shift = st.none() | some(dtype, 2, 2, 3, 1)
    return of_maps(
        lambda n: st.tuples(
            *qkv, masks, options, some(dtype, n, 2, 5, 7), some(dtype, n, 2, 1, 7), shift
        )
    )


def rotation(dtype):
    return of_maps(
        lambda n: st.tuples(
            arrays(dtype, shape=(2, 3, 2, 7)), some(dtype, n, 1, 2, 3), some(dtype, n, 1, 2, 3)
        )
    )


def parts(dtype):
    lse = hnp.arrays(
        dtype, (2, 3), elements=st.sampled_from([-np.inf, np.inf, np.nan, 0.0, 1.5, -3.25, 20.0])
    )
    outs = arrays(dtype, -8.0, 8.0, (2, 3, 4))
    return st.integers(1, 3).flatmap(
        lambda n: st.tuples(*(st.lists(x, min_size=n, max_size=n) for x in (outs, lse)))
    )


# Views of batches (2, 3, 5, 4) and (2, 3, 4, 6) that can be multiplied.
OPERANDS = {
    "transposed": lambda a, b: (a, b.swapaxes(-1, -2).copy().swapaxes(-1, -2)),
    "both transposed": lambda a, b: (
        a.swapaxes(-1, -2).copy().swapaxes(-1, -2),
        b.swapaxes(-1, -2).copy().swapaxes(-1, -2),
    ),
    "parts of rows and of columns": lambda a, b: (a[..., 1:4, :], b[..., 1:3]),
    "shared by a group of heads": lambda a, b: (a, b[:, :1]),
    "a part of a group's rows": lambda a, b: (a[..., 1:, :], b[:, :1]),
    "shared by all": lambda a, b: (a, b[0, 0]),
    "the left one shared": lambda a, b: (a[:1, :1], b),
    "one row, one column": lambda a, b: (a[..., :1, :], b[..., :1]),
    "one term": lambda a, b: (a[..., :1], b[..., :1, :]),
    "axes of the batch exchanged": lambda a, b: (a[:, :2].swapaxes(0, 1), b[:, :2].swapaxes(0, 1)),
    "backwards and with gaps": lambda a, b: (a[..., ::-1], b[..., ::-1, ::2]),
    "the same numbers in each row": lambda a, b: (np.broadcast_to(a[..., :1, :], a.shape), b),
    "two axes": lambda a, b: (a[0, 0], b[0, 0]),
}


FLOATING = ["float32", "float64", "complex64", "complex128"]
REAL, HALF = FLOATING[:2], ["float16"]
WIDE = dict(zip(FLOATING, 2 * ["float64"] + 2 * ["complex128"], strict=True))
# What each primitive with kernels is given: dtypes, and a strategy for its arguments.
ARGUMENTS = {
    "soft_threshold": (HALF + FLOATING, lambda t: st.tuples(arrays(t), thresholds(t))),
    "soft_threshold_step": (FLOATING, lambda t: st.tuples(*step_arguments(t))),
    "nonneg_threshold_step": (REAL, lambda t: st.tuples(*step_arguments(t))),
    "elastic_threshold_step": (
        FLOATING,
        lambda t: st.tuples(*step_arguments(t), st.floats(0, 100)),
    ),
    "nonneg_threshold": (HALF + REAL, lambda t: st.tuples(arrays(t), thresholds(t))),
    "elastic_threshold": (
        HALF + FLOATING,
        lambda t: st.tuples(arrays(t), thresholds(t), st.floats(0, 100)),
    ),
    "group_norm": (
        HALF + FLOATING,
        lambda t: st.tuples(arrays(t), st.sampled_from([(0,), (1,), (0, 1)])),
    ),
    "group_threshold": (HALF + FLOATING, groups),
    "cholesky": (FLOATING, factored),
    "max_abs": (FLOATING, lambda t: st.tuples(arrays(t, shape=(2, 4, 3)))),
    "norm_squared": (FLOATING, lambda t: st.tuples(arrays(t, shape=(2, 4, 3)))),
    "column_means": (FLOATING, lambda t: st.tuples(arrays(t, -1e3, 1e3, shape=(2, 5, 3)))),
    "centered": (FLOATING, lambda t: st.tuples(arrays(t), arrays(WIDE[t], -8.0, 8.0, (1, 3)))),
    "pivots": (FLOATING, lambda t: st.tuples(arrays(t, -8.0, 8.0, shape=(2, 5, 3)))),
    "lifted": (
        FLOATING,
        lambda t: st.tuples(arrays(t, -8.0, 8.0, (2, 3, 3)), st.floats(-1, 1, width=32)),
    ),
    "power_of_two": (
        FLOATING,
        lambda t: st.tuples(arrays(t), st.sampled_from([EXPONENTS, 2 * EXPONENTS])),
    ),
    "phases": (FLOATING, lambda t: st.tuples(arrays(t))),
    "unit_gram": (
        FLOATING,
        lambda t: st.tuples(arrays(t, -8.0, 8.0, (2, 3, 3)), st.sampled_from([1e-30, 1.0])),
    ),
    "extrapolate": (FLOATING, lambda t: st.tuples(arrays(t), arrays(t), st.floats(0, 1))),
    "keep_largest": (FLOATING, lambda t: st.tuples(repeated(t), st.integers(0, 6))),
    "largest_in_rows": (FLOATING, lambda t: st.tuples(repeated(t), st.integers(0, 6))),
    "scatter_rows": (
        HALF + FLOATING,
        lambda t: st.tuples(arrays(t, shape=(2, 3, 2)), st.just(COLUMNS), st.just(6)),
    ),
    "step_products": (
        FLOATING,
        lambda t: st.tuples(*[arrays(t, -8.0, 8.0, (5, 2))] * 5, st.floats(-2, 2, width=32)),
    ),
    "sum_abs": (
        HALF + FLOATING,
        lambda t: st.tuples(arrays(t), st.sampled_from([None, 0, 1, (0, 1)])),
    ),
    "tile_scores": (REAL, lambda t: st.tuples(arrays(t, shape=(2, 7, 5)), bounds(t))),
    "softmax_step": (
        REAL,
        lambda t: st.tuples(states(t), moderate(t), arrays(t, -8.0, 8.0, shape=(2, 5, 3))),
    ),
    "softmax_result": (REAL, lambda t: st.tuples(states(t))),
    "tile_gradients": (REAL, gradient_arguments),
    "unpack_blocks": (REAL, packed),
    "chosen_tokens": (REAL, chosen),
    "put_mapped": (HALF + REAL, put_mapped),
    "put_rows": (
        HALF + REAL,
        lambda t: st.tuples(
            some(t, 2, 3, 6, 4), arrays(wide(t), shape=(2, 3, 2, 4)), places(2, 2, 6)
        ),
    ),
    "put_both": (
        HALF + REAL,
        lambda t: st.tuples(
            st.tuples(*[some(t, 2, 3, 6, 4)] * 2),
            st.tuples(*[some(wide(t), 2, 3, 2, 4)] * 2),
            places(2, 2, 6),
        ),
    ),
    "rotated": (REAL, rotation),
    "mapped_queries": (REAL, queries_and_maps),
    "attention_through": (REAL, attention_through),
    "merged": (REAL, parts),
}
# What is written to, and what stays on the host.
WRITTEN = {"put_mapped": {0}, "put_rows": {0}, "put_both": {0}}
ON_HOST = {"put_mapped": {4}, "put_rows": {2}, "put_both": {2}}


def copied(x):
    return tuple(map(copied, x)) if isinstance(x, tuple) else x.copy()


def primitives_and_dtypes():
    """Each primitive that has kernels, with each dtype that it has them for."""
    return [(name, dtype) for name, (dtypes, _) in ARGUMENTS.items() for dtype in dtypes]


def slack(name, args, results):
    """Difference that rounding explains, for each result; none where the operations are the same."""
    result = results[0]
    if name in (
        "keep_largest",
        "largest_in_rows",
        "scatter_rows",
        "put_rows",
        "put_both",
        "rotated",
    ):
        return (0.0,) * len(results)
    info = np.finfo(result.dtype)
    eps = info.eps
    if name == "sum_abs":
        x, axis = args
        return (2 * x.size * eps * np.sum(np.abs(x), axis=axis),)
    if name == "group_norm":
        # Moduli good to 2 ulp, their quotients and squares, the sum of up to 12, its root; on either side.
        return (16 * eps * np.where(np.isfinite(result), result, 0) + 8 * info.smallest_subnormal,)
    if name == "group_threshold":
        # The relative error of a norm comes back multiplied by x, and by tau / norm, which is at most 1.
        return (
            24 * eps * np.where(np.isfinite(args[0]), np.abs(args[0]), 0)
            + 8 * info.smallest_subnormal,
        )
    if name == "put_mapped":
        # Five differences, of at most 16, times 8, added up in single precision; then rounded.
        own = np.finfo(args[3].dtype).eps
        return (64 * own * 5 * 16 * 8 + eps * np.abs(result),)
    if name == "mapped_queries":
        return (16 * eps * 5 * 64,) * 2
    if name == "attention_through":
        # Scores of up to 32, whose error is a relative one of the weights; outputs of up to 8, and 5 products with 8.
        shift = 0 if args[7] is None else 1
        return 64 * eps * 32 * 5 * 64, 16 * eps * (32 + 8 * shift)
    if name == "merged":
        return 32 * eps * 8 * 3, 8 * eps * 24
    if name == "tile_scores":
        # glibc's tanh is good to 2 ulp; a product and a sum follow.
        return (4 * eps * (args[1].options.softcap or 0.0),)
    if name == "softmax_step":
        # Each exponential is good to 1 ulp, and 5 + 1 terms are added in whichever order; on the way to the sum the
        # first of them is multiplied by one exponential for each of the others.
        state, _, v = args
        total = state.total + 5
        out = np.abs(state.out) + np.sum(np.abs(v), axis=-2, keepdims=True)
        return 0.0, 16 * eps * total, 8 * eps * out
    if name == "step_products":
        # Differences are rounded once by either, products and sums of ten by one of them.
        own = np.finfo(args[0].dtype).eps
        largest = max(np.max(np.abs(x)) for x in args[:5])
        return (200 * own * 10 * (6 * largest) ** 2 + 1e-300,) * len(results)
    if name == "power_of_two":
        # By way of a denormal number, one more digit is lost.
        return (2 * info.smallest_subnormal,)
    if name == "phases":
        return (8 * eps,)
    if name in ("cholesky", "max_abs", "pivots", "lifted"):
        return (0.0,)
    if name == "norm_squared":
        return (2 * args[0].size * eps * np.where(np.isfinite(result), result, 0),)
    if name == "column_means":
        return (8 * eps * np.sum(np.abs(args[0]), axis=-2, keepdims=True, dtype="float64"),)
    if name == "centered":
        return (4 * eps * np.where(np.isfinite(args[0]), np.abs(args[0]) + 16, 0),)
    if name == "unit_gram":
        return tuple(8 * eps * np.abs(x) for x in results)
    if name == "softmax_result":
        # glibc's logarithm is good to 1 ulp, of up to log(64) and of what cancels against a peak of its size.
        (state,) = args
        peak = np.where(np.isfinite(state.peak), np.abs(state.peak), 0)
        return 0.0, 4 * eps * (peak + 5) + abs(np.log(info.smallest_subnormal)) * eps
    if name == "tile_gradients":
        grad_weights, cap, delta = args[1], args[2].options.softcap or 0.0, args[-1]
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


def device_slack(name, args, results):
    """What a GPU may add: fused multiply-add, its own exp and tanh, denormals flushed to zero."""
    info = np.finfo(results[0].dtype)
    inputs = [a for a in args if isinstance(a, np.ndarray) and a.shape == results[0].shape]
    # What is not finite, and yet no part of a finite result, was masked.
    sizes = [np.where(np.isfinite(a), np.abs(a), 0) for a in inputs]
    rounding = 8 * info.eps * sum(sizes)
    return tuple(
        4 * bound + rounding + 64 * float(info.smallest_normal)
        for bound in slack(name, args, results)
    )


def unchanged(x):
    return x


def widened(x):
    """Half precision as the references take it."""
    return x.astype("float32") if isinstance(x, np.ndarray) and x.dtype == "float16" else x


def check_values(
    backend,
    name,
    dtype,
    *,
    phases=(Phase.generate, Phase.shrink),
    max_examples=40,
    bring=unchanged,
    fetch=unchanged,
    allowed=slack,
):
    """Compare a primitive with its reference on many arguments; ``bring`` and ``fetch`` move arrays to ``backend``."""

    @settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
    )
    @given(ARGUMENTS[name][1](dtype))
    def check(args):
        with np.errstate(all="ignore"):
            written, on_host = WRITTEN.get(name, set()), ON_HOST.get(name, set())
            given = [copied(x) if i in written else x for i, x in enumerate(args)]
            given = [x if i in on_host else bring(x) for i, x in enumerate(given)]
            ours = getattr(backend, name)(*given)
            args = [a if i in written else widened(a) for i, a in enumerate(args)]
            reference = getattr(REFERENCE, name)(*args)
            if isinstance(reference, list):
                ours, reference = (tuple(map(np.asarray, x)) for x in (ours, reference))
            if not isinstance(reference, tuple):
                ours, reference = (ours,), (reference,)
            bound = allowed(name, args, reference)
            for result, expected, gap in zip(ours, reference, bound, strict=True):
                result = fetch(result)
                # A kernel for half precision computes in single and rounds once, as everything else here does.
                check_close(result, expected.astype(result.dtype), gap)

    check()
