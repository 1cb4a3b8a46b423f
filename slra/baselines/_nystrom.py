"""Nystrom attention on segment means."""

import numpy as np

from slra._backends.ambient import isolated
from slra._typing import AnyArray, Array, ArrayT, Namespace
from slra._validate import check_rank
from slra.attn.problem import AttentionProblem, make_problem

__all__ = ["nystrom"]

N_ITER = 6  # as in the paper


@isolated
def nystrom(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    n_landmarks: int,
    *,
    scale: float | AnyArray | None = None,
    enable_gqa: bool = False,
) -> ArrayT:
    """Attention through landmarks, the means of segments of the queries and of the keys.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    n_landmarks : int
        Number of landmarks, at most Nq and Nk.
    scale, enable_gqa
        As in `slra.attention`.

    Returns
    -------
    array, shape (..., Hq, Nq, Dv)
        In the common dtype of ``q``, ``k`` and ``v``.

    Raises
    ------
    TypeError
        If an array is not real floating, or a count is not an int.
    ValueError
        If shapes do not fit, a count is out of range, or an input that is concrete is not finite.

    References
    ----------
    Y. Xiong et al., Nystromformer: a Nystrom-based algorithm for approximating self-attention, AAAI 2021,
    arXiv:2102.03902, equations 11 to 14, without the convolution that they train beside it.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> slra.baselines.nystrom(q, k, v, 10).shape
    (2, 50, 8)
    """
    problem = make_problem(q, k, v, scale=scale, enable_gqa=enable_gqa)
    problem.check_finite()
    limit = min(problem.q.shape[-2], problem.k.shape[-2])
    n_landmarks = check_rank(n_landmarks, limit, "n_landmarks", "min of Nq and Nk")
    with problem.backend.ignore_overflow():
        out: ArrayT = problem.answer(_through_landmarks(problem, n_landmarks))
    return out


def _through_landmarks(problem: AttentionProblem, n_landmarks: int) -> Array:
    xp = problem.xp
    transposed = xp.matrix_transpose
    q, k = problem.q * problem.options.scale, problem.k
    landmarks_q = _segment_means(q, n_landmarks, problem)
    landmarks_k = _segment_means(k, n_landmarks, problem)
    left = _softmax(q @ transposed(landmarks_k), xp)
    middle = _softmax(landmarks_q @ transposed(landmarks_k), xp)
    right = _softmax(landmarks_q @ transposed(k), xp)
    return left @ (_inverse(middle, problem) @ (right @ problem.v))


def _segment_means(x: Array, n_segments: int, problem: AttentionProblem) -> Array:
    """Means of consecutive rows, in segments whose lengths differ by at most one."""
    n_rows = x.shape[-2]
    segments = np.arange(n_rows) * n_segments // n_rows
    mean = (segments == np.arange(n_segments)[:, None]).astype(float)
    return problem.backend.from_numpy(mean / mean.sum(axis=1, keepdims=True), x) @ x


def _softmax(scores: Array, xp: Namespace) -> Array:
    weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    return weights / xp.sum(weights, axis=-1, keepdims=True)


def _inverse(a: Array, problem: AttentionProblem) -> Array:
    """Iterate towards the pseudo-inverse (Razavi et al. 2014, third order), N_ITER times as the paper does."""
    xp = problem.xp
    row_sum, column_sum = (xp.max(xp.sum(xp.abs(a), axis=i), axis=-1) for i in (-1, -2))
    z = xp.matrix_transpose(a) / (row_sum * column_sum)[..., None, None]
    eye = problem.backend.from_numpy(np.eye(a.shape[-1]), a)
    for _ in range(N_ITER):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z
