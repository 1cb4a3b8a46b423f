r"""The low-rank matrices themselves: projections of Q, K and V that keep their D columns.

A basis holds what attention in r dimensions needs; the l1 norm and the soft threshold need Q^, K^ and V^, n by D.
"""

from typing import Any, NamedTuple

from slra._typing import Array, CausalAlign
from slra._validate import check_choice, resolve
from slra.attn._estimators import METHODS
from slra.attn.fit import Fitted, Ranks, fit_problem
from slra.attn.maps import Maps, mapped_output
from slra.attn.problem import AttentionProblem, Three, group_heads, make_problem, ungroup_heads

__all__ = ["Projections", "fit_projections", "project_all", "projected_output"]


class Projections(NamedTuple):
    r"""Projections on low-rank subspaces of the feature axis, each as a map down to r dimensions and one up to D.

    .. math::
        \hat Q = Q\, D_Q U_Q, \qquad \hat K = (K - c)\, D_K U_K, \qquad \hat V = (V - \mu)\, D_V U_V

    Attributes
    ----------
    q_down, q_up : array, shapes (..., Hq, D, r) and (..., Hq, r, D)
    k_down, k_up : array, shapes (..., Hkv, D, r) and (..., Hkv, r, D)
    v_down, v_up : array, shapes (..., Hkv, Dv, r_v) and (..., Hkv, r_v, Dv)
    c, mu : array, shapes (..., Hkv, 1, D) and (..., Hkv, 1, Dv)
        Shifts. That of the keys changes no softmax weight; that of the values is added to the output.

    Examples
    --------
    See `slra.integrations.jax.fit`.
    """

    q_down: Array
    q_up: Array
    k_down: Array
    k_up: Array
    v_down: Array
    v_up: Array
    c: Array
    mu: Array

    def approximate(self, q: Array, k: Array, v: Array) -> Three:
        """Return Q^, K^ and V^, in the shapes of q, k and v."""
        return (
            (q @ self.q_down) @ self.q_up,
            (k @ self.k_down - self.c @ self.k_down) @ self.k_up,
            (v @ self.v_down - self.mu @ self.v_down) @ self.v_up,
        )

    def pull_back(self, dq: Array, dk: Array, dv: Array) -> Three:
        """Take gradients for Q^, K^ and V^ to those for q, k and v, the projections being constant."""
        transposed = resolve(dq=dq).xp.matrix_transpose
        dq = (dq @ transposed(self.q_up)) @ transposed(self.q_down)
        dk = (dk @ transposed(self.k_up)) @ transposed(self.k_down)
        dv = (dv @ transposed(self.v_up)) @ transposed(self.v_down)
        return dq, dk, dv


def project_all(fitted: Fitted) -> Projections:
    """Projections of a fit, laid out as its problem is.

    "svd" projects on right singular vectors. The other methods have Wq^T Wk = 1, so that Wq Wk^T is a projection,
    oblique, which may as well be applied to Q and its transpose to K: the scores are the same.
    """
    maps, factors = fitted.maps, fitted.factors
    transposed = fitted.problem.xp.matrix_transpose
    left = factors.left[..., : maps.wk.shape[-1]]
    q_up, k_up = transposed(maps.wk), transposed(left)
    if factors.is_formula:
        q_up, k_up = k_up, q_up
    return Projections(left, q_up, maps.wk, k_up, maps.wv, maps.uv, maps.c, maps.mu)


def fit_projections(
    q: Array,
    k: Array,
    v: Array,
    rank: Any,
    *,
    rtol: float | None = None,
    method: str = "svd",
    pool_batch: bool = False,
    mask: Array | None = None,
    is_causal: bool = False,
    causal_align: CausalAlign | None = None,
) -> tuple[Projections, Ranks]:
    """Fit projections, as `fit_attention` fits a basis; with them the ranks of each head."""
    check_choice(method, tuple(METHODS), "method")
    problem = make_problem(q, k, v, mask=mask, is_causal=is_causal, causal_align=causal_align)
    problem.check_finite()
    fitted = fit_problem(problem, rank, rtol=rtol, method=method, pool_batch=pool_batch)
    has_heads = any(problem.with_heads)
    laid_out = project_all(fitted)
    by_head = Projections(*(ungroup_heads(x, has_heads, problem.backend) for x in laid_out))
    return by_head, fitted.ranks


def projected_output(problem: AttentionProblem, projections: Projections, ranks: Ranks) -> Array:
    """Attention on Q^, K^ and V^ + mu, which runs in r dimensions; projections by head."""
    xp = problem.xp
    laid_out = Projections(*(group_heads(x, 1, problem.backend) for x in projections))
    q_down, q_up, k_down, k_up, v_down, v_up, c, mu = laid_out
    maps = Maps(q_down @ (q_up @ xp.matrix_transpose(k_up)), k_down, v_down, v_up, c, mu, ranks)
    return mapped_output(problem, maps.in_dtype_of(problem), with_lse=False)[0]
