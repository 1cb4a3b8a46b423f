"""Sparse and low rank for each query: leading coordinates of all keys say which few are read in all of them.

With coordinates split in two, q'k' = q1 k1 + q2 k2, a step scores all keys by q1 k1, adds q2 k2 for those that it
chooses, and takes one softmax. Likewise all values count in their leading coordinates, and those chosen in the others
too.

Leading coordinates that choose are those of Loki (P. Singhania et al., arXiv:2406.02542), and by mass instead of number
those of Twilight (C. Lin et al., arXiv:2502.02770); both drop the keys that are not chosen. Coordinates that the query
chooses, its largest, are those of SparQ (L. Ribar et al., arXiv:2312.04985), which keeps one mean value for the rest.
"""

import math
from typing import NamedTuple, Protocol

from slra._backends import Backend
from slra._backends.standard.attention import ScoreOptions, capped, hide
from slra._typing import Array, Namespace

__all__ = ["Chosen", "choose", "tile_of_queries"]

# Numbers that are made at once: scores, or coordinates of chosen keys.
MOST_NUMBERS = 1 << 24


class _Chooser(Protocol):
    """What is known of those that choose: the layout of a cache, or a problem."""

    @property
    def xp(self) -> Namespace: ...
    @property
    def backend(self) -> Backend: ...
    @property
    def n_shared(self) -> int: ...
    @property
    def score_options(self) -> ScoreOptions: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def is_static(self) -> bool: ...


class Chosen(NamedTuple):
    """Queries, their scores by leading coordinates, and the keys that each of them reads in full.

    Queries that share a key head are rows of one matrix, (B, H, shared * M, .), and choose together.
    """

    layout: _Chooser
    q: Array  # (B, H, shared * M, r), scaled; the last ones multiply the other coordinates of what is chosen
    products: Array  # (B, H, shared * M, n): with leading coordinates, before the softcap
    mask: Array | None
    places: Array | None  # (B, H, M, t), ascending; None for all
    is_chosen: Array | None  # (B, H, M, t): which of them count; None for all

    def attend(self, v: Array, rest_k: Array, rest_v: Array) -> tuple[Array, Array, Array]:
        """Output in the coordinates of the values, log-sum-exp, and the share of the keys not chosen.

        Leading coordinates of all values are (B, H, n, .), others of what is chosen (B, H, M, t, .), M being 1 for all.
        """
        xp, transposed = self.layout.xp, self.layout.xp.matrix_transpose
        (b, h, n_rows, _), shared = self.q.shape, self.layout.n_shared
        split = (b, h, shared, n_rows // shared)

        def by_query(x: Array) -> Array:
            """(B, H, shared * M, f) to (B, H, M, shared, f): one choice for the query heads that share a key head."""
            return xp.permute_dims(xp.reshape(x, (*split, x.shape[-1])), (0, 1, 3, 2, 4))

        def by_head(x: Array) -> Array:
            return xp.reshape(xp.permute_dims(x, (0, 1, 3, 2, 4)), (b, h, n_rows, x.shape[-1]))

        n_leading = self.q.shape[-1] - rest_k.shape[-1]
        more = by_query(self.q[..., n_leading:]) @ transposed(rest_k)
        if self.is_chosen is not None:
            more = xp.where(self.is_chosen[..., None, :], more, xp.zeros_like(more))
        if self.places is None:
            scores = self._scores(self.products + by_head(more))
            weights, total, lse = _weights(self.layout, scores)
            found = by_query(weights)
        else:
            places = by_head(xp.broadcast_to(self.places[..., None, :], more.shape))
            products = self.layout.backend.add_in_rows(self.products, places, by_head(more))
            weights, total, lse = _weights(self.layout, self._scores(products))
            found = by_query(self.layout.backend.at_places(weights, places))
        if self.is_chosen is not None:
            found = xp.where(self.is_chosen[..., None, :], found, xp.zeros_like(found))
        out = xp.concat([weights @ v, by_head(found @ rest_v)], axis=-1) / total[..., None]
        held = by_head(xp.sum(found, axis=-1, keepdims=True))[..., 0]
        left = xp.clip(1 - held / total, 0, 1)
        return out, lse, xp.where(lse == -math.inf, xp.zeros_like(left), left)

    def _scores(self, products: Array) -> Array:
        xp = self.layout.xp
        return hide(xp, capped(xp, products, self.layout.score_options.softcap), self.mask)


def choose(
    layout: _Chooser,
    n_top: int,
    q: Array,
    shift: Array,
    k: Array,
    mask: Array | None,
    others: Array | None,
    *,
    rank_index: int | None = None,
) -> Chosen:
    """Choose so many keys for queries (B, H, shared * M, r) by their leading coordinates k, (B, H, n, .).

    Or, of all coordinates k, by the ``rank_index`` that are largest in a query, summed over those that choose together.
    ``shift`` is what all scores of a query have besides, and ``others`` the log-sum-exp of the tokens that are exact
    anyway, (B, H, shared * M, .) both: a head whose attention is there has little to say about the rest.
    """
    xp, options = layout.xp, layout.score_options
    q, shift = q * options.scale, shift * options.scale
    if rank_index is None or (layout.top_p is None and n_top >= k.shape[-2]):
        products = q[..., : k.shape[-1]] @ xp.matrix_transpose(xp.astype(k, q.dtype, copy=False))
    else:
        products, q = _by_largest(layout, rank_index, q, k)
    if options.softcap is not None:
        products, shift = products + shift, xp.zeros_like(shift)
    found = Chosen(layout, q, products, mask, None, None)
    if layout.top_p is None and n_top >= k.shape[-2]:
        return found
    scores, shared, n = found._scores(products), layout.n_shared, k.shape[-2]
    n_top = min(n_top, n)
    if layout.top_p is None and shared == 1:
        return found._replace(places=_places(layout, scores, n_top))
    weights, total, lse = _weights(layout, scores)
    if others is not None:
        lse = xp.where(lse == -math.inf, xp.zeros_like(lse), lse + shift[..., 0])
        total = total * (1 + xp.exp(others - lse))
    if total.shape[-1] == shared:
        # A product reads the weights once, and makes no array of their size.
        mass = (1 / total)[..., None, :] @ weights
    else:
        weights = weights / total[..., None]
        mass = xp.sum(xp.reshape(weights, (*weights.shape[:2], shared, -1, n)), axis=2)
    if layout.top_p is None or n_top == 0:
        return found._replace(places=_places(layout, mass, n_top))
    # A key is needed where it, and those with less, have more than may be left.
    largest = xp.sort(mass, axis=-1, descending=True)[..., :n_top]
    before = xp.cumulative_sum(largest, axis=-1) - largest
    is_needed = xp.sum(mass, axis=-1, keepdims=True) - before > (1 - layout.top_p) * shared
    if not layout.is_static:
        n_top = int(xp.max(xp.sum(xp.astype(is_needed, layout.backend.place_dtype), axis=-1)))
    least = xp.min(xp.where(is_needed, largest, xp.full_like(largest, math.inf)), axis=-1)
    places = _places(layout, mass, n_top)
    is_chosen = layout.backend.at_places(mass, places) >= least[..., None]
    return found._replace(places=places, is_chosen=is_chosen)


def tile_of_queries(n_scores: int, n_coordinates: int) -> int:
    """So many queries choose at once, each of which makes so many scores, and reads coordinates of what it chose."""
    return max(1, MOST_NUMBERS // max(1, n_scores, n_coordinates))


def _by_largest(layout: _Chooser, rank_index: int, q: Array, k: Array) -> tuple[Array, Array]:
    """Products with the coordinates that are largest in each query, and the queries in all others."""
    xp, backend, (b, h, n_rows, d), shared = layout.xp, layout.backend, q.shape, layout.n_shared
    split = xp.reshape(q, (b, h, shared, n_rows // shared, d))
    places = _places(layout, xp.sum(xp.abs(split), axis=2), rank_index)
    is_largest = (
        backend.scatter_rows(xp.ones_like(places, dtype=q.dtype), places, d)[:, :, None, ...] > 0
    )
    rest = xp.reshape(xp.where(is_largest, xp.zeros_like(split), split), q.shape)
    if n_rows > shared:
        # Queries differ in what they read: all coordinates are read, once.
        largest = xp.reshape(xp.where(is_largest, split, xp.zeros_like(split)), q.shape)
        return largest @ xp.matrix_transpose(xp.astype(k, q.dtype, copy=False)), rest
    few = backend.at_places(q, xp.broadcast_to(places, (b, h, n_rows, rank_index)))
    return backend.few_features(few, k, places[:, :, 0, :]), rest


def _places(layout: _Chooser, mass: Array, n_top: int) -> Array:
    places = layout.backend.largest_places(mass, n_top)
    return layout.xp.astype(places, layout.backend.place_dtype, copy=False)


def _weights(layout: _Chooser, scores: Array) -> tuple[Array, Array, Array]:
    """Exponentials of scores less their largest, their sum (1 for none), and the log-sum-exp."""
    xp = layout.xp
    peak = xp.max(scores, axis=-1)
    peak = xp.where(peak == -math.inf, xp.zeros_like(peak), peak)
    weights = layout.backend.exp_of_difference(scores, peak[..., None])
    total = xp.sum(weights, axis=-1)
    is_empty = total == 0
    total = xp.where(is_empty, xp.ones_like(total), total)
    lse = peak + xp.log(total)
    return weights, total, xp.where(is_empty, xp.full_like(lse, -math.inf), lse)
