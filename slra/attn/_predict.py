"""What error a basis will make, from rows of the attention matrix."""

from typing import NamedTuple

from slra._typing import Array, Namespace
from slra.attn._rows import Grouped, row_weights, take_rows

__all__ = ["GroupedMaps", "output_error"]


class GroupedMaps(NamedTuple):
    """Maps laid out by key head: wq (..., H, G or 1, D, r), wk (..., H, D, r), wv (..., H, Dv, r), c, mu."""

    wq: Array
    wk: Array
    wv: Array
    c: Array
    mu: Array


def output_error(data: Grouped, maps: GroupedMaps, rows: list[int], *, pool_batch: bool) -> Array:
    """Relative Frobenius error of these rows of the output, (..., H, G); pooled over the batch where asked."""
    table, xp = data.table, data.table.xp
    q = take_rows(data.q, rows, table)
    weights = row_weights(data, q, data.k, rows)
    exact = weights @ data.v[..., None, :, :]
    approximate = _output(data, maps, q, rows)
    axes = (*range(exact.ndim - 4), -2, -1) if pool_batch else (-2, -1)
    return _norm(approximate - exact, axes, xp) / _nonzero(_norm(exact, axes, xp), xp)


def _output(data: Grouped, maps: GroupedMaps, q: Array, rows: list[int]) -> Array:
    """Rows of the output under the maps."""
    xp = data.table.xp
    small_q, small_k = q @ maps.wq, (data.k - maps.c) @ maps.wk
    if data.options.softcap is not None:
        shift = q @ xp.matrix_transpose(maps.c)[..., None, :, :]
        small_q = xp.concat([small_q, shift], axis=-1)
        small_k = xp.concat([small_k, xp.ones_like(small_k[..., :1])], axis=-1)
    weights = row_weights(data, small_q, small_k, rows)
    small_v = ((data.v - maps.mu) @ maps.wv)[..., None, :, :]
    back = xp.matrix_transpose(maps.wv)[..., None, :, :]
    attended = xp.sum(weights, axis=-1, keepdims=True)  # 0 where a row attends to nothing, else 1
    return weights @ small_v @ back + attended * maps.mu[..., None, :, :]


def _norm(x: Array, axes: tuple[int, ...], xp: Namespace) -> Array:
    peak = xp.max(xp.abs(x), axis=axes, keepdims=True)
    scaled = x / _nonzero(peak, xp)
    return xp.sqrt(xp.sum(scaled * scaled, axis=axes)) * xp.squeeze(peak, axis=axes)


def _nonzero(x: Array, xp: Namespace) -> Array:
    return xp.where(x == 0, xp.ones_like(x), x)
