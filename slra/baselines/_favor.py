"""Attention by positive orthogonal random features."""

import math

import numpy as np

from slra._backends.ambient import isolated
from slra._typing import RNG, AnyArray, Array, ArrayT
from slra._validate import check_draws, check_rank
from slra.attn.problem import AttentionProblem, make_problem

__all__ = ["favor", "orthogonal_features"]


@isolated
def favor(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    n_features: int,
    *,
    rng: RNG = 0,
    scale: float | AnyArray | None = None,
    enable_gqa: bool = False,
) -> ArrayT:
    r"""Attention whose kernel is replaced by features, :math:`\phi(x)_i = \exp(\omega_i x - \|x\|^2 / 2)`.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    n_features : int
        Number of random features; the error falls with its root.
    rng : int, numpy.random.Generator or None
        What to draw from; in a traced function an int.
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
    K. Choromanski et al., Rethinking attention with Performers, arXiv:2009.14794, Lemma 1 and section 2.4.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> slra.baselines.favor(q, k, v, 64).shape
    (2, 50, 8)
    """
    problem = make_problem(q, k, v, scale=scale, enable_gqa=enable_gqa)
    problem.check_finite()
    n_features = check_rank(n_features, 2**31, "n_features")
    source = check_draws(problem.backend, problem.q, rng)
    if source is None:
        raise ValueError("rng must be an int in a traced function, got None")
    directions = orthogonal_features(n_features, problem.q.shape[-1], source)
    with problem.backend.ignore_overflow():
        omega = problem.backend.from_numpy(directions, problem.q)
        out: ArrayT = problem.answer(_by_features(problem, omega))
    return out


def _by_features(problem: AttentionProblem, omega: Array) -> Array:
    xp, scale = problem.xp, problem.options.scale
    if isinstance(scale, float):
        root = math.sqrt(abs(scale))
        q, k = problem.q * math.copysign(root, scale), problem.k * root
    else:
        root = xp.sqrt(xp.abs(scale))
        q, k = problem.q * root * xp.sign(scale), problem.k * root

    def exponents(x: Array) -> Array:
        return x @ xp.matrix_transpose(omega) - xp.sum(x * x, axis=-1, keepdims=True) / 2

    exponents_q, exponents_k = exponents(q), exponents(k)
    # Factors that are common to a row of the weights cancel: without them nothing overflows.
    phi_q = xp.exp(exponents_q - xp.max(exponents_q, axis=-1, keepdims=True))
    phi_k = xp.exp(exponents_k - xp.max(exponents_k, axis=(-2, -1), keepdims=True))
    phi_k = xp.matrix_transpose(phi_k)
    total = phi_q @ xp.sum(phi_k, axis=-1, keepdims=True)
    total = xp.where(total == 0, xp.ones_like(total), total)
    return phi_q @ (phi_k @ problem.v) / total


def orthogonal_features(
    n_features: int, width: int, rng: np.random.Generator | int = 0
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Draw Gaussian directions, orthogonal in blocks of ``width``, with the lengths of Gaussian vectors."""
    rng = np.random.default_rng(rng)
    blocks = []
    for _ in range(-(-n_features // width)):
        q, r = np.linalg.qr(rng.standard_normal((width, width)))
        blocks.append(q * np.sign(np.diag(r)))  # else LAPACK's signs would favour a direction
    lengths = np.linalg.norm(rng.standard_normal((n_features, width)), axis=1, keepdims=True)
    features: np.ndarray[tuple[int, int], np.dtype[np.float64]] = (
        np.concatenate(blocks)[:n_features] * lengths
    )
    return features
