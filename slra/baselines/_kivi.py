"""Attention on keys and values rounded to few bits by groups."""

from slra._backends.ambient import isolated
from slra._typing import AnyArray, Array, ArrayT, CausalAlign, Namespace
from slra._validate import check_count, check_rank
from slra.attn.exact import exact_output
from slra.attn.problem import make_problem

__all__ = ["kivi", "round_by_groups"]


@isolated
def kivi(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    bits: int,
    *,
    group_size: int = 32,
    n_exact: int = 0,
    mask: AnyArray | None = None,
    is_causal: bool = False,
    causal_align: CausalAlign | None = None,
    scale: float | AnyArray | None = None,
    enable_gqa: bool = False,
    softcap: float | AnyArray | None = None,
) -> ArrayT:
    """Attention on keys and values in few bits: keys rounded by channel, values by token.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating.
    k : array, shape (..., Hkv, Nk, D)
        Keys; each channel of ``group_size`` tokens has a zero point and a scale of its own.
    v : array, shape (..., Hkv, Nk, Dv)
        Values; each token has, for ``group_size`` channels.
    bits : int
        Of a number, 1 to 16; zero points and scales, in half precision, take ``32 / group_size`` more.
    group_size : int
        Numbers that are rounded together; the last group of an axis may have fewer.
    n_exact : int
        Last tokens that are left as they are.
    mask, is_causal, causal_align, scale, enable_gqa, softcap
        As in `slra.attention`.

    Returns
    -------
    array, shape (..., Hq, Nq, Dv)
        In the common dtype of ``q``, ``k`` and ``v``.

    Raises
    ------
    TypeError
        If an array is not real floating, or a count is not an int.
    ValueError
        If shapes do not fit, a count is out of range, or an input that is concrete is not finite.

    Notes
    -----
    Zero points and scales are computed with in the dtype of the arguments. The paper's cache leaves 128 tokens exact.

    References
    ----------
    Z. Liu et al., KIVI: a tuning-free asymmetric 2bit quantization for KV cache, arXiv:2402.02750, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> slra.baselines.kivi(q, k, v, 4).shape
    (2, 50, 8)
    """
    problem = make_problem(
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
    problem.check_finite()
    bits = check_rank(bits, 16, "bits", "half precision")
    group_size = check_rank(group_size, 2**31 - 1, "group_size", "what a count can be")
    xp, n_exact = problem.xp, check_count(n_exact, "n_exact")
    n_keys = problem.k.shape[-2]
    end = max(0, n_keys - n_exact)
    with problem.backend.ignore_overflow():
        k, v = (
            xp.concat(
                [round_by_groups(x[..., :end, :], bits, axis, group_size, xp), x[..., end:, :]],
                axis=-2,
            )
            for x, axis in ((problem.k, -2), (problem.v, -1))
        )
        out: ArrayT = problem.answer(exact_output(problem._replace(k=k, v=v)))
    return out


def round_by_groups(x: Array, bits: int, axis: int, group_size: int, xp: Namespace) -> Array:
    """Round to ``2**bits`` levels from the least to the largest of each group of neighbours along an axis."""
    parts = []
    for first in range(0, x.shape[axis], group_size):
        rows = slice(first, min(first + group_size, x.shape[axis]))
        part = x[..., rows, :] if axis == -2 else x[..., rows]
        low, high = (f(part, axis=axis, keepdims=True) for f in (xp.min, xp.max))
        step = (high - low) / (2**bits - 1)
        step = xp.where(step > 0, step, xp.ones_like(step))
        parts.append(xp.round((part - low) / step) * step + low)
    return xp.concat(parts, axis=axis) if parts else x
