"""What a low-rank attention layer computes between its input and output projections, whatever the framework."""

import math
from typing import NamedTuple

from slra._backends.ambient import isolated
from slra._typing import Array
from slra._validate import check_choice, check_l1, resolve
from slra.attn.exact import attention
from slra.attn.fit import Ranks
from slra.attn.problem import Seen, make_problem
from slra.attn.projections import Projections, projected_output
from slra.objective import L1, l1_penalty, l1_penalty_prox

__all__ = ["L1", "Approximation", "attend", "check_form", "mask_of_fit", "what_is_seen"]

# An added number up to here hides: what people add is -1e9, or the least number of a dtype, -65504 in half precision.
# Biases by distance, such as ALiBi's, are some thousands at most.
HIDES = -1e4


def what_is_seen(mask: Array | None, *, is_self: bool) -> Seen:
    """Find queries that see a key under a mask, (..., H, L), and keys that a query sees, (..., H, S).

    In self-attention a token that no query of any head sees is padding, and its query is hidden as well.
    """
    if mask is None:
        return Seen(None, None)
    xp = resolve(mask=mask).xp
    visible = mask if mask.dtype == xp.bool else mask > HIDES
    queries, keys = xp.any(visible, axis=-1), xp.any(visible, axis=-2)
    if is_self:
        tokens = keys if keys.ndim < 2 else xp.any(keys, axis=-2, keepdims=True)
        queries = queries & tokens
    return Seen(queries, keys)


def mask_of_fit(mask: Array | None, seen: Seen) -> Array | None:
    """Hide entirely what a mask hides: by -inf where it adds, and queries of padding from all keys."""
    if mask is None or seen.queries is None:
        return mask
    xp, rows = resolve(mask=mask).xp, seen.queries[..., None]
    if mask.dtype == xp.bool:
        return mask & rows
    return xp.where(rows & (mask > HIDES), mask, xp.asarray(-math.inf, dtype=mask.dtype))


class Approximation(NamedTuple):
    """Q^, K^ and V^: projections of three arrays, or three arrays as they are."""

    projections: Projections | None
    q: Array
    k: Array
    v: Array
    seen: Seen = Seen(None, None)

    def __deepcopy__(self, memo: object) -> None:
        """Leave it out of a copy of a layer: tensors of a graph cannot be copied."""

    def penalty(self, l1: L1) -> Array:
        """Weighted norms of what is seen, averaged over leading axes."""
        q, k, v = [
            x if seen is None else _where(seen[..., None], x)
            for x, seen in zip(self.arrays(), self._seen_of_each, strict=True)
        ]
        return l1_penalty(q, k, v, l1) / max(1, math.prod(list(q.shape[:-3])))

    def zeros(self) -> list[float]:
        """Fractions of exact zeros among what is seen."""
        return [
            _share_of_zeros(x, seen)
            for x, seen in zip(self.arrays(), self._seen_of_each, strict=True)
        ]

    @property
    def _seen_of_each(self) -> tuple[Array | None, Array | None, Array | None]:
        return self.seen.queries, self.seen.keys, self.seen.keys

    @isolated
    def arrays(self) -> tuple[Array, Array, Array]:
        """Write them out, as wide as q, k and v."""
        if self.projections is None:
            return self.q, self.k, self.v
        # Autocast makes q, k and v narrower than the projections, and no product takes two dtypes.
        backend, like = resolve(q=self.q), self.projections.q_down
        q, k, v = [
            backend.xp.astype(x, backend.common_dtype(x, like), copy=False)
            for x in (self.q, self.k, self.v)
        ]
        return self.projections.approximate(q, k, v)


def _where(seen: Array, x: Array) -> Array:
    xp = resolve(x=x).xp
    return xp.where(seen, x, xp.zeros_like(x))


def _share_of_zeros(x: Array, seen: Array | None) -> float:
    xp = resolve(x=x).xp
    is_zero = xp.astype(x == 0, xp.float32)
    if seen is None:
        return float(xp.mean(is_zero))
    counts = xp.broadcast_to(xp.astype(seen, xp.float32)[..., None], x.shape)
    return float(xp.sum(is_zero * counts) / xp.sum(counts))


def check_form(l1_form: str) -> None:
    """Raise ValueError unless the form of the l1 term is known."""
    check_choice(l1_form, ("penalty", "prox"), "l1_form")


@isolated
def attend(
    given: Approximation,
    ranks: Ranks | None,
    *,
    l1: L1,
    l1_form: str,
    mask: Array | None,
    is_causal: bool,
) -> tuple[Array, Approximation]:
    """Attend to Q^, K^ and V^, after the soft threshold where that is the form of the l1 term.

    Projections alone run in r dimensions. Thresholded matrices are of any rank and run in D. Returned with the output
    is what was attended to.
    """
    projections, q, k, v, seen = given
    weights = check_l1(l1, backend=resolve(q=q))
    # What is not a float cannot be looked at: it may be above 0.
    may_shrink = [not isinstance(one, float) or one > 0 for one in weights]
    if l1_form == "prox" and any(may_shrink):
        hats = l1_penalty_prox(*given.arrays(), weights)
        q, k, v = hats
        if projections is not None:
            v = v + projections.mu
        out = _exact(q, k, v, mask, is_causal)
        # Projections of half precision are single, and so is what they are applied to.
        return resolve(out=out).xp.astype(out, given.q.dtype, copy=False), Approximation(
            None, *hats, seen
        )
    if projections is None or ranks is None:
        return _exact(q, k, v, mask, is_causal), given
    problem = make_problem(q, k, v, mask=mask, is_causal=is_causal, causal_align="top_left")
    return problem.answer(projected_output(problem, projections, ranks)), given


def _exact(q: Array, k: Array, v: Array, mask: Array | None, is_causal: bool) -> Array:
    return attention(q, k, v, mask=mask, is_causal=is_causal, causal_align="top_left")
