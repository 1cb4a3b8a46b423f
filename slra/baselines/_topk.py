"""Exact attention to the keys with the largest low-rank scores."""

from slra._backends.ambient import isolated
from slra._backends.standard.attention import combine_masks
from slra._typing import AnyArray, Array, ArrayT, CausalAlign
from slra._validate import check_rank
from slra.attn.exact import exact_output
from slra.attn.problem import AttentionProblem, make_problem
from slra.attn.rows import row_weights, take_rows
from slra.svd.truncated import thin_svd

__all__ = ["topk"]

# Queries that are computed together: memory is linear in the number of keys.
QUERY_TILE = 512


@isolated
def topk(
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
    """Exact attention to a few keys a query, those with the largest scores in few dimensions; ties are all taken.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    rank : int
        Number of leading principal components of the keys that choose.
    n_keys : int
        Number of keys that each query attends to.
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

    References
    ----------
    P. Singhania et al., Loki: low-rank keys for efficient sparse attention, arXiv:2406.02542, Algorithm 1. (SparQ,
    arXiv:2312.04985, chooses by the largest components of each query instead.)

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> slra.baselines.topk(q, k, v, 4, 10).shape
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
    rank = check_rank(rank, min(problem.k.shape[-2:]), limit_is="min of Nk and D")
    n_keys = check_rank(n_keys, int(problem.k.shape[-2]), "n_keys", "Nk")
    with problem.backend.ignore_overflow():
        out: ArrayT = problem.answer(_in_tiles(problem.broadcast(), rank, n_keys))
    return out


def _in_tiles(problem: AttentionProblem, rank: int, n_keys: int) -> Array:
    backend, xp = problem.backend, problem.xp
    centred = problem.k - xp.mean(problem.k, axis=-2, keepdims=True)
    components = xp.matrix_transpose(thin_svd(centred, backend)[2][..., :rank, :])
    q, k = problem.q @ components, centred @ components
    n_queries = problem.q.shape[-2]
    tiles = [
        list(range(top, min(top + QUERY_TILE, n_queries)))
        for top in range(0, n_queries, QUERY_TILE)
    ]
    return xp.concat([_tile(problem, q, k, rows, n_keys) for rows in tiles], axis=-2)


def _tile(problem: AttentionProblem, q: Array, k: Array, rows: list[int], n_keys: int) -> Array:
    """Attention of some queries."""
    backend, xp, mask = problem.backend, problem.xp, problem.mask
    # Softmax, mask and all, keeps the order of the scores within a row.
    weights = row_weights(problem, take_rows(q, rows, backend), k, rows)
    chosen = xp.logical_and(weights >= backend.kth_largest(weights, n_keys), weights > 0)
    if mask is not None and not xp.isdtype(mask.dtype, "bool"):
        part = take_rows(mask, rows, backend) if mask.shape[-2] > 1 else mask
        chosen = combine_masks(xp, part, chosen)
    return exact_output(
        problem._replace(
            q=take_rows(problem.q, rows, backend),
            mask=chosen,
            options=problem.options._replace(is_causal=False),
        )
    )
