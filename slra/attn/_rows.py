"""A sample of the rows of the attention matrix: what a fit looks at instead of all of it."""

import math
from typing import NamedTuple

import numpy as np

from slra._backends import Backend
from slra._backends.standard import ScoreOptions
from slra._typing import Array, Namespace
from slra.attn._inputs import Inputs

__all__ = ["Grouped", "group", "row_weights", "sample_rows", "take_rows"]


class Grouped(NamedTuple):
    """Inputs by key head: q (..., H, G, Nq, D), k (..., H, Nk, D), v (..., H, Nk, Dv), all leading axes equal."""

    q: Array
    k: Array
    v: Array
    mask: Array | None
    options: ScoreOptions
    backend: Backend


def group(inputs: Inputs, *, enable_gqa: bool) -> Grouped:
    """Lay the heads of q out by the key head they share; without GQA every group has one."""
    xp = inputs.backend.xp
    q, k, v, mask = inputs.q, inputs.k, inputs.v, inputs.mask
    n_shared = q.shape[-3] // k.shape[-3] if enable_gqa else 1
    q = _split_heads(q if q.ndim > 2 else q[None, ...], n_shared, xp)
    if mask is not None and mask.ndim > 2:
        mask = _split_heads(mask, 1 if mask.shape[-3] == 1 else n_shared, xp)
    k, v = (x if x.ndim > 2 else x[None, ...] for x in (k, v))
    lead = np.broadcast_shapes(q.shape[:-3], k.shape[:-2], v.shape[:-2])
    q = xp.broadcast_to(q, (*lead, *q.shape[-3:]))
    k, v = (xp.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (k, v))
    return Grouped(q, k, v, mask, inputs.options, inputs.backend)


def _split_heads(x: Array, n_shared: int, xp: Namespace) -> Array:
    """Reshape (..., H * n_shared, M, N) to (..., H, n_shared, M, N)."""
    return xp.reshape(x, (*x.shape[:-3], x.shape[-3] // n_shared, n_shared, *x.shape[-2:]))


def sample_rows(
    n: int, n_rows: int, rng: np.random.Generator | None, *, offset: float = 0.0
) -> list[int]:
    """One row from each of ``n_rows`` equal strata, by a generator or, without one, by the golden ratio.

    A fixed stride would meet only one phase of a periodic sequence. Another ``offset`` gives other rows.
    """
    n_rows = min(n, n_rows)
    strata = np.arange(n_rows)
    place = (strata * (math.sqrt(5) - 1) / 2 + offset) % 1 if rng is None else rng.random(n_rows)
    return [int(row) for row in (strata + place) * n / n_rows]


def take_rows(x: Array, rows: list[int], backend: Backend) -> Array:
    """Cut rows out along the second last axis."""
    if len(rows) == x.shape[-2]:
        return x
    return backend.xp.take(x, _indices(rows, x, backend), axis=-2)


def _indices(rows: list[int], like: Array, backend: Backend) -> Array:
    return backend.from_numpy(np.asarray(rows), like, backend.xp.int64)


def row_weights(data: Grouped, q: Array, k: Array, rows: list[int]) -> Array:
    """Rows of the attention matrix, (..., H, G, S, Nk), for queries cut out already; an empty row is 0."""
    backend, xp, options = data.backend, data.backend.xp, data.options
    n_keys = k.shape[-2]
    scores = (q * options.scale) @ xp.matrix_transpose(k)[..., None, :, :]
    if options.softcap is not None:
        scores = options.softcap * xp.tanh(scores / options.softcap)
    if data.mask is not None:
        part = take_rows(data.mask, rows, backend) if data.mask.shape[-2] > 1 else data.mask
        if xp.isdtype(part.dtype, "bool"):
            scores = xp.where(part, scores, xp.full_like(scores, -math.inf))
        else:
            scores = scores + xp.astype(part, scores.dtype)
    if options.is_causal:
        last = _indices(rows, scores, backend)[:, None] + options.diagonal(data.q.shape[-2], n_keys)
        columns = xp.arange(n_keys, device=backend.creation_device(scores))[None, :]
        scores = xp.where(columns <= last, scores, xp.full_like(scores, -math.inf))
    peak = xp.max(scores, axis=-1, keepdims=True)
    weights = xp.exp(scores - xp.where(peak == -math.inf, xp.zeros_like(peak), peak))
    total = xp.sum(weights, axis=-1, keepdims=True)
    return weights / xp.where(total == 0, xp.ones_like(total), total)
