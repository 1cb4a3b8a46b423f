"""Budgets: what calls may cost on a GPU, in launches, bytes and waits, counted by CuPy's rules on the host stand-in.

Sizes are those of a GPU where nothing needs to be computed to count; see `tests.cuda_host.prices`.
"""

import numpy as np
import pytest

import slra
from slra._backends import backend_of
from tests.cuda_host import host, prices
from tests.cuda_host.prices import counting, priced, virtual

pytestmark = pytest.mark.skipif(host.why_not() is not None, reason=str(host.why_not()))
MEGABYTE, GIGABYTE = 1e6, 1e9


@pytest.fixture
def cupy_table():
    """The CuPy backend over NumPy's arrays."""
    with host.cupy_on_host() as xp:
        yield backend_of(xp)


def qkv(n_matrices, n_queries, n_keys, d, dtype="float32"):
    return [virtual((n_matrices, n, d), dtype) for n in (n_queries, n_keys, n_keys)]


# The price list itself


def test_what_is_counted(cupy_table):
    xp = cupy_table.xp
    x, row = virtual((4, 1000, 50), "float32"), virtual((50,), "float32")
    with counting(is_dry=True) as bill:
        y = xp.where(x > row, x, xp.zeros_like(x))
    assert bill.launches == 3
    entries = x.size
    # Compared: 4 bytes read, 1 written, and the row; zeros written; three arrays read, one written.
    assert bill.n_bytes == 5 * entries + row.nbytes + 4 * entries + (1 + 4 + 4 + 4) * entries
    assert y.shape == x.shape
    with counting(is_dry=True) as bill:
        xp.matrix_transpose(x)[..., :3] @ x[..., :7]
    assert (bill.operand_copies, bill.pointer_kernels) == (2, 0)
    with counting(is_dry=True) as bill:
        x[:, None] @ virtual((2, 50, 3), "float32")
    assert (bill.operand_copies, bill.pointer_kernels) == (0, 6)
    with counting() as bill:
        assert bool(xp.any(priced(np.eye(3)) > 0))
        float(xp.sum(priced(np.eye(3))))
    assert bill.reads == 2


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        # One block takes 32 of results that lie side by side, or 512 // 50 = 10, of which a power of two.
        ((100_000, 50), (0,), 2),
        ((100_000, 50), (1,), 12_500),
        ((5, 100_000), (1,), 5),
        ((1 << 20,), (0,), 512),
    ],
)
def test_blocks_of_a_reduction(shape, axes, expected):
    """`_get_block_specs` of CuPy's ``_reduction.pyx``, and CUB for all of one contiguous array."""
    assert prices.blocks([np.empty(shape)], axes) == expected


# Attention


def test_decoding_reads_keys_and_values_once(cupy_table):
    q, k, v = qkv(16, 1, 65536, 128)
    with counting(is_dry=True) as bill:
        slra.attention(q, k, v)
    assert bill.launches <= 12
    assert bill.n_bytes <= 1.15 * GIGABYTE
    assert bill.operand_copies == bill.reads == 0
    # 16 rows of scores: one block for each would leave most of the device idle.
    assert bill.fewest_blocks(65536) >= 132


def test_half_precision_is_read_as_it_is(cupy_table):
    q, k, v = qkv(16, 1, 65536, 128, "float16")
    with counting(is_dry=True) as bill:
        slra.attention(q, k, v)
    assert bill.launches <= 12
    assert bill.n_bytes <= 0.58 * GIGABYTE


@pytest.mark.parametrize(
    ("n_matrices", "n_queries", "n_keys"),
    [(2048, 512, 512), (1, 100_000, 30), (1, 30, 100_000), (16, 16384, 16384), (1 << 20, 40, 40)],
)
def test_tiles_are_as_large_as_they_may_be(cupy_table, n_matrices, n_queries, n_keys):
    like = virtual((1,), "float32")
    height, width = cupy_table.tile_shape(n_matrices, (n_queries, n_keys), like)
    assert n_matrices * height * width * 4 <= 1 << 26
    assert 1 <= height <= n_queries
    assert 1 <= width <= n_keys
    whole = n_matrices * n_queries * n_keys * 4
    assert n_matrices * height * width * 4 >= min(whole, 1 << 24)


def test_matrices_beyond_number_are_taken_in_parts(cupy_table):
    """Tiles of all of a million matrices would be a few entries of each, and each would read its keys again."""
    q, k, v = qkv(1 << 20, 40, 40, 16)
    with counting(is_dry=True) as bill:
        out, lse = slra.attention(q, k, v, return_lse=True)
    assert out.shape == q.shape
    assert bill.largest <= max(1 << 26, out.nbytes)
    # Scores are written, and read by two; weights likewise. Outputs are joined.
    scores = 4 * 40 * 40 * (1 << 20)
    assert bill.n_bytes <= 3 * q.nbytes + 5 * scores + 6 * out.nbytes
    with counting(is_dry=True) as bill:
        slra.attention_vjp(q, k, v, out, lse, out)
    assert bill.n_bytes <= 12 * scores + 40 * q.nbytes


VIEWS = {
    "contiguous": lambda x: x,
    "heads after tokens": lambda x: virtual((2, x.shape[-2], 8, x.shape[-1]), x.dtype).swapaxes(
        1, 2
    ),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_copies_no_operand(cupy_table, view, is_causal):
    q, k, v = (VIEWS[view](virtual((2, 8, 2048, 64), "float32")) for _ in range(3))
    with counting(is_dry=True) as bill:
        out, lse = slra.attention(q, k, v, is_causal=is_causal, return_lse=True)
    assert bill.operand_copies == bill.pointer_kernels == bill.names["copy"] == 0
    # Causal attention looks once whether what is hidden has come through.
    assert bill.reads == is_causal
    with counting(is_dry=True) as bill:
        slra.attention_vjp(q, k, v, out, lse, out, is_causal=is_causal)
    assert bill.operand_copies == bill.pointer_kernels == bill.names["copy"] == 0


def test_heads_that_share_keys_are_rows(cupy_table):
    q = virtual((1, 32, 4096, 128), "float32")
    k, v = (virtual((1, 8, 4096, 128), "float32") for _ in range(2))
    with counting(is_dry=True) as shared:
        slra.attention(q, k, v, enable_gqa=True)
        slra.attention_vjp(q, k, v, q, virtual(q.shape[:-1], "float32"), q, enable_gqa=True)
    with counting(is_dry=True) as alone:
        slra.attention(q, q, q)
        slra.attention_vjp(q, q, q, q, virtual(q.shape[:-1], "float32"), q)
    assert shared.pointer_kernels == shared.operand_copies == shared.names["reshape"] == 0
    # Rows of a group are brought together once for each row of tiles, here and in the gradient.
    assert shared.names["copy"] <= 2 * shared.names["slra_softmax_result_float32"]
    assert shared.launches <= alone.launches + shared.names["copy"]
    assert shared.n_bytes <= alone.n_bytes


# Reductions


@pytest.mark.parametrize("axis", [-2, -1, None])
def test_reductions_run_on_the_whole_device(cupy_table, axis):
    x = virtual((1_000_000, 50), "float32")
    calls = [
        lambda: slra.prox.norm_l1(x, axis=axis),
        lambda: cupy_table.column_means(x),
        lambda: cupy_table.pivots(x),
        lambda: cupy_table.max_abs(x),
        lambda: cupy_table.norm_squared(x),
    ]
    if axis is not None:
        calls += [lambda: slra.prox.prox_l21(x, 0.1, axis=axis), lambda: slra.prox.norm_l2(x)]
    for call in calls:
        with counting(is_dry=True) as bill:
            call()
        assert bill.fewest_blocks(x.size) >= 132
        # Nothing as large as x is copied on the way.
        assert bill.names["reshape"] == bill.names["astype"] == 0


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_large_arrays_are_read_as_they_are(cupy_table, dtype):
    x, mean = virtual((1_000_000, 50), dtype), virtual((1, 50), "complex128")
    mean = mean.real if dtype == "float32" else mean
    calls = {
        lambda: cupy_table.norm_squared(x): 1.01,
        lambda: cupy_table.max_abs(x): 1.01,
        lambda: cupy_table.column_means(x): 1.01,
        lambda: cupy_table.pivots(x): 2.1,
        lambda: cupy_table.centered(x, mean): 2.01,
    }
    for call, accesses in calls.items():
        with counting(is_dry=True) as bill:
            call()
        assert bill.n_bytes <= accesses * x.nbytes
    with counting(is_dry=True) as bill:
        cupy_table.gram(x)
    assert bill.largest <= 1 << 27
    with counting(is_dry=True) as bill:
        cupy_table.gram(virtual((512, 2048, 64), dtype))
    assert bill.largest <= 1 << 27
    assert bill.operand_copies == bill.pointer_kernels == 0


# Decompositions


def random(*shape, dtype="float32"):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def test_random_numbers_may_be_drawn_on_the_device(cupy_table):
    import cupy

    x = priced(random(40, 3000))
    for rng, sent in ((0, 1), (cupy.random.default_rng(0), 0)):
        with counting() as bill:
            cupy_table.test_matrix((1000, 8), rng, x)
        assert bill.names["asarray"] == sent
        assert bill.names["standard_normal"] == 1 - sent
        assert bill.launches == 1


@pytest.mark.parametrize("n_matrices", [4, 64])
def test_batches_are_decomposed_together(cupy_table, n_matrices):
    x = priced(random(n_matrices, 48, 40))
    with counting() as bill:
        slra.truncated_svd(x, 8)
        cupy_table.qr(x)
        cupy_table.triangular_factor(x)
    assert bill.solver_calls <= 25
    assert bill.launches <= 300
    with counting() as bill:
        cupy_table.triangular_factor(x[0])
    assert bill.solver_calls == 1


@pytest.mark.parametrize(
    ("shape", "jacobi", "one_by_one"),
    [
        ((64, 48, 48), 1, 0),
        ((2, 20, 20), 1, 0),
        # Jacobi's method takes a block of threads for each: a large matrix would have the device to itself.
        ((1, 48, 48), 0, 1),
        ((1, 1, 20, 20), 0, 1),
        ((2, 100, 100), 0, 2),
        ((48, 48), 0, 1),
    ],
)
def test_eigenvalues_by_what_is_fit(cupy_table, shape, jacobi, one_by_one):
    x = random(*shape)
    g = priced(x @ x.swapaxes(-1, -2))
    for call in (cupy_table.small_eigh, cupy_table.small_eigvalsh):
        with counting() as bill:
            call(g)
        assert bill.names["syevjBatched"] == jacobi
        assert bill.names["Xsyevd"] == one_by_one
        assert bill.reads == jacobi
        assert bill.launches <= 3 * one_by_one + 16 * jacobi + 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tall_matrices_take_products(cupy_table, dtype):
    """QR and SVD of one matrix: of cuSOLVER's, only those of small ones, and no SVD at all."""
    x = priced(random(4000, 40, dtype=dtype))
    with counting() as bill:
        cupy_table.qr(x)
        cupy_table.triangular_factor(x)
    assert bill.names["qr"] == 0
    assert bill.reads <= 8
    with counting() as bill:
        slra.truncated_svd(x, 8)
    assert bill.names["qr"] == bill.names["svd"] == 0
    assert bill.solver_calls <= 20


@pytest.mark.parametrize("n_matrices", [4, 64])
def test_a_batch_is_looked_at_once(cupy_table, n_matrices):
    """Where some elements fail: of a check, to be done again, and of Cholesky's factorisation."""
    x = random(n_matrices, 48, 40)
    x[1, :, 3:] = 0
    with counting() as bill:
        slra.truncated_svd(priced(x), 8)
    assert bill.reads <= 12
    g = np.stack([np.eye(3)] * n_matrices)
    g[::2, 1, 1] = -1
    with counting() as bill:
        factors = cupy_table.cholesky(priced(g))
    assert bill.reads == 0
    np.testing.assert_array_equal(
        np.isnan(factors).any(axis=(1, 2)), np.arange(n_matrices) % 2 == 0
    )


def test_a_tolerance_is_met_in_few_launches(cupy_table):
    x = priced(random(2000, 600))
    with counting() as bill:
        result = slra.randomized_svd(x, rtol=0.5, rng=0)
    assert bill.launches <= 300
    assert bill.reads <= 20
    rest = x - (result.U * result.S) @ result.Vh
    assert np.linalg.norm(rest) <= 0.5 * np.linalg.norm(x)


# Solvers


def test_a_step_of_fista(cupy_table):
    """Beside what the function costs whose values and gradients are taken: that is nothing here."""
    x0 = priced(1 + random(100_000, dtype="float32") ** 2)
    bills = []
    for n_iter in (10, 20):
        with counting() as bill:
            limits = {"max_iter": n_iter, "tol": 0.0, "atol": 0.0}
            slra.proximal_gradient(x0, lambda x: (0.0, x), slra.prox.prox_l1, step=0.01, **limits)
        bills.append(bill)
    launches, n_bytes, reads = (
        (getattr(bills[1], name) - getattr(bills[0], name)) / 10
        for name in ("launches", "n_bytes", "reads")
    )
    assert launches <= 12
    assert n_bytes <= 20.5 * x0.nbytes
    assert reads <= 1
    assert bills[1].fewest_blocks(50_000) >= 40


# Sparse rows


def test_sparse_rows_take_a_kernel_each_way(cupy_table):
    x = priced(random(2000, 128))
    with counting() as bill:
        cupy_table.keep_largest(x, 8)
    assert bill.launches == 1
    with counting() as there:
        values, indices = cupy_table.largest_in_rows(x, 8)
    with counting() as back:
        cupy_table.scatter_rows(values, indices, 128)
    assert there.launches <= 3
    assert back.launches <= 3
    # Read for marks, and with them; zeros written, and entries over them.
    assert there.n_bytes <= 4 * x.nbytes
    assert back.n_bytes <= 2.5 * x.nbytes


@pytest.mark.parametrize(("shape", "most"), [((1, 200_000), 22), ((2000, 1500), 22)])
def test_long_sparse_rows_are_not_sorted(cupy_table, shape, most):
    """Each digit of eight bits is one read, those to write are found by another, and written by a last one."""
    x = priced(random(*shape))
    with counting() as bill:
        cupy_table.largest_in_rows(x, shape[1] // 20)
    assert bill.names["argsort"] == bill.names["sort"] == bill.reads == 0
    assert bill.launches <= most
    assert bill.n_bytes <= 9 * x.nbytes
    # Nothing as large as x is made on the way, and counters of a row take what 256 numbers would.
    assert bill.largest <= max(x.nbytes // 2, shape[0] * 4 * 1024)


def test_a_sparse_matrix_of_cupyx_is_transposed_once():
    from slra._backends.sparse import products_of

    class Rows:
        __module__ = "cupyx.scipy.sparse"
        n_sorted = 0

        def __init__(self, dense, is_sorted):
            self.dense, self.is_sorted = dense, is_sorted

        @property
        def T(self):
            return Rows(self.dense.T, is_sorted=False)

        def tocsr(self):
            Rows.n_sorted += not self.is_sorted
            return Rows(self.dense, is_sorted=True)

        def __matmul__(self, other):
            return self.tocsr().dense @ other

    a = random(7, 5)
    matmat, rmatmat = products_of(Rows(a, is_sorted=True))
    for _ in range(3):
        np.testing.assert_array_equal(rmatmat(a), a.T @ a)
        np.testing.assert_array_equal(matmat(a.T), a @ a.T)
    assert Rows.n_sorted == 1


def test_thresholds_are_looked_at_in_one_pass(cupy_table):
    x, tau = virtual((1_000_000, 50), "float32"), virtual((1_000_000, 50), "float32")
    with counting(is_dry=True) as bill:
        slra.soft_threshold(x, tau)
    assert bill.launches <= 3
    assert bill.n_bytes <= 4.01 * x.nbytes


def test_a_power_of_two_is_one_pass(cupy_table):
    x = virtual((4, 1000, 50), "float32")
    with counting(is_dry=True) as bill:
        cupy_table.power_of_two(x, virtual((4, 1, 1), "float32"))
    assert bill.n_bytes <= 2.01 * x.nbytes


FREQUENCIES = [10000.0 ** (-i / 8) for i in range(8)]
# Launches to append and attend to a token; a table of rotations is sent by two.
TOKENS = {
    "plain": ({}, 8),
    "groups of heads": ({"n_shared": 4}, 8),
    "window and sinks": ({"window": 8, "n_sink": 2}, 15),
    # Two, and a read, to see that nothing came of the keys that some do not see.
    "several tokens": ({"n_tokens": 3}, 12),
    "stored in half precision": ({"dtype": "float16"}, 10),
    # A product for each element of the batch: they share their maps.
    "rotated": ({"rotary": FREQUENCIES}, 14),
    "sequences of different lengths": ({"shorter": 7}, 14),
}


@pytest.mark.parametrize("case", TOKENS)
def test_a_token_in_a_cache(cupy_table, case):
    options, most = TOKENS[case]
    options = dict(options)
    n_shared, m = options.pop("n_shared", 1), options.pop("n_tokens", 1)
    lengths = np.asarray([64, 64 - options.pop("shorter", 0)])
    q = random(2, 4 * n_shared, 64, 16)
    k, v = random(2, 2, 4, 64, 16)
    basis = slra.fit_attention(q, k, v, 8, rng=0, enable_gqa=True, pool_batch=True)
    q, k, v = map(priced, (q, k, v))
    with counting():
        # Buffers are priced too.
        cache = slra.KVCache(basis, batch=(2,), **options).append(k, v, lengths=lengths)
        cache.append(k[..., :m, :], v[..., :m, :])
    with counting() as bill:
        cache.append(k[..., :m, :], v[..., :m, :])
        cache.attend(q[..., :m, :])
    assert bill.launches <= most
    assert bill.operand_copies == bill.pointer_kernels == 0
    assert bill.reads == (m > 1)


@pytest.mark.parametrize(("options", "most"), [({}, 62), ({"bits": 4}, 85)])
def test_a_token_that_chooses(cupy_table, options, most):
    """Nothing is brought to the host: what is chosen is gathered and decoded where it is."""
    q, k, v = random(3, 4, 400, 16)
    basis = slra.fit_attention(q, k, v, 16, rng=0)
    q, k, v = map(priced, (q, k, v))
    with counting():
        cache = slra.KVCache(basis, n_top=8, **options).append(k, v)
    with counting() as bill:
        cache.attend(q[:, :1])
    assert bill.launches <= most
    assert bill.pointer_kernels == bill.reads == 0


def test_a_long_cache_is_read_once(cupy_table):
    small = random(3, 16, 200, 128)
    basis = slra.fit_attention(*small, 64, rng=0)
    k, token = virtual((16, 65535, 128), "float32"), virtual((16, 1, 128), "float32")
    with counting(is_dry=True):
        cache = slra.KVCache(basis, capacity=65536).append(k, k)
    with counting(is_dry=True) as bill:
        cache.append(token, token)
        cache.attend(token)
    assert bill.launches <= 10
    # Keys, values, and scores three times.
    assert bill.n_bytes <= 1.05 * 4 * 16 * 65536 * (2 * 64 + 5)
    assert bill.fewest_blocks(65536) >= 132


def test_parts_are_merged_by_a_kernel_each(cupy_table):
    outs, lses = [virtual((2, 8, 3, 64), "float32")] * 3, [virtual((2, 8, 3), "float32")] * 3
    with counting(is_dry=True) as bill:
        slra.merge_attention(outs, lses)
    assert bill.launches <= 2
