"""Exact attention to the keys of a prompt that its last queries attend to most, and to all that follow it."""

import numpy as np

from slra._backends.ambient import isolated
from slra._typing import AnyArray, Array, ArrayT, CausalAlign
from slra._validate import check_rank
from slra.attn.problem import AttentionProblem, make_problem
from slra.attn.rows import row_weights, take_rows
from slra.baselines._chosen import attend_to_chosen, largest

__all__ = ["snapkv", "votes"]


@isolated
def snapkv(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    n_keys: int,
    window: int,
    *,
    kernel_size: int = 5,
    mask: AnyArray | None = None,
    causal_align: CausalAlign | None = None,
    scale: float | AnyArray | None = None,
    enable_gqa: bool = False,
    softcap: float | AnyArray | None = None,
) -> ArrayT:
    """Exact attention to the keys of a prompt that its last queries attend to most, and to all that follow it.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating. The prompt ends with the token of query ``window``: the queries up to there see all keys
        before their own, as in a prompt, and choose; those after it see what was chosen, and the tokens from the window
        on.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    n_keys : int
        Keys of the prompt that each key head keeps, those of the window among them; more where votes are equal.
    window : int
        Number of queries that choose, and of keys that are kept unasked.
    kernel_size : int
        Neighbours over which votes are averaged, an odd number.
    mask, causal_align, scale, enable_gqa, softcap
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
    Query heads that share a key head vote together. The paper's cache keeps keys for each query head.

    References
    ----------
    Y. Li et al., SnapKV: LLM knows what you are looking for before generation, arXiv:2404.14469, section 4.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> slra.baselines.snapkv(q[:, 30:], k, v, 12, 8, causal_align="bottom_right").shape
    (2, 20, 8)
    """
    problem = make_problem(
        q,
        k,
        v,
        mask=mask,
        is_causal=True,
        causal_align=causal_align,
        scale=scale,
        enable_gqa=enable_gqa,
        softcap=softcap,
    )
    problem.check_finite()
    n_queries, n_all = int(problem.q.shape[-2]), int(problem.k.shape[-2])
    window = check_rank(window, n_queries, "window", "Nq")
    n_keys = check_rank(n_keys, n_all, "n_keys", "Nk")
    if n_keys < window:
        raise ValueError(f"n_keys must be at least window, {window}, got {n_keys}")
    kernel_size = check_rank(kernel_size, n_all, "kernel_size", "Nk")
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    problem, backend = problem.broadcast(), problem.backend
    diagonal, keys = problem.options.diagonal(n_queries, n_all), np.arange(n_all)
    first = max(0, diagonal)
    with backend.ignore_overflow():
        kept = None
        if n_keys > window and first:
            found = votes(problem, window, kernel_size)[..., None, :]
            kept = largest(problem, found, min(n_keys - window, n_all))

        def choose(rows: list[int]) -> Array:
            row = np.asarray(rows)[:, None]
            seen = (keys <= row + diagonal) & ((row < window) | (keys >= first))
            seen = backend.from_numpy(seen, problem.q, problem.xp.bool)
            if kept is None:
                return seen
            late = (keys < first) & (row >= window)
            return seen | (kept & backend.from_numpy(late, problem.q, problem.xp.bool))

        out: ArrayT = problem.answer(attend_to_chosen(problem, choose))
    return out


def votes(problem: AttentionProblem, window: int, kernel_size: int) -> Array:
    """Attention of the first queries to the keys before theirs, averaged over neighbours, (..., H, 1, Nk).

    0 for the keys of these queries and those after them.
    """
    xp, backend, n_all = problem.xp, problem.backend, problem.k.shape[-2]
    rows, half = list(range(window)), kernel_size // 2
    weights = row_weights(problem, take_rows(problem.q, rows, backend), problem.k, rows)
    received = xp.sum(weights, axis=(-3, -2))[..., None, :]
    first = problem.options.diagonal(problem.q.shape[-2], n_all)
    earlier = backend.from_numpy(np.arange(n_all) < first, received, received.dtype)
    received = received * earlier
    empty = xp.zeros_like(received[..., :half])
    padded = xp.concat([empty, received, empty], axis=-1)
    shifted = [padded[..., i : i + n_all] for i in range(kernel_size)]
    return sum(shifted[1:], shifted[0]) / kernel_size * earlier
