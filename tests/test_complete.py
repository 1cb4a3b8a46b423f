"""Matrices with gaps, completed: against what was left out, and against least squares with one factor known."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.sparse.linalg import aslinearoperator

import slra
from tests.backends import to_numpy, to_xp

pytestmark = pytest.mark.eager_only(
    "iterates until the matrix stands still (of a Dask matrix some rows are read)"
)


def with_gaps(m=60, n=40, rank=3, noise=0.0, gaps=0.3, dtype="float64", seed=0, lead=()):
    """A matrix of low rank, the same with noise and NaN, and where these are."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        x = rng.standard_normal(shape)
        return x + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else x

    exact = normal(*lead, m, rank) @ normal(*lead, rank, n)
    hidden = rng.random(exact.shape) < gaps
    x = (exact + noise * normal(*exact.shape)).astype(dtype)
    return exact, np.where(hidden, np.nan, x).astype(dtype), hidden


def error(found, exact, where):
    return np.linalg.norm((to_numpy(found) - exact)[where]) / np.linalg.norm(exact[where])


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_exact_low_rank_comes_back(xp, dtype):
    exact, x, hidden = with_gaps(dtype=dtype)
    result = slra.complete(to_xp(xp, x), 3, tol=1e-6, rng=0)
    assert result.converged
    assert result.rank == 3
    assert to_numpy(result.left).dtype == dtype
    assert error(result.to_dense(), exact, hidden) < 1e-4
    assert result.error < 1e-3
    # Factors as of a singular value decomposition.
    left, right = to_numpy(result.left), to_numpy(result.right)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(right @ right.conj().T, np.eye(3), atol=100 * eps)
    gram = left.conj().T @ left
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=100 * eps * np.abs(gram).max())
    filled = to_numpy(result.fill(to_xp(xp, x)))
    np.testing.assert_array_equal(filled[~hidden], x[~hidden])
    np.testing.assert_array_equal(filled[hidden], to_numpy(result.to_dense())[hidden])
    # A mask says the same as NaN, whatever stands in the gaps.
    junk = np.where(hidden, 1e9, x).astype(dtype)
    same = slra.complete(to_xp(xp, junk), 3, mask=to_xp(xp, ~hidden), tol=1e-6, rng=0)
    np.testing.assert_array_equal(to_numpy(same.to_dense()), to_numpy(result.to_dense()))


def oracle(x, exact, rank):
    """Least squares for each row where the row space is known: no method that does not know it does better."""
    rows = np.linalg.svd(exact)[2][:rank]
    seen = ~np.isnan(x)
    pairs = zip(x, seen, strict=True)
    return np.stack([np.linalg.lstsq(rows[:, at].T, row[at])[0] for row, at in pairs]) @ rows


@pytest.mark.parametrize(("m", "n", "gaps"), [(300, 60, 0.2), (400, 200, 0.8)])
def test_noise_costs_little_more_than_where_one_factor_is_known(m, n, gaps):
    exact, x, hidden = with_gaps(m, n, 5, noise=0.5, gaps=gaps)
    result = slra.complete(x, rng=0)
    best = error(oracle(x, exact, 5), exact, hidden)
    found = error(result.to_dense(), exact, hidden)
    assert result.rank == 5
    # As many unknowns again are in the columns, n to m of them.
    assert found < best * np.sqrt(1 + 2 * n / m)
    # What is predicted is the error with the noise of the entries that were held out.
    with_noise = np.hypot(found * np.std(exact), 0.5) / np.hypot(np.std(exact), 0.5)
    assert abs(result.error / with_noise - 1) < 0.1


def test_too_large_a_rank_does_little_harm():
    exact, x, hidden = with_gaps(300, 100, 4, noise=0.5, gaps=0.7)
    right, wide = (slra.complete(x, rank, rng=0) for rank in (4, 30))
    assert wide.rank == 30
    worse = error(wide.to_dense(), exact, hidden) / error(right.to_dense(), exact, hidden)
    assert worse < 1.3


def test_rank_by_tolerance():
    rng = np.random.default_rng(0)
    scales = 2.0 ** -np.arange(8)
    exact = (rng.standard_normal((400, 8)) * scales) @ rng.standard_normal((8, 50))
    x = np.where(rng.random(exact.shape) < 0.2, np.nan, exact)
    for rtol in (0.35, 0.09):
        result = slra.complete(x, rtol=rtol, rng=0)
        # Half of what is left is in the next component.
        assert result.error <= rtol
        assert result.rank == next(
            k for k in range(9) if np.linalg.norm(scales[k:]) <= rtol * np.linalg.norm(scales)
        )
    assert slra.complete(x, 2, rtol=0.09, rng=0).rank == 2


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.coo_array, sp.csc_array])
def test_sparse_entries_are_the_observed_ones(form):
    _, x, hidden = with_gaps(200, 80, 3, noise=0.1, gaps=0.8)
    x[~hidden] += 2.0
    x[3, ~hidden[3]] = 0.0  # explicit zeros are observed
    rows, columns = np.nonzero(~hidden)
    sparse = form(sp.coo_matrix((x[rows, columns], (rows, columns)), shape=x.shape))
    for center in (False, True):
        dense = slra.complete(x, 4, center=center, tol=1e-6, rng=0)
        found = slra.complete(sparse, 4, center=center, tol=1e-6, rng=0)
        # Other entries were held out, from which the last fit starts; it ends where it ends.
        apart = np.linalg.norm(found.to_dense() - dense.to_dense())
        assert apart < 2e-3 * np.linalg.norm(dense.to_dense())
        np.testing.assert_allclose(found.at(rows, columns), found.to_dense()[rows, columns])
    assert slra.complete(sparse, rng=0).rank <= 8


def test_means_of_columns(xp):
    exact, x, hidden = with_gaps(100, 30, 2, noise=0.01)
    means = np.linspace(-500, 1000, 30)
    result = slra.complete(to_xp(xp, x + means), 2, center=True, rng=0)
    np.testing.assert_allclose(to_numpy(result.mean)[0], means, atol=0.5)
    whole = to_numpy(result.to_dense())
    assert np.linalg.norm((whole - exact - means)[hidden]) < 0.02 * np.linalg.norm(exact[hidden])


def test_outliers():
    exact, x, hidden = with_gaps(200, 60, 3, noise=0.05)
    hit = np.random.default_rng(1).random(x.shape) < 0.05
    spoilt = np.where(hit, x + 30, x)
    robust = slra.complete(spoilt, 3, l1=0.2, rng=0)
    assert error(robust.to_dense(), exact, hidden) < 0.05
    assert error(slra.complete(spoilt, 3, rng=0).to_dense(), exact, hidden) > 0.3


def test_batches(xp):
    exact, x, hidden = with_gaps(50, 30, 2, noise=0.01, lead=(2, 3))
    result = slra.complete(to_xp(xp, x), 2, rng=0)
    assert result.left.shape == (2, 3, 50, 2)
    whole = to_numpy(result.to_dense())
    for i in np.ndindex(2, 3):
        assert error(whole[i], exact[i], hidden[i]) < 0.02
        alone = slra.complete(x[i], 2, rng=0).to_dense()
        np.testing.assert_allclose(whole[i], alone, atol=5e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale(scale):
    _, x, _ = with_gaps(noise=0.01, dtype="float32")
    result = slra.complete(x * np.float32(scale), 3, rng=0)
    one = slra.complete(x, 3, rng=0).to_dense()
    np.testing.assert_allclose(result.to_dense() / np.float32(scale), one, atol=1e-4)


def test_rows_and_columns_without_entries():
    _, x, _ = with_gaps(noise=0.1)
    x[4], x[:, 7] = np.nan, np.nan
    result = slra.complete(x + 10, 3, center=True, rng=0)
    whole = result.to_dense()
    assert np.isfinite(whole).all()
    # Nothing is known of them but the mean of a column, and not even that.
    np.testing.assert_allclose(whole[4], result.mean[0], atol=1e-6)
    np.testing.assert_allclose(whole[:, 7], 0, atol=1e-6)
    assert not slra.complete(np.zeros((5, 4)), 1, rng=0).to_dense().any()


def test_half_precision_and_nothing_written(xp):
    _, x, hidden = with_gaps(noise=0.01, dtype="float32")
    before = x.copy()
    result = slra.complete(to_xp(xp, x), 3, max_iter=1, tol=1e-5, rng=0)
    np.testing.assert_array_equal(x, before)
    assert result.n_iter == 1
    assert not result.converged
    half = slra.complete(x.astype("float16"), 3, rng=0)
    assert half.left.dtype == "float16"
    assert error(half.to_dense(), x.astype("float64"), ~hidden) < 0.02


@pytest.mark.parametrize(
    ("change", "options", "kind", "said"),
    [
        (lambda x: x * np.nan, {}, ValueError, "x must be observed somewhere"),
        (lambda x: np.where(np.isnan(x), np.inf, x), {}, ValueError, "x must be finite"),
        (lambda x: np.nan_to_num(x).astype(int), {}, TypeError, "x must have a floating dtype"),
        (lambda x: x[0], {}, ValueError, "x must have at least 2 dimensions"),
        (lambda x: x, {"rank": 41}, ValueError, "rank must be between 1 and 40"),
        (lambda x: x, {"mask": np.ones((60, 40))}, TypeError, "mask must be boolean"),
        (lambda x: x, {"mask": np.ones((40, 60), bool)}, ValueError, "mask must broadcast"),
        (lambda x: x, {"mask": np.zeros((60, 1), bool)}, ValueError, "x must be observed"),
        (lambda x: x, {"mask": np.ones((60, 1), bool)}, ValueError, "x must be finite"),
        (lambda x: x, {"l1": -1.0}, ValueError, "l1 must be"),
        (lambda x: x, {"max_iter": 0}, ValueError, "max_iter must be 1 or more"),
        (lambda x: x[:2, :2], {}, ValueError, "rank must be given where so few"),
        (sp.csr_matrix, {"mask": np.ones((60, 40), bool)}, ValueError, "mask must be None"),
        (lambda x: sp.csr_matrix((4, 5)), {}, ValueError, "x must have a stored entry"),
        (lambda x: aslinearoperator(np.nan_to_num(x)), {}, TypeError, "whose entries are known"),
    ],
)
def test_refusals(change, options, kind, said):
    _, x, _ = with_gaps(gaps=0.01)
    x[:2, :2] = 1.0
    with pytest.raises(kind, match=said):
        slra.complete(change(x), rng=0, **options)


def test_tall_dask_matrix():
    """Columns from some of the rows, the other rows block by block: as well as where one factor is known."""
    da = pytest.importorskip("dask.array")
    exact, x, hidden = with_gaps(5000, 30, 3, noise=0.3, gaps=0.3)
    means = np.linspace(-50, 100, 30)
    exact, x = exact + means, x + means
    lazy = da.from_array(x, chunks=(700, 20))
    read = []

    def spy(block, at):
        read.extend(at)
        return block

    result = slra.complete(
        lazy.map_blocks(spy, at=[0], dtype=x.dtype, meta=x[:0]), center=True, rng=0
    )
    assert len(read) == lazy.npartitions
    assert result.rank == 3
    assert result.left.chunks == ((700,) * 7 + (100,), (3,))
    filled = result.fill(lazy).compute(scheduler="synchronous")
    np.testing.assert_array_equal(filled[~hidden], x[~hidden])
    best = error(oracle(x - means, exact - means, 3) + means, exact, hidden)
    # The columns come from 1000 rows, which have 700 entries for each of the numbers that are sought.
    assert error(filled, exact, hidden) < 1.1 * best
    whole = slra.complete(x, center=True, rng=0)
    # By the same seed the rank is chosen, and the error told, by the same entries; loosely, to a hundredth.
    np.testing.assert_allclose(result.error, whole.error, rtol=0.01)


@pytest.mark.parametrize("dtype", ["float16", "complex64"])
def test_dask_matrix_that_is_read_whole(dtype):
    da = pytest.importorskip("dask.array")
    _, x, hidden = with_gaps(
        200, 20, 2, noise=0.1, dtype="complex64" if dtype[0] == "c" else "float32"
    )
    x = x.astype(dtype)
    x[np.random.default_rng(1).random(x.shape) < 0.05] += 30
    options = {"l1": 0.3, "tol": 1e-5, "rng": 0}
    # A mask, and anything in the gaps.
    lazy = da.from_array(np.where(hidden, 5, x).astype(dtype), chunks=(60, -1))
    result = slra.complete(lazy, 2, mask=da.from_array(~hidden), **options)
    alone = slra.complete(x, 2, **options)
    assert result.left.dtype == result.right.dtype == dtype
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(
        result.to_dense().compute(),
        alone.to_dense(),
        atol=max(4 * eps, 1e-4) * np.nanmax(np.abs(x)),
    )


def test_lazy_arrays_that_are_refused():
    da = pytest.importorskip("dask.array")
    with pytest.raises(ValueError, match="x must be one matrix where it is lazy"):
        slra.complete(da.ones((2, 4, 4)), 1)
    x = np.ones((3000, 4))
    at = slra.complete(da.from_array(x, chunks=500), 1, rng=0)
    x[np.flatnonzero(np.random.default_rng(0).random(3000) < 0.5)[0]] = np.inf
    with pytest.raises(ValueError, match="x must be finite"):
        slra.complete(da.from_array(x, chunks=500), 1, rng=0).left.compute()
    assert at.left.shape == (3000, 1)
