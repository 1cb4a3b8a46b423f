"""Overrides of the linear-algebra primitives against the reference in the array API."""

from concurrent.futures import ThreadPoolExecutor

import array_api_compat as compat
import numpy as np
import pytest

from slra._backends import Backend, backend_of
from slra._backends.cholesky_qr import tall_qr
from tests.backends import to_numpy, to_xp

SHAPES = [(700, 40), (3, 9000, 40), (5, 700, 40), (1, 1)]


def arrays(xp, shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        a = a + 1j * rng.standard_normal(shape)
    a = a.astype(dtype)
    return a, to_xp(xp, a)


@pytest.mark.parametrize("dtype", ["float32", "complex64", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram(xp, shape, dtype):
    backend = backend_of(xp)
    a, x = arrays(xp, shape, dtype)
    b, y = arrays(xp, shape, dtype, seed=1)
    wide_a, wide_b = (z.astype(np.result_type(dtype, "float64")) for z in (a, b))
    for found, reference in (
        (backend.gram(x), np.conj(wide_a).swapaxes(-1, -2) @ wide_a),
        (backend.gram(x, y), np.conj(wide_a).swapaxes(-1, -2) @ wide_b),
    ):
        found = to_numpy(found)
        assert found.dtype == wide_a.dtype
        # Accumulated in double precision, whatever came.
        np.testing.assert_allclose(found, reference, atol=1e-13 * shape[-2] * 40)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_sizes(xp, dtype):
    backend, reference = backend_of(xp), Backend(xp)
    a, x = arrays(xp, (3, 50, 40), dtype)
    parts = np.maximum(np.abs(a.real), np.abs(a.imag)).max(axis=(-2, -1))
    for one in (backend, reference):
        np.testing.assert_array_equal(to_numpy(one.max_abs(x)), parts)
        np.testing.assert_allclose(
            to_numpy(one.norm_squared(x)), np.sum(np.abs(a.astype("complex128")) ** 2, axis=(1, 2))
        )
        np.testing.assert_allclose(
            to_numpy(one.adjoint_product(x, x)),
            np.conj(a).swapaxes(-1, -2) @ a,
            rtol=1e-3,
            atol=1e-4,
        )


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_pivots_are_the_first_of_those_that_tie(xp, dtype):
    backend, reference = backend_of(xp), Backend(xp)
    a, _ = arrays(xp, (9000, 40), dtype)
    a[4000:] *= 0.1
    # Ties to rounding: the later one is larger, and in another slab; the last column is zero.
    places = np.arange(40) * 90 + 7
    a[places, np.arange(40)] = 10 * (1 - np.finfo(dtype).eps)
    a[places + 5000, np.arange(40)] = -10
    a[:, -1] = 0
    expected = np.append(a[places, np.arange(40)][:-1], 0)
    for one in (backend, reference):
        np.testing.assert_array_equal(to_numpy(one.pivots(to_xp(xp, a))), expected)


CHUNKS = {"rows": (100, 40), "both": (100, 15), "columns": (300, 20)}


def orthonormal(z):
    return np.linalg.qr(z.astype(np.result_type(z, "float64")))[0]


# Squares of the scaled ones are out of range.
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_products_of_a_large_matrix(xp, scale, chunks, dtype):
    a, _ = arrays(xp, (300, 40), dtype)
    v, _ = arrays(xp, (40, 6), dtype, seed=1)
    a = (a * scale).astype(dtype)
    x, y = to_xp(xp, a, chunks=CHUNKS[chunks]), to_xp(xp, v)
    expected = a.astype("complex128") @ v
    # Each entry is a sum of 40 products of size about one.
    atol = 40 * 10 * np.finfo(dtype).eps * scale
    spans = []
    for backend in (backend_of(xp), Backend(xp)):
        image, block = (to_numpy(z) for z in backend.normal_product(x, y))
        assert image.dtype == block.dtype == dtype
        np.testing.assert_allclose(image, expected, atol=atol)
        np.testing.assert_allclose(to_numpy(backend.product(x, y)), expected, atol=atol)
        spans.append(orthonormal(block))
    ours, reference = spans
    # The condition numbers of a Gaussian matrix of this shape, and of what it makes of v, are below 10.
    apart = ours - reference @ (np.conj(reference).T @ ours)
    assert np.max(np.abs(apart)) <= 1000 * np.finfo(dtype).eps
    span = orthonormal(np.conj(a / scale).T @ (expected / scale))
    assert np.max(np.abs(ours - span @ (np.conj(span).T @ ours))) <= 1000 * np.finfo(dtype).eps


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("dtype", ["float64", "complex64"])
def test_triangular_factor(xp, chunks, dtype):
    a, _ = arrays(xp, (300, 40), dtype)
    for backend in (backend_of(xp), Backend(xp)):
        R = to_numpy(backend.triangular_factor(to_xp(xp, a, chunks=CHUNKS[chunks])))
        assert R.shape == (40, 40)
        assert np.all(np.tril(R, -1) == 0)
        error = np.conj(R).T @ R - np.conj(a).T @ a
        assert np.linalg.norm(error) <= 100 * np.finfo(dtype).eps * np.linalg.norm(a) ** 2


def test_centered(xp):
    for dtype, size in (("float64", 1e-14), ("float32", 1e-6)):
        a, _ = arrays(xp, (300, 40), dtype)
        a = a + np.asarray(1000, dtype=dtype)
        x, wide = to_xp(xp, a), a.astype("float64")
        for backend in (backend_of(xp), Backend(xp)):
            mean = backend.column_means(x)
            np.testing.assert_allclose(to_numpy(mean)[0], wide.mean(axis=0), rtol=1e-14)
            found = to_numpy(backend.centered(x, mean))
            assert found.dtype == a.dtype
            np.testing.assert_allclose(found, wide - wide.mean(axis=0), atol=30 * size)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_largest_modulus_shows_what_is_not_finite(xp, value):
    a = np.zeros((20, 10))
    a[7, 3] = value
    assert not np.isfinite(to_numpy(backend_of(xp).max_abs(to_xp(xp, a))))


@pytest.mark.eager_only("Cholesky-QR is for eager arrays; lazily it is QR")
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_tall_qr(xp, dtype):
    eps = np.finfo(dtype).eps
    a, _ = arrays(xp, (4, 300, 12), dtype)
    a[1, :, 3] = a[1, :, 2]
    a[2, :, 5] = 0
    a[3] *= 10.0 ** -np.arange(12)
    Q, R = (to_numpy(x) for x in tall_qr(to_xp(xp, a), backend_of(xp)))
    gram = np.conj(Q).swapaxes(-1, -2) @ Q
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(12), gram.shape), atol=50 * eps)
    size = np.linalg.norm(a, axis=(-2, -1))[:, None, None]
    assert np.all(np.abs(Q @ R - a) <= 50 * eps * size)


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_lower_cholesky_factor_and_its_inverse(xp, batch):
    a, _ = arrays(xp, (*batch, 5, 5), "complex128")
    g = a @ np.conj(a).swapaxes(-1, -2) + np.eye(5)
    expected, eye = np.linalg.cholesky(g), np.eye(5) + 0 * g
    # Dask's own factor is the upper one, and of one matrix.
    reference = [] if compat.is_dask_namespace(xp) else [Backend(xp)]
    for backend in (backend_of(xp), *reference):
        L = backend.cholesky(to_xp(xp, g))
        inverse = to_numpy(backend.small_inverse(L))
        np.testing.assert_allclose(to_numpy(L), expected, atol=1e-13)
        np.testing.assert_allclose(inverse @ expected, eye, atol=1e-13)


@pytest.mark.eager_only("not called on lazy arrays")
def test_cholesky_marks_what_has_none(xp):
    g = np.stack([np.eye(3), -np.eye(3), 4 * np.eye(3)])
    L = to_numpy(backend_of(xp).cholesky(to_xp(xp, g)))
    np.testing.assert_array_equal(L[[0, 2]], np.stack([np.eye(3), 2 * np.eye(3)]))
    assert np.all(np.isnan(np.diagonal(L[1])))


@pytest.mark.parametrize("batch", [(), (7,)], ids=str)
def test_small_eigh(xp, batch):
    a, _ = arrays(xp, (*batch, 9, 9), "complex128")
    g = a @ np.conj(a).swapaxes(-1, -2)
    w, v = (to_numpy(x) for x in backend_of(xp).small_eigh(to_xp(xp, g)))
    np.testing.assert_allclose(w, np.linalg.eigvalsh(g), atol=1e-11)
    np.testing.assert_allclose((v * w[..., None, :]) @ np.conj(v).swapaxes(-1, -2), g, atol=1e-11)


def test_a_long_batch_is_split_over_threads_on_torch(monkeypatch):
    torch = pytest.importorskip("torch")
    from slra._backends import torch as backend

    started = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, n):
            started.append(n)
            super().__init__(n)

    monkeypatch.setattr(backend, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    a, _ = arrays(np, (backend.WORTH_THREADS, 9, 9), "complex128")
    g = a @ np.conj(a).swapaxes(-1, -2)
    x = torch.asarray(g)
    w, v = (to_numpy(y) for y in backend_of(compat.array_namespace(x)).small_eigh(x))
    assert started == [2]
    np.testing.assert_allclose(w, np.linalg.eigvalsh(g), atol=1e-11)
    np.testing.assert_allclose((v * w[..., None, :]) @ np.conj(v).swapaxes(-1, -2), g, atol=1e-11)
