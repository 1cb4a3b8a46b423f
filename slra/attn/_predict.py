"""What error a basis will make, from rows of the attention matrix."""

from typing import NamedTuple

from slra._typing import Array, Namespace
from slra.attn._rows import Grouped, row_weights, take_rows

__all__ = ["ExactRows", "GroupedMaps", "approximate_rows", "exact_rows", "output_error"]


class GroupedMaps(NamedTuple):
    """Maps laid out by key head: wq (..., H, G or 1, D, r), wk (..., H, D, r), wv (..., H, Dv, r), c, mu."""

    wq: Array
    wk: Array
    wv: Array
    c: Array
    mu: Array


class ExactRows(NamedTuple):
    """Sampled rows, with what their errors are relative to."""

    rows: list[int]
    q: Array  # (..., H, G, S, D)
    centred: Array  # output less mu, over the norm of the output, (..., H, G, S, Dv)
    norm: Array  # (..., H, G, 1, 1)
    axes: tuple[int, ...]  # over which errors are summed


def exact_rows(data: Grouped, mu: Array, rows: list[int], *, pool_batch: bool) -> ExactRows:
    """Compute some rows of the output; pooled over the batch, the error is that of the whole batch."""
    q = take_rows(data.q, rows, data.backend)
    weights = row_weights(data, q, data.k, rows)
    axes = (*range(q.ndim - 4), -2, -1) if pool_batch else (-2, -1)
    norm = _norm(weights @ data.v[..., None, :, :], axes, data.backend.xp)
    centred = weights @ (data.v - mu)[..., None, :, :] / norm
    return ExactRows(rows, q, centred, norm, axes)


def approximate_rows(data: Grouped, maps: GroupedMaps, exact: ExactRows) -> Array:
    """Compute the same rows under the maps, over the same norm, in the coordinates of ``wv``."""
    xp = data.backend.xp
    q, k = exact.q @ maps.wq, (data.k - maps.c) @ maps.wk
    if data.options.softcap is not None:
        shift = exact.q @ xp.matrix_transpose(maps.c)[..., None, :, :]
        q = xp.concat([q, shift], axis=-1)
        k = xp.concat([k, xp.ones_like(k[..., :1])], axis=-1)
    v = (data.v - maps.mu) @ maps.wv
    return row_weights(data, q, k, exact.rows) @ v[..., None, :, :] / exact.norm


def output_error(data: Grouped, maps: GroupedMaps, rows: list[int], *, pool_batch: bool) -> Array:
    """Relative Frobenius error of these rows of the output, (..., H, G)."""
    xp = data.backend.xp
    exact = exact_rows(data, maps.mu, rows, pool_batch=pool_batch)
    back = xp.matrix_transpose(maps.wv)[..., None, :, :]
    error = approximate_rows(data, maps, exact) @ back - exact.centred
    return xp.sqrt(xp.sum(error * error, axis=exact.axes))


def _norm(x: Array, axes: tuple[int, ...], xp: Namespace) -> Array:
    """Frobenius norm without overflow; 1 for zero."""
    peak = xp.max(xp.abs(x), axis=axes, keepdims=True)
    scaled = x / _nonzero(peak, xp)
    return _nonzero(xp.sqrt(xp.sum(scaled * scaled, axis=axes, keepdims=True)) * peak, xp)


def _nonzero(x: Array, xp: Namespace) -> Array:
    return xp.where(x == 0, xp.ones_like(x), x)
