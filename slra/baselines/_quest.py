"""Exact attention to a few pages of keys a query, those whose extremes allow the largest scores."""

import math

from slra._backends.ambient import isolated
from slra._typing import AnyArray, Array, ArrayT, CausalAlign
from slra._validate import check_rank
from slra.attn.problem import AttentionProblem, make_problem
from slra.attn.rows import shown, take_rows
from slra.baselines._chosen import attend_to_chosen

__all__ = ["quest"]


@isolated
def quest(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    n_pages: int,
    *,
    page_size: int = 16,
    mask: AnyArray | None = None,
    is_causal: bool = False,
    causal_align: CausalAlign | None = None,
    scale: float | AnyArray | None = None,
    enable_gqa: bool = False,
    softcap: float | AnyArray | None = None,
) -> ArrayT:
    """Exact attention to a few pages of keys a query: those whose extremes of each channel allow the largest scores.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    n_pages : int
        Number of pages that each query attends to; ties are all taken.
    page_size : int
        Number of consecutive keys in a page; the last one may have fewer.
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
    Extremes are those of whole pages: under a causal mask, of a page that a query is in, also of its later keys. The
    paper leaves the first two layers of a model exact.

    References
    ----------
    J. Tang et al., Quest: query-aware sparsity for efficient long-context LLM inference, arXiv:2406.10774, Algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> slra.baselines.quest(q, k, v, 2).shape
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
    n_keys = int(problem.k.shape[-2])
    page_size = check_rank(page_size, n_keys, "page_size", "Nk")
    n_pages = check_rank(n_pages, -(-n_keys // page_size), "n_pages", "Nk / page_size")
    with problem.backend.ignore_overflow():
        out: ArrayT = problem.answer(_attend(problem.broadcast(), n_pages, page_size))
    return out


def _attend(problem: AttentionProblem, n_pages: int, page_size: int) -> Array:
    backend, xp, n_keys = problem.backend, problem.xp, problem.k.shape[-2]
    # The last key once more changes no extreme.
    pages = _paged(problem.k, -2, page_size, problem)
    low, high = (xp.matrix_transpose(f(pages, axis=-2)) for f in (xp.min, xp.max))
    q = problem.q * problem.options.scale
    zero = xp.zeros_like(q)
    bounds = xp.maximum(q, zero) @ high + xp.minimum(q, zero) @ low

    def choose(rows: list[int]) -> Array:
        found, seen = take_rows(bounds, rows, backend), shown(problem, rows)
        if seen is not None:
            seen = xp.broadcast_to(seen, (*seen.shape[:-1], n_keys))
            in_page = xp.any(_paged(seen, -1, page_size, problem), axis=-1)
            found = xp.where(in_page, found, xp.full_like(found, -math.inf))
        chosen = found >= backend.kth_largest(found, n_pages)
        keys = xp.broadcast_to(chosen[..., None], (*chosen.shape, page_size))
        keys = xp.reshape(keys, (*chosen.shape[:-1], -1))[..., :n_keys]
        return keys if seen is None else xp.logical_and(keys, seen)

    return attend_to_chosen(problem, choose)


def _paged(x: Array, axis: int, page_size: int, problem: AttentionProblem) -> Array:
    """Split an axis of keys in pages, the last of which is filled up with the last key."""
    xp, at = problem.xp, x.ndim + axis
    missing = -x.shape[at] % page_size
    if missing:
        last = x[..., -1:] if axis == -1 else x[..., -1:, :]
        x = xp.concat([x, *[last] * missing], axis=at)
    shape = (*x.shape[:at], x.shape[at] // page_size, page_size, *x.shape[at + 1 :])
    return xp.reshape(x, shape)
