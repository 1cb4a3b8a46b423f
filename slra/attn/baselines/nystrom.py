"""Nystrom attention on segment means.

Source: Y. Xiong et al., Nystromformer: a Nystrom-based algorithm for approximating self-attention, AAAI 2021,
arXiv:2102.03902, equations 11 to 14, without the convolution that they train beside it.
"""

import numpy as np

from slra._typing import Array, Namespace
from slra.attn._rows import Grouped

__all__ = ["nystrom_attention"]

N_ITER = 6  # as in the paper


def nystrom_attention(data: Grouped, rank: int, n_exact: int) -> Array:
    """Attend through ``rank`` landmarks, the means of segments of the queries and of the keys."""
    xp = data.backend.xp
    q, k, v = data.q * data.options.scale, data.k[..., None, :, :], data.v[..., None, :, :]
    landmarks_q, landmarks_k = (_segment_means(x, rank, data) for x in (q, k))
    transposed = xp.matrix_transpose
    left = _softmax(q @ transposed(landmarks_k), xp)
    middle = _softmax(landmarks_q @ transposed(landmarks_k), xp)
    right = _softmax(landmarks_q @ transposed(k), xp)
    return left @ (_inverse(middle, data) @ (right @ v))


def _segment_means(x: Array, n_segments: int, data: Grouped) -> Array:
    """Means of consecutive rows, in segments whose lengths differ by at most one."""
    n_rows = x.shape[-2]
    segments = np.arange(n_rows) * n_segments // n_rows
    mean = (segments == np.arange(n_segments)[:, None]).astype(float)
    return data.backend.from_numpy(mean / mean.sum(axis=1, keepdims=True), x) @ x


def _softmax(scores: Array, xp: Namespace) -> Array:
    weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    return weights / xp.sum(weights, axis=-1, keepdims=True)


def _inverse(a: Array, data: Grouped) -> Array:
    """Iterate towards the pseudo-inverse (Razavi et al. 2014, third order), N_ITER times as the paper does."""
    xp = data.backend.xp
    row_sum, column_sum = (xp.max(xp.sum(xp.abs(a), axis=i), axis=-1) for i in (-1, -2))
    z = xp.matrix_transpose(a) / (row_sum * column_sum)[..., None, None]
    eye = data.backend.from_numpy(np.eye(a.shape[-1]), a)
    for _ in range(N_ITER):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z
