"""Compiled, mapped and chunked: nothing may depend on values, and nothing is computed early."""

import numpy as np
import pytest

import slra
from benchmarks.cosine_matrix import count, lazily
from tests.backends import to_numpy
from tests.matrices import check, make, reference_error

OMEGA = np.random.default_rng(0).standard_normal((90, 11))


@pytest.fixture
def a():
    return make("exponential", (120, 90), "float64")


def test_jit_of_vmap():
    jax = pytest.importorskip("jax")
    a = make("exponential", (2, 120, 90), "float64")
    run = jax.jit(
        jax.vmap(lambda x, o: slra.randomized_svd(x, 4, test_matrix=o), in_axes=(0, None))
    )
    check(a, 4, run(jax.numpy.asarray(a), jax.numpy.asarray(OMEGA)), 1.01, reference_error(a, 4, 3))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo warns of every lru_cache that it meets.
@pytest.mark.parametrize("method", ["krylov", "subspace"])
def test_torch_compile_in_one_graph(a, method):
    torch = pytest.importorskip("torch")

    def run(x, o):
        return slra.randomized_svd(x, 4, test_matrix=o, method=method)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    result = compiled(torch.from_numpy(a), torch.from_numpy(OMEGA))
    check(a, 4, result, 1.01, reference_error(a, 4, 3))


def test_torch_vmap():
    torch = pytest.importorskip("torch")
    a = make("exponential", (2, 120, 90), "float64")
    omega = torch.from_numpy(OMEGA)
    result = torch.vmap(lambda x: slra.randomized_svd(x, 4, test_matrix=omega))(torch.from_numpy(a))
    check(a, 4, result, 1.01, reference_error(a, 4, 3))


@pytest.mark.parametrize("chunks", [(40, 90), (120, 30), (50, 40)], ids=["rows", "columns", "both"])
@pytest.mark.parametrize("method", ["krylov", "subspace", "gram"])
@pytest.mark.parametrize("transposed", [False, True])
def test_dask_stays_lazy(a, chunks, method, transposed):
    dask = pytest.importorskip("dask")
    da = pytest.importorskip("dask.array")
    x = da.from_array(a, chunks=chunks)
    x, a = (x.T, a.T) if transposed else (x, a)

    def never(*args, **kwargs):
        raise AssertionError("computed")

    with dask.config.set(scheduler=never):
        result = slra.randomized_svd(x, 4, n_oversamples=4, method=method, rng=0)
    with dask.config.set(scheduler="synchronous"):
        result = [to_numpy(x) for x in result]
    check(a, 4, result, 1.01, reference_error(a, 4, 3, 4))
    # The draw does not depend on the chunks.
    depth = 4 if method == "subspace" else 3
    plain = slra.randomized_svd(a, 4, n_oversamples=4, n_iter=depth, method=method, rng=0)
    np.testing.assert_allclose(result[1], plain.S, atol=1e-12)


def test_deferred_zero_matrix_has_orthonormal_vectors():
    jax = pytest.importorskip("jax")
    run = jax.jit(lambda x: slra.randomized_svd(x, 4, rng=0))
    check(np.zeros((120, 90)), 4, run(jax.numpy.zeros((120, 90))))


def run(name, x):
    if name == "wide":
        return slra.randomized_svd(x.T, 5, method="krylov", rng=0)
    if name == "centred":
        return slra.randomized_svd(x, 5, method="krylov", center=True, rng=0)
    if name == "centred beforehand":
        return slra.randomized_svd(x - x.mean(axis=0), 5, method="krylov", rng=0)
    if name == "truncated":
        return slra.truncated_svd(x, 5)
    if name == "prox_nuclear":
        return [slra.prox.prox_nuclear(x, 0.1)]
    if name == "project_rank":
        return [slra.prox.project_rank(x, 3)]
    return slra.randomized_svd(x, 5, method=name, rng=0)


PASSES = {
    "krylov": 4,
    "wide": 5,
    "centred": 5,
    "centred beforehand": 5,
    "subspace": 6,
    "gram": 2,
    "truncated": 2,
    "prox_nuclear": 2,
    "project_rank": 2,
}


@pytest.mark.parametrize("columns", [60, 15], ids=["rows", "both axes"])
@pytest.mark.parametrize("name", PASSES)
def test_passes_over_a_dask_array(name, columns, tmp_path):
    dask = pytest.importorskip("dask")
    x = lazily((600, 60), (100, columns), tmp_path / "log")
    with dask.config.set(scheduler="synchronous"):
        dask.compute(*run(name, x))
    assert count(tmp_path / "log") / x.npartitions == PASSES[name]


def test_long_rows_of_chunks_are_not_held_together(tmp_path):
    dask = pytest.importorskip("dask")
    x = lazily((600, 60), (100, 15), tmp_path / "log")
    # Twice this is less than the 24 kB of a row of chunks.
    with dask.config.set({"scheduler": "synchronous", "array.chunk-size": "10kB"}):
        U, S, Vh = dask.compute(*run("krylov", x))
    assert count(tmp_path / "log") / x.npartitions == 7
    a = np.asarray(lazily((600, 60), (600, 60)))
    check(a, 5, (U, S, Vh), 1.01, reference_error(a, 5, 3, 8))


def test_pages_in_memory_are_used_as_they_are():
    dask = pytest.importorskip("dask")
    with dask.config.set(scheduler="synchronous"):
        x = lazily((600, 60), (100, 60)).persist()
        result = dask.compute(*run("krylov", x))
        a = np.asarray(x)
    check(a, 5, result, 1.01, reference_error(a, 5, 3, 8))


def test_the_graph_of_a_loop_grows_linearly():
    da = pytest.importorskip("dask.array")
    x = da.from_array(np.random.default_rng(0).standard_normal((60, 20)), chunks=(20, 20))

    def step(x):
        return x + slra.prox.prox_nuclear(x, 0.5)

    sizes, y = [], x
    for _ in range(6):
        y = step(y)
        sizes.append(len(y.dask.layers))
    steps = np.diff(sizes)
    assert np.all(steps[2:] == steps[1])


REFUSALS = {
    "rtol must be None": lambda x: slra.randomized_svd(x, rtol=0.1),
    "rtol must be None where": lambda x: slra.truncated_svd(x, rtol=0.1),
    "rank must be given instead": lambda x: slra.fit_attention(x[None], x[None], x[None], rtol=0.1),
    "robust_pca iterates": lambda x: slra.robust_pca(x),
    "sparse_low_rank iterates": lambda x: slra.sparse_low_rank(x, 2, 0.1),
    "unknown shape": lambda x: slra.randomized_svd(x[x[:, 0] > 0], 2),
    "one array library": lambda x: slra.randomized_svd(x, 2, test_matrix=np.ones((60, 10))),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_dask_arrays_are_refused_for(message, tmp_path):
    pytest.importorskip("dask")
    x = lazily((600, 60), (100, 60), tmp_path / "log")
    with pytest.raises((TypeError, ValueError), match=message):
        REFUSALS[message](x)
    assert count(tmp_path / "log") == 0


def test_nan_shows_when_the_graph_runs():
    da = pytest.importorskip("dask.array")
    x = da.full((600, 60), np.nan, chunks=(100, 60))
    S = slra.randomized_svd(x, 2, method="krylov", rng=0).S
    with pytest.raises(np.linalg.LinAlgError, match="did not converge"):
        S.compute(scheduler="synchronous")
