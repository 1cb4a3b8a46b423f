"""Batches of small SVDs by eigenvalue problems, against LAPACK on NumPy in double precision."""

import numpy as np
import pytest

from slra._backends import Backend, backend_of, gram_svd
from tests.backends import to_numpy, to_xp

N = 40
INDEX = np.arange(N)
# Singular values, and by which power of ten all are multiplied in single and in double precision.
SPECTRA = {
    "flat": (np.ones(N), 0, 0),
    "slow decay": (0.95**INDEX, 30, 200),
    "fast decay": (0.5**INDEX, -30, -200),
    "rank 5": (np.where(INDEX < 5, 1.0, 0.0), 0, 0),
    "ones, then 1e-8": (np.where(INDEX < 5, 1.0, 1e-8 * 0.9**INDEX), 0, 0),
    "one is small": (np.where(INDEX < N - 1, 1.0, 1e-5), 0, 0),
    "zero": (np.zeros(N), 0, 0),
}
# Those of which a Gram matrix of the same precision loses what matters.
LOST = ["fast decay", "ones, then 1e-8"]

# CuPy is what it is for, and the standard what it is written in.
backends = pytest.mark.parametrize(
    "xp",
    ["array-api-strict", "cupy-on-host", pytest.param("cupy", marks=pytest.mark.gpu)],
    indirect=True,
)


def matrices(dtype, n_rows=N):
    """One matrix of each spectrum, and the largest singular value of each."""
    rng = np.random.default_rng(0)
    is_complex, is_double = np.dtype(dtype).kind == "c", np.finfo(dtype).bits == 64

    def basis(m):
        a = rng.standard_normal((m, N)) + 1j * is_complex * rng.standard_normal((m, N))
        return np.linalg.qr(a if is_complex else a.real)[0]

    scales = [10.0 ** exponents[is_double] for _, *exponents in SPECTRA.values()]
    made = [(basis(n_rows) * s) @ basis(N) for s, *_ in SPECTRA.values()]
    sizes = np.asarray([s[0] for s, *_ in SPECTRA.values()]) * scales
    return np.stack([a * scale for a, scale in zip(made, scales, strict=True)]).astype(dtype), sizes


def backward_errors(a, factors, sizes):
    """Spectral norm of ``a - U S Vh``, over n * eps * sigma_1; 0 for a zero matrix."""
    wide = np.result_type(a.dtype, "float64")
    u, s, vh = (x.astype(np.result_type(x.dtype, "float64")) for x in factors)
    unit = np.where(sizes == 0, 1.0, sizes)[:, None]
    gap = (u * (s / unit)[:, None, :]) @ vh - a.astype(wide) / unit[..., None]
    return np.linalg.norm(gap, 2, axis=(-2, -1)) / (N * np.finfo(a.dtype).eps)


def check(a, factors, sizes):
    eps = np.finfo(a.dtype).eps
    u, s, vh = factors
    assert u.dtype == vh.dtype == a.dtype
    assert np.all(s >= 0)
    assert np.all(np.diff(s) <= 0)
    # What is left out of R is one; rounding of the products, and of the result, another.
    assert np.max(backward_errors(a, factors, sizes)) <= 2
    for columns in (u, np.conj(vh).swapaxes(-1, -2)):
        gram = np.conj(columns).swapaxes(-1, -2) @ columns
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(N), gram.shape), atol=N * eps)
    unit = np.where(sizes == 0, 1.0, sizes)[:, None]
    reference = np.linalg.svd(a.astype(np.result_type(a.dtype, "float64")), compute_uv=False)
    np.testing.assert_allclose(s / unit, reference / unit, atol=2 * N * eps)


def run(xp, a):
    """Decompose a batch; the factors, and how many matrices went the long way."""
    backend, redone = backend_of(xp), []

    def otherwise(b):
        redone.append(b.shape[0])
        return Backend.small_svd(backend, b)

    factors = gram_svd.gram_svd(to_xp(xp, a), backend, otherwise)
    return [to_numpy(x) for x in factors], sum(redone)


@backends
@pytest.mark.parametrize("dtype", ["float32", "complex64", "float64", "complex128"])
def test_as_good_as_lapack_and_only_what_must_be_is_redone(xp, dtype):
    a, sizes = matrices(dtype)
    factors, n_redone = run(xp, a)
    check(a, factors, sizes)
    assert n_redone == (len(LOST) if np.finfo(dtype).bits == 64 else 0)


@backends
def test_tall_and_wide(xp):
    a, sizes = matrices("complex128", n_rows=N + 9)
    check(a, run(xp, a)[0], sizes)
    (u, s, vh), _ = run(xp, np.conj(a).swapaxes(-1, -2))
    assert u.shape == (len(SPECTRA), N, N)
    check(a, (np.conj(vh).swapaxes(-1, -2), s, np.conj(u).swapaxes(-1, -2)), sizes)


@backends
def test_without_the_long_way_the_answer_is_wrong(xp, monkeypatch):
    monkeypatch.setattr(gram_svd, "redo", lambda ok, results, *rest: results)
    a, sizes = matrices("float64")
    factors, _ = run(xp, a)
    errors = dict(zip(SPECTRA, backward_errors(a, factors, sizes), strict=True))
    assert min(errors[name] for name in LOST) > 100
