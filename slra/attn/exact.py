"""Exact attention, in memory linear in the length of the sequence."""

from slra._backends.ambient import isolated
from slra._typing import Array, CausalAlign
from slra._validate import check_flag
from slra.attn._inputs import Inputs, check_inputs, group_heads, join_heads

__all__ = ["attend", "attend_output", "attention"]


@isolated
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    is_causal: bool = False,
    causal_align: CausalAlign = "bottom_right",
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    r"""Scaled dot-product attention, exact, without ever holding the matrix of scores.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating. Leading axes broadcast; half precision is accumulated in float32.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    mask : array, optional
        Broadcastable to (..., Hq, Nq, Nk). Boolean: True attends. Floating: added to the scaled scores.
    is_causal : bool
        Whether a query attends only to keys that are not after it.
    causal_align : {"bottom_right", "top_left"}
        Where lengths differ: whether the last query meets the last key, or the first the first.
    scale : float, optional
        Factor on the products of queries and keys, ``1/sqrt(D)`` by default.
    enable_gqa : bool
        Whether Hq may be a multiple of Hkv: consecutive query heads then share a key and value head.
    softcap : float, optional
        Scores become ``softcap * tanh(scores / softcap)``, before the mask.
    return_lse : bool
        Whether to return the log-sum-exp of the scores too.

    Returns
    -------
    out : array, shape (..., Hq, Nq, Dv)
        In the common dtype of ``q``, ``k`` and ``v``. A query that attends to nothing gets 0.
    lse : array, shape (..., Hq, Nq)
        Only with ``return_lse``: natural logarithm, float32 or wider, ``-inf`` where nothing is attended to.

    Raises
    ------
    TypeError
        If an array is not real floating, or they come from different libraries.
    ValueError
        If shapes do not fit, an axis is empty, or arrays are on different devices.

    Notes
    -----
    .. math:: \operatorname{softmax}(s Q K^T + M) V

    NaN and infinities in the input propagate. Scores, and sums of values over the keys, have to be in the range of the
    dtype computed in: where they are not, the output is NaN or infinite too.

    References
    ----------
    T. Dao et al., FlashAttention, arXiv:2205.14135.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k = np.zeros((1, 3, 2)), np.ones((1, 3, 2))
    >>> v = np.asarray([[[0.0], [2.0], [4.0]]])
    >>> slra.attention(q, k, v, is_causal=True)[0, :, 0].tolist()
    [0.0, 1.0, 2.0]
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
    if not check_flag(return_lse, "return_lse"):
        (out,) = inputs.promoted.cast_back(
            inputs.backend, attend_output(inputs, enable_gqa=enable_gqa)
        )
        return out
    out, lse = attend(inputs, enable_gqa=enable_gqa)
    (out,) = inputs.promoted.cast_back(inputs.backend, out)
    return out, lse


def attend(inputs: Inputs, *, enable_gqa: bool) -> tuple[Array, Array]:
    """Attention of validated inputs, and its log-sum-exp, in the dtype computed in."""
    if enable_gqa:
        inputs = group_heads(inputs)
    out, lse = inputs.backend.attention(inputs.q, inputs.k, inputs.v, inputs.mask, inputs.options)
    if not enable_gqa:
        return out, lse
    return join_heads(out, inputs, 2), join_heads(lse, inputs, 1)


def attend_output(inputs: Inputs, *, enable_gqa: bool) -> Array:
    """Attention of validated inputs where nobody asks for the log-sum-exp: some libraries are faster then."""
    if enable_gqa:
        inputs = group_heads(inputs)
    out = inputs.backend.attention_output(inputs.q, inputs.k, inputs.v, inputs.mask, inputs.options)
    return join_heads(out, inputs, 2) if enable_gqa else out
