"""Dask on processes of its own: a matrix larger than a worker's memory, no spilling, a worker killed on the way."""

import sys

import numpy as np
import pytest

import slra
from benchmarks.cosine_matrix import count, lazily, optimal_error, singular_values
from benchmarks.worker_memory import peak_bytes, spilled_bytes

distributed = pytest.importorskip("distributed")
zarr = pytest.importorskip("zarr")
da = pytest.importorskip("dask.array")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")

SHAPE, CHUNKS, RANK, LIMIT = (70_000, 1000), (2000, 1000), 10, 256 * 2**20
EPS = float(np.finfo("float32").eps)


@pytest.fixture(scope="module")
def client():
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=LIMIT, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def check(client, nbytes, result):
    """Nothing is spilled for the result, and its error is near the best there is."""
    U, S, Vh = client.persist(list(result))
    distributed.wait([U, S, Vh])
    assert nbytes > LIMIT > max(client.run(peak_bytes).values())
    assert set(client.run(spilled_bytes).values()) == {0}
    residual = (lazily(SHAPE, CHUNKS) - (U * S) @ Vh).astype("float64")
    error, gram, S = client.gather(client.compute([da.linalg.norm(residual), U.T @ U, S]))
    assert error <= 1.01 * optimal_error(SHAPE[1], RANK)
    np.testing.assert_allclose(S, singular_values(SHAPE[1])[:RANK], rtol=1e-3)
    np.testing.assert_allclose(gram, np.eye(RANK), atol=50 * EPS * np.sqrt(RANK))


def test_matrix_larger_than_a_workers_memory(client, tmp_path):
    log = tmp_path / "log"
    x = lazily(SHAPE, CHUNKS, log)
    result = slra.randomized_svd(x, RANK, rng=0)
    assert count(log) == 0
    check(client, x.nbytes, result)
    # Four passes: three of both products, and the last image.
    assert count(log) / x.npartitions == 4


def test_from_zarr_in_chunks_along_both_axes(client, tmp_path):
    chunks = (2000, 500)
    lazily(SHAPE, CHUNKS).rechunk(chunks).to_zarr(tmp_path / "x.zarr", compressors=None)
    x = da.from_zarr(tmp_path / "x.zarr")
    assert x.chunksize == chunks
    check(client, x.nbytes, slra.randomized_svd(x, RANK, rng=0))


def test_a_worker_is_killed_in_mid_run(client, tmp_path):
    log = tmp_path / "log"
    # In the middle of the second pass.
    x = lazily(SHAPE, CHUNKS, log, kill_at=3 * (SHAPE[0] // CHUNKS[0]) // 2)
    U, S, Vh = client.gather(client.compute(list(slra.randomized_svd(x, RANK, rng=0))))
    assert count(log) > 4 * x.npartitions  # what the worker held was made again
    np.testing.assert_allclose(S, singular_values(SHAPE[1])[:RANK], rtol=1e-3)
    for Q in (U, Vh.T):
        np.testing.assert_allclose(Q.T @ Q, np.eye(RANK), atol=50 * EPS * np.sqrt(RANK))


def everything(x, q):
    return {
        "truncated_svd": slra.truncated_svd(x, 5).S,
        "prox_nuclear": slra.prox.prox_nuclear(x, 0.5),
        "prox_l1": slra.prox.prox_l1(x, 0.5),
        "project_rank": slra.prox.project_rank(x, 3),
        "attention": slra.attention(q, q, q, is_causal=True),
    }


def test_everything_lazy_on_the_cluster(client):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 40)) * 0.8 ** np.arange(40)
    q = rng.standard_normal((4, 2, 60, 8))
    lazy = everything(da.from_array(x, chunks=(50, 20)), da.from_array(q, chunks=(2, 1, 30, 8)))
    found = client.gather(client.compute(lazy))
    for name, expected in everything(x, q).items():
        np.testing.assert_allclose(found[name], expected, atol=1e-11, err_msg=name)
