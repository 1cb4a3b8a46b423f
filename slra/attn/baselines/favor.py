"""Attention by positive orthogonal random features.

Source: K. Choromanski et al., Rethinking attention with Performers, arXiv:2009.14794, Lemma 1 and section 2.4.
"""

import math

import numpy as np

from slra._typing import Array
from slra.attn._rows import Grouped

__all__ = ["favor_attention", "orthogonal_features"]


def favor_attention(data: Grouped, rank: int, n_exact: int) -> Array:
    r"""Replace the kernel by ``rank`` features, :math:`\phi(x)_i = \exp(\omega_i x - \|x\|^2 / 2)`."""
    backend, xp = data.backend, data.backend.xp
    omega = backend.from_numpy(orthogonal_features(rank, data.q.shape[-1]), data.q)
    root = math.sqrt(abs(data.options.scale))
    q, k = data.q * math.copysign(root, data.options.scale), data.k[..., None, :, :] * root

    def exponents(x: Array) -> Array:
        return x @ xp.matrix_transpose(omega) - xp.sum(x * x, axis=-1, keepdims=True) / 2

    exponents_q, exponents_k = exponents(q), exponents(k)
    # Factors that are common to a row of the weights cancel: without them nothing overflows.
    phi_q = xp.exp(exponents_q - xp.max(exponents_q, axis=-1, keepdims=True))
    phi_k = xp.exp(exponents_k - xp.max(exponents_k, axis=(-2, -1), keepdims=True))
    phi_k = xp.matrix_transpose(phi_k)
    total = phi_q @ xp.sum(phi_k, axis=-1, keepdims=True)
    total = xp.where(total == 0, xp.ones_like(total), total)
    return phi_q @ (phi_k @ data.v[..., None, :, :]) / total


def orthogonal_features(
    n_features: int, width: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Draw Gaussian directions, orthogonal in blocks of ``width``, with the lengths of Gaussian vectors."""
    rng = np.random.default_rng(0)
    blocks = []
    for _ in range(-(-n_features // width)):
        q, r = np.linalg.qr(rng.standard_normal((width, width)))
        blocks.append(q * np.sign(np.diag(r)))  # else LAPACK's signs would favour a direction
    lengths = np.linalg.norm(rng.standard_normal((n_features, width)), axis=1, keepdims=True)
    features: np.ndarray[tuple[int, int], np.dtype[np.float64]] = (
        np.concatenate(blocks)[:n_features] * lengths
    )
    return features
