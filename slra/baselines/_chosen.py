"""Exact attention to keys that are chosen for each query, some queries at a time."""

from collections.abc import Callable

from slra._backends.standard.attention import combine_masks
from slra._typing import Array
from slra.attn.exact import exact_output
from slra.attn.problem import AttentionProblem
from slra.attn.rows import take_rows

__all__ = ["attend_rows", "attend_to_chosen", "largest", "tiles"]

# Queries that are computed together: memory is linear in the number of keys.
QUERY_TILE = 512


def tiles(problem: AttentionProblem) -> list[list[int]]:
    """Numbers of the queries that are computed together."""
    n_queries = problem.q.shape[-2]
    tops = range(0, n_queries, QUERY_TILE)
    return [list(range(top, min(top + QUERY_TILE, n_queries))) for top in tops]


def attend_to_chosen(problem: AttentionProblem, choose: Callable[[list[int]], Array]) -> Array:
    """Attention to the keys that ``choose`` shows to some queries, (..., S, Nk); it heeds causality."""
    return problem.xp.concat(
        [attend_rows(problem, rows, choose(rows)) for rows in tiles(problem)], axis=-2
    )


def attend_rows(problem: AttentionProblem, rows: list[int], chosen: Array) -> Array:
    """Attention of some queries to the keys chosen for them."""
    backend, xp, mask = problem.backend, problem.xp, problem.mask
    if mask is not None:
        part = take_rows(mask, rows, backend) if mask.shape[-2] > 1 else mask
        chosen = combine_masks(xp, part, chosen)
    q, options = take_rows(problem.q, rows, backend), problem.options._replace(is_causal=False)
    return exact_output(problem._replace(q=q, mask=chosen, options=options))


def largest(problem: AttentionProblem, weights: Array, n: int) -> Array:
    """Which weights are the n largest of a row and not zero; ties are all taken."""
    least = problem.backend.kth_largest(weights, n)
    return problem.xp.logical_and(weights >= least, weights > 0)
