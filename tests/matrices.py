"""Matrices with known spectra, and what holds of an SVD that is right."""

import numpy as np

from tests.backends import to_numpy


def eps_of(dtype):
    return float(np.finfo(dtype).eps)


def kahan(n):
    """Kahan's matrix, whose small singular value QR with pivoting misses."""
    s, c = np.sin(1.2), np.cos(1.2)
    upper = np.eye(n) - c * np.triu(np.ones((n, n)), 1)
    return s ** np.arange(n)[:, None] * upper


SPECTRA = {
    "polynomial": lambda n: 1 / np.arange(1.0, n + 1),
    "slow": lambda n: np.arange(1.0, n + 1) ** -0.5,
    "exponential": lambda n: 0.9 ** np.arange(n),
    "steep": lambda n: 0.5 ** np.arange(n),
    "step": lambda n: np.where(np.arange(n) < 20, 1.0, 1e-4),
    "spiked": lambda n: np.where(np.arange(n) < 3, 100.0, 1.0) * np.linspace(1, 0.9, n),
    "flat": lambda n: np.ones(n),
    "bad Cholesky-QR": lambda n: np.where(np.arange(n) < 5, 1.0, 1e-8 * 0.8 ** np.arange(n)),
    "rank 7": lambda n: np.where(np.arange(n) < 7, 1.0 / np.arange(1, n + 1), 0.0),
    "zero": lambda n: np.zeros(n),
}


SCALED = {"1e-30": 1e-30, "1e30": 1e30}


def orthonormal(rng, shape, k, dtype):
    g = rng.standard_normal((*shape, k))
    if np.issubdtype(dtype, np.complexfloating):
        g = g + 1j * rng.standard_normal(g.shape)
    return np.linalg.qr(g)[0]


def make(name, shape, dtype, seed=0):
    """Return a test matrix, rounded to its dtype."""
    rng = np.random.default_rng(seed)
    *batch, m, n = shape
    if name == "gaussian":
        a = rng.standard_normal(shape)
        if np.issubdtype(dtype, np.complexfloating):
            a = a + 1j * rng.standard_normal(shape)
    elif name == "kahan":
        k = min(m, n)
        a = np.zeros(shape)
        a[..., :k, :k] = kahan(k)
    else:
        scale = SCALED.get(name, 1.0)
        sigma = scale * SPECTRA["exponential" if name in SCALED else name](min(m, n))
        u = orthonormal(rng, (*batch, m), len(sigma), dtype)
        v = orthonormal(rng, (*batch, n), len(sigma), dtype)
        a = (u * sigma) @ np.conj(v).swapaxes(-1, -2)
    return a.astype(dtype)


def check(a, rank, result, near=1.01, trailing=None):
    """Compare with LAPACK's answer, in double precision, for the very matrix that was passed.

    ``trailing``: the spectrum's error of a reference method, allowed ten times over.
    """
    eps = eps_of(a.dtype)
    wide = a.astype(np.result_type(a.dtype, np.float64))
    exact = np.linalg.svd(wide, compute_uv=False)
    U, S, Vh = (to_numpy(x) for x in result)
    assert U.dtype == Vh.dtype == a.dtype
    assert S.dtype == a.real.dtype
    norm = np.linalg.norm(exact, axis=-1)
    error = np.linalg.norm(
        wide - (U.astype(wide.dtype) * S.astype(float)[..., None, :]) @ Vh, axis=(-2, -1)
    )
    best = np.linalg.norm(exact[..., rank:], axis=-1)
    assert np.all(error <= near * best + 100 * eps * norm)
    for Q in (U, np.conj(Vh).swapaxes(-1, -2)):
        gram = np.conj(Q).swapaxes(-1, -2) @ Q
        assert np.max(np.abs(gram - np.eye(rank))) <= 50 * eps * np.sqrt(rank)
    assert np.all(np.diff(S, axis=-1) <= 0)
    allowed = 20 * eps * exact[..., :1]
    if trailing is not None:
        allowed = allowed + 10 * trailing
    assert np.all(np.abs(S - exact[..., :rank]) <= allowed)


def reference_error(a, rank, n_iter, n_oversamples=8, seed=0):
    """Error of the singular values of subspace iteration by QR in double precision."""
    wide = a.astype(np.result_type(a.dtype, np.float64))
    scale = np.max(np.abs(wide)) or 1.0
    wide = wide / scale
    width = min(rank + n_oversamples, *a.shape[-2:])
    Q = np.random.default_rng(seed).standard_normal((*a.shape[:-2], a.shape[-1], width))
    Q = np.linalg.qr(wide @ Q)[0]
    for _ in range(n_iter):
        Q = np.linalg.qr(np.conj(wide).swapaxes(-1, -2) @ Q)[0]
        Q = np.linalg.qr(wide @ Q)[0]
    found = np.linalg.svd(np.conj(Q).swapaxes(-1, -2) @ wide, compute_uv=False)[..., :rank]
    exact = np.linalg.svd(wide, compute_uv=False)[..., :rank]
    return scale * np.max(np.abs(found - exact), axis=-1, keepdims=True)
