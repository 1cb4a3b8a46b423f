"""Attention on truncated singular value decompositions of Q, K and V."""

from collections.abc import Sequence
from typing import Any

from slra._backends import Primitives
from slra._backends.agnostic import matrix_h
from slra._typing import Array, CausalAlign
from slra._validate import check_choice, check_finite, check_positive, check_rank
from slra.attn._inputs import Inputs, check_inputs
from slra.attn.exact import attend
from slra.svd.truncated import thin_svd

__all__ = ["low_rank_attention"]


def low_rank_attention(
    q: Array,
    k: Array,
    v: Array,
    rank: int | tuple[int, int],
    *,
    method: str = "svd",
    l1: float | tuple[float, float, float] = 0.0,
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
        Rank of the approximations; a pair gives that of Q and K, and that of V.
    method : {"svd"}
        "svd": Q, K and V are each replaced by their truncated SVD, head by head.
    l1 : float or (float, float, float)
        Thresholds of the l1 proximal step on Q^, K^ and V^, in the units of their entries. 0 leaves it out. A
        thresholded matrix is sparse but no longer of low rank: attention then runs in all D dimensions.
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
    .. math::
        \hat Q = U_r S_r V_r^T \;(\text{likewise } \hat K, \hat V), \qquad
        \operatorname{softmax}(\hat Q \hat K^T / \sqrt{d}) \hat V

    Since :math:`\hat Q = Q V_Q V_Q^T`, the scores are :math:`(Q V_Q V_Q^T V_K)(K V_K)^T`: exact attention in r
    dimensions.

    The decomposition sees all tokens. Under a causal mask an early output therefore depends, through the basis, on
    later tokens.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> exact = slra.attention(q, k, v)
    >>> bool(np.allclose(slra.low_rank_attention(q, k, v, 8), exact))
    True
    """
    check_choice(method, ("svd",), "method")
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
    rank_qk, rank_v = _check_ranks(inputs, rank)
    thresholds = _check_l1(l1)
    for name in ("q", "k", "v"):
        check_finite(inputs.table, getattr(inputs, name), name)
    if any(thresholds):
        out, lse = _thresholded(inputs, rank_qk, rank_v, thresholds, enable_gqa=enable_gqa)
    else:
        out, lse = _projected(inputs, rank_qk, rank_v, enable_gqa=enable_gqa)
    (out,) = inputs.promoted.answer(inputs.table, out)
    return (out, lse) if return_lse else out


def _check_ranks(inputs: Inputs, rank: Any) -> tuple[int, int]:
    """Return the rank of queries and keys, and that of values."""
    pair = rank if isinstance(rank, Sequence) and not isinstance(rank, str) else (rank, rank)
    if len(pair) != 2:
        raise TypeError(f"rank must be an int or a pair (rank_qk, rank_v), got {rank!r}")
    limit_qk = min(inputs.q.shape[-2], inputs.k.shape[-2], inputs.q.shape[-1])
    limit_v = min(inputs.v.shape[-2:])
    return (
        check_rank(pair[0], limit_qk, limit_is="min of Nq, Nk and D"),
        check_rank(pair[1], limit_v, limit_is="min of Nk and Dv"),
    )


def _check_l1(l1: Any) -> tuple[float, float, float]:
    """Return the thresholds of Q^, K^ and V^."""
    triple = l1 if isinstance(l1, Sequence) and not isinstance(l1, str) else (l1, l1, l1)
    if len(triple) != 3:
        raise TypeError(f"l1 must be a number or a triple (l_q, l_k, l_v), got {l1!r}")
    l_q, l_k, l_v = (check_positive(one, "l1", allow_zero=True) for one in triple)
    return l_q, l_k, l_v


def right_basis(x: Array, rank: int, table: Primitives) -> Array:
    """Leading right singular vectors of ``x`` as columns, shape (..., D, rank)."""
    return matrix_h(thin_svd(x, table)[2][..., :rank, :], table.xp)


def _projected(
    inputs: Inputs, rank_qk: int, rank_v: int, *, enable_gqa: bool
) -> tuple[Array, Array]:
    """Exact attention in ``rank`` dimensions."""
    table, xp = inputs.table, inputs.table.xp
    basis_q = right_basis(inputs.q, rank_qk, table)
    basis_k = right_basis(inputs.k, rank_qk, table)
    basis_v = right_basis(inputs.v, rank_v, table)
    cross = _per_query_head(basis_k, inputs.q, xp) if enable_gqa else basis_k
    small = inputs._replace(
        q=inputs.q @ (basis_q @ (xp.matrix_transpose(basis_q) @ cross)),
        k=inputs.k @ basis_k,
        v=inputs.v @ basis_v,
    )
    out, lse = attend(small, enable_gqa=enable_gqa)
    back = _per_query_head(basis_v, inputs.q, xp) if enable_gqa else basis_v
    return out @ xp.matrix_transpose(back), lse


def _per_query_head(basis: Array, q: Array, xp: Any) -> Array:
    """Repeat the small basis of each key head for the query heads that share it."""
    return xp.repeat(basis, q.shape[-3] // basis.shape[-3], axis=-3)


def _thresholded(
    inputs: Inputs,
    rank_qk: int,
    rank_v: int,
    thresholds: tuple[float, float, float],
    *,
    enable_gqa: bool,
) -> tuple[Array, Array]:
    """Exact attention on soft-thresholded low-rank matrices, in all dimensions."""
    table, xp = inputs.table, inputs.table.xp
    hats = []
    for name, rank, tau in zip("qkv", (rank_qk, rank_qk, rank_v), thresholds, strict=True):
        x = getattr(inputs, name)
        basis = right_basis(x, rank, table)
        hats.append(table.soft_threshold((x @ basis) @ xp.matrix_transpose(basis), tau))
    return attend(inputs._replace(q=hats[0], k=hats[1], v=hats[2]), enable_gqa=enable_gqa)
