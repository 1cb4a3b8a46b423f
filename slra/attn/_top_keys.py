"""Attention in which each query reads a few keys exactly, chosen by its scores at low rank, which the others keep."""

import functools
import math
import operator
from collections.abc import Iterator
from typing import NamedTuple

from slra._backends import Backend
from slra._backends.standard import ScoreOptions
from slra._backends.standard.attention import combine_masks
from slra._backends.standard.hidden import finite_parts
from slra._typing import Array, Namespace
from slra.attn._exact_keys import (
    ExactKeys,
    exact_key_gradients,
    exact_keys_output,
    without_exact_keys,
)
from slra.attn.chosen import choose, tile_of_queries
from slra.attn.exact import (
    OutputGradient,
    exact_gradients,
    exact_output_and_lse,
    merge_attention,
)
from slra.attn.lengths import Part
from slra.attn.maps import Maps, mapped_gradients, mapped_output, mapped_problem
from slra.attn.problem import AttentionProblem, Three

__all__ = ["output_with_top_keys", "top_key_gradients"]


class _Chooser(NamedTuple):
    """A problem, as far as choosing needs to know it."""

    backend: Backend
    n_shared: int
    score_options: ScoreOptions
    top_p: None = None
    is_static: bool = True

    @property
    def xp(self) -> Namespace:
        return self.backend.xp


def output_with_top_keys(
    problem: AttentionProblem, maps: Maps, n_top: int, keys: ExactKeys | None
) -> tuple[Array, Array]:
    """Attend to ``n_top`` keys of each query exactly, and to ``keys``, and to the others under the maps.

    Everything that hides keys, or changes scores by place, is in the mask.
    """
    found = []
    for rows in _tiles(problem, n_top):
        part = _part(problem, rows)
        exact = [] if keys is None else [exact_keys_output(part, keys)]
        left = part if keys is None else part._replace(mask=without_exact_keys(part, keys))
        places = _top_places(left, maps, n_top, [lse for _, lse in exact])
        chosen = _without_shared_axis(exact_output_and_lse(_chosen_part(left, places)), left.xp)
        rest = left._replace(mask=_mask_of_rest(left, places))
        others = mapped_output(rest, maps, with_lse=True)
        found.append(merge_attention(*zip(others, chosen, *exact, strict=True)))
    outs, lses = zip(*found, strict=True)
    if len(found) == 1:
        return outs[0], lses[0]
    return problem.xp.concat(outs, axis=-2), problem.xp.concat(lses, axis=-1)


def top_key_gradients(
    problem: AttentionProblem,
    maps: Maps,
    n_top: int,
    keys: ExactKeys | None,
    given: OutputGradient,
) -> Three:
    """Gradients for q, k and v: all parts see the same log-sum-exp and output, as shards of the keys do."""
    xp, queries, sums = problem.xp, [], []
    for rows in _tiles(problem, n_top):
        part, of_output = _part(problem, rows), given.part(rows)
        grads, exact_lse = [], []
        left = part
        if keys is not None:
            grads.append(part.sum_to_inputs(exact_key_gradients(part, keys, of_output)))
            exact_lse.append(exact_keys_output(part, keys)[1])
            left = part._replace(mask=without_exact_keys(part, keys))
        places = _top_places(left, maps, n_top, exact_lse)
        grads.append(left.sum_to_inputs(_chosen_gradients(left, places, of_output)))
        small = mapped_problem(left._replace(mask=_mask_of_rest(left, places)), maps)
        grads.append(left.sum_to_inputs(mapped_gradients(small, maps, of_output)))
        dq, dk, dv = (functools.reduce(operator.add, one) for one in zip(*grads, strict=True))
        queries.append(dq)
        sums.append((dk, dv))
    dk, dv = (functools.reduce(operator.add, one) for one in zip(*sums, strict=True))
    return xp.concat(queries, axis=-2) if len(queries) > 1 else queries[0], dk, dv


def _tiles(problem: AttentionProblem, n_top: int) -> Iterator[slice]:
    """Cut queries into those that choose at once, so that memory stays in bounds."""
    n, n_keys = problem.q.shape[-2], problem.k.shape[-2]
    if not problem.backend.is_known(n):
        yield slice(0, n)
        return
    lead = problem.lse_shape()[:-2] if any(problem.with_heads) else ()
    n_heads = math.prod([*lead, problem.k.shape[-4]])
    width = problem.k.shape[-1] + problem.v.shape[-1]
    size = tile_of_queries(n_heads * problem.n_shared * n_keys, n_heads * n_top * width)
    for top in range(0, n, size):
        yield slice(top, min(top + size, n))


def _part(problem: AttentionProblem, rows: slice) -> AttentionProblem:
    return problem.part(Part(rows, slice(0, problem.k.shape[-2])))


def _top_places(problem: AttentionProblem, maps: Maps, n_top: int, exact_lse: list[Array]) -> Array:
    """Places (..., H, Nq, n_top) of the keys that have most weight at low rank, beside those that are exact anyway."""
    xp, backend, n_shared = problem.xp, problem.backend, problem.n_shared
    problem = problem.constant().broadcast()
    if problem.mask is not None:
        # What is hidden may be NaN, and so become every weight of a query.
        q, k, v = finite_parts(backend, *problem[:3])
        problem = problem._replace(q=q, k=k, v=v)
    (*lead, n_heads, _, n_queries, _), n_keys = problem.q.shape, problem.k.shape[-2]
    n_batch, rows = math.prod(lead), n_shared * n_queries
    maps = maps.each(backend.stop_gradient)
    q, k, _ = maps.project(problem)
    shift = problem.q @ xp.matrix_transpose(maps.c)
    others = [backend.stop_gradient(lse) for lse in exact_lse]
    if problem.sinks is not None:
        others.append(problem.sinks[..., None] + xp.zeros_like(shift[..., 0]))
    elsewhere = functools.reduce(xp.logaddexp, others) if others else None

    def stacked(x: Array) -> Array:
        """(..., H, G, Nq, f) to (B, H, G * Nq, f)."""
        x = xp.broadcast_to(x, (*lead, n_heads, n_shared, n_queries, x.shape[-1]))
        return xp.reshape(x, (n_batch, n_heads, rows, x.shape[-1]))

    found = choose(
        _Chooser(backend, n_shared, problem.options),
        n_top,
        stacked(q),
        stacked(shift),
        xp.reshape(xp.broadcast_to(k, (*lead, *k.shape[-4:])), (n_batch, n_heads, n_keys, -1)),
        None if problem.mask is None else stacked(problem.mask),
        None if elsewhere is None else stacked(elsewhere[..., None])[..., 0],
    )
    return xp.reshape(found.places, (*lead, n_heads, n_queries, n_top))


def _mask_of_rest(problem: AttentionProblem, places: Array) -> Array:
    """Mask the keys that are chosen, besides those that are masked anyway."""
    xp, n_keys = problem.xp, problem.k.shape[-2]
    ones = xp.ones_like(places, dtype=problem.q.dtype)
    is_left = problem.backend.scatter_rows(ones, places, n_keys) == 0
    return combine_masks(xp, problem.mask, is_left[..., None, :, :])


def _chosen_part(problem: AttentionProblem, places: Array) -> AttentionProblem:
    """Give each query its own keys: q (..., H, Nq, 1, G, D), k and v (..., H, Nq, 1, n_top, .)."""
    xp, gather = problem.xp, problem.backend.gather_rows
    problem = problem.broadcast()
    *lead, n_queries, n_top = places.shape
    at = xp.reshape(places, (*lead, 1, n_queries * n_top))
    k, v = (
        xp.reshape(gather(x, at), (*lead, n_queries, 1, n_top, x.shape[-1]))
        for x in (problem.k, problem.v)
    )
    mask = problem.mask
    if mask is not None:
        mask = xp.reshape(mask, ((1,) * (problem.q.ndim - mask.ndim) + tuple(mask.shape)))
        axes = tuple(range(mask.ndim - 4))
        h, g, m, n = (mask.ndim - i for i in (4, 3, 2, 1))
        mask = xp.permute_dims(mask, (*axes, h, m, n, g))
        if mask.shape[-2] > 1:
            mask = gather(mask, places)
        mask = xp.matrix_transpose(mask)[..., None, :, :]
    return problem._replace(q=_with_queries_first(problem.q, xp), k=k, v=v, mask=mask)


def _with_queries_first(x: Array, xp: Namespace) -> Array:
    """(..., H, G, Nq, f) to (..., H, Nq, 1, G, f)."""
    axes = tuple(range(x.ndim - 3))
    g, m, f = (x.ndim - i for i in (3, 2, 1))
    return xp.permute_dims(x, (*axes, m, g, f))[..., None, :, :]


def _without_shared_axis(found: tuple[Array, Array], xp: Namespace) -> tuple[Array, Array]:
    """(..., H, Nq, 1, G, f) to (..., H, G, Nq, f), and the log-sum-exp likewise."""
    out, lse = found[0][..., 0, :, :], found[1][..., 0, :]
    axes, (m, g, f) = tuple(range(out.ndim - 3)), (out.ndim - i for i in (3, 2, 1))
    return xp.permute_dims(out, (*axes, g, m, f)), xp.matrix_transpose(lse)


def _chosen_gradients(problem: AttentionProblem, places: Array, given: OutputGradient) -> Three:
    """Gradients through the chosen keys, each put where its key is."""
    xp, backend = problem.xp, problem.backend
    part = _chosen_part(problem, places)
    lse, delta = (xp.matrix_transpose(x)[..., None, :] for x in (given.lse, given.delta))
    of_part = OutputGradient(lse, delta, _with_queries_first(given.grad_out, xp))
    dq, dk, dv = exact_gradients(part, of_part)
    dq, _ = _without_shared_axis((dq, dq[..., 0]), xp)
    n_queries, n_keys = places.shape[-2], problem.k.shape[-2]

    def at_keys(x: Array) -> Array:
        """Add up (..., H, Nq, 1, n_top, f) where the keys are, (..., H, 1, n_keys, f): many may have chosen one."""
        x = xp.matrix_transpose(x[..., 0, :, :])
        spread = xp.broadcast_to(places[..., None, :], x.shape)
        tiles = [slice(None)]
        if backend.is_known(n_queries):
            size = tile_of_queries(math.prod(x.shape[:-3]) * x.shape[-2] * n_keys, 1)
            tiles = [slice(i, min(i + size, n_queries)) for i in range(0, n_queries, size)]
        scattered = (
            backend.scatter_rows(x[..., t, :, :], spread[..., t, :, :], n_keys) for t in tiles
        )
        whole = functools.reduce(operator.add, (xp.sum(one, axis=-3) for one in scattered))
        return xp.matrix_transpose(whole)[..., None, :, :]

    return dq, at_keys(dk), at_keys(dv)
