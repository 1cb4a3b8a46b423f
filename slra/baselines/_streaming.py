"""Exact attention to the first keys and to the last ones before each query."""

import numpy as np

from slra._backends.ambient import isolated
from slra._typing import AnyArray, Array, ArrayT, CausalAlign
from slra._validate import check_count, check_rank
from slra.attn.problem import make_problem
from slra.baselines._chosen import attend_to_chosen

__all__ = ["streaming"]


@isolated
def streaming(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    n_sink: int,
    window: int,
    *,
    mask: AnyArray | None = None,
    causal_align: CausalAlign | None = None,
    scale: float | AnyArray | None = None,
    enable_gqa: bool = False,
    softcap: float | AnyArray | None = None,
) -> ArrayT:
    """Exact attention to a few first keys, the sinks, and to a window of keys that ends at the query's own place.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    n_sink : int
        Number of first keys.
    window : int
        Number of keys up to the query's own, at least one.
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
    Positions are those of the keys given. The paper counts them anew, in what is left of the text.

    References
    ----------
    G. Xiao et al., Efficient streaming language models with attention sinks, arXiv:2309.17453.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> slra.baselines.streaming(q, k, v, 4, 16).shape
    (2, 50, 8)
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
    n_keys = int(problem.k.shape[-2])
    n_sink = check_count(n_sink, "n_sink")
    window = check_rank(window, n_keys, "window", "Nk")
    problem, keys = problem.broadcast(), np.arange(n_keys)
    diagonal = problem.options.diagonal(problem.q.shape[-2], n_keys)

    def choose(rows: list[int]) -> Array:
        place = np.asarray(rows)[:, None] + diagonal
        chosen = (keys <= place) & ((keys > place - window) | (keys < n_sink))
        return problem.backend.from_numpy(chosen, problem.q, problem.xp.bool)

    with problem.backend.ignore_overflow():
        out: ArrayT = problem.answer(attend_to_chosen(problem, choose))
    return out
