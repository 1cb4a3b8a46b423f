"""The gradient of exact attention, for libraries that do not differentiate."""

from typing import NamedTuple

from slra._backends.ambient import isolated
from slra._backends.standard.attention import scores_batch_shape
from slra._typing import Array, CausalAlign
from slra._validate import promote, resolve
from slra.attn._inputs import Inputs, check_inputs, group_heads, join_heads, split_heads

__all__ = ["Results", "attention_vjp", "check_results", "lse_shape", "pull_back"]


@isolated
def attention_vjp(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    grad_out: Array,
    *,
    grad_lse: Array | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    causal_align: CausalAlign = "bottom_right",
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
) -> tuple[Array, Array, Array]:
    r"""Vector-Jacobian product of `attention`: gradients for q, k and v, without the matrix of weights.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, as given to `attention`, real floating.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    out : array, shape (..., Hq, Nq, Dv)
        What `attention` returned.
    lse : array, shape (..., Hq, Nq)
        The log-sum-exp that it returned with ``return_lse``.
    grad_out : array, shape (..., Hq, Nq, Dv)
        Gradient of a scalar with respect to ``out``.
    grad_lse : array, shape (..., Hq, Nq), optional
        Gradient of the scalar with respect to ``lse``; zero by default.
    mask, is_causal, causal_align, scale, enable_gqa, softcap
        As they were given to `attention`. The mask is treated as a constant.

    Returns
    -------
    dq, dk, dv : array
        In the shapes of q, k and v (summed over axes that were broadcast) and their common dtype.

    Raises
    ------
    TypeError
        If an array is not real floating, or they come from different libraries.
    ValueError
        If shapes do not fit, an axis is empty, or arrays are on different devices.

    Notes
    -----
    With :math:`P = \exp(s Q K^T + M - \ell)` recomputed tile by tile and
    :math:`\delta = \operatorname{rowsum}(\bar O \circ O) - \bar\ell`,

    .. math::
        \bar S = P \circ (\bar O V^T - \delta), \qquad
        \bar Q = s \bar S K, \quad \bar K = s \bar S^T Q, \quad \bar V = P^T \bar O

    Keys may be a shard: with ``out`` and ``lse`` merged over all shards the result is the gradient for this one.

    References
    ----------
    T. Dao et al., FlashAttention, arXiv:2205.14135, Algorithm 4.

    Examples
    --------
    The values get the gradient that the weights, here 1/3 each, give them.

    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.zeros((1, 3, 2)), np.ones((1, 3, 2)), np.ones((1, 3, 1))
    >>> out, lse = slra.attention(q, k, v, return_lse=True)
    >>> dq, dk, dv = slra.attention_vjp(q, k, v, out, lse, np.ones((1, 3, 1)))
    >>> dv[0, :, 0].round(12).tolist()
    [1.0, 1.0, 1.0]
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
    shape = lse_shape(inputs, enable_gqa=enable_gqa)
    with inputs.backend.ignore_overflow():
        results = check_results(inputs, shape, out, lse, grad_out, grad_lse)
        grads = pull_back(inputs, results, enable_gqa=enable_gqa)
        dq, dk, dv = inputs.promoted.cast_back(inputs.backend, *grads)
    return dq, dk, dv


class Results(NamedTuple):
    """What the gradient needs to know of the output, in the dtype computed in."""

    lse: Array
    delta: Array  # rowsum(grad_out * out) - grad_lse
    grad_out: Array


def check_results(
    inputs: Inputs,
    shape: tuple[int, ...],
    out: Array,
    lse: Array,
    grad_out: Array,
    grad_lse: Array | None,
) -> Results:
    """Check what belongs to the output, whose log-sum-exp is of this shape, and bring it to the dtype computed in."""
    resolve(q=inputs.q, out=out, lse=lse, grad_out=grad_out, optional={"grad_lse": grad_lse})
    given = {"out": out, "lse": lse, "grad_out": grad_out}
    if grad_lse is not None:
        given["grad_lse"] = grad_lse
    for name, x in given.items():
        right = shape if name.endswith("lse") else (*shape, inputs.v.shape[-1])
        if tuple(x.shape) != right:
            raise ValueError(f"{name} must have shape {right}, got {tuple(x.shape)}")
    xp, dtype = inputs.backend.xp, inputs.q.dtype
    arrays = promote(inputs.backend, allow_complex=False, **given).arrays
    out, lse, grad_out, *rest = (x if x.dtype == dtype else xp.astype(x, dtype) for x in arrays)
    delta = xp.sum(grad_out * out, axis=-1)
    return Results(lse, delta - rest[0] if rest else delta, grad_out)


def lse_shape(inputs: Inputs, *, enable_gqa: bool) -> tuple[int, ...]:
    """Shape of the log-sum-exp of attention of these inputs."""
    grouped = group_heads(inputs) if enable_gqa else inputs
    batch = scores_batch_shape(grouped.q, grouped.k, grouped.v, grouped.mask)
    if enable_gqa:
        batch = (*batch[:-2], batch[-2] * batch[-1])
    return (*batch, inputs.q.shape[-2])


def pull_back(inputs: Inputs, results: Results, *, enable_gqa: bool) -> tuple[Array, Array, Array]:
    """Lay out the heads, and call the primitive."""
    lse, delta, grad_out = results
    if enable_gqa:
        inputs = group_heads(inputs)
        lse, delta = (split_heads(x, inputs, 1) for x in (lse, delta))
        grad_out = split_heads(grad_out, inputs, 2)
    dq, dk, dv = inputs.backend.attention_vjp(
        inputs.q, inputs.k, inputs.v, inputs.mask, inputs.options, lse, delta, grad_out
    )
    if enable_gqa:
        return join_heads(dq, inputs, 2), dk[..., 0, :, :], dv[..., 0, :, :]
    return dq, dk, dv
