"""Every primitive of every library against NumPy, and overrides against the reference they replace."""

import contextlib

import array_api_compat as compat
import numpy as np
import pytest

from slra._backends import Backend, backend_of
from slra._backends.gaussian import TEST_MATRIX_ROWS
from slra._backends.standard import ScoreOptions, matrix_h
from tests.backends import to_numpy, to_xp

EPS = np.finfo("float64").eps
DTYPES = ["float64", "complex128"]


def random(shape, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal(shape)
    return a + 1j * rng.standard_normal(shape) if dtype == "complex128" else a


def hermitian(a):
    return a @ np.conj(a).swapaxes(-1, -2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_qr(xp, batch, dtype):
    a = random((*batch, 9, 4), dtype)
    q, r = map(to_numpy, backend_of(xp).qr(to_xp(xp, a)))
    np.testing.assert_allclose(q @ r, a, atol=50 * EPS)
    gram = np.conj(q).swapaxes(-1, -2) @ q
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(4), gram.shape), atol=50 * EPS)
    assert np.all(np.tril(r, -1) == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_small_svd(xp, batch, dtype):
    a = random((*batch, 5, 4), dtype)
    u, s, vh = backend_of(xp).small_svd(to_xp(xp, a))
    assert s.dtype == xp.float64
    u, s, vh = map(to_numpy, (u, s, vh))
    np.testing.assert_allclose((u * s[..., None, :]) @ vh, a, atol=50 * EPS)
    np.testing.assert_allclose(s, np.linalg.svd(a, compute_uv=False), atol=50 * EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_small_eigh(xp, batch, dtype):
    a = hermitian(random((*batch, 4, 4), dtype))
    w, v = backend_of(xp).small_eigh(to_xp(xp, a))
    assert w.dtype == xp.float64
    w, v = map(to_numpy, (w, v))
    np.testing.assert_allclose(w, np.linalg.eigvalsh(a), atol=200 * EPS)
    np.testing.assert_allclose(a @ v, v * w[..., None, :], atol=500 * EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_h(xp, dtype):
    a = random((2, 3, 4), dtype)
    expected = np.conj(a).swapaxes(-1, -2)
    np.testing.assert_array_equal(to_numpy(matrix_h(to_xp(xp, a), xp)), expected)


@pytest.mark.parametrize("shape", [(7, 3), (2, 7, 3), (TEST_MATRIX_ROWS + 5, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_test_matrix_is_the_same_everywhere(xp, shape, dtype):
    like = to_xp(xp, np.zeros((2, 2), dtype=dtype))
    omega = to_numpy(backend_of(xp).test_matrix(shape, np.random.default_rng(5), like))
    reference = Backend(compat.array_namespace(np.zeros(0))).test_matrix(
        shape, np.random.default_rng(5), np.zeros(0, dtype=dtype)
    )
    assert omega.dtype == dtype
    np.testing.assert_array_equal(omega, reference)


@pytest.mark.parametrize("dtype", DTYPES)
def test_test_matrix_is_standard_gaussian(dtype):
    backend = backend_of(compat.array_namespace(np.zeros(0)))
    n_rows = 20_000
    omega = backend.test_matrix((n_rows, 5), np.random.default_rng(0), np.zeros(0, dtype=dtype))
    gram = np.conj(omega).T @ omega / n_rows
    # The entries of a sample covariance have standard deviation 1/sqrt(n), twice the variance on the diagonal.
    assert np.max(np.abs(gram - np.eye(5))) < 5 * np.sqrt(2 / n_rows)


def test_successive_draws_differ_and_seeds_repeat():
    backend = backend_of(compat.array_namespace(np.zeros(0)))
    rng = np.random.default_rng(0)
    first, second = (backend.test_matrix((5, 2), rng, np.zeros(0)) for _ in range(2))
    assert np.min(np.abs(first - second)) > 0
    again = backend.test_matrix((5, 2), np.random.default_rng(0), np.zeros(0))
    np.testing.assert_array_equal(first, again)


@pytest.mark.needs("eager")
def test_eager_arrays_are_eager(xp):
    assert backend_of(xp).is_eager(to_xp(xp, np.ones(2)))


def test_traced_arrays_are_not_eager():
    jax = pytest.importorskip("jax")
    backend = backend_of(jax.numpy)
    seen = []
    for transform in (jax.jit, jax.vmap, jax.grad):
        transform(lambda x: seen.append(backend.is_eager(x)) or x.sum())(
            jax.numpy.ones(()) if transform is jax.grad else jax.numpy.ones(3)
        )
    assert seen == [False] * 3


def test_torch_transforms_are_not_eager():
    torch = pytest.importorskip("torch")
    import array_api_compat.torch as xp

    backend = backend_of(xp)
    seen = []
    torch.func.vmap(lambda x: seen.append(backend.is_eager(x)) or x)(torch.ones(3))
    assert seen == [False]
    assert not backend.is_eager(torch.ones(3, device="meta"))


def test_attention_override_equals_the_reference(xp):
    q, k, v = (to_xp(xp, random((2, 2, n, 4), seed=n)) for n in (6, 9, 9))
    options = ScoreOptions(scale=0.5, is_causal=True)
    ours = backend_of(xp).attention(q, k, v, None, options)
    reference = Backend(xp).attention(q, k, v, None, options)
    for x, y in zip(ours, reference, strict=True):
        np.testing.assert_allclose(to_numpy(x), to_numpy(y), atol=20 * EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_threshold_override_equals_the_reference(xp, dtype):
    x = to_xp(xp, random((40, 3), dtype))
    ours, reference = (backend.soft_threshold(x, 0.5) for backend in (backend_of(xp), Backend(xp)))
    np.testing.assert_allclose(to_numpy(ours), to_numpy(reference), atol=4 * EPS)


def test_what_a_table_makes_is_where_its_input_is(xp, device):
    backend = backend_of(xp)
    like = xp.asarray(np.ones((3, 2)), device=device)
    made = backend.test_matrix((4, 2), np.random.default_rng(0), like)
    assert made.device == like.device
    with contextlib.suppress(AttributeError):
        assert backend.device(made) == backend.device(like)


@pytest.mark.parametrize("bound", [0.5, "array"])
def test_bounds_override_equals_the_reference(xp, bound):
    x = to_xp(xp, np.append(random((4, 3)), [[np.nan, np.inf, -np.inf]], axis=0))
    bound = to_xp(xp, np.full((5, 3), 0.5)) if bound == "array" else bound
    for name in ("at_least", "at_most"):
        ours, reference = (
            getattr(backend, name)(x, bound) for backend in (backend_of(xp), Backend(xp))
        )
        np.testing.assert_array_equal(to_numpy(ours), to_numpy(reference))
