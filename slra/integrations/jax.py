"""The low-rank, l1-penalised attention layer as pure functions for JAX: parameters, a basis and data in, output out.

Needs: jax. The formula is that of `slra.integrations.torch.LowRankAttention`, whose ``state_dict`` makes parameters:
``{name: jnp.asarray(x.detach().numpy()) for name, x in layer.named_parameters()}``.
"""

import math
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from slra._typing import Array
from slra.attn.projections import Projections, fit_projections
from slra.integrations._layer import (
    L1,
    Approximation,
    attend,
    check_form,
    mask_of_fit,
    what_is_seen,
)

__all__ = ["Attended", "Projections", "apply", "fit", "init"]

Params = dict[str, Array]


class Attended(NamedTuple):
    """What the layer returns.

    Attributes
    ----------
    out : array, shape (..., L, E)
    penalty : array, 0-d
        lambda_Q ||Q^||_1 + lambda_K ||K^||_1 + lambda_V ||V^||_1, the norms summed over heads, tokens that are not
        hidden, and features, and averaged over leading axes. To be added to the loss in the form "penalty"; in the form
        "prox" that would count the term twice.
    q, k, v : array, shape (..., H, L, D)
        Q^, K^ and V^, as attention met them; the shift of the values not added.

    Examples
    --------
    >>> import jax
    >>> from slra.integrations import jax as layer
    >>> params = layer.init(jax.random.key(0), 8)
    >>> x = jax.random.normal(jax.random.key(1), (10, 8))
    >>> done = layer.apply(params, x, x, x, num_heads=2)
    >>> done.out.shape, done.q.shape, float(done.penalty)
    ((10, 8), (2, 10, 4), 0.0)
    """

    out: Array
    penalty: Array
    q: Array
    k: Array
    v: Array


def init(
    key: Array,
    embed_dim: int,
    *,
    bias: bool = True,
    kdim: int | None = None,
    vdim: int | None = None,
    dtype: Any = None,
) -> Params:
    """Draw parameters, distributed and named as those of `torch.nn.MultiheadAttention`.

    Parameters
    ----------
    key : array
        Of `jax.random`.
    embed_dim : int
        Width E of the layer.
    bias : bool
        Whether there are biases; they start at 0.
    kdim, vdim : int, optional
        Widths of keys and values, where they are not E.
    dtype : dtype, optional
        That of JAX by default.

    Returns
    -------
    dict
        in_proj_weight (3E, E), out_proj.weight (E, E), in_proj_bias (3E,) and out_proj.bias (E,). With other widths
        q_proj_weight (E, E), k_proj_weight (E, kdim) and v_proj_weight (E, vdim) instead of the first.

    Examples
    --------
    >>> import jax
    >>> from slra.integrations import jax as layer
    >>> {name: x.shape for name, x in layer.init(jax.random.key(0), 8).items()}["in_proj_weight"]
    (24, 8)
    """
    of_in, of_out = jax.random.split(key)

    def draw(key: Array, n_out: int, n_in: int, bound: float) -> Array:
        return jax.random.uniform(key, (n_out, n_in), dtype, -bound, bound)

    params = {"out_proj.weight": draw(of_out, embed_dim, embed_dim, 1 / math.sqrt(embed_dim))}
    widths = [embed_dim if width is None else width for width in (embed_dim, kdim, vdim)]
    if widths == [embed_dim] * 3:
        bound = math.sqrt(6 / (4 * embed_dim))
        params["in_proj_weight"] = draw(of_in, 3 * embed_dim, embed_dim, bound)
    else:
        for name, one, width in zip("qkv", jax.random.split(of_in, 3), widths, strict=True):
            bound = math.sqrt(6 / (embed_dim + width))
            params[f"{name}_proj_weight"] = draw(one, embed_dim, width, bound)
    if bias:
        params["in_proj_bias"] = jnp.zeros(3 * embed_dim, dtype)
        params["out_proj.bias"] = jnp.zeros(embed_dim, dtype)
    return params


def fit(
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    rank: int | tuple[int, int],
    *,
    num_heads: int,
    method: str = "svd",
    mask: Array | None = None,
    is_causal: bool = False,
) -> Projections:
    """Fit the basis of the layer to a batch.

    Parameters
    ----------
    params : dict
        As from `init`.
    query, key, value : array, shapes (..., L, E), (..., S, E or kdim), (..., S, E or vdim)
        One basis is fitted to all leading axes.
    rank, method
        As in `slra.fit_attention`, but for the default; static.
    num_heads : int
        Static.
    mask, is_causal
        As for `apply`. What is hidden takes no part; in self-attention (``query is key``) neither do the queries of
        tokens that no query of any head sees.

    Returns
    -------
    Projections
        A pytree of arrays, constant to gradients.

    Raises
    ------
    TypeError, ValueError
        As `slra.fit_attention`.

    Examples
    --------
    >>> import jax
    >>> from slra.integrations import jax as layer
    >>> params = layer.init(jax.random.key(0), 8)
    >>> x = jax.random.normal(jax.random.key(1), (3, 10, 8))
    >>> layer.fit(params, x, x, x, (2, 3), num_heads=2).q_down.shape
    (2, 4, 2)
    """
    q, k, v = _heads(params, query, key, value, num_heads)
    mask = mask_of_fit(mask, what_is_seen(mask, is_self=query is key))
    projections, _ = fit_projections(
        q,
        k,
        v,
        rank,
        method=method,
        pool_batch=True,
        mask=mask,
        is_causal=is_causal,
        causal_align="top_left",
    )
    return projections


def apply(
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    *,
    num_heads: int,
    projections: Projections | None = None,
    l1: L1 = 0.0,
    l1_form: str = "penalty",
    mask: Array | None = None,
    is_causal: bool = False,
) -> Attended:
    """Attend to low-rank queries, keys and values.

    Parameters
    ----------
    params : dict
        As from `init`.
    query, key, value : array, shapes (..., L, E), (..., S, E or kdim), (..., S, E or vdim)
    num_heads : int
        Static.
    projections : Projections, optional
        From `fit`, constant to gradients; full rank by default.
    l1, l1_form
        As in `slra.integrations.torch.LowRankAttention`. ``l1_form`` is static; ``l1`` may be traced, one number or
        three, so that a schedule compiles nothing anew.
    mask : array, optional
        Broadcastable to (..., num_heads, L, S). Boolean: True attends. Floating: added to the scores.
    is_causal : bool
        Whether a query attends only to keys that are not after it, the first to the first.

    Returns
    -------
    Attended

    Raises
    ------
    TypeError, ValueError
        As `slra.attention`; ValueError where ``l1`` is negative or ``l1_form`` unknown.

    Examples
    --------
    >>> import jax
    >>> from slra.integrations import jax as layer
    >>> params = layer.init(jax.random.key(0), 8)
    >>> x = jax.random.normal(jax.random.key(1), (3, 10, 8))
    >>> projections = layer.fit(params, x, x, x, 2, num_heads=2)
    >>> done = layer.apply(params, x, x, x, num_heads=2, projections=projections, l1=1e-3)
    >>> loss = (done.out**2).mean() + done.penalty
    >>> done.out.shape, loss.shape
    ((3, 10, 8), ())
    """
    check_form(l1_form)
    q, k, v = _heads(params, query, key, value, num_heads)
    ranks = None
    if projections is not None:
        # Constant, as all that is fitted: an optimiser that is given the basis leaves it alone.
        projections = jax.tree.map(jax.lax.stop_gradient, projections)
        ranks = ((projections.q_down.shape[-1], projections.v_down.shape[-1]),) * num_heads
    given = Approximation(projections, q, k, v, what_is_seen(mask, is_self=query is key))
    out, given = attend(given, ranks, l1=l1, l1_form=l1_form, mask=mask, is_causal=is_causal)
    out = jnp.swapaxes(out, -3, -2)
    out = jnp.reshape(out, (*out.shape[:-2], -1)) @ params["out_proj.weight"].T
    if "out_proj.bias" in params:
        out = out + params["out_proj.bias"]
    return Attended(out, given.penalty(l1), *given.arrays())


def _heads(
    params: Params, query: Array, key: Array, value: Array, num_heads: int
) -> tuple[Array, ...]:
    """Project (..., L, E) to the heads' queries, keys and values, (..., H, L, D)."""
    if "in_proj_weight" in params:
        weights = jnp.split(params["in_proj_weight"], 3)
    else:
        weights = [params[f"{name}_proj_weight"] for name in "qkv"]
    projected = [x @ w.T for x, w in zip((query, key, value), weights, strict=True)]
    if "in_proj_bias" in params:
        biases = jnp.split(params["in_proj_bias"], 3)
        projected = [x + b for x, b in zip(projected, biases, strict=True)]
    return tuple(
        jnp.swapaxes(jnp.reshape(x, (*x.shape[:-1], num_heads, -1)), -3, -2) for x in projected
    )
