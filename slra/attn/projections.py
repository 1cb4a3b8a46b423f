r"""The low-rank matrices themselves: projections of Q, K and V that keep their D columns.

A basis holds what attention in r dimensions needs; the l1 norm and the soft threshold need Q^, K^ and V^, n by D.
"""

from typing import Any, NamedTuple

from slra._typing import Array, CausalAlign
from slra._validate import check_choice, check_finite, resolve
from slra.attn._inputs import check_inputs
from slra.attn._maps import METHODS
from slra.attn.basis import Maps, per_query_head
from slra.attn.fit import Fitted, fit_inputs, of_query_heads

__all__ = ["Projections", "fit_projections", "lay_out_projections"]

Ranks = tuple[tuple[int, int], ...]


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
    """

    q_down: Array
    q_up: Array
    k_down: Array
    k_up: Array
    v_down: Array
    v_up: Array
    c: Array
    mu: Array

    def approximate(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Return Q^, K^ and V^, in the shapes of q, k and v."""
        return (
            (q @ self.q_down) @ self.q_up,
            (k @ self.k_down - self.c @ self.k_down) @ self.k_up,
            (v @ self.v_down - self.mu @ self.v_down) @ self.v_up,
        )

    def pull_back(self, dq: Array, dk: Array, dv: Array) -> tuple[Array, Array, Array]:
        """Take gradients for Q^, K^ and V^ to those for q, k and v, the projections being constant."""
        transposed = resolve(dq=dq).xp.matrix_transpose
        pairs = (self.q_down, self.q_up), (self.k_down, self.k_up), (self.v_down, self.v_up)
        dq, dk, dv = (
            (gradient @ transposed(up)) @ transposed(down)
            for gradient, (down, up) in zip((dq, dk, dv), pairs, strict=True)
        )
        return dq, dk, dv

    def maps(self, ranks: Ranks) -> Maps:
        """Return the maps under which attention in r dimensions is attention on Q^, K^ and V^ + mu."""
        xp = resolve(q_down=self.q_down).xp
        k_up = per_query_head(self.k_up, self.q_up, xp)
        wq = self.q_down @ (self.q_up @ xp.matrix_transpose(k_up))
        return Maps(wq, self.k_down, self.v_down, self.v_up, self.c, self.mu, ranks)


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
    causal_align: CausalAlign = "bottom_right",
) -> tuple[Projections, Ranks]:
    """Fit projections, as `fit_attention` fits a basis; with them the ranks of each head."""
    check_choice(method, tuple(METHODS), "method")
    inputs = check_inputs(
        q,
        k,
        v,
        mask=mask,
        is_causal=is_causal,
        causal_align=causal_align,
        scale=None,
        enable_gqa=False,
        softcap=None,
    )
    for name in ("q", "k", "v"):
        check_finite(inputs.backend, getattr(inputs, name), name)
    fitted = fit_inputs(
        inputs, rank, rtol=rtol, method=method, enable_gqa=False, pool_batch=pool_batch
    )
    return lay_out_projections(fitted), fitted.ranks


def lay_out_projections(fitted: Fitted) -> Projections:
    """Lay the projections out by query head and key head; without a head axis if the inputs have none.

    "svd" projects on right singular vectors. The other methods have Wq^T Wk = 1, so that Wq Wk^T is a projection,
    oblique, which may as well be applied to Q and its transpose to K: the scores are the same.
    """
    maps, factors = fitted.maps, fitted.factors
    transposed = fitted.data.backend.xp.matrix_transpose
    left = factors.left[..., : maps.wk.shape[-1]]
    if factors.is_formula:
        q_up, k_up = transposed(left), transposed(maps.wk)
    else:
        q_up, k_up = transposed(maps.wk)[..., None, :, :], transposed(left[..., 0, :, :])
    laid_out = Projections(
        of_query_heads(left, fitted),
        of_query_heads(q_up, fitted),
        maps.wk,
        k_up,
        maps.wv,
        transposed(maps.wv),
        maps.c,
        maps.mu,
    )
    return laid_out if fitted.has_heads else Projections(*(x[0, ...] for x in laid_out))
