"""Attention on randomly projected sequences."""

from slra._backends.ambient import isolated
from slra._typing import RNG, AnyArray, ArrayT
from slra._validate import check_draws, check_rank
from slra.attn.exact import exact_output
from slra.attn.problem import make_problem

__all__ = ["linformer"]


@isolated
def linformer(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    n_combinations: int,
    *,
    rng: RNG = 0,
    scale: float | AnyArray | None = None,
    enable_gqa: bool = False,
) -> ArrayT:
    """Attention to random combinations of the keys, with entries of variance 1 / n_combinations.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    n_combinations : int
        Number of combinations that take the place of the Nk keys, and of the values alike.
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
    S. Wang et al., Linformer: self-attention with linear complexity, arXiv:2006.04768, equation 7, with the Gaussian
    projection of their Theorem 2 in place of a trained one, shared by keys and values.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> slra.baselines.linformer(q, k, v, 10).shape
    (2, 50, 8)
    """
    problem = make_problem(q, k, v, scale=scale, enable_gqa=enable_gqa)
    problem.check_finite()
    backend, xp, n_keys = problem.backend, problem.xp, int(problem.k.shape[-2])
    n_combinations = check_rank(n_combinations, n_keys, "n_combinations", "Nk")
    source = check_draws(backend, problem.k, rng)
    if source is None:
        raise ValueError("rng must be an int in a traced function, got None")
    with backend.ignore_overflow():
        draws = backend.test_matrix((n_keys, n_combinations), source, problem.k)
        projection = xp.matrix_transpose(draws) * n_combinations**-0.5
        small = problem._replace(k=projection @ problem.k, v=projection @ problem.v)
        out: ArrayT = problem.answer(exact_output(small))
    return out
