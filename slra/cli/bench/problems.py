"""Matrices whose answers are known, inputs of attention with a stated spectrum, and textbook formulas."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "attention_inputs",
    "matrix_with",
    "naive_attention",
    "sigma_error",
    "textbook_nuclear",
    "textbook_soft_threshold",
]

Array = NDArray[Any]


def matrix_with(sigma: Array, m: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Return factors U (m, n), sigma (n,) and Vh (n, n), m >= n, with random singular vectors; float64."""
    rng = np.random.default_rng(seed)
    n = len(sigma)
    u = np.linalg.qr(rng.standard_normal((m, n)))[0]
    v = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return u, sigma, v.T


def attention_inputs(spectrum: Array, n: int, heads: int, seed: int = 0) -> tuple[Array, ...]:
    """Gaussian Q, K and V, each (heads, n, d) in float32, whose singular values are as the spectrum (d,).

    Each head is rotated at random. Scores have a standard deviation of 3 over all heads, which is in the range of
    trained models; Q is scaled for that.
    """
    rng = np.random.default_rng(seed)
    d = len(spectrum)
    spectrum = spectrum * np.sqrt(d / np.sum(spectrum**2))

    def draw() -> Array:
        rotation = np.linalg.qr(rng.standard_normal((heads, d, d)))[0]
        return np.asarray(rng.standard_normal((heads, n, d)) * spectrum @ rotation)

    q, k, v = draw(), draw(), draw()
    spread = _score_deviation(q, k) / np.sqrt(d)
    return tuple((x * f).astype(np.float32) for x, f in ((q, 3 / spread), (k, 1), (v, 1)))


def _score_deviation(q: Array, k: Array) -> float:
    """Return the standard deviation of the entries of Q K^T, from Gram matrices: scores may be gigabytes."""
    n_scores = q.shape[0] * q.shape[1] * k.shape[1]
    mean = np.sum(q.sum(-2) * k.sum(-2)) / n_scores
    square = np.sum((q.swapaxes(-1, -2) @ q) * (k.swapaxes(-1, -2) @ k)) / n_scores
    return float(np.sqrt(square - mean**2))


def naive_attention(q: Array, k: Array, v: Array) -> Array:
    """softmax(Q K^T / sqrt(d)) V with the whole matrix of scores, in place."""
    scores = q @ k.swapaxes(-1, -2)
    scores *= np.asarray(q.shape[-1] ** -0.5, dtype=q.dtype)
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    return np.asarray(scores @ v)


def textbook_soft_threshold(x: Array, tau: float) -> Array:
    """sign(x) max(|x| - tau, 0)."""
    return np.asarray(np.sign(x) * np.maximum(np.abs(x) - tau, 0))


def textbook_nuclear(x: Array, tau: float) -> Array:
    """Soft threshold of the singular values, by a full SVD."""
    U, S, Vh = np.linalg.svd(x, full_matrices=False)
    return np.asarray((U * np.maximum(S - tau, 0)) @ Vh)


def sigma_error(found: Array, exact: Array) -> float:
    """Largest error of a singular value, relative to itself."""
    return float(np.max(np.abs(np.asarray(found, dtype=np.float64) / exact - 1)))
