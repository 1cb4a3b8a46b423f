"""Exact attention to the keys with the largest low-rank scores."""

from slra._backends.ambient import isolated
from slra._typing import AnyArray, Array, ArrayT, CausalAlign
from slra._validate import check_rank
from slra.attn.problem import AttentionProblem, make_problem
from slra.attn.rows import row_weights, take_rows
from slra.baselines._chosen import attend_to_chosen, largest
from slra.svd.truncated import thin_svd

__all__ = ["topk"]


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
        out: ArrayT = problem.answer(_attend(problem.broadcast(), rank, n_keys))
    return out


def _attend(problem: AttentionProblem, rank: int, n_keys: int) -> Array:
    backend, xp = problem.backend, problem.xp
    centred = problem.k - xp.mean(problem.k, axis=-2, keepdims=True)
    components = xp.matrix_transpose(thin_svd(centred, backend)[2][..., :rank, :])
    q, k = problem.q @ components, centred @ components

    def choose(rows: list[int]) -> Array:
        # Softmax, mask and all, keeps the order of the scores within a row.
        return largest(problem, row_weights(problem, take_rows(q, rows, backend), k, rows), n_keys)

    return attend_to_chosen(problem, choose)
