"""Attention on low-rank approximations of the queries, keys and values."""

from typing import Any

from slra._typing import Array, CausalAlign
from slra._validate import check_flag, check_rank
from slra.attn._approximation import Thresholded, approximate, check_options
from slra.attn._inputs import Inputs, check_inputs, join_heads
from slra.attn._maps import METHODS
from slra.attn._rows import group
from slra.attn.baselines import BASELINES
from slra.attn.basis import AttentionBasis, attend_maps
from slra.attn.exact import attend
from slra.attn.exact_keys import attend_with_exact_keys

__all__ = ["low_rank_attention"]


def low_rank_attention(
    q: Array,
    k: Array,
    v: Array,
    rank: int | tuple[int, int] | None = None,
    *,
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
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    r"""Attention on low-rank approximations of the queries, keys and values.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    rank : int or (int, int)
        Dimensions to keep; a pair gives that of queries and keys, and that of values. With ``rtol``, at most as many.
    rtol : float, optional
        Relative error of the output to stay within, by the smallest ranks that do, see `fit_attention`.
    method : {"output", "scores", "svd", "nystrom", "linformer", "favor", "topk"}
        How the basis is fitted, see `fit_attention`: "svd" replaces Q, K and V each by its truncated SVD. The others
        are for comparison; what ``rank`` counts is, in this order, landmarks, random combinations of the keys,
        random features (from fixed seeds), and the dimensions in which the ``n_exact`` keys of each query are chosen.
    l1 : float or (float, float, float)
        Only with "svd": thresholds of the l1 proximal step on Q^, K^ and V^, in the units of their entries. 0 leaves
        it out. A thresholded matrix is sparse but no longer of low rank: attention then runs in all D dimensions.
    n_exact : int
        Number of keys, per key head, that keep exact scores and values: those that receive most attention. They are
        left out of the fit, and both parts meet in one softmax. Not with ``rtol`` or ``l1``.
    basis : AttentionBasis, optional
        A basis fitted before, instead of ``rank`` and ``method``.
    mask, is_causal, causal_align, scale, enable_gqa, softcap, return_lse
        As in `attention`. The default scale is ``1/sqrt(D)`` of the original D.

    Returns
    -------
    out : array, shape (..., Hq, Nq, Dv)
        In the common dtype of the inputs.
    lse : array, shape (..., Hq, Nq)
        Only with ``return_lse``: log-sum-exp of the approximate scores.

    Raises
    ------
    TypeError
        If an array is not real floating, or ``rank`` is not an int or a pair of them.
    ValueError
        If shapes do not fit, a rank is out of range, ``l1`` is negative, or an input is not finite where values can
        be looked at.

    Notes
    -----
    "svd" with ``l1`` is

    .. math::
        \operatorname{softmax}(S_{\lambda_q}(Q_r) S_{\lambda_k}(K_r)^T / \sqrt{d})\, S_{\lambda_v}(V_r)

    with truncated SVDs :math:`Q_r, K_r, V_r` and soft thresholds S. Without ``l1`` nothing is computed in D
    dimensions but the projections: since :math:`Q_r = Q V_Q V_Q^T`, the scores are
    :math:`(Q V_Q V_Q^T V_K)(K V_K)^T`, exact attention in r dimensions.

    The fit sees all tokens. Under a causal mask an early output therefore depends, through the basis, on later
    tokens; fit on a prefix and pass ``basis`` where that must not be. ``n_exact`` chooses its keys by the attention of
    all tokens too, with ``basis`` or without. Gradients treat the basis, and this choice, as constant.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> exact = slra.attention(q, k, v)
    >>> bool(np.allclose(slra.low_rank_attention(q, k, v, 8), exact))
    True
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
    check_flag(return_lse, "return_lse")
    methods = (*METHODS, *BASELINES)
    thresholds, n_exact = check_options(inputs, method, methods, rtol, l1, n_exact)
    same_bits = inputs.backend.same_bits()
    with inputs.backend.ignore_overflow(), same_bits, same_bits:
        if method in BASELINES:
            others = {"rtol": rtol is not None, "l1": any(thresholds), "basis": basis is not None}
            _check_baseline(inputs, method, {**others, "return_lse": return_lse}, n_exact)
            out = _baseline(inputs, method, rank, n_exact, enable_gqa=enable_gqa)
            return inputs.promoted.cast_back(inputs.backend, out)[0]
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
        if isinstance(found, Thresholded):
            out, lse = attend(found.inputs(inputs), enable_gqa=enable_gqa)
        elif found.keys is None:
            out, lse = attend_maps(found.maps, inputs, enable_gqa=enable_gqa, with_lse=return_lse)
        else:
            out, lse = attend_with_exact_keys(found.maps, inputs, found.keys, enable_gqa=enable_gqa)
        (out,) = inputs.promoted.cast_back(inputs.backend, out)
    return (out, lse) if return_lse else out


def _check_baseline(inputs: Inputs, method: str, others: dict[str, bool], n_exact: int) -> None:
    """Raise ValueError where a baseline is asked for what its paper does not define."""
    options = inputs.options
    if method != "topk":
        others = {
            **others,
            "mask": inputs.mask is not None,
            "is_causal": options.is_causal,
            "softcap": options.softcap is not None,
            "n_exact": n_exact > 0,
        }
    elif n_exact == 0:
        raise ValueError(
            'n_exact must be 1 or more with method "topk": the keys that a query attends to'
        )
    if given := [name for name, is_given in others.items() if is_given]:
        raise ValueError(f"method {method!r} does not take {', '.join(given)}")


def _baseline(inputs: Inputs, method: str, rank: Any, n_exact: int, *, enable_gqa: bool) -> Array:
    """Run a method of others; the rank of those that shorten the sequence is limited by its length."""
    q, k = inputs.q, inputs.k
    limits = {
        "nystrom": (min(q.shape[-2], k.shape[-2]), "min of Nq and Nk"),
        "linformer": (k.shape[-2], "Nk"),
        "favor": (2**31, "a number of features"),
        "topk": (min(k.shape[-2:]), "min of Nk and D"),
    }
    limit, limit_is = limits[method]
    data = group(inputs, enable_gqa=enable_gqa)
    out = BASELINES[method](data, check_rank(rank, limit, limit_is=limit_is), n_exact)
    if not inputs.has_heads:
        return out[0, 0, ...]
    return join_heads(out, inputs, 2)
