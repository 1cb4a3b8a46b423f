"""The gradient of low-rank attention, for libraries that do not differentiate."""

import operator
from typing import NamedTuple

from slra._backends.standard.attention import sum_to
from slra._typing import Array, CausalAlign, Namespace
from slra.attn._approximation import Mapped, Thresholded, approximate, check_options
from slra.attn._inputs import Inputs, check_inputs, join_heads
from slra.attn._maps import METHODS
from slra.attn.basis import AttentionBasis, Maps, per_query_head
from slra.attn.exact_keys import ExactKeys, exact_part, without
from slra.attn.vjp import Results, check_results, lse_shape, pull_back

__all__ = ["low_rank_attention_vjp"]


def low_rank_attention_vjp(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    grad_out: Array,
    rank: int | tuple[int, int] | None = None,
    *,
    grad_lse: Array | None = None,
    rtol: float | None = None,
    method: str = "output",
    l1: float | tuple[float, float, float] = 0.0,
    n_exact: int = 0,
    basis: AttentionBasis | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    causal_align: CausalAlign = "bottom_right",
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
) -> tuple[Array, Array, Array]:
    r"""Vector-Jacobian product of `low_rank_attention`, its basis being constant.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, as given to `low_rank_attention`, real floating.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    out : array, shape (..., Hq, Nq, Dv)
        What `low_rank_attention` returned.
    lse : array, shape (..., Hq, Nq)
        The log-sum-exp that it returned with ``return_lse``.
    grad_out : array, shape (..., Hq, Nq, Dv)
        Gradient of a scalar with respect to ``out``.
    rank, rtol, method, l1, n_exact, basis
        As they were given to `low_rank_attention`; of the methods "output", "scores" and "svd". Without ``basis`` the
        fit is made a second time: to fit once, call `fit_attention` and give ``basis`` to both.
    grad_lse : array, shape (..., Hq, Nq), optional
        Gradient of the scalar with respect to ``lse``; zero by default.
    mask, is_causal, causal_align, scale, enable_gqa, softcap
        As they were given to `low_rank_attention`. The mask is treated as a constant.

    Returns
    -------
    dq, dk, dv : array
        In the shapes of q, k and v (summed over axes that were broadcast) and their common dtype.

    Raises
    ------
    TypeError
        If an array is not real floating, or they come from different libraries.
    ValueError
        If shapes do not fit, options do not go together as in `low_rank_attention`, or ``method`` is one of those for
        comparison.

    Notes
    -----
    Under a basis it is the gradient of attention, `attention_vjp`, in r + 1 dimensions: the shift of the keys is
    carried as one more, and the values have one more that counts what is attended to,

    .. math::
        Q' = Q\,[W_q, c^T], \quad K' = [(K - c) W_k, 1], \quad V' = [(V - \mu) W_v, 1], \quad U' = [U_v; \mu], \quad
        \bar O' = \bar O U'^T

    and :math:`\bar Q = \bar Q' [W_q, c^T]^T`, :math:`\bar K = \bar K'_{1..r} W_k^T`,
    :math:`\bar V = \bar V'_{1..r} W_v^T`. Heads of different ranks run at the largest.

    With ``l1`` the gradients for Q^, K^ and V^ pass where an entry is not zero, and then through the projections:
    :math:`\bar Q = (\bar{\hat Q} \circ [\hat Q \ne 0])\, V_Q V_Q^T`.

    References
    ----------
    T. Dao et al., FlashAttention, arXiv:2205.14135, Algorithm 4.

    Examples
    --------
    At full rank it is the gradient of exact attention.

    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> basis = slra.fit_attention(q, k, v, 8)
    >>> out, lse = slra.low_rank_attention(q, k, v, basis=basis, return_lse=True)
    >>> low_rank = slra.low_rank_attention_vjp(q, k, v, out, lse, out, basis=basis)
    >>> exact = slra.attention_vjp(q, k, v, out, lse, out)
    >>> [bool(np.allclose(*pair)) for pair in zip(low_rank, exact)]
    [True, True, True]
    """
    inputs = check_inputs(
        q,
        k,
        v,
        mask=mask,
        is_causal=is_causal,
        causal_align=causal_align,
        scale=scale,
        enable_gqa=enable_gqa,
        softcap=softcap,
    )
    thresholds, n_exact = check_options(inputs, method, tuple(METHODS), rtol, l1, n_exact)
    same_bits = inputs.backend.same_bits()
    with inputs.backend.ignore_overflow(), same_bits, same_bits:
        found = approximate(
            inputs,
            rank,
            rtol=rtol,
            method=method,
            thresholds=thresholds,
            n_exact=n_exact,
            basis=basis,
            enable_gqa=enable_gqa,
        )
        given = (out, lse, grad_out, grad_lse)
        if isinstance(found, Thresholded):
            grads = _through_threshold(found, inputs, given, enable_gqa=enable_gqa)
        else:
            grads = _through_maps(found, inputs, given, enable_gqa=enable_gqa)
        dq, dk, dv = inputs.promoted.cast_back(inputs.backend, *_summed(grads, inputs))
    return dq, dk, dv


Grads = tuple[Array, Array, Array]
Given = tuple[Array, Array, Array, Array | None]


def _summed(grads: Grads, inputs: Inputs) -> Grads:
    """Sum over the axes along which q, k and v were broadcast."""
    xp = inputs.backend.xp
    dq, dk, dv = (
        sum_to(gradient, x.shape, xp)
        for gradient, x in zip(grads, (inputs.q, inputs.k, inputs.v), strict=True)
    )
    return dq, dk, dv


def _through_threshold(
    found: Thresholded, inputs: Inputs, given: Given, *, enable_gqa: bool
) -> Grads:
    """Gradient through exact attention, soft thresholds and projections."""
    xp, hats = inputs.backend.xp, found.inputs(inputs)
    results = check_results(inputs, lse_shape(hats, enable_gqa=enable_gqa), *given)
    grads = pull_back(hats, results, enable_gqa=enable_gqa)
    passed = (
        xp.where(x != 0, gradient, xp.zeros_like(gradient)) if tau else gradient
        for gradient, x, tau in zip(grads, (hats.q, hats.k, hats.v), found.thresholds, strict=True)
    )
    return found.projections.pull_back(*passed)


def _through_maps(found: Mapped, inputs: Inputs, given: Given, *, enable_gqa: bool) -> Grads:
    """Gradient through attention in few dimensions, and the keys beside it that stay exact.

    Both see the same log-sum-exp and output, as the shards of the keys do.
    """
    xp, keys = inputs.backend.xp, found.keys
    carried = _carry(found.maps, inputs)
    small = carried.project(inputs)
    if keys is not None:
        small = small._replace(mask=without(keys, inputs, enable_gqa=enable_gqa))
    results = check_results(inputs, lse_shape(small, enable_gqa=enable_gqa), *given)
    inner = results._replace(grad_out=results.grad_out @ xp.matrix_transpose(carried.uv))
    grads = carried.pull_back(pull_back(small, inner, enable_gqa=enable_gqa), xp)
    if keys is None:
        return grads
    exact = _through_exact_keys(keys, inputs, results, enable_gqa=enable_gqa)
    dq, dk, dv = map(operator.add, _summed(grads, inputs), _summed(exact, inputs))
    return dq, dk, dv


class _Carried(NamedTuple):
    """Maps in which the shift of the keys is one more dimension, and the values count what is attended to."""

    maps: Maps
    wq: Array  # (..., Hq, D, r + 1)
    uv: Array  # (..., Hq, r_v + 1, Dv)

    def project(self, inputs: Inputs) -> Inputs:
        """Replace q, k and v by q', k' and v'."""
        xp = inputs.backend.xp
        _, k, v = self.maps.project(inputs.q, inputs.k, inputs.v)
        k, v = (xp.concat([x, xp.ones_like(x[..., :1])], axis=-1) for x in (k, v))
        return inputs._replace(q=inputs.q @ self.wq, k=k, v=v)

    def pull_back(self, grads: Grads, xp: Namespace) -> Grads:
        """Take gradients for q', k' and v' to those for q, k and v."""
        dq, dk, dv = grads
        wk, wv = xp.matrix_transpose(self.maps.wk), xp.matrix_transpose(self.maps.wv)
        return dq @ xp.matrix_transpose(self.wq), dk[..., :-1] @ wk, dv[..., :-1] @ wv


def _carry(maps: Maps, inputs: Inputs) -> _Carried:
    xp = inputs.backend.xp
    uv, mu, c = (per_query_head(x, maps.wq, xp) for x in (maps.uv, maps.mu, maps.c))
    return _Carried(
        maps,
        xp.concat([maps.wq, xp.matrix_transpose(c)], axis=-1),
        xp.concat([uv, mu], axis=-2),
    )


def _through_exact_keys(
    keys: ExactKeys, inputs: Inputs, results: Results, *, enable_gqa: bool
) -> Grads:
    """Gradient through the exact keys, each put where its key is."""
    part = exact_part(inputs, keys, enable_gqa=enable_gqa)
    backend, xp, lead = part.backend, part.backend.xp, part.q.shape[:-2]
    lse, delta, grad_out = (
        xp.reshape(x, (*lead, *x.shape[x.ndim - n :]))
        for x, n in zip(results, (1, 1, 2), strict=True)
    )
    dq, dk, dv = backend.attention_vjp(
        part.q, part.k, part.v, part.mask, part.options, lse, delta, grad_out
    )
    every = xp.arange(inputs.k.shape[-2], device=backend.creation_device(inputs.k))
    place = xp.astype(every[:, None] == keys.indices[..., None, :], dk.dtype)
    dk, dv = (place @ x[..., 0, :, :] for x in (dk, dv))
    if not inputs.has_heads:
        return dq[0, 0, ...], dk[0, ...], dv[0, ...]
    return join_heads(dq, inputs, 2), dk, dv
