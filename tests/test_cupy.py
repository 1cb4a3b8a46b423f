"""The CuPy path on a machine without a GPU: kernels compiled, kernels run, primitives dispatched, and mutants caught.

- NVRTC compiles every kernel for every dtype to PTX, for each supported generation of GPUs.
- g++ compiles the same text, and what it computes is compared with the array API reference.
- A CuPy namespace gets the CuPy backend, whose overrides run.
- Deliberately broken kernels fail each of these checks that should see them.

Beyond this file, every test that takes ``xp`` runs on the backend ``cupy-on-host``.
"""

import functools
from typing import NamedTuple
from unittest import mock

import array_api_compat.numpy as np_xp
import numpy as np
import pytest
from hypothesis import Phase

import slra
from slra._backends import backend_of
from slra._backends.standard.attention import ScoreOptions
from tests.cuda_host import host, nvrtc, prices
from tests.cuda_host.cases import OPERANDS, check_values, primitives_and_dtypes

ARCHITECTURES = [75, 80, 90, 100]
needs_compiler = pytest.mark.skipif(host.why_not() is not None, reason=str(host.why_not()))
needs_nvrtc = pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))


def defined():
    """Names and dtypes of all kernels, found without CuPy."""
    with host.cupy_on_host():
        from slra._backends.cupy_kernels import KERNELS

        return list(KERNELS)


# NVRTC


def check_compiles(kernels, architecture, **options):
    text = nvrtc.ptx(kernels, architecture, **options)
    assert f".target sm_{architecture}" in text
    entries = [entry.partition("(") for entry in text.split(".visible .entry ")[1:]]
    assert {name for name, *_ in entries} == {kernel.name for kernel in kernels}
    for name, _, body in entries:
        # A constant or a function of C may be one of doubles, which g++ does not show and many cards take 64 times as
        # long for.
        if not name.endswith(("float64", "complex128")) and "_wide_" not in name:
            assert ".f64" not in body


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles(architecture):
    from slra._backends.cupy_kernels import KERNELS

    check_compiles(KERNELS.values(), architecture)


@needs_nvrtc
@pytest.mark.parametrize("options", [{"ndim": 4}, {"scalars": True}], ids=str)
def test_nvrtc_compiles_what_other_arguments_make_of_a_kernel(options):
    from slra._backends.cupy_kernels import KERNELS

    check_compiles(KERNELS.values(), ARCHITECTURES[0], **options)


# g++


@pytest.fixture
def cupy_table():
    """The CuPy backend over NumPy's arrays, with kernels compiled by g++."""
    with host.cupy_on_host() as xp:
        yield backend_of(xp)


@needs_compiler
@pytest.mark.parametrize(("name", "dtype"), primitives_and_dtypes())
def test_values_are_the_reference_s(cupy_table, name, dtype):
    check_values(cupy_table, name, dtype)


# Dispatch

X = np.linspace(-2.0, 2.0, 24).reshape(4, 6)


def attend(**options):
    return slra.attention(X, X, X, **options)


def attend_in_tiles():
    backend = type(backend_of(host.namespace))
    with mock.patch.object(backend, "tile_shape", return_value=(3, 2)):
        attend()


TALL_QR = {"column_norm", "unit_gram", "lifted", "misfit", "factor"}
NORM = {"max_abs", "unit", "norm"}
ONE_TILE = {"row_sums", "weights", "softmax_result"}
LONG_ROWS = {"digit_counts", "digit_chosen", "chunk_counts", "write_largest"}
LONG, TALL = np.zeros((4097, 6)), np.random.default_rng(0).standard_normal((2, 300, 100))


def solve(prox, x0=X, **options):
    return slra.proximal_gradient(x0, lambda x: (0.0, x), prox, step=0.1, max_iter=2, **options)


def differentiate(**options):
    row = np.zeros(4)
    return slra.attention_vjp(X, X, X, X, row, X, **options)


def cached():
    k = np.random.default_rng(0).standard_normal((1, 32, 6))
    return slra.KVCache(FITTED, bits=4).append(k, k)


def choosing(**options):
    """A query that reads a few of the tokens of a cache in full."""
    k = np.random.default_rng(0).standard_normal((1, 64, 6))
    return slra.KVCache(FITTED, n_top=3, **options).append(k, k).attend(k[:, -1:])


def decoded(n_tokens=1, **options):
    """Tokens appended and attended to: several, and then one, of two sequences, the second of which may be shorter."""
    cache = slra.KVCache(FITTED, batch=(2,), **options)
    tokens = np.random.default_rng(0).standard_normal((3, 2, 1, 40, 6))
    cache.append(*tokens[1:, ..., :-1, :], lengths=np.asarray([39, 40 - n_tokens]))
    q, k, v = tokens[..., -1:, :]
    return cache.append(k, v).attend(q)


DECODED = {"row_sums", "weights", "put_mapped", "mapped_queries", "through"}
FITTED = slra.fit_attention(*np.random.default_rng(0).standard_normal((3, 1, 32, 6)), 6)
# A public call, and the kernels that must run in it.
CALLS = {
    "soft_threshold": (lambda: slra.soft_threshold(X, 0.5), {"soft_threshold"}),
    "soft_threshold, complex": (lambda: slra.soft_threshold(X + 1j, 0.5), {"soft_threshold"}),
    "soft_threshold, array tau": (lambda: slra.soft_threshold(X, abs(X)), {"soft_threshold"}),
    "soft_threshold, half": (
        lambda: slra.soft_threshold(X.astype("float16"), 0.5),
        {"soft_threshold"},
    ),
    "prox_nonneg_l1": (lambda: slra.prox.prox_nonneg_l1(X, 0.5), {"nonneg_threshold"}),
    "prox_elastic_net": (
        lambda: slra.prox.prox_elastic_net(X, 0.5, l2=1.0),
        {"elastic_threshold"},
    ),
    "prox_l2": (
        lambda: slra.prox.prox_l2(X, 0.5, axis=-1),
        {*NORM, "group_threshold"},
    ),
    "prox_l21, complex, array tau": (
        lambda: slra.prox.prox_l21(X + 1j, abs(X[:, :1]), axis=-1),
        {*NORM, "group_threshold"},
    ),
    "prox_l21, half": (
        lambda: slra.prox.prox_l21(X.astype("float16"), 0.5, axis=-2),
        {*NORM, "group_threshold"},
    ),
    "norm_l2": (lambda: slra.prox.norm_l2(X, axis=-1), NORM),
    "prox_nuclear": (lambda: slra.prox.prox_nuclear(X, 0.5), {"nonneg_threshold", "max_part"}),
    "norm_l1": (lambda: slra.prox.norm_l1(X), {"sum_abs"}),
    "proximal_gradient": (
        lambda: solve(slra.prox.prox_l1),
        {"soft_threshold_step", "extrapolate", "max_part", "wide_step"},
    ),
    "proximal_gradient, complex, weights": (
        lambda: solve(slra.prox.prox_l1, X + 1j, weight=abs(X)),
        {"soft_threshold_step", "extrapolate", "max_part", "wide_step"},
    ),
    "proximal_gradient, nonneg": (
        lambda: solve(slra.prox.prox_nonneg_l1, weight=0.5),
        {"nonneg_threshold_step", "extrapolate", "max_part", "wide_step"},
    ),
    "proximal_gradient, elastic net": (
        lambda: solve(functools.partial(slra.prox.prox_elastic_net, l2=1.0), weight=0.5),
        {"elastic_threshold_step", "extrapolate", "max_part", "wide_step"},
    ),
    # What it does is not known, so it is called.
    "proximal_gradient, any other": (
        lambda: solve(lambda x, tau: slra.prox.prox_l1(x, tau)),
        {"soft_threshold", "extrapolate", "max_part", "wide_step"},
    ),
    "attention": (attend, ONE_TILE),
    "attention in several tiles": (attend_in_tiles, {*ONE_TILE, "join", "rescale"}),
    "attention, long rows": (
        lambda: slra.attention(X[:1], LONG, LONG),
        {*ONE_TILE, "row_joins"},
    ),
    "attention, causal": (
        lambda: attend(is_causal=True),
        {*ONE_TILE, "scores"},
    ),
    "attention, softcap": (
        lambda: attend(softcap=2.0),
        {*ONE_TILE, "scores"},
    ),
    "attention, mask": (
        lambda: attend(mask=np.eye(4, dtype=bool)),
        {*ONE_TILE, "scores"},
    ),
    "attention, added mask": (
        lambda: attend(mask=np.eye(4)),
        {*ONE_TILE, "biased_scores"},
    ),
    "randomized_svd, a batch": (
        lambda: slra.randomized_svd(TALL, 2, method="krylov", rng=0),
        {"max_part", *TALL_QR, "max_abs", "first", "phase", "eigen_misfit"},
    ),
    "randomized_svd, centred": (
        lambda: slra.randomized_svd(LONG + X[0], rtol=0.5, center=True, rng=0),
        {"max_part", *TALL_QR, "max_abs", "first", "phase", "least"}
        | {"wide_sum", "wide_centered", "wide_squares", "sum_abs"},
    ),
    "prox_nuclear, out of range": (
        lambda: slra.prox.prox_nuclear(X * 2.0**60, 0.5),
        {"nonneg_threshold", "max_part", "power_of_two"},
    ),
    "compress": (
        lambda: slra.compress(TALL[0], 3, 0.1, n_iter=1).to_dense(),
        {"max_part", "wide_squares", "sum_abs", "keep_largest", "mark_largest", "gather", "scatter"}
        | {*TALL_QR, "max_abs", "first", "phase"},
    ),
    "compress, by matrices": (
        lambda: slra.compress(TALL[0], 3, 0.1, per="matrix", n_iter=1).to_dense(),
        {"max_part", "wide_squares", "sum_abs", "scatter", *TALL_QR, "max_abs", "first", "phase"}
        | LONG_ROWS,
    ),
    "KVCache in bits": (lambda: cached().decode(), {"unpack"}),
    "KVCache, a few keys in full": (choosing, {"mapped_queries", "scatter"}),
    "KVCache, a few keys in full, in bits": (
        lambda: choosing(bits=4),
        {"mapped_queries", "scatter", "chosen_tokens"},
    ),
    "KVCache": (decoded, DECODED),
    "KVCache, sequences of different lengths": (
        lambda: decoded(5),
        {*DECODED, "put_rows", "scores"},
    ),
    "KVCache, exact tokens": (
        lambda: decoded(window=4, n_sink=1),
        {*DECODED, "copy_both", "softmax_result", "merged"},
    ),
    "KVCache, rotated": (
        lambda: decoded(rotary=[1.0, 0.1]),
        {*DECODED, "rotated"} - {"mapped_queries"},
    ),
    "attention_vjp": (differentiate, {"gradients"}),
    "attention_vjp, added mask": (lambda: differentiate(mask=np.eye(4)), {"biased_gradients"}),
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
    assert type(cupy_table).__name__ == "CupyBackend"
    assert type(backend_of(np_xp)).__name__ == "NumpyBackend"


def test_every_kernel_is_compared_with_a_reference_and_reached_by_a_public_call():
    names = {name for name, _ in defined()}
    assert names == set().union(*(kernels for _, kernels in CALLS.values()))


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_a_factor_that_there_is_not_is_seen_without_waiting(cupy_table, monkeypatch, dtype):
    """CuPy leaves anything in its place: what LAPACK leaves, or a factor but for the sign or size of a pivot."""
    rng, n, xp = np.random.default_rng(0), 40, cupy_table.xp
    x = rng.standard_normal((6, n, n)).astype(dtype)
    if dtype == "complex128":
        x += 1j * rng.standard_normal(x.shape)
    good = (x @ np.conj(x).swapaxes(-1, -2)).astype(dtype)
    # Ill-conditioned too, of rank one to rounding, and of every size.
    good[1] *= np.logspace(-8, 0, n)[:, None] * np.logspace(-8, 0, n)
    good[2] = np.ones((n, n)) + 200 * np.finfo(dtype).eps * np.eye(n)
    good[3] *= 1e-20
    for factor, g in zip(cupy_table.cholesky(good), good, strict=True):
        side = np.sqrt(np.diagonal(g).real)
        gap = factor @ np.conj(factor).T - g
        assert np.all(abs(gap) <= 8 * (n + 1) * np.finfo(dtype).eps * side[:, None] * side)
    bad = np.stack([np.diag([*[1.0] * (n - 1), -1.0]), np.zeros((n, n)), np.ones((n, n))])
    bad = np.concatenate([bad, np.full((1, n, n), np.nan), bad[:1] - 2]).astype(dtype)
    factors = cupy_table.cholesky(np.concatenate([good[:1], bad]))
    assert np.all(np.isfinite(factors[0]))
    assert np.all(np.isnan(factors[1:]))
    left = xp.linalg.cholesky(good[:1])
    for spoilt in (left * -1.0, left * np.float32(1 + 1e-3), np.full_like(left, np.inf)):
        monkeypatch.setattr(type(xp.linalg), "cholesky", lambda _, g, spoilt=spoilt: spoilt)
        assert np.all(np.isnan(cupy_table.cholesky(good[:1])))


def test_what_a_user_asked_cupy_to_raise_is_not_raised(cupy_table):
    import cupyx

    cupyx.asked.clear()
    cupy_table.cholesky(np.diag([1.0, -1.0]))
    assert cupyx.asked == [{"linalg": "ignore"}]


@pytest.mark.parametrize(
    ("shape", "is_larger"), [((2, 33, 33), True), ((2, 32, 32), False), ((33, 33), True)]
)
def test_svds_are_eigenvalue_problems(cupy_table, monkeypatch, shape, is_larger):
    from slra._backends import cupy as module

    calls, decompose = [], module.gram_svd
    monkeypatch.setattr(module, "gram_svd", lambda *args: calls.append(args) or decompose(*args))
    x = np.random.default_rng(0).standard_normal(shape)
    U, S, Vh = slra.truncated_svd(x)
    assert bool(calls) == is_larger
    np.testing.assert_allclose((U * S[..., None, :]) @ Vh, x, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_eigenvectors_that_are_none_are_seen(cupy_table, monkeypatch, dtype):
    """What cuSOLVER has been seen to leave of a batch: a diagonal, or vectors that are not orthonormal."""
    rng, n, xp = np.random.default_rng(0), 9, cupy_table.xp
    x = rng.standard_normal((5, n, n)).astype(dtype)
    if dtype == "complex128":
        x += 1j * rng.standard_normal(x.shape)
    g = x @ np.conj(x).swapaxes(-1, -2)
    g[1] *= np.float32(1e-30)
    g[4] = 0
    solve = xp.linalg.eigh

    def spoilt(a):
        w, v = map(np.array, solve(a))
        if a.ndim == 2:
            return w, v
        w[0], v[0] = np.sort(np.diagonal(a[0]).real), np.eye(n)
        v[1, :, 0] = v[1, :, 1]
        v[2] = np.nan
        return w, v

    monkeypatch.setattr(type(xp.linalg), "eigh", lambda _, a: spoilt(a), raising=False)
    w, v = cupy_table.small_eigh(g)
    expected = np.linalg.eigvalsh(g.astype("complex128"))
    eps = np.finfo(dtype).eps
    size = np.max(abs(expected), axis=-1, keepdims=True)
    assert np.all(abs(w - expected) <= 10 * n * eps * size)
    np.testing.assert_allclose(
        np.conj(v).swapaxes(-1, -2) @ v, np.stack([np.eye(n)] * 5), atol=50 * eps
    )
    assert np.all(abs(g @ v - v * w[:, None, :]) <= 20 * n * eps * size[..., None])


@needs_compiler
def test_eigenvectors_of_matrices_too_large_for_a_block(cupy_table):
    """What is looked at of each comes in parts."""
    x = np.random.default_rng(0).standard_normal((16, 64, 64))
    g = x + x.swapaxes(-1, -2)
    w, v = cupy_table.small_eigh(g)
    np.testing.assert_allclose(v * w[:, None, :] @ v.swapaxes(-1, -2), g, rtol=0, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("width", [20, 2000])
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_so_many_entries_are_the_largest_whatever_they_are(cupy_table, dtype, width):
    """More would be written beyond the end of what is there for them."""
    x = np.random.default_rng(0).standard_normal((3, width)).astype(dtype)
    x[0], x[1, ::4], x[2, 5:7] = np.nan, np.nan, np.inf
    values, columns = cupy_table.largest_in_rows(x, 4)
    for row, taken, places in zip(x, values, columns, strict=True):
        assert len(set(places.tolist())) == 4
        np.testing.assert_array_equal(taken, row[places])
        assert not np.isfinite(taken[:2]).all()
    np.testing.assert_array_equal(np.sum(cupy_table.keep_largest(x, 4) != 0, axis=-1), 4)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_qr_of_a_tall_matrix_whatever_its_columns(cupy_table, dtype):
    """By products where that is as good, by cuSOLVER where columns depend on each other, or squares leave the range."""
    rng, eps = np.random.default_rng(0), np.finfo(dtype).eps
    x = rng.standard_normal((80, 10)).astype(dtype)
    dependent = x.copy()
    dependent[:, 3] = dependent[:, 2]
    dependent[:, 5] = 0
    spread = x * np.logspace(0, -12, 10).astype(dtype)
    for given in (x, dependent, spread, x * np.float32(1e30), x * np.float32(1e-30)):
        Q, R = cupy_table.qr(given)
        np.testing.assert_allclose(np.conj(Q).T @ Q, np.eye(10), atol=50 * eps)
        columns = np.max(abs(given), axis=0)
        assert np.all(abs(Q @ R - given) <= 50 * eps * columns)
        np.testing.assert_array_equal(R, np.triu(R))
        np.testing.assert_allclose(
            abs(np.diagonal(cupy_table.triangular_factor(given))),
            abs(np.diagonal(R)),
            atol=100 * eps * np.max(columns),
        )
    assert np.all(np.isnan(cupy_table.qr(np.full_like(x, np.nan))[1][0]))


@needs_compiler
@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64", "complex128"])
def test_a_generator_of_its_own_draws_on_the_device(cupy_table, dtype):
    import cupy

    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 60, 5)) @ rng.standard_normal((3, 5, 300))
    x = (x * (1 + 1j) if dtype.startswith("complex") else x).astype(dtype)
    seeded, other = slra.randomized_svd(x, 5, rng=0), cupy.random.default_rng(0)
    U, S, Vh = slra.randomized_svd(x, 5, rng=other, method="subspace")
    np.testing.assert_allclose(S, seeded.S, rtol=50 * np.finfo(S.dtype).eps)
    assert U.dtype == Vh.dtype == dtype
    again = slra.randomized_svd(x, 5, rng=cupy.random.default_rng(0), method="subspace")
    np.testing.assert_array_equal(U, again.U)
    # The next numbers are others, and so are those that NumPy draws from the same seed.
    real = cupy_table.real_dtype(x.astype("float32").dtype if dtype == "float16" else x.dtype)
    like = np.empty(0, dtype="complex128" if dtype == "complex128" else real)
    first, second = (cupy_table.test_matrix((400, 3), other, like) for _ in range(2))
    assert np.all(first != second)
    assert np.all(first != cupy_table.test_matrix((400, 3), 0, like))
    # 1200 of them, or 2400 parts: four deviations of the mean of squares.
    assert abs(np.mean(abs(first) ** 2) - 1) < 4 * np.sqrt(2 / 1200)
    slra.randomized_eigh(x[0] @ np.conj(x[0]).T if dtype != "float16" else np.eye(40), 3, rng=other)
    slra.estimate_error(x, (U * S[..., None, :].astype(dtype), Vh), rng=other)


def test_a_generator_of_another_library_is_refused(cupy_table):
    import cupy

    with pytest.raises(TypeError, match=r"numpy\.random\.Generator or None, got HostGenerator"):
        slra.prox.prox_nuclear(X, 0.5, rng=cupy.random.default_rng(0))


@needs_compiler
@pytest.mark.parametrize("name", ["largest_in_rows", "keep_largest"])
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_the_largest_of_long_rows(cupy_table, monkeypatch, name, dtype):
    in_chunks(monkeypatch)
    check_values(cupy_table, name, dtype)


@needs_compiler
@pytest.mark.parametrize("n_rows", [1, 70])
def test_the_largest_of_longer_rows(cupy_table, n_rows):
    """Moduli of every size, many of which tie, and all sorts of k."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n_rows, 1100)) * 2.0 ** rng.integers(-300, 300, (n_rows, 1100))
    x[:, ::3], x[:, ::5], x[:, 7] = 0, np.round(x[:, ::5]), np.inf
    x[:, 1::11] = -x[:, 2:3]
    for k in (1, 100, 700, 1099, 1100):
        values, columns = cupy_table.largest_in_rows(x, k)
        order = np.argsort(-abs(x), axis=-1, kind="stable")[:, :k]
        np.testing.assert_array_equal(columns, np.sort(order, axis=-1))
        np.testing.assert_array_equal(values, np.take_along_axis(x, np.sort(order, axis=-1), -1))


def in_chunks(monkeypatch):
    from slra._backends import cupy as module
    from slra._backends import cupy_select as select

    monkeypatch.setattr(module, "LONGEST_RANKED", 2)
    monkeypatch.setattr(select, "CHUNK", 2)
    monkeypatch.setattr(select, "COPIES", 3)


SEGMENTED = [
    "step_products",
    "sum_abs",
    "group_norm",
    "max_abs",
    "norm_squared",
    "column_means",
    "pivots",
]


@needs_compiler
@pytest.mark.parametrize("dtype", ["float16", "float32", "complex128"])
@pytest.mark.parametrize("name", SEGMENTED)
def test_reductions_by_segments(cupy_table, monkeypatch, name, dtype):
    if (name, dtype) in primitives_and_dtypes():
        in_segments(monkeypatch)
        check_values(cupy_table, name, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_of_scores_by_segments(cupy_table, monkeypatch, dtype):
    in_segments(monkeypatch)
    check_values(cupy_table, "softmax_step", dtype)


def in_segments(monkeypatch):
    from slra._backends import cupy as module

    monkeypatch.setattr(module, "LEAST_SEGMENT", 2)
    monkeypatch.setattr(module, "ENOUGH_BLOCKS", 40)


@needs_compiler
@pytest.mark.parametrize("axis", [None, 0, -1, (0, 1), (2, 0)])
def test_no_result_is_left_to_few_threads(cupy_table, axis):
    """CuPy gives each result one block: a sum over a large array must be many sums first."""
    x = np.linspace(-1.0, 1.0, 6 * 200_001, dtype="float32").reshape(3, -1, 2)
    with prices.counting() as bill:
        total = slra.prox.norm_l1(prices.priced(x), axis=axis)
        norm = slra.prox.norm_l2(prices.priced(x), axis=-1 if axis is None else axis)
    np.testing.assert_allclose(total, np.sum(abs(x), axis=axis, dtype="float64"), rtol=1e-5)
    squares = np.sum(x.astype("float64") ** 2, axis=-1 if axis is None else axis)
    np.testing.assert_allclose(norm, np.sqrt(squares), rtol=1e-5)
    assert bill.fewest_blocks(x.size) >= 132


def test_arrays_on_another_device_are_refused(cupy_table, monkeypatch):
    import cupy

    monkeypatch.setattr(cupy.cuda, "Device", lambda: "another device")
    with pytest.raises(TypeError, match="x must be on CuPy's current device, another device, got"):
        slra.soft_threshold(X, 0.5)


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize("view", OPERANDS)
def test_products_of_operands_as_they_lie(cupy_table, view, dtype):
    rng = np.random.default_rng(0)
    shapes = (2, 3, 5, 4), (2, 3, 4, 6)
    a, b = (rng.integers(-8, 8, shape).astype(dtype) for shape in shapes)
    if dtype == "complex128":
        a, b = a + 1j * a[::-1], b - 1j * b
    a, b = OPERANDS[view](a, b)
    ours = cupy_table.matmul(a, b)
    # Whole numbers, whose sums are exact in whichever order.
    np.testing.assert_array_equal(ours, np.einsum("...mk,...kn->...mn", a, b))
    assert ours.dtype == dtype


@pytest.mark.parametrize("view", OPERANDS)
def test_products_of_half_precision_are_summed_in_single(cupy_table, view):
    from slra._backends.cupy_products import product

    rng = np.random.default_rng(0)
    shapes = (2, 3, 5, 4), (2, 3, 4, 6)
    # Sums that half precision has no numbers for, nor for their size.
    a, b = (rng.integers(400, 500, shape).astype("float16") for shape in shapes)
    a, b = OPERANDS[view](a, b)
    ours = product(a, b, 0.5)
    assert ours.dtype == "float32"
    np.testing.assert_array_equal(
        ours, 0.5 * np.einsum("...mk,...kn->...mn", a.astype("float32"), b.astype("float32"))
    )


@needs_compiler
def test_half_precision_is_multiplied_as_it_is(cupy_table):
    """Large queries, whose scaled products are in range, and shared heads; as good as computed in single precision."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 4, 40, 32)).astype("float16")
    k, v = rng.standard_normal((2, 1, 2, 90, 32)).astype("float16")
    for size in (1.0, 2.0**13):
        scale = 2.0**-3 / size
        given = (np.float16(size) * q, k, v)
        ours = slra.attention(*given, scale=scale, enable_gqa=True)
        wide = [x.astype("float64") for x in given]
        exact = slra.attention(*wide, scale=scale, enable_gqa=True)
        assert ours.dtype == "float16"
        # Rounded once in the end; weights before, of which errors average.
        np.testing.assert_allclose(ours, exact, atol=2 * np.finfo("float16").eps)


@needs_compiler
def test_attention_in_several_tiles(cupy_table, monkeypatch):
    monkeypatch.setattr(type(cupy_table), "tile_shape", lambda *_: (3, 4))
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 5)) for n in (11, 13, 13))
    options = {
        "is_causal": True,
        "causal_align": "bottom_right",
        "softcap": 3.0,
        "return_lse": True,
    }
    ours = slra.attention(q, k, v, **options)
    scores = 3 * np.tanh(q @ k.swapaxes(-1, -2) / np.sqrt(5) / 3)
    scores[:, np.arange(13) > np.arange(11)[:, None] + 2] = -np.inf
    weights = np.exp(scores)
    total = np.sum(weights, axis=-1)
    eps = np.finfo("float64").eps
    np.testing.assert_allclose(ours[0], weights @ v / total[..., None], atol=50 * eps)
    np.testing.assert_allclose(ours[1], np.log(total), atol=50 * eps)


@needs_compiler
@pytest.mark.parametrize("shared", [False, True])
def test_attention_of_parts_of_a_batch(cupy_table, monkeypatch, shared):
    """Keys, masks and slopes may be those of all."""
    from slra._backends import cupy as module

    rng = np.random.default_rng(0)
    q, grad = rng.standard_normal((2, 3, 4, 6, 5))
    k, v = rng.standard_normal((2, *((1, 2) if shared else (3, 4)), 7, 5))
    options = {"mask": rng.random((4, 6, 7)) < 0.7, "alibi": rng.random(4), "enable_gqa": shared}
    options["causal_align"] = "top_left"
    if shared:
        k, v = (np.broadcast_to(x, (3, 2, 7, 5)) for x in (k, v))
    whole = slra.attention(q, k, v, return_lse=True, **options)
    grads = slra.attention_vjp(q, k, v, *whole, grad, **options)
    monkeypatch.setattr(module, "TILE_BYTES", 8 * 6 * 7 * 2)
    parts = slra.attention(q, k, v, return_lse=True, **options)
    parts += tuple(slra.attention_vjp(q, k, v, *whole, grad, **options))
    for ours, expected in zip(parts, (*whole, *grads), strict=True):
        np.testing.assert_allclose(ours, expected, atol=100 * np.finfo("float64").eps)
    # Broadcast axes are cut along others, and summed.
    given = [x[:, :, None] for x in (q, np.array(k[:1]), np.array(v[:1]))] if not shared else None
    if given:
        scores = cupy_table.attention(*given, None, ScoreOptions(0.5))
        monkeypatch.undo()
        for ours, expected in zip(
            scores, cupy_table.attention(*given, None, ScoreOptions(0.5)), strict=True
        ):
            np.testing.assert_allclose(ours, expected, atol=100 * np.finfo("float64").eps)


@needs_compiler
def test_gradient_in_several_tiles(cupy_table, monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v, grad = (rng.standard_normal((2, n, 5)) for n in (11, 13, 13, 11))
    options = {"is_causal": True, "causal_align": "bottom_right", "softcap": 3.0}
    out, lse = slra.attention(q, k, v, return_lse=True, **options)
    whole = slra.attention_vjp(q, k, v, out, lse, grad, **options)
    monkeypatch.setattr(type(cupy_table), "tile_shape", lambda *_: (3, 4))
    tiled = slra.attention_vjp(q, k, v, out, lse, grad, **options)
    for ours, expected in zip(tiled, whole, strict=True):
        np.testing.assert_allclose(ours, expected, atol=100 * np.finfo("float64").eps)


@needs_compiler
def test_the_benchmark_runs(capsys):
    """On the stand-in and tiny, so that it is not first tried on a GPU."""
    from benchmarks import gpu

    assert gpu.main(["--dry-run"]) == 0
    assert "everything ran" in capsys.readouterr().out


@needs_compiler
def test_the_benchmark_holds_what_was_asked_for():
    from benchmarks import gpu

    with gpu.on_host() as libraries:
        result = gpu.measure(libraries, gpu.TINY)
    errors = result["batched_svd"]["relative_error"]
    assert errors["slra.randomized_svd"] <= 1.01 * errors["cupy.linalg.svd"]
    for t, found in result["small_svd"].items():
        assert found["relative_error"]["slra"] < 100 * np.finfo(t).eps
    ours, theirs = result["sparse_svd"]["leading_value"].values()
    assert abs(ours - theirs) < 1e-4 * theirs
    assert "slra, exact" in result["attention"]["float32"]["bytes_held"]
    assert all(each["measured"] for each in result["asked"].values())


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

    def build(self):
        """Make the kernel, on whichever CuPy is in place."""
        from slra._backends import cupy_kernels

        definition, source = cupy_kernels.DEFINITIONS[self.name], cupy_kernels.SOURCE
        texts = definition._asdict()
        del texts["dtypes"]
        changed = definition._replace(
            **{field: text.replace(self.old, self.new) for field, text in texts.items()}
        )
        if changed == definition:
            assert source.count(self.old) == 1
            source = source.replace(self.old, self.new)
        return cupy_kernels.build(changed, self.name, self.dtype, source)


CLIP = "x - (x < -tau ? -tau : x > tau ? tau : x)"
SHORTER = "x * (shrunk / (size == R(0) ? R(1) : size))"
BOUND = "column <= limit ?"
MUTANTS = {
    "no sign": Mutant("unpack", "float32", "code - (1 << width)", "code", "unpack_blocks"),
    "the other byte": Mutant("unpack", "float64", "(token >> 3)", "0", "unpack_blocks"),
    "another token's": Mutant("chosen_tokens", "float32", "token % 16)", "token / 16)"),
    "the width before": Mutant("chosen_tokens", "float64", "j <= column", "j < column"),
    "one sequence's": Mutant("chosen_tokens", "float32", "element * n_bytes + ", ""),
    "the index left": Mutant("chosen_tokens", "float64", "y -= ldexp", "y += ldexp"),
    "sign flipped": Mutant("soft_threshold", "float32", "x - (x <", "x + (x <"),
    "clipped to one sign": Mutant("soft_threshold", "float64", "x < -tau ? -tau", "x < -tau ? tau"),
    "NaN dropped": Mutant(
        "soft_threshold", "float32", CLIP, "copysign(fmax(abs(x) - tau, R(0)), x)"
    ),
    "copysign on complex": Mutant(
        "soft_threshold", "complex64", SHORTER, "copysign(shrunk, x)", is_refused=True
    ),
    "conjugated": Mutant("soft_threshold", "complex128", "return x * (", "return conj(x) * ("),
    "0/0": Mutant("soft_threshold", "complex64", SHORTER, "x * (shrunk / size)"),
    "uphill": Mutant("soft_threshold_step", "float32", "x - step * grad", "x + step * grad"),
    "uphill, complex": Mutant("soft_threshold_step", "complex128", "x - step", "x + step"),
    "uphill, nonneg": Mutant("nonneg_threshold_step", "float64", "x - step", "x + step"),
    "uphill, elastic": Mutant("elastic_threshold_step", "complex64", "x - step", "x + step"),
    "not divided": Mutant("elastic_threshold_step", "float32", " / divisor", ""),
    "excess below": Mutant("nonneg_threshold", "float64", "x <= tau ?", "x <= -tau ?"),
    "NaN cut off": Mutant(
        "nonneg_threshold", "float32", "x <= tau ? R(0) : x - tau", "x > tau ? x - tau : R(0)"
    ),
    "multiplied": Mutant("elastic_threshold", "complex64", "/ divisor", "* divisor"),
    "0/0 in a group": Mutant("group_threshold", "float64", SHORTER, "x * (shrunk / size)"),
    "longer": Mutant("group_threshold", "complex64", "size - tau", "size + tau"),
    "negative length": Mutant("group_threshold", "float16", "size <= tau ? R(0) : ", ""),
    "product and matrix added": Mutant(
        "misfit", "float32", "product - given", "product + given", "cholesky"
    ),
    "product forgotten": Mutant("misfit", "complex64", "product - given", "given", "cholesky"),
    "kept, whatever": Mutant("factor", "float64", "misfit <= limit ?", "limit > 0 ?", "cholesky"),
    "a step added": Mutant(
        "wide_step", "float64", "turn + factor", "turn - factor", "step_products"
    ),
    "imaginary parts forgotten": Mutant(
        "wide_step", "complex64", " + slra_wide_product(x.imag(), y.imag())", "", "step_products"
    ),
    "squares of doubles": Mutant(
        "wide_squares", "complex128", "slra_wide_square(x.imag())", "0", "norm_squared"
    ),
    "one part": Mutant("max_part", "complex64", "R(abs(x.real())), ", "R(0), ", "max_abs"),
    "NaN dropped from maxima": Mutant("max_part", "float32", " || a != a", "", "max_abs"),
    "a mean of moduli": Mutant("wide_sum", "float32", "slra_wide(x)", "abs(x)", "column_means"),
    "mean added": Mutant("wide_centered", "complex64", "- mean", "+ mean", "centered"),
    "the last of those that tie": Mutant("first", "float32", "a < b", "a > b", "pivots"),
    "a norm without a root": Mutant(
        "column_norm", "float32", "sqrt(square)", "square", "unit_gram"
    ),
    "one side": Mutant("unit_gram", "float64", "(left * right)", "left", "unit_gram"),
    "all lifted": Mutant("lifted", "float32", "i / width % width == i % width", "true", "lifted"),
    "of the first matrix alone": Mutant(
        "lifted", "complex128", "i / width % width", "i / width", "lifted"
    ),
    "the phase of zero": Mutant("phase", "float32", "size > least", "size >= R(0)", "phases"),
    "twice the exponent": Mutant(
        "power_of_two", "float32", "slra_ldexp(x, exponent)", "slra_ldexp(x, 2 * exponent)"
    ),
    "ties kept": Mutant("keep_largest", "float32", "j < i)", "false)", "keep_largest"),
    "the smallest kept": Mutant(
        "mark_largest", "float64", "other > size", "other < size", "largest_in_rows"
    ),
    "the next column": Mutant(
        "gather", "float32", "columns[place] = i", "columns[place] = i + 1", "largest_in_rows"
    ),
    "digits of all": Mutant(
        "digit_counts",
        "float32",
        "(own >> shift >> 8) == (bits >> shift >> 8)",
        "own >= 0",
        "largest_in_rows",
    ),
    "another row's counters": Mutant(
        "digit_counts", "complex64", "i / width * copies", "0", "largest_in_rows"
    ),
    "a digit too few": Mutant("digit_chosen", "int32", "< rest)", "<= rest)", "largest_in_rows"),
    "ties above": Mutant(
        "chunk_counts", "float32", "own > bits ? 1LL", "own >= bits ? 1LL", "largest_in_rows"
    ),
    "all ties": Mutant(
        "write_largest", "float32", "own == bits && same < ties", "own == bits", "largest_in_rows"
    ),
    "the sums of the first row": Mutant(
        "write_largest",
        "float32",
        "(row > 0 ? sums[row * n_chunks - 1] : 0)",
        "0",
        "largest_in_rows",
    ),
    "rows that overlap": Mutant(
        "scatter", "float32", "i / k * width + column", "i / k + column", "scatter_rows"
    ),
    "smallest": Mutant("max_abs", "float32", "a > b", "a < b", "group_norm"),
    "largest without moduli": Mutant("max_abs", "float32", "abs({X})", "{X}", "group_norm"),
    "squares overflow": Mutant("norm", "float32", "/ unit", "", "group_norm"),
    "no squares": Mutant("norm", "complex128", "x * x", "x", "group_norm"),
    "no root": Mutant("norm", "float64", "sqrt(a)", "a", "group_norm"),
    "backwards": Mutant("extrapolate", "float64", "x + factor", "x - factor"),
    "sum without moduli": Mutant("sum_abs", "float32", "abs({X})", "{X}"),
    "sum of real parts": Mutant("sum_abs", "complex64", "abs({X})", "abs(x.real())"),
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
    "zero among the scores": Mutant(
        "row_sums", "float32", "slra_one(-{C}(CUDART_INF))", "slra_one({C}(0))", "softmax_step"
    ),
    "smallest on top": Mutant("row_sums", "float64", "a.peak >=", "a.peak <=", "softmax_step"),
    "NaN below": Mutant("row_sums", "float32", " || a.peak != a.peak", "", "softmax_step"),
    "total not shrunk": Mutant(
        "join", "float64", " * slra_weight(low.peak, top.peak)", "", "softmax_step"
    ),
    "decay of the tile": Mutant(
        "join", "float32", "slra_weight(peak, both", "slra_weight(tile_peak, both", "softmax_step"
    ),
    "parts forgotten": Mutant(
        "row_joins", "float32", "{peak, total}", "{peak, R(1)}", "softmax_step"
    ),
    "sum instead of mean": Mutant(
        "softmax_result", "float64", "sum / (total == 0 ? {C}(1) : total)", "sum"
    ),
    "0/0 of a row without keys": Mutant(
        "softmax_result", "float32", "total == 0 ? {C}(1) : total", "total"
    ),
    "log of 1 more": Mutant("softmax_result", "float32", "log(total)", "log(total + 1)"),
    "peak forgotten": Mutant("softmax_result", "float64", "peak + log(total)", "log(total)"),
    "the next row's logarithm": Mutant(
        "softmax_result", "float64", "lse[i / width]", "lse[i / width / 2]"
    ),
    "the next element's map": Mutant(
        "put_mapped", "float32", "row / n_rows % n_maps", "row % n_maps"
    ),
    "shift added": Mutant("put_mapped", "float64", "- shift[at_shift", "+ shift[at_shift"),
    "a row of the map": Mutant("put_mapped", "float16", "at_w + k * step", "at_w + k"),
    "maps of other queries": Mutant(
        "mapped_queries", "float32", "row % n_rows / (n_rows / n_shared)", "row % n_shared"
    ),
    "shift of another head": Mutant("mapped_queries", "float64", "head * depth, 1", "0, 1"),
    "mean without keys": Mutant(
        "through", "float32", "is_empty ? {C}(0) : whole", "whole", "attention_through"
    ),
    "not divided by the total": Mutant(
        "through", "float64", "whole / total[row]", "whole", "attention_through"
    ),
    "unscaled shift": Mutant("through", "float32", "scale * shift", "shift", "attention_through"),
    "infinity on top": Mutant(
        "merged", "float32", "lse == R(CUDART_INF) ? -R(CUDART_INF) : lse", "lse"
    ),
    "what does not matter": Mutant(
        "merged",
        "float64",
        "== -R(CUDART_INF) ? R(0) : weight * out",
        "== R(1e30) ? R(0) : weight * out",
    ),
    "weights exchanged": Mutant("merged", "float32", "lse_a, pair.left", "lse_a, pair.right"),
    "turned backwards": Mutant("rotated", "float64", "- x[i + n] *", "+ x[i + n] *"),
    "the first table": Mutant("rotated", "float32", "/ (n_rows * n_heads) % n_tables", "* 0"),
    "written all the same": Mutant("put_rows", "float32", "place >= 0", "place >= -1"),
    "exchanged": Mutant("copy_both", "float16", "first = a", "first = b", "put_both"),
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


REFUSED = [which for which, mutant in MUTANTS.items() if mutant.is_refused]


@functools.cache
def built():
    """Mutants that a compiler takes, compiled together."""
    import cupy

    cupy.library.compile()
    kernels = {which: MUTANTS[which].build() for which in MUTANTS if which not in REFUSED}
    cupy.library.compile()
    return kernels


def check_mutant(backend, mutant, kernel, monkeypatch):
    """Compare values with the mutant in the place of the kernel."""
    from slra._backends.cupy_kernels import KERNELS

    monkeypatch.setitem(KERNELS, (mutant.name, mutant.dtype), kernel)
    if mutant.name == "row_joins":
        in_segments(monkeypatch)
    if mutant.name in LONG_ROWS:
        in_chunks(monkeypatch)
    # Most fall to the first few examples; those that none of the usual 40 happens to meet get more.
    check_values(
        backend,
        mutant.primitive or mutant.name,
        mutant.dtype,
        phases=[Phase.generate],
        max_examples=400,
    )


@needs_compiler
@pytest.mark.parametrize("which", sorted(set(MUTANTS) - set(REFUSED)))
def test_a_mutant_has_wrong_values(cupy_table, monkeypatch, which):
    with pytest.raises(AssertionError):
        check_mutant(cupy_table, MUTANTS[which], built()[which], monkeypatch)


@needs_compiler
@pytest.mark.parametrize("which", REFUSED)
def test_the_compiler_refuses_mutants_that_are_not_c(cupy_table, monkeypatch, which):
    kernel = MUTANTS[which].build()
    with pytest.raises(host.CompileError, match="copysign"):
        check_mutant(cupy_table, MUTANTS[which], kernel, monkeypatch)


@needs_nvrtc
@pytest.mark.parametrize("which", REFUSED)
def test_nvrtc_refuses_mutants_that_are_not_c(which):
    with pytest.raises(RuntimeError, match="copysign"):
        check_compiles([MUTANTS[which].build()], ARCHITECTURES[0])


@needs_nvrtc
def test_nvrtc_shows_mutants_that_compute_in_double():
    mutant = Mutant("scores", "float32", "softcap * tanh(product", "softcap * tanh(1.0 * product")
    with pytest.raises(AssertionError, match=".f64"):
        check_compiles([mutant.build()], ARCHITECTURES[0])


@needs_compiler
def test_dispatch_misses_an_override_that_is_gone(cupy_table, monkeypatch):
    monkeypatch.delattr(type(cupy_table), "soft_threshold")
    with pytest.raises(AssertionError):
        check_dispatch(*CALLS["soft_threshold"], monkeypatch)
