"""Attention in which the few keys that receive most attention stay exact: sparse plus low rank over the keys."""

from typing import NamedTuple

from slra._backends.standard.attention import combine_masks
from slra._typing import Array
from slra.attn.exact import (
    OutputGradient,
    exact_gradients,
    exact_output_and_lse,
    merge_attention,
)
from slra.attn.maps import Maps, mapped_output
from slra.attn.problem import AttentionProblem, Three
from slra.attn.rows import Rows, row_weights, take_rows

__all__ = [
    "ExactKeys",
    "exact_key_gradients",
    "exact_keys_output",
    "find_exact_keys",
    "output_with_exact_keys",
    "without_exact_keys",
]


class ExactKeys(NamedTuple):
    """The keys that stay exact, and the others."""

    indices: Array  # (..., H, m)
    keep: Array  # (..., H, Nk), False for keys that stay exact: they are not left to the low rank


def find_exact_keys(problem: AttentionProblem, rows: Rows, n_exact: int) -> ExactKeys:
    """Take the keys that receive most attention from these rows, over the query heads that share them."""
    backend, xp = problem.backend, problem.xp
    weights = row_weights(problem, take_rows(problem.q, rows, backend), problem.k, rows)
    indices = backend.top_indices(xp.sum(weights, axis=(-3, -2)), n_exact)
    every = xp.arange(problem.k.shape[-2], device=backend.creation_device(problem.k))
    return ExactKeys(indices, ~xp.any(indices[..., None] == every, axis=-2))


def output_with_exact_keys(
    problem: AttentionProblem, maps: Maps, keys: ExactKeys
) -> tuple[Array, Array]:
    """Attend to some keys exactly and to the others under the maps, in one softmax."""
    rest = problem._replace(mask=without_exact_keys(problem, keys))
    others = mapped_output(rest, maps, with_lse=True)
    return merge_attention(*zip(others, exact_keys_output(problem, keys), strict=True))


def exact_keys_output(problem: AttentionProblem, keys: ExactKeys) -> tuple[Array, Array]:
    """Attend to these keys alone."""
    return exact_output_and_lse(_exact_part(problem, keys))


def without_exact_keys(problem: AttentionProblem, keys: ExactKeys) -> Array:
    """Mask the keys that stay exact, besides those that are masked anyway."""
    return combine_masks(problem.xp, problem.mask, keys.keep[..., None, None, :])


def exact_key_gradients(
    problem: AttentionProblem, keys: ExactKeys, of_output: OutputGradient
) -> Three:
    """Gradients through the exact keys, each put where its key is."""
    backend, xp = problem.backend, problem.xp
    dq, dk, dv = exact_gradients(_exact_part(problem, keys), of_output)
    every = xp.arange(problem.k.shape[-2], device=backend.creation_device(problem.k))
    place = xp.astype(every[:, None] == keys.indices[..., None, None, :], dk.dtype)
    return dq, place @ dk, place @ dv


def _exact_part(problem: AttentionProblem, keys: ExactKeys) -> AttentionProblem:
    """Leave only the keys that stay exact in the problem, (..., H, 1, m, D)."""
    problem = problem.broadcast()
    gather, indices = problem.backend.gather_rows, keys.indices[..., None, :]
    return problem._replace(
        k=gather(problem.k, indices),
        v=gather(problem.v, indices),
        mask=_columns(problem, indices),
        # What causality hides is in the mask: these keys are not in a row.
        options=problem.options._replace(is_causal=False),
    )


def _columns(problem: AttentionProblem, indices: Array) -> Array | None:
    """Cut the columns of these keys out of the mask, and of the causal one, (..., H, G or 1, Nq or 1, m)."""
    backend, xp, mask = problem.backend, problem.xp, problem.mask
    if mask is not None and mask.shape[-1] > 1:
        mask = xp.reshape(mask, ((1,) * (problem.q.ndim - mask.ndim) + tuple(mask.shape)))
        columns = backend.gather_rows(xp.matrix_transpose(mask), indices)
        mask = xp.matrix_transpose(columns)
    if not problem.options.is_causal:
        return mask
    n_queries, n_keys = problem.q.shape[-2], problem.k.shape[-2]
    rows = xp.arange(n_queries, device=backend.creation_device(problem.q))[:, None]
    seen = indices[..., None, :] <= rows + problem.options.diagonal(n_queries, n_keys)
    return combine_masks(xp, mask, seen)
