"""Attention and its gradient where rows hold sequences: one after the other, or all at once under a mask.

What is done to one sequence is a function that is handed in, as this is the same for exact attention with and without
log-sum-exp, and for all gradients.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from slra._backends.standard.attention import (
    Tile,
    TileBounds,
    scores_batch_shape,
    sum_to,
)
from slra._typing import Array
from slra.attn.lengths import Part, is_within
from slra.attn.problem import AttentionProblem, Three

__all__ = [
    "OutputGradient",
    "by_sequence",
    "gradients_by_sequence",
    "put_rows",
    "slope_gradient_by_sequence",
]


class OutputGradient(NamedTuple):
    """What the gradient needs to know of the output, laid out as the problem is, in the dtype computed in."""

    lse: Array
    delta: Array  # rowsum(grad_out * out) - grad_lse
    grad_out: Array

    def part(self, queries: slice) -> "OutputGradient":
        """Cut out some queries."""
        lse, delta = (x[..., queries] for x in (self.lse, self.delta))
        return OutputGradient(lse, delta, self.grad_out[..., queries, :])

    def element(self, index: tuple[int, ...]) -> "OutputGradient":
        """Take one element of the batch."""
        return OutputGradient(*(x[(*index, ...)] for x in self))


def _takes_parts(problem: AttentionProblem) -> bool:
    lengths = problem.lengths
    if lengths is None:
        raise AssertionError("there are lengths")
    has_slopes = problem.options.alibi is not None
    return lengths.takes_parts(problem.q.shape[-2], has_slopes=has_slopes)


def _rows(
    problem: AttentionProblem,
) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], list[Part]]]]:
    """Axes along which rows differ, those of the whole batch or none, and for each row its place and its sequences."""
    assert problem.lengths is not None
    lead, rows = problem.lengths.parts(scores_batch_shape(*problem[:4])[:-2])
    places = _indices(lead)
    return lead, list(zip(places, rows, strict=True))


def _indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    indices: list[tuple[int, ...]] = [()]
    for n in shape:
        indices = [(*index, i) for index in indices for i in range(n)]
    return indices


def by_sequence(
    problem: AttentionProblem, attend: Callable[[AttentionProblem], tuple[Array, ...]]
) -> tuple[Array, ...]:
    """Attention, and its log-sum-exp where ``attend`` returns that too, of a problem with lengths."""
    if not _takes_parts(problem):
        return _blanked(problem, attend(problem.with_mask_for_lengths()))
    lead, rows = _rows(problem)
    found = []
    for place, parts in rows:
        row = problem.element(place) if lead else problem
        pieces = [
            (part, attend(row.part(part))) for part in parts if part.n_queries and part.n_keys
        ]
        found.append(_joined(row, pieces))
    return _stacked(found, lead, problem)


def _blanked(problem: AttentionProblem, found: tuple[Array, ...]) -> tuple[Array, ...]:
    """Let queries that are padding have seen nothing."""
    lengths, xp = problem.lengths, problem.xp
    assert lengths is not None
    if lengths.n_sequences > 1:
        return found  # the mask has hidden all keys from them
    real = is_within(lengths.q, problem.q.shape[-2], problem.backend, problem.q)
    if real is None:
        return found
    out, *lse = found
    real = real[..., None, None, :]
    out = xp.where(real[..., None], out, xp.zeros_like(out))
    return out, *(xp.where(real, x, xp.full_like(x, -math.inf)) for x in lse)


def _joined(
    row: AttentionProblem, pieces: list[tuple[Part, tuple[Array, ...]]]
) -> tuple[Array, ...]:
    """Lay the answers for sequences one after another; a query in none of them has seen nothing."""
    n_queries = row.q.shape[-2]
    if not pieces:
        shape = (*scores_batch_shape(*row[:4]), n_queries)
        like = {"dtype": row.q.dtype, "device": row.backend.creation_device(row.q)}
        out = row.xp.zeros((*shape, row.v.shape[-1]), **like)
        return out, row.xp.full(shape, -math.inf, **like)
    outs = [(part.queries, found[0]) for part, found in pieces]
    whole = put_rows(outs, n_queries, outs[0][1], row)
    if len(pieces[0][1]) == 1:
        return (whole,)
    lses = [(part.queries, found[1][..., None]) for part, found in pieces]
    return whole, put_rows(lses, n_queries, lses[0][1], row, fill=-math.inf)[..., 0]


def put_rows(
    pieces: list[tuple[slice, Array]],
    n: int,
    like: Array,
    problem: AttentionProblem,
    *,
    fill: float = 0.0,
) -> Array:
    """Lay pieces (..., m, f), in order, out in n rows, and fill what is between them."""
    xp, laid_out, end = problem.xp, [], 0
    device = problem.backend.creation_device(like)

    def filled(m: int) -> Array:
        shape = (*like.shape[:-2], m, like.shape[-1])
        return xp.full(shape, fill, dtype=like.dtype, device=device)

    for rows, piece in pieces:
        if rows.start > end:
            laid_out.append(filled(rows.start - end))
        laid_out.append(piece)
        end = rows.stop
    if end < n:
        laid_out.append(filled(n - end))
    return laid_out[0] if len(laid_out) == 1 else xp.concat(laid_out, axis=-2)


def _stacked(
    found: list[tuple[Array, ...]], lead: tuple[int, ...], problem: AttentionProblem
) -> tuple[Array, ...]:
    """Give the answers of rows the axes of the batch again."""
    if not lead:
        return found[0]
    n_kinds = min(map(len, found))  # of a row without any sequence there is a log-sum-exp anyway
    kinds = list(zip(*(one[:n_kinds] for one in found), strict=True))
    xp = problem.xp
    stacked = [xp.stack(kind) for kind in kinds]
    return tuple(xp.reshape(x, (*lead, *x.shape[1:])) for x in stacked)


def gradients_by_sequence(
    problem: AttentionProblem,
    given: OutputGradient,
    gradients: Callable[[AttentionProblem, OutputGradient], Three],
) -> Three:
    """Gradients for q, k and v of a problem with lengths, in their shapes."""
    if not _takes_parts(problem):
        return gradients(problem.with_mask_for_lengths(), _without_padding(problem, given))
    lead, rows = _rows(problem)
    found = []
    for place, parts in rows:
        row, own = (problem.element(place), given.element(place)) if lead else (problem, given)
        pieces = [
            (part, gradients(row.part(part), own.part(part.queries)))
            for part in parts
            if part.n_queries and part.n_keys
        ]
        dq = [(part.queries, grads[0]) for part, grads in pieces]
        dk, dv = ([(part.keys, grads[i]) for part, grads in pieces] for i in (1, 2))
        found.append(
            tuple(
                put_rows(rows_of, x.shape[-2], x, row)
                for rows_of, x in ((dq, row.q), (dk, row.k), (dv, row.v))
            )
        )
    dq, dk, dv = _stacked(found, lead, problem)
    return problem.sum_to_inputs((dq, dk, dv)) if lead else (dq, dk, dv)


def _without_padding(problem: AttentionProblem, given: OutputGradient) -> OutputGradient:
    """Let queries that are padding weigh nothing: a log-sum-exp of infinity leaves no weight to any key."""
    lengths, xp = problem.lengths, problem.xp
    assert lengths is not None
    if lengths.n_sequences > 1:
        return given
    real = is_within(lengths.q, problem.q.shape[-2], problem.backend, problem.q)
    if real is None:
        return given
    real = real[..., None, None, :]
    return OutputGradient(
        xp.where(real, given.lse, xp.full_like(given.lse, math.inf)),
        xp.where(real, given.delta, xp.zeros_like(given.delta)),
        xp.where(real[..., None], given.grad_out, xp.zeros_like(given.grad_out)),
    )


def slope_gradient_by_sequence(
    problem: AttentionProblem,
    given: OutputGradient,
    gradient: Callable[[AttentionProblem, OutputGradient], Array],
) -> Array:
    """Gradient for the slopes of a problem with lengths, in their shape."""
    xp, alibi = problem.xp, problem.options.alibi
    if alibi is None:
        raise AssertionError("there are slopes")
    if not _takes_parts(problem):
        small = problem.with_mask_for_lengths()
        if small.options.alibi is None:
            return _dense_slope_gradient(problem, small, given)
        return gradient(small, _without_padding(problem, given))
    lead, rows = _rows(problem)
    found = []
    for place, parts in rows:
        row, own = (problem.element(place), given.element(place)) if lead else (problem, given)
        total = xp.zeros_like(row.options.alibi)
        for part in parts:
            if part.n_queries and part.n_keys:
                total = total + gradient(row.part(part), own.part(part.queries))
        found.append((total,))
    (whole,) = _stacked(found, lead, problem)
    return sum_to(whole, alibi.shape, xp)


def _dense_slope_gradient(
    problem: AttentionProblem, written: AttentionProblem, given: OutputGradient
) -> Array:
    """Gradient for the slopes from all scores at once, where distances are written out anyway."""
    xp, (q, k, v) = problem.xp, problem[:3]
    alibi: Array = problem.options.alibi
    sizes = q.shape[-2], k.shape[-2]
    options = written.options
    bounds = TileBounds(written.mask, options, Tile(0, sizes[0], 0, sizes[1]), 0)
    grad_weights = given.grad_out @ xp.matrix_transpose(v)
    products = (q * options.scale) @ xp.matrix_transpose(k)
    sums = given.lse[..., None], given.delta[..., None]
    weights, _ = problem.backend.tile_gradients(products, grad_weights, bounds, *sums)
    distances = problem.distances_written_out()
    return sum_to(-weights * (grad_weights - sums[1]) * distances, alibi.shape, xp)
