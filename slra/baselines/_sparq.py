"""Exact attention to the keys with the largest scores in a few components of a query, and a mean for the others."""

from slra._backends.ambient import isolated
from slra._typing import AnyArray, Array, ArrayT, CausalAlign
from slra._validate import check_rank
from slra.attn.problem import AttentionProblem, make_problem
from slra.attn.rows import row_weights, take_rows
from slra.baselines._chosen import attend_rows, largest, tiles

__all__ = ["sparq"]


@isolated
def sparq(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    rank: int,
    n_keys: int,
    *,
    mask: AnyArray | None = None,
    is_causal: bool = False,
    causal_align: CausalAlign | None = None,
    scale: float | AnyArray | None = None,
    enable_gqa: bool = False,
    softcap: float | AnyArray | None = None,
) -> ArrayT:
    """Exact attention to a few keys a query, chosen by its largest components, and the mean value for the others.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    rank : int
        Number of the largest components of each query, by modulus, that choose.
    n_keys : int
        Number of keys that each query attends to; ties are all taken.
    mask, is_causal, causal_align, scale, enable_gqa, softcap
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

    Notes
    -----
    Query heads that share a key head choose each for itself, and no window of last keys is taken besides.

    References
    ----------
    L. Ribar et al., SparQ attention: bandwidth-efficient LLM inference, arXiv:2312.04985, Algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> slra.baselines.sparq(q, k, v, 4, 10).shape
    (2, 50, 8)
    """
    problem = make_problem(
        q,
        k,
        v,
        mask=mask,
        is_causal=is_causal,
        causal_align=causal_align,
        scale=scale,
        enable_gqa=enable_gqa,
        softcap=softcap,
    )
    problem.check_finite()
    rank = check_rank(rank, int(problem.k.shape[-1]), "rank", "D")
    n_keys = check_rank(n_keys, int(problem.k.shape[-2]), "n_keys", "Nk")
    problem = problem.broadcast()
    with problem.backend.ignore_overflow():
        parts = [_tile(problem, rows, rank, n_keys) for rows in tiles(problem)]
        out: ArrayT = problem.answer(problem.xp.concat(parts, axis=-2))
    return out


def _tile(problem: AttentionProblem, rows: list[int], rank: int, n_keys: int) -> Array:
    """Attention of some queries."""
    backend, xp = problem.backend, problem.xp
    q = take_rows(problem.q, rows, backend)
    size = xp.abs(q)
    few = xp.where(size >= backend.kth_largest(size, rank), q, xp.zeros_like(q))
    whole, part = (xp.sum(xp.abs(x), axis=-1, keepdims=True) for x in (q, few))
    # The temperature: scores of few components are as much smaller.
    few = few * xp.sqrt(whole / xp.where(part == 0, xp.ones_like(part), part))
    weights = row_weights(problem, few, problem.k, rows)
    chosen = largest(problem, weights, n_keys)
    share = xp.sum(xp.where(chosen, weights, xp.zeros_like(weights)), axis=-1, keepdims=True)
    mean = row_weights(problem, xp.zeros_like(q), problem.k, rows) @ problem.v
    return share * attend_rows(problem, rows, chosen) + (1 - share) * mean
