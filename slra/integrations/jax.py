"""The low-rank, l1-penalised attention layer as pure functions for JAX: parameters, a basis and data in, output out.

Needs: jax. The formula is that of `slra.integrations.torch.LowRankAttention`, whose ``state_dict`` makes parameters:
``{name: jnp.asarray(x.detach().numpy()) for name, x in layer.named_parameters()}``.
"""

import math
from collections.abc import Callable
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
from slra.prox.l1 import prox_l1

__all__ = [
    "Attended",
    "Projections",
    "Transformation",
    "adam_step_size",
    "apply",
    "fit",
    "init",
    "proximal",
]

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


class Transformation(NamedTuple):
    """Two functions, as ``optax.GradientTransformation`` has them.

    Attributes
    ----------
    init : callable
        ``init(params)``: a state.
    update : callable
        ``update(gradients, state, params)``: what to add to the parameters, and the next state.

    Examples
    --------
    See `proximal`.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]


def proximal(transform: Any, l1: Any, step_size: Callable[[Any, Any], Any]) -> Transformation:
    """Follow the step of an optimizer by a soft threshold in its metric: it minimises the loss plus ``l1 * ||p||_1``.

    Parameters
    ----------
    transform : optax.GradientTransformation
        The whole optimizer, learning rate included. It has to be the last: what comes after would move zeros.
    l1 : float or 0-d array
        lambda, 0 or more.
    step_size : callable
        Given the state after the step and the parameters, returns what gradients were multiplied by in the long run: a
        number, or a pytree of arrays like the parameters. For SGD the learning rate (over 1 - momentum), for Adam see
        `adam_step_size`.

    Returns
    -------
    Transformation
        A transformation of optax.

    Raises
    ------
    ValueError
        In ``update``, if no parameters are given to it, or a threshold is negative or not finite and concrete.

    Notes
    -----
    See `slra.integrations.torch.ProximalOptimizer`.

    Examples
    --------
    >>> import jax
    >>> from slra.integrations import jax as layer
    >>> descent = layer.Transformation(lambda p: (), lambda g, state, p: (-0.5 * g, state))
    >>> optimizer = layer.proximal(descent, 1.0, lambda state, p: 0.5)
    >>> x = jax.numpy.asarray([3.0, 0.5])
    >>> move, _ = optimizer.update(x, optimizer.init(x), x)
    >>> (x + move).tolist()
    [1.0, 0.0]
    """

    def update(gradients: Any, state: Any, params: Any = None, **options: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("params must be given to update: a threshold depends on them")
        moves, state = transform.update(gradients, state, params, **options)
        sizes = step_size(state, params)
        if jax.tree.structure(sizes) != jax.tree.structure(params):
            sizes = jax.tree.map(lambda _: sizes, params)

        def shrunk(x: Array, move: Array, size: Any) -> Array:
            # Exactly what takes a parameter to 0 where the threshold does.
            return prox_l1(x + move, jnp.asarray(l1 * size, x.dtype)) - x

        return jax.tree.map(shrunk, params, moves, sizes), state

    return Transformation(transform.init, update)


def adam_step_size(
    learning_rate: Any, *, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0
) -> Callable[[Any, Any], Any]:
    """Return the ``step_size`` of `proximal` for Adam and AdamW of optax, ``lr / (sqrt(v) + eps)``.

    Parameters
    ----------
    learning_rate : float, 0-d array or callable
        That of the optimizer; a schedule is a function of the number of steps.
    b2, eps, eps_root : float
        As the optimizer has them.

    Returns
    -------
    callable
        It finds in the state what has a ``count`` and second moments ``nu``.

    Raises
    ------
    ValueError
        When called, if there is no such state.

    Examples
    --------
    ``proximal(optax.adam(1e-3), 1e-2, adam_step_size(1e-3))``; a state of Adam's by hand:

    >>> from types import SimpleNamespace
    >>> from jax import numpy as jnp
    >>> from slra.integrations import jax as layer
    >>> state = SimpleNamespace(count=1, nu=jnp.asarray([0.004]))
    >>> [round(float(one), 3) for one in layer.adam_step_size(0.1)((state,), None)]
    [0.05]
    """

    def step_size(state: Any, params: Any) -> Any:
        found = _adam_state(state)
        if found is None:
            raise ValueError("state must have one of Adam in it, with count and nu")
        rate = learning_rate(found.count - 1) if callable(learning_rate) else learning_rate
        debias = 1 - b2**found.count
        return jax.tree.map(lambda nu: rate / (jnp.sqrt(nu / debias + eps_root) + eps), found.nu)

    return step_size


def _adam_state(state: Any) -> Any:
    if hasattr(state, "nu") and hasattr(state, "count"):
        return state
    parts = state if isinstance(state, tuple) else ()
    return next((one for one in map(_adam_state, parts) if one is not None), None)


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
