"""What a low-rank attention layer computes between its input and output projections, whatever the framework."""

from typing import NamedTuple

from slra._typing import Array
from slra._validate import check_choice, check_l1, resolve
from slra.attn.exact import attention
from slra.attn.fit import Ranks
from slra.attn.problem import make_problem
from slra.attn.projections import Projections, projected_output
from slra.objective import L1, l1_penalty_prox

__all__ = ["L1", "Approximation", "attend", "check_form"]


class Approximation(NamedTuple):
    """Q^, K^ and V^: projections of three arrays, or three arrays as they are."""

    projections: Projections | None
    q: Array
    k: Array
    v: Array

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


def check_form(l1_form: str) -> None:
    """Raise ValueError unless the form of the l1 term is known."""
    check_choice(l1_form, ("penalty", "prox"), "l1_form")


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
    projections, q, k, v = given
    weights = check_l1(l1, backend=resolve(q=q))
    # What is not a float cannot be looked at: it may be above 0.
    may_shrink = [not isinstance(one, float) or one > 0 for one in weights]
    if l1_form == "prox" and any(may_shrink):
        hats = l1_penalty_prox(*given.arrays(), weights)
        q, k, v = hats
        if projections is not None:
            v = v + projections.mu
        return _exact(q, k, v, mask, is_causal), Approximation(None, *hats)
    if projections is None or ranks is None:
        return _exact(q, k, v, mask, is_causal), given
    problem = make_problem(q, k, v, mask=mask, is_causal=is_causal, causal_align="top_left")
    return problem.answer(projected_output(problem, projections, ranks)), given


def _exact(q: Array, k: Array, v: Array, mask: Array | None, is_causal: bool) -> Array:
    return attention(q, k, v, mask=mask, is_causal=is_causal, causal_align="top_left")
