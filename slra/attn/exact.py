"""Exact attention in memory linear in the length of the sequence, its gradient, and the merge of its parts."""

import math
from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

from slra._backends.ambient import isolated
from slra._backends.standard.attention import scores_batch_shape, sum_to
from slra._backends.standard.hidden import finite_gradients
from slra._typing import AnyArray, Array, ArrayT, AttentionOptions, CausalAlign
from slra._validate import check_flag, promote, resolve
from slra.attn.problem import AttentionProblem, Three, make_problem
from slra.attn.sequences import (
    OutputGradient,
    by_sequence,
    gradients_by_sequence,
    put_rows,
    slope_gradient_by_sequence,
)

__all__ = [
    "OutputGradient",
    "attention",
    "attention_vjp",
    "by_head_gradients",
    "exact_gradients",
    "exact_output",
    "exact_output_and_lse",
    "merge_attention",
    "output_gradient",
]


@overload
def attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> ArrayT: ...


@overload
def attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[ArrayT, ArrayT]: ...


@overload
def attention(
    q: ArrayT, k: ArrayT, v: ArrayT, *, return_lse: bool, **options: Unpack[AttentionOptions]
) -> ArrayT | tuple[ArrayT, ArrayT]: ...


@isolated
def attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    mask: AnyArray | None = None,
    is_causal: bool = False,
    causal_align: CausalAlign | None = None,
    window: tuple[int | None, int | None] | None = None,
    lengths_q: Any = None,
    lengths_k: Any = None,
    sinks: AnyArray | None = None,
    alibi: AnyArray | None = None,
    scale: float | AnyArray | None = None,
    enable_gqa: bool = False,
    softcap: float | AnyArray | None = None,
    return_lse: bool = False,
) -> ArrayT | tuple[ArrayT, ArrayT]:
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
    causal_align : {"bottom_right", "top_left"} or int, optional
        Which key a query sees last: whether the last query meets the last key, or the first the first, or at which
        key the first query stands. Must be given where ``is_causal`` and Nq is not Nk; elsewhere both are one.
    window : (int or None, int or None), optional
        How many keys a query sees before and after its own, None (or -1) for all: query i, at key p = i plus what
        ``causal_align`` says, sees keys p - left to p + right, and with ``is_causal`` none after p. What is outside is
        not computed.
    lengths_q, lengths_k : sequence or array of int, optional
        Lengths of sequences. Of shape (...), one number for each element of the batch (the axes before the heads): what
        is behind is padding, whose keys are hidden and whose queries get 0. Of shape (..., S), or (S,) where there is
        one row: S sequences are packed in a row, one after another, each of which attends to itself; then both must be
        given, and add up to Nq and Nk. ``causal_align`` counts in each sequence by itself, and "bottom_right" puts its
        last query at its last key. Known values (a list, say) let each sequence take the time it takes alone.
    sinks : array, shape (..., Hq), optional
        One more score for each query head, of a key whose value is 0: it takes its share of the softmax. It is neither
        scaled nor capped, and counts in the log-sum-exp.
    alibi : array, shape (..., Hq), optional
        Slopes: a score loses slope times the distance of its key from the query's place p, after the softcap.
    scale : float or 0-d array, optional
        Factor on the products of queries and keys, ``1/sqrt(D)`` by default. An array may be traced or learned: its
        gradient is that of any other argument, and its values are not looked at.
    enable_gqa : bool
        Whether Hq may be a multiple of Hkv: consecutive query heads then share a key and value head.
    softcap : float or 0-d array, optional
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
        If shapes do not fit, D is 0, arrays are on different devices, lengths do not add up, or
        ``causal_align`` is missing: with a window or slopes too it must be given where Nq is not Nk.

    Notes
    -----
    .. math:: \operatorname{softmax}(s Q K^T + M) V

    NaN and infinities in the input propagate, but for those that a mask (boolean, or -inf) or causality hides: a hidden
    key or value does not matter, whatever it holds, and neither does a query that sees nothing. Under a mask or
    causality a query that sees an infinite key gets NaN. (In a function that torch compiles or transforms, under a mask
    that differs from query to query, this holds for what is hidden from all queries.) Without keys the output is 0.

    Scores, and sums of values over the keys, have to be in the range of the
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
    problem = make_problem(
        q,
        k,
        v,
        mask=mask,
        is_causal=is_causal,
        causal_align=causal_align,
        window=window,
        lengths_q=lengths_q,
        lengths_k=lengths_k,
        sinks=sinks,
        alibi=alibi,
        scale=scale,
        enable_gqa=enable_gqa,
        softcap=softcap,
        keep_half=return_lse is False,
        may_be_empty=True,
    )
    out: ArrayT
    if not check_flag(return_lse, "return_lse") and sinks is None:
        out = problem.answer(exact_output(problem))
        return out
    found, lse = problem.with_sinks(*exact_output_and_lse(problem))
    out = problem.answer(found)
    return (out, problem.answer_lse(lse)) if return_lse else out


def exact_output_and_lse(problem: AttentionProblem) -> tuple[Array, Array]:
    """Attention without sinks and its log-sum-exp, laid out as the problem is, in the dtype computed in."""
    if problem.is_empty:
        return _empty_output(problem)
    if problem.lengths is not None:
        out, lse = by_sequence(problem, exact_output_and_lse)
        return out, lse
    backend, (small, _) = problem.backend, problem.without_unseen_keys()
    out, lse = backend.heeded(backend.attention, *small[:5])
    return out, lse


def exact_output(problem: AttentionProblem) -> Array:
    """Attention without sinks where nobody asks for the log-sum-exp: some libraries are faster then."""
    if problem.is_empty:
        return _empty_output(problem)[0]
    if problem.lengths is not None:
        out, *_ = by_sequence(problem, lambda part: (exact_output(part),))
        return out
    backend, (small, _) = problem.backend, problem.without_unseen_keys()

    def attend(*given: Any) -> tuple[Array, None]:
        return backend.attention_output(*given), None

    return backend.heeded(attend, *small[:5])[0]


def _empty_output(problem: AttentionProblem) -> tuple[Array, Array]:
    """Zeros and -inf, to which gradients lead all the same."""
    xp, q, v = problem.xp, problem.q, problem.v
    shape = (*scores_batch_shape(q, problem.k, v, problem.mask), q.shape[-2])
    like = {"dtype": q.dtype, "device": problem.backend.creation_device(q)}
    zero = sum(xp.sum(x[..., :0, :]) for x in problem[:3])
    out = xp.zeros((*shape, v.shape[-1]), **like) + zero
    return out, xp.full(shape, -math.inf, **like) + zero


@isolated
def attention_vjp(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    out: ArrayT,
    lse: ArrayT,
    grad_out: ArrayT,
    *,
    grad_lse: ArrayT | None = None,
    mask: AnyArray | None = None,
    is_causal: bool = False,
    causal_align: CausalAlign | None = None,
    window: tuple[int | None, int | None] | None = None,
    lengths_q: Any = None,
    lengths_k: Any = None,
    sinks: AnyArray | None = None,
    alibi: AnyArray | None = None,
    scale: float | AnyArray | None = None,
    enable_gqa: bool = False,
    softcap: float | AnyArray | None = None,
) -> tuple[ArrayT, ...]:
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
    mask, is_causal, causal_align, window, lengths_q, lengths_k, sinks, alibi, scale, enable_gqa, softcap
        As they were given to `attention`. The mask is treated as a constant.

    Returns
    -------
    dq, dk, dv : array
        In the shapes of q, k and v (summed over axes that were broadcast) and their common dtype.
    dsinks, dalibi : array
        After these, each where ``sinks`` or ``alibi`` is given: in its shape, and the dtype computed in.

    Raises
    ------
    TypeError
        If an array is not real floating, or they come from different libraries.
    ValueError
        If shapes do not fit, D is 0, or arrays are on different devices.

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
    problem = make_problem(
        q,
        k,
        v,
        mask=mask,
        is_causal=is_causal,
        causal_align=causal_align,
        window=window,
        lengths_q=lengths_q,
        lengths_k=lengths_k,
        sinks=sinks,
        alibi=alibi,
        scale=scale,
        enable_gqa=enable_gqa,
        softcap=softcap,
        may_be_empty=True,
    )
    with problem.backend.ignore_overflow():
        given = output_gradient(problem, problem.lse_shape(), out, lse, grad_out, grad_lse)
        grads: tuple[ArrayT, ...] = problem.answer_inputs(exact_gradients(problem, given))
        grads += by_head_gradients(problem, given, sinks, alibi)
    return grads


def output_gradient(
    problem: AttentionProblem,
    lse_shape: tuple[int, ...],
    out: Array,
    lse: Array,
    grad_out: Array,
    grad_lse: Array | None,
) -> OutputGradient:
    """Check what belongs to the output of a problem, whose log-sum-exp is of this shape, and lay it out."""
    resolve(q=problem.q, out=out, lse=lse, grad_out=grad_out, optional={"grad_lse": grad_lse})
    given = {"out": out, "lse": lse, "grad_out": grad_out}
    if grad_lse is not None:
        given["grad_lse"] = grad_lse
    for name, x in given.items():
        right = lse_shape if name.endswith("lse") else (*lse_shape, problem.v.shape[-1])
        if tuple(x.shape) != right:
            raise ValueError(f"{name} must have shape {right}, got {tuple(x.shape)}")
    xp, dtype = problem.xp, problem.q.dtype
    arrays = promote(problem.backend, allow_complex=False, **given).arrays
    out, lse, grad_out, *rest = (x if x.dtype == dtype else xp.astype(x, dtype) for x in arrays)
    delta = xp.sum(grad_out * out, axis=-1)
    delta = delta - rest[0] if rest else delta
    lse, delta = problem.lay_out_rows(lse), problem.lay_out_rows(delta)
    return OutputGradient(lse, delta, problem.lay_out(grad_out))


def exact_gradients(problem: AttentionProblem, given: OutputGradient) -> Three:
    """Gradients of exact attention, laid out as the problem is; the log-sum-exp that is given may count sinks."""
    if problem.is_empty:
        dq, dk, dv = map(problem.xp.zeros_like, problem[:3])
        return dq, dk, dv
    if problem.lengths is not None:
        return gradients_by_sequence(problem, given, exact_gradients)
    small, start = problem.without_unseen_keys()
    dq, dk, dv = finite_gradients(problem.backend, *small[:5], *given)
    n_keys = problem.k.shape[-2]
    if dk.shape[-2] == n_keys:
        return dq, dk, dv
    keys = slice(start, start + dk.shape[-2])
    dk, dv = (put_rows([(keys, x)], n_keys, x, problem) for x in (dk, dv))
    return dq, dk, dv


def by_head_gradients(
    problem: AttentionProblem, given: OutputGradient, sinks: Any, alibi: Any
) -> tuple[Any, ...]:
    """Gradients with respect to those numbers of each head that there are, in their shapes."""
    xp, grads = problem.xp, []
    if problem.sinks is not None:
        # A key with this score and a value of 0.
        weights = xp.exp(problem.sinks[..., None] - given.lse)
        # A row without keys has a log-sum-exp only where it has a sink.
        gradient = -xp.sum(weights * given.delta, axis=-1)
        grads.append((sinks, sum_to(gradient, problem.sinks.shape, xp)))
    if problem.options.alibi is not None:
        grads.append((alibi, _slope_gradient(problem, given)))
    return tuple(xp.reshape(gradient, tuple(x.shape)) for x, gradient in grads)


def _slope_gradient(problem: AttentionProblem, given: OutputGradient) -> Array:
    if problem.lengths is not None:
        return slope_gradient_by_sequence(problem, given, _slope_gradient)
    if problem.is_empty:
        return problem.xp.zeros_like(problem.options.alibi)
    small, _ = problem.without_unseen_keys()
    hidden_zeroed = small.without_hidden()
    return problem.backend.attention_slope_gradient(*hidden_zeroed[:5], *given)


@isolated
def merge_attention(outs: Sequence[ArrayT], lses: Sequence[ArrayT]) -> tuple[ArrayT, ArrayT]:
    r"""Attention over all keys, from attention over parts of them.

    Parameters
    ----------
    outs : sequence of arrays, each of shape (..., Hq, Nq, Dv)
        Outputs of attention of the same queries on disjoint sets of keys, real floating.
    lses : sequence of arrays, each of shape (..., Hq, Nq)
        Their log-sum-exps, real floating, in the same order. Where one is -inf, or +inf as in FlashAttention 2, the
        query attended to nothing, and the output of this part does not matter.

    Returns
    -------
    out : array, shape (..., Hq, Nq, Dv)
        In the common dtype of ``outs``. A query that attends to nothing in any part gets 0.
    lse : array, shape (..., Hq, Nq)
        Log-sum-exp over all keys, in the common dtype of ``lses`` but no narrower than float32.

    Raises
    ------
    TypeError
        If ``outs`` or ``lses`` is not a list or tuple of real floating arrays of one library.
    ValueError
        If there are none, they are not equally many, shapes differ, or arrays are on different devices.

    Notes
    -----
    .. math::
        \ell = \log \sum_i e^{\ell_i}, \qquad O = \sum_i e^{\ell_i - \ell} O_i

    References
    ----------
    Z. Ye et al., Cascade Inference, FlashInfer, 2024 (the merge of attention states); the rule itself is the online
    softmax of M. Milakov and N. Gimelshein, arXiv:1805.02867.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> parts = [
    ...     slra.attention(q, k[:, part], v[:, part], return_lse=True)
    ...     for part in (slice(0, 20), slice(20, 50))
    ... ]
    >>> out, lse = slra.merge_attention(*zip(*parts))
    >>> bool(np.allclose(out, slra.attention(q, k, v)))
    True
    """
    named_outs, named_lses = _named(outs, "outs"), _named(lses, "lses")
    if len(outs) != len(lses):
        raise ValueError(
            f"outs and lses must have the same length, got {len(outs)} and {len(lses)}"
        )
    backend = resolve(**named_outs, **named_lses)
    _check_shapes(named_outs, named_lses)
    promoted = promote(backend, allow_complex=False, **named_outs)
    with backend.ignore_overflow():
        log_sums = promote(backend, allow_complex=False, **named_lses)
        merged, lse = backend.merged(promoted.arrays, log_sums.arrays)
        out: ArrayT
        (out,) = promoted.cast_back(backend, merged)
    return out, lse


def _named(arrays: Any, name: str) -> dict[str, Array]:
    """Name each array by its place."""
    if not isinstance(arrays, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple of arrays, got {type(arrays).__name__}")
    if not arrays:
        raise ValueError(f"{name} must not be empty")
    return {f"{name}[{i}]": x for i, x in enumerate(arrays)}


def _check_shapes(outs: dict[str, Array], lses: dict[str, Array]) -> None:
    """Raise ValueError unless all outputs have one shape, and the log-sum-exps that without its last axis."""
    shape = tuple(next(iter(outs.values())).shape)
    if len(shape) < 2:
        raise ValueError(
            f"outs[0] must have at least 2 dimensions, (..., Nq, Dv), got shape {shape}"
        )
    for arrays, right in ((outs, shape), (lses, shape[:-1])):
        for name, x in arrays.items():
            if tuple(x.shape) != right:
                raise ValueError(f"{name} must have shape {right}, got {tuple(x.shape)}")
